"""E-SPL: Evolutionary System Prompt Learning for RL in LLMs (arXiv 2602.14697), in one file of JAX.

    python espl.py                                              # all of it, on a tiny model, in under a minute
    python espl.py --task aime                                  # AIME -> BeyondAIME with Qwen/Qwen3-1.7B from the hub
    python espl.py --task aime --mode rl                        # a baseline: evolution | reflection | rl
    python espl.py --task search --corpus-file passages.jsonl   # a task is a file: tasks/search.py has a tool
    python espl.py --resume runs/aime-espl-20260214-120000      # go on from the last checkpoint

Algorithm 1 of the paper, its statements numbered from "Initialize S", and where they are below:

    1    Initialize S = {(s_root, mu_0, sigma_0)}                                  start_run
    2    while not converged                                                       train
    3      sample a problem x ~ D (here a batch of B)                              next_problems
    4      sample M system prompts from S, p_i ~ exp(mu_i + lambda sigma_i)        select
    5-6    for each s_i sample N solutions y_ij ~ pi_theta(. | s_i, x)             sample_groups, generate
    7      r_ij = R(x, y_ij), V_i = mean_j r_ij                                    grade, values_M (V[i,b]: Group.value)
    8      J = 1/(NM) sum_ij (r_ij - V_i) log pi_theta(y_ij | s_i, x)              to_samples, surrogate
    9      theta <- theta + alpha grad (J - beta KL(pi_theta, pi_ref))             rl_update
    10-11  rank the s_i by V_i; TrueSkill.update                                   update_ratings
    12     k <- argmax_i V_i                                                       argmax
    13-15  reflect on the rollouts of s_k; diff ~ pi_ref; git.apply(s_k, diff)     mutate, apply_operations
    16     S.append(s_mutate, mu_k, sigma_k + dsigma)                              add_child
    17-21  with p_crossover: Algorithm 2; S.append(s', mu', sigma')                crossover, add_child

Axes are suffixes of names. In sections 3 and 4: M system prompts, B problems of a batch, N rollouts; V_i is a mean
reward over a batch, V[i,b] over one problem. In sections 5 to 7: B rows, T query tokens, S key tokens, N query heads, K
key/value heads, G = N/K, H head dim, D model dim, F feed-forward dim, V vocabulary, L layers, R LoRA rank or some rows,
Z shards of the rows. A slot is a hole in a text of prompts_seed.txt. Sections: 2 Config, 3 Algorithm 1, 4 evolution, 5
RL update, 6 sampling, 7 model, 8 tasks, 9 a run, its files and the program.

Where this file departs from the paper, and why:
 1. Selection: the highest score plus random others, the paper's simplified strategy; --selection has line 4's softmax.
 2. A child's sigma is sqrt(sigma^2 + dsigma^2), as in the paper's appendix and Algorithm 2, not line 16's sum.
 3. Neighbours in the ranking within 0.01 tie; for the best prompt only equals do, and the seed decides between them.
 4. A validation split of the training problems picks the checkpoint; the test set only reports, and its questions are
    taken out of the training set. The paper's figures are running maxima over the test set.
 5. The KL term's gradient is that of the KL over the next token, given its prefix.
 6. Parents of a crossover strictly won a problem, the best prompt too, as in the authors' code: it is rarer than
    p_crossover.
 7. V_i, by which prompts are ranked, is a mean over the batch; the advantage's baseline is V[i,b], of one problem.
docs/released_code.md compares with the code that its authors released.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import itertools
import json
import logging
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

for _name, _value in {"TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_VERBOSITY": "error",
                      "DATASETS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error",
                      "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}.items():
    os.environ.setdefault(_name, _value)  # libraries speak only when something is wrong; of a GPU's memory all but 8 %

import jax  # noqa: E402  (after the environment is set)
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import trueskill
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

# ======================================================================================================================
# 2. Config: the flags. Defaults are the paper's (section Hyper-parameters) where it gives them.
# ======================================================================================================================

RESUMABLE = ("resume", "epochs", "iterations", "save_every", "max_rows", "microbatch_tokens", "compile_cache", "table",
             "reflector_concurrency", "reflector_timeout", "max_reflector_tokens", "mode", "model_parallel")
MOST_USED = ("task", "train_file", "test_file", "model", "mode", "batch_size", "num_rollouts", "num_prompts",
             "iterations", "seed", "learning_rate", "max_new_tokens", "max_rows", "run_dir", "resume")
MATHS = {  # the built-in tasks: (train sets, test sets), each a "data set of the hub:split"
    "aime": (["AI-MO/aimo-validation-aime:train"], ["ByteDance-Seed/BeyondAIME:test"]),
    "aime_amc": ([f"AI-MO/aimo-validation-{x}:train" for x in ("aime", "amc")], ["ByteDance-Seed/BeyondAIME:test"]),
    "hmmt": ([f"MathArena/hmmt_feb_{y}:train" for y in (2023, 2024, 2025)], ["MathArena/hmmt_nov_2025:train"]),
}
MODES = ("espl", "evolution", "reflection", "rl")
LOSSES = ("importance_sampling", "ppo", "cispo", "reinforce")


def flag(default, group: str, text: str, symbol: str = "", low=None, high=sys.float_info.max, choices=None):
    """A field of Config: default, help group, help text, the paper's symbol, bounds or choices."""
    names = dict(group=group, text=text, symbol=symbol, low=low, high=high, choices=choices)
    return field(default=default, metadata=names)


@dataclass
class Config:
    """Everything that decides a run. --help prints this class; a task file may add flags of its own."""
    task: str = flag("", "Task", f"{', '.join(MATHS)}, tasks/NAME.py, PATH.py; without problems: glyphs (no download)")
    train_file: str = flag("", "Task", "JSONL of training problems instead (fields: README)")
    test_file: str = flag("", "Task", "JSONL of test problems instead")
    train_size: int = flag(256, "Task", "most training problems, validation included", low=1)
    test_size: int = flag(0, "Task", "most test problems, drawn by the seed (0: all)", low=0)
    val_size: int = flag(16, "Task", "training problems set aside to pick by; at most a fifth of them", low=0)
    prompts_file: str = flag("", "Task", "what is said to the model (default: prompts_seed.txt beside espl.py)")

    model: str = flag("Qwen/Qwen3-1.7B", "Model", "hub name, or directory in Hugging Face layout")
    dtype: str = flag("auto", "Model", "auto: float32 on CPU, else bfloat16", choices=("auto", "bfloat16", "float32"))
    lora_rank: int = flag(32, "Model", "rank of the adapter; 0 trains all weights", "R", low=0)
    lora_alpha: float = flag(32.0, "Model", "the adapter's output is scaled by alpha / rank", low=0)
    model_parallel: int = flag(1, "Model", "devices along the mesh's model axis; the rest are its data axis", low=1)

    mode: str = flag("espl", "Algorithm 1", "weights and prompts learn; prompts; one prompt; weights", choices=MODES)
    batch_size: int = flag(10, "Algorithm 1", "problems in a batch", "B", low=1)
    num_rollouts: int = flag(5, "Algorithm 1", "rollouts of each prompt on each problem", "N", low=1)
    num_prompts: int = flag(3, "Algorithm 1", "system prompts in a batch", "M", low=1, high=26)
    epochs: int = flag(10, "Algorithm 1", "passes over the training problems", low=1)
    iterations: int = flag(0, "Algorithm 1", "iterations in all, instead of --epochs (0: as the epochs say)", low=0)
    seed: int = flag(0, "Algorithm 1", "decides the whole run", low=0, high=2**31 - 1)

    learning_rate: float = flag(4e-5, "RL update", "Adam's, betas (0.9, 0.95), eps 1e-8", "alpha", low=0)
    loss: str = flag("importance_sampling", "RL update", "surrogate for J", choices=LOSSES)
    baseline: str = flag("prompt", "RL update", "r - V[i,b], or r - mean over prompts", choices=("prompt", "marginal"))
    clip_low: float = flag(0.2, "RL update", "ppo, cispo: ratio at least 1 - this", low=0, high=1)
    clip_high: float = flag(0.2, "RL update", "ppo, cispo: ratio at most 1 + this", low=0)
    kl_coef: float = flag(0.0, "RL update", "weight of KL(pi_theta || pi_ref)", "beta", low=0)
    max_grad_norm: float = flag(0.0, "RL update", "clip the gradient's global norm (0: off)", low=0)
    mask_truncated: bool = flag(False, "RL update", "leave responses cut at the limit out of the loss")
    microbatch_tokens: int = flag(16384, "RL update", "tokens of a gradient-accumulation step", low=1)

    temperature: float = flag(0.6, "Sampling", "of rollouts; the policy is the tempered distribution", low=1e-3)
    top_p: float = flag(0.95, "Sampling", "nucleus mass of rollouts", low=1e-6, high=1)
    max_new_tokens: int = flag(15000, "Sampling", "longest response, with the replies of tools", low=1)
    max_tool_calls: int = flag(4, "Sampling", "calls of tools in a response; one more ends it", low=0)
    context: int = flag(0, "Sampling", "most tokens of prompt and response (0: what the model was made for)", low=0)
    max_rows: int = flag(0, "Sampling", "most rollouts decoded at once (0: as memory allows, to 512; CPU: 64)", low=0)
    prompt_role: str = flag("system", "Sampling", "turn that carries the system prompt", choices=("system", "user"))
    thinking: bool = flag(True, "Sampling", "passed to the chat template as enable_thinking")

    selection: str = flag("top_random", "Evolution", "how the M prompts are chosen",
                          choices=("top_random", "softmax", "uniform", "ucb", "lucb"))
    selection_temperature: float = flag(1.0, "Evolution", "of --selection softmax", "T", low=1e-6)
    ucb_lambda: float = flag(2.0, "Evolution", "score = mu + lambda sigma", "lambda", low=0)
    window: int = flag(10, "Evolution", "only the most recent prompts are selected", "K", low=1)
    max_pool_size: int = flag(200, "Evolution", "the youngest so many may be tested, and selected (--window)", low=1)
    p_crossover: float = flag(0.2, "Evolution", "chance of crossover in an iteration", "p_crossover", low=0, high=1)
    delta_sigma: float = flag(1.0, "Evolution", "uncertainty added to a child's rating", "dsigma", low=0)
    rating: str = flag("trueskill", "Evolution", "last: mu is a prompt's last V_i, and lambda is 0 unless it is given",
                       choices=("trueskill", "last"))

    reflector: str = flag("reference", "Reflection", "reference: pi_ref; current: pi_theta; or the URL of a server")
    reflector_model: str = flag("", "Reflection", "its name there (OpenAI's protocol; key: OPENAI_API_KEY)")
    reflector_concurrency: int = flag(16, "Reflection", "requests to the server at a time", low=1)
    reflector_timeout: float = flag(600.0, "Reflection", "seconds until a request is tried again, three times", low=0.1)
    max_reflector_tokens: int = flag(0, "Reflection", "tokens in and out, then evolution ends (0: no limit)", low=0)
    reflect_on: str = flag("contrast", "Reflection", "problems whose rewards differ, with V < 1, or all",
                           choices=("contrast", "failures", "all"))
    reflect_problems: int = flag(0, "Reflection", "most problems reflected on in an iteration (0: all)", low=0)
    max_operations: int = flag(2, "Reflection", "edits proposed for one problem", "K_ops", low=1)
    reflect_temperature: float = flag(0.6, "Reflection", "sampling temperature (top_p as for rollouts)", low=0)
    reflect_tokens: int = flag(8192, "Reflection", "longest reply", low=1)
    max_principles: int = flag(40, "Reflection", "principles a prompt may have", low=1)
    max_principle_words: int = flag(64, "Reflection", "words a principle may have (it is asked for 32)", low=1)
    allow_leaks: bool = flag(False, "Reflection", "keep principles that give away a problem, or its answer")

    eval_every: int = flag(10, "Evaluation", "iterations between evaluations; the first is before training", low=1)
    test_samples: int = flag(10, "Evaluation", "responses to each problem", low=1)
    test_greedy: bool = flag(False, "Evaluation", "also one greedy response to each test problem")
    test_prompt: str = flag("best", "Evaluation", "highest mu - lambda sigma, or latest", choices=("best", "latest"))
    table: bool = flag(True, "Evaluation", "at the end: weights before, after x root, tested prompt, on the test set")

    run_dir: str = flag("", "Run", "where everything is written (default: runs/<task>-<mode>-<time>)")
    resume: str = flag("", "Run", "run directory to continue; its flags are taken from there")
    save_every: int = flag(1, "Run", "iterations between checkpoints", low=1)
    track: str = flag("", "Run", "also log to wandb:PROJECT or trackio:PROJECT")
    compile_cache: str = flag("~/.cache/espl/jax", "Run", "folder of compiled programs ('': off)")

# ======================================================================================================================
# 3. Algorithm 1: the loop over iterations, and one iteration from rollouts to children
# ======================================================================================================================


def train(run: Run) -> None:
    """Algorithm 1's loop, with evaluations (the first before training), logs and checkpoints."""
    c, last = run.config, last_iteration(run)
    with resumed_and_saved(run):
        for iteration in range(run.finished + 1, last + 1):
            run.seconds.clear()
            run.tokens.clear()
            m = espl_iteration(run, iteration) if iteration else {"iteration": 0}
            if iteration % c.eval_every == 0 or iteration == last:
                m |= evaluate(run, iteration, table=c.table and iteration == last)
            on_host_0(write_logs, run, m)
            on_host_0(print_line, run, m)
            finish_iteration(run, m)
            if iteration % c.save_every == 0 or iteration == last:
                save_checkpoint(run, iteration)


def espl_iteration(run: Run, iteration: int) -> dict:
    """One iteration of Algorithm 1 (they count from 1); returns its line of metrics.jsonl."""
    c, rng = run.config, np.random.default_rng(run.seed(f"evolution/{iteration}"))
    problems_B = next_problems(run, iteration)  # Alg. 1, line 3: a batch of B problems
    # Line 4: M system prompts. The rollouts of missing ones go to the others, so that every mode samples M B N.
    prompts_M = select(run.population, c, rng) if c.mode in ("espl", "evolution") else [tested_prompt(run)]
    each, more = divmod(c.num_prompts * c.num_rollouts, len(prompts_M))  # one has all 15, two 8 and 7, three 5 each
    # Lines 5-7: N solutions y_ij ~ pi_theta(. | s_i, x), rewards r_ij = R(x, y_ij), values V_i = mean_j r_ij
    groups = iter(sample_groups(run, [(s, x, each + (i < more)) for i, s in enumerate(prompts_M) for x in problems_B],
                                "train", iteration))
    groups_MB = [[next(groups) for _ in problems_B] for _ in prompts_M]
    values_M = [float(np.mean([r for g in row for r in g.rewards])) for row in groups_MB]  # equal sums: equal means
    run.finished = -1  # now weights and population change: who stops here goes back to the last checkpoint

    def learn() -> dict:  # lines 8-9: theta <- theta + alpha grad (J - beta KL(pi_theta, pi_ref))
        if c.mode not in ("espl", "rl"):
            return {}
        with timed(run, "update"):
            rollouts = c.num_prompts * c.num_rollouts * len(problems_B)
            learning = rl_update(run.trainer, samples := to_samples(groups_MB, c), rollouts)
            return learning | not_finite(run, iteration, learning, samples)

    def evolve() -> dict:
        if c.mode == "rl":
            return {}
        update_ratings(prompts_M, values_M, iteration, c.rating)                        # lines 10-11
        k = argmax(values_M, rng)                                                       # line 12
        with timed(run, "reflect"):                                                     # lines 13-21
            return breed(run, Tournament(
                prompts_M, groups_MB, best=k, ask=partial(ask, run, iteration, Counter()), parse=run.task.parse,
                config=c, rng=rng, control=run.chat.control, texts=run.task.texts), iteration)

    learning, evolution = run.server.side_by_side(run, learn, evolve) if run.server else (learn(), evolve())
    return {"iteration": iteration, **batch_metrics(run, prompts_M, groups_MB, values_M), **learning, **evolution}


def breed(run: Run, tournament: Tournament, iteration: int) -> dict:
    """Append the children of this iteration's prompts to the population (Alg. 1, lines 13-21); returns the log."""
    c, log = run.config, {"best": tournament.prompts[tournament.best].id, "children": {}, "no_child": {}}
    for name, (operator, chance) in OPERATORS.items():
        if chance(c) < 1 and tournament.rng.random() >= chance(c):
            continue
        try:
            child = add_child(run.population, *operator(tournament), name, iteration, c)
            log["children"][name] = {"id": child.id, "parents": child.parents}
        except NoChild as e:
            log["no_child"][name] = str(e)
        except Exception as e:  # a failure in reflection never ends a run, but one of memory is no reflection's
            if "RESOURCE_EXHAUSTED" in str(e):
                raise
            log["no_child"][name] = f"failed: {first_line(e)}"
            warn(f"{name} {log['no_child'][name]}; its traceback is in reflections.jsonl")
            run.append("reflections.jsonl", [{"iteration": iteration, "traceback": traceback.format_exc()}])
    return log | {"parse_failures": tournament.unread, "dropped": dict(+tournament.dropped)}


def last_iteration(run: Run) -> int:
    """Iterations in all; the last batch of an epoch holds what is left."""
    return run.config.iterations or run.config.epochs * math.ceil(len(run.task.train) / run.config.batch_size)


def next_problems(run: Run, iteration: int) -> list[Problem]:
    """The iteration's batch of B problems. Every epoch has its own seeded shuffle."""
    train, B = run.task.train, run.config.batch_size
    epoch, i = divmod(iteration - 1, math.ceil(len(train) / B))
    order = np.random.default_rng(run.seed(f"epoch/{epoch}")).permutation(len(train))
    return [train[j] for j in order[i * B: (i + 1) * B]]


@dataclass
class Group:
    """The N rollouts of one system prompt on one problem, graded."""
    problem: Problem
    texts: list[str]
    rewards: list[float]                                # r[i, b, j], at most 1
    outcomes: list[str]                                 # correct, wrong, no_answer, …: the task's word for each
    prompt_ids: list[int] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)

    @property
    def value(self) -> float:  # V[i, b]
        return float(np.mean(self.rewards))

    @property
    def contrast(self) -> bool:  # something to learn from: with rewards of 0 and 1, 0 < V < 1
        return max(self.rewards) > min(self.rewards)

    @property
    def grades(self) -> list[str]:  # as the reflection model is told
        return [o if r in (0, 1) else f"{o}, reward {r:g}" for r, o in zip(self.rewards, self.outcomes)]


def sample_groups(run: Run, pairs: list[tuple[SystemPrompt, Problem, int]], split: str, iteration: int) -> list[Group]:
    """For each (system prompt, problem, n): n responses of pi_theta, graded and written to rollouts.jsonl; split is
    train, val, test, test_greedy (decoded greedily), test_before (of pi_ref) or test_after, these with test's seeds."""
    c, chat = run.config, run.chat
    prompts = [chat.ids(system_text(run.task, s.principles), x.question) for s, x, _ in pairs]
    training, seed = split == "train", run.seed(f"{split.partition('_')[0]}/{iteration}")
    sampling = Sampling(0.0 if split == "test_greedy" else c.temperature, c.top_p, c.max_new_tokens, seed,
                        f"sampling {split}")
    theta = run.policy.theta_ref if split == "test_before" else run.policy.theta
    with timed(run, "sample" if training else "evaluate"):
        responses = generate(run.policy, theta, prompts, [n for _, _, n in pairs], sampling,
                             partial(from_tools("calls").answer_call, run, prompts) if run.task.tools else None)
    run.tokens["rollouts" if training else "evaluation"] += sum(
        p is not None for group in responses for y in group for p in y.logprobs)  # what tools said was not sampled
    with timed(run, "grade" if training else "evaluate"):
        texts = [[chat.text(y.tokens, prompt) for y in group] for prompt, group in zip(prompts, responses)]
        last_turns = [(x, final_text(chat.text(y.tokens[y.turn:], y.tokens[:y.turn]) if y.turn else text))
                      for (_, x, _), ts, group in zip(pairs, texts, responses) for text, y in zip(ts, group)]
        graded = iter(on_host_0(grade, run.task, last_turns))
    groups = []
    for (s, x, _), prompt, group, ts in zip(pairs, prompts, responses, texts):
        rewards, outcomes = map(list, zip(*(next(graded) for _ in group)))
        groups.append(Group(x, ts, rewards, outcomes, prompt, group))
        run.append("rollouts.jsonl", [
            dict(iteration=iteration, split=split, prompt=s.id, problem=x.id, reward=r, outcome=o, stop=y.stop,
                 tokens=len(y.tokens), calls=y.calls, response=t)
            for y, t, r, o in zip(group, ts, rewards, outcomes)])
    return groups


def to_samples(groups_MB: list[list[Group]], c: Config) -> list[Sample]:
    """Rollouts with advantages r - V[i,b] (or r minus the mean over all prompts). Groups in which all are 0 are left
    out, unless the KL term pulls on them."""
    samples = []
    for groups_M in zip(*groups_MB):
        marginal = float(np.mean([r for group in groups_M for r in group.rewards]))
        for group in groups_M:
            advantages = [r - (group.value if c.baseline == "prompt" else marginal) for r in group.rewards]
            if c.kl_coef or max(map(abs, advantages)) > 1e-9:
                samples += [Sample(group.prompt_ids, y.tokens, y.logprobs, a)
                            for y, a in zip(group.responses, advantages) if y.stop != "length" or not c.mask_truncated]
    return samples

# ======================================================================================================================
# 4. Evolution: the population of system prompts, its ratings, and the operators that breed new ones. No JAX in here.
# ======================================================================================================================


@dataclass
class SystemPrompt:
    """Member s of the population: a list of principles (G0, G1, …; none at the root), rating and lineage.
    The population is a list of all prompts ever made, by id; the paper's S is its youngest max_pool_size (FIFO)."""
    id: int
    principles: list[str]
    mu: float = 25.0               # TrueSkill's defaults (section Hyper-parameters)
    sigma: float = 25.0 / 3
    operation: str = "root"        # root, or a name in OPERATORS
    parents: list[int] = field(default_factory=list)
    iteration: int = 0             # when it was made
    history: list[dict] = field(default_factory=list)  # a line a tournament: iteration, value, rank, mu, sigma
    scores: list[dict] = field(default_factory=list)   # a line an evaluation: iteration, split, score


def argmax(scores, rng) -> int:
    """Index of the largest score; exact ties are broken by the seeded generator."""
    return int(rng.choice(np.flatnonzero(np.asarray(scores) == max(scores))))


def select(population: list[SystemPrompt], c: Config, rng) -> list[SystemPrompt]:
    """M distinct prompts of the K most recent ones, all while there are fewer   (Alg. 1, line 4; section Selection)."""
    window = population[-min(c.window, c.max_pool_size):]
    scores = np.array([s.mu + c.ucb_lambda * s.sigma for s in window])
    order, first = rng.permutation(len(window)), None  # equals are in random order
    match c.selection:
        case "top_random":  # "always add the highest score, but randomly sample from the rest of the sliding window"
            first, scores = argmax(scores, rng), np.zeros(len(window))
        case "softmax":     # p_i ~ exp(score_i / T) without replacement: the largest of score / T + Gumbel noise
            scores = scores / c.selection_temperature + rng.gumbel(size=len(window))
        case "uniform":
            scores = np.zeros(len(window))
        case "ucb":         # mu + lambda sigma, as they are
            pass
        case "lucb":        # the best lower bound, then the best upper bounds
            first = max(order, key=lambda i: window[i].mu - c.ucb_lambda * window[i].sigma)
    order = sorted(order, key=lambda i: (i != first, -scores[i]))
    return sorted((window[i] for i in order[: c.num_prompts]), key=lambda s: s.id)


def update_ratings(prompts: list[SystemPrompt], values: list[float], iteration: int, rating="trueskill") -> None:
    """One TrueSkill free-for-all of the prompts, ranked by V_i; neighbours within 0.01 tie   (Alg. 1, lines 10-11)."""
    prompts, values = zip(*sorted(zip(prompts, values), key=lambda pair: pair[0].id))  # whatever order they came in
    order = sorted(range(len(prompts)), key=lambda i: -values[i])
    ranks = [0] * len(prompts)
    for better, worse in zip(order, order[1:]):
        ranks[worse] = ranks[better] + (values[better] - values[worse] > 0.01 + 1e-9)
    if rating == "last":  # an ablation: what earlier tournaments said is forgotten, every prompt is as certain
        for s, v in zip(prompts, values):
            s.mu, s.sigma = v, 1.0
    elif len(prompts) > 1:
        env = trueskill.TrueSkill(mu=25.0, sigma=25.0 / 3, beta=25.0 / 6, tau=25.0 / 300, draw_probability=0.10)
        for s, (r,) in zip(prompts, env.rate([(env.create_rating(s.mu, s.sigma),) for s in prompts], ranks)):
            s.mu, s.sigma = r.mu, r.sigma
    for s, v, rank in zip(prompts, values, ranks):
        s.history.append({"iteration": iteration, "value": v, "rank": rank, "mu": s.mu, "sigma": s.sigma})


def add_child(population: list[SystemPrompt], principles: list[str], parents: list[SystemPrompt], operation: str,
              iteration: int, c: Config) -> SystemPrompt:
    """Append a child (Alg. 1, lines 16 and 21; Alg. 2). Raises NoChild if it is not new. It inherits what is known of
    its parents, their precision-weighted mean, but not that it has been tried: its sigma is widened by dsigma."""
    if same := [s for s in population if s.principles == principles]:
        raise NoChild(f"nothing changed (equal to prompt {same[0].id}); raise --reflect-temperature, or "
                      "--max-principles where it has as many")
    precision = [s.sigma**-2 for s in parents]
    mu = sum(p * s.mu for p, s in zip(precision, parents)) / sum(precision)
    sigma = math.sqrt(1 / sum(precision) + c.delta_sigma**2)
    child = SystemPrompt(len(population), principles, mu, sigma, operation, [s.id for s in parents], iteration)
    population.append(child)
    return child


# ---- Operators: a tournament's rollouts and the reflection model in, (principles, parents) of a child out

class NoChild(Exception):
    """An operator made no child; the message says why."""


@dataclass
class Tournament:
    """What an operator works with: an iteration's prompts and their rollouts, and the reflection model. ask(request,
    [slots, …]) samples a reply to each request, a section of prompts_seed.txt filled in with the slots."""
    prompts: list[SystemPrompt]
    groups_MB: list[list[Group]]
    best: int                                          # k: the index of the best prompt
    ask: Callable[[str, list[dict]], list[str]]
    parse: Callable[[str], list[dict] | None]          # operations in a reply; None: unreadable
    config: Config
    rng: np.random.Generator | None = None             # the iteration's own
    control: re.Pattern | None = None                  # could leave its turn when tokenised (None: CONTROL)
    texts: dict[str, str] = field(default_factory=dict)  # the task's; no principle may repeat what a request says
    unread: int = 0                                    # replies that could not be read, even when asked again
    dropped: Counter = field(default_factory=Counter)  # operations, by what was wrong with them

    def operations(self, request: str, slots: list[dict]) -> list[list[dict] | None]:
        """Replies as lists of operations; those that cannot be read are asked for once more, if sampled, then None."""
        parsed = [self.parse(reply) for reply in self.ask(request, slots)]
        again = [i for i, ops in enumerate(parsed) if ops is None and self.config.reflect_temperature > 0]
        for i, reply in zip(again, self.ask(request, [slots[i] for i in again]) if again else ()):
            parsed[i] = self.parse(reply)
        self.unread += parsed.count(None)
        return parsed


def mutate(r: Tournament) -> tuple[list[str], list[SystemPrompt]]:
    """Contrasts the successes and failures of the best prompt and edits its principles: summarise, critique, aggregate,
    apply (Alg. 1, lines 13-15; appendix LLM-Based Self-Reflection)."""
    c, parent = r.config, r.prompts[r.best]
    wanted = {"contrast": lambda g: g.contrast, "failures": lambda g: g.value < 1, "all": lambda g: True}
    groups = [g for g in r.groups_MB[r.best] if wanted[c.reflect_on](g)][: c.reflect_problems or None]
    if not groups:
        raise NoChild(f"no problem to reflect on ({c.reflect_on}); try --reflect-on failures, or other problems")
    current, problems = numbered(parent.principles), [g.problem for g in groups]
    # App. Trajectory Summarization: one request a rollout, given its grade and the truth
    summaries = r.ask("summarize", [
        dict(problem=g.problem.question, answer=g.problem.answer, principles=listing(current), response=y, grade=grade)
        for g in groups for y, grade in zip(g.texts, g.grades)])
    r.dropped.update({"empty summary": summaries.count("")})
    of_each = iter(summaries)  # from which each group's zip takes as many as it has grades
    # App. Self-Critique and Local Edit Proposal: one request a problem, at most K_ops operations each
    critiques = r.operations("critique", [
        critique_slots(g.problem, current, list(zip(g.grades, of_each)), c.max_operations) for g in groups])
    proposals = []
    for ops in critiques:
        good = [op for op in ops or [] if valid(op, ("add", "modify"), current, problems, r)]
        r.dropped.update({"beyond K_ops": max(0, len(good) - c.max_operations)})
        proposals += good[: c.max_operations]
    if not proposals:
        raise NoChild(f"no valid proposal ({critiques.count(None)} of {len(critiques)} critiques did not parse); read "
                      "reflections.jsonl, and if replies break off raise --reflect-tokens or give --no-thinking")
    # App. Local-to-Global Aggregation: one request for all proposals
    candidates, slots = aggregate_slots(current, proposals)
    [plan] = r.operations("aggregate", [slots])
    if plan is None:
        raise NoChild("the revision plan did not parse; raise --reflect-tokens or give --no-thinking")
    return apply_operations(candidates, plan, ("modify", "merge"), problems, r), [parent]


def crossover(r: Tournament) -> tuple[list[str], list[SystemPrompt]]:
    """Edits the best prompt's principles by those of others that won a problem; parents: the best first   (Alg. 2)."""
    prompts, problems = r.prompts, [g.problem for g in r.groups_MB[0]]
    # Phi: the problems that each prompt strictly won, by its margin over the best other one; the best prompt is first
    values_MB = np.array([[g.value for g in row] for row in r.groups_MB])
    margin = lambda i: values_MB[i] - np.delete(values_MB, i, 0).max(0, initial=-math.inf)
    wins = {i: np.flatnonzero(margin(i) >= 0.01 - 1e-9).tolist() for i in [r.best, *range(len(prompts))]}
    wins = {i: won for i, won in wins.items() if won}
    if r.best not in wins or len(wins) < 2:
        raise NoChild("fewer than two prompts, or not the best one, won a problem strictly")
    letters = dict(zip(wins, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    sets = {x: prompts[i].principles for i, x in letters.items()}
    [ops] = r.operations("crossover", [
        crossover_slots(sets, [(letters[i], b, problems[b]) for i in wins for b in wins[i]])])
    if ops is None:
        raise NoChild("the reply did not parse")
    set_a, kinds = numbered(prompts[r.best].principles, "A."), ("add", "modify", "remove")
    return apply_operations(set_a, ops, kinds, problems, r), [prompts[i] for i in wins]


OPERATORS = {  # name: (operator, its chance in an iteration); a new one needs no more, but for its requests in SLOTS
    "mutation": (mutate, lambda c: 1.0),
    "crossover": (crossover, lambda c: c.p_crossover if c.num_prompts > 1 and c.mode != "reflection" else 0.0),
}


# ---- What the reflection model is shown

def numbered(principles: list[str], prefix: str = "") -> dict[str, str]:
    """{"G0": first principle, …}, with a set's letter as prefix ("A.G0")."""
    return {f"{prefix}G{i}": text for i, text in enumerate(principles)}


def listing(principles: dict[str, str]) -> str:
    """Principles as a model reads them, one a line with its id."""
    return "\n".join(f"[{i}] {text}" for i, text in principles.items()) or "(none)"


def critique_slots(problem: Problem, principles: dict, summaries: list[tuple[str, str]], max_operations: int) -> dict:
    """Slots of a critique request: one problem, with the (grade, summary) of each rollout."""
    attempts = [f"Attempt {j + 1} ({grade}):\n{text or '(no summary)'}" for j, (grade, text) in enumerate(summaries)]
    return dict(problem=problem.question, answer=problem.answer, principles=listing(principles),
                attempts="\n\n".join(attempts), max_operations=str(max_operations))


def aggregate_slots(principles: dict, proposals: list[dict]) -> tuple[dict, dict]:
    """The principles with the proposed new ones as candidates C0, C1, …, and the slots of the aggregation request. The
    candidates are in unless the plan merges them away; a proposed modification only if the plan repeats it."""
    one_line = lambda op: " ".join(op["principle"].split())
    added = [one_line(op) for op in proposals if op["operation"] == "add"]
    candidates = principles | {f"C{i}": text for i, text in enumerate(added)}
    changes = [f"[{op['modified_from']}] -> {one_line(op)}" for op in proposals if op["operation"] == "modify"]
    return candidates, dict(principles=listing(candidates), suggestions="\n".join(changes) or "(none)")


def crossover_slots(sets: dict[str, list[str]], wins: list[tuple[str, int, Problem]]) -> dict:
    """Slots of a crossover request: the sets of principles by letter, and (letter, number, problem) of each win."""
    lists = [f"Set {x}:\n{listing(numbered(principles, x + '.'))}" for x, principles in sets.items()]
    won = [f"Problem {b} (won by set {x}):\n{problem.question}" for x, b, problem in wins]
    return dict(sets="\n\n".join(lists), wins="\n\n".join(won))


# ---- Operations: a reflection's edits. Each replaces the principles that it names by a new one, or by nothing.

SOURCES = {"add": lambda op: [], "modify": lambda op: [op.get("modified_from")],
           "remove": lambda op: [op.get("remove_id")], "merge": lambda op: op.get("merged_from")}
CONTROL = re.compile(r"<[|｜].{0,64}?[|｜]>|</?think>|<(?:start|end)_of_\w+>|</?s>|<[be]os>|\[/?INST\]|<</?SYS>>")
STRING = r'"(?:[^"\\]|\\.)*+"'  # of JSON; possessive, so that hostile replies take linear time
OBJECT = re.compile(r'\{(?:[^{}"]|' + STRING + r")*+\}", re.S)  # one without another object in it
ESCAPE = re.compile(  # an escape of JSON, unless LaTeX is likelier (\frac, \neq); group 1: a backslash to be doubled
    r'\\(?:["\\/]|[bfrt](?![a-zA-Z])|n(?!(?:abla|eq?|eg|i|mid|ot|otin|u|leq|geq)\b)|u[0-9a-fA-F]{4})|(\\)')


def parse_operations(reply: str) -> list[dict] | None:
    """The JSON list of operations at the end of a reply; None when there is none ([] is an answer). It is looked for in
    the last fenced block that has one, else in the last list, else anywhere; complete operations of a list that breaks
    off count. Text inside <think>…</think> is never read."""
    text = final_text(reply)
    fenced = re.findall(r"```(?:json)?\s*(.*?)(?:```|\Z)", text, re.S)
    for block in [*fenced[::-1], re.split(r"\[(?=\s*\{)", text)[-1], text]:
        operations = [op for op in map(read_object, OBJECT.findall(block)) if "operation" in op]
        if operations or re.search(r"(?<!=)(?<!= )\[\s*\]$", block.rstrip("`*. \n")):  # an empty list ends it
            return operations
    return None


def read_object(text: str) -> dict:
    """A JSON object as models write it; {} if it is beyond repair."""
    parts = re.split(f"({STRING})", text, flags=re.S)  # every other one is a string
    parts[1::2] = [ESCAPE.sub(r"\g<0>\1", part) for part in parts[1::2]]  # backslashes of LaTeX
    parts[::2] = [re.sub(r"(//|#).*", "", part) for part in parts[::2]]  # comments
    parts[::2] = [re.sub(r",(?=\s*[\]}])", "", part) for part in parts[::2]]  # trailing commas
    parts[1::2] = [re.sub(r'^"[\[ ]*((?:[A-Z]\.)?[CG]\d+)[\] ]*"$', r'"\1"', part) for part in parts[1::2]]  # "[G1]"
    try:
        return json.loads("".join(parts), strict=False)  # with raw newlines in strings
    except (ValueError, RecursionError):
        return {}


def leaks(principle: str, problems: list[Problem]) -> bool:
    """True if a principle gives away one of these problems: twelve words of it in a row, or an answer that is a number
    of three digits or more or another text of six characters or more."""
    words = lambda text: re.findall(r"\w+", text.lower())
    said, bare = f" {' '.join(words(principle))} ", "".join(principle.split())

    def quoted(question):  # twelve words in a row; of a shorter question all of it, if it has six or more
        n = min(12, len(question))
        return n > 5 and any(f" {' '.join(question[i: i + n])} " in said for i in range(len(question) - n + 1))

    number = lambda a: sum(map(str.isdigit, a)) >= 3 and re.search(rf"(?<![\d.]){re.escape(a)}(?!\d|\.\d)", principle)
    told = lambda a: number(a) if re.fullmatch(r"-?\d[\d,.]*", a) else len(a) >= 6 and a in bare
    return any(quoted(words(x.question)) or any(told("".join(a.split())) for a in x.answers) for x in problems)


def copied(principle: str, texts: dict[str, str]) -> bool:
    """True if a principle is a sentence or an example of the requests among these texts, but for one word in four."""
    words = lambda text: Counter(re.findall(r"\w+", text.lower()))
    said, asked = words(principle), " ".join(t for name, t in texts.items() if name not in ("system", "principles"))
    return any(4 * (said & sentence).total() >= 3 * max(said.total(), sentence.total()) > 9
               for sentence in map(words, re.split(r'"|[.?!:]\s| - ', " ".join(asked.split()))))


def valid(op: Any, kinds: tuple[str, ...], ids, problems: list[Problem], r: Tournament) -> bool:
    """Whether an operation may be applied to principles with these ids; if not, it is dropped alone, and counted."""
    c, fields = r.config, op if isinstance(op, dict) else {}
    kind = fields.get("operation")
    named = SOURCES[kind](fields) if kind in kinds else []
    text = "-" if kind == "remove" else fields.get("principle")  # what is removed needs no text
    faults = {  # the first one counts; no tokenizer takes half a surrogate pair, so that it is no text
        "unknown operation": lambda: kind not in kinds,
        "unknown id": lambda: not isinstance(named, list) or not all(isinstance(i, str) and i in ids for i in named),
        "merge of fewer than two": lambda: kind == "merge" and len(set(named)) < 2,
        "no text": lambda: not isinstance(text, str) or not text.strip() or not " ".join(text.split()).isprintable(),
        "control token": lambda: (r.control or CONTROL).search(text),
        "too long": lambda: len(text.split()) > c.max_principle_words or len(text) > 12 * c.max_principle_words,
        "copies the request": lambda: copied(text, r.texts),
        "leaks a problem": lambda: not c.allow_leaks and leaks(text, problems)}
    why = next((name for name, found in faults.items() if found()), None)
    r.dropped.update([why] if why else [])
    return not why


def apply_operations(principles: dict[str, str], ops: list[dict], kinds, problems, r: Tournament) -> list[str]:
    """git.apply(s, diff): the principles after the valid operations, in order, as a list (renumbered G0, G1, …)."""
    result = dict(principles)
    for n, op in enumerate(ops):
        if valid(op, kinds, result, problems, r):  # ids as earlier operations left them
            text = "" if op["operation"] == "remove" else " ".join(op["principle"].split())
            named = SOURCES[op["operation"]](op) or [n]  # an addition stands under n, an id that no operation can name
            place, *gone = dict.fromkeys(named)
            result = {i: t for i, t in (result | {place: text}).items() if t and i not in gone}
    unique = {}
    for text in result.values():  # of those that differ in case alone the first: an addition changes nothing then
        unique.setdefault(text.casefold(), text)
    kept = list(unique.values())[: r.config.max_principles]
    r.dropped.update({"duplicate": len(result) - len(unique), "too many principles": len(unique) - len(kept)})
    return kept

# ======================================================================================================================
# 5. RL update: maximises J - beta KL(pi_theta, pi_ref), J = 1/(N M B) sum_ibj sum_t f(log pi_theta(y_t | …), A_ibj),
#    where f is `surrogate`. One step a batch, on samples of the same weights: with top_p 1 importance ratios are 1 (to
#    rounding).
# ======================================================================================================================


class Objective(NamedTuple):
    """The surrogate that the update maximises. Hashable: one compilation for each."""
    loss: str = "importance_sampling"
    temperature: float = 1.0  # of the sampler: log-probabilities are those of the tempered policy
    clip_low: float = 0.2     # ratio clipped to [1 - clip_low, 1 + clip_high] (ppo, cispo)
    clip_high: float = 0.2
    kl_coef: float = 0.0      # beta


@dataclass
class Sample:
    """A rollout as the trainer sees it."""
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float | None]  # of the behaviour policy; None: a token of a tool, which has no part in the loss
    advantage: float


@dataclass
class Trainer:
    """What an update changes (policy.theta and Adam's state), and how."""
    policy: Policy
    optimizer: optax.GradientTransformation
    opt_state: Any
    objective: Objective = Objective()
    max_tokens: int = 16384  # of a microbatch


def rl_update(trainer: Trainer, samples: list[Sample], num_rollouts: int) -> dict:
    """One policy-gradient step on samples of the current weights (Alg. 1, line 9); changes trainer, returns metrics.

    num_rollouts is N M B, counting rollouts whose zero advantage kept them out of `samples`. No sample, no step.
    """
    policy, objective = trainer.policy, trainer.objective
    samples = [s for s in samples if s.tokens]
    if not samples:
        return {"skipped": "no rollout with a learning signal"}
    gradient, sums = zeros_like(policy.theta), []
    batches = list(microbatches(samples, trainer.max_tokens, policy.mesh.shape["data"]))
    remat = cheapest_remat(policy.cfg, policy.mesh, max(b["token"].size + b["prompt"].size for b in batches))
    spread = jax.sharding.NamedSharding(policy.mesh, P("data"))
    for batch in progress(batches, desc="updating"):
        batch = {name: jax.make_array_from_callback(x.shape, spread, x.__getitem__) for name, x in batch.items()}
        gradient, metrics = add_gradient(gradient, policy.theta, policy.theta_ref, policy.graphdef, policy.frozen,
                                         batch, num_rollouts, objective, remat)
        sums.append(metrics)
    policy.theta, trainer.opt_state, norm = adam_step(trainer.optimizer, policy.theta, trainer.opt_state, gradient)
    total = {n: float(sum(s[n] for s, _ in sums)) for n in sums[0][0]}
    loss, tokens = total.pop("loss"), int(total.pop("tokens"))
    means = {n: x / tokens for n, x in total.items()} | ({} if objective.kl_coef else {"kl": None})
    return {"loss": loss, "grad_norm": float(norm), **means, "ratio_max": float(max(m for _, m in sums)),
            "trained_rollouts": len(samples), "trained_tokens": tokens}


def surrogate(logp, behaviour_logp, advantage, objective: Objective):
    """Per-token term of J and the importance ratio pi_theta / pi_behaviour; all arrays broadcast to [B, T]."""
    ratio = jnp.exp(logp - behaviour_logp)
    clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
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
    """Two estimates a token of KL(pi_theta || pi_ref): its value (k3), and a term with its gradient (k2), [B, T].

    On samples of pi_theta, k3's gradient is that of KL(pi_ref || pi_theta), the other way round; k2's is the right one,
    with the importance ratio also off policy (Schulman's names; tested against the exact gradient).
    """
    log_ratio = logp - ref_logp
    return jnp.exp(-log_ratio) + log_ratio - 1, jax.lax.stop_gradient(ratio) * 0.5 * log_ratio**2


zeros_like = jax.jit(lambda tree: laid_out(jax.tree.map(jnp.zeros_like, tree)))  # one compilation for all shapes
adam_init = jax.jit(lambda optimizer, theta: laid_out(optimizer.init(theta)), static_argnums=0)  # moments: as weights


@partial(jax.jit, static_argnames=("graphdef", "objective", "remat"), donate_argnames="gradient")
def add_gradient(gradient, theta, theta_ref, graphdef, frozen, batch, num_rollouts, objective, remat):
    """Adds to `gradient` that of a microbatch's share of -(J - beta KL), a sum over all N M B rollouts. Also for the
    log: sums over its tokens, of which `rl_update` makes means, and the largest ratio."""
    mask = batch["mask"]  # [B, T]: 1 where the target is a response token
    total = lambda x: jnp.sum(jnp.where(mask, x, 0.0))

    def logprobs(theta):
        model = nnx.merge(graphdef, theta, frozen)
        _, keys_values = model(batch["prompt"], batch["prompt_position"], remat=remat)  # once for all its responses
        hidden, _ = model(batch["token"], batch["position"], (keys_values, batch["prompt_position"], batch["owner"]),
                          remat=remat)
        return token_logprobs(model, hidden, batch["target"], objective.temperature)

    def loss(theta):  # the one reported has the KL's value, the one differentiated a term with its gradient
        logp, entropy = logprobs(theta)
        term, ratio = surrogate(logp, batch["behaviour"], batch["advantage"][:, None], objective)
        kl = penalty = jnp.zeros_like(logp)
        if objective.kl_coef:
            kl, penalty = kl_estimators(logp, jax.lax.stop_gradient(logprobs(theta_ref)[0]), ratio)
        reported, trained = term - objective.kl_coef * kl, term - objective.kl_coef * penalty
        sums = {"loss": -total(reported) / num_rollouts, "tokens": total(1.0), "kl": total(kl),
                "entropy": total(entropy), "ratio_mean": total(ratio), "sampler_gap": total(batch["behaviour"] - logp)}
        return -total(trained) / num_rollouts, (sums, jnp.max(jnp.where(mask, ratio, 0.0)))

    new, metrics = jax.grad(loss, has_aux=True)(theta)
    return laid_out(jax.tree.map(jnp.add, gradient, new)), metrics


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("theta", "opt_state"))
def adam_step(optimizer, theta, opt_state, gradient):
    """theta <- theta + alpha * Adam(grad J)."""
    updates, opt_state = optimizer.update(gradient, opt_state, theta)
    return laid_out(optax.apply_updates(theta, updates)), laid_out(opt_state), optax.tree.norm(gradient)


def token_logprobs(model: Transformer, hidden_BTD, target_BT, temperature: float):
    """Log-probability of each target and entropy of its distribution, both [B, T] float32.

    Works through blocks of tokens, so [B, T, V] never exists. For the backward pass a block is computed again if the
    table is trained, else its slope [D] for each token is kept.
    """
    B, T, D = hidden_BTD.shape
    size = min(B * T, max(16, 1 << (2**25 // model.cfg.vocab_size).bit_length() - 1))  # <= 128 MiB of float32 logits
    graphdef, weights = nnx.split(model)

    def block(weights, hidden, target):
        logits, pull = jax.vjp(lambda h: nnx.merge(graphdef, weights).logits(h) / temperature, hidden)
        logp = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
        chosen = jnp.take_along_axis(logp, target[:, None], -1)[:, 0]
        if not model.cfg.lora_rank:
            return chosen, entropy
        # The table is frozen: d log pi / d hidden is all that the backward pass needs, and it is found here.
        [slope] = pull(jax.nn.one_hot(target, logits.shape[-1]) - jnp.exp(logp))
        chosen, slope = jax.lax.stop_gradient((chosen, slope.astype(jnp.float32)))
        moved = hidden.astype(jnp.float32) - jax.lax.stop_gradient(hidden).astype(jnp.float32)  # value 0, gradient 1
        return chosen + jnp.sum(slope * moved, -1), entropy

    block = block if model.cfg.lora_rank else jax.checkpoint(block)
    pad = -B * T % size
    hidden = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, size, D)
    target = jnp.pad(target_BT.reshape(B * T), (0, pad)).reshape(-1, size)
    # The devices share the tokens of each block; sharing out the blocks would make each device compute all of them.
    hidden, target = constrain(hidden, None, "data", None), constrain(target, None, "data")
    out = jax.lax.map(lambda x: block(weights, *x), (hidden, target))
    return tuple(x.reshape(-1)[: B * T].reshape(B, T) for x in out)


def microbatches(samples: list[Sample], max_tokens: int, row_multiple: int):
    """Yields padded batches (`pack`) of at most about max_tokens tokens, in few shapes. Exact for any order and split.

    A row is a response, preceded by the last prompt token; the rest of a prompt is in the batch once for all its rows.
    A batch holds responses of one length, in powers of two, in the order of the samples, which is prompt by prompt.
    """
    by_length = {}
    for s in samples:
        by_length.setdefault(bucket(len(s.tokens), 32), []).append(s)
    S = bucket(max(len(s.prompt) for s in samples) - 1, 64)
    for T, left in sorted(by_length.items(), reverse=True):
        while left:
            for share in (4, 1):  # room for one prompt in four rows; if the rows have more prompts, for one in each
                most = max(1, int(max_tokens / (T + S / share)))
                B = row_count(max(len(left), 1024 // T), most, row_multiple)
                num_prompts, rows = -(-B // share // row_multiple), B // row_multiple  # of a shard
                parts = [left[i: i + rows] for i in range(0, B, rows)]
                if max(len({tuple(s.prompt) for s in part}) for part in parts) <= num_prompts:
                    break
            packed = [pack(part, (rows, T), (num_prompts, S)) for part in parts]
            yield {name: np.concatenate([p[name] for p in packed]) for name in packed[0]}
            left = left[B:]


def pack(samples: list[Sample], shape: tuple[int, int], prompt_shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """A shard of a batch: rows [B, T], and the prompts, but for their last tokens, that own them (owner: [1, B])."""
    prompts = list(dict.fromkeys(tuple(s.prompt) for s in samples))
    prompt, prompt_position = padded([(p[:-1], 0) for p in prompts], *prompt_shape)
    token, position = padded([(s.prompt[-1:] + s.tokens[:-1], len(s.prompt) - 1) for s in samples], *shape)
    target, _ = padded([(s.tokens, 0) for s in samples], *shape)
    mask, behaviour = np.zeros(shape, bool), np.zeros(shape, np.float32)
    owner, advantage = np.zeros((1, shape[0]), np.int32), np.zeros(shape[0], np.float32)
    for i, s in enumerate(samples):
        owner[0, i], advantage[i] = prompts.index(tuple(s.prompt)), s.advantage
        mask[i, : len(s.tokens)] = [p is not None for p in s.logprobs]
        behaviour[i, : len(s.tokens)] = [p or 0.0 for p in s.logprobs]
    return dict(prompt=prompt, prompt_position=prompt_position, owner=owner, token=token, position=position,
                target=target, mask=mask, behaviour=behaviour, advantage=advantage)


def cheapest_remat(cfg: ModelConfig, mesh, tokens: int) -> str:
    """"linear" if the outputs of all linear maps for `tokens` tokens fit into a fifth of the memory, else "layer"."""
    width = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim + 2 * (cfg.model_dim + cfg.mlp_dim)
    used = tokens / mesh.shape["data"] * cfg.num_layers * width * jnp.dtype(cfg.dtype).itemsize
    return "linear" if used < device_memory()["bytes_limit"] / 5 else "layer"

# ======================================================================================================================
# 6. Sampling: a queue of rollouts feeds the rows of a batched key/value cache. In a row, positions before the next
#    token's are valid; what stands behind them is left from earlier, and masked.
#
#   prompt tokens   p0 p1 … p(n-2) | p(n-1)       prefill writes p0 … p(n-2) into the cache, once for all samples of a
#   cache position  0  1      n-2  |  n-1  n  …   prompt; every decode step then feeds one token, starting with p(n-1),
#                                                 samples its successor and writes its key and value.
# ======================================================================================================================

DECODE_CHUNK = 64  # decode steps between two looks of the host: ended rollouts leave, waiting ones take their rows
PIECE = 1024       # tokens that enter the cache at once: short prompts together, long replies in pieces


class Sampling(NamedTuple):
    """How to sample."""
    temperature: float  # 0 = greedy
    top_p: float
    max_new_tokens: int
    seed: tuple[int, int] = (0, 0)
    label: str = "sampling"  # of the progress bar


@dataclass
class Response:
    """A sampled response, with its end-of-sequence token, if it came: that is trained on too. With tools it has several
    turns of the model, and what the tools replied in between."""
    tokens: list[int]
    logprobs: list[float | None]  # behaviour log-probability of each token; None: it is of a tool, nothing sampled it
    stop: str = "length"  # "length": cut by max_new_tokens or the context; "eos"; "calls": too many calls of tools
    calls: int = 0        # of tools
    turn: int = 0         # where the model's latest turn begins in `tokens`


@dataclass
class Row:
    """A rollout on its way through the cache."""
    group: int            # the index of its prompt
    prompt: list[int]
    response: Response
    key: np.ndarray       # its own random key, uint32[2]
    room: int             # most tokens of the response
    unfed: list[int] = field(default_factory=list)  # said, but not in the cache yet; without the last token

    @property
    def position(self) -> int:  # of its last token, the next to feed
        return len(self.prompt) + len(self.response.tokens) - 1


@dataclass
class Decoder:
    """The cache, the rollouts that own its rows (None: free), and the weights in the form that decoding takes."""
    policy: Policy
    weights: tuple        # graphdef, theta, frozen; and the model's layers, one by one
    rows: list[Row | None]
    length: int           # tokens that a row may hold now
    cache: list           # keys and values [B, K, S, H] for each layer
    parked: list[Row] = field(default_factory=list)  # have outgrown the cache while shorter ones wait or decode
    prefix: tuple = ((), None)  # the prompts that were prefilled last, and their keys and values


def generate(policy: Policy, theta, prompts: list[list[int]], counts: list[int], sampling: Sampling,
             environment=None) -> list[list[Response]]:
    """counts[g] responses to each tokenised prompt, from pi_theta.

    environment(g, response), if given, looks at a response whenever more of it was sampled. None: it goes on. Or it
    cuts the response and returns the tokens of a tool's reply, after which the model goes on; [] ends the response.

    A response depends on the weights, the seed, its prompt, g and its number, and not, but for rounding, on rows or
    company. A prompt that leaves no room in the context gets empty responses with stop "length".
    """
    room = [max(0, min(sampling.max_new_tokens, policy.context - len(p))) for p in prompts]
    responses = [[Response([], []) for _ in range(n)] for n in counts]
    key = lambda g, j: np.random.SeedSequence([*sampling.seed, g, j]).generate_state(2)
    queue = deque(Row(g, p, r, key(g, j), room[g])
                  for g, p in enumerate(prompts) for j, r in enumerate(responses[g]) if room[g])
    if not queue:
        return responses
    theta = jax.tree.map_with_path(  # cast once, not in every step; norms stay in float32, as in training
        lambda path, w: w if path_name(path).endswith("scale") else w.astype(policy.cfg.dtype), theta)
    weights = policy.graphdef, theta, policy.frozen
    length = cache_length(policy, max(len(row.prompt) for row in queue) + DECODE_CHUNK)
    rows = rows_for(policy, len(queue), length)
    layers, cache = unstack(*weights), new_cache(policy.cfg, rows, length)
    decoder = Decoder(policy, (*weights, layers), [None] * rows, length, cache)
    stop_ids = np.array(policy.eos_ids + (policy.pause_ids if environment else ()))
    with progress(total=len(queue), desc=sampling.label) as bar:
        while queue or decoder.parked or any(decoder.rows):
            stop_if_told()
            resize(decoder, queue)
            admit(decoder, queue)
            feed(decoder)
            bar.update(decode(decoder, sampling, stop_ids, environment))
    return responses


# ---- The queue. Its policy, two functions of lengths alone, is what tools/plan.py simulates.

def cache_length(policy: Policy, tokens: int) -> int:
    """The length of a cache that holds so many tokens in a row: powers of two, beyond 4,096 with quarters between them,
    and none longer than the context needs. Few distinct lengths, so few compilations."""
    n = bucket(tokens)
    n = next(n * k // 8 for k in (5, 6, 7, 8) if tokens <= n * k // 8) if tokens > 4096 else n
    return min(n, -(-policy.context // 128) * 128)


def rows_for(policy: Policy, needed: int, length: int) -> int:
    """How many of the needed rows decode at once in a cache of this length: as memory allows, at least one a shard."""
    most, shards = min(policy.max_rows, policy.cache_tokens // length), row_shards(policy.cfg)
    return row_count(needed, max(1, most - most % shards), shards, policy.cfg.step)


def next_shape(live: list[int], parked: list[int], waiting: int, rows: int, length: int, rows_for, cache_length, step):
    """Which rollouts leave the cache, and its rows and length for the next steps: ([indices in live], rows, length).

    live, parked: the tokens that a rollout in the cache, or put aside, will hold then. The cache is as long as its
    longest rollout, so memory for many short ones is memory for few long ones. When it is short, the short come first:
    what outgrows the cache is put aside until no one waits, then a longer cache with fewer rows goes on with those
    left. Who was put aside is prefilled again, which is cheap beside decoding in few rows.
    """
    full = [i for i, n in enumerate(live) if n > length]
    longer = cache_length(max([*live, *parked], default=length))
    if waiting:
        room = not full or rows_for(rows, longer) >= rows
        return [] if room else full, rows, longer if full and room else length
    if full or parked:
        most = rows_for(2**30, longer)
        leave = full[max(0, len(full) - max(0, len(live) - most)):]
        if len(live) - len(leave) <= most:
            return leave, min(rows, rows_for(len(live) + len(parked), longer)), longer
        return leave, rows, length
    fewer = rows_for(len(live), length)
    return [], fewer if fewer <= rows // step else rows, length


def resize(decoder: Decoder, queue) -> None:
    """Gives the cache its next shape; when it gets longer, those put aside come back into the queue."""
    policy, rows, shards = decoder.policy, decoder.rows, row_shards(decoder.policy.cfg)
    holds = lambda row: min(row.position + DECODE_CHUNK, len(row.prompt) + row.room)
    live = [i for i, row in enumerate(rows) if row]
    leave, B, length = next_shape([holds(rows[i]) for i in live], [holds(row) for row in decoder.parked], len(queue),
                                  len(rows), decoder.length, partial(rows_for, policy), partial(cache_length, policy),
                                  policy.cfg.step)
    for j in leave:
        decoder.parked.append(rows[live[j]])
        rows[live[j]] = None
    if length > decoder.length:
        queue.extend(decoder.parked)
        decoder.parked = []
    kept = None
    if B < len(rows):  # each shard keeps its own, the live ones first
        each = np.arange(len(rows)).reshape(shards, -1)
        order = np.array([sorted(own, key=lambda i: rows[i] is None) for own in each])
        queue.extend(rows[i] for i in order[:, B // shards:].flat if rows[i])
        decoder.rows = [rows[i] for i in order[:, : B // shards].flat]
        kept = (order[:, : B // shards] % each.shape[1]).astype(np.int32)
    if B < len(rows) or length > decoder.length:
        for i, layer in enumerate(decoder.cache):  # one after the other, so that the cache never exists twice
            decoder.cache[i] = resize_layer(layer, kept, policy.cfg, length)
    decoder.length = length


def admit(decoder: Decoder, queue) -> None:
    """Waiting rollouts take free rows. A prompt is prefilled once for all of its rollouts, as they are neighbours."""
    rows, free = decoder.rows, deque(i for i, row in enumerate(decoder.rows) if row is None)
    while free and queue:
        groups, source_B = decoder.prefix[0], np.full(len(rows), -1, np.int32)
        while free and queue and (queue[0].response.tokens or queue[0].group in groups):
            i, row = free.popleft(), queue.popleft()
            rows[i] = row
            if row.response.tokens:  # put aside earlier: `feed` gives back what it had
                row.unfed = (row.prompt + row.response.tokens)[:-1]
            else:
                source_B[i] = groups.index(row.group)
        if max(source_B) >= 0:
            decoder.cache = write_prefix(decoder.cache, decoder.prefix[1], source_B, decoder.policy.cfg)
        if free and queue:  # the next prompts, at most PIECE tokens of them or one
            prompts = {row.group: (row.prompt[:-1], 0) for row in queue if not row.response.tokens}
            length = cache_length(decoder.policy, len(queue[0].prompt) - 1)
            fit = list(itertools.takewhile(lambda part: len(part[0]) <= length, prompts.values()))
            n, decoder.prefix = row_count(len(fit), max(1, PIECE // length), 1), ((), None)  # never two in memory
            keys_values = prefill(*decoder.weights[:3], *padded(fit[:n], n, length))
            decoder.prefix = list(prompts)[: len(fit[:n])], keys_values


def feed(decoder: Decoder) -> None:
    """What was said already (the reply of a tool, all of a rollout that was put aside) enters the cache, many rows at
    once and in pieces: scores are [B, N, T, S]."""
    rows, shards = decoder.rows, row_shards(decoder.policy.cfg)
    width = len(rows) // shards
    while waiting := [i for i, row in enumerate(rows) if row and row.unfed]:
        longest = max(len(rows[i].unfed) for i in waiting)
        T = 64 if longest <= 64 else 256 if longest <= 256 else PIECE
        most = 4 * PIECE // T // shards * 4096 // max(4096, decoder.length)  # scores take T x length in each row
        each = row_count(len(waiting), max(1, min(width, most)), 1)
        parts, index = [([], 0)] * (shards * each), np.full((shards, each), width, np.int32)  # padding: beyond all rows
        for d in range(shards):
            for j, i in enumerate([i for i in waiting if i // width == d][:each]):
                row, index[d, j] = rows[i], i % width
                parts[d * each + j] = row.unfed[:T], row.position - len(row.unfed)
                row.unfed = row.unfed[T:]
        decoder.cache = extend(*decoder.weights, decoder.cache, index, *padded(parts, shards * each, T))
        jax.block_until_ready(decoder.cache)  # simulated devices may wait for ever on two programs in flight


def decode(decoder: Decoder, sampling: Sampling, stop_ids, environment) -> int:
    """Up to DECODE_CHUNK steps; what was sampled joins the responses. Returns how many ended and left their rows."""
    states = [((row.response.tokens or row.prompt)[-1], row.position, row.room - len(row.response.tokens), row.key)
              if row else (0, 0, 0, np.zeros(2, np.uint32)) for row in decoder.rows]
    decoder.cache, *sampled = decode_chunk(*decoder.weights, decoder.cache, *map(np.array, zip(*states)), stop_ids,
                                           sampling.temperature, sampling.top_p)
    tokens, logprobs = map(np.asarray, sampled)
    live = [i for i, row in enumerate(decoder.rows) if row]
    for i in live:
        row, n = decoder.rows[i], int((tokens[:, i] >= 0).sum())
        r = row.response
        r.tokens += tokens[:n, i].tolist()
        r.logprobs += logprobs[:n, i].tolist()
        reply = environment(row.group, r) if environment else None
        if reply and len(r.tokens) + len(reply) < row.room:
            row.unfed = r.tokens[-1:] + reply[:-1]  # the token before the reply has not been fed yet
            r.tokens, r.logprobs = r.tokens + reply, r.logprobs + [None] * len(reply)
            r.turn = len(r.tokens)
        elif reply is not None or len(r.tokens) == row.room or r.tokens[-1] in stop_ids:
            r.stop = "eos" if reply is None and r.tokens[-1] in decoder.policy.eos_ids else r.stop
            decoder.rows[i] = None  # also if the reply does not fit
    return sum(decoder.rows[i] is None for i in live)


# ---- On the devices

def bucket(n: int, least: int = 128) -> int:
    """The power of two from `least` on that holds n: few distinct shapes, so few compilations."""
    return max(least, 1 << (int(n) - 1).bit_length())


def row_count(needed: int, most: int, multiple: int, step: int = 4) -> int:
    """1, 8, 8 step, … rows for `needed` of them, at most `most`, then rounded up to be divisible among the devices."""
    rows = min(most, 1 if needed == 1 else 8 * step ** max(0, math.ceil(math.log(max(needed, 1) / 8, step))))
    return -(-rows // multiple) * multiple


def padded(parts: list[tuple[list[int], int]], rows: int, length: int):
    """(tokens, position of the first) of each part as tokens and positions [rows, length], with padding at the end."""
    ids, at = np.zeros((rows, length), np.int32), np.full((rows, length), PAD_POSITION, np.int32)
    for row, (tokens, start) in enumerate(parts):
        ids[row, :len(tokens)], at[row, :len(tokens)] = tokens, start + np.arange(len(tokens))
    return ids, at


@partial(jax.jit, static_argnums=(0, 1, 2))
def new_cache(cfg: ModelConfig, rows: int, length: int):
    """Empty cache of `rows` sequences of up to `length` tokens: keys and values [B, K, S, H] for each layer."""
    empty = lambda: constrain(jnp.zeros((rows, cfg.num_kv_heads, length, cfg.head_dim), cfg.dtype), *cache_spec(cfg))
    return [(empty(), empty()) for _ in range(cfg.num_layers)]


@partial(jax.jit, static_argnames="graphdef")
def unstack(graphdef, theta, frozen):
    """The layers one by one, cut out of the stack once and not in every decode step."""
    model = nnx.merge(graphdef, theta, frozen)
    layer, weights = nnx.split(model.layers)
    spec = lambda path: weight_spec(f"layers/{path_name(path)}", model.cfg)[1:]
    cut = lambda i: jax.tree.map_with_path(lambda path, w: constrain(w[i], *spec(path)), weights)
    return [nnx.merge(layer, cut(i)) for i in range(model.cfg.num_layers)]


@partial(jax.jit, static_argnames="graphdef")
def prefill(graphdef, theta, frozen, token_PT, position_PT):
    """Keys and values of prompts, each [L, P, K, T, H]. No logits are computed."""
    prefix = nnx.merge(graphdef, theta, frozen)(token_PT, position_PT)[1]
    return jax.tree.map(lambda x: constrain(x, None, None, "model", None, None), prefix)  # on every shard of the rows


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def write_prefix(cache, prefix, source_B, cfg):
    """The cache with prefilled prompts at the start of some rows; source_B: which prompt, -1: none."""
    def write(old_BKSH, new_PKTH):
        start = jnp.where((source_B >= 0)[:, None, None, None], new_PKTH[source_B], old_BKSH[:, :, :new_PKTH.shape[2]])
        return constrain(jax.lax.dynamic_update_slice(old_BKSH, start, (0, 0, 0, 0)), *cache_spec(cfg))
    return [tuple(write(old, new[i]) for old, new in zip(layer, prefix)) for i, layer in enumerate(cache)]


@partial(jax.jit, static_argnames=("cfg", "length"))  # not donated: no buffer has the new shape
def resize_layer(layer, row_ZR, cfg, length):
    """A layer's cache with only these rows (None: all), and room for `length` tokens in each."""
    def resized(x):
        x = x if row_ZR is None else take_rows(x, row_ZR)
        return constrain(jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))), *cache_spec(cfg))
    return jax.tree.map(resized, layer)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def extend(graphdef, theta, frozen, layers, cache, row_ZR, token_BT, position_BT):
    """The cache with more tokens in some of its rows, which see those before them. A row beyond the last is padding."""
    return nnx.merge(graphdef, theta, frozen)(token_BT, position_BT, None, cache, layers, row_ZR)[1]


@partial(jax.jit, static_argnames=("graphdef", "top_p"), donate_argnames="cache",
         compiler_options={"xla_gpu_dot_merger_threshold_mb": 0})  # else XLA on GPUs keeps q, k, v merged: a third copy
def decode_chunk(graphdef, theta, frozen, layers, cache, token_B, position_B, remaining_B, key_B, eos_E, temperature,
                 top_p):
    """Up to DECODE_CHUNK steps for all rows; stops early when none has tokens left.

    token_B, position_B: the next token to feed and its position; remaining_B: how many the row may still sample.
    Returns the cache, the sampled tokens [chunk, B], -1 where a row was idle, and their log-probabilities.
    """
    model = nnx.merge(graphdef, theta, frozen)

    def step(carry):
        i, cache, token, position, remaining, tokens, logprobs = carry
        live = remaining > 0
        hidden, cache = model(token[:, None], jnp.where(live, position, PAD_POSITION)[:, None], None, cache, layers)
        # A rollout's own key, folded with the position: its tokens do not depend on its row or its neighbours.
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B, impl="threefry2x32"), position)
        token, logprob = sample_token(keys, model.logits(hidden[:, 0]), temperature, top_p)
        tokens, logprobs = tokens.at[i].set(jnp.where(live, token, -1)), logprobs.at[i].set(logprob)
        remaining = jnp.where(live & ~jnp.isin(token, eos_E), remaining - 1, 0)
        return i + 1, cache, token, position + live, remaining, tokens, logprobs

    B = len(token_B)
    start = (0, cache, token_B, position_B, remaining_B, jnp.full((DECODE_CHUNK, B), -1), jnp.zeros((DECODE_CHUNK, B)))
    going = lambda carry: (carry[0] < DECODE_CHUNK) & jnp.any(carry[4] > 0)
    _, cache, *_, tokens, logprobs = jax.lax.while_loop(going, step, start)
    if jax.process_count() > 1:  # each reads all of them
        tokens, logprobs = constrain(tokens), constrain(logprobs)
    return cache, tokens, logprobs


def sample_token(key_B, logits_BV, temperature, top_p: float):
    """One token for each row and its log-probability, both [B], from the tempered (and cut) distribution; the most
    probable token if the temperature is 0.

    First one of n blocks of neighbouring tokens is drawn by its probability, then one of its tokens: the same
    distribution with n + V / n random numbers (Gumbel-max) instead of V. Devices that share V exchange little else.
    """
    draws = temperature > 0
    logits_BV = logits_BV / jnp.where(draws, temperature, 1.0)  # the policy IS the tempered distribution
    if top_p < 1:
        logits_BV = nucleus(logits_BV, jnp.where(draws, top_p, 1.0))
    B, V = logits_BV.shape
    n = 64 if V % 64 == 0 else V // math.gcd(V, 256)
    blocks = constrain(logits_BV.reshape(B, n, V // n), P.UNCONSTRAINED, "model", None)
    mass, keys = jax.nn.logsumexp(blocks, -1), jax.vmap(jax.random.split)(key_B)
    pick = lambda i, scores: jnp.argmax(scores + jnp.where(draws, jax.vmap(
        lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys[:, i]), 0.0), -1)
    block_B = pick(0, jnp.where(draws, mass, blocks.max(-1)))
    chosen = jnp.where((jnp.arange(n) == block_B[:, None])[:, :, None], blocks, -jnp.inf).max(1)  # [B, V / n]
    within_B = pick(1, chosen)
    logit_B = jnp.take_along_axis(chosen, within_B[:, None], -1)[:, 0]
    return (block_B * (V // n) + within_B).astype(jnp.int32), logit_B - jax.nn.logsumexp(mass, -1)


def nucleus(logits_BV, top_p):
    """logits with everything outside the smallest set of tokens that holds probability top_p at -inf.

    The threshold is found by bisection on the bits of the probabilities (non-negative floats order as integers):
    exact after 31 halvings and cheaper than sorting V values in each step. Ties at the threshold stay in.
    """
    probs = jax.nn.softmax(logits_BV)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def set_bit(i, threshold_B):  # from the highest bit down: the largest threshold above which top_p remains
        higher = threshold_B | (1 << (30 - i))
        return jnp.where(jnp.sum(probs, -1, where=bits >= higher[:, None]) >= top_p, higher, threshold_B)

    threshold = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(len(probs), jnp.int32))
    return jnp.where(bits >= threshold[:, None], logits_BV, -jnp.inf)

# ======================================================================================================================
# 7. Model: one decoder for Llama 2/3.x, Gemma 2, Gemma 3 (text), Qwen 2.5 and Qwen 3, its weights and their layout.
#    The truth for every number here is transformers' modeling_*.py (tested to 1e-4).
# ======================================================================================================================

BLOCK = 512           # queries of a longer sequence are attended in blocks of so many
PAD_POSITION = 2**30  # a padding token's position: later than every query, so no real token ever attends to it
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen2", "qwen3")  # values of model_type in config.json


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, as read from config.json (`read_model_config`), and of its LoRA adapter. Hashable."""
    num_layers: int                  # L
    model_dim: int                   # D
    mlp_dim: int                     # F
    num_heads: int                   # N
    num_kv_heads: int                # K
    head_dim: int                    # H; never inferred from D/N when config.json gives it
    vocab_size: int                  # V
    max_context: int                 # positions the model was made for
    norm_eps: float
    rope_frequencies: tuple[tuple[float, ...], ...]  # one row of H/2 inverse frequencies for each kind of layer
    layer_rope: tuple[int, ...]      # [L] row of rope_frequencies each layer uses
    layer_window: tuple[int, ...]    # [L] sliding window of each layer; PAD_POSITION = global attention
    tied: bool = True                # the output projection is the embedding
    biased: frozenset = frozenset()  # projections with a bias
    qk_norm: bool = False            # RMSNorm on each query and key head before RoPE
    norm_plus_one: bool = False      # norms multiply by (1 + w) in float32, then cast; else they cast, then multiply
    post_norms: bool = False         # also norms after attention and MLP
    embedding_scale: float = 1.0
    activation: str = "silu"         # of the gate, a name in jax.nn
    attention_scale: float = 1.0
    attention_cap: float = 0.0       # tanh soft cap on attention scores; 0 = none
    logit_cap: float = 0.0           # tanh soft cap on the final logits; 0 = none
    dtype: str = "float32"           # of activations and frozen weights; norms and trained weights stay float32
    lora_rank: int = 0               # R; 0 = no adapter, every weight is trained
    lora_alpha: float = 32.0
    split_length: bool = False       # too large for a copy on each device along data: the cache is split by length
    flash: str = ""                  # the platform whose fused kernel attends long sequences (tools/flash.py); "": none

    @property
    def step(self) -> int:
        """Factor between one number of rows and the next. For a tiny model finer ones cost more time in compiling than
        they save in decoding."""
        return 4 if self.num_layers * self.model_dim * self.mlp_dim < 2**22 else 2


class Linear(nnx.Module):
    """y = x W + b + (alpha / R) (x A) B; A, B is the LoRA adapter, present when lora_rank > 0, and B starts at zero."""

    def __init__(self, cfg: ModelConfig, name: str, d_in: int, d_out: int, rngs: nnx.Rngs):
        self.cfg = cfg
        # Trained weights are kept in float32 (Adam's steps of 4e-5 vanish in bf16); frozen ones in cfg.dtype.
        dtype = jnp.dtype(cfg.dtype) if cfg.lora_rank else jnp.float32
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out), dtype) * d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if name in cfg.biased else None
        if cfg.lora_rank:
            a = jax.random.uniform(rngs.params(), (d_in, cfg.lora_rank), minval=-(d_in**-0.5), maxval=d_in**-0.5)
            self.lora_a = nnx.LoRAParam(a)
            self.lora_b = nnx.LoRAParam(jnp.zeros((cfg.lora_rank, d_out)))

    def __call__(self, x):  # [..., d_in] -> [..., d_out]
        y = matmul(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if R := self.cfg.lora_rank:
            y = y + matmul(matmul(x, self.lora_a[...]), self.lora_b[...]) * (self.cfg.lora_alpha / R)
        return checkpoint_name(y, "linear")


@jax.custom_vjp
def matmul(x, w):
    """x W in x's precision. JAX's own gradient of a float32 W would be rounded to x's precision before it is summed
    over microbatches and devices; `matmul_backward` sums it in W's own."""
    return x @ w.astype(x.dtype)


def matmul_backward(saved, g):
    """(g W^T, x^T g). The smaller of x and g is transposed for the latter: XLA on CPUs copies it first."""
    x, w = saved
    wide = w.shape[1] >= w.shape[0]
    dw = jnp.einsum("...a,...b->ab", *((x, g) if wide else (g, x)), preferred_element_type=w.dtype)
    return g @ w.astype(g.dtype).T, dw if wide else dw.T


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), matmul_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, cfg: ModelConfig, dim: int):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.zeros(dim) if cfg.norm_plus_one else jnp.ones(dim))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.cfg.norm_eps)
        if self.cfg.norm_plus_one:
            return (x32 * (1.0 + self.scale[...])).astype(x.dtype)
        return x32.astype(x.dtype) * self.scale[...].astype(x.dtype)


def rotate(x_BTNH, cos_BTH, sin_BTH):
    """RoPE: rotate the pairs (i, i + H/2) of each head by their position's angles (cos and sin: [B, T, H/2])."""
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q_BTNH, k_BKSH, v_BKSH, query_position_BT, key_position_BS, window, cfg: ModelConfig):
    """Causal grouped-query attention by position: a query at p sees the keys at positions in (p - window, p]."""
    B, T, N, H = q_BTNH.shape
    if T > BLOCK:  # long sequences: queries in blocks, recomputed in the backward pass, so that [T, S] is never stored
        q = jnp.pad(q_BTNH, ((0, 0), (0, -T % BLOCK), (0, 0), (0, 0))).reshape(B, -1, BLOCK, N, H).swapaxes(0, 1)
        p = jnp.pad(query_position_BT, ((0, 0), (0, -T % BLOCK))).reshape(B, -1, BLOCK).swapaxes(0, 1)
        block = jax.checkpoint(lambda x: attention(x[0], k_BKSH, v_BKSH, x[1], key_position_BS, window, cfg))
        return jax.lax.map(block, (q, p)).swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]
    q_BTKGH = q_BTNH.reshape(B, T, cfg.num_kv_heads, -1, H)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * cfg.attention_scale
    if cfg.attention_cap:
        scores = cfg.attention_cap * jnp.tanh(scores / cfg.attention_cap)
    distance_BTS = query_position_BT[:, :, None] - key_position_BS[:, None, :]
    visible = (distance_BTS >= 0) & (distance_BTS < window)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH)  # in this order: XLA on CPUs is slow in others
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class Block(nnx.Module):
    """One layer: attention and gated MLP, each on a normed residual stream."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, F, H, N, K = cfg.model_dim, cfg.mlp_dim, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
        self.cfg = cfg
        self.attention_norm, self.mlp_norm = RMSNorm(cfg, D), RMSNorm(cfg, D)
        for name, d_in, d_out in (("q_proj", D, N * H), ("k_proj", D, K * H), ("v_proj", D, K * H),
                                  ("o_proj", N * H, D), ("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
            setattr(self, name, Linear(cfg, name, d_in, d_out, rngs))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg, H), RMSNorm(cfg, H)
        if cfg.post_norms:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(cfg, D), RMSNorm(cfg, D)

    def __call__(self, x_BTD, cos, sin, position_BT, window, prefix=None, cache=None, row_ZR=None):
        """The residual stream after this layer, and keys and values: the cache with the new ones, or these alone."""
        cfg, (B, T, _) = self.cfg, x_BTD.shape
        h = self.attention_norm(x_BTD)
        q, k, v = (p(h).reshape(B, T, -1, cfg.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, cos, sin), rotate(k, cos, sin).swapaxes(1, 2), v.swapaxes(1, 2)
        key_position_BS, new = position_BT, (k, v)
        if cache is not None:  # the new ones are written into it, and all that it holds is seen
            Z = row_shards(cfg)
            into_ZR = jnp.broadcast_to(jnp.arange(B // Z), (Z, B // Z)) if row_ZR is None else row_ZR
            fix = lambda x: constrain(x, *cache_spec(cfg))  # all of them, or the compiler moves the cache in each step
            new = tuple(fix(write_tokens(fix(old), fix(x), position_BT, into_ZR)) for old, x in zip(cache, new))
            k, v = new if row_ZR is None else (take_rows(x, row_ZR) for x in new)
            key_position_BS = jnp.broadcast_to(jnp.arange(k.shape[2]), (B, k.shape[2]))
        elif prefix is not None:
            k, v = (jnp.concatenate(x, 2) for x in zip(prefix[:2], new))
            key_position_BS = jnp.concatenate([prefix[2], position_BT], 1)
        attend = from_tools("flash").attention if cfg.flash and cache is None and T > BLOCK else attention
        h = self.o_proj(attend(q, k, v, position_BT, key_position_BS, window, cfg).reshape(B, T, -1))
        x_BTD = x_BTD + (self.attention_post_norm(h) if cfg.post_norms else h)
        h = self.mlp_norm(x_BTD)
        h = self.down_proj(getattr(jax.nn, cfg.activation)(self.gate_proj(h)) * self.up_proj(h))
        return x_BTD + (self.mlp_post_norm(h) if cfg.post_norms else h), new


def take_rows(x, row_ZR):
    """[Z * R, …] of x [Z * rows, …]: Z shards give R of their own rows each, so that nothing is sent."""
    Z, R = row_ZR.shape
    taken = jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x.reshape(Z, -1, *x.shape[1:]), row_ZR)
    return taken.reshape(Z * R, *x.shape[1:])


def write_tokens(cache_BKSH, x_RKTH, position_RT, row_ZR):
    """The cache with tokens at their positions in these rows of each of Z shards. What lies beyond it is dropped."""
    def write(cache, x, position, row):
        return cache.at[row[:, None, None], jnp.arange(x.shape[1])[:, None], position[:, None]].set(x, mode="drop")

    apart = [x.reshape(len(row_ZR), -1, *x.shape[1:]) for x in (cache_BKSH, x_RKTH, position_RT)]
    return jax.vmap(write)(*apart, row_ZR).reshape(cache_BKSH.shape)


class Transformer(nnx.Module):
    """Decoder-only language model; its L layers are stacked, and scanned but for calls with a cache."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype) if cfg.lora_rank else jnp.float32
        table = lambda: nnx.Param(jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.model_dim), dtype) * 0.02)  # VD
        self.embed = table()
        if not cfg.tied:
            self.lm_head = table()
        self.final_norm = RMSNorm(cfg, cfg.model_dim)
        self.layers = nnx.split_rngs(splits=cfg.num_layers)(nnx.vmap(lambda r: Block(cfg, r)))(rngs)

    def __call__(self, token_BT, position_BT, prefix=None, cache=None, layers=None, row_ZR=None, remat=""):
        """Final hidden states [B, T, D], and these tokens' keys and values, stacked: [L, B, K, T, H].

        Padding is any token at PAD_POSITION. With cfg.flash it is behind a row's tokens, whose positions follow each
        other, and a prefix has all positions before them. Queries see the given tokens and either of
          prefix: (what an earlier call on prompts returned, their positions [prompts, S], the prompt of each row,
            counted within its shard [shards, rows]);
          cache: keys and values [B, K, S, H] for each layer. The new ones are written into it, and it is returned.
            row_ZR: only these of its rows, counted within their shard, are in the batch. The layers, as `unstack`
            returned them, are called in a loop: a scan would copy each one's weights and cache in every step.
        remat: the backward pass computes again nothing (""), all of a layer ("layer"), or all but its linear maps.
        """
        cfg = self.cfg
        spread = lambda x: constrain(x, None if cache and cfg.split_length else "data", None, None)
        x_BTD = spread(self.embed[...][token_BT].astype(cfg.dtype) * jnp.asarray(cfg.embedding_scale, cfg.dtype))
        angle = position_BT[None, :, :, None] * jnp.array(cfg.rope_frequencies, jnp.float32)[:, None, None, :]
        cos, sin = jnp.cos(angle).astype(cfg.dtype), jnp.sin(angle).astype(cfg.dtype)  # [kinds, B, T, H/2]
        if cache is not None:
            keys_values = []
            for block, rope, window, old in zip(layers, cfg.layer_rope, cfg.layer_window, cache):
                x_BTD, new = block(x_BTD, cos[rope], sin[rope], position_BT, window, cache=old, row_ZR=row_ZR)
                x_BTD = spread(x_BTD)
                keys_values.append(new)
            return self.final_norm(x_BTD), keys_values
        graphdef, weights = nnx.split(self.layers)
        keys_values, prefix_position, owner_ZR = prefix or (None, None, None)

        def layer(x_BTD, xs):
            weights, rope, window, old = xs
            before = old and tuple(take_rows(x, owner_ZR) for x in (*old, prefix_position))  # of prompts -> of rows
            x_BTD, new = nnx.merge(graphdef, weights)(x_BTD, cos[rope], sin[rope], position_BT, window, before)
            return spread(x_BTD), new

        if remat:
            keep = jax.checkpoint_policies.save_only_these_names("linear") if remat == "linear" else None
            layer = jax.checkpoint(layer, policy=keep)
        xs = (weights, jnp.array(cfg.layer_rope), jnp.array(cfg.layer_window), keys_values)
        x_BTD, keys_values = jax.lax.scan(layer, x_BTD, xs)
        return self.final_norm(x_BTD), keys_values

    def logits(self, x):
        """float32 logits [..., V] of final hidden states [..., D]. Callers take few rows at a time: V is large."""
        table_VD = self.embed if self.cfg.tied else self.lm_head
        out = jnp.einsum("...D,VD->...V", x, table_VD[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return self.cfg.logit_cap * jnp.tanh(out / self.cfg.logit_cap) if self.cfg.logit_cap else out


# ---- Layout on the `data x model` mesh

# Two layouts. At rest, and in updates, a kernel is split over all devices. While sampling it is split along model only,
# so that a decode step gathers no weights; a model too large for that (cfg.split_length) stays as it is at rest.
BOTH = ("model", "data")
SHARDING = (  # path of a weight, or of its gradient or moments -> its axes
    (r"embed|lm_head", P("model", None)),                                   # VD
    (r"layers/(q|k|v|gate|up)_proj/kernel", P(None, None, BOTH)),           # L, in, out
    (r"layers/(o|down)_proj/kernel", P(None, BOTH, None)),
    (r"layers/(q|k|v|gate|up)_proj/lora_b", P(None, None, "model")),
    (r"layers/(o|down)_proj/lora_a", P(None, "model", None)),
    (r"layers/(q|k|v|gate|up)_proj/bias", P(None, "model")),
    (r"", P()),                                                             # norms and the rest: on every device
)


def weight_spec(path: str, sampler: ModelConfig | None = None) -> P:
    """Axes of the weight at `path`, at rest or, of this model, while sampling."""
    spec = next(s for pattern, s in SHARDING if re.search(pattern, path))
    return P(*("model" if a == BOTH else a for a in spec)) if sampler and not sampler.split_length else spec


def cache_spec(cfg: ModelConfig) -> P:
    """Axes of keys and values [B, K, S, H]."""
    return P(None, "model", "data", None) if cfg.split_length else P("data", "model", None, None)


def make_mesh(model_parallel: int):
    """All devices as a data x model mesh, which becomes the current one."""
    n = len(jax.devices())
    if n % model_parallel:
        raise UserError(f"--model-parallel {model_parallel} does not divide the {n} devices")
    grid = mesh_utils.create_device_mesh((n // model_parallel, model_parallel), allow_split_physical_axes=True)
    mesh = jax.sharding.Mesh(grid, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    jax.set_mesh(mesh)  # Auto: the compiler lays out what is not constrained
    return mesh


def fit_spec(spec, shape, mesh) -> P:
    """The spec without the axes that do not divide their dimension (7 heads over 2 devices: not sharded)."""
    def fit(axes, n):
        if axes is P.UNCONSTRAINED:
            return axes
        axes = (axes,) if isinstance(axes, str) else axes or ()
        while n % math.prod(mesh.shape[a] for a in axes):
            axes = axes[:-1]
        return axes[0] if len(axes) == 1 else axes or None
    return P(*map(fit, spec, shape))


def row_shards(cfg: ModelConfig) -> int:
    """Z, the shards of a cache's rows on the current mesh: one for each device along data (`rows_for` sees to that)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or cfg.split_length else mesh.shape["data"]


def constrain(x, *spec):
    """with_sharding_constraint on the current mesh; no mesh, no constraint."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh))


def laid_out(tree):
    """Weights, or what has their paths (a gradient, Adam's moments), constrained to their layout."""
    return jax.tree.map_with_path(lambda path, x: constrain(x, *weight_spec(path_name(path))), tree)


def path_name(path) -> str:
    """'layers/q_proj/kernel' for the tree path of a weight."""
    return "/".join(str(k.key) for k in path if hasattr(k, "key"))


def weight_sharding(path: str, shape, mesh, sampler: ModelConfig | None = None) -> jax.sharding.NamedSharding:
    """Layout of the weight at `path`, at rest or in the sampler."""
    return jax.sharding.NamedSharding(mesh, fit_spec(weight_spec(path, sampler), shape, mesh))


# ---- Directories in Hugging Face layout

def find_model(name: str) -> str:
    """Local directory of a model, downloaded from the Hugging Face hub if it is not one already."""
    for path in (Path(name), Path(__file__).parent / name):
        if path.is_dir():
            return str(path)
    if name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such directory")
    with explained(f"cannot get {name} from the Hugging Face hub", "check name and network, run 'hf auth login' if the "
                   "model is gated, or give --model a local directory"):
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])


def rope_frequencies(rope: dict, head_dim: int) -> tuple[float, ...]:
    """Inverse RoPE frequencies [H/2] for one entry of config.json's rope_parameters."""
    frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / rope["factor"]
    elif kind == "llama3":  # long wavelengths are stretched by factor, short ones kept, those between interpolated
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)  # rotations in the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1 - keep) / rope["factor"])
    elif kind != "default":
        raise UserError(f"rope_type {kind!r} is not supported (default, linear and llama3 are); use another --model")
    return tuple(float(f) for f in frequency)


def read_model_config(directory: str, dtype: str = "float32", lora_rank: int = 0, lora_alpha: float = 32.0):
    """ModelConfig of a directory. Raises UserError for a model that this file does not implement."""
    from transformers import AutoConfig
    with explained(f"cannot read config.json of {directory}"):
        whole = AutoConfig.from_pretrained(directory)
    hf = whole.get_text_config()
    gemma = hf.model_type.startswith("gemma")
    activation = getattr(hf, "hidden_activation", None) or getattr(hf, "hidden_act", None)
    if hf.model_type not in FAMILIES:
        raise UserError(f"model_type {hf.model_type!r} is not supported; choose a --model of {', '.join(FAMILIES)}")
    if any(getattr(c, "quantization_config", None) for c in (whole, hf)):
        raise UserError("quantized checkpoints are not supported; use the bf16 or fp32 weights of this model")
    if activation != ("gelu_pytorch_tanh" if gemma else "silu") or getattr(hf, "use_bidirectional_attention", False):
        raise UserError(f"{hf.model_type} with activation {activation!r} or bidirectional attention is not supported")
    H = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    rope = hf.rope_parameters if "full_attention" in hf.rope_parameters else {t: hf.rope_parameters for t in types}
    kinds = sorted(set(types))
    biased = {"gate_proj", "up_proj", "down_proj"} if getattr(hf, "mlp_bias", False) else set()
    if hf.model_type == "qwen2" or getattr(hf, "attention_bias", False):
        biased |= {"q_proj", "k_proj", "v_proj"} | ({"o_proj"} if hf.model_type != "qwen2" else set())
    return ModelConfig(
        num_layers=hf.num_hidden_layers, model_dim=hf.hidden_size, mlp_dim=hf.intermediate_size,
        num_heads=hf.num_attention_heads, num_kv_heads=hf.num_key_value_heads, head_dim=H, vocab_size=hf.vocab_size,
        max_context=hf.max_position_embeddings, norm_eps=hf.rms_norm_eps, tied=bool(hf.tie_word_embeddings),
        rope_frequencies=tuple(rope_frequencies(rope[k], H) for k in kinds), layer_rope=tuple(map(kinds.index, types)),
        layer_window=tuple(hf.sliding_window if t == "sliding_attention" else PAD_POSITION for t in types),
        biased=frozenset(biased), qk_norm=hf.model_type in ("qwen3", "gemma3_text"), norm_plus_one=gemma,
        post_norms=gemma, embedding_scale=hf.hidden_size**0.5 if gemma else 1.0,
        activation="gelu" if gemma else "silu",  # jax.nn.gelu is the tanh approximation
        attention_scale=hf.query_pre_attn_scalar**-0.5 if gemma else H**-0.5,
        attention_cap=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(hf, "final_logit_softcapping", None) or 0.0,
        dtype=dtype, lora_rank=lora_rank, lora_alpha=lora_alpha)


def stop_tokens(directory: str, tokenizer, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, config.json and the tokenizer (each one id or a list)."""
    found = [tokenizer.eos_token_id]
    for path in filter(Path.is_file, (Path(directory) / f"{name}.json" for name in ("generation_config", "config"))):
        with explained(f"cannot read {path}", "download it again"):
            eos = json.loads(path.read_text()).get("eos_token_id")
        found += eos if isinstance(eos, list) else [eos]
    if not (ids := tuple(sorted({i for i in found if i is not None and i < vocab_size}))):
        raise UserError(f"{directory} names no end-of-sequence token; set eos_token_id in its generation_config.json")
    return ids


def open_checkpoint(directory: str, named: list[tuple[str, Any]], cfg: ModelConfig) -> dict[str, Any]:
    """{name: lazy safetensors slice} of the text model's tensors in a directory, names without `model.` prefixes.

    Raises UserError naming the first tensor that is missing, too many, or of another shape than our weights imply.
    """
    from safetensors import safe_open
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with explained(f"cannot read {file}", "download it again"):
            handle = safe_open(file, framework="np")
        for name in handle.keys():
            if not re.search(r"vision_tower|multi_modal_projector|rotary_emb", name):
                tensors[re.sub(r"^(model\.|language_model\.)+", "", name)] = handle.get_slice(name)
    if not tensors:
        raise UserError(f"no *.safetensors in {directory}; convert the checkpoint to safetensors first")
    found = {name: tuple(t.get_shape()) for name, t in tensors.items()}
    twice = cfg.tied and found.pop("lm_head.weight", None)  # some checkpoints hold the table twice
    implied = {name: leaf.shape[path.startswith("layers/"):][:: -1 if path.endswith("kernel") else 1]
               for path, leaf in named for name in tensor_names(path, cfg)}  # torch keeps [out, in]
    for name in sorted(found.keys() | implied.keys()):
        if found.get(name) != implied.get(name):
            raise UserError(f"tensor {name!r} is {found.get(name, 'missing')} in the checkpoint, config.json implies "
                            f"{implied.get(name, 'none')}; are config.json and all its safetensors files there?")
    if twice and not np.array_equal(tensors["lm_head.weight"][:], tensors["embed_tokens.weight"][:]):
        raise UserError("lm_head.weight is not embed_tokens.weight; set tie_word_embeddings: false in config.json")
    return tensors


def tensor_names(path: str, cfg: ModelConfig) -> list[str]:
    """Names in the checkpoint of the tensors (one a layer) that make up our weight at `path`."""
    if not path.startswith("layers/"):
        return [{"embed": "embed_tokens.weight", "lm_head": "lm_head.weight", "final_norm/scale": "norm.weight"}[path]]
    _, module, leaf = path.split("/")
    norms = {"attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
             "mlp_norm": "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm",
             "mlp_post_norm": "post_feedforward_layernorm"}
    group = "" if module in norms else "mlp." if module in ("gate_proj", "up_proj", "down_proj") else "self_attn."
    suffix = "bias" if leaf == "bias" else "weight"
    return [f"layers.{i}.{group}{norms.get(module, module)}.{suffix}" for i in range(cfg.num_layers)]


def load_weight(path: str, leaf, tensors: dict[str, Any], cfg: ModelConfig, mesh):
    """One weight as a sharded array. Only the slices that devices hold are read, each once, however many hold it."""
    names, shards = tensor_names(path, cfg), {}
    transposed, stacked = path.endswith("kernel"), path.startswith("layers/")  # torch keeps [out, in]

    def read(index):  # index: for every axis of the stacked weight, the slice that one device holds
        if (key := str(index)) not in shards:
            inner = index[stacked:][::-1] if transposed else index[stacked:]
            sizes = [len(range(n)[part]) for n, part in zip(leaf.shape, index)]
            shards[key] = shard = np.empty(sizes, leaf.dtype)
            for i, name in enumerate(names[index[0]] if stacked else names):  # beside the shard one tensor's part
                place = shard[i] if stacked else shard
                (place.T if transposed else place)[:] = tensors[name][inner]
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, weight_sharding(path, leaf.shape, mesh), read)


@dataclass
class Policy:
    """pi_theta and pi_ref: one set of frozen weights under two sets of trainable ones.

    theta is what RL changes: the LoRA adapter, or every weight when lora_rank is 0. theta_ref is its first value: with
    LoRA an adapter whose B is zero, hence exactly the base model for the memory of an adapter, else a full copy.
    """
    cfg: ModelConfig
    graphdef: Any
    frozen: nnx.State
    theta: nnx.State
    theta_ref: nnx.State
    mesh: Any
    eos_ids: tuple[int, ...] = ()
    pause_ids: tuple[int, ...] = ()  # tokens that end a call of a tool; without, only every DECODE_CHUNK steps are seen
    context: int = 0                 # most tokens of prompt + response
    max_rows: int = 64               # most rollouts decoded at once
    cache_tokens: int = 2**40        # most tokens that all rows of the cache together may hold


def make_policy(model: Transformer, mesh) -> Policy:
    """Split a model into trainable and frozen weights."""
    trainable = nnx.LoRAParam if model.cfg.lora_rank else nnx.Param
    graphdef, theta, frozen = nnx.split(model, trainable, ...)
    return Policy(model.cfg, graphdef, frozen, theta, jax.jit(partial(jax.tree.map, jnp.copy))(theta), mesh)


def load_policy(directory: str, cfg: ModelConfig, mesh, seed: int = 0) -> Policy:
    """The checkpoint's weights on the mesh, with a fresh adapter. Errors (UserError) name the tensor."""
    make = lambda: nnx.split(Transformer(cfg, nnx.Rngs(seed)), nnx.LoRAParam, ...)
    graphdef, _, shapes = jax.eval_shape(make)
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    tensors = open_checkpoint(directory, named, cfg)
    weights = [load_weight(*item, tensors, cfg, mesh) for item in progress(named, desc="loading weights")]
    for (path, _), finite in zip(named, jax.jit(lambda ws: [jnp.isfinite(w).all() for w in ws])(weights)):
        if not finite:
            names = " or ".join(tensor_names(path, cfg))
            raise UserError(f"there is nan or infinity in {names} of {directory}; download it again")
    adapter = jax.jit(lambda: laid_out(make()[1]))()  # of the random model, only the adapter is computed
    return make_policy(nnx.merge(graphdef, adapter, jax.tree.unflatten(treedef, weights)), mesh)

# ======================================================================================================================
# 8. Tasks: problems, words for the model, and reward. A task is a file in tasks/; the mathematical ones are here.
# ======================================================================================================================

SLOTS = {  # sections of prompts_seed.txt and the slots each must contain
    "system": ("principles",), "principles": (), "summarize": ("problem", "response", "grade", "answer"),
    "critique": ("problem", "principles", "attempts", "answer"), "aggregate": ("principles", "suggestions"),
    "crossover": ("sets", "wins")}
DEFAULT_PROMPTS = str(Path(__file__).parent / "prompts_seed.txt")
GRADE_SECONDS, GRADE_BYTES, LONGEST_ANSWER = 5, 400 * 2**20, 1_000  # of time, memory and characters, for each answer


@dataclass(frozen=True)
class Problem:
    """A question x with its accepted answers, and the record that it was made from."""
    id: str
    question: str
    answers: tuple[str, ...]
    record: dict = field(default_factory=dict, compare=False)

    @property
    def answer(self) -> str:
        return " or ".join(self.answers)


@dataclass
class Task:
    """What is learned: problems, reward and language. The loop knows nothing else about a task."""
    name: str
    train: list[Problem]
    val: list[Problem]
    test: list[Problem]
    texts: dict[str, str]                                    # its sections of prompts_seed.txt
    reward: Callable[[dict, str], Any] | None = None         # of (record, response); None: the mathematical grader
    parse: Callable[[str], list[dict] | None] = parse_operations
    tools: dict[str, Callable[..., str]] = field(default_factory=dict)  # what the model may call while it responds

    @property
    def root(self) -> list[str]:
        """The principles of the root prompt."""
        return [line.strip() for line in self.texts["principles"].splitlines() if line.strip()]


def task_file(name: str) -> dict[str, Any]:
    """What the file of a task defines. Raises UserError if it is not there or does not load."""
    if not name:
        return {}
    if name in MATHS:
        read = lambda file, names: [] if file else [x for data_set in names for x in read_hub(data_set)]
        return {"problems": lambda c: list(map(read, (c.train_file, c.test_file), MATHS[name]))}
    path = Path(name) if name.endswith(".py") else Path(__file__).parent / "tasks" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--task {name}: there is no {path}; get the folder tasks/, or choose of {', '.join(MATHS)}")
    with explained(f"task file {path} does not load"):
        return runpy.run_path(str(path))


def load_task(c: Config, training: bool = True) -> Task:
    """Problems, split into train and validation by the seed (training=False: the test set alone), and the texts, reward
    and language of config's task."""
    own = task_file(c.task)
    with explained(f"task {c.task}: its texts, tools or problems fail"):
        texts = read_prompts(c.prompts_file or DEFAULT_PROMPTS, Path(c.task).stem, own.get("PROMPTS", ""))
        tools = dict(own["tools"](c)) if "tools" in own else {}
        given = c.test_file and (c.train_file or not training)
        train, test = map(list, own["problems"](c) if "problems" in own and not given else ([], []))
    if tools and "{tools}" not in texts["system"]:
        raise UserError("the section [system] of the prompts file lacks the slot {tools}; put it where it belongs")
    rng = lambda purpose: np.random.default_rng([c.seed, zlib.crc32(purpose)])

    def distinct(file, records, flag_name, taken=()) -> list[Problem]:  # of equal questions the first
        found = read_jsonl(file) if file else [to_problem(r, f"{c.task}:{i}") for i, r in enumerate(records)]
        new = {x.question: x for x in reversed(found) if x.question not in taken}
        if not new:
            where = (file or c.task or "a missing file") + " that is not also a test problem" * bool(found)
            raise UserError(f"there is no problem in {where}; choose another {flag_name}")
        return list(new.values())[::-1]

    test = distinct(c.test_file, test, "--test-file")
    questions = {x.question for x in test}  # never train on a test problem
    train = distinct(c.train_file, train, "--train-file", questions) if training else []
    test = [test[i] for i in sorted(rng(b"test").permutation(len(test))[: c.test_size or None])]
    train = [train[i] for i in rng(b"split").permutation(len(train))[: c.train_size]]
    held = min(c.val_size, len(train) // 5)
    return Task(Path(c.task or c.train_file or c.test_file).stem, train[held:], train[:held], test, texts,
                own.get("reward"), own.get("parse", parse_operations), tools)


def to_problem(record: Any, where: str) -> Problem:
    """A Problem from one record of a data set or JSONL file. Neither true nor NaN is an answer."""
    fields = record if isinstance(record, dict) else {}
    question = fields.get("problem") or fields.get("question")
    answers = next((fields[k] for k in ("answer", "groundtruth", "golden_answers") if fields.get(k) is not None), None)
    answers = answers if isinstance(answers, list) else [answers]
    answers = [int(a) if isinstance(a, float) and a.is_integer() else a for a in answers]  # 142.0 in the AMC set
    answers = tuple(str(a).strip() for a in answers if type(a) in (str, int, float) and a == a and str(a).strip())
    half = re.search("[\ud800-\udfff]", f"{question}{''.join(answers)}")  # of a pair, which no tokenizer takes
    if not isinstance(question, str) or not question.strip() or not answers or half:
        raise UserError(f"{where}: needs an object with a text problem|question and answer|groundtruth|golden_answers")
    return Problem(where, question.strip(), answers, record)


def read_jsonl(path: str) -> list[Problem]:
    """Problems of a JSONL file, one a line. Raises UserError with file and line number."""
    with explained(f"cannot read {path}"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    problems = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            with explained(f"{path}:{n}: not JSON", "mend or remove this line"):
                problems.append(to_problem(json.loads(line), f"{path}:{n}"))
    return problems


def read_hub(name: str) -> list[dict]:
    """Records of a Hugging Face data set 'owner/name:split'."""
    with explained(f"cannot load the data set {name}", "download it elsewhere, or use --train-file and --test-file"):
        from datasets import load_dataset
        path, split = name.split(":")
        return list(map(dict, load_dataset(path, split=split)))


# ---- Words: prompts_seed.txt and the chat template

def read_prompts(path: str, task: str = "", own: str = "") -> dict[str, str]:
    """The sections of a prompts file for a task. [TASK.name] goes before a task file's own, and these before
    others; [math.name] is the word of tasks that have none."""
    with explained(f"cannot read the prompts file {path}"):
        text = Path(path).read_text(encoding="utf-8")
    general, special = ({name: body.strip() for name, body in re.findall(
        r"^\[([\w.-]+)\][ \t]*$(.*?)(?=^\[[\w.-]+\][ \t]*$|\Z)", source, re.M | re.S)} for source in (text, own))
    with_prefix = lambda prefix: {n.removeprefix(prefix): x for n, x in general.items() if n.startswith(prefix)}
    found = general | with_prefix("math.") | special | (with_prefix(f"{task}.") if task != "math" else {})
    for name, slots in SLOTS.items():
        if name not in found:
            raise UserError(f"{path} has no section [math.{name}] or [{name}]; copy it from prompts_seed.txt")
        if missing := [s for s in slots if "{" + s + "}" not in found[name]]:
            raise UserError(f"section [{name}] of {path} lacks the slot {{{missing[0]}}}; put it where it belongs")
    return {name: found[name] for name in SLOTS}


def fill(template: str, slots: dict[str, str]) -> str:
    """Replace each {slot} in one pass: braces in LaTeX, JSON examples and filled-in text are left alone."""
    return re.sub(r"\{(\w+)\}", lambda m: slots.get(m[1], m[0]), template)


def system_text(task: Task, principles: list[str]) -> str:
    """The system prompt s as the model reads it. A paragraph of principles or tools is left out where there are none.
    The tools' description stands outside the principles: evolution cannot edit it."""
    slots = {"principles": listing(numbered(principles)) if principles else "",
             "tools": from_tools("calls").described(task.tools) if task.tools else ""}
    paragraphs = task.texts["system"].split("\n\n")
    kept = [p for p in paragraphs if all(text for name, text in slots.items() if f"{{{name}}}" in p)]
    return fill("\n\n".join(kept), slots)


@dataclass
class Chat:
    """Turns texts into token ids through the tokenizer's chat template, the same way everywhere. Without a template the
    plain rendering is system text, blank line, user text, blank line. A template that refuses or loses the system turn
    (Gemma 2) gets the system text at the top of the user turn."""
    tokenizer: Any
    role: str = "system"
    thinking: bool = True

    @cached_property
    def control(self) -> re.Pattern:
        """CONTROL, and what this tokenizer takes for special tokens; of "<a" and "<a>" the longer one comes first."""
        own = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        own |= {*self.tokenizer.all_special_tokens}
        return re.compile("|".join([CONTROL.pattern, *map(re.escape, sorted(own - {""}, reverse=True))]))

    def clean(self, slots: dict[str, str]) -> dict[str, str]:
        """The slots of a request, in which no rollout may end its turn."""
        return {name: self.control.sub(" ", text) for name, text in slots.items()}

    def render(self, conversations: list[list[dict]], must_say: str) -> str:
        """The first of these conversations that the template takes, and says in full; "" if there is none."""
        for messages in conversations if self.tokenizer.chat_template else ():
            with contextlib.suppress(Exception):  # jinja2's TemplateError: "System role not supported"
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                          enable_thinking=self.thinking, date_string="26 Jul 2024")
                if must_say.strip() in text:
                    return text
        return ""

    def ids(self, system: str, user: str) -> list[int]:
        """Token ids of the prompt that ends where the model's turn begins."""
        if not self.tokenizer.chat_template:
            return self.tokenizer("".join(t + "\n\n" for t in (system, user) if t)).input_ids
        apart = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        texts = filter(None, (system, user) if self.role == "system" else (user, system))
        together = [{"role": "user", "content": "\n\n".join(texts)}]
        text = self.render([apart, together] if system and self.role == "system" else [together], system or user)
        if not text:
            raise UserError("the tokenizer's chat template fails, or loses what it should say; mend chat_template")
        return self.tokenizer(text, add_special_tokens=False).input_ids  # the template wrote BOS itself

    def text(self, tokens: list[int], prompt: list[int] = (), special: bool = False) -> str:
        """A response as text, with or without special tokens; with the <think> that some templates open for it."""
        opened = self.tokenizer.decode(list(prompt[-8:])).rstrip().endswith("<think>")
        return "<think>" * opened + self.tokenizer.decode(tokens, skip_special_tokens=not special)


def final_text(text: str) -> str:
    """What follows the last </think>, or all of `text` without one; "" while a <think> is still open."""
    tail = text.rpartition("</think>")[2]
    return "" if "<think>" in tail else tail


# ---- Rewards

def grade(task: Task, pairs: list[tuple[Problem, str]]) -> list[tuple[float, str]]:
    """(reward, outcome) of each (problem, final text of a response). A failing reward is 0, "error"; never raises."""
    if task.reward is None:
        return grade_math(pairs)
    graded, failed = [], ""
    for problem, text in pairs:
        try:
            found = task.reward(problem.record, text)
            reward, outcome = found if isinstance(found, tuple) else (found, None)
            if not (math.isfinite(reward := float(reward)) and reward <= 1):
                raise ValueError(f"a reward is a finite number, at most 1, not {reward}")
            word = "correct" if reward == 1 else "partly right" if reward > 0 else "wrong"
            graded.append((reward, str(outcome or word)))
        except Exception as e:
            failed = failed or f"reward of {task.name} failed, counted as 0: {first_line(e)}"
            graded.append((0.0, "error"))
    if failed:
        warn(failed)
    return graded


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, or None when there is none or its braces do not balance."""
    *before, rest = re.split(r"\\boxed\s*\{", text)
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL) if before else ():  # an escaped brace is one token: ignored
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[: token.start()]
    return None


PLAIN = {  # what math-verify misreads: what is meant
    # 1\,000; a full stop; other names of the same
    r"(?<![\w.])[0-9]{1,3}(?:(?:\\[ ,;:]|\{,\}|,\\!|[~\s])[0-9]{3})+(?!\d)": lambda m: re.sub("[^0-9]", "", m[0]),
    r"(?<!\.)(?<!\\right)\.(?=[\s$]*\Z)": "", r"\\varnothing": r"\\emptyset", "°": r"^\\circ", r"\\sqrt\{-1\}": "i",
    # 0.1\overline{6} is (16 - 1) / 90
    r"(?<!\d)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}": lambda m: "\\frac{%s-%s}{%s%s}" % (
        m[1] + m[2] + m[3], m[1] + m[2] or 0, "9" * len(m[3]), "0" * len(m[2])),
    # 467 = 468 and 468 \text{ (not 467)} are two answers, of which none counts
    r"(^|=)\s*([0-9]+)\s*=(?!\s*\2\s*\Z)(?=\s*[0-9]+\s*\Z)": r"\1\2, ",
    r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}0-9]{0,99}\b(?:not|or|but)\b[^{}0-9]{0,99}([0-9]++)[^{}]*\}": r", \1",
    # integers, 042 and 1,000 too, all in one form
    r"^[\s$]*([+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+))[\s$.]*\Z":
        lambda m: str(int(m[1][:LONGEST_ANSWER].replace(",", "")))}
OR_ELSE = {  # second readings: 12.5 %, which is 0.125, as 12.5 (percent were asked for); 90 degrees, or 90, as pi/2
    r"^[\s$]*([1-9][0-9,]*\.[0-9]+)\s*\\?%[\s$]*$": r"\1",
    r"(?<![0-9.])([0-9.]++)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})": r"\\frac{\1\\pi}{180}"}


def readings(text: str) -> list[str]:
    """The one or two ways to read an answer, written so that math-verify reads them so."""
    rewritten = lambda text, rules: reduce(lambda x, rule: re.sub(*rule, x), rules.items(), text).strip()
    return list(dict.fromkeys([plain := rewritten(text, PLAIN), rewritten(plain, OR_ELSE)]))


def grade_math(pairs: list[tuple[Problem, str]]) -> list[tuple[float, str]]:
    """(reward, outcome) of each response: 1.0 for correct; 0.0 for wrong, no_answer, timeout and error. Only the last
    \\boxed{} of the final text counts. Equal integers and equal strings need no math-verify."""
    outcomes, asked = [], {}
    for problem, text in pairs:
        answers, golds = readings(last_boxed(text) or ""), sum(map(readings, problem.answers), [])
        if not (answer := answers[0]):
            outcomes.append("no_answer")
        elif answer in golds:
            outcomes.append("correct")
        elif len(answer) > LONGEST_ANSWER or all(re.fullmatch("-?[0-9]+", x) for x in (answer, *golds)):
            outcomes.append("wrong")  # also a derivation, an attack
        else:
            asked[len(outcomes)] = golds, answers
            outcomes.append("error")  # unless math-verify, in a process of its own, has a verdict
    if asked:
        program = f"{MATH_VERIFY_SOURCE}\nmath_verify_process({GRADE_SECONDS}, {GRADE_BYTES})"
        lines = "".join(json.dumps(pair) + "\n" for pair in asked.values())
        try:
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, input=lines,
                                  timeout=60 + (GRADE_SECONDS + 1) * len(asked))
            verdicts, reason = done.stdout.split(), (done.stderr.strip().splitlines() or ["it ended early"])[-1]
        except (OSError, subprocess.TimeoutExpired) as e:
            verdicts, reason = [], first_line(e)
        if len(verdicts) < len(asked):
            warn(f"{len(asked) - len(verdicts)} answers not graded ({reason}); try pip install math-verify")
        for i, verdict in zip(asked, verdicts):
            outcomes[i] = verdict
    return [(float(o == "correct"), o) for o in outcomes]


def math_verify_process(seconds: int, max_bytes: int) -> None:
    """Prints a verdict for every line of its input; runs alone, as the main program of another process. sympy can loop
    for ever or eat all memory on `9^{9^{9^9}}`, often in one C call which no exception interrupts. So each answer gets
    a forked child, in the same state, and the kernel enforces both limits on it: SIGALRM's default action ends the
    child whatever it is doing. math-verify's own timeouts, also of signals, stay off."""
    import contextlib, json, os, resource, signal, sys  # noqa: E401
    from math_verify import LatexExtractionConfig, parse, verify

    def same(golds, answers):
        read = lambda x: parse(  # LaTeX only: the plain-text extractor would pick any number out of a sentence
            "\\boxed{" + x + "}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
        flags = dict(allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        return any(verify(read(gold), read(answer), **flags) for gold in golds for answer in answers)

    same(["[1,2)", "x^2-1"], ["(x+1)(\\frac{x}{1}-1)"])  # fills caches which the children inherit: three times as fast
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        if not (child := os.fork()):
            try:
                os.dup2(2, 1)  # nothing a library prints may look like a verdict
                signal.alarm(seconds)
                with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
                    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
                os._exit(0 if same(*json.loads(line)) else 1)
            except BaseException:
                os._exit(2)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "correct", 1: "wrong", -signal.SIGALRM: "timeout"}.get(code, "error"), flush=True)


MATH_VERIFY_SOURCE = inspect.getsource(math_verify_process)  # now: this file may be edited while a run goes on

# ======================================================================================================================
# 9. A run: its reflection model and evaluations, its files, its screen, and the program
# ======================================================================================================================

TOOLS = Path(__file__).with_name("tools")  # what the method can do without; loaded where it is called for
ALONE = not (TOOLS / "evaluate.py").is_file()
HEADS = "  it | reward: batch mean | best prompt, its V | gradient norm, entropy H in nats | +child from parents | time"


@dataclass
class Run:
    """Everything that a run carries from one iteration to the next."""
    config: Config
    task: Task
    chat: Chat
    trainer: Trainer
    population: list[SystemPrompt]
    directory: Path
    server: Any = None                                    # of --reflector URL: tools/reflector.py
    tracker: Any = None                                   # of --track
    evaluations: list[dict] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)     # of the current iteration, by phase
    phase: str = "load"                                   # in which it failed
    finished: int = -1                                    # iteration after which this is the state, which may be saved;
    #                                                       -1 from where one begins to change it until it is logged
    tokens: Counter = field(default_factory=Counter)      # sampled in it: rollouts, reflections, evaluation
    reflector_tokens: int = 0                             # in and out of --reflector URL in the whole run

    @property
    def policy(self) -> Policy:  # one model for sampler and trainer
        return self.trainer.policy

    def seed(self, purpose: str) -> tuple[int, int]:
        """Seed of one use of randomness: nothing random is carried over, so a resumed run repeats exactly."""
        return self.config.seed, zlib.crc32(purpose.encode())

    def append(self, file: str, records: list[dict]) -> None:
        """Append records to a JSONL file of the run, all or none. A full disk is reported, it does not end the run."""
        if jax.process_index():
            return
        path, text = self.directory / file, ""
        size = path.stat().st_size if path.is_file() else 0
        try:
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            with open(path, "a", encoding="utf-8") as f:
                f.write(text)
        except (OSError, ValueError, TypeError) as e:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half line, on which the next one would be written
            warn(f"could not write {path}: {first_line(e)}; {len(text):,} characters are lost")


@contextlib.contextmanager
def timed(run: Run, phase: str):
    """Adds the seconds of a `with` block to run.seconds[phase]; run.phase is the phase that failed."""
    start = time.perf_counter()
    try:
        yield
    except Exception:
        run.phase = phase
        raise
    finally:
        run.seconds[phase] += time.perf_counter() - start


def start_run(c: Config, task: Task | None = None) -> Run:
    """Load everything, then make (or reopen) the run directory: what is wrong is found before anything is written."""
    if c.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(c.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small programs, too
    server = None if c.reflector in ("reference", "current") else from_tools("reflector")
    if server:
        server.check(c)
    task = task or load_task(c)
    policy, chat = load_model(c)
    drop_long_problems(task, chat, policy.context, policy.cfg.vocab_size, policy.cfg.max_context)
    if 0 < len(task.train) < c.batch_size:
        warn(f"--batch-size {c.batch_size}: there are {len(task.train)} training problems, all in every batch")
    steps = [optax.clip_by_global_norm(c.max_grad_norm)] if c.max_grad_norm else []
    optimizer = optax.chain(*steps, optax.adam(c.learning_rate, b1=0.9, b2=0.95, eps=1e-8))
    optimizer = optax.apply_if_finite(optimizer, 2**30)  # one infinite gradient must not end a week's run
    trainer = Trainer(policy, optimizer, adam_init(optimizer, policy.theta),
                      Objective(c.loss, c.temperature, c.clip_low, c.clip_high, c.kl_coef), c.microbatch_tokens)
    run = Run(c, task, chat, trainer, [SystemPrompt(0, task.root)], Path(), server)  # Alg. 1, line 1
    opened = open_directory if jax.process_count() == 1 else from_tools("hosts").open_directory
    run.directory = Path(opened(run))
    return run


def open_directory(run: Run) -> str:
    """Makes the run directory, or reopens it, and starts the tracker."""
    c = run.config
    directory = Path(c.run_dir or f"runs/{run.task.name}-{c.mode}-{time.strftime('%Y%m%d-%H%M%S')}")
    with explained(f"cannot write --run-dir {directory}"):
        directory.mkdir(parents=True, exist_ok=bool(c.run_dir))  # two runs may begin in the same second
        c.run_dir = c.run_dir or str(directory)
        if not c.resume and any(directory.iterdir()):
            raise UserError(f"--run-dir {directory} is not empty; choose another, or continue it with --resume")
        run.tracker = from_tools("track").start(c) if c.track else None
        write_whole(directory / "config.json", json.dumps(dataclasses.asdict(c) | {"resume": ""}, indent=1))
    return c.run_dir


def load_model(c: Config) -> tuple[Policy, Chat]:
    """The model on a data x model mesh of all devices, ready to sample, and its chat format."""
    from transformers import AutoTokenizer
    mesh = make_mesh(c.model_parallel)
    directory = find_model(c.model)
    dtype = c.dtype if c.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # else a TPU multiplies in bfloat16
    cfg = read_model_config(directory, dtype, c.lora_rank, c.lora_alpha)
    cfg = fit_layout(cfg, mesh, device_memory()["bytes_limit"])
    cfg = from_tools("flash").checked(cfg) if cfg.flash else cfg
    with explained(f"cannot read the tokenizer in {directory}"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
    if c.context > cfg.max_context:
        raise UserError(f"--context {c.context}: the model was made for at most {cfg.max_context} positions")
    policy = load_policy(directory, cfg, mesh, c.seed)
    policy.eos_ids, policy.context = stop_tokens(directory, tokenizer, cfg.vocab_size), c.context or cfg.max_context
    policy.max_rows = c.max_rows or (64 if jax.default_backend() == "cpu" else 512)
    policy.cache_tokens = cache_tokens(policy, device_memory())
    tag = tokenizer("</tool_call>", add_special_tokens=False).input_ids
    policy.pause_ids = tuple(tag) if len(tag) == 1 else ()
    return policy, Chat(tokenizer, c.prompt_role, c.thinking)


def device_memory() -> dict[str, float]:
    """Bytes of a device: bytes_limit, bytes_in_use. Those that do not say, as CPUs, share this machine's memory.
    Of several processes the first one's: the layouts that follow from it must be the same."""
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    return on_host_0(lambda: {"bytes_limit": share, "bytes_in_use": 0} | (jax.local_devices()[0].memory_stats() or {}))


def shard_bytes(tree, mesh, sampler: ModelConfig | None = None) -> int:
    """Bytes on one device of weights (or their shapes, or what has their paths), in the sampler's layout or at rest."""
    part = lambda path, x: weight_sharding(path_name(path), x.shape, mesh, sampler).shard_shape(x.shape)
    return sum(math.prod(part(p, x)) * x.dtype.itemsize for p, x in jax.tree.leaves_with_path(tree))


def fit_layout(cfg: ModelConfig, mesh, memory: float) -> ModelConfig:
    """Decides split_length (whether whole layers on each device along data would take over two fifths of its memory)
    and flash."""
    weights = jax.eval_shape(lambda: nnx.state(Transformer(cfg, nnx.Rngs(0))))
    return dataclasses.replace(cfg, split_length=shard_bytes(weights, mesh, cfg) > 0.4 * memory,
                               flash="" if ALONE else from_tools("flash").choose(cfg, mesh))


def token_bytes(cfg: ModelConfig, mesh) -> float:
    """Bytes of key/value cache on one device for each token in it."""
    token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    return token / mesh.shape["data"] / (1 if cfg.num_kv_heads % mesh.shape["model"] else mesh.shape["model"])


def cache_tokens(policy: Policy, memory: dict[str, float]) -> int:
    """Tokens of cache that fit: 85 % of what weights, Adam's moments and the layers in the sampler's form leave."""
    cfg, mesh = policy.cfg, policy.mesh
    taken = 2 * shard_bytes(policy.theta, mesh) + shard_bytes((policy.frozen, policy.theta), mesh, cfg)
    free = memory["bytes_limit"] - memory["bytes_in_use"] - taken
    return int(max(0.0, 0.85 * free / token_bytes(cfg, mesh)))


def drop_long_problems(task: Task, chat: Chat, context: int, vocab_size: int, most: int = sys.maxsize) -> None:
    """Leave out problems whose prompt, with the root principles, has no room for a response; say how many."""
    for split, problems in {"train": task.train, "val": task.val, "test": task.test}.items():
        ids = [chat.ids(system_text(task, task.root), x.question) for x in problems]
        if (largest := max(map(max, filter(None, ids)), default=0)) >= vocab_size:
            raise UserError(f"the tokenizer gives id {largest}, the model has {vocab_size} tokens; --model mixes two")
        kept = [x for x, i in zip(problems, ids) if 0 < len(i) < context]
        if len(kept) < len(problems):
            warn(f"left out {len(problems) - len(kept)} of {len(problems)} {split} problems: over {context} tokens")
        if problems and not kept and split != "val":
            raise UserError(f"no {split} problem fits into {context} tokens; "
                            f"{'raise --context or ' * (context < most)}use another --model")
        problems[:] = kept


# ---- The reflection model, and evaluation

def ask(run: Run, iteration: int, calls: Counter, request: str, slots: list[dict]) -> list[str]:
    """The `ask` of a Tournament: requests of prompts_seed.txt answered by the reflection model, all in one batch."""
    c = run.config
    calls[request] += 1
    seed = run.seed(f"{request}/{calls[request]}/{iteration}")  # each call has its own
    if run.server:
        prompts = [fill(run.task.texts[request], run.chat.clean(s)) for s in slots]
        replies = on_host_0(run.server.ask, run, prompts, zlib.crc32(str(seed).encode()))
    else:
        theta = run.policy.theta_ref if c.reflector == "reference" else run.policy.theta
        limit = max(run.policy.context - c.reflect_tokens, run.policy.context // 2)
        ids = [fit_request(run.chat, run.task.texts[request], s, limit) for s in slots]
        sampling = Sampling(c.reflect_temperature, c.top_p, c.reflect_tokens, seed, f"reflecting: {request}")
        responses = [r for [r] in generate(run.policy, theta, ids, [1] * len(ids), sampling)]
        run.tokens["reflections"] += sum(len(r.tokens) for r in responses)
        prompts = map(run.chat.tokenizer.decode, ids)
        replies = [run.chat.text(r.tokens, prompt) for r, prompt in zip(responses, ids)]
    run.append("reflections.jsonl", [dict(iteration=iteration, request=request, prompt=prompt, reply=reply)
                                     for prompt, reply in zip(prompts, replies)])
    return [final_text(reply).strip() for reply in replies]  # what a model thinks aloud is not its reply


def fit_request(chat: Chat, template: str, slots: dict[str, str], limit: int) -> list[int]:
    """Token ids of a filled-in request; while it is longer than `limit`, its longest slot loses its middle."""
    slots = chat.clean(slots)
    while len(ids := chat.ids("", fill(template, slots))) > limit:
        name = max(slots, key=lambda n: len(slots[n]))
        keep, text, note = int(0.45 * len(slots[name]) * limit / len(ids)), slots[name], "\n[… cut …]\n"
        if keep < 1 or 2 * keep + len(note) >= len(text):
            raise NoChild(f"a request does not fit into {limit} tokens")
        slots = slots | {name: text[:keep] + note + text[-keep:]}
    return ids


def tested_prompt(run: Run) -> SystemPrompt:
    """The prompt that is evaluated; neither validation nor test scores have a say."""
    c, pool = run.config, run.population[-run.config.max_pool_size:]
    unrated = c.mode == "rl" and all(s.sigma >= SystemPrompt.sigma for s in pool)  # as --mode reflection leaves them
    if c.test_prompt == "latest" or c.mode == "reflection" or c.num_prompts == 1 or unrated:
        return pool[-1]
    return max(pool, key=lambda s: (s.mu - c.ucb_lambda * s.sigma, bool(s.history), s.id))  # of equals who competed


def score(run: Run, s: SystemPrompt, problems: list[Problem], split: str, iteration: int) -> dict[str, list[float]]:
    """Mean reward and unbiased pass@k (Chen et al., 2021) on each problem, of prompt s and the weights of the split."""
    n = 1 if split == "test_greedy" else run.config.test_samples
    groups = sample_groups(run, [(s, x, n) for x in problems], split, iteration)
    chance = lambda g, k: 1 - math.comb(n - g.outcomes.count("correct"), k) / math.comb(n, k)
    return {"reward": [g.value for g in groups]} | {
        f"pass@{k}": [chance(g, k) for g in groups] for k in sorted({n} | {2**i for i in range(n.bit_length())})}


def evaluate(run: Run, iteration: int, table: bool = False) -> dict:
    """Score the tested prompt with pi_theta, and the 2 x 2 table if asked; keep the weights if validation is best."""
    s = tested_prompt(run)
    result = {"iteration": iteration, "prompt": s.id}
    for split, problems in (("val", run.task.val), ("test", run.task.test)):
        if problems:
            scores = score(run, s, problems, split, iteration)  # at last those of the test set
            result |= {f"{split}_{name}".removesuffix("_reward"): float(np.mean(x)) for name, x in scores.items()}
            s.scores.append({"iteration": iteration, "split": split, "score": result[split]})
    if run.config.test_greedy:
        result["test_greedy"] = float(np.mean(score(run, s, run.task.test, "test_greedy", iteration)["reward"]))
    if table and not ALONE:
        result |= from_tools("evaluate").tabled(run, iteration, s, scores)
    run.evaluations.append(result)
    if "val" in result and max(run.evaluations, key=lambda e: e["val"]) is result:  # the first of equals
        save_checkpoint(run, iteration, "best")
    return result


# ---- Checkpoints and logs

def checkpoint_manager(run: Run, name: str, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax checkpoints in <run>/<name>, the last two; read_only leaves alone what a run is writing there."""
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # hundreds of lines about what orbax also raises
    options = ocp.CheckpointManagerOptions(read_only=True, create=False) if read_only else ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True)  # of a save that failed
    return ocp.CheckpointManager((run.directory / name).absolute(), options=options)


def save_checkpoint(run: Run, iteration: int, name: str = "checkpoints") -> None:
    """Everything needed to go on after this iteration: theta, Adam's state, the population, the evaluations."""
    loop = {"prompts": [dataclasses.asdict(s) for s in run.population], "evaluations": run.evaluations,
            "reflector_tokens": run.reflector_tokens}
    weights = {"theta": run.policy.theta, "opt_state": run.trainer.opt_state}
    try:
        with checkpoint_manager(run, name) as manager:  # a new one knows of no save that failed
            for step in [step for step in manager.all_steps() if step >= iteration]:  # of a run killed before them
                manager.delete(step)
            whole = loop | {"check": fingerprint(weights, loop)}
            manager.save(iteration, args=ocp.args.Composite(
                weights=ocp.args.StandardSave(weights), loop=ocp.args.JsonSave(whole)))
            manager.wait_until_finished()
    except Exception as e:  # a full disk: the run goes on, and the next checkpoint may succeed
        warn(f"could not save a checkpoint in {run.directory / name}: {first_line(e)[:300]}; it takes up to "
             f"{sum(x.nbytes for x in jax.tree.leaves(weights)):,} bytes, the last one is kept")


bit_sum = jax.jit(lambda tree: sum(jnp.sum(x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32))
                                   for x in jax.tree.leaves(tree)))  # modulo 2^32, in any order and layout
count_not_finite = jax.jit(lambda tree: sum(jnp.sum(~jnp.isfinite(x)) for x in jax.tree.leaves(tree)))


def fingerprint(weights, loop: dict) -> list[int]:
    """Tells a damaged checkpoint: orbax does not see a flipped bit of a weight."""
    return [int(bit_sum(weights)), zlib.crc32(json.dumps(loop, sort_keys=True).encode())]


def restore_checkpoint(run: Run, manager: ocp.CheckpointManager) -> int:
    """Bring `run` back to its latest whole checkpoint and cut its logs there; returns its iteration, -1: none."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct,
                        {"theta": run.policy.theta, "opt_state": run.trainer.opt_state})
    how = ocp.args.Composite(loop=ocp.args.JsonRestore(), weights=ocp.args.StandardRestore(like))
    logs = [run.directory / f"{name}.jsonl" for name in ("metrics", "rollouts", "reflections", "not_finite")]
    for done in sorted(manager.all_steps(), reverse=True):
        run.policy.theta = run.trainer.opt_state = state = weights = None  # never twice in memory
        try:
            state = manager.restore(done, args=how)
            weights, loop = state["weights"], state["loop"]
            if loop.pop("check", None) not in (None, fingerprint(weights, loop)):
                raise ValueError("its checksum is not that of its content")
            run.population, run.evaluations = [SystemPrompt(**s) for s in loop["prompts"]], loop["evaluations"]
            run.reflector_tokens = loop.get("reflector_tokens", 0)
            run.policy.theta, run.trainer.opt_state = weights["theta"], weights["opt_state"]
            break
        except Exception as e:
            if "RESOURCE_EXHAUSTED" in str(e):
                raise
            warn(f"the checkpoint {manager.directory / str(done)} is damaged: {first_line(e)[:300]}")
    else:  # none is whole: an error, unless the run had not come to its first
        if manager.all_steps() or logs[0].is_file() and logs[0].read_bytes().count(b"\n") > 1:
            raise UserError(f"no checkpoint in {manager.directory} is whole; put one back, or start a new run")
        done = -1
    for path in () if jax.process_index() else filter(Path.is_file, logs):
        with open(path, "rb+") as file:  # bytes: only \n ends a record
            end, kept, line = 0, 0, b"\n"
            for line in file:
                end += len(line)
                with contextlib.suppress(ValueError):  # the line that was being written may be incomplete
                    kept = end if line.endswith(b"\n") and json.loads(line)["iteration"] <= done else kept
            if not line.endswith(b"\n"):
                warn(f"the last line of {path} was incomplete; it is cut off")
            file.truncate(kept)
    return done


@contextlib.contextmanager
def resumed_and_saved(run: Run):
    """The loop with its beginning, the latest checkpoint, and its end, however it comes: if the state is still that
    after an iteration (the run was stopped while it sampled), it is saved, whatever --save-every says."""
    if run.config.resume:
        with checkpoint_manager(run, "checkpoints") as manager:
            run.finished = restore_checkpoint(run, manager)
        with checkpoint_manager(run, "best") as manager:
            for step in [step for step in manager.all_steps() if step > run.finished]:  # of what is done again
                manager.delete(step)
    try:
        yield
    except Exception as e:
        if jax.process_count() > 1 and not isinstance(e, UserError):
            run.finished = -1  # the others are not here, and saving takes all
        raise
    finally:
        if run.finished >= 0 and not on_host_0((run.directory / "checkpoints" / str(run.finished)).exists):
            save_checkpoint(run, run.finished)


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a crash, sees the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def batch_metrics(run: Run, prompts_M: list[SystemPrompt], groups_MB: list[list[Group]], values_M: list[float]) -> dict:
    """What metrics.jsonl says of an iteration's rollouts and ratings (docs/metrics.md)."""
    groups = [g for row in groups_MB for g in row]
    responses, outcomes = [y for g in groups for y in g.responses], [o for g in groups for o in g.outcomes]
    tools = {"tool_calls": float(np.mean([y.calls for y in responses])),
             "too_many_calls": sum(y.stop == "calls" for y in responses) / len(responses)} if run.task.tools else {}
    return {"reward_mean": float(np.mean([r for g in groups for r in g.rewards])),
            "rewards": {s.id: v for s, v in zip(prompts_M, values_M)},
            "ratings": {s.id: [s.mu, s.sigma] for s in run.population[-run.config.window:]},
            "contrast_groups": sum(g.contrast for g in groups) / len(groups),
            "response_tokens": run.tokens["rollouts"] / len(responses),
            "truncated": sum(y.stop == "length" for y in responses) / len(responses),
            "outcomes": dict(Counter(outcomes)),
            "rollout_tokens_per_second": run.tokens["rollouts"] / run.seconds["sample"]} | tools


def write_logs(run: Run, m: dict) -> None:
    """The iteration's line of metrics.jsonl, population.json, and the pictures, of quick runs only at the end."""
    m |= {"tokens": dict(run.tokens), "seconds": dict(run.seconds)}
    run.append("metrics.jsonl", [m])
    try:
        population = [dataclasses.asdict(s) for s in run.population]
        write_whole(run.directory / "population.json", json.dumps(population, indent=1, ensure_ascii=False))
        if run.tracker:
            from_tools("track").log(run.tracker, m)
        slow = "test" in m and sum(run.seconds.values()) > 10
        if not ALONE and (slow or m["iteration"] == last_iteration(run)):
            from_tools("report").draw(run.directory)  # curves.png, tree.png, tree.svg
    except Exception as e:
        warn(f"could not write population.json or a picture, or --track: {first_line(e)}")


def not_finite(run: Run, iteration: int, learning: dict, samples: list[Sample]) -> dict:
    """What metrics.jsonl says of an update with nan or infinity, whose rollouts go to not_finite.jsonl; else {}."""
    found = {"weights": int(count_not_finite(run.policy.theta)),
             "loss": int(not math.isfinite(learning.get("loss", 0.0))),
             "updates": int(run.trainer.opt_state.notfinite_count)}  # left out in a row
    if "skipped" in learning or not any(found.values()):
        return {}
    run.append("not_finite.jsonl", [{"iteration": iteration} | vars(s) for s in samples])
    return {"not_finite": found}


def finish_iteration(run: Run, m: dict) -> None:
    """Ends a run with weights that are not finite, or after five updates in a row that were left out, and five more."""
    bad = m.get("not_finite", {"weights": 0, "updates": 0})
    run.finished = -1 if bad["weights"] else m["iteration"]  # -1: no checkpoint of such weights
    if bad["weights"] or bad["updates"] and bad["updates"] % 5 == 0:
        raise UserError(f"{bad['weights']} weights, and the gradients of {bad['updates']} updates in a row, are nan or "
                        f"infinite (rollouts: {run.directory / 'not_finite.jsonl'}); lower --learning-rate in a new run"
                        f", or continue with: python espl.py --resume {run.directory}")


# ---- Plumbing: errors as one line, what is in tools/, several processes

STOPS: list[int] = []  # signals that told the program to stop


class UserError(Exception):
    """Bad input. The message is one line that says what to do; the program prints it and exits with code 2."""


@contextlib.contextmanager
def explained(what: str, advice: str = ""):
    """Whatever a library raises in the `with` block becomes one line: what failed, the library's words, and advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what} ({first_line(e)})" + f"; {advice}" * bool(advice)) from e


def first_line(error: Exception) -> str:
    """The line of somebody else's error message that tells most: the first, or the last if that one ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0]


def warn(message: str) -> None:
    """A line to stderr that does not tear a progress bar."""
    if not jax.process_index():
        tqdm.write(f"espl: warning: {message}", file=sys.stderr)


def progress(iterable=None, **kwargs):
    """A progress bar that vanishes when done, so that the log keeps one line an iteration."""
    return tqdm(iterable, leave=False, dynamic_ncols=True, disable=None, **kwargs)


@cache
def from_tools(name: str) -> SimpleNamespace:
    """The functions of tools/NAME.py."""
    with explained(f"cannot load {TOOLS / name}.py", "get the folder tools/"):
        return SimpleNamespace(**runpy.run_path(f"{TOOLS / name}.py"))


def on_host_0(function: Callable, *args) -> Any:
    """function(*args), which of several processes (docs/hosts.md) the first alone calls: it has files and screen."""
    return function(*args) if jax.process_count() == 1 else from_tools("hosts").on_host_0(function, *args)


def highest(number: int) -> int:
    """The highest of all processes' numbers."""
    return number if jax.process_count() == 1 else from_tools("hosts").highest(number)


def stop_if_told() -> None:
    """Ends the program if it was told to stop, which libraries swallow now and then (about one Ctrl-C in thirty, while
    XLA compiles); of several processes all, at the same place, if any was told."""
    if told := highest(STOPS[0] if STOPS else 0):
        raise KeyboardInterrupt(told)


# ---- The screen and the program

def print_line(run: Run, m: dict) -> None:
    """A line an iteration, heads now and then, and advice when no child is made for long."""
    short = lambda x, digits=3: re.sub(r"^(-?)0\.", r"\1.", f"{x:.{digits}f}")
    parts = [f"{m['iteration']:>4}"]
    if "rewards" in m:
        best = m.get("best", max(m["rewards"], key=m["rewards"].get))  # ties are broken by the seed
        parts += [f"reward {short(m['reward_mean'])}", f"best {best} {short(m['rewards'][best])}"]
    if "loss" in m:
        parts.append(f"grad {short(m['grad_norm'], 2)} H {short(m['entropy'], 2)}")
    parts += ["no step"] * ("skipped" in m)
    parts += [f"{n} {name} not finite" for name, n in m.get("not_finite", {}).items() if n]
    bred = [f"+{x['id']} from {', '.join(map(str, x['parents']))}" for x in m.get("children", {}).values()]
    scores = [f"{split} {short(m[split])}" for split in ("val", "test") if split in m]
    saved = f" ({-m['seconds']['overlap']:.1f} saved)" if "overlap" in m["seconds"] else ""
    parts += filter(None, [" ".join(bred), f"{sum(m['seconds'].values()):.1f} s{saved}", " ".join(scores)])
    if m["iteration"] % 20 == 0:
        tqdm.write(HEADS)
    tqdm.write(" | ".join(parts))
    barren = m["iteration"] - run.population[-1].iteration  # iterations since the last child
    if m.get("no_child") and barren and barren % 10 == 0:
        warn(f"no child for {barren} iterations, lastly: {next(iter(m['no_child'].values()))}")


def parse_args(argv: list[str]) -> Config:
    """Config from the command line; --resume takes the run's own flags. Raises UserError for impossible values."""
    def stop(message):
        raise UserError(f"{message}; see python espl.py --help")

    # named: the flags that decide which others there are; saved: config.json of --resume; own: of the task's file
    early, saved = argparse.ArgumentParser(add_help=False, allow_abbrev=False), {}
    for name in ("--task", "--train-file", "--test-file", "--resume", "--rating"):
        early.add_argument(name, default="")
    early.error = stop  # instead of the usage on many lines
    named = early.parse_known_args(argv)[0]
    if named.resume:
        path = Path(named.resume) / "config.json"
        with explained(f"cannot read {path}", "--resume takes an earlier run's directory"):
            saved = json.loads(path.read_text()) | {"run_dir": named.resume}
            named.task = saved["task"]
    elif not (named.task or named.train_file or named.test_file):
        named.task = "glyphs"
    alone = {"-h", "--help"} & {*argv} and not Path(__file__).with_name("tasks").is_dir()  # helps there, too
    own = {} if alone else task_file(named.task)
    with explained(f"task {named.task}: its FLAGS, DEFAULTS or config.json are wrong"):
        flags = [(name, type(value), flag(value, "Task", text)) for name, (value, text) in own.get("FLAGS", {}).items()]
        kind = dataclasses.make_dataclass("TaskConfig", flags, bases=(Config,))
        defaults = dataclasses.asdict(kind(**own.get("DEFAULTS", {}) | {"task": named.task} | saved))
    if (named.rating or defaults["rating"]) == "last" and not saved and "ucb_lambda" not in own.get("DEFAULTS", {}):
        defaults["ucb_lambda"] = 0.0
    parser = argparse.ArgumentParser(
        usage="python espl.py [--task TASK] [flags]   (on several hosts: docs/hosts.md)",
        description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=120))
    parser.error, fields = stop, {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(kind)}
    group = cache(parser.add_argument_group)  # one for each title, in the order in which they are first named
    group("Most used")
    for name, f in fields.items():
        m, value = f.metadata, defaults[f.name]
        how = dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool) else dict(
            type=type(f.default), choices=m["choices"], metavar=None if m["choices"] else type(value).__name__.upper())
        text = f"[{m['symbol']}] " * bool(m["symbol"]) + m["text"] + f" (default: {value})" * (value != "")
        title = "Most used" if f.name in MOST_USED else m["group"]
        group(title).add_argument(name, help=text.replace("%", "%%"), **how)
    c, unknown = parser.parse_known_args(argv, kind(**defaults))
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), parser._option_string_actions, 1)
        stop(f"unknown {unknown[0]}" + "".join(f", did you mean {name}?" for name in near))
    for name, f in fields.items():
        value, m = getattr(c, f.name), f.metadata
        if saved and f.name not in RESUMABLE and value != defaults[f.name]:
            raise UserError(f"{name} cannot change when resuming; start a new run")
        types = (int, float) if isinstance(f.default, float) else type(f.default)
        if not isinstance(value, types) or m["choices"] and value not in m["choices"]:  # of a task file's DEFAULTS
            raise UserError(f"{name} {value!r}: must be {m['choices'] or type(f.default).__name__}")
        if m["low"] is not None and not m["low"] <= value <= m["high"]:
            limit = f" and at most {m['high']}" * (m["high"] < sys.float_info.max)
            raise UserError(f"{name} {value}: must be at least {m['low']}{limit}")
    return c


def main(argv: list[str]) -> int:
    """The program; returns its exit code: 0, 2 for bad input or too little memory, 130 or 143 when stopped."""
    run, again = None, lambda: f"; continue with: python espl.py --resume {run.directory}" if run else ""
    try:
        argv, join = (argv, lambda: None) if ALONE else from_tools("hosts").prepare(argv)
        c = parse_args(argv)
        join()
        run = start_run(c)
        task, cfg = run.task, run.policy.cfg
        prompts = [run.chat.ids(system_text(task, task.root), x.question) for x in task.train]
        lengths = max(map(len, prompts)), min(max(map(len, prompts)) + c.max_new_tokens, run.policy.context)
        first, last = (rows_for(run.policy, 2**30, cache_length(run.policy, n)) for n in lengths)
        print(f"{c.mode} on {task.name}: {len(task.train)} training, {len(task.val)} validation, {len(task.test)} test "
              f"problems, {last_iteration(run)} iterations\n{c.model} "
              f"({cfg.dtype}, {f'LoRA rank {cfg.lora_rank}' if cfg.lora_rank else 'all weights'}"
              f"{', fused attention' * bool(cfg.flash)}) on "
              f"{len(jax.devices())} {jax.default_backend()} device(s), up to {first} rollouts at once"
              f"{f', {last} of the longest' * (last < first)}\nwriting {run.directory}", flush=True)
        train(run)
    except UserError as e:
        print(f"espl: error: {e}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        phase = run.phase if run else "load"
        lower = {"load": "--lora-rank", "update": "--microbatch-tokens"}.get(phase, "--max-rows")
        print(f"espl: error: out of memory in phase {phase} ({first_line(e)}); lower {lower} (in a new run also "
              f"--max-new-tokens, --reflect-tokens or --context){again()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        number = signal.Signals(e.args[0] if e.args else signal.SIGINT)
        print(f"\nespl: interrupted by {number.name}{again()}", file=sys.stderr)
        return 128 + number
    print(f"files: {run.directory}" if ALONE else from_tools("evaluate").closing_report(run))
    return 0


if __name__ == "__main__":
    sys.modules["espl"] = sys.modules["__main__"]  # tools that import espl get this very module

    def stop(number, _):  # the first SIGTERM or Ctrl-C is raised wherever the program is, a second one ends it at once
        for s in handled:
            signal.signal(s, signal.SIG_DFL)
        STOPS.append(number)
        sys.unraisablehook = lambda _: None  # half-made objects of libraries complain when they are thrown away
        if not jax.distributed.is_initialized():  # of several processes, `stop_if_told` ends all at the same place
            raise KeyboardInterrupt(number)

    handled = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]  # by `nohup … &`
    for s in handled:
        signal.signal(s, stop)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a task's own processes
    code = main(sys.argv[1:])
    if 0 < code < 128 and jax.distributed.is_initialized():  # not a normal end: the others may wait for this process
        time.sleep(jax.process_index() == 0)  # as long as this one is there, they can say what they have to
        os._exit(code)
    sys.exit(code)
