"""E-SPL: Evolutionary System Prompt Learning for Reinforcement Learning in LLMs, in one JAX file.

An unofficial implementation of arXiv 2602.14697. The language model's weights learn by policy
gradient, its system prompts by evolution: selection, TrueSkill ratings, reflection, crossover.

    python espl.py                       # all of it with a tiny model, in under a minute
    python espl.py --task aime           # AIME -> BeyondAIME with Qwen/Qwen3-1.7B from the hub
    python espl.py --task aime --mode rl               # baselines: evolution, reflection, rl
    python espl.py --train-file train.jsonl --test-file test.jsonl --model DIR
    python espl.py --resume runs/aime-espl-20260214-120000

Algorithm 1, its lines numbered from "Initialize S" without "end for", and where they are here:

    line   what                                                        function             at line
    1      Initialize S = {(s_root, mu_0, sigma_0)}                    start_run             1269
    2      while not converged                                         train                  197
    3      sample problems x ~ D                                       next_problems          279
    4      select system prompts s_i from S by mu + lambda sigma       select                 428
    5-6    sample solutions y_ij ~ pi_theta(. | s_i, x)                sample_groups          338
    7      r_ij = R(x, y_ij), V_i = mean_j r_ij                        grade                 1198
    8      the advantages r_ij - V_i                                   set_advantages        382
    8      J = 1/(NM) sum_ij (r_ij - V_i) log pi_theta(y_ij | s_i, x)  surrogate              795
    9      theta <- theta + alpha grad (J - beta KL(pi_theta, pi_ref)) rl_update              759
    10-11  rank the s_i by V_i; TrueSkill.update                       update_ratings        447
    12     k <- argmax_i V_i                                           argmax                423
    13-15  reflect on s_k's rollouts; diff ~ pi_ref; git.apply         mutate                 520
    16     S.append(s_mutate, mu_k, sigma_k + dsigma)                  add_child              465
    17-21  with p_crossover: Algorithm 2; S.append(s', mu', sigma')    crossover              565

Sections: 1 this text, 2 flags, 3 Algorithm 1, 4 evolution, 5 RL update, 6 tasks and words, 7 a run;
then the engine, which a reader of the paper need not open: 8 sampling, 9 the model and its weights.

Objects have short names: c (Config), run (Run), s (SystemPrompt), x (Problem), y (Rollout), g
(Group), r (Tournament), cfg (ModelConfig). V_i is a prompt's mean reward over the batch, V[i,b]
over its rollouts of problem b. In sections 5, 8 and 9 capital suffixes are the axes of an array: B
rows (sequences), T tokens, S cached tokens, N query heads, K key/value heads, G = N / K, H head
dim, D model dim, F feed-forward dim, V vocabulary.

Where this file departs from the paper, and why:
 1. Selection takes the highest score plus random others, the paper's simplified strategy;
    --selection softmax is line 4 as printed, without replacement.
 2. A child's sigma is sqrt(sigma^2 + dsigma^2), as in the appendix and in Algorithm 2.
 3. Prompts next to each other in the ranking tie if their V_i differ by at most 0.01. The seed
    decides between equal batch winners.
 4. A validation split decides which checkpoint is kept beside the last two. The test set only
    reports, and its questions leave the training set. The paper's figures are maxima over test
    evaluations.
 5. The gradient of the KL term is that of the KL over the next token, given the sampled prefix.
 6. Crossover's parents, from which mu' and sigma' come, are the prompts that strictly won a
    problem; the batch winner must be one, as in the authors' code. So it is rarer than p_crossover.
 7. Prompts are ranked by V_i over the whole batch; the advantage's baseline is V[i,b].
docs/released_code.md compares this file with the code that the authors released.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, NamedTuple

ENVIRONMENT = {  # set before the libraries start, unless the user has set it already
    "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/espl/jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # of a GPU's memory
}
os.environ |= ENVIRONMENT | os.environ

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import trueskill  # noqa: E402
from flax import nnx  # noqa: E402
from jax.ad_checkpoint import checkpoint_name  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ==================================================================================================
# 2. Flags. The defaults are the paper's (section Hyper-parameters) where it gives them.

LOSSES = "importance_sampling ppo cispo reinforce"
SELECTIONS = "top_random softmax uniform ucb lucb"
CHANGEABLE = (  # when a run is resumed
    "resume mode epochs iterations save_every distributed model_parallel attention max_rows "
    "microbatch_tokens"
)
PATHS = "train_file test_file prompts_file population model reflector run_dir"


def flag(default, text, group="", low=0, high=math.inf, choices=""):
    """A field of Config: its default, help text, bounds, choices; group starts a part of --help."""
    metadata = {"text": text, "group": group, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Everything that decides a run. Each field is a flag: batch_size is --batch-size."""

    task: str = flag("", "NAME[:ARGUMENT], or a path; '': glyphs; mathematics with files", "Task")
    train_file: str = flag("", "JSONL of training problems, instead of the task's")
    test_file: str = flag("", "JSONL of test problems, instead of the task's")
    train_size: int = flag(256, "most training problems, validation included", low=1)
    val_size: int = flag(16, "training problems held out to pick a checkpoint (max. 1/5)")
    prompts_file: str = flag("", "sections that replace those of prompts_seed.txt and the task")

    model: str = flag("Qwen/Qwen3-1.7B", "hub name, or directory in Hugging Face layout", "Model")
    dtype: str = flag("auto", "float32 on CPU", choices="auto bfloat16 float32")
    attention: str = flag("auto", "xla: no fused kernel", choices="auto xla")
    lora_rank: int = flag(32, "rank of the trained adapter; 0: train all weights")
    model_parallel: int = flag(1, "devices that share each weight; the rest share rows", low=1)
    distributed: str = flag("", "several hosts: 'auto', or 'HOST:PORT,PROCESSES,INDEX'")

    mode: str = flag("espl", "what learns", "Algorithm 1", choices="espl evolution reflection rl")
    batch_size: int = flag(10, "problems in a batch", low=1)
    num_rollouts: int = flag(5, "N, rollouts of each prompt on each problem", low=1)
    num_prompts: int = flag(3, "M, system prompts in a batch", low=1, high=26)
    epochs: int = flag(10, "passes over the training problems", low=1)
    iterations: int = flag(0, "iterations in all, instead of --epochs (0: by epochs)")
    seed: int = flag(0, "decides the whole run")

    learning_rate: float = flag(4e-5, "Adam's; betas (0.9, 0.95), eps 1e-8", "RL update")
    loss: str = flag("importance_sampling", "surrogate for J", choices=LOSSES)
    baseline: str = flag("prompt", "V[i,b], or mean over prompts", choices="prompt marginal")
    clip: float = flag(0.2, "ppo, cispo: ratios within 1 +- this; take 1 - top_p or more", high=1)
    kl_coef: float = flag(0.0, "beta, weight of KL(pi_theta || pi_ref)")
    max_grad_norm: float = flag(0.0, "clip the gradient's global norm (0: off)")
    mask_truncated: bool = flag(False, "do not train on responses cut at the limit")
    microbatch_tokens: int = flag(4096, "tokens of a gradient-accumulation step", low=1)

    temperature: float = flag(0.6, "of rollouts; the policy is tempered", "Sampling", low=1e-3)
    top_p: float = flag(0.95, "nucleus mass", low=1e-6, high=1)
    max_new_tokens: int = flag(15000, "longest response, replies of tools included", low=1)
    max_rows: int = flag(0, "most sequences decoded at once (0: 64 on CPU, else 512)")
    prompt_role: str = flag("system", "where the prompt goes", choices="system user")
    thinking: bool = flag(True, "passed to the chat template as enable_thinking")

    selection: str = flag("top_random", "how prompts are chosen", "Evolution", choices=SELECTIONS)
    selection_temperature: float = flag(1.0, "of --selection softmax", low=1e-6)
    ucb_lambda: float = flag(2.0, "lambda: acquisition score = mu + lambda sigma")
    window: int = flag(10, "how many of the newest prompts can be selected", low=1)
    p_crossover: float = flag(0.2, "chance of crossover in an iteration", high=1)
    delta_sigma: float = flag(1.0, "uncertainty added to a child's rating")
    population: str = flag("", "population.json to start from, ratings and lineage kept")

    reflector: str = flag("reference", "reference, current, MODEL, or URL#NAME", "Reflection")
    reflect_on: str = flag("contrast", "problems it sees", choices="contrast failures all")
    reflect_problems: int = flag(0, "most problems reflected on in an iteration (0: all)")
    max_operations: int = flag(2, "K_ops, edits proposed for one problem", low=1)
    reflect_temperature: float = flag(0.6, "sampling temperature of reflection")
    reflect_tokens: int = flag(8192, "longest reply", low=1)
    max_principles: int = flag(40, "most principles in a prompt", low=1)
    allow_leaks: bool = flag(False, "keep principles that give away a problem or its answer")

    eval_every: int = flag(20, "iterations between evaluations", "Evaluation", low=1)
    test_samples: int = flag(4, "responses to each problem", low=1)
    test_prompt: str = flag("best", "by mu - lambda sigma, or latest", choices="best latest")

    run_dir: str = flag("", "where the run is written (default: runs/TASK-MODE-TIME)", "Run")
    resume: str = flag("", "run directory to continue; its flags are taken from there")
    save_every: int = flag(1, "iterations between checkpoints", low=1)

    @property
    def task_argument(self):
        """What follows the colon of --task NAME:ARGUMENT, for the task's file."""
        return self.task.partition(":")[2]


# ==================================================================================================
# 3. Algorithm 1: the loop, and one iteration from rollouts to children


def train(run):
    """Algorithm 1's loop (line 2). Iteration 0 only evaluates.

    Rollouts live for one iteration. What lasts is pi_theta's trained weights, Adam's state and the
    population; a checkpoint has these three. A resumed run cuts the logs at its checkpoint.
    """
    c, last = run.config, last_iteration(run)
    first = resume(run) + 1 if c.resume else 0
    for iteration in range(first, last + 1):
        run.seconds.clear()
        run.tokens.clear()
        metrics = {"iteration": iteration}
        if iteration > 0:
            metrics |= espl_iteration(run, iteration)
        if iteration % c.eval_every == 0 or iteration == last:
            metrics |= evaluate(run, iteration, last=iteration == last)
        write_logs(run, metrics)
        print_line(metrics)
        if iteration % c.save_every == 0 or "test" in metrics:
            save_checkpoint(run, metrics)


def espl_iteration(run, iteration):
    """One iteration of Algorithm 1, counted from 1. Returns its metrics."""
    c = run.config
    rng = np.random.default_rng(run.seed(f"evolution/{iteration}"))
    problems = next_problems(run, iteration)  # Alg. 1, line 3

    evolves = c.mode in ("espl", "evolution")
    prompts = select(run.population, c, rng) if evolves else [tested_prompt(run)]  # line 4
    # The rollouts of missing prompts go to the others: every mode samples M N per problem.
    each, extra = divmod(c.num_prompts * c.num_rollouts, len(prompts))

    # Lines 5-7: groups[i][b] holds the graded rollouts of prompt i on problem b.
    jobs = [(s, x, each + (i < extra)) for i, s in enumerate(prompts) for x in problems]
    sampled = sample_groups(run, jobs, "train", iteration)
    groups = [sampled[i : i + len(problems)] for i in range(0, len(sampled), len(problems))]
    values = [mean_reward(row) for row in groups]  # V_i
    metrics = rollout_metrics(prompts, sampled, values)

    # Lines 8-9. From here on the state changes; an interruption resumes from the last checkpoint.
    if c.mode in ("espl", "rl"):
        with timed(run, "update"):
            total = sum(n for *_, n in jobs)
            metrics |= rl_update(run.trainer, set_advantages(groups, c), total)

    if c.mode != "rl":
        update_ratings(prompts, values, iteration)  # lines 10-11
        best = argmax(values, rng)  # line 12
        ask_reflector = partial(ask, run, iteration, Counter())  # which counts requests
        tournament = Tournament(prompts, groups, best, ask_reflector, run.task.parse, c)
        with timed(run, "reflect"):
            metrics |= breed(run, tournament, iteration, rng)  # lines 13-21
    return metrics


def breed(run, tournament, iteration, rng):
    """Every operator may add a child to the population (Alg. 1, lines 13-21). Returns the log."""
    log = {"batch_winner": tournament.winner.id, "children": {}, "no_child": {}}
    for name, (operator, chance) in OPERATORS.items():
        if rng.random() >= chance(run.config):
            continue
        try:
            principles, parents = operator(tournament)
            child = add_child(run.population, principles, parents, name, iteration, run.config)
            log["children"][name] = {"id": child.id, "parents": child.parents}
        except NoChild as e:
            log["no_child"][name] = str(e)
        except (UserError, jax.errors.JaxRuntimeError):  # a wrong server address, or out of memory
            raise
        except Exception as e:  # a failure in reflection never ends a run
            log["no_child"][name] = f"failed: {first_line(e)}"
            warn(f"{name} failed; the run goes on\n{traceback.format_exc()}")
    return log | {"dropped": tournament.dropped}


def last_iteration(run):
    """The number of iterations. The last batch of an epoch may be smaller."""
    c = run.config
    return c.iterations or c.epochs * math.ceil(len(run.task.train) / c.batch_size)


def next_problems(run, iteration):
    """The iteration's batch of problems. Every epoch has its own seeded shuffle."""
    train, size = run.task.train, run.config.batch_size
    epoch, i = divmod(iteration - 1, math.ceil(len(train) / size))
    order = np.random.default_rng(run.seed(f"epoch/{epoch}")).permutation(len(train))
    return [train[j] for j in order[i * size : (i + 1) * size]]


@dataclass
class Rollout:
    """A prompt, a response sampled for it, and its grade."""

    prompt: list[int]  # token ids
    tokens: list[int] = field(default_factory=list)  # the response, its end-of-sequence included
    logprobs: list[float | None] = field(default_factory=list)  # None: a tool's token, not sampled
    stop: str = "length"  # cut by max_new_tokens or the context; "eos"; or what a tool says
    text: str = ""
    reward: float = 0.0  # r_ij, at most 1
    outcome: str = ""  # correct, wrong, ...: the task's word for it
    advantage: float = 0.0
    key: Any = None  # of its random draws, uint32[2]
    room: int = 0  # most tokens of the response

    @property
    def grade(self):
        """The grade as the reflector reads it."""
        return self.outcome if self.reward in (0, 1) else f"{self.outcome}, reward {self.reward:g}"


@dataclass
class Group:
    """The graded rollouts of one system prompt on one problem."""

    prompt: SystemPrompt
    problem: Problem
    rollouts: list[Rollout]

    @property
    def value(self):
        """V[i,b], the mean reward."""
        return mean_reward([self])

    @property
    def contrast(self):
        """Whether there is something to learn from: with rewards of 0 and 1, 0 < V < 1."""
        return len({y.reward for y in self.rollouts}) > 1

    def slots(self):
        """What a request for reflection says of the problem and the prompt."""
        x, principles = self.problem, listing(numbered(self.prompt.principles))
        return {"problem": x.question, "answer": x.answer, "principles": principles}


def mean_reward(groups):
    """Mean reward of all rollouts, exactly equal in any order."""
    rewards = [y.reward for g in groups for y in g.rollouts]
    return math.fsum(rewards) / len(rewards)


def sample_groups(run, jobs, split, iteration, theta=None):
    """Samples and grades a Group of n rollouts of pi_theta for each (SystemPrompt, Problem, n).

    split: train, val, test, or test_ANYTHING, which uses the seeds of test. theta: other weights
    than the current ones. The rollouts are logged in rollouts.jsonl.
    """
    c, chat, groups = run.config, run.chat, []
    for s, x, n in jobs:
        prompt = chat.ids(system_text(run.task, s.principles), x.question)
        groups.append(Group(s, x, [Rollout(prompt) for _ in range(n)]))
    rollouts = [y for g in groups for y in g.rollouts]
    seed = run.seed(f"{split.partition('_')[0]}/{iteration}")
    sampling = Sampling(c.temperature, c.top_p, c.max_new_tokens, seed, split)
    environment = run.task.environment and partial(run.task.environment, chat)
    theta = run.policy.theta if theta is None else theta
    kind = "rollouts" if split == "train" else "evaluation"
    with timed(run, kind):
        generate(run.policy, theta, rollouts, sampling, environment)
    run.tokens[kind] += count_sampled(rollouts)

    for y in rollouts:
        y.text = chat.text(y.tokens, y.prompt)
    with timed(run, "grading"):
        answers = [(g.problem.record, final_text(y.text)) for g in groups for y in g.rollouts]
        grades = on_process_0(grade, run.task, answers)
    for y, graded in zip(rollouts, grades):
        y.reward, y.outcome = graded
    for g in groups:
        for y in g.rollouts:
            log = {
                "iteration": iteration,
                "split": split,
                "prompt": g.prompt.id,
                "problem": g.problem.id,
                "reward": y.reward,
                "outcome": y.outcome,
                "stop": y.stop,
                "text": y.text,
                "tokens": len(y.tokens),
            }
            run.append("rollouts.jsonl", log)
    return groups


def set_advantages(groups, c):
    """Sets the advantages r_ij - V[i,b], or r_ij minus the mean over all prompts.

    Returns the rollouts to train on. Without a KL penalty, groups of zero advantages are skipped.
    """
    chosen = []
    for of_one_problem in zip(*groups):
        marginal = mean_reward(of_one_problem)
        for group in of_one_problem:
            baseline = group.value if c.baseline == "prompt" else marginal
            for y in group.rollouts:
                y.advantage = y.reward - baseline
            if c.kl_coef or any(abs(y.advantage) > 1e-9 for y in group.rollouts):
                chosen += group.rollouts
    return [y for y in chosen if y.stop != "length" or not c.mask_truncated]


# ==================================================================================================
# 4. Evolution: the population of system prompts, its ratings, and the operators. No JAX in here.

MAX_POOL_SIZE = 200  # the authors'; only this many of the newest prompts are selected or tested
MAX_PRINCIPLE_LENGTH = 768  # characters; the reflector is asked for 32 words


@dataclass
class SystemPrompt:
    """Member s of the population: a list of short principles, a rating and a lineage.

    The population is the list of all prompts ever made, by id; S is its newest MAX_POOL_SIZE.
    """

    id: int
    principles: list[str]
    mu: float = 25.0  # TrueSkill's defaults (section Hyper-parameters)
    sigma: float = 25.0 / 3
    operator: str = "root"  # root, or a name in OPERATORS
    parents: list[int] = field(default_factory=list)
    iteration: int = 0  # in which it was made
    history: list[dict] = field(default_factory=list)  # an entry for each tournament


def argmax(values, rng):
    """Index of the largest value. Ties are broken at random."""
    return int(rng.choice(np.flatnonzero(np.equal(values, max(values)))))


def select(population, c, rng):
    """Chooses M distinct prompts of the window, or all if there are fewer (Alg. 1, line 4)."""
    window = population[-min(c.window, MAX_POOL_SIZE) :]
    rng.shuffle(window)  # ties in random order; uniform needs no more
    scores = {s.id: s.mu + c.ucb_lambda * s.sigma for s in window}  # acquisition scores
    match c.selection:
        case "top_random":  # section Selection: the highest score, and random others
            top = max(scores, key=scores.get)
            window.sort(key=lambda s: s.id != top)
        case "softmax":  # p_i ~ exp(score / T) without replacement, by the Gumbel-top-k trick
            window.sort(key=lambda s: -scores[s.id] / c.selection_temperature - rng.gumbel())
        case "ucb":
            window.sort(key=lambda s: -scores[s.id])
        case "lucb":  # the highest lower bound, then the highest upper bounds
            first = max(window, key=lambda s: s.mu - c.ucb_lambda * s.sigma)
            window.sort(key=lambda s: (s is not first, -scores[s.id]))
    return sorted(window[: c.num_prompts], key=lambda s: s.id)


def update_ratings(prompts, values, iteration):
    """One TrueSkill free-for-all of the prompts, ranked by V_i (Alg. 1, lines 10-11).

    Neighbours in the ranking within 0.01 tie. A prompt that competes alone keeps its rating.
    """
    ranking = sorted(zip(prompts, values), key=lambda pair: -pair[1])
    ranks = [0]
    for (_, better), (_, worse) in zip(ranking, ranking[1:]):
        ranks.append(ranks[-1] + (better - worse > 0.01 + 1e-9))
    if len(ranking) > 1:
        players = [(trueskill.Rating(s.mu, s.sigma),) for s, _ in ranking]
        for (s, _), (rating,) in zip(ranking, trueskill.rate(players, ranks)):
            s.mu, s.sigma = rating.mu, rating.sigma
    for (s, value), rank in zip(ranking, ranks):
        result = {"iteration": iteration, "value": value, "rank": rank}
        s.history.append(result | {"mu": s.mu, "sigma": s.sigma})


def add_child(population, principles, parents, operator, iteration, c):
    """Appends a child (Alg. 1, lines 16 and 21; Alg. 2). Raises NoChild if it is not new.

    A child inherits its parents' precision-weighted mean, but it is untried: sigma is widened.
    """
    for s in population:
        if s.principles == principles:
            raise NoChild(f"nothing changed (equal to prompt {s.id})")
    precisions = [s.sigma**-2 for s in parents]
    mu = sum(p * s.mu for p, s in zip(precisions, parents)) / sum(precisions)
    sigma = math.sqrt(1 / sum(precisions) + c.delta_sigma**2)
    ids = [s.id for s in parents]
    child = SystemPrompt(len(population), principles, mu, sigma, operator, ids, iteration)
    population.append(child)
    return child


# ---- Operators: from a tournament to (principles, parents) of a child


class NoChild(Exception):
    """An operator made no child; the message says why."""


@dataclass
class Tournament:
    """What an operator works with: an iteration's prompts and rollouts, and the reflector.

    ask(request, [slots, ...]) returns the reflector's replies to a section of prompts_seed.txt,
    filled in once for each dict of slots. parse reads the edits in a reply; None: unreadable.
    """

    prompts: list[SystemPrompt]
    groups: list[list[Group]]  # groups[i][b]: of prompt i on problem b
    best: int  # k, the index of the batch winner
    ask: Callable[[str, list[dict]], list[str]]
    parse: Callable[[str], list[dict] | None]
    config: Config
    dropped: Counter = field(default_factory=Counter)  # edits and replies, by what was wrong

    @property
    def winner(self):
        return self.prompts[self.best]

    def ask_for_edits(self, request, slots):
        """Replies as lists of edits. An unreadable one is requested once more, then it is None."""
        edits = [[] if reply == "[]" else self.parse(reply) for reply in self.ask(request, slots)]
        again = [i for i, found in enumerate(edits) if found is None]
        if again and self.config.reflect_temperature > 0:  # greedily it would be the same
            for i, reply in zip(again, self.ask(request, [slots[i] for i in again])):
                edits[i] = self.parse(reply)
        self.dropped["unreadable reply"] += edits.count(None)
        return edits


def mutate(r):
    """Edits the batch winner's principles by contrasting its successes with its failures.

    Summarise, criticise, aggregate (Alg. 1, lines 13-15; appendix LLM-Based Self-Reflection).
    Returns the child's principles and its parents.
    """
    c, groups = r.config, r.groups[r.best]
    if c.reflect_on == "contrast":
        groups = [g for g in groups if g.contrast]
    elif c.reflect_on == "failures":
        groups = [g for g in groups if g.value < 1]
    groups = groups[: c.reflect_problems or None]
    if not groups:
        raise NoChild(f"no problem to reflect on (--reflect-on {c.reflect_on})")
    principles, problems = numbered(r.winner.principles), [g.problem for g in groups]

    # Appendix Trajectory Summarization: one request for each rollout.
    slots = [g.slots() | {"response": y.text, "grade": y.grade} for g in groups for y in g.rollouts]
    summaries = iter(r.ask("summarize", slots))  # taken in order by `critique_slots`

    # Appendix Self-Critique and Local Edit Proposal: one request for each problem.
    slots = [critique_slots(g, summaries, c) for g in groups]
    critiques = r.ask_for_edits("critique", slots)
    added, changes = {}, []
    for edits in critiques:
        valid = [e for e in edits or [] if accepted(e, ("add", "modify"), principles, problems, r)]
        for edit in valid[: c.max_operations]:
            text = one_line(edit["principle"])
            if edit["operation"] == "add":
                added[f"C{len(added)}"] = text
            else:
                changes.append(f"[{named_by(edit)[0]}] -> {text}")
    if not added and not changes:
        raise NoChild(f"no valid edit proposed ({critiques.count(None)} critiques unreadable)")

    # Appendix Local-to-Global Aggregation: one request for all proposals. Added principles are
    # already in the list; proposed modifications are only suggestions.
    candidates = principles | added
    slots = {"principles": listing(candidates), "suggestions": "\n".join(changes) or "(none)"}
    [plan] = r.ask_for_edits("aggregate", [slots])
    if plan is None:
        raise NoChild("the reply to the aggregate request was unreadable")
    return apply_edits(candidates, plan, ("modify", "merge"), problems, r), [r.winner]


def crossover(r):
    """Edits the batch winner's principles by those of prompts that won a problem (Alg. 2).

    Returns the child's principles and its parents, the batch winner first.
    """
    # Phi: the problems that each prompt strictly won, by 0.01 or more over every other one.
    values = np.array([[g.value for g in row] for row in r.groups])
    wins = {}
    for i in sorted(range(len(values)), key=lambda i: i != r.best):
        others = np.delete(values, i, axis=0).max(axis=0, initial=-math.inf)
        won = np.flatnonzero(values[i] - others >= 0.01 - 1e-9)
        if len(won):
            wins[i] = won
    if len(wins) < 2 or r.best not in wins:
        raise NoChild("fewer than two prompts, or not the batch winner, strictly won a problem")

    sets, texts, problems = [], [], [g.problem for g in r.groups[0]]
    for i, letter in zip(wins, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"):  # the batch winner is set A
        sets.append(f"Set {letter}:\n{listing(numbered(r.prompts[i].principles, letter + '.'))}")
        texts += [f"Problem {b} (won by set {letter}):\n{problems[b].question}" for b in wins[i]]
    slots = {"sets": "\n\n".join(sets), "wins": "\n\n".join(texts)}
    [edits] = r.ask_for_edits("crossover", [slots])
    if edits is None:
        raise NoChild("the reply was unreadable")
    set_a, kinds = numbered(r.winner.principles, "A."), ("add", "modify", "remove")
    return apply_edits(set_a, edits, kinds, problems, r), [r.prompts[i] for i in wins]


OPERATORS = {  # name: (operator, its chance in an iteration), drawn in this order
    "mutation": (mutate, lambda c: 1.0),
    "crossover": (crossover, lambda c: 0.0 if c.mode == "reflection" else c.p_crossover),
}


# ---- What the reflector is shown


def numbered(principles, prefix=""):
    """{"G0": first principle, ...}; the prefix is a set's letter ("A.G0")."""
    return {f"{prefix}G{i}": text for i, text in enumerate(principles)}


def listing(principles):
    """Principles as a model reads them, one a line with its id."""
    return "\n".join(f"[{i}] {text}" for i, text in principles.items()) or "(none)"


def one_line(text):
    return " ".join(text.split())


def critique_slots(group, summaries, c):
    """Slots of a critique request: one problem, with each rollout's grade and the next summary."""
    attempts = [
        f"Attempt {j} ({y.grade}):\n{summary or '(no summary)'}"
        for j, (y, summary) in enumerate(zip(group.rollouts, summaries), 1)
    ]
    slots = {"attempts": "\n\n".join(attempts), "max_operations": str(c.max_operations)}
    return group.slots() | slots


# ---- Edits: what a reflection changes. Each replaces the principles it names, or removes one.


def parse_edits(reply):
    """The edits at the end of a reply: JSON objects, however carelessly a model wrote them.

    Looks into the fenced blocks, the last first, then at the whole reply. An edit that breaks off
    is left out. Returns [] if the model wants no change, None if there is no list.
    """
    import json_repair

    text = final_text(reply)
    fenced = re.findall(r"```(?:json)?\s*(.*?)(?:```|\Z)", text, re.S)
    for block in [*reversed(fenced), text]:
        # Up to the last brace that can end an edit; one of LaTeX follows something else.
        whole = "".join(re.findall(r"""\A.*["'\],]\s*\}""", block, re.S))
        # \frac is LaTeX here, no form feed; \n is a newline, except in \neq, \nabla and \nu.
        whole = re.sub(r"(?<!\\)\\(?=[bfrt][a-zA-Z]|n(?:eq(?![a-z])|abla|u\b))", r"\\\\", whole)
        with contextlib.suppress(Exception):  # some replies make the parser fail
            if edits := edits_in(json_repair.loads(whole)):
                return edits
        if re.fullmatch(r"\s*\[\s*\]\s*", block):
            return []
    return [] if re.search(r"\[\s*\]\W*\Z", text[-100:]) else None


def edits_in(value):
    """All objects with an "operation" in a JSON value."""
    if isinstance(value, dict):
        if "operation" in value:
            return [value]
        value = list(value.values())
    return [e for part in value for e in edits_in(part)] if isinstance(value, list) else []


def named_by(edit):
    """The ids that an edit replaces. They may stand in brackets, as in the listing."""
    fields = {"modify": "modified_from", "remove": "remove_id", "merge": "merged_from"}
    ids = edit.get(fields.get(edit["operation"]), [])  # add: none
    return [str(i).strip("[] ") for i in (ids if isinstance(ids, list) else [ids])]


def fault(edit, kinds, ids, problems, c):
    """Why an edit of principles with these ids may not be applied; "" if it may."""
    kind = edit["operation"]
    if kind not in kinds:
        return "unknown operation"
    named, fewest = {*named_by(edit)}, {"add": 0, "merge": 2}.get(kind, 1)
    if len(named) < fewest or not named <= {*ids}:
        return "unknown id"
    if kind == "remove":
        return ""
    text = edit.get("principle")
    if not isinstance(text, str) or not text.strip(" .-") or not one_line(text).isprintable():
        return "no text"
    if len(text) > MAX_PRINCIPLE_LENGTH:
        return "too long"
    if not c.allow_leaks and any(leaks(text, x) for x in problems):
        return "leaks a problem"
    return ""


def accepted(edit, kinds, ids, problems, r):
    """Whether an edit may be applied. One that may not is dropped alone, and counted."""
    why = fault(edit, kinds, ids, problems, r.config)
    if why:
        r.dropped[why] += 1
    return not why


def leaks(principle, problem):
    """Whether a principle has 12 words of a problem in a row (all, if 6 to 11), or its answer."""
    said, words = (re.findall(r"\w+", x.lower()) for x in (principle, problem.question))
    size = max(6, min(12, len(words)))  # fewer words are too common to be recognised
    parts = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    if any(tuple(said[i : i + size]) in parts for i in range(len(said))):
        return True
    for answer in ("".join(a.split()) for a in problem.answers):
        if re.fullmatch(r"-?\d[\d,.]*", answer):
            whole = rf"(?<![\d.]){re.escape(answer)}(?!\d|\.\d)"
            if len(re.sub(r"\D", "", answer)) > 2 and re.search(whole, principle):
                return True
        elif len(answer) > 5 and answer in "".join(principle.split()):
            return True
    return False


def apply_edits(principles, edits, kinds, problems, r):
    """git.apply(s, diff): the principles after the valid edits, as a list (they are renumbered)."""
    result = dict(principles)
    for n, edit in enumerate(edits):
        if accepted(edit, kinds, result, problems, r):  # ids as earlier edits left them
            first, *merged = dict.fromkeys(named_by(edit) or [f"added {n}"])
            result[first] = one_line(edit["principle"]) if edit["operation"] != "remove" else ""
            result = {i: text for i, text in result.items() if text and i not in merged}
    unique = {}
    for text in result.values():  # the first of texts that differ only in case
        unique.setdefault(text.casefold(), text)
    return list(unique.values())[: r.config.max_principles]


# ==================================================================================================
# 5. RL update: maximises J - beta KL(pi_theta || pi_ref), where J is the mean over all rollouts of
#    sum_t f(log pi_theta(y_t | ...), A), and f is `surrogate`.

LOGITS_BLOCK = 128  # tokens whose logits are computed at a time
PACKED_LENGTHS = (128, 256, 384, 512, 1024, 1536)  # of rows that several responses may share
BATCH_FIELDS = {  # of a token of a batch, as a numpy dtype
    "names": ["token", "position", "segment", "target", "mask", "behaviour", "advantage"],
    "formats": ["i4", "i4", "i4", "i4", "?", "f4", "f4"],
}


class Objective(NamedTuple):
    """What the update maximises."""

    loss: str = "importance_sampling"
    temperature: float = 1.0  # the sampler's: the policy is the tempered distribution
    clip: float = 0.2  # ppo and cispo clip the ratio to [1 - clip, 1 + clip]
    kl_coef: float = 0.0  # beta


@dataclass
class Trainer:
    """What an update changes (policy.theta and Adam's state), and how."""

    policy: Policy
    optimizer: optax.GradientTransformation
    opt_state: Any
    objective: Objective = Objective()
    max_tokens: int = 4096  # of a microbatch


def rl_update(trainer, rollouts, total):
    """One policy-gradient step (Alg. 1, line 9). Changes the trainer and returns metrics.

    total counts all sampled rollouts, also those left out. Without rollouts no step is made. Since
    they come from the current weights, the importance ratio is, up to rounding, the mass of the
    sampler's nucleus, in [top_p, 1]. A second call is off policy; reinforce does not correct that.
    """
    policy, objective = trainer.policy, trainer.objective
    rollouts = [y for y in rollouts if y.tokens]
    if not rollouts:
        return {"skipped": "no rollout with a learning signal"}
    batches = list(microbatches(rollouts, trainer.max_tokens, policy))
    gradient = jax.tree.map(jnp.zeros_like, policy.theta)
    found = []
    for batch in progress(batches, desc="updating"):
        batch = {name: put(x, policy.mesh, P("data")) for name, x in batch.items()}
        gradient, metrics = add_gradient(gradient, policy, batch, total, objective)
        found.append(metrics)
    policy.theta, trainer.opt_state, norm = adam_step(
        trainer.optimizer, policy.theta, trainer.opt_state, gradient
    )
    sums = {name: float(sum(m[name] for m in found)) for name in found[0]}
    tokens = sums["tokens"]
    return {
        "loss": sums["loss"],
        "grad_norm": float(norm),
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens if objective.kl_coef else None,
        "ratio_mean": sums["ratio"] / tokens,
        "ratio_max": float(max(m["ratio_max"] for m in found)),
        "trained_rollouts": len(rollouts),
        "trained_tokens": int(tokens),
        "steps_left_out": int(trainer.opt_state.total_notfinite),
    }


def surrogate(logp, behaviour_logp, advantage, objective):
    """Per-token term of J, and the importance ratio pi_theta / pi_behaviour; both [B, T]."""
    ratio = jnp.exp(logp - behaviour_logp)
    clipped = jnp.clip(ratio, 1 - objective.clip, 1 + objective.clip)
    match objective.loss:
        case "importance_sampling":
            term = ratio * advantage
        case "ppo":
            term = jnp.minimum(ratio * advantage, clipped * advantage)
        case "cispo":  # the clipped ratio is a constant weight, so no token loses its gradient
            term = jax.lax.stop_gradient(clipped) * advantage * logp
        case "reinforce":
            term = advantage * logp
    return term, ratio


def kl_estimators(logp, ref_logp, ratio):
    """Two terms per token for KL(pi_theta || pi_ref): one has its value, one has its gradient.

    k3 estimates the value. On samples of pi_theta its gradient is that of KL(pi_ref || pi_theta),
    the other way round. That of k2 is right, weighted by the ratio if off policy. (after Schulman)
    """
    log_ratio = logp - ref_logp
    k3 = jnp.exp(-log_ratio) + log_ratio - 1
    k2 = 0.5 * log_ratio**2
    return k3, jax.lax.stop_gradient(ratio) * k2


@partial(
    jax.jit,
    static_argnames="objective",
    donate_argnames="gradient",
    compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
)
def add_gradient(gradient, policy, batch, total, objective):
    """Adds a microbatch's share of the gradient of -(J - beta KL), and returns sums for the log.

    The batch's arrays are [B, T], see `fill_rows`. By XLA's default schedule a CPU would recompute
    many layers at once, in several times the memory.
    """
    mask = batch["mask"]
    keep = linears_fit(policy, mask.size)  # then the backward pass does not repeat the Linears

    def logprobs(theta):
        model = policy.model(theta)
        hidden, _ = model(batch["token"], batch["position"], batch.get("segment"), keep)
        return token_logprobs(model, hidden, batch["target"], mask, objective.temperature)

    def loss(theta):
        logp, entropy = logprobs(theta)
        term, ratio = surrogate(logp, batch["behaviour"], batch["advantage"], objective)
        kl = penalty = jnp.zeros_like(logp)
        if objective.kl_coef:
            ref_logp, _ = jax.lax.stop_gradient(logprobs(policy.theta_ref))
            kl, penalty = kl_estimators(logp, ref_logp, ratio)
        # The reported loss contains the KL's value; the trained one the term with its gradient.
        reported = -(term - objective.kl_coef * kl) / total
        trained = -(term - objective.kl_coef * penalty) / total
        terms = {"loss": reported, "entropy": entropy, "kl": kl, "ratio": ratio, "tokens": mask}
        metrics = {name: jnp.sum(x, where=mask) for name, x in terms.items()}
        metrics["ratio_max"] = jnp.max(ratio, where=mask, initial=0.0)
        return jnp.sum(trained, where=mask), metrics

    new, metrics = jax.grad(loss, has_aux=True)(policy.theta)
    return laid_out(jax.tree.map(jnp.add, gradient, new)), metrics


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("theta", "opt_state"))
def adam_step(optimizer, theta, opt_state, gradient):
    """theta <- theta + alpha * Adam(grad J). Also returns the gradient's norm."""
    updates, opt_state = optimizer.update(gradient, opt_state, theta)
    theta = optax.apply_updates(theta, updates)
    return laid_out(theta), laid_out(opt_state), optax.tree.norm(gradient)


def token_logprobs(model, hidden_BTD, target_BT, mask_BT, temperature):
    """Log-probability of each target and entropy of its distribution, both [B, T] float32.

    Works through blocks of tokens, recomputed in the backward pass, so that [B, T, V] never exists.
    Tokens without a target (mask) come last; a block of them costs nothing and gets zeros.
    """
    order = jnp.argsort(~mask_BT.reshape(-1))
    tokens = [x.reshape(-1, *x.shape[2:])[order] for x in (mask_BT, hidden_BTD, target_BT)]
    # The devices share the tokens of each block.
    blocks = [constrain(x.reshape(-1, LOGITS_BLOCK, *x.shape[1:]), None, "data") for x in tokens]

    def logprobs(hidden, target):
        logp = jax.nn.log_softmax(model.logits(hidden) / temperature)
        chosen = jnp.take_along_axis(logp, target[:, None], -1)[:, 0]
        return chosen, -jnp.sum(jnp.exp(logp) * logp, -1)

    @jax.checkpoint
    def block(x):
        mask, *rest = x  # sorted: the first token is masked only if all are
        return jax.lax.cond(mask[0], logprobs, lambda *_: (jnp.zeros(LOGITS_BLOCK),) * 2, *rest)

    out = jax.lax.map(block, blocks)
    return tuple(x.reshape(-1)[jnp.argsort(order)].reshape(target_BT.shape) for x in out)


def microbatches(rollouts, max_tokens, policy):
    """Yields padded batches (`fill_rows`) of about max_tokens tokens, in few shapes.

    A row is a prompt and one or more of its responses, which do not see each other:

        tokens    p0 p1 ... p(n-2)   p(n-1) y0 y1 ...   p(n-1) z0 z1 ...   padding
        position  0  1  ... n-2      n-1    n  n+1      n-1    n  n+1      PAD_POSITION
        segment   0  0  ... 0        1      1  1        2      2  2
        target                       y0     y1 ...      z0     z1 ...

    Rows longer than the shared length hold one response, and have no segments. A batch has a power
    of two rows, or as many as max_tokens allows.
    """
    shared = min(PACKED_LENGTHS, key=lambda length: packing_cost(rollouts, length, policy.cfg))
    by_length = {}
    for row in pack(rollouts, shared):
        by_length.setdefault(row_length(row, shared), []).append(row)
    for T, rows in sorted(by_length.items(), reverse=True):
        while rows:
            B = row_count(len(rows), max_tokens // T, policy.mesh.shape["data"])
            yield fill_rows(rows[:B], (B, T), segments=shared == T)
            rows = rows[B:]


def tokens_in(row):
    return len(row[0].prompt) - 1 + sum(len(y.tokens) for y in row)


def pack(rollouts, length):
    """Neighbours with the same prompt share a row, up to this length."""
    rows = []
    for y in rollouts:
        if rows and rows[-1][0].prompt == y.prompt and tokens_in([*rows[-1], y]) <= length:
            rows[-1].append(y)
        else:
            rows.append([y])
    return rows


def row_length(row, shared):
    """Length of a row on the devices: the shared one, if it fits."""
    return shared if tokens_in(row) <= shared else bucket(tokens_in(row))


def packing_cost(rollouts, shared, cfg):
    """Relative work of all rows: attention (slow on CPUs) and matrix products."""
    lengths = [row_length(row, shared) for row in pack(rollouts, shared)]
    return sum(T * (4 * T + 6 * cfg.model_dim) for T in lengths)


def fill_rows(rows, shape, segments):
    """The arrays of a batch, [B, T]; see `microbatches`.

    mask: where the loss is, targets that the model sampled; behaviour: their log-probabilities.
    """
    table = np.zeros(shape, BATCH_FIELDS)
    table["position"] = PAD_POSITION
    for b, row in enumerate(rows):
        *prompt, last = row[0].prompt
        columns = [(token, t, 0, 0, 0, 0, 0) for t, token in enumerate(prompt)]
        for i, y in enumerate(row, 1):
            inputs = [last, *y.tokens[:-1]]
            for j, logp in enumerate(y.logprobs):
                sampled = (0, 0) if logp is None else (1, logp)
                columns.append((inputs[j], len(prompt) + j, i, y.tokens[j], *sampled, y.advantage))
        table[b, : len(columns)] = columns
    batch = {name: table[name] for name in table.dtype.names}
    if not segments:
        del batch["segment"]
    return batch


# ==================================================================================================
# 6. Tasks and words. A task is a file: problems, a reward, and what is said to the model.

HERE = Path(__file__).resolve().parent
SLOTS = {  # the sections of prompts_seed.txt, and the {slots} that each must contain
    "system": ("principles",),
    "principles": (),
    "summarize": ("problem", "response", "grade", "answer"),
    "critique": ("problem", "attempts", "answer"),
    "aggregate": ("principles", "suggestions"),
    "crossover": ("sets", "wins"),
}


@dataclass
class Problem:
    """A question x with its accepted answers, and the record that it was made from."""

    id: str
    question: str
    answers: tuple[str, ...]
    record: dict = field(default_factory=dict)

    @property
    def answer(self):
        return " or ".join(self.answers)


@dataclass
class Task:
    """A task. The rest of this file knows nothing else about it (docs/tasks.md)."""

    name: str
    file: str
    train: list[Problem]
    val: list[Problem]
    test: list[Problem]
    texts: dict[str, str]  # the sections of prompts_seed.txt
    reward: Callable[[dict, str], Any]  # of (record, response): a number or (number, outcome)
    parse: Callable[[str], list[dict] | None] = parse_edits
    environment: Callable | None = None  # of (chat, rollout): see `generate`

    @property
    def root(self):
        """The principles of the root prompt."""
        lines = self.texts["principles"].splitlines()
        return [line.strip() for line in lines if line.strip()]


def task_module(task):
    """The file of --task NAME, NAME:ARGUMENT or PATH.py as a module. It may import neighbours."""
    name = task.partition(":")[0]
    path = Path(name) if name.endswith(".py") else HERE / "tasks" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--task {task}: there is no {path}; see {HERE / 'tasks'}")
    sys.path.append(str(path.parent))
    name = f"task_{path.stem}"  # math.py must not replace Python's
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with explained(f"cannot load {path}"):
        spec.loader.exec_module(module)
        module.reward  # noqa: B018  (an AttributeError if it has none)
    return module


def load_task(c):
    """Loads the problems (the seed splits off validation), the words and the reward."""
    module = task_module(c.task)
    train = test = []
    if hasattr(module, "problems"):
        with explained(f"task {c.task} has no problems"):
            train, test = module.problems(c)
    train = read_problems(train, c.train_file, c.task, module)
    test = read_problems(test, c.test_file, c.task, module)
    questions = {x.question for x in test}
    train = [x for x in train if x.question not in questions]  # never train on a test problem
    if not test:
        raise UserError(f"task {c.task} has no test problems; give it a --test-file")
    order = np.random.default_rng([c.seed, zlib.crc32(b"split")]).permutation(len(train))
    train = [train[i] for i in order[: c.train_size]]
    held_out = min(c.val_size, len(train) // 5)
    return Task(
        name=Path(module.__file__).stem,
        file=module.__file__,
        train=train[held_out:],
        val=train[:held_out],
        test=test,
        texts=read_texts(getattr(module, "PROMPTS", ""), c.prompts_file),
        reward=module.reward,
        parse=getattr(module, "parse", parse_edits),
        environment=getattr(module, "environment", None),
    )


def read_problems(records, path, task, module):
    """Problems from a JSONL file, or from records. Repeated questions are dropped.

    A task's function prepare(record) may change or refuse (ValueError) a record.
    """
    if path:
        with explained(f"cannot read {path}"):
            records = Path(path).read_text(encoding="utf-8-sig").split("\n")
    prepare, problems = getattr(module, "prepare", dict), {}
    for n, record in enumerate(records, 1):
        if path and not record.strip():
            continue
        where = f"{path or task}:{n}"
        with explained(f"{where} needs `problem` or `question`, and `answer`"):
            record = prepare(json.loads(record) if path else record)
            question = (record.get("problem") or record["question"]).strip()
            answers = record.get("answer", record.get("groundtruth", record.get("golden_answers")))
            answers = answers if isinstance(answers, list) else [answers]
            answers = tuple(answer_text(a) for a in answers)
            if not question or not answers:
                raise ValueError("the question or the answer is empty")
        problems.setdefault(question, Problem(where, question, answers, record))
    return list(problems.values())


def answer_text(answer):
    """An answer as text: 142.0 is 142. Raises ValueError if it is not one."""
    text = f"{answer:.15g}" if isinstance(answer, float) else str(answer).strip()
    if type(answer) not in (str, int, float) or text in ("", "nan", "inf", "-inf"):
        raise ValueError(f"{answer!r} is not an answer")
    return text


# ---- Words: prompts_seed.txt and the chat template


def read_texts(own, prompts_file):
    """Sections of prompts_seed.txt, replaced by a task's own, and these by --prompts-file's."""
    with explained("cannot read the prompts"):
        sources = [(HERE / "prompts_seed.txt").read_text(encoding="utf-8"), own]
        if prompts_file:
            sources.append(Path(prompts_file).read_text(encoding="utf-8-sig"))
    texts = {}
    for source in sources:
        found = re.findall(r"^\[(\w+)\][ \t]*$(.*?)(?=^\[\w+\][ \t]*$|\Z)", source, re.M | re.S)
        texts |= {name: body.strip() for name, body in found}
    for name in texts.keys() - SLOTS.keys():
        raise UserError(f"the prompts have a section [{name}]; they can have {', '.join(SLOTS)}")
    for name, slots in SLOTS.items():
        if name in ("summarize", "aggregate") and texts.get(name) == "":
            continue  # `ask` does not make such a request
        for slot in slots:
            if f"{{{slot}}}" not in texts.get(name, ""):
                raise UserError(f"the prompts' section [{name}] lacks the slot {{{slot}}}; add it")
    return texts


def fill(template, slots):
    """Replaces each {slot} in one pass; other braces, and those in the slots' texts, stay."""
    return re.sub(r"\{(\w+)\}", lambda m: slots.get(m[1], m[0]), template)


def system_text(task, principles):
    """The system prompt s as the model reads it.

    The paragraph that holds {principles} is left out while there are none.
    """
    paragraphs = task.texts["system"].split("\n\n")
    kept = [p for p in paragraphs if principles or "{principles}" not in p]
    return fill("\n\n".join(kept), {"principles": listing(numbered(principles))})


@dataclass
class Chat:
    """Texts to token ids through the tokenizer's chat template, and back.

    Without a template the rendering is system text, blank line, user text, blank line. If a
    template refuses or drops the system turn (Gemma 2), its text goes on top of the user turn.
    """

    tokenizer: Any
    role: str = "system"
    thinking: bool = True

    def __post_init__(self):
        added = self.tokenizer.added_tokens_decoder.values()
        special = {t.content for t in added if t.special} | {*self.tokenizer.all_special_tokens}
        special = sorted(special - {"", "<think>", "</think>"}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def clean(self, text):
        """The text without special tokens, so that it cannot end its turn in a request."""
        return self.special.sub(" ", text)

    def render(self, *turns):
        """(role, text) turns through the template; "" if it fails or drops one of the texts."""
        messages = [{"role": role, "content": text} for role, text in turns]
        with contextlib.suppress(Exception):  # jinja2's TemplateError: system role not supported
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=turns[-1][0] == "user",
                enable_thinking=self.thinking,
                date_string="26 Jul 2024",  # else today's, in Llama's
            )
            if all(said.strip() in text for _, said in turns):
                return text
        return ""

    def ids(self, system, user):
        """Token ids of a prompt that ends where the model's turn begins."""
        texts = [text for text in (system, user) if text]
        if not self.tokenizer.chat_template:
            return self.tokenizer("".join(f"{text}\n\n" for text in texts)).input_ids
        text = ""
        if self.role == "system" and len(texts) == 2:
            text = self.render(("system", system), ("user", user))
        elif self.role == "user":
            texts.reverse()
        text = text or self.render(("user", "\n\n".join(texts)))
        if not text:
            raise UserError("the tokenizer's chat template fails or drops text; fix the template")
        return self.tokenizer(text, add_special_tokens=False).input_ids  # BOS is in the text

    def text(self, tokens, prompt=()):
        """A response as text, with the <think> that some templates open in the prompt."""
        opened = self.tokenizer.decode(list(prompt[-8:])).rstrip().endswith("<think>")
        text = self.special.sub("", self.tokenizer.decode(tokens, skip_special_tokens=False))
        return f"<think>{text}" if opened else text


def final_text(text):
    """What follows the last </think>, or all of it without one; "" while a <think> is open."""
    tail = text.rpartition("</think>")[2]
    return "" if "<think>" in tail else tail


def grade(task, answers):
    """(reward, outcome) of each (problem's record, final text of a response); Alg. 1, line 7.

    A reward within 1e-6 of a whole number is rounded. If the task's function raises, the reward is
    0 with the outcome "error", and the run goes on.
    """
    grades, failure = [], ""
    for record, text in answers:
        try:
            found = task.reward(record, text)
            reward, outcome = found if isinstance(found, (tuple, list)) else (found, "")
            nearest = float(round(reward))
            reward = nearest if abs(reward - nearest) < 1e-6 else float(reward)
            if reward > 1:
                raise ValueError(f"a reward is at most 1, not {reward}")
            word = "correct" if reward == 1 else "partly right" if reward > 0 else "wrong"
            grades.append((reward, str(outcome or word)))
        except (Exception, SystemExit) as e:
            failure = first_line(e)
            grades.append((0.0, "error"))
    if failure:
        warn(f"the reward of task {task.name} failed and counts as 0: {failure}")
    return grades


# ==================================================================================================
# 7. A run: its start, reflection, evaluation, files, screen, and the program


@dataclass
class Run:
    """Everything that a run carries from one iteration to the next."""

    config: Config
    task: Task
    chat: Chat
    trainer: Trainer
    population: list[SystemPrompt]
    reflector: tuple[Policy, Chat] | None  # of --reflector MODEL
    lock: Any = None  # locked, so that no second process writes the same run
    seconds: Counter = field(default_factory=Counter)  # of the current iteration, by phase
    tokens: Counter = field(default_factory=Counter)  # sampled in it

    @property
    def policy(self):
        return self.trainer.policy

    @property
    def directory(self):
        return Path(self.config.run_dir)

    def seed(self, purpose):
        """The seed of one use of randomness. Stateless, so a resumed run draws the same."""
        return self.config.seed, zlib.crc32(purpose.encode())

    def append(self, file, record):
        """Appends a record to a JSONL file of the run."""
        if jax.process_index() == 0:
            path = self.directory / file
            with tolerated(f"write {file}"), open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def timed(run, phase):
    """Adds the seconds of a `with` block to run.seconds[phase]."""
    start = time.perf_counter()
    yield
    run.seconds[phase] += time.perf_counter() - start


def start_run(c):
    """Loads everything, then opens the run directory: bad input is found before a file is made."""
    task = load_task(c)
    if not task.train:
        raise UserError(f"task {c.task} has no training problems; give it a --train-file")
    policy, chat = load_policy(c)
    reflector = None
    if c.mode != "rl" and not re.fullmatch("reference|current|.*://.*", c.reflector):
        reflector = load_policy(dataclasses.replace(c, model=c.reflector, lora_rank=0), frozen=True)

    clip = optax.clip_by_global_norm(c.max_grad_norm or math.inf)
    optimizer = optax.chain(clip, optax.adam(c.learning_rate, b1=0.9, b2=0.95, eps=1e-8))
    optimizer = optax.apply_if_finite(optimizer, 2**30)  # a step of nan or infinity is left out
    objective = Objective(c.loss, c.temperature, c.clip, c.kl_coef)
    opt_state = optimizer.init(policy.theta)
    trainer = Trainer(policy, optimizer, opt_state, objective, c.microbatch_tokens)

    held = sum(x.addressable_shards[0].data.nbytes for x in jax.live_arrays())
    for p in (policy, reflector[0]) if reflector else (policy,):
        p.cache_tokens = cache_tokens(p.cfg, p.mesh, held)

    # Alg. 1, line 1
    population = read_population(c.population) if c.population else [SystemPrompt(0, task.root)]
    run = Run(c, task, chat, trainer, population, reflector)
    open_directory(run)
    return run


def read_population(path):
    """A population.json, of an earlier run or edited by hand; only `principles` must be there."""
    with explained(f"--population {path} must be a list of prompts with lists of principles"):
        entries, population = json.loads(Path(path).read_text(encoding="utf-8-sig")), []
        ids = {entry.get("id", i): i for i, entry in enumerate(entries)}  # some may be cut out
        for i, entry in enumerate(entries):
            parents = [ids[p] for p in entry.get("parents", []) if ids.get(p, i) < i]
            population.append(SystemPrompt(**entry | {"id": i, "parents": parents}))
            "".join(entry["principles"] + [])  # an error unless it is a list of texts
        if not population:
            raise ValueError("it is empty")
        return population


def open_directory(run):
    """Makes the run directory with its config.json, or reopens it for --resume."""
    c = run.config
    name = f"runs/{run.task.name}-{c.mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    c.run_dir = on_process_0(str, Path(c.run_dir or name).resolve())
    if jax.process_index() > 0:
        return
    with explained(f"cannot write --run-dir {run.directory}"):
        run.directory.mkdir(parents=True, exist_ok=True)
        run.lock = open(run.directory / "lock", "w")  # noqa: SIM115  (open while the run goes on)
    with explained(f"another process is writing {run.directory}; wait for it, or use --run-dir"):
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    files = [HERE / "prompts_seed.txt", run.task.file, c.task_argument]
    files += [c.train_file, c.test_file, c.prompts_file, c.population]
    hashes = [(str(f), zlib.crc32(Path(f).read_bytes())) for f in files if os.path.isfile(f)]
    config = run.directory / "config.json"
    if c.resume:
        saved = json.loads(config.read_text())["files"]
        for (_, old), (file, new) in zip(saved, hashes):
            if old != new:
                raise UserError(f"{file} has changed since the run began; put it back to resume")
    elif config.is_file():
        raise UserError(f"--run-dir {run.directory} holds a run; continue it with --resume")
    write_whole(config, dataclasses.asdict(c) | {"resume": "", "distributed": "", "files": hashes})


def ask(run, iteration, calls, request, slots):
    """The `ask` of a Tournament: the reflector's replies to a request, all in one batch."""
    c, template = run.config, run.task.texts[request]
    policy, chat = run.reflector or (run.policy, run.chat)
    if not template:  # a response is its own summary; added principles stay as they are
        return [d.get("response", "[]") for d in slots]
    calls[request] += 1  # a repeated request has another seed
    seed = run.seed(f"{request}/{calls[request]}/{iteration}")
    slots = [{name: chat.clean(text) for name, text in d.items()} for d in slots]
    if "://" in c.reflector:
        prompts = [fill(template, d) for d in slots]
        replies = on_process_0(ask_server, c, prompts, iteration == 1)
    else:
        context = policy.cfg.max_context
        limit = max(context - c.reflect_tokens, context // 2)
        rollouts = [Rollout(fit_request(chat, template, d, limit)) for d in slots]
        sampling = Sampling(c.reflect_temperature, c.top_p, c.reflect_tokens, seed, request)
        # theta_ref stands for the base model, and is empty in a second model: all of it is frozen.
        theta = policy.theta if c.reflector == "current" else policy.theta_ref
        generate(policy, theta, rollouts, sampling)
        run.tokens["reflections"] += count_sampled(rollouts)
        prompts = [chat.tokenizer.decode(y.prompt) for y in rollouts]
        replies = [chat.text(y.tokens, y.prompt) for y in rollouts]
    for prompt, reply in zip(prompts, replies):
        log = {"iteration": iteration, "request": request, "prompt": prompt, "reply": reply}
        run.append("reflections.jsonl", log)
    return [final_text(run.chat.clean(reply)).strip() for reply in replies]


def fit_request(chat, template, slots, limit):
    """Token ids of a request; while there are more than `limit`, its longest slot is shortened."""
    while len(ids := chat.ids("", fill(template, slots))) > limit:
        name = max(slots, key=lambda name: len(slots[name]))
        text = slots[name]
        keep = int(0.45 * len(text) * limit / len(ids))  # at both ends
        slots[name] = f"{text[:keep]}\n[... cut ...]\n{text[-keep:]}"
        if keep < 80:
            raise NoChild(f"a request does not fit into {limit} tokens")
    return ids


def ask_server(c, prompts, first):
    """Replies of --reflector URL#NAME, by OpenAI's protocol, with the server's sampling options.

    A failed request is a UserError in the first iteration. Later, or if it is too long for the
    server, its reply is empty. The key is taken from OPENAI_API_KEY.
    """
    import openai

    url, _, name = c.reflector.partition("#")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=3)

    def reply(prompt):
        messages = [{"role": "user", "content": prompt}]
        try:
            choices = client.chat.completions.create(model=name, messages=messages).choices
            return choices and choices[0].message.content or ""
        except Exception as e:
            if first and not isinstance(e, openai.BadRequestError):
                raise UserError(f"--reflector {c.reflector}: {first_line(e)}") from e
            warn(f"--reflector {c.reflector} failed: {first_line(e)}")
            return ""

    with ThreadPool(16) as pool:
        return pool.map(reply, prompts, chunksize=1)


def tested_prompt(run):
    """The prompt to evaluate, and in modes rl and reflection to sample with.

    It has the highest mu - lambda sigma. With --test-prompt latest, and always when a single prompt
    competes, it is the newest. Neither validation nor test scores have a say.
    """
    c, pool = run.config, run.population[-MAX_POOL_SIZE:]
    if c.test_prompt == "latest" or c.mode == "reflection" or c.num_prompts == 1:
        return pool[-1]
    return max(pool, key=lambda s: (s.mu - c.ucb_lambda * s.sigma, s.id))


def evaluate(run, iteration, last=False):
    """Scores of the tested prompt with pi_theta on validation and test problems.

    At the end also a table of the test problems' scores for {weights before, after training} x
    {root, tested prompt}, all with the same seeds.
    """
    s, splits = tested_prompt(run), {"val": run.task.val, "test": run.task.test}
    scores = {split: score(run, s, xs, split, iteration) for split, xs in splits.items() if xs}
    result = {"tested_prompt": s.id} | {split: float(np.mean(v)) for split, v in scores.items()}
    if last:
        root, before, test = run.population[0], run.policy.theta_ref, run.task.test
        result["table"] = {
            "before, root": score(run, root, test, "test_before", iteration, before),
            "before, tested": score(run, s, test, "test_before", iteration, before),
            "after, root": score(run, root, test, "test_after", iteration),
            "after, tested": scores["test"],
        }
    return result


def score(run, s, problems, split, iteration, theta=None):
    """The mean reward on each problem."""
    jobs = [(s, x, run.config.test_samples) for x in problems]
    return [g.value for g in sample_groups(run, jobs, split, iteration, theta)]


# ---- Files


def checkpoints(run, read_only=False):
    """Orbax checkpoints of the run: the last two, and the first that was best on validation."""
    best = BestN(get_metric_fn=lambda m: (m["val"], -m["iteration"]), n=1)
    options = ocp.CheckpointManagerOptions(
        best_fn=best.get_metric_fn,  # without it orbax does not write the metrics
        preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
        enable_async_checkpointing=False,
        read_only=read_only,
    )
    return ocp.CheckpointManager(run.directory / "checkpoints", options=options)


def save_checkpoint(run, metrics):
    """Saves what the next iteration needs: theta, Adam's state, the population."""
    args = ocp.args.Composite(
        weights=ocp.args.StandardSave(trained_state(run)),
        population=ocp.args.JsonSave([dataclasses.asdict(s) for s in run.population]),
    )
    val = {"val": metrics.get("val", -math.inf), "iteration": metrics["iteration"]}
    with tolerated("save a checkpoint"), checkpoints(run) as manager:
        manager.save(metrics["iteration"], args=args, metrics=val)


def load_checkpoint(run, manager, iteration):
    """Brings the run to the state after an iteration."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained_state(run))
    args = {"weights": ocp.args.StandardRestore(like), "population": ocp.args.JsonRestore()}
    state = manager.restore(iteration, args=ocp.args.Composite(**args))
    run.policy.theta = state["weights"]["theta"]
    run.trainer.opt_state = state["weights"]["opt_state"]
    run.population[:] = [SystemPrompt(**s) for s in state["population"]]


def trained_state(run):
    """The arrays that a checkpoint holds."""
    return {"theta": run.policy.theta, "opt_state": run.trainer.opt_state}


def resume(run):
    """Restores the latest readable checkpoint, cuts the logs there, returns its iteration or -1."""
    done = -1
    with checkpoints(run) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        for step in steps:
            try:
                load_checkpoint(run, manager, step)
                done = step
                break
            except Exception as e:
                warn(f"checkpoint {step} is damaged ({first_line(e)}); trying the one before")
        if steps and done < 0:
            raise UserError(f"{run.directory} has no readable checkpoint; start a new run")
        for step in steps:
            if step > done:
                manager.delete(step)
    if jax.process_index() == 0:
        for log in ("metrics", "rollouts", "reflections"):
            with contextlib.suppress(FileNotFoundError):
                cut_log(run.directory / f"{log}.jsonl", done)
    return done


def cut_log(path, iteration):
    """Removes the records of later iterations, and lines that are broken off."""
    part = path.with_suffix(".part")
    with open(path, "rb") as old, open(part, "wb") as new:
        for line in old:
            with contextlib.suppress(Exception):
                if json.loads(line)["iteration"] <= iteration:
                    new.write(line)
    part.replace(path)


def write_whole(path, value):
    """Writes JSON in one step: a reader, or a crash, sees the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)


def write_logs(run, metrics):
    """The iteration's line of metrics.jsonl, and population.json. Adds tokens and seconds."""
    metrics |= {"tokens": run.tokens, "seconds": run.seconds}
    run.append("metrics.jsonl", metrics)
    if jax.process_index() == 0:
        with tolerated("write population.json"):
            population = [dataclasses.asdict(s) for s in run.population]
            write_whole(run.directory / "population.json", population)


def rollout_metrics(prompts, groups, values):
    """What metrics.jsonl says of an iteration's rollouts (docs/run.md)."""
    rollouts = [y for g in groups for y in g.rollouts]
    return {
        "reward_mean": mean_reward(groups),
        "values": {s.id: value for s, value in zip(prompts, values)},
        "contrast_groups": sum(g.contrast for g in groups) / len(groups),
        "response_tokens": sum(len(y.tokens) for y in rollouts) / len(rollouts),
        "truncated": sum(y.stop == "length" for y in rollouts) / len(rollouts),
        "outcomes": Counter(y.outcome for y in rollouts),
    }


# ---- Screen


class UserError(Exception):
    """Bad input. The message is one line that says what to do; the exit code is 2."""


@contextlib.contextmanager
def explained(what):
    """Turns any error in the `with` block into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what} ({first_line(e)})") from e


@contextlib.contextmanager
def tolerated(what):
    """Turns an error in the `with` block into a warning, so that a full disk ends no run."""
    try:
        yield
    except Exception as e:
        warn(f"could not {what} ({first_line(e)}); the run goes on")


def first_line(error):
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(text, file=None):
    """Prints beside progress bars, on one process only. A closed terminal ends no run."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(text, file)


def warn(message):
    say(f"espl: warning: {message}", sys.stderr)


progress = partial(tqdm, leave=False, dynamic_ncols=True, disable=None)  # vanishes when it is done


def on_process_0(function, *args):
    """function(*args), called by the first of several processes; all get the result, as JSON."""
    result = function(*args) if jax.process_index() == 0 else None
    data = np.frombuffer(json.dumps(result).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(len(data)))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, int(size)))
    return json.loads(data.tobytes())


def announce(run):
    """The first lines on the screen: what is run, on what, and how much it will sample."""
    c, task, last = run.config, run.task, last_iteration(run)
    rollouts = last * c.batch_size * c.num_prompts * c.num_rollouts
    evaluations = 1 + math.ceil(last / c.eval_every)
    responses = c.test_samples * (evaluations * len(task.val + task.test) + 3 * len(task.test))
    say(
        f"{c.mode} on {task.name}: {last} iterations; {len(task.train)} training, {len(task.val)} "
        f"validation, {len(task.test)} test problems\n"
        f"samples up to {rollouts:,} training rollouts, and {responses:,} evaluation responses\n"
        f"{c.model} on {len(jax.devices())} {jax.default_backend()} device(s)\n"
        f"writing {run.directory}"
    )


def print_line(m):
    """One line an iteration."""
    parts = [f"{m['iteration']:>4}"]
    if "values" in m:
        parts.append(f"reward {m['reward_mean']:.3f}")
    if "loss" in m:
        parts.append(f"gradient {m['grad_norm']:.2f}, entropy {m['entropy']:.2f}")
    if "batch_winner" in m:
        parts.append(f"batch winner {m['batch_winner']}")
    for child in m.get("children", {}).values():
        parts.append(f"new prompt {child['id']} from {', '.join(map(str, child['parents']))}")
    parts += [f"{split} {m[split]:.3f}" for split in ("val", "test") if split in m]
    parts += [f"no {operator}: {why}" for operator, why in m.get("no_child", {}).items()]
    say(" | ".join([*parts, f"{sum(m['seconds'].values()):.1f} s"]))


# ---- The program


def parse_args(argv):
    """Config from the command line, which overrides a resumed run's flags and a task's DEFAULTS."""
    parser = argparse.ArgumentParser(
        usage="python espl.py [--task TASK] [flags]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = absolute if f.name in PATHS.split() else type(f.default)
        how = {"type": kind, "choices": f.metadata["choices"].split() or None}
        if isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['text']} (default: {f.default})".replace("%", "%%")
        group.add_argument(flag_name(f.name), help=text, **how)
    given = vars(parser.parse_args(argv))
    if "epochs" in given:
        given.setdefault("iterations", 0)

    saved = saved_flags(given) if "resume" in given else {}
    files = "train_file" in given or "test_file" in given
    task = (saved | given).get("task") or ("mathematics" if files else "glyphs")
    name, colon, argument = task.partition(":")
    if name.endswith(".py"):
        name = absolute(name)
    task = name + colon + absolute(argument)
    defaults = getattr(task_module(task), "DEFAULTS", {})
    with explained(f"task {task} has wrong DEFAULTS"):
        c = Config(**defaults | saved | given | {"task": task})
        for f in dataclasses.fields(c):
            *_, low, high, choices = f.metadata.values()
            value, kind = getattr(c, f.name), type(f.default)
            if not isinstance(value, (kind, int)) or value not in (choices.split() or [value]):
                raise ValueError(f"{f.name} cannot be {value!r}")  # argparse checked the flags
            if kind is not str and not low <= value <= high:
                refuse(f"{flag_name(f.name)} {value}: must be from {low} to {high}")
    return c


def flag_name(field_name):
    """--batch-size for batch_size."""
    return "--" + field_name.replace("_", "-")


def absolute(path):
    """The path from the root, if it is one, so that a run can be resumed from any folder."""
    return os.path.realpath(path) if os.path.exists(path) else path


def saved_flags(given):
    """The flags of the run that --resume continues. Few of them can change."""
    config = Path(given["resume"]).resolve() / "config.json"
    with explained(f"cannot read {config}; --resume takes the directory of an earlier run"):
        saved = json.loads(config.read_text()) | {"run_dir": str(config.parent)}
        del saved["files"]
    for name, value in given.items():
        if name not in CHANGEABLE.split() and value != saved.get(name):
            refuse(f"{flag_name(name)} cannot change when resuming")
    return saved


def refuse(message):
    raise UserError(f"{message}; see python espl.py --help")


def main(argv):
    """The program. Returns its exit code: 0, 2 for bad input or too little memory, 130 stopped."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace", line_buffering=True)  # some encodings lack letters
    jax.config.update("jax_enable_x64", False)  # whatever the environment says
    again = ""
    try:
        c = parse_args(argv)
        if c.distributed:
            address, *numbers = c.distributed.split(",")  # JAX finds out what is not given
            with explained("--distributed"):
                jax.distributed.initialize(address if numbers else None, *map(int, numbers))
        run = start_run(c)
        again = f"; continue with: python espl.py --resume {shlex.quote(c.run_dir)}"
        announce(run)
        train(run)
    except UserError as e:
        print(f"espl: error: {e}", file=sys.stderr)  # by every process
        return 2
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        advice = "out of memory; lower --microbatch-tokens or --max-rows"
        print(f"espl: error: {advice}{again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"\nespl: interrupted{again}", sys.stderr)
        return 130
    report = HERE / "tools" / "report.py"
    if report.is_file() and jax.process_index() == 0:
        subprocess.run([sys.executable, report, c.run_dir])
    return 0


# ==================================================================================================
# 8. Sampling: a queue of rollouts is decoded level by level. A level is one key/value cache of
#    [rows, length], in which each row holds one rollout at a time.
#
#    tokens of a rollout    p0 p1 ... p(n-2) | p(n-1) y0 y1 ...
#    place in its row       0  1  ... n-2    | n-1    n  n+1 ...
#
#    Prefill writes p0 ... p(n-2), once for all rows that begin with them. Every decode step feeds
#    one token, first p(n-1), writes its key and value, and samples the next token. What an earlier
#    rollout left in later places is masked.

DECODE_CHUNK = 64  # decode steps between two checks by the host
PREFILL_TOKENS = 4096  # prefilled in one call at most; one sequence may be longer


class Sampling(NamedTuple):
    """How to sample."""

    temperature: float  # 0: greedy
    top_p: float
    max_new_tokens: int
    seed: tuple[int, int] = (0, 0)
    label: str = "sampling"  # of the progress bar


def generate(policy, theta, rollouts, sampling, environment=None):
    """Samples the rollouts' responses from pi_theta: fills in tokens, logprobs and stop.

    environment(rollout), if given, is called after each DECODE_CHUNK tokens or fewer. It returns
    None to let it go on, a tool's reply (tokens) after which the model goes on, or [] to end it. It
    may cut tokens and logprobs off the response first.

    Up to rounding, batching does not affect a response: it depends on the weights, the seed, its
    prompt and its place in the list. A prompt without room in the context gets an empty response.
    """
    waiting = deque()
    for i, y in enumerate(rollouts):
        y.key = np.random.SeedSequence([*sampling.seed, i]).generate_state(2)
        y.room = min(sampling.max_new_tokens, policy.cfg.max_context - len(y.prompt))
        if y.room > 0:
            waiting.append(y)
    with progress(total=len(waiting), desc=sampling.label) as bar:
        while waiting:
            waiting = run_level(policy, theta, waiting, sampling, environment, bar)


def run_level(policy, theta, waiting, sampling, environment, bar):
    """Decodes in one cache for as long as its shape fits; returns the rollouts that go on."""
    longest = max(len(so_far(y)) for y in waiting)
    length = cache_length(longest, max(len(y.prompt) + y.room for y in waiting))
    rows = rows_for(policy, len(waiting), length)
    cache = new_cache(policy.cfg, rows, length)
    live, outgrown = [None] * rows, []
    while left := [*filter(None, live), *waiting]:
        if rows_for(policy, len(left), length) <= rows // 2:
            break  # all are prefilled again in a smaller cache
        cache = admit(policy, theta, cache, live, waiting)
        cache, sampled = decode(policy, theta, cache, live, sampling)
        for i, y in enumerate(live):
            if y is None:
                continue
            state = postprocess(y, *sampled[i], policy.stop_ids, environment)
            if state == "ended":
                bar.update()
            elif len(so_far(y)) > length:
                outgrown.append(y)
            elif state == "replied":
                waiting.append(y)  # the reply must be prefilled
            else:
                continue
            live[i] = None
    return deque(outgrown + left)


def so_far(y):
    return y.prompt + y.tokens


def cache_length(longest, possible):
    """Length of a level for rollouts that have `longest` tokens now, and `possible` in the end."""
    wanted = longest + max(longest // 2, DECODE_CHUNK)
    return bucket(max(256, min(wanted, possible)))


def rows_for(policy, needed, length):
    """Rows of a cache for this many rollouts, as memory allows."""
    most = min(policy.max_rows, policy.cache_tokens // length)
    return row_count(needed, most, policy.mesh.shape["data"])


def admit(policy, theta, cache, live, waiting):
    """Waiting rollouts take free rows. Those with the same tokens so far are prefilled once."""
    entering = {}  # all tokens but the last, which the next decode step feeds: their rows
    for i, y in enumerate(live):
        if y is None and waiting:
            live[i] = waiting.popleft()
            entering.setdefault(tuple(so_far(live[i])[:-1]), []).append(i)
    prefixes = sorted(entering, key=len, reverse=True)
    while prefixes:
        T = min(bucket(len(prefixes[0])), cache[0][0].shape[2])
        n = row_count(len(prefixes), PREFILL_TOKENS // T, 1)
        token, position = np.zeros((n, T), np.int32), np.full((n, T), PAD_POSITION, np.int32)
        source = np.full(len(live), -1, np.int32)
        for j, prefix in enumerate(prefixes[:n]):
            token[j, : len(prefix)] = prefix
            position[j, : len(prefix)] = range(len(prefix))
            source[entering[prefix]] = j
        cache = write_prefixes(cache, prefill(policy, theta, token, position), source)
        prefixes = prefixes[n:]
    return cache


def decode(policy, theta, cache, live, sampling):
    """Up to DECODE_CHUNK steps. Returns the cache, and (tokens, log-probabilities) of each row."""
    length = cache[0][0].shape[2]
    token, position, steps = np.zeros((3, len(live)), np.int32)
    key = np.zeros((len(live), 2), np.uint32)
    for i, y in enumerate(live):
        if y:
            token[i] = so_far(y)[-1]
            position[i] = len(so_far(y)) - 1
            steps[i] = min(y.room - len(y.tokens), length - position[i])
            key[i] = y.key
    cache, *sampled = decode_chunk(
        policy, theta, cache, token, position, steps, key, sampling.temperature, sampling.top_p
    )
    tokens, logprobs = map(np.asarray, sampled)
    return cache, list(zip(tokens.T, logprobs.T))


def postprocess(y, tokens, logprobs, stop_ids, environment):
    """Adds what was sampled to a response. Returns "goes on", "ended", or "replied" by a tool."""
    n = int((tokens >= 0).sum())
    y.tokens += tokens[:n].tolist()
    y.logprobs += logprobs[:n].tolist()
    reply = environment(y) if environment else None
    if reply is None:
        if y.tokens[-1] in stop_ids:
            y.stop = "eos"
        elif len(y.tokens) < y.room:
            return "goes on"
    elif reply and len(y.tokens) + len(reply) < y.room:
        y.tokens += reply
        y.logprobs += [None] * len(reply)
        return "replied"
    return "ended"


def count_sampled(rollouts):
    """Sampled tokens; those of tools do not count."""
    return sum(p is not None for y in rollouts for p in y.logprobs)


def bucket(n):
    """n rounded up to 128, 256, ...; beyond 4,096 to quarters between them. Few compilations."""
    power = max(128, 1 << (n - 1).bit_length())
    eighth = power // 8
    return power if n <= 4096 else -(-n // eighth) * eighth


def row_count(needed, most, multiple):
    """1, 2, 4, ... rows for `needed` of them, or `most`, in multiples of `multiple`."""
    rows = 1 << (needed - 1).bit_length()
    rows = max(1, min(rows, most // multiple * multiple))
    return -(-rows // multiple) * multiple


# ---- On the devices


@partial(jax.jit, static_argnums=(0, 1, 2))
def new_cache(cfg, rows, length):
    """An empty cache: keys and values [B, K, S, H] for each layer."""
    shape = rows, cfg.num_kv_heads, length, cfg.head_dim
    return [(cached(jnp.zeros(shape, cfg.dtype)),) * 2 for _ in range(cfg.num_layers)]


def cached(x_BKSH):
    """The layout of a cache: rows over the data axis, heads over the model axis."""
    return constrain(x_BKSH, "data", "model")


@jax.jit
def prefill(policy, theta, token_BT, position_BT):
    """Keys and values [B, K, T, H] of each layer, on every device of the data axis."""
    _, keys_values = policy.model(theta)(token_BT, position_BT)
    return jax.tree.map(lambda x: constrain(x, None, "model"), keys_values)


@partial(jax.jit, donate_argnames="cache")
def write_prefixes(cache, keys_values, source_B):
    """The cache with prefilled sequences at the start of rows; source: which one, -1: none."""

    def write(old_BKSH, new_BKTH):
        T, enters = new_BKTH.shape[2], (source_B >= 0)[:, None, None, None]
        start = jnp.where(enters, new_BKTH[source_B], old_BKSH[:, :, :T])
        return cached(old_BKSH.at[:, :, :T].set(start))

    return jax.tree.map(write, cache, keys_values)


@partial(
    jax.jit,
    static_argnames="top_p",
    donate_argnames="cache",
    compiler_options={"xla_gpu_dot_merger_threshold_mb": 0},  # merging q, k, v would copy weights
)
def decode_chunk(policy, theta, cache, token_B, position_B, steps_B, key_B, temperature, top_p):
    """Up to DECODE_CHUNK steps for all rows; stops early when no row has steps left.

    token, position: what each row feeds next, and where; steps: how many it may still sample.
    Returns the cache, the tokens [chunk, B], -1 where a row was idle, and their log-probabilities.
    """
    model, stop = policy.model(theta), jnp.array(policy.stop_ids)
    keys = jax.random.wrap_key_data(key_B, impl="threefry2x32")

    def step(carry):
        i, cache, token_B, position_B, steps_B, tokens, logprobs = carry
        live = steps_B > 0
        place_B = jnp.where(live, position_B, PAD_POSITION)  # idle rows write nothing
        hidden_BD, cache = model.decode(token_B, place_B, cache)
        # Each draw has a key of its rollout and position: rows and neighbours do not affect it.
        draw = jax.vmap(jax.random.fold_in)(keys, position_B)
        token_B, logprob_B = sample_token(draw, model.logits(hidden_BD), temperature, top_p)
        tokens = tokens.at[i].set(jnp.where(live, token_B, -1))
        logprobs = logprobs.at[i].set(logprob_B)
        steps_B = jnp.where(live & ~jnp.isin(token_B, stop), steps_B - 1, 0)
        return i + 1, cache, token_B, position_B + live, steps_B, tokens, logprobs

    shape = DECODE_CHUNK, len(token_B)
    start = 0, cache, token_B, position_B, steps_B, jnp.full(shape, -1), jnp.zeros(shape)
    _, cache, *_, tokens, logprobs = jax.lax.while_loop(
        lambda carry: (carry[0] < DECODE_CHUNK) & jnp.any(carry[4] > 0), step, start
    )
    return cache, constrain(tokens), constrain(logprobs)  # every process reads them


def sample_token(key_B, logits_BV, temperature, top_p):
    """A token of each row's tempered (and cut) distribution, and its log-probability, both [B].

    First one of 64 blocks of neighbouring tokens is drawn by its probability, then one of its
    tokens: the same distribution with fewer random numbers, which are slow on CPUs.
    """
    logits_BV = logits_BV / jnp.maximum(temperature, 1e-7)  # 0: the most probable token
    if top_p < 1:
        logits_BV = nucleus(logits_BV, top_p)
    B, V = logits_BV.shape
    blocks = logits_BV.reshape(B, 64 if V % 64 == 0 else 1, -1)
    mass = jax.nn.logsumexp(blocks, -1)
    key_B2 = jax.vmap(jax.random.split)(key_B)
    block_B = jax.vmap(jax.random.categorical)(key_B2[:, 0], mass)
    block = jnp.take_along_axis(blocks, block_B[:, None, None], 1)[:, 0]
    within_B = jax.vmap(jax.random.categorical)(key_B2[:, 1], block)
    logit_B = jnp.take_along_axis(block, within_B[:, None], 1)[:, 0]
    token_B = block_B * block.shape[1] + within_B
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(mass, -1)


def nucleus(logits_BV, top_p):
    """Logits with everything outside the smallest set of probability top_p at -inf.

    The threshold is found by bisection on the bits of the probabilities (non-negative floats are
    ordered like integers): exact after 31 halvings, ties kept, and cheaper than sorting V values.
    """
    probs = jax.nn.softmax(logits_BV)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def set_bit(i, threshold_B):  # finds the largest from which on tokens have mass top_p
        higher = threshold_B | (1 << (30 - i))
        remains = jnp.sum(probs, -1, where=bits >= higher[:, None])
        return jnp.where(remains >= top_p, higher, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(len(probs), jnp.int32))
    return jnp.where(bits >= threshold_B[:, None], logits_BV, -jnp.inf)


# ==================================================================================================
# 9. The model: Llama 2/3.x, Gemma 2, Gemma 3 (text), Qwen 2.5 and Qwen 3. Modules and weights have
#    the names of Hugging Face's; the truth for every number is transformers' modeling_*.py.

LORA_ALPHA = 32.0  # the adapter's output is scaled by alpha / rank
PAD_POSITION = 2**30  # of padding: later than every query, so no real token attends to it
FAMILIES = "llama gemma2 gemma3_text qwen2 qwen3"  # model_type in config.json


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, from config.json (`read_model_config`), and how it is used. Hashable."""

    num_layers: int
    model_dim: int  # D
    mlp_dim: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H; never inferred from D / N when config.json gives it
    vocab_size: int  # V
    max_context: int  # positions that the model was made for
    norm_eps: float
    rope_frequencies: tuple[tuple[float, ...], ...]  # for each layer, H/2 inverse frequencies
    windows: tuple[int, ...]  # for each layer, its sliding window; PAD_POSITION: none
    tied: bool = True  # the output projection is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head before RoPE
    gemma: bool = False  # its norms, also after attention and MLP; scaled embeddings; GELU
    attention_scale: float = 1.0
    attention_cap: float = 0.0  # tanh soft cap on attention scores; 0: none
    logit_cap: float = 0.0  # tanh soft cap on the final logits; 0: none
    dtype: str = "float32"  # of activations and frozen weights; trained weights are float32
    lora_rank: int = 0  # 0: no adapter
    frozen: bool = False  # without an adapter: no weight is trained
    fused: bool = False  # cuDNN's attention for rows of one sequence

    @property
    def weight_dtype(self):
        """Of embeddings and Linears. Adam's steps of 4e-5 would vanish in bfloat16."""
        return self.dtype if self.lora_rank or self.frozen else "float32"


class Linear(nnx.Module):
    """y = x W + b + (alpha / rank) x A B. A, B: the LoRA adapter; B starts at zero."""

    def __init__(self, cfg, name, d_in, d_out, rngs):
        self.cfg, dtype, R = cfg, cfg.weight_dtype, cfg.lora_rank
        self.kernel = nnx.Param(jax.random.normal(rngs(), (d_in, d_out), dtype) * d_in**-0.5)
        biased = cfg.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if biased else None
        if R:
            a = jax.random.uniform(rngs(), (d_in, R), minval=-1, maxval=1) * d_in**-0.5
            self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(jnp.zeros((R, d_out)))

    def __call__(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])  # XLA on CPUs is faster on matrices
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if self.cfg.lora_rank:  # in float32, in which its gradient is summed
            delta = x.astype(jnp.float32) @ self.lora_a[...] @ self.lora_b[...]
            y += (delta * (LORA_ALPHA / self.cfg.lora_rank)).astype(x.dtype)
        return checkpoint_name(y, "linear").reshape(*shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis. Gemma's multiplies by 1 + w, before the cast."""

    def __init__(self, cfg, dim):
        self.cfg = cfg
        self.weight = nnx.Param(jnp.zeros(dim) if cfg.gemma else jnp.ones(dim))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.cfg.norm_eps)
        if self.cfg.gemma:
            return (x32 * (1.0 + self.weight[...])).astype(x.dtype)
        return x32.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotate(x_BTNH, position_BT, frequencies):
    """RoPE: rotates the pairs (i, i + H/2) of each head by their position's angles."""
    angle = position_BT[:, :, None, None] * jnp.array(frequencies, jnp.float32)
    cos, sin = jnp.cos(angle).astype(x_BTNH.dtype), jnp.sin(angle).astype(x_BTNH.dtype)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BTNH, k_BKSH, v_BKSH, q_place, k_place, window, cfg):
    """Causal grouped-query attention by position: a query at p sees keys in (p - window, p].

    place: (position, segment or None). Queries see keys of segment 0, the prompt, and of their own.
    """
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, cfg.num_kv_heads, -1, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores *= cfg.attention_scale
    if cfg.attention_cap:
        scores = cfg.attention_cap * jnp.tanh(scores / cfg.attention_cap)
    (q_position, q_segment), (k_position, k_segment) = q_place, k_place
    distance = q_position[:, :, None] - k_position[:, None, :]
    visible = (distance >= 0) & (distance < window)
    if k_segment is not None:
        k_segment = k_segment[:, None, :]
        visible &= (k_segment == 0) | (k_segment == q_segment[:, :, None])
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)  # fast on CPUs in this order
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def sequence_attention(q_BTNH, k_BKTH, v_BKTH, place, window, cfg):
    """Causal attention over whole sequences.

    The queries of long sequences go in blocks, recomputed one by one in the backward pass, so that
    [T, T] scores never exist.
    """
    T = q_BTNH.shape[1]
    if T > 512:
        inputs = jax.tree.map(lambda x: jnp.stack(jnp.split(x, T // 512, 1)), (q_BTNH, place))

        @jax.checkpoint
        def attend(block):
            return attention(block[0], k_BKTH, v_BKTH, block[1], place, window, cfg)

        return jnp.concatenate(jax.lax.map(attend, inputs), axis=1)
    return attention(q_BTNH, k_BKTH, v_BKTH, place, place, window, cfg)


def fused_attention(q_BTNH, k_BKTH, v_BKTH, window, cfg):
    """cuDNN's attention, causal by index: for rows with one sequence and padding at the end."""
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BKTH.swapaxes(1, 2),
        v_BKTH.swapaxes(1, 2),
        scale=cfg.attention_scale,
        is_causal=True,
        local_window_size=None if window >= q_BTNH.shape[1] else (window - 1, 0),
        implementation="cudnn",
    )


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each on a normed residual stream."""

    def __init__(self, cfg, layer, rngs):
        self.cfg, self.window = cfg, cfg.windows[layer]
        self.frequencies = cfg.rope_frequencies[layer]
        D, F, H = cfg.model_dim, cfg.mlp_dim, cfg.head_dim
        NH, KH = cfg.num_heads * H, cfg.num_kv_heads * H
        sizes = {"q_proj": (D, NH), "k_proj": (D, KH), "v_proj": (D, KH), "o_proj": (NH, D)}
        sizes |= {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
        for name, (d_in, d_out) in sizes.items():
            setattr(self, name, Linear(cfg, name, d_in, d_out, rngs))
        norms = {"input_layernorm": D, "post_attention_layernorm": D}
        if cfg.gemma:
            norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
        if cfg.qk_norm:
            norms |= {"q_norm": H, "k_norm": H}
        for name, dim in norms.items():
            setattr(self, name, RMSNorm(cfg, dim))

    def __call__(self, x_BTD, position_BT, segment_BT):
        """Whole sequences: the residual stream after this layer, keys and values [B, K, T, H]."""
        q, k, v = self.project(x_BTD, position_BT)
        if self.cfg.fused and segment_BT is None:
            out = fused_attention(q, k, v, self.window, self.cfg)
        else:
            place = position_BT, segment_BT
            out = sequence_attention(q, k, v, place, self.window, self.cfg)
        return self.finish(x_BTD, out), (k, v)

    def decode(self, x_BTD, position_BT, cache):
        """One token a row: the residual stream after this layer, and the cache with the token."""
        q, *new = self.project(x_BTD, position_BT)
        k, v = (write_token(old, x, position_BT) for old, x in zip(cache, new))
        place, k_place = (position_BT, None), (jnp.arange(k.shape[2])[None], None)
        out = attention(q, k, v, place, k_place, self.window, self.cfg)
        return self.finish(x_BTD, out), (k, v)

    def project(self, x_BTD, position_BT):
        """Queries [B, T, N, H], keys and values [B, K, T, H]."""
        h, shape = self.input_layernorm(x_BTD), (*x_BTD.shape[:2], -1, self.cfg.head_dim)
        q, k, v = (p(h).reshape(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, position_BT, self.frequencies) for x in (q, k))
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def finish(self, x_BTD, out_BTNH):
        """Adds what was attended, then the MLP's output, to the residual stream."""
        h = self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1))
        if self.cfg.gemma:
            x_BTD += self.post_attention_layernorm(h)
            h = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))
        else:
            x_BTD += h
            h = self.mlp(self.post_attention_layernorm(x_BTD))
        return constrain(x_BTD + h, "data")

    def mlp(self, x):
        activation = jax.nn.gelu if self.cfg.gemma else jax.nn.silu  # GELU by tanh
        gate = activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


def write_token(cache_BKSH, x_BKTH, position_BT):
    """The cache with one token in each row; a position beyond its length writes nothing."""
    B, K = cache_BKSH.shape[:2]
    place = jnp.arange(B)[:, None], jnp.arange(K), position_BT
    return cached(cache_BKSH.at[place].set(x_BKTH[:, :, 0], mode="drop"))


class Transformer(nnx.Module):
    """Decoder-only language model."""

    def __init__(self, cfg, rngs):
        self.cfg, shape = cfg, (cfg.vocab_size, cfg.model_dim)
        for name in ("embed_tokens",) if cfg.tied else ("embed_tokens", "lm_head"):
            table = 0.02 * jax.random.normal(rngs(), shape, cfg.weight_dtype)
            setattr(self, name, nnx.Param(table))
        self.norm = RMSNorm(cfg, cfg.model_dim)
        self.layers = nnx.List([Block(cfg, i, rngs) for i in range(cfg.num_layers)])

    def __call__(self, token_BT, position_BT, segment_BT=None, keep=False):
        """Whole sequences: final hidden states [B, T, D], keys and values of each layer.

        Padding is any token at PAD_POSITION; T over 512 is a multiple of 512. The backward pass
        computes each layer again, except what its Linears computed if that is to be kept.
        """
        kept = jax.checkpoint_policies.save_only_these_names("linear" if keep else "")
        layer = jax.checkpoint(Block.__call__, policy=kept)
        x_BTD, keys_values = self.embed(token_BT), []
        for block in self.layers:
            x_BTD, new = layer(block, x_BTD, position_BT, segment_BT)
            keys_values.append(new)
        return self.norm(x_BTD), keys_values

    def decode(self, token_B, position_B, cache):
        """One token a row: final hidden states [B, D], and the cache with their keys and values."""
        x_BTD, new_cache = self.embed(token_B[:, None]), []
        for block, old in zip(self.layers, cache):
            x_BTD, new = block.decode(x_BTD, position_B[:, None], old)
            new_cache.append(new)
        return self.norm(x_BTD)[:, 0], new_cache

    def embed(self, token_BT):
        x_BTD = self.embed_tokens[...][token_BT].astype(self.cfg.dtype)
        if self.cfg.gemma:
            x_BTD *= jnp.asarray(self.cfg.model_dim**0.5, x_BTD.dtype)
        return constrain(x_BTD, "data")

    def logits(self, x):
        """float32 logits [..., V] of hidden states [..., D]. V is large: take few at a time."""
        table = (self.embed_tokens if self.cfg.tied else self.lm_head)[...].astype(x.dtype)
        out = jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
        cap = self.cfg.logit_cap
        return cap * jnp.tanh(out / cap) if cap else out


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["theta", "theta_ref", "frozen"],
    meta_fields=["cfg", "graphdef", "mesh", "stop_ids", "max_rows", "cache_tokens"],
)
@dataclass
class Policy:
    """pi_theta and pi_ref: one set of frozen weights under two sets of trainable ones.

    theta is what RL changes: the LoRA adapter, or every weight with lora_rank 0. theta_ref is its
    first value: with LoRA an adapter whose B is zero, hence exactly the base model.
    """

    cfg: ModelConfig
    graphdef: Any
    theta: nnx.State
    theta_ref: nnx.State
    frozen: nnx.State
    mesh: Any
    stop_ids: tuple[int, ...] = ()
    max_rows: int = 64  # most sequences decoded at once
    cache_tokens: int = 2**40  # most that all rows of the cache may hold; start_run sets it

    def model(self, theta):
        return nnx.merge(self.graphdef, theta, self.frozen)


# ---- Layout on the data x model mesh: rows are shared over `data`, weights over `model`

SHARDING = (  # path of a weight, or of its gradient or moments: its axes
    (r"embed_tokens|lm_head", P("model", None)),  # VD
    (r"(q|k|v|gate|up)_proj/(kernel|lora_b)", P(None, "model")),
    (r"(o|down)_proj/(kernel|lora_a)", P("model", None)),
    (r"(q|k|v|gate|up)_proj/bias", P("model")),
    (r"", P()),  # norms and the rest: on every device
)


def make_mesh(model_parallel):
    """All devices as a data x model mesh, which becomes the current one."""
    rows, rest = divmod(jax.device_count(), model_parallel)
    if rest:
        raise UserError(f"--model-parallel {model_parallel} does not divide the devices")
    auto = (jax.sharding.AxisType.Auto,) * 2  # the compiler lays out what is not constrained
    mesh = jax.make_mesh((rows, model_parallel), ("data", "model"), axis_types=auto)
    jax.set_mesh(mesh)
    return mesh


def path_name(path):
    """'layers/0/q_proj/kernel' for the tree path of a weight."""
    return "/".join(str(k.key) for k in path if hasattr(k, "key"))


def weight_spec(path):
    """Axes of the weight at a tree path."""
    return next(spec for pattern, spec in SHARDING if re.search(pattern, path_name(path)))


def fit_spec(spec, shape, mesh):
    """The spec without axes that do not divide their dimension: 7 heads on 2 devices stay whole."""
    return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape)))


def constrain(x, *spec):
    """Applies with_sharding_constraint on the current mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh))


def laid_out(tree):
    """Weights, or what has their paths (gradient, Adam's moments), constrained to their layout."""
    return jax.tree.map_with_path(lambda path, x: constrain(x, *weight_spec(path)), tree)


def put(x, mesh, spec):
    """A numpy array, which all processes have, as an array on the mesh."""
    sharding = jax.sharding.NamedSharding(mesh, fit_spec(spec, x.shape, mesh))
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def device_memory():
    """A device's memory in bytes. CPUs, which do not report it, share this machine's memory."""
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", share)


def linears_fit(policy, tokens):
    """Whether the outputs of all Linears for these tokens fit into about 1/12 of the memory."""
    cfg = policy.cfg
    size = 2 * cfg.num_layers * (3 * cfg.model_dim + cfg.mlp_dim) * jnp.dtype(cfg.dtype).itemsize
    return tokens * size < device_memory() * policy.mesh.size / 12


def cache_tokens(cfg, mesh, held):
    """Tokens of cache for which there is memory beside `held` bytes, and room for other arrays."""
    free = device_memory() - held
    size = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    whole = cfg.num_kv_heads % mesh.shape["model"] > 0  # such heads are on every device
    shards = mesh.shape["data"] if whole else mesh.size
    return max(0, int(min(0.85 * free, free - 3e9) * shards / size))


# ---- Directories in Hugging Face layout


def load_policy(c, frozen=False):
    """The model of --model on all devices, ready to sample, and its chat. frozen: a reflector's."""
    from transformers import AutoTokenizer

    backend, dtype = jax.default_backend(), c.dtype
    if dtype == "auto":
        dtype = "float32" if backend == "cpu" else "bfloat16"
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a TPU's is bfloat16
    directory = find_model(c.model)
    cfg = read_model_config(directory, dtype, c.lora_rank)
    supported = dtype == "bfloat16" and cfg.head_dim in (64, 128) and not cfg.attention_cap
    fused = backend == "gpu" and c.attention == "auto" and supported
    cfg = dataclasses.replace(cfg, frozen=frozen, fused=fused)
    with explained(f"cannot read the tokenizer in {directory}"):
        chat = Chat(AutoTokenizer.from_pretrained(directory), c.prompt_role, c.thinking)
        if not chat.ids("", "a question"):
            raise ValueError("it has no vocabulary")
    policy = read_policy(directory, cfg, make_mesh(c.model_parallel), c.seed)
    policy.stop_ids = stop_tokens(directory, chat)
    policy.max_rows = c.max_rows or (64 if backend == "cpu" else 512)
    return policy, chat


def find_model(name):
    """Local directory of a model, downloaded from the Hugging Face hub if it is not one already."""
    if Path(name).is_dir():
        return name
    with explained(f"cannot get {name} from the hub; check the name, or use a directory"):
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return snapshot_download(name, allow_patterns=wanted)


def rope_frequencies(rope, head_dim):
    """Inverse RoPE frequencies [H/2] for one entry of config.json's rope_parameters."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = 1.0 / rope["rope_theta"] ** exponents
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequency /= rope["factor"]
    elif kind == "llama3":  # long wavelengths are stretched, short ones kept, others interpolated
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency *= keep + (1 - keep) / rope["factor"]
    elif kind != "default":
        raise UserError(f"rope_type {kind!r} is not supported; use another --model")
    return tuple(frequency.tolist())


def read_model_config(directory, dtype="float32", lora_rank=0):
    """ModelConfig of a directory. Raises UserError for a model that is not implemented here."""
    from transformers import AutoConfig

    with explained(f"cannot read config.json of {directory}"):
        whole = AutoConfig.from_pretrained(directory)
    hf = whole.get_text_config()
    kind, gemma = hf.model_type, hf.model_type.startswith("gemma")
    if kind not in FAMILIES.split() or getattr(whole, "quantization_config", None):
        raise UserError(f"{directory}: {kind} (or quantized) is not supported; use {FAMILIES}")
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    found = hf.hidden_activation if gemma else hf.hidden_act
    if found != wanted:
        raise UserError(f"{directory}: activation {found} is not supported, {wanted} is")
    H = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    ropes = hf.rope_parameters  # for each type of layer, or one for all
    ropes = {t: rope_frequencies(ropes.get(t, ropes), H) for t in set(types)}
    return ModelConfig(
        num_layers=hf.num_hidden_layers,
        model_dim=hf.hidden_size,
        mlp_dim=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=H,
        vocab_size=hf.vocab_size,
        max_context=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_frequencies=tuple(ropes[t] for t in types),
        windows=tuple(hf.sliding_window if "sliding" in t else PAD_POSITION for t in types),
        tied=bool(hf.tie_word_embeddings),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "gemma3_text"),
        gemma=gemma,
        attention_scale=hf.query_pre_attn_scalar**-0.5 if gemma else H**-0.5,
        attention_cap=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(hf, "final_logit_softcapping", None) or 0.0,
        dtype=dtype,
        lora_rank=lora_rank,
    )


def stop_tokens(directory, chat):
    """End-of-sequence ids of the model's files, and what the template writes after a turn."""
    ends = [chat.tokenizer.eos_token_id]
    for path in Path(directory).glob("*config.json"):
        eos = json.loads(path.read_text()).get("eos_token_id")
        ends += eos if isinstance(eos, list) else [eos]
    turn = chat.render(("user", "question"), ("assistant", "answer"))
    if end := chat.special.match(turn.rpartition("answer")[2]):
        ends.append(chat.tokenizer.convert_tokens_to_ids(end[0]))
    ends = {*ends} - {None}
    if not ends:
        raise UserError(f"{directory} has no end-of-sequence token; set eos_token_id")
    return tuple(sorted(ends))


def read_policy(directory, cfg, mesh, seed=0):
    """The checkpoint's weights on the mesh, with a fresh adapter. UserErrors name the tensor."""

    def random_model():
        return nnx.split(Transformer(cfg, nnx.Rngs(seed)), nnx.LoRAParam, ...)

    graphdef, _, shapes = jax.eval_shape(random_model)
    adapter = jax.jit(lambda: laid_out(random_model()[1]))()  # no other weight is computed
    tensors = open_tensors(directory)

    def load(path, leaf):
        name, transposed = tensor_name(path), path_name(path).endswith("kernel")
        shape = leaf.shape[::-1] if transposed else leaf.shape  # torch keeps [out, in]
        found = tuple(tensors[name].get_shape()) if name in tensors else "missing"
        if found != shape:
            raise UserError(f"{directory}: tensor {name} is {found}, config.json implies {shape}")
        array = tensors.pop(name)[:].astype(leaf.dtype)
        return put(array.T if transposed else array, mesh, weight_spec(path))

    weights = jax.tree.map_with_path(load, shapes)
    if extra := set(tensors) - ({"lm_head.weight"} if cfg.tied else set()):  # some store it twice
        raise UserError(f"{directory}: config.json implies no tensor {min(extra)}")
    model = nnx.merge(graphdef, adapter, weights)
    trained = nnx.LoRAParam if cfg.lora_rank else nnx.Nothing() if cfg.frozen else nnx.Param
    graphdef, theta, frozen = nnx.split(model, trained, ...)
    return Policy(cfg, graphdef, theta, jax.tree.map(jnp.copy, theta), frozen, mesh)


def tensor_name(path):
    """The checkpoint's name for the weight at a tree path."""
    name = re.sub(r"[qkvo]_(proj|norm)", r"self_attn.\g<0>", path_name(path).replace("/", "."))
    name = re.sub(r"(gate|up|down)_proj", r"mlp.\g<0>", name)
    name = re.sub(r"\.(kernel|weight)$", "", name)
    return name if name.endswith(".bias") else f"{name}.weight"


def open_tensors(directory):
    """{name: lazy slice} of the text model's tensors, without `model.` prefixes."""
    from safetensors import safe_open

    tensors, index = {}, Path(directory, "model.safetensors.index.json")
    with explained(f"cannot read the weights in {directory}; download them again"):
        files = set(Path(directory).glob("*.safetensors"))
        if index.is_file():  # only its files count
            names = json.loads(index.read_text())["weight_map"].values()
            files = {Path(directory, name) for name in names}
        for file in sorted(files):
            handle = safe_open(file, framework="np")
            for name in handle.keys():  # noqa: SIM118  (it is no dict)
                short = re.sub(r"^(model\.|language_model\.)+", "", name)
                if short in tensors:
                    raise ValueError(f"{name} appears twice; remove the older file")
                if not re.search("vision_tower|multi_modal_projector|rotary_emb", name):
                    tensors[short] = handle.get_slice(name)
    return tensors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
