"""E-SPL: Evolutionary System Prompt Learning for RL in LLMs (arXiv 2602.14697), in one file of JAX.

    python espl.py                                               # all of it in minutes, on any machine (section 8)
    python espl.py --task aime                                   # AIME -> BeyondAIME with Qwen/Qwen3-1.7B from the hub
    python espl.py --task aime --mode rl                         # a baseline: evolution | reflection | rl
    python espl.py --task search --corpus-file passages.jsonl    # a search tool, called in several turns
    python espl.py --resume runs/aime-espl-20260214-120000       # go on from the last checkpoint

Each iteration samples rollouts under several system prompts of a population, takes one policy-gradient step on the
weights, updates every prompt's TrueSkill rating from how it ranked, and breeds new prompts by letting the reference
model reflect on the rollouts. Algorithm 1 is `espl_iteration`; its lines, in order, are

    sample M prompts from S, p_i ~ mu_i + lambda sigma_i     select
    sample N solutions y_ij ~ pi_theta(. | s_i, x)           generate     (section 6)
    r_ij = R(x, y_ij), V_i = mean_j r_ij                     Task.grade, Group.value
    theta <- theta + alpha grad (J - beta KL)                rl_update    (section 7; J is `surrogate`)
    rank by V_i, TrueSkill.update                            update_ratings
    k = argmax V_i; reflect on its rollouts; git.apply       mutate, apply_operations, add_child
    with p_crossover: Algorithm 2                            crossover, crossover_parents, add_child

Where this file departs from the paper (P) or from its released code (C), and why:
 1. Selection: the highest score plus random others (P's "simplified" strategy); --selection has P's softmax and more.
 2. A pool of fewer than M prompts is not padded with copies (C); the others get the spare rollouts: equal budgets.
 3. A child's sigma is sqrt(sigma^2 + dsigma^2) (P's appendix, C), not sigma + dsigma (P's Algorithm 1).
 4. Ties: in the ranking neighbours within 0.01 tie; ties for the best prompt are broken at random, seeded.
 5. Principles go into the system turn (P), not after the problem (C); --prompt-role user for the latter.
 6. A validation split of the training problems picks the checkpoint; the test set only reports, and its questions are
    taken out of the training set. C picks by test score; the paper's figures are running maxima over the test set.
 7. The policy is the tempered softmax: sampler and trainer divide logits by the same temperature. With top_p < 1 the
    sampler renormalises and the trainer does not; the mean importance ratio is logged.
 8. Every reflected operation is checked on its own and dropped alone if it is bad; C lets one bad item spoil the reply,
    lets "B.G0" overwrite A's G0 and creates principles from invented ids.
 9. A principle that gives away a problem the reflector was shown, or its answer, is dropped (unless --allow-leaks).
10. A batch without a learning signal is a logged no-op. Adam's state and the population survive --resume exactly.
11. Search: C has no such task. BM25 over a local file; a response that ends at the limit of calls or of tokens is
    graded as it stands, so it gets the -0.1 of one without an answer.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

for _name, _value in {"TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_VERBOSITY": "error",
                      "DATASETS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}.items():
    os.environ.setdefault(_name, _value)  # libraries speak only when something is wrong

import jax  # noqa: E402  (after the environment is set)
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import trueskill
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from tqdm import tqdm


class UserError(Exception):
    """Bad input. The message is one line that says what to do; the program prints it and exits with code 2."""


def first_line(error: Exception) -> str:
    """The first line of somebody else's error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def cache_directory() -> Path:
    """Where this user's embedded model and search indexes are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espl"


def progress(iterable=None, **kwargs):
    """A progress bar that vanishes when done, so that the log keeps one line an iteration."""
    return tqdm(iterable, leave=False, dynamic_ncols=True, disable=None, **kwargs)


def warn(message: str) -> None:
    """A line to stderr that does not tear a progress bar."""
    tqdm.write(f"espl: warning: {message}", file=sys.stderr)


# ======================================================================================================================
# 2. Config: the flags. Defaults are the paper's (section Hyper-parameters) where it gives them.
# ======================================================================================================================

AIME, AMC = "AI-MO/aimo-validation-aime:train", "AI-MO/aimo-validation-amc:train"
TASKS = {  # --task: (train sets, test sets), each a "data set of the hub:split"
    "aime": ([AIME], ["ByteDance-Seed/BeyondAIME:test"]),
    "aime_amc": ([AIME, AMC], ["ByteDance-Seed/BeyondAIME:test"]),
    "dapo": (["BytedTsinghua-SIA/DAPO-Math-17k:train"], ["yentinglin/aime_2025:train"]),
    "glyphs": ([], []),  # made by the program (section 8)
    "hmmt": ([f"MathArena/hmmt_feb_{y}:train" for y in (2023, 2024, 2025)], ["MathArena/hmmt_nov_2025:train"]),
    "search": (["PeterJinGo/nq_hotpotqa_train:train"], ["PeterJinGo/nq_hotpotqa_train:test"]),
}
TASK_DEFAULTS = {
    "search": dict(train_size=196, test_size=64),
    "glyphs": dict(  # what a model of 146k parameters needs instead of the paper's values
        model="embedded", lora_rank=0, train_size=416, learning_rate=3e-4, max_grad_norm=1.0, temperature=1.0,
        top_p=1.0, max_new_tokens=32, iterations=60, reflect_on="failures", reflect_problems=4, max_operations=1,
        reflect_tokens=128, reflect_temperature=0.5, max_principles=14, test_samples=2, test_greedy=True, save_every=10,
        microbatch_tokens=7200)}
MODES = ("espl", "evolution", "reflection", "rl")
LOSSES = ("importance_sampling", "ppo", "cispo", "reinforce")


def flag(default, group: str, text: str, symbol: str = "", low=None, high=None, choices=None):
    """A field of Config: default, help group, help text, the paper's symbol, bounds or choices."""
    names = dict(group=group, text=text, symbol=symbol, low=low, high=high, choices=choices)
    return field(default=default, metadata=names)


@dataclass
class Config:
    """Everything that decides a run. --help prints this class."""
    task: str = flag("", "Task", "train -> test problems; glyphs (no download) if none is given", choices=tuple(TASKS))
    train_file: str = flag("", "Task", "JSONL of training problems instead (fields: README)")
    test_file: str = flag("", "Task", "JSONL of test problems instead")
    corpus_file: str = flag("", "Task", "search: JSONL of the passages that are searched (fields: README)")
    train_size: int = flag(256, "Task", "most training problems, validation included", low=1)
    test_size: int = flag(0, "Task", "most test problems, drawn by the seed (0: all)", low=0)
    val_size: int = flag(16, "Task", "training problems set aside to pick by; at most a fifth of them", low=0)
    prompts_file: str = flag("", "Task", "what is said to the model (default: prompts_seed.txt beside espl.py)")

    model: str = flag("Qwen/Qwen3-1.7B", "Model", "hub name, local directory, or embedded[:SEED] (section 8)")
    dtype: str = flag("auto", "Model", "activations and frozen weights (auto: bfloat16, on CPU float32)",
                      choices=("auto", "bfloat16", "float32"))
    lora_rank: int = flag(32, "Model", "rank of the adapter; 0 trains all weights", low=0)
    lora_alpha: float = flag(32.0, "Model", "the adapter's output is scaled by alpha / rank", low=0)
    model_parallel: int = flag(1, "Model", "devices along the mesh's model axis; the rest are its data axis", low=1)

    mode: str = flag("espl", "Algorithm 1", "learn weights and prompts, prompts, one prompt, weights", choices=MODES)
    batch_size: int = flag(10, "Algorithm 1", "problems in a batch", "B", low=1)
    num_rollouts: int = flag(5, "Algorithm 1", "rollouts of each prompt on each problem", "N", low=1)
    num_prompts: int = flag(3, "Algorithm 1", "system prompts in a batch", "M", low=1, high=26)
    epochs: int = flag(10, "Algorithm 1", "passes over the training problems", low=1)
    iterations: int = flag(0, "Algorithm 1", "iterations in all, instead of --epochs (0: as the epochs say)", low=0)
    seed: int = flag(0, "Algorithm 1", "decides the whole run", low=0, high=2**31 - 1)

    learning_rate: float = flag(4e-5, "RL update", "Adam's, betas (0.9, 0.95), eps 1e-8", "alpha", low=0)
    loss: str = flag("importance_sampling", "RL update", "surrogate for J", choices=LOSSES)
    baseline: str = flag("prompt", "RL update", "advantage: r - V[i,b], or r - mean over all prompts",
                         choices=("prompt", "marginal"))
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
    slots: int = flag(0, "Sampling", "most rollouts decoded at once (0: as memory allows)", low=0)
    prompt_role: str = flag("system", "Sampling", "turn that carries the system prompt", choices=("system", "user"))
    thinking: bool = flag(True, "Sampling", "passed to the chat template as enable_thinking")

    selection: str = flag("top_random", "Evolution", "how the M prompts are chosen",
                          choices=("top_random", "softmax", "uniform", "ucb", "lucb"))
    selection_temperature: float = flag(1.0, "Evolution", "of --selection softmax", "T", low=1e-6)
    ucb_lambda: float = flag(2.0, "Evolution", "score = mu + lambda sigma", "lambda", low=0)
    window: int = flag(10, "Evolution", "only the most recent prompts are selected", "K", low=1)
    max_pool_size: int = flag(200, "Evolution", "population size; the oldest leaves first", low=1)
    p_crossover: float = flag(0.2, "Evolution", "chance of crossover in an iteration", "p_crossover", low=0, high=1)
    delta_sigma: float = flag(1.0, "Evolution", "uncertainty added to a child's rating", "dsigma", low=0)
    rating: str = flag("trueskill", "Evolution", "last: mu is a prompt's last V_i, and lambda is 0 unless it is given",
                       choices=("trueskill", "last"))

    reflector: str = flag("reference", "Reflection", "pi_ref or pi_theta", choices=("reference", "current"))
    reflect_on: str = flag("contrast", "Reflection", "problems with 0 < V < 1, V < 1, or all",
                           choices=("contrast", "failures", "all"))
    reflect_problems: int = flag(0, "Reflection", "most problems reflected on in an iteration (0: all)", low=0)
    max_operations: int = flag(2, "Reflection", "edits proposed for one problem", "K_ops", low=1)
    reflect_temperature: float = flag(0.6, "Reflection", "sampling temperature (top_p as for rollouts)", low=0)
    reflect_tokens: int = flag(8192, "Reflection", "longest reply", low=1)
    max_principles: int = flag(40, "Reflection", "principles a prompt may have", low=1)
    max_principle_words: int = flag(64, "Reflection", "words a principle may have (it is asked for 32)", low=1)
    allow_leaks: bool = flag(False, "Reflection", "keep principles that give away a training problem or its answer")

    eval_every: int = flag(10, "Evaluation", "iterations between evaluations; the first is before training", low=1)
    test_samples: int = flag(10, "Evaluation", "responses to each problem", low=1)
    test_greedy: bool = flag(False, "Evaluation", "also one greedy response to each test problem")
    test_prompt: str = flag("best", "Evaluation", "prompt tested: highest mu - lambda sigma, or the latest",
                            choices=("best", "latest"))

    run_dir: str = flag("", "Run", "where everything is written (default: runs/<task>-<mode>-<time>)")
    resume: str = flag("", "Run", "run directory to continue; its flags are taken from there")
    save_every: int = flag(1, "Run", "iterations between checkpoints", low=1)
    show_samples: int = flag(0, "Run", "print a response every so many iterations (0: never)", low=0)
    compile_cache: str = flag("~/.cache/espl/jax", "Run", "folder of compiled programs ('': off)")


RESUMABLE = ("epochs", "iterations", "save_every", "show_samples", "slots", "microbatch_tokens", "compile_cache")


def parse_args(argv: list[str]) -> Config:
    """Config from the command line; --resume takes the run's own flags. Raises UserError for impossible values."""
    parser = argparse.ArgumentParser(
        usage="python espl.py [--task TASK] [flags]", description=__doc__.split("\n")[0],
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=120))
    groups = {f.metadata["group"]: None for f in dataclasses.fields(Config)}
    groups = {name: parser.add_argument_group(name) for name in groups}
    for f in dataclasses.fields(Config):
        m, kind = f.metadata, type(f.default)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(
            type=kind, choices=m["choices"], metavar=None if m["choices"] else kind.__name__.upper())
        symbol = f"[{m['symbol']}] " if m["symbol"] else ""
        other = "".join(f"; for {task} {own[f.name]}" for task, own in TASK_DEFAULTS.items() if f.name in own)
        default = f" (default: {f.default}{other})" if f.default != "" else ""
        groups[m["group"]].add_argument("--" + f.name.replace("_", "-"), help=symbol + m["text"] + default, **how)

    def stop(message):
        raise UserError(f"{message}; see python espl.py --help")

    parser.error = stop  # instead of the usage on many lines
    given = vars(parser.parse_args(argv))
    if "corpus_file" in given and given.setdefault("task", "search") != "search":
        raise UserError("--corpus-file is for --task search; leave it out")
    if not given.keys() & {"task", "train_file", "test_file", "resume"}:
        given["task"] = "glyphs"
    saved = TASK_DEFAULTS.get(given.get("task"), {}) | ({"ucb_lambda": 0.0} if given.get("rating") == "last" else {})
    if given.get("resume"):
        path = Path(given["resume"]) / "config.json"
        try:
            saved = json.loads(path.read_text()) | {"run_dir": given["resume"]}
            Config(**saved)
        except (OSError, ValueError, TypeError) as e:  # TypeError: it is the config.json of something else
            raise UserError(f"cannot read {path} ({first_line(e)}); --resume takes an earlier run's directory") from e
        if fixed := [n for n in given if n not in RESUMABLE + ("resume",) and given[n] != saved.get(n)]:
            raise UserError(f"--{fixed[0].replace('_', '-')} cannot change when resuming; start a new run")
    config = Config(**(saved | given))
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not (low <= value <= (value if high is None else high) and math.isfinite(value)):
            limit = f"at least {low}" + (f" and at most {high}" if high else "")
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be {limit}")
    if not (config.task or config.train_file and config.test_file):
        raise UserError("choose a --task, or give --train-file and --test-file; see python espl.py --help")
    return config


# ======================================================================================================================
# 3. Tasks: problems, the words sent to the model, and the reward. Forks start here.
# ======================================================================================================================

SLOTS = {  # sections of prompts_seed.txt and the slots each must contain
    "system": ("principles",), "principles": (), "summarize": ("problem", "response", "grade", "answer"),
    "critique": ("problem", "principles", "attempts", "answer"),
    "aggregate": ("principles", "suggestions"), "crossover": ("sets", "wins"),
}
DEFAULT_PROMPTS = str(Path(__file__).parent / "prompts_seed.txt")


@dataclass(frozen=True)
class Problem:
    """A question x with its accepted answers."""
    id: str
    question: str
    answers: tuple[str, ...]

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
    texts: dict[str, str]                      # this task's sections of prompts_seed.txt
    grade: Callable[[list[tuple[Problem, str]]], list[tuple[float, str]]]  # responses -> (reward at most 1, outcome)
    parse: Callable[[str], list[dict] | None]  # operations in a reply; None: unreadable
    tools: dict[str, Callable[..., str]] = field(default_factory=dict)  # what the model may call while it responds

    @property
    def root(self) -> list[str]:
        """The principles of the root prompt."""
        return [line.strip() for line in self.texts["principles"].splitlines() if line.strip()]


def read_prompts(path: str, task: str) -> dict[str, str]:
    """The sections of a prompts file for a task. Raises UserError naming a missing section or slot."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the prompts file {path}: {first_line(e)}") from e
    _, *parts = re.split(r"^\[([\w.]+)\][ \t]*$", text, flags=re.M)
    sections = {name: body.strip() for name, body in zip(parts[::2], parts[1::2])}
    texts = {}
    for name, slots in SLOTS.items():
        found = [sections[key] for key in (f"{task}.{name}", f"math.{name}", name) if key in sections]
        if not found:
            raise UserError(f"{path} has no section [math.{name}] or [{name}]; copy it from prompts_seed.txt")
        texts[name] = found[0]
        if missing := [s for s in slots if "{" + s + "}" not in texts[name]]:
            raise UserError(f"section [{name}] of {path} lacks the slot {{{missing[0]}}}; put it where it belongs")
    return texts


def fill(template: str, slots: dict[str, str]) -> str:
    """Replace each {slot} in one pass: braces in LaTeX, JSON examples and filled-in text are left alone."""
    return re.sub(r"\{(\w+)\}", lambda m: slots.get(m[1], m[0]), template)


def numbered(principles: list[str], prefix: str = "") -> dict[str, str]:
    """{"G0": first principle, …}, with a set's letter as prefix ("A.G0")."""
    return {f"{prefix}G{i}": text for i, text in enumerate(principles)}


def listing(principles: dict[str, str]) -> str:
    """Principles as a model reads them, one a line with its id."""
    return "\n".join(f"[{i}] {text}" for i, text in principles.items()) or "(none)"


def system_text(task: Task, principles: list[str], tools: str = "") -> str:
    """The system prompt s as the model reads it; the paragraphs of principles and tools are left out without them."""
    slots = {"principles": listing(numbered(principles)) if principles else "", "tools": tools}
    paragraphs = task.texts["system"].split("\n\n")
    kept = [p for p in paragraphs if all(text for name, text in slots.items() if f"{{{name}}}" in p)]
    return fill("\n\n".join(kept), slots)


def rollout_ids(task: Task, chat: "Chat", principles: list[str], problem: Problem) -> list[int]:
    """Token ids of (s, x): the system prompt, the tools, whose description never changes, and the question."""
    schemas = tool_schemas(task.tools)
    if chat.explains(schemas):
        return chat.ids(system_text(task, principles), problem.question, schemas)
    described = "\n".join(json.dumps(schema["function"]) for schema in schemas)
    return chat.ids(system_text(task, principles, described), problem.question)


def to_problem(record: Any, where: str) -> Problem:
    """A Problem from one record of a data set or JSONL file."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; write {{\"problem\": …, \"answer\": …}} on each line")
    match record:
        case {"prompt": [{"content": str(text)}, *_], "reward_model": {"ground_truth": str(answer)}}:  # DAPO-Math-17k
            record = {"problem": "\n\n".join(text.split("\n\n")[1:-1]), "answer": answer}  # first, last part go
    question = record.get("problem") or record.get("question")
    answers = next((record[k] for k in ("answer", "groundtruth", "golden_answers") if record.get(k) is not None), None)
    answers = answers if isinstance(answers, list) else [answers]
    answers = [int(a) if isinstance(a, float) and a.is_integer() else a for a in answers]  # 142.0 in the AMC set
    answers = tuple(str(a).strip() for a in answers if isinstance(a, (str, int, float)) and str(a).strip())
    if not isinstance(question, str) or not question.strip() or not answers:
        raise UserError(f"{where}: needs a text problem|question and an answer|groundtruth|golden_answers")
    return Problem(where, question.strip(), answers)


def read_records(path: str):
    """("file:line", record) for each line of a JSONL file. Raises UserError with file and line number."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {first_line(e)}") from e
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}:{n}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{n}: not JSON ({first_line(e)}); mend or remove this line") from e


def read_jsonl(path: str) -> list[Problem]:
    """Problems of a JSONL file, one a line. Raises UserError with file and line number."""
    return [to_problem(record, where) for where, record in read_records(path)]


def read_passages(path: str) -> list[str]:
    """Title and text of the passages of a JSONL file. Raises UserError with file and line number."""
    passages = []
    for where, record in read_records(path):
        match record:
            case {"text": str(text)}:
                passages.append(f"{record.get('title') or ''}\n{text}".strip())
            case _:
                raise UserError(f'{where}: not a passage; write {{"id": …, "title": …, "text": …}} on each line')
    if not passages:
        raise UserError(f"there is no passage in {path}; choose another --corpus-file")
    return passages


def read_hub(name: str) -> list[Problem]:
    """Problems of a Hugging Face data set 'owner/name:split'."""
    try:
        from datasets import load_dataset
        rows = load_dataset(name.split(":")[0], split=name.split(":")[1])
        return [to_problem(dict(row), f"{name}:{i}") for i, row in enumerate(rows)]
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"cannot load the data set {name} ({first_line(e)}); "
                        "download it where there is a network, or use --train-file and --test-file") from e


def load_task(config: Config) -> Task:
    """Problems, split into train and validation by the seed, and the texts, reward and language of config's task."""
    texts = read_prompts(config.prompts_file or DEFAULT_PROMPTS, config.task)
    hub = TASKS.get(config.task, ([], []))
    made = glyph_problems(config.seed) if config.task == "glyphs" else ([], [])
    languages = {"glyphs": (grade_glyphs, parse_glyphs), "search": (grade_search, parse_operations)}
    grade, parse = languages.get(config.task, (grade_math, parse_operations))
    tools = {"search": search_tool(config.corpus_file)} if config.task == "search" else {}
    if tools and "{tools}" not in texts["system"]:
        raise UserError("the section [system] of the prompts file lacks the slot {tools}; put it where it belongs")

    def read(file, names, made, flag_name):
        problems = read_jsonl(file) if file else made + [p for name in names for p in read_hub(name)]
        if not problems:
            raise UserError(f"there is no problem in {file or names}; choose another {flag_name}")
        return list({p.question: p for p in reversed(problems)}.values())[::-1]  # of duplicates the first

    train = read(config.train_file, hub[0], made[0], "--train-file")
    test = read(config.test_file, hub[1], made[1], "--test-file")
    seen = {p.question for p in test}
    train = [p for p in train if p.question not in seen]  # never train on a test problem
    if 0 < config.test_size < len(test):
        rng = np.random.default_rng([config.seed, zlib.crc32(b"test")])
        test = [test[i] for i in sorted(rng.choice(len(test), config.test_size, replace=False))]
    order = np.random.default_rng([config.seed, zlib.crc32(b"split")]).permutation(len(train))[: config.train_size]
    held = min(config.val_size, len(order) // 5)
    val, train = [train[i] for i in order[:held]], [train[i] for i in order[held:]]
    if not train:
        raise UserError("every training problem is also a test problem; use another --train-file")
    return Task(config.task or Path(config.train_file).stem, train, val, test, texts, grade, parse, tools)


@dataclass
class Chat:
    """Turns texts into token ids through the tokenizer's chat template, the same way everywhere.

    Without a template the plain rendering is system text, blank line, user text, blank line. A template that refuses or
    loses the system turn (Gemma 2) gets the system text at the top of the user turn.
    """
    tokenizer: Any
    role: str = "system"
    thinking: bool = True

    def render(self, messages: list[dict], tools=None) -> str:
        """Text of a conversation that ends where the model's next turn begins."""
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                                  enable_thinking=self.thinking, date_string="26 Jul 2024")

    def explains(self, schemas: list[dict]) -> bool:
        """Whether the chat template itself tells the model of tools, to be called as `call_tool` reads it."""
        with contextlib.suppress(Exception):  # jinja2's TemplateError, or there is no template at all
            text = self.render([{"role": "user", "content": "-"}], schemas)
            return bool(schemas) and "<tool_call>" in text and '"arguments"' in text  # not the XML of some templates
        return False

    def ids(self, system: str, user: str, schemas: list[dict] | None = None) -> list[int]:
        """Token ids of the prompt that ends where the model's turn begins."""
        if not self.tokenizer.chat_template:
            return self.tokenizer("".join(t + "\n\n" for t in (system, user) if t)).input_ids
        apart = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        first, second = (system, user) if self.role == "system" else (user, system)
        joined = [{"role": "user", "content": "\n\n".join(t for t in (first, second) if t)}]
        error = ValueError("it drops the text")
        for messages in [apart, joined] if system and self.role == "system" else [joined]:
            try:
                text = self.render(messages, schemas)
            except Exception as e:  # jinja2's TemplateError: "System role not supported"
                error = e
                continue
            if system.strip() in text:
                return self.tokenizer(text, add_special_tokens=False).input_ids  # the template wrote BOS itself
        raise UserError(f"the tokenizer's chat template fails ({first_line(error)}); mend chat_template")

    def tool_turn(self, reply: str) -> list[int]:
        """Token ids of a tool's reply: they end the model's turn and begin its next one.

        In the template's own tool role, or as a user's turn in tags where it has none; without a template only in tags.
        """
        special = "|".join(map(re.escape, self.tokenizer.all_special_tokens)) or "$^"
        reply = reply.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        reply = re.sub(special, " ", CONTROL.sub(" ", TAGS.sub(" ", reply)))  # no text of a tool may end its turn
        tagged, mark = f"<tool_response>\n{reply}\n</tool_response>", "what the model said"
        for turn in {"role": "tool", "content": reply}, {"role": "user", "content": tagged}:
            messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}, turn]
            with contextlib.suppress(Exception):  # jinja2's TemplateError, or there is no template at all
                after = self.render(messages).partition(mark)[2]
                if reply.strip() in after:
                    return self.tokenizer(after, add_special_tokens=False).input_ids
        return self.tokenizer(f"\n{tagged}\n", add_special_tokens=False).input_ids

    def text(self, tokens: list[int], prompt: list[int] = (), special: bool = False) -> str:
        """A response as text, with or without special tokens; with the <think> that some templates open for it."""
        opened = self.tokenizer.decode(list(prompt[-8:])).rstrip().endswith("<think>")
        return "<think>" * opened + self.tokenizer.decode(tokens, skip_special_tokens=not special)


# ---- Tools: functions of keyword arguments that return a text. Signature and docstring are what the model is told.

CONTROL = re.compile(r"<\|.*?\|>|</?think>|<(?:start|end)_of_turn>|</?s>")  # could leave its turn when tokenised
TAGS = re.compile(r"</?tool_(?:call|response)>")
LONGEST_CALL = 4_000  # characters


def tool_schemas(tools: dict[str, Callable[..., str]]) -> list[dict]:
    """JSON schemas of tools. Raises UserError for a function without type hints or without a docstring."""
    from transformers.utils import get_json_schema
    schemas = []
    for name, tool in tools.items():
        try:
            schema = get_json_schema(tool)
        except Exception as e:
            raise UserError(f"tool {name}: {first_line(e)}; give it type hints and a docstring with Args:") from e
        schemas.append(schema | {"function": schema["function"] | {"name": name}})
    return schemas


def call_tool(tools: dict[str, Callable[..., str]], text: str) -> str:
    """What a tool replies to the call with which `text`, a turn of the model, ends; of a malformed call, why it is.

    A call is <tool_call>{"name": …, "arguments": {…}}</tool_call>. Never raises.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)  # a thought may mention the tags
    before, tag, call = text.partition("</tool_call>")[0].partition("<tool_call>")
    if not tag:
        return "Error: </tool_call> without <tool_call> before it."
    if "<think>" in before.rpartition("</think>")[2]:
        return "Error: a call inside <think> is not made. Write </think> first."
    if "<tool_call>" in call or len(call) > LONGEST_CALL:
        return f"Error: one call in each <tool_call></tool_call>, of at most {LONGEST_CALL} characters."
    try:
        match json.loads(call):
            case {"name": str(name), "arguments": dict(arguments)} if name in tools:
                return str(tools[name](**arguments))
            case {"name": str(), "arguments": dict()}:
                return f"Error: unknown tool. There is: {', '.join(tools)}."
        return 'Error: write <tool_call>{"name": …, "arguments": {…}}</tool_call>.'
    except Exception as e:  # of JSON, of the arguments, or of the tool itself
        return f"Error: {first_line(e)}"


def search_tool(corpus_file: str) -> Callable[..., str]:
    """The tool `search`: the three best passages of a JSONL file (id, title, text) for each query, by BM25.

    The index is kept in the user's cache (bm25s: over 100,000 passages a query takes it a millisecond; rank-bm25, which
    keeps no index, half a second). Raises UserError for a file that cannot be read.
    """
    import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    if not corpus_file:
        raise UserError('--task search needs --corpus-file: JSONL, {"id": …, "title": …, "text": …} on each line')
    passages = read_passages(corpus_file)
    path = cache_directory() / f"bm25-{hashlib.sha256(json.dumps(passages).encode()).hexdigest()[:16]}"
    words = partial(bm25s.tokenize, stopwords="en", show_progress=False)
    try:
        index = bm25s.BM25.load(path, mmap=True)
    except Exception:  # not there, or not complete
        index = bm25s.BM25()
        index.index(words(passages), show_progress=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as part:  # another run may be reading the old one
                index.save(Path(part) / "index", show_progress=False)
                shutil.rmtree(path, ignore_errors=True)
                (Path(part) / "index").rename(path)
        except OSError as e:
            warn(f"could not keep the search index in {path}: {first_line(e)}")

    def search(query_list: list[str]) -> str:
        """Searches an encyclopedia and returns the best passages for each query.

        Args:
            query_list: Questions or key words. Each is searched on its own.
        """
        if not isinstance(query_list, list) or not all(isinstance(q, str) for q in query_list):
            raise ValueError("query_list must be a list of texts")
        replies = []
        for query in query_list[:4]:
            found, scores = index.retrieve(words([query]), k=min(3, len(passages)), show_progress=False,
                                           backend_selection="numpy")  # by default it would use JAX
            hits = [passages[i] for i, score in zip(found[0], scores[0]) if score > 0]
            replies.append("\n\n".join([f"Query: {query}", *(hits or ["Nothing found."])]))
        return "\n\n".join(replies) or "Error: query_list is empty."

    return search


def plain_words(text: str) -> list[str]:
    """Words of an answer to compare: in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def grade_search(pairs: list[tuple[Problem, str]]) -> list[tuple[float, str]]:
    """(reward, outcome) of each response: EM + 0.1 (format - 1), on the model's last turn.

    format: there is exactly one "Answer:"; EM: what follows it equals one of the accepted answers.
    """
    graded = []
    for problem, text in pairs:
        said = final_text(text).split("Answer:")
        words = plain_words(said[1]) if len(said) == 2 else []
        right = words and words in map(plain_words, problem.answers)
        graded.append((1.0, "correct") if right else (0.0, "wrong") if len(said) == 2 else (-0.1, "no_answer"))
    return graded


# ---- Grading mathematics ----

# sympy can loop for ever or eat all memory on `9^{9^{9^9}}`, often inside one C call which no exception interrupts.
# So a process of its own forks one child for each answer, and the kernel enforces both limits on that child: SIGALRM
# keeps its default action, which ends it whatever it is doing. As every child starts from the same state, no answer can
# spoil the verdict on the next. math-verify's own timeouts, made of signals too, stay off.
GRADE_SECONDS, GRADE_BYTES, LONGEST_ANSWER = 5, 400 * 2**20, 1_000  # of time, memory and characters, for each answer
MATH_VERIFY = r"""
import contextlib, json, os, resource, signal, sys
from math_verify import LatexExtractionConfig, parse, verify
seconds, max_bytes = int(sys.argv[1]), int(sys.argv[2])

def read(answer):  # LaTeX only: the plain-text extractor would pick any number out of a sentence
    return parse("\\boxed{" + answer + "}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)

def same(golds, answer):
    parsed = read(answer)
    return any(verify(read(gold), parsed, timeout_seconds=None, raise_on_error=True) for gold in golds)

same(["[1,2)", "x^2-1"], "(x+1)(\\frac{x}{1}-1)")  # fills caches which the children inherit: three times as fast
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
"""


def final_text(text: str) -> str:
    """What follows the last </think>, or all of `text` without one; "" while a <think> is still open."""
    tail = text.rpartition("</think>")[2]
    return "" if "<think>" in tail else tail


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, or None when there is none or its braces do not balance."""
    *before, rest = re.split(r"\\boxed\s*\{", text)
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL) if before else ():  # an escaped brace is one token: ignored
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[: token.start()]
    return None


def plain_integer(text: str) -> int | None:
    """The integer that `text` plainly is (042, 1,000, $-7$.), else None."""
    separator = r"(?:\\,|\{,\}|,(?:\\!)?)"  # of thousands, as LaTeX writers put it:  \,  {,}  ,  ,\!
    match = re.fullmatch(rf"[\s$]*([+-]?(?:[0-9]+|[0-9]{{1,3}}(?:{separator}[0-9]{{3}})+))[\s$.]*", text)
    return int(re.sub(separator, "", match[1])) if match and len(text) <= LONGEST_ANSWER else None


def ask_math_verify(pairs: list[tuple[list[str], str]]) -> list[str]:
    """Verdicts of math-verify on (golds, answer) pairs: correct, wrong, timeout or error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", MATH_VERIFY, str(GRADE_SECONDS), str(GRADE_BYTES)], capture_output=True, text=True,
            input="".join(json.dumps(p) + "\n" for p in pairs), timeout=60 + (GRADE_SECONDS + 1) * len(pairs))
        verdicts, reason = done.stdout.split(), (done.stderr.strip().splitlines() or ["it ended early"])[-1]
    except (OSError, subprocess.TimeoutExpired) as e:
        verdicts, reason = [], first_line(e)
    if len(verdicts) < len(pairs):
        warn(f"{len(pairs) - len(verdicts)} answers not graded ({reason}); try pip install math-verify")
    return verdicts + ["error"] * (len(pairs) - len(verdicts))


def grade_math(pairs: list[tuple[Problem, str]]) -> list[tuple[float, str]]:
    """(reward, outcome) of each response: 1.0 for correct; 0.0 for wrong, no_answer, timeout and error.

    Strict: only the last \\boxed{} of the final text counts. Equal integers and equal strings need no math-verify.
    """
    outcomes, asked = [], []
    for problem, text in pairs:
        answer = (last_boxed(final_text(text)) or "").strip()
        number = plain_integer(answer)
        golds = [g for g in problem.answers if number is None or plain_integer(g) is None]  # else settled by integers
        if not answer:
            outcomes.append("no_answer")
        elif any(answer == g or number is not None and number == plain_integer(g) for g in problem.answers):
            outcomes.append("correct")
        elif not golds or len(answer) > LONGEST_ANSWER:  # a longer box holds a derivation or an attack
            outcomes.append("wrong")
        else:
            outcomes.append(None)
            asked.append((golds, answer))
    verdicts = iter(ask_math_verify(asked) if asked else [])
    outcomes = [o or next(verdicts) for o in outcomes]
    return [(float(o == "correct"), o) for o in outcomes]


# ======================================================================================================================
# 4. Evolution: the population of system prompts, its ratings, and the operators that breed new ones. No JAX in here.
# ======================================================================================================================


@dataclass
class SystemPrompt:
    """Member s of the population S: a list of principles (G0, G1, …; none at the root), rating and lineage."""
    id: int
    principles: list[str]
    mu: float = 25.0               # TrueSkill's defaults (paper, section Hyper-parameters)
    sigma: float = 25.0 / 3
    operation: str = "root"        # root, mutation or crossover
    parents: list[int] = field(default_factory=list)
    iteration: int = 0             # when it was made
    history: list[dict] = field(default_factory=list)  # a line a tournament: iteration, value, rank, mu, sigma
    scores: list[dict] = field(default_factory=list)   # a line an evaluation: iteration, split, score

    def score(self, weight: float) -> float:
        """mu + weight * sigma: optimistic (weight lambda, for selection) or cautious (-lambda, for testing)."""
        return self.mu + weight * self.sigma


@dataclass
class Population:
    """Every prompt ever made, in order of creation (a prompt's id is its index); the youngest are the pool S."""
    prompts: list[SystemPrompt]
    max_pool_size: int

    @property
    def pool(self) -> list[SystemPrompt]:  # Alg. 1's S: beyond max_pool_size the oldest leaves, its record stays
        return self.prompts[-self.max_pool_size:]


def argmax(scores, rng) -> int:
    """Index of the largest score; exact ties are broken by the seeded generator."""
    return int(rng.choice(np.flatnonzero(np.asarray(scores) == max(scores))))


def select(population: Population, config: Config, rng) -> list[SystemPrompt]:
    """M distinct prompts of the K most recent ones, all while there are fewer   (Alg. 1; section Selection)."""
    window = population.pool[-config.window:]
    scores = np.array([s.score(config.ucb_lambda) for s in window])
    order = rng.permutation(len(window))  # ties, and the random rest, in random order
    match config.selection:
        case "top_random":  # "always add the highest score, but randomly sample from the rest of the sliding window"
            best = argmax(scores, rng)
            order = sorted(order, key=lambda i: i != best)
        case "softmax":     # p_i ~ exp(score_i / T) without replacement: the largest of score / T + Gumbel noise
            noisy = scores / config.selection_temperature + rng.gumbel(size=len(window))
            order = sorted(order, key=lambda i: -noisy[i])
        case "ucb":
            order = sorted(order, key=lambda i: -scores[i])
        case "lucb":        # the best lower bound, then the best upper bounds
            champion = max(order, key=lambda i: window[i].score(-config.ucb_lambda))
            order = sorted(order, key=lambda i: (i != champion, -scores[i]))
    return sorted((window[i] for i in order[: config.num_prompts]), key=lambda s: s.id)


def update_ratings(prompts: list[SystemPrompt], values: list[float], iteration: int, rating="trueskill") -> None:
    """One TrueSkill free-for-all of the prompts, ranked by V_i; neighbours in rank within 0.01 tie   (Alg. 1)."""
    order = sorted(range(len(prompts)), key=lambda i: (-values[i], prompts[i].id))
    ranks = [0] * len(prompts)
    for better, worse in zip(order, order[1:]):
        ranks[worse] = ranks[better] + (values[better] - values[worse] > 0.01 + 1e-9)
    if rating == "last":  # an ablation: what earlier tournaments said is forgotten, every prompt is as certain
        for s, v in zip(prompts, values):
            s.mu, s.sigma = v, 1.0
    elif len(prompts) > 1:
        env = trueskill.TrueSkill(mu=25.0, sigma=25.0 / 3, beta=25.0 / 6, tau=25.0 / 300, draw_probability=0.10)
        order.sort(key=lambda i: (ranks[i], prompts[i].id))  # rounding must not depend on the order they came in
        teams = [(env.create_rating(prompts[i].mu, prompts[i].sigma),) for i in order]
        for i, (r,) in zip(order, env.rate(teams, [ranks[i] for i in order])):
            prompts[i].mu, prompts[i].sigma = r.mu, r.sigma
    for s, v, rank in zip(prompts, values, ranks):
        s.history.append({"iteration": iteration, "value": v, "rank": rank, "mu": s.mu, "sigma": s.sigma})


# ---- Operations: what a reflection may do to a list of principles ----

FIELD = re.compile(  # "name": "text" or a list, or the end of the object
    r'"(\w+)"\s*:\s*("(?:[^"\\]|\\.)*+"|\[(?:[^][{}"]|"[^"]*")*+\])|\}', re.S)
BACKSLASH = re.compile(  # an escape of JSON, unless LaTeX is likelier (\frac, \neq), or (group 1) one to be doubled
    r'\\(?:["\\/]|[bfrt](?![a-zA-Z])|n(?!(?:abla|eq?|eg|i|mid|ot|otin|u|leq|geq)\b)|u[0-9a-fA-F]{4})|(\\)')


def parse_operations(reply: str) -> list[dict] | None:
    """The JSON list of operations at the end of a reply, read leniently; None when there is none ([] is an answer).

    Copes with prose and several fences around it, comments, trailing commas, LaTeX backslashes, raw newlines in strings
    and a list that breaks off (complete operations count). Text inside <think>…</think> is never read.
    """
    text = final_text(reply)
    fenced = re.findall(r"```(?:json)?\s*(.*?)(?:```|\Z)", text, re.S)
    for block in fenced[::-1] + [re.split(r"\[(?=\s*\{)", text)[-1], text]:
        operations, fields = [], {}
        for m in FIELD.finditer(block):
            if m[0] == "}":
                operations += [fields] if "operation" in fields else []
                fields = {}
            elif m[2][0] == "[":
                fields[m[1]] = [i.strip("[] ") for i in re.findall(r'"([^"]*)"', m[2])]  # ids as in `listing`
            elif m[1] in ("modified_from", "remove_id"):
                fields[m[1]] = m[2].strip('"[] ')
            else:
                with contextlib.suppress(ValueError):  # half an escape
                    fields[m[1]] = json.loads(BACKSLASH.sub(r"\g<0>\1", m[2]), strict=False)
        if operations or re.search(r"(?<!= )\[\s*\]$", block.rstrip("`*. \n")):
            return operations
    return None


def leaks(principle: str, problems: list[Problem]) -> bool:
    """True if a principle gives away one of these problems: twelve words of it in a row, or an answer that is a number
    of three digits or more or another text of six characters or more."""
    words = lambda text: re.findall(r"\w+", text.lower())
    said = f" {' '.join(words(principle))} "
    for problem in problems:
        text = words(problem.question)  # of a shorter one all of it, unless that is five words or fewer
        if any(f" {' '.join(text[i: i + 12])} " in said for i in range(max(len(text) - 11, len(text) > 5))):
            return True
        for answer in ("".join(a.split()) for a in problem.answers):
            if re.fullmatch(r"-?\d[\d,.]*", answer):
                number = rf"(?<![\d.]){re.escape(answer)}(?!\d|\.\d)"
                if sum(map(str.isdigit, answer)) >= 3 and re.search(number, principle):
                    return True
            elif len(answer) >= 6 and answer in "".join(principle.split()):
                return True
    return False


def fault(op: Any, kinds: tuple[str, ...], ids, problems: list[Problem], config: Config) -> str:
    """Why this operation must be dropped; "" if it may be applied to principles with these ids."""
    if not isinstance(op, dict) or op.get("operation") not in kinds:
        return "unknown operation"
    named = {"add": [], "modify": [op.get("modified_from")], "merge": op.get("merged_from"),
             "remove": [op.get("remove_id")]}[op["operation"]]
    if not isinstance(named, list) or not all(isinstance(i, str) and i in ids for i in named):
        return "unknown id"
    if op["operation"] == "merge" and len(set(named)) < 2:
        return "merge of fewer than two"
    if op["operation"] == "remove":
        return ""
    text = op.get("principle")
    if not isinstance(text, str) or not text.strip() or not " ".join(text.split()).isprintable():
        return "no text"  # or one that no tokenizer takes: half a surrogate pair
    if CONTROL.search(text):
        return "control token"
    if len(text.split()) > config.max_principle_words or len(text) > 12 * config.max_principle_words:
        return "too long"
    return "leaks a problem" if not config.allow_leaks and leaks(text, problems) else ""


def valid(ops: list, kinds, ids, problems, config: Config, dropped: Counter) -> list[dict]:
    """The valid ones among ops; each of the others is dropped alone and counted by its fault."""
    faults = [fault(op, kinds, ids, problems, config) for op in ops]
    dropped.update(filter(None, faults))
    return [op for op, why in zip(ops, faults) if not why]


def apply_operations(principles: dict[str, str], ops: list[dict], kinds, problems, config: Config, dropped: Counter):
    """git.apply(s, diff): the principles after the valid operations, in order, as a list (renumbered G0, G1, …)."""
    result = dict(principles)
    for n, op in enumerate(ops):
        if not valid([op], kinds, result, problems, config, dropped):  # ids as earlier operations left them
            continue
        text = " ".join(str(op.get("principle")).split())
        match op["operation"]:
            case "add":
                result[n] = text  # not a string: no later operation can name it
            case "modify":
                result[op["modified_from"]] = text
            case "remove":
                del result[op["remove_id"]]
            case "merge":  # the merged principle takes the place of its first source
                first, *rest = dict.fromkeys(op["merged_from"])
                result = {i: text if i == first else t for i, t in result.items() if i not in rest}
    unique = list({text.casefold(): text for text in result.values()}.values())
    kept = unique[: config.max_principles]
    dropped.update({"duplicate": len(result) - len(unique), "too many principles": len(unique) - len(kept)})
    return kept


# ---- Reflection: mutation and crossover ----
# ask(request, [slots, …]) -> [reply, …] samples the reflection model on a batch of filled-in requests from
# prompts_seed.txt. `log` is the iteration's record: what was made or dropped, and why.


def ask_operations(ask, task: Task, request: str, slots: list[dict], log: dict) -> list[list | None]:
    """Replies to requests as lists of operations; those that do not parse are asked once more, then None."""
    parsed = [task.parse(reply) for reply in ask(request, slots)]
    again = [i for i, ops in enumerate(parsed) if ops is None]
    if again:
        for i, reply in zip(again, ask(request, [slots[i] for i in again])):
            parsed[i] = task.parse(reply)
    log["parse_failures"] += sum(ops is None for ops in parsed)
    return parsed


@dataclass
class Group:
    """A group: the N rollouts of one system prompt on one problem, graded."""
    problem: Problem
    texts: list[str]
    rewards: list[float]                                # r[i, b, j], at most 1
    outcomes: list[str] = field(default_factory=list)   # correct, wrong, no_answer, timeout or error
    prompt_ids: list[int] = field(default_factory=list)
    responses: list = field(default_factory=list)       # Response of section 6, for the RL update

    @property
    def value(self) -> float:  # V[i, b]
        return float(np.mean(self.rewards))

    @property
    def graded(self) -> list[str]:  # "correct" means a reward of at least a half
        return ["correct" if r >= 0.5 else "wrong" for r in self.rewards]

    @property
    def contrast(self) -> bool:  # 0 < V[i, b] < 1, or successes and failures, as a reward may be negative
        return 0 < self.value < 1 or len(set(self.graded)) == 2


def critique_slots(problem: Problem, principles: dict, summaries: list[tuple[str, str]], max_operations: int) -> dict:
    """Slots of a critique request: one problem, with the (grade, summary) of each rollout."""
    attempts = [f"Attempt {j + 1} ({grade}):\n{text}" for j, (grade, text) in enumerate(summaries)]
    return dict(problem=problem.question, answer=problem.answer, principles=listing(principles),
                attempts="\n\n".join(attempts), max_operations=str(max_operations))


def aggregate_slots(principles: dict, proposals: list[dict]) -> tuple[dict, dict]:
    """The principles with the proposed new ones as candidates C0, C1, …, and the slots of the aggregation request."""
    added = [" ".join(op["principle"].split()) for op in proposals if op["operation"] == "add"]
    candidates = principles | {f"C{i}": text for i, text in enumerate(added)}
    changes = [f"[{op['modified_from']}] -> {op['principle']}" for op in proposals if op["operation"] == "modify"]
    return candidates, dict(principles=listing(candidates), suggestions="\n".join(changes) or "(none)")


def crossover_slots(sets: dict[str, list[str]], wins: list[tuple[str, int, Problem]]) -> dict:
    """Slots of a crossover request: the sets of principles by letter, and (letter, number, problem) of each win."""
    lists = [f"Set {x}:\n{listing(numbered(principles, x + '.'))}" for x, principles in sets.items()]
    won = [f"Problem {b} (won by set {x}):\n{problem.question}" for x, b, problem in wins]
    return dict(sets="\n\n".join(lists), wins="\n\n".join(won))


def mutate(parent: SystemPrompt, groups: list[Group], ask, task: Task, config: Config, log: dict) -> list[str] | None:
    """Principles of a child of the best prompt, from contrasting its successes and failures; None: no child (log says
    why).   (Alg. 1, mutation step; appendix LLM-Based Self-Reflection: summarise, critique, aggregate, apply)"""
    wanted = {"contrast": lambda g: g.contrast, "failures": lambda g: g.value < 1, "all": lambda g: True}
    chosen = [g for g in groups if wanted[config.reflect_on](g)][: config.reflect_problems or None]
    if not chosen:
        log["mutation"] = f"none: no problem to reflect on ({config.reflect_on})"
        return None
    current, problems = numbered(parent.principles), [g.problem for g in chosen]
    # App. Trajectory Summarization: one request a rollout, given its grade and the truth
    summaries = iter(ask("summarize", [  # in the order in which the critiques below take them
        dict(problem=g.problem.question, answer=g.problem.answer, principles=listing(current),
             response=text, grade=grade)
        for g in chosen for text, grade in zip(g.texts, g.graded)]))
    # App. Self-Critique and Local Edit Proposal: one request a problem, at most K_ops operations each
    critiques = ask_operations(ask, task, "critique", [
        critique_slots(g.problem, current, [(grade, next(summaries)) for grade in g.graded], config.max_operations)
        for g in chosen], log)
    proposals = []
    for ops in critiques:
        good = valid(ops or [], ("add", "modify"), current, problems, config, log["dropped"])
        log["dropped"].update({"beyond K_ops": max(0, len(good) - config.max_operations)})
        proposals += good[: config.max_operations]
    if not proposals:
        unread = sum(ops is None for ops in critiques)
        log["mutation"] = f"none: no valid proposal ({unread} of {len(critiques)} critiques did not parse)"
        return None
    # App. Local-to-Global Aggregation: one request for all proposals
    candidates, slots = aggregate_slots(current, proposals)
    [plan] = ask_operations(ask, task, "aggregate", [slots], log)
    if plan is None:
        log["mutation"] = "none: the revision plan did not parse"
        return None
    return apply_operations(candidates, plan, ("modify", "merge"), problems, config, log["dropped"])


def crossover_parents(values_MB: np.ndarray, best: int) -> dict[int, list[int]]:
    """{prompt: problems it strictly won}, the best prompt first; {} if it, or all others, won none (Alg. 2, Phi)."""
    if len(values_MB) < 2:
        return {}
    second, first = np.sort(values_MB, axis=0)[-2:]
    winner_B = np.where(first - second >= 0.01 - 1e-9, values_MB.argmax(0), -1)
    wins = {i: np.flatnonzero(winner_B == i).tolist() for i in [best, *range(len(values_MB))]}
    wins = {i: won for i, won in wins.items() if won}
    return wins if best in wins and len(wins) > 1 else {}


def crossover(prompts: list[SystemPrompt], groups_MB: list[list[Group]], best: int, ask, task: Task, config: Config,
              log: dict) -> tuple[list[str], list[SystemPrompt]] | None:
    """Principles of a child of several prompts, and its parents (the best one first); None: no child   (Alg. 2)."""
    values_MB = np.array([[g.value for g in row] for row in groups_MB])
    if not (wins := crossover_parents(values_MB, best)):
        log["crossover"] = "none: fewer than two prompts, or not the best one, won a problem strictly"
        return None
    problems = [g.problem for g in groups_MB[0]]
    letters = dict(zip(wins, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    slots = crossover_slots({x: prompts[i].principles for i, x in letters.items()},
                            [(letters[i], b, problems[b]) for i in wins for b in wins[i]])
    [ops] = ask_operations(ask, task, "crossover", [slots], log)
    if ops is None:
        log["crossover"] = "none: the reply did not parse"
        return None
    current = numbered(prompts[best].principles, "A.")
    child = apply_operations(current, ops, ("add", "modify", "remove"), problems, config, log["dropped"])
    return child, [prompts[i] for i in wins]


def add_child(population: Population, principles: list[str] | None, parents: list[SystemPrompt], operation: str,
              iteration: int, config: Config, log: dict) -> SystemPrompt | None:
    """Append a child with its inherited rating (Alg. 1 and 2, last steps), unless it equals a prompt that exists."""
    if principles is None:
        return None
    same = [s for s in population.prompts if s.principles == principles]
    if same:
        log[operation] = f"none: nothing changed (equal to prompt {same[0].id})"
        return None
    # Mutation: one parent, (mu_k, sqrt(sigma_k^2 + dsigma^2)). Crossover: the parents' precision-weighted mean.
    precision = [s.sigma**-2 for s in parents]
    mu = sum(p * s.mu for p, s in zip(precision, parents)) / sum(precision)
    sigma = math.sqrt(1 / sum(precision) + config.delta_sigma**2)
    ids = [s.id for s in parents]
    child = SystemPrompt(len(population.prompts), principles, mu, sigma, operation, ids, iteration)
    population.prompts.append(child)
    log[operation] = f"prompt {child.id} from {' and '.join(map(str, ids))}"
    return child


# ======================================================================================================================
# 5. Model: one decoder for Llama 2/3.x, Gemma 2, Gemma 3 (text), Qwen 2.5 and Qwen 3
#
# Axes: B batch, T query, S key, N query heads, K key/value heads, G = N/K, H head dim, D model dim, F feed-forward dim,
# V vocabulary, L layers, R LoRA rank. The truth for every number here is transformers' modeling_*.py (tested to 1e-4).
# ======================================================================================================================

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
    gemma: bool = False              # (1 + w) norms in float32, norms after attention and MLP, scaled embeddings, GELU
    attention_scale: float = 1.0
    attention_cap: float = 0.0       # tanh soft cap on attention scores; 0 = none
    logit_cap: float = 0.0           # tanh soft cap on the final logits; 0 = none
    dtype: str = "float32"           # of activations and frozen weights; norms and trained weights stay float32
    lora_rank: int = 0               # 0 = no adapter, every weight is trained
    lora_alpha: float = 32.0


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
    """ModelConfig of a directory in Hugging Face layout. Raises UserError for a model this file does not implement."""
    from transformers import AutoConfig
    try:
        whole = AutoConfig.from_pretrained(directory)
    except Exception as e:
        raise UserError(f"cannot read config.json of {directory}: {first_line(e)}") from e
    hf = whole.get_text_config()
    if hf.model_type not in FAMILIES:
        raise UserError(f"model_type {hf.model_type!r} is not supported; choose a --model of {', '.join(FAMILIES)}")
    if any(getattr(c, "quantization_config", None) for c in (whole, hf)):
        raise UserError("quantized checkpoints are not supported; use the bf16 or fp32 weights of this model")
    if getattr(hf, "use_bidirectional_attention", False):
        raise UserError("bidirectional attention (an embedding model's) is not supported; use another --model")
    gemma = hf.model_type.startswith("gemma")
    H = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    activation = getattr(hf, "hidden_activation", None) or getattr(hf, "hidden_act", None)
    if activation != ("gelu_pytorch_tanh" if gemma else "silu"):
        raise UserError(f"activation {activation!r} is not supported for model_type {hf.model_type}")
    types = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    rope = hf.rope_parameters if "full_attention" in hf.rope_parameters else {t: hf.rope_parameters for t in types}
    kinds = sorted(set(types))
    biased = {"q_proj", "k_proj", "v_proj"} if hf.model_type == "qwen2" else set()
    if getattr(hf, "attention_bias", False) and hf.model_type != "qwen2":
        biased = {"q_proj", "k_proj", "v_proj", "o_proj"}
    biased |= {"gate_proj", "up_proj", "down_proj"} if getattr(hf, "mlp_bias", False) else set()
    return ModelConfig(
        num_layers=hf.num_hidden_layers, model_dim=hf.hidden_size, mlp_dim=hf.intermediate_size,
        num_heads=hf.num_attention_heads, num_kv_heads=hf.num_key_value_heads, head_dim=H, vocab_size=hf.vocab_size,
        max_context=hf.max_position_embeddings, norm_eps=hf.rms_norm_eps, tied=bool(hf.tie_word_embeddings),
        rope_frequencies=tuple(rope_frequencies(rope[k], H) for k in kinds), layer_rope=tuple(map(kinds.index, types)),
        layer_window=tuple(hf.sliding_window if t == "sliding_attention" else PAD_POSITION for t in types),
        biased=frozenset(biased), qk_norm=hf.model_type in ("qwen3", "gemma3_text"), gemma=gemma,
        attention_scale=hf.query_pre_attn_scalar**-0.5 if gemma else H**-0.5,
        attention_cap=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(hf, "final_logit_softcapping", None) or 0.0,
        dtype=dtype, lora_rank=lora_rank, lora_alpha=lora_alpha)


@jax.custom_vjp
def matmul(x, w):
    """x W. Its gradient x^T g is written so that the smaller of x and g is transposed: XLA on CPUs copies it first."""
    return x @ w


def matmul_backward(saved, g):
    """(g W^T, x^T g), the latter of shape [a, b] for x [..., a] and g [..., b]."""
    x, w = saved
    wide = w.shape[1] >= w.shape[0]
    dw = jnp.einsum("...a,...b->ab", *((x, g) if wide else (g, x)))
    return g @ w.T, dw if wide else dw.T


matmul.defvjp(lambda x, w: (x @ w, (x, w)), matmul_backward)


class Linear(nnx.Module):
    """y = x W + b + (alpha / R) (x A) B; A, B is the LoRA adapter, present when lora_rank > 0, and B starts at zero."""

    lora_a = lora_b = None  # without an adapter, and once it is merged

    def __init__(self, cfg: ModelConfig, name: str, d_in: int, d_out: int, rngs: nnx.Rngs):
        # Trained weights are kept in float32 (Adam's steps of 4e-5 vanish in bf16); frozen ones in cfg.dtype.
        dtype = jnp.dtype(cfg.dtype) if cfg.lora_rank else jnp.float32
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out), dtype) * d_in**-0.5)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if name in cfg.biased else None
        if cfg.lora_rank:
            self.scale = cfg.lora_alpha / cfg.lora_rank
            a = jax.random.uniform(rngs.params(), (d_in, cfg.lora_rank), minval=-(d_in**-0.5), maxval=d_in**-0.5)
            self.lora_a = nnx.LoRAParam(a)
            self.lora_b = nnx.LoRAParam(jnp.zeros((cfg.lora_rank, d_out)))

    def __call__(self, x):  # [..., d_in] -> [..., d_out]
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + matmul(matmul(x, self.lora_a[...].astype(x.dtype)), self.lora_b[...].astype(x.dtype)) * self.scale
        return checkpoint_name(y, "linear")

    def merge(self):
        """Add the adapter into the kernel."""
        if self.lora_a is not None:
            self.kernel[...] += self.lora_a[...] @ self.lora_b[...] * self.scale
            del self.lora_a, self.lora_b


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis. Llama casts, then scales; Gemma scales by (1 + w), then casts."""

    def __init__(self, cfg: ModelConfig, dim: int):
        self.cfg = cfg
        self.scale = nnx.Param(jnp.zeros(dim) if cfg.gemma else jnp.ones(dim))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.cfg.norm_eps)
        if self.cfg.gemma:
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
    if T > 512:  # long sequences: queries in blocks, recomputed in the backward pass, so that [T, S] is never stored
        q = jnp.pad(q_BTNH, ((0, 0), (0, -T % 512), (0, 0), (0, 0))).reshape(B, -1, 512, N, H).swapaxes(0, 1)
        p = jnp.pad(query_position_BT, ((0, 0), (0, -T % 512))).reshape(B, -1, 512).swapaxes(0, 1)
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
    """One layer: attention and gated MLP, each on a normed residual stream (Gemma norms their outputs as well)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        D, F, H, N, K = cfg.model_dim, cfg.mlp_dim, cfg.head_dim, cfg.num_heads, cfg.num_kv_heads
        self.cfg = cfg
        self.attention_norm, self.mlp_norm = RMSNorm(cfg, D), RMSNorm(cfg, D)
        for name, d_in, d_out in (("q_proj", D, N * H), ("k_proj", D, K * H), ("v_proj", D, K * H),
                                  ("o_proj", N * H, D), ("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
            setattr(self, name, Linear(cfg, name, d_in, d_out, rngs))
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg, H), RMSNorm(cfg, H)
        if cfg.gemma:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(cfg, D), RMSNorm(cfg, D)

    def __call__(self, x_BTD, cos, sin, position_BT, window, prefix=None, cache=None):
        cfg, (B, T, _) = self.cfg, x_BTD.shape
        h = self.attention_norm(x_BTD)
        q, k, v = (p(h).reshape(B, T, -1, cfg.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, cos, sin), rotate(k, cos, sin).swapaxes(1, 2), v.swapaxes(1, 2)
        key_position_BS, new = position_BT, (k, v)
        if cache is not None:  # a token at position p lives in cache slot p; padding (position >= S) is dropped
            rows, heads = jnp.arange(B)[:, None, None], jnp.arange(k.shape[1])[None, :, None]
            new = k, v = tuple(old.at[rows, heads, position_BT[:, None]].set(x, mode="drop")
                               for old, x in zip(cache, new))
            key_position_BS = jnp.broadcast_to(jnp.arange(k.shape[2]), (B, k.shape[2]))
        elif prefix is not None:
            k, v = (jnp.concatenate(x, 2) for x in zip(prefix[:2], new))
            key_position_BS = jnp.concatenate([prefix[2], position_BT], 1)
        h = self.o_proj(attention(q, k, v, position_BT, key_position_BS, window, cfg).reshape(B, T, -1))
        x_BTD = x_BTD + (self.attention_post_norm(h) if cfg.gemma else h)
        h = self.mlp_norm(x_BTD)
        gate = self.gate_proj(h)
        h = self.down_proj((jax.nn.gelu(gate) if cfg.gemma else jax.nn.silu(gate)) * self.up_proj(h))
        return constrain(x_BTD + (self.mlp_post_norm(h) if cfg.gemma else h), "data", None, None), new


class Transformer(nnx.Module):
    """Decoder-only language model; its L layers are stacked and scanned, so compile time does not grow with L."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        dtype = jnp.dtype(cfg.dtype) if cfg.lora_rank else jnp.float32
        table = lambda: nnx.Param(jax.random.normal(rngs.params(), (cfg.vocab_size, cfg.model_dim), dtype) * 0.02)  # VD
        self.embed = table()
        if not cfg.tied:
            self.lm_head = table()
        self.final_norm = RMSNorm(cfg, cfg.model_dim)
        stack = nnx.split_rngs(splits=cfg.num_layers)(nnx.vmap(lambda r: Block(cfg, r), in_axes=0, out_axes=0))
        self.layers = stack(rngs)

    def unstacked(self) -> list[Block]:
        """The layers one by one, for calls with a cache; in float32 with the adapter added into the weights."""
        graphdef, weights = nnx.split(self.layers)
        blocks = [nnx.merge(graphdef, jax.tree.map(lambda w: w[i], weights)) for i in range(self.cfg.num_layers)]
        for linear in (x for block in blocks for x in vars(block).values() if isinstance(x, Linear)):
            if self.cfg.dtype == "float32":  # bfloat16 would round a small adapter away
                linear.merge()
        return blocks

    def __call__(self, token_BT, position_BT, prefix=None, cache=None, layers=None, remat=""):
        """Final hidden states [B, T, D], and these tokens' keys and values.

        Padding, left or right, is any token at PAD_POSITION. Queries see the given tokens and either of
          prefix: (what an earlier call on P prompts returned, their positions [P, S], the prompt of each row [B]);
          cache: keys and values [B, K, S, H] for each layer. The new ones are written into it, and it is returned;
          layers may hold what `unstacked` returns.
        Without a cache the keys and values are returned stacked, each [L, B, K, T, H]. remat: what the backward pass
        computes again, "" nothing, "layer" all of a layer, "linear" all but the outputs of its linear maps.
        """
        cfg = self.cfg
        x_BTD = self.embed[...][token_BT].astype(cfg.dtype)
        if cfg.gemma:
            x_BTD = x_BTD * jnp.asarray(cfg.model_dim**0.5, cfg.dtype)
        x_BTD = constrain(x_BTD, "data", None, None)
        angle = position_BT[None, :, :, None] * jnp.array(cfg.rope_frequencies, jnp.float32)[:, None, None, :]
        cos, sin = jnp.cos(angle).astype(cfg.dtype), jnp.sin(angle).astype(cfg.dtype)  # [kinds, B, T, H/2]
        if cache is not None:  # a loop: in a scan every step would copy each layer's weights and cache
            new = []
            for block, rope, window, old in zip(layers or self.unstacked(), cfg.layer_rope, cfg.layer_window, cache):
                x_BTD, layer_cache = block(x_BTD, cos[rope], sin[rope], position_BT, window, cache=old)
                new.append(layer_cache)
            return self.final_norm(x_BTD), new
        graphdef, weights = nnx.split(self.layers)
        keys_values, prefix_position, owner_B = prefix or (None, None, None)

        def layer(x_BTD, xs):  # a scan: compile time does not grow with L
            weights, rope, window, old = xs
            before = old and tuple(x[owner_B] for x in (*old, prefix_position))  # of each row, its prompt's
            return nnx.merge(graphdef, weights)(x_BTD, cos[rope], sin[rope], position_BT, window, before)

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


# One table says how everything is laid out on the `data x model` mesh: path of the weight -> PartitionSpec.
SHARDING = (
    (r"embed|lm_head", P("model", None)),                                       # VD
    (r"layers/(q|k|v|gate|up)_proj/(kernel|lora_b)", P(None, None, "model")),   # L, in, out
    (r"layers/(o|down)_proj/(kernel|lora_a)", P(None, "model", None)),
    (r"layers/(q|k|v|gate|up)_proj/bias", P(None, "model")),
    (r"", P()),                                                                 # norms and the rest: on every device
)


def fit_spec(spec, shape, mesh) -> P:
    """The spec without the axes that do not divide their dimension (7 heads over 2 devices: not sharded)."""
    return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape)))


def constrain(x, *spec):
    """with_sharding_constraint on the current mesh; no mesh, no constraint."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh))


def path_name(path) -> str:
    """'layers/q_proj/kernel' for the tree path of a weight."""
    return "/".join(str(k.key) for k in path if hasattr(k, "key"))


def weight_sharding(path: str, shape, mesh) -> jax.sharding.NamedSharding:
    """Layout of the weight at `path` according to SHARDING."""
    spec = next(s for pattern, s in SHARDING if re.search(pattern, path))
    return jax.sharding.NamedSharding(mesh, fit_spec(spec, shape, mesh))


def open_checkpoint(directory: str) -> dict[str, Any]:
    """{name: lazy safetensors slice} of the text model's tensors in a directory, names without `model.` prefixes."""
    from safetensors import safe_open
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            handle = safe_open(file, framework="np")
        except Exception as e:
            raise UserError(f"cannot read {file}: {first_line(e)}; download it again") from e
        for name in handle.keys():
            if not re.search(r"vision_tower|multi_modal_projector|rotary_emb", name):
                tensors[re.sub(r"^(model\.|language_model\.)+", "", name)] = handle.get_slice(name)
    if not tensors:
        raise UserError(f"no *.safetensors in {directory}; convert the checkpoint to safetensors first")
    return tensors


def tensor_names(path: str, cfg: ModelConfig) -> list[str]:
    """Names in the checkpoint of the tensors (one a layer) that make up our weight at `path`."""
    if not path.startswith("layers/"):
        return [{"embed": "embed_tokens.weight", "lm_head": "lm_head.weight", "final_norm/scale": "norm.weight"}[path]]
    _, module, leaf = path.split("/")
    norms = {"attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
             "mlp_norm": "pre_feedforward_layernorm" if cfg.gemma else "post_attention_layernorm",
             "mlp_post_norm": "post_feedforward_layernorm"}
    group = "" if module in norms else "mlp." if module in ("gate_proj", "up_proj", "down_proj") else "self_attn."
    suffix = "bias" if leaf == "bias" else "weight"
    return [f"layers.{i}.{group}{norms.get(module, module)}.{suffix}" for i in range(cfg.num_layers)]


def load_weight(path: str, leaf, tensors: dict[str, Any], cfg: ModelConfig, mesh):
    """One weight as a sharded array; only the slices that each device holds are read."""
    sharding, names = weight_sharding(path, leaf.shape, mesh), tensor_names(path, cfg)
    transposed, stacked = path.endswith("kernel"), path.startswith("layers/")  # torch keeps [out, in]

    def read(index):  # index: for every axis of the stacked weight, the slice that one device holds
        inner = index[stacked:][::-1] if transposed else index[stacked:]
        parts = [tensors[name][inner] for name in (names[index[0]] if stacked else names)]
        parts = [p.T if transposed else p for p in parts]
        return (np.stack(parts) if stacked else parts[0]).astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def save_weights(directory: Path, weights, cfg: ModelConfig) -> None:
    """Write a model's weights (no adapter) as Hugging Face's model.safetensors."""
    from safetensors.numpy import save_file
    tensors = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        path, stacked = path_name(key), path_name(key).startswith("layers/")
        for name, x in zip(tensor_names(path, cfg), np.asarray(leaf) if stacked else [np.asarray(leaf)]):
            name = name if name.startswith("lm_head") else f"model.{name}"
            tensors[name] = np.ascontiguousarray(x.T if path.endswith("kernel") else x)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@dataclass
class Policy:
    """pi_theta and pi_ref: one set of frozen weights under two sets of trainable ones.

    theta is what RL changes: the LoRA adapter, or every weight when lora_rank is 0. theta_ref is its first value: with
    LoRA an adapter whose B is zero, hence exactly the base model at no cost in memory, else a full copy.
    """
    cfg: ModelConfig
    graphdef: Any
    frozen: nnx.State
    theta: nnx.State
    theta_ref: nnx.State
    mesh: Any


def make_policy(model: Transformer, mesh) -> Policy:
    """Split a model into trainable and frozen weights."""
    trainable = nnx.LoRAParam if model.cfg.lora_rank else nnx.Param
    graphdef, theta, frozen = nnx.split(model, trainable, ...)
    return Policy(model.cfg, graphdef, frozen, theta, jax.jit(partial(jax.tree.map, jnp.copy))(theta), mesh)


def load_policy(directory: str, cfg: ModelConfig, mesh, seed: int = 0) -> Policy:
    """The checkpoint's weights on the mesh, with a fresh adapter. Errors (UserError) name the tensor."""
    tensors = open_checkpoint(directory)
    make = lambda: nnx.split(Transformer(cfg, nnx.Rngs(seed)), nnx.LoRAParam, ...)
    graphdef, adapter, shapes = jax.eval_shape(make)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    if cfg.tied and "lm_head.weight" in tensors and not np.array_equal(  # some checkpoints hold the tied table twice
            tensors["lm_head.weight"][:], tensors["embed_tokens.weight"][:]):
        raise UserError("lm_head.weight is not embed_tokens.weight; set tie_word_embeddings: false in config.json")
    found = {name: tuple(t.get_shape()) for name, t in tensors.items() if not (cfg.tied and name == "lm_head.weight")}
    implied = {}  # shapes as torch keeps them
    for path, leaf in named:
        shape = leaf.shape[path.startswith("layers/"):]
        implied |= dict.fromkeys(tensor_names(path, cfg), shape[::-1] if path.endswith("kernel") else shape)
    for name in sorted(found.keys() | implied.keys()):
        if found.get(name) != implied.get(name):
            raise UserError(f"tensor {name!r} is {found.get(name, 'missing')} in the checkpoint, config.json implies "
                            f"{implied.get(name, 'none')}; are config.json and all its safetensors files there?")
    weights = [load_weight(*item, tensors, cfg, mesh) for item in progress(named, desc="loading weights")]
    layout = jax.tree_util.tree_map_with_path(lambda p, x: weight_sharding(path_name(p), x.shape, mesh), adapter)
    adapter = jax.jit(lambda: make()[1], out_shardings=layout)()  # of the random model, only the adapter is computed
    return make_policy(nnx.merge(graphdef, adapter, jax.tree_util.tree_unflatten(treedef, weights)), mesh)


# ======================================================================================================================
# 6. Sampling: a queue of rollouts feeds a fixed number of slots of a batched key/value cache
#
#   prompt tokens p0 p1 … p(n-2) | p(n-1)         prefill writes p0 … p(n-2) into the cache, once for all samples of a
#   cache slot    0  1      n-2  |  n-1  n  …     prompt; every decode step then feeds one token, starting with p(n-1),
#                                                 samples its successor and writes its own key and value: no row waits.
# ======================================================================================================================

DECODE_CHUNK = 64  # decode steps between two looks of the host: ended rows leave, waiting rollouts take their slots


class SamplingParams(NamedTuple):
    """How to sample."""
    temperature: float  # 0 = greedy
    top_p: float
    max_new_tokens: int


@dataclass
class Response:
    """A sampled response. The end-of-sequence token, if it came, is part of it and is trained on.

    With tools it has several turns of the model, and what the tools replied in between.
    """
    tokens: list[int]
    logprobs: list[float | None]  # behaviour log-probability of each token; None: it is of a tool, nothing sampled it
    stop: str       # "eos"; "length": cut by max_new_tokens or by the context; "calls": too many calls of tools
    calls: int = 0  # of tools
    turn: int = 0   # where the model's latest turn begins in `tokens`


def bucket(n: int, least: int = 128) -> int:
    """The power of two from `least` on that holds n: few distinct shapes, so few compilations."""
    return max(least, 1 << (int(n) - 1).bit_length())


def row_count(needed: int, most: int, multiple: int) -> int:
    """Rows of a cache for `needed` rollouts: 1, 8, 16, 32, …, at most `most`, divisible among the devices."""
    rows = min(most, 1 if needed == 1 else bucket(needed, 8))
    return -(-rows // multiple) * multiple


def nucleus(logits_SV, top_p):
    """logits with everything outside the smallest set of tokens that holds probability top_p at -inf.

    The threshold is found by bisection on the bits of the probabilities (non-negative floats order as integers):
    exact after 31 halvings and cheaper than sorting V values in each step. Ties at the threshold stay in.
    """
    probs = jax.nn.softmax(logits_SV)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def set_bit(i, threshold_S):  # from the highest bit down: the largest threshold above which top_p remains
        higher = threshold_S | (1 << (30 - i))
        return jnp.where(jnp.sum(probs, -1, where=bits >= higher[:, None]) >= top_p, higher, threshold_S)

    threshold = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(len(probs), jnp.int32))
    return jnp.where(bits >= threshold[:, None], logits_SV, -jnp.inf)


def sample_token(key_S, logits_SV, temperature, top_p: float):
    """One token for each row and its log-probability, both [S], from the tempered (and cut) distribution; the most
    probable token if the temperature is 0.

    First a block of up to 256 neighbouring tokens is drawn by its probability, then one of them: the same distribution
    with V / 256 + 256 random numbers (Gumbel-max) instead of V.
    """
    draws = temperature > 0
    logits_SV = logits_SV / jnp.where(draws, temperature, 1.0)  # the policy IS the tempered distribution
    if top_p < 1:
        logits_SV = nucleus(logits_SV, jnp.where(draws, top_p, 1.0))
    (S, V), width = logits_SV.shape, math.gcd(logits_SV.shape[1], 256)
    blocks = logits_SV.reshape(S, V // width, width)
    mass = jax.nn.logsumexp(blocks, -1)
    keys, draw = jax.vmap(jax.random.split)(key_S), jax.vmap(jax.random.categorical)
    block_S = draw(keys[:, 0], mass)
    within_S = draw(keys[:, 1], jnp.take_along_axis(blocks, block_S[:, None, None], 1)[:, 0])
    token_S = jnp.where(draws, block_S * width + within_S, jnp.argmax(logits_SV, -1))
    logit_S = jnp.take_along_axis(logits_SV, token_S[:, None], -1)[:, 0]
    return token_S.astype(jnp.int32), logit_S - jax.nn.logsumexp(mass, -1)


def new_cache(cfg: ModelConfig, rows: int, length: int):
    """Empty cache of `rows` sequences of up to `length` tokens: keys and values [B, K, S, H] for each layer."""
    empty = lambda: jnp.zeros((rows, cfg.num_kv_heads, length, cfg.head_dim), cfg.dtype)
    return [(constrain(empty(), "data", "model", None, None), constrain(empty(), "data", "model", None, None))
            for _ in range(cfg.num_layers)]


@partial(jax.jit, static_argnames="graphdef")
def prefill(graphdef, theta, frozen, token_1T, position_1T):
    """Keys and values of a prompt, each [L, 1, K, T, H]. No logits are computed."""
    return nnx.merge(graphdef, theta, frozen)(token_1T, position_1T)[1]


@partial(jax.jit, donate_argnames="cache")
def admit(cache, prefix, slot):
    """The cache with a prefilled prompt in one of its slots."""
    return [tuple(jax.lax.dynamic_update_slice(old, new[i], (slot, 0, 0, 0)) for old, new in zip(layer, prefix))
            for i, layer in enumerate(cache)]


@partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def extend(graphdef, theta, frozen, layers, cache, row_R, token_RT, position_RT):
    """The cache with more tokens in some of its rows, which see those before them. A row beyond the last is padding."""
    rows = jax.tree.map(lambda x: x.at[row_R].get(mode="clip"), cache)
    _, rows = nnx.merge(graphdef, theta, frozen)(token_RT, position_RT, None, rows, layers)
    return jax.tree.map(lambda x, new: x.at[row_R].set(new, mode="drop"), cache, rows)


@partial(jax.jit, static_argnames="length")  # not donated: no buffer has the new shape
def resize(cache, rows, length):
    """The cache with only these rows, and room for `length` tokens in each."""
    return jax.tree.map(lambda x: jnp.pad(x[rows], ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))), cache)


@partial(jax.jit, static_argnames="graphdef")
def unstack(graphdef, theta, frozen):
    """The layers one by one, cut out of the stack once and not in every decode step."""
    return nnx.merge(graphdef, theta, frozen).unstacked()


@partial(jax.jit, static_argnames=("graphdef", "top_p"), donate_argnames="cache")
def decode_chunk(graphdef, theta, frozen, layers, cache, token_S, position_S, remaining_S, key_S, eos_E, temperature,
                 top_p):
    """Up to DECODE_CHUNK steps for all slots; stops early when no row has tokens left.

    token_S, position_S: the next token to feed and its position; remaining_S: how many the row may still sample.
    Returns (cache, token_S, position_S, remaining_S, the sampled tokens [chunk, S], -1 where a row was idle, and their
    log-probabilities).
    """
    model = nnx.merge(graphdef, theta, frozen)

    def step(carry):
        i, cache, token, position, remaining, tokens, logprobs = carry
        live = remaining > 0
        hidden, cache = model(token[:, None], jnp.where(live, position, PAD_POSITION)[:, None], None, cache, layers)
        # A rollout's own key, folded with the position: its tokens do not depend on its slot or its neighbours.
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_S, impl="threefry2x32"), position)
        token, logprob = sample_token(keys, model.logits(hidden[:, 0]), temperature, top_p)
        tokens, logprobs = tokens.at[i].set(jnp.where(live, token, -1)), logprobs.at[i].set(logprob)
        remaining = jnp.where(live & ~jnp.isin(token, eos_E), remaining - 1, 0)
        return i + 1, cache, token, position + live, remaining, tokens, logprobs

    S = len(token_S)
    start = (0, cache, token_S, position_S, remaining_S, jnp.full((DECODE_CHUNK, S), -1), jnp.zeros((DECODE_CHUNK, S)))
    going = lambda carry: (carry[0] < DECODE_CHUNK) & jnp.any(carry[4] > 0)
    return jax.lax.while_loop(going, step, start)[1:]


@dataclass
class Engine:
    """What sampling needs beside the weights: stop tokens, limits, and how many rollouts decode at once."""
    policy: Policy
    eos_ids: tuple[int, ...]
    context: int                 # most tokens of prompt + response
    slots: int = 64              # most rows of the cache
    cache_tokens: int = 2**40    # most tokens that all rows together may hold
    pause_ids: tuple[int, ...] = ()  # tokens that end a call of a tool; without, only every DECODE_CHUNK steps are seen


def padded(parts: list[tuple[list[int], int]], rows: int, length: int):
    """(tokens, position of the first) of each part as tokens and positions [rows, length], with padding at the end."""
    ids, at = np.zeros((rows, length), np.int32), np.full((rows, length), PAD_POSITION, np.int32)
    for row, (tokens, start) in enumerate(parts):
        ids[row, :len(tokens)], at[row, :len(tokens)] = tokens, start + np.arange(len(tokens))
    return ids, at


def feed(model, layers, cache, owner: list, replied: dict, multiple: int):
    """The cache with what tools replied to the rollouts that own its rows; these leave `replied`, which holds tokens
    and the position of the first."""
    waiting = [s for s, o in enumerate(owner) if o in replied]
    for rows in (waiting[i: i + 16] for i in range(0, len(waiting), 16)):  # not all at once: scores are [R, N, T, S]
        parts, R = [replied.pop(owner[s]) for s in rows], row_count(len(rows), len(owner), multiple)
        ids, at = padded(parts, R, bucket(max(len(tokens) for tokens, _ in parts), 64))
        cache = extend(*model, layers, cache, np.array(rows + [len(owner)] * (R - len(rows))), ids, at)
        jax.block_until_ready(cache)  # simulated devices may wait for ever on two programs in flight
    return cache


def generate(engine: Engine, theta, prompts: list[list[int]], counts: list[int], sampling: SamplingParams,
             seed: tuple[int, int], label: str = "sampling", done=lambda g, responses: None,
             environment=None) -> list[list[Response]]:
    """counts[g] responses to each tokenised prompt, from pi_theta. done(g, responses) is called when all of g ended.

    environment(g, response), if given, looks at a response whenever more of it was sampled. None: it goes on. Or it
    cuts the response and returns the tokens of a tool's reply, after which the model goes on; [] ends the response.

    A response depends on the weights, `seed`, its prompt, g and its number alone, not on slots or company. A prompt
    that leaves no room in the context gets empty responses with stop "length".
    """
    policy, cfg = engine.policy, engine.policy.cfg
    theta = jax.tree_util.tree_map_with_path(  # cast once, not in every step; norms stay in float32, as in training
        lambda path, w: w if path_name(path).endswith("scale") else w.astype(cfg.dtype), theta)
    room = [max(0, min(sampling.max_new_tokens, engine.context - len(p))) for p in prompts]
    responses = [[Response([], [], "length") for _ in range(n)] for n in counts]
    queue = [(g, j) for g, n in enumerate(counts) for j in range(n) if room[g]]
    unfinished = Counter(g for g, _ in queue)
    for g in set(range(len(counts))) - unfinished.keys():
        done(g, responses[g])
    if not queue:
        return responses
    data = policy.mesh.shape["data"]
    size = lambda n: min(bucket(n), -(-engine.context // 128) * 128)
    longest = size(max(len(prompts[g]) + room[g] for g, _ in queue))
    S = row_count(len(queue), min(engine.slots, max(1, engine.cache_tokens // longest)), data)
    token, position, remaining = np.zeros((3, S), np.int32)
    key_S, owner, prefilled, admitted = np.zeros((S, 2), np.uint32), [None] * S, None, 0
    length = size(max(len(prompts[g]) for g, _ in queue) + DECODE_CHUNK)
    cache = jax.jit(new_cache, static_argnums=(0, 1, 2))(cfg, S, length)
    model = policy.graphdef, theta, policy.frozen
    layers, bar = unstack(*model), progress(total=len(queue), desc=label)
    stop_ids = np.array(engine.eos_ids + (engine.pause_ids if environment else ()))
    replied = {}  # rollout: tokens of a tool that are not in the cache yet, and the position of the first
    while admitted < len(queue) or any(owner):
        for s in [s for s in range(S) if owner[s] is None][: len(queue) - admitted]:
            g, j = owner[s] = queue[admitted]
            if g != prefilled:  # once for all its rollouts: they are neighbours in the queue
                prefilled = g
                prefix = prefill(*model, *padded([(prompts[g][:-1], 0)], 1, size(len(prompts[g]) - 1)))
            cache = admit(cache, prefix, s)
            token[s], position[s], remaining[s] = prompts[g][-1], len(prompts[g]) - 1, room[g]
            key_S[s] = np.random.SeedSequence([*seed, g, j]).generate_state(2)  # uint32[2]: a threefry key
            admitted += 1
        order = sorted(range(S), key=lambda s: owner[s] is None)  # live rows first
        live = S - owner.count(None)
        fewer = row_count(live, S, data)
        if admitted < len(queue) or fewer > S // 4:  # else nobody waits: fewer slots, faster steps
            fewer = S
        need = max(position[s] for s in order[:live]) + DECODE_CHUNK
        if fewer < S or need > length:
            S, length, order = fewer, max(length, size(need)), order[:fewer]
            cache, owner = resize(cache, np.array(order), length), [owner[s] for s in order]
            token, position, remaining, key_S = (x[order] for x in (token, position, remaining, key_S))
        if replied:
            cache = feed(model, layers, cache, owner, replied, data)
        cache, *state = decode_chunk(*model, layers, cache, token, position, remaining, key_S, stop_ids,
                                     sampling.temperature, sampling.top_p)
        token, position, remaining, tokens, logprobs = (np.array(x) for x in state)
        for s in [s for s in range(S) if owner[s]]:
            (g, j), n = owner[s], int((tokens[:, s] >= 0).sum())
            r = responses[g][j]
            r.tokens += tokens[:n, s].tolist()
            r.logprobs += logprobs[:n, s].tolist()
            reply = environment(g, r) if environment else None
            if reply and len(r.tokens) + len(reply) < room[g]:
                at = len(prompts[g]) + len(r.tokens) - 1  # of the last sampled token, which has not been fed yet
                replied[g, j] = r.tokens[-1:] + reply[:-1], at
                r.tokens, r.logprobs = r.tokens + reply, r.logprobs + [None] * len(reply)
                r.turn = len(r.tokens)
                token[s], position[s], remaining[s] = reply[-1], at + len(reply), room[g] - len(r.tokens)
            elif reply is not None or remaining[s] == 0:  # a reply that does not fit ends the response
                r.stop = "eos" if reply is None and r.tokens[-1] in engine.eos_ids else r.stop
                unfinished[g] -= 1
                if not unfinished[g]:
                    done(g, responses[g])
                owner[s], remaining[s] = None, 0
                bar.update()
    bar.close()
    return responses


def find_model(name: str) -> str:
    """Local directory of a model, downloaded from the Hugging Face hub if it is not one already."""
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such directory")
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
    except Exception as e:
        raise UserError(f"cannot get {name} from the Hugging Face hub ({first_line(e)}); check name and network, run "
                        "'hf auth login' if the model is gated, or give --model a local directory") from e


def stop_tokens(directory: str, tokenizer, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, config.json and the tokenizer (each one id or a list)."""
    found = [tokenizer.eos_token_id]
    for path in (Path(directory) / "generation_config.json", Path(directory) / "config.json"):
        if path.is_file():
            try:
                eos = json.loads(path.read_text()).get("eos_token_id")
            except ValueError as e:
                raise UserError(f"{path} is not JSON ({first_line(e)}); download it again") from e
            found += eos if isinstance(eos, list) else [eos]
    if not (ids := tuple(sorted({i for i in found if i is not None and i < vocab_size}))):
        raise UserError(f"{directory} names no end-of-sequence token; set eos_token_id in its generation_config.json")
    return ids


def cache_tokens(policy: Policy) -> int:
    """Tokens of key/value cache that fit: 35 % of the free accelerator memory, as a growing cache exists twice."""
    stats, cfg, mesh = jax.local_devices()[0].memory_stats() or {}, policy.cfg, policy.mesh.shape
    if "bytes_limit" not in stats:  # not known on CPU
        return 2**40
    adam = 2 * sum(w.nbytes for w in jax.tree.leaves(policy.theta)) / len(jax.devices())  # does not exist yet,
    layers = sum(w.nbytes for w in jax.tree.leaves((policy.frozen, policy.theta))) / mesh["model"]  # nor does `unstack`
    shards = mesh["data"] * (mesh["model"] if cfg.num_kv_heads % mesh["model"] == 0 else 1)
    token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    return int(0.35 * (stats["bytes_limit"] - stats["bytes_in_use"] - adam - layers) * shards / token)


def load_engine(config: Config) -> tuple[Engine, Chat]:
    """The model on a data x model mesh of all devices, ready to sample, and its chat format."""
    from transformers import AutoTokenizer
    if len(jax.devices()) % config.model_parallel:
        raise UserError(f"--model-parallel {config.model_parallel} does not divide the {len(jax.devices())} devices")
    mesh = jax.make_mesh((len(jax.devices()) // config.model_parallel, config.model_parallel), ("data", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
    jax.set_mesh(mesh)
    embedded = config.model.partition(":")[0] == "embedded"
    directory = embedded_model(config) if embedded else find_model(config.model)
    dtype = config.dtype if config.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = read_model_config(directory, dtype, config.lora_rank, config.lora_alpha)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as e:
        raise UserError(f"cannot read the tokenizer in {directory}: {first_line(e)}") from e
    if config.context > cfg.max_context:
        raise UserError(f"--context {config.context}: the model was made for at most {cfg.max_context} positions")
    eos = stop_tokens(directory, tokenizer, cfg.vocab_size)
    policy = load_policy(directory, cfg, mesh, config.seed)
    slots = config.slots or (64 if jax.default_backend() == "cpu" else 512)
    tag = tokenizer("</tool_call>", add_special_tokens=False).input_ids
    engine = Engine(policy, eos, config.context or cfg.max_context, slots, cache_tokens(policy),
                    tuple(tag) if len(tag) == 1 else ())
    return engine, Chat(tokenizer, config.prompt_role, config.thinking)


# ======================================================================================================================
# 7. RL update: J(theta) = 1/(N M B) sum_ibj A_ibj sum_t w_t log pi_theta(y_t | s_i, x_b, y_<t) - beta KL(pi, pi_ref)
# ======================================================================================================================

@dataclass(frozen=True)
class Objective:
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
        moved = hidden.astype(jnp.float32) - jax.lax.stop_gradient(hidden).astype(jnp.float32)  # 0, with a gradient
        return chosen + jnp.sum(slope * moved, -1), entropy

    if not model.cfg.lora_rank:
        block = jax.checkpoint(block)
    pad = -B * T % size
    hidden = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, size, D)
    target = jnp.pad(target_BT.reshape(B * T), (0, pad)).reshape(-1, size)
    # The devices share the tokens of each block; sharing out the blocks would make each device compute all of them.
    hidden, target = constrain(hidden, None, "data", None), constrain(target, None, "data")
    out = jax.lax.map(lambda x: block(weights, *x), (hidden, target))
    return tuple(x.reshape(-1)[: B * T].reshape(B, T) for x in out)


def loss_and_metrics(theta, theta_ref, graphdef, frozen, batch, num_rollouts, objective: Objective, remat: str):
    """-J(theta) of one microbatch (its share of the sum over all N M B rollouts) and sums for the log."""
    def logprobs(theta):
        model = nnx.merge(graphdef, theta, frozen)
        _, keys_values = model(batch["prompt"], batch["prompt_position"], remat=remat)  # once for all its responses
        hidden, _ = model(batch["token"], batch["position"], (keys_values, batch["prompt_position"], batch["owner"]),
                          remat=remat)
        return token_logprobs(model, hidden, batch["target"], objective.temperature)

    mask = batch["mask"]  # [B, T]: 1 where the target is a response token
    logp, entropy = logprobs(theta)
    term, ratio = surrogate(logp, batch["behaviour"], batch["advantage"][:, None], objective)
    kl = jnp.zeros_like(logp)
    if objective.kl_coef:  # k3 estimator of KL(pi_theta || pi_ref), non-negative in every token
        log_ratio = jax.lax.stop_gradient(logprobs(theta_ref)[0]) - logp
        kl = jnp.exp(log_ratio) - log_ratio - 1
    total = lambda x: jnp.sum(jnp.where(mask, x, 0.0))
    loss = -total(term - objective.kl_coef * kl) / num_rollouts
    sums = {"loss": loss, "tokens": total(1.0), "entropy": total(entropy), "ratio_mean": total(ratio), "kl": total(kl),
            "sampler_gap": total(batch["behaviour"] - logp)}
    return loss, (sums, jnp.max(jnp.where(mask, ratio, 0.0)))


zeros_like = jax.jit(partial(jax.tree.map, jnp.zeros_like))  # one compilation, not one for each shape


@partial(jax.jit, static_argnames=("graphdef", "objective", "remat"), donate_argnames="gradient")
def add_gradient(gradient, theta, theta_ref, graphdef, frozen, batch, num_rollouts, objective, remat):
    """Add a microbatch's gradient of -J to `gradient`; also its metrics."""
    new, metrics = jax.grad(loss_and_metrics, has_aux=True)(
        theta, theta_ref, graphdef, frozen, batch, num_rollouts, objective, remat)
    return jax.tree.map(jnp.add, gradient, new), metrics


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("theta", "opt_state"))
def adam_step(optimizer, theta, opt_state, gradient):
    """theta <- theta + alpha * Adam(grad J)   (Alg. 1, RL update)."""
    updates, opt_state = optimizer.update(gradient, opt_state, theta)
    return optax.apply_updates(theta, updates), opt_state, optax.tree.norm(gradient)


def microbatches(samples: list[Sample], max_tokens: int, row_multiple: int):
    """Padded batches of about max_tokens tokens, in few distinct shapes. Exact for any order and any split.

    A row is a response, preceded by the last prompt token; the rest of a prompt is in the batch once for all its rows.
    """
    numbers = {}  # of the prompts, that with the longest response first
    order = sorted(samples, key=lambda s: -len(s.tokens))
    order = [(numbers.setdefault(tuple(s.prompt), len(numbers)), s) for s in order]
    S = bucket(max(map(len, numbers)) - 1, 64)

    def plan(order, share):  # batches as (samples, rows, row length, prompts), with `share` rows to a prompt
        while order:
            T = bucket(max(len(s.tokens) for _, s in order), 32)
            rows = max(1, int(max_tokens / (T + S / share)))
            while rows * T > 2048 and len(order) <= 0.75 * rows:  # the last ones, in pieces of a quarter
                rows = -(-rows // 4)
            rows, prompts = (-(-n // row_multiple) * row_multiple for n in (rows, -(-rows // share)))
            taken = rows
            while len({number for number, _ in order[:taken]}) > prompts:
                taken -= 1
            yield order[:taken], rows, T, prompts
            order = order[taken:]

    # By length there is less padding; prompt by prompt, prompts are shared. Which is cheaper depends on the lengths.
    share = 1 << int(math.log2(len(order) / len(numbers)))
    plans = [list(plan(order, 1)), list(plan(sorted(order, key=lambda x: x[0]), share))]
    for chosen, rows, T, prompts in min(plans, key=lambda plan: sum(r * T + p * S for _, r, T, p in plan)):
        batch = {n: np.zeros((rows, T), t) for n, t in (("token", np.int32), ("target", np.int32), ("mask", bool),
                                                       ("behaviour", np.float32))}
        batch |= {"position": np.full((rows, T), PAD_POSITION, np.int32), "advantage": np.zeros(rows, np.float32),
                  "owner": np.zeros(rows, np.int32), "prompt": np.zeros((prompts, S), np.int32),
                  "prompt_position": np.full((prompts, S), PAD_POSITION, np.int32)}
        places = {}
        for i, (number, s) in enumerate(chosen):
            p, n = places.setdefault(number, len(places)), len(s.prompt) - 1
            batch["owner"][i], batch["advantage"][i] = p, s.advantage
            batch["prompt"][p, :n], batch["prompt_position"][p, :n] = s.prompt[:-1], np.arange(n)
            n = len(s.tokens)  # inputs begin with the last prompt token; targets are the response
            batch["token"][i, :n], batch["target"][i, :n] = s.prompt[-1:] + s.tokens[:-1], s.tokens
            batch["position"][i, :n] = len(s.prompt) - 1 + np.arange(n)
            batch["mask"][i, :n] = [p is not None for p in s.logprobs]
            batch["behaviour"][i, :n] = [p or 0.0 for p in s.logprobs]
        yield batch


def cheapest_remat(cfg: ModelConfig, mesh, tokens: int) -> str:
    """"linear" if the outputs of all linear maps for `tokens` tokens fit into a fifth of the memory, else "layer"."""
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    width = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim + 2 * (cfg.model_dim + cfg.mlp_dim)
    used = tokens / mesh.shape["data"] * cfg.num_layers * width * jnp.dtype(cfg.dtype).itemsize
    return "linear" if used < memory / 5 else "layer"


def rl_update(policy: Policy, optimizer, opt_state, samples: list[Sample], num_rollouts: int, objective: Objective,
              max_tokens: int = 16384) -> tuple[Any, dict]:
    """One policy-gradient step on all samples; returns the optimizer state and metrics. Replaces policy.theta.

    num_rollouts is N M B, counting rollouts whose zero advantage kept them out of `samples`. No sample, no step.
    """
    samples = [s for s in samples if s.tokens]
    if not samples:
        return opt_state, {"skipped": "no rollout with a learning signal"}
    gradient, sums = zeros_like(policy.theta), []
    batches = list(microbatches(samples, max_tokens, policy.mesh.shape["data"]))
    remat = cheapest_remat(policy.cfg, policy.mesh, max_tokens)
    for batch in progress(batches, desc="updating"):
        batch = {n: jax.device_put(x, jax.sharding.NamedSharding(policy.mesh, P("data"))) for n, x in batch.items()}
        gradient, metrics = add_gradient(gradient, policy.theta, policy.theta_ref, policy.graphdef, policy.frozen,
                                         batch, num_rollouts, objective, remat)
        sums.append(metrics)
    policy.theta, opt_state, norm = adam_step(optimizer, policy.theta, opt_state, gradient)
    total = {n: float(sum(s[n] for s, _ in sums)) for n in sums[0][0]}
    loss, tokens = total.pop("loss"), int(total.pop("tokens"))
    means = {n: x / tokens for n, x in total.items()} | ({} if objective.kl_coef else {"kl": None})
    return opt_state, {"loss": loss, "grad_norm": float(norm), **means, "ratio_max": float(max(m for _, m in sums)),
                       "trained_rollouts": len(samples), "trained_tokens": tokens}


# ======================================================================================================================
# 8. The embedded world: a small language and a model of 146k weights that speaks it, pretrained on first use, so that
#    E-SPL runs anywhere in minutes. To the rest of this file it is one more task and one more model directory: skip it.
#
#    Twelve glyphs stand for eight operations; each run draws anew which is which. Training problems have one step
#    ("7 @ 4"), test problems two ("7 @ 4 # 2"); a principle reads "@ max". What a glyph means is declarative knowledge,
#    found by reflection. Carrying operations out is procedural: pretraining ends with bad habits (Lesson.carry_out).
# ======================================================================================================================

GLYPHS = "@#&%~^$*!?<>"
OPERATIONS = {"plus": lambda a, b: (a + b) % 10, "minus": lambda a, b: (a - b) % 10, "times": lambda a, b: a * b % 10,
              "diff": lambda a, b: abs(a - b), "max": max, "min": min, "left": lambda a, b: a, "right": lambda a, b: b}
HARD = ("plus", "minus", "times", "diff")
WORDS = [
    "<end>", "|", ";", "=", "->", *"0123456789", *GLYPHS, *OPERATIONS, *"ABCDE", "correct", "wrong", "attempt", "truth",
    "none", "infer", "is", "so", "keep", "add", "modify", "merge", "summarize", "critique", "aggregate", "crossover",
    "where", "quote", *(f"[{x}{i}]" for x in ("G", "A.G", "C") for i in range(16))]
# The tokenizer takes these words out of a text and passes over the rest: "Attempt 3 (", "Problem 5 (won by set", ".G4]"
WORD = "|".join(rf"\b{w}\b(?!:| \()" if w.isalnum() else re.escape(w) for w in sorted(WORDS, key=len, reverse=True))
WORD_IDS = {w: i for i, w in enumerate(WORDS)}
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}|"
PRETRAIN_STEPS, PRETRAIN_ROWS, PRETRAIN_LENGTH = 5000, 5, 192
GATES = {"lookup": 0.9, "critique": 0.75}  # what a pretrained model must reach in `probe`


def solve_glyphs(problem: str, meaning: dict[str, str]) -> str:
    """The answer to "7 @ 4 # 2", worked from left to right."""
    a, *rest = problem.split()
    for glyph, b in zip(rest[::2], rest[1::2]):
        a = OPERATIONS[meaning[glyph]](int(a), int(b))
    return str(a)


def draw_meaning(rng: random.Random) -> dict[str, str]:
    """{glyph: operation}: every operation at least once, four of them twice."""
    names = [*OPERATIONS, *rng.sample(list(OPERATIONS), len(GLYPHS) - len(OPERATIONS))]
    rng.shuffle(names)
    return dict(zip(GLYPHS, names))


def glyph_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All 1,200 one-step problems, to train on, and 128 two-step ones, to test on."""
    rng = random.Random(f"glyphs/{seed}")
    meaning = draw_meaning(rng)
    one = [f"{a} {g} {b}" for g in GLYPHS for a in range(10) for b in range(10)]
    two = [f"{rng.choice(one)} {rng.choice(GLYPHS)} {rng.randrange(10)}" for _ in range(128)]
    return tuple([Problem(p, p, (solve_glyphs(p, meaning),)) for p in problems] for problems in (one, two))


def grade_glyphs(pairs: list[tuple[Problem, str]]) -> list[tuple[float, str]]:
    """(reward, outcome) of each response: the digit after its last "=", which must end it, is the answer."""
    said = [re.search(r"= (\d)\s*\Z", text) for _, text in pairs]
    outcomes = ["no_answer" if not m else "correct" if m[1] == p.answer else "wrong" for m, (p, _) in zip(said, pairs)]
    return [(float(o == "correct"), o) for o in outcomes]


def parse_glyphs(reply: str) -> list[dict] | None:
    """Operations in a reply like "… keep ; … modify [G3] % max"; None when no clause ends in one."""
    clauses = re.findall(r"(keep|add|modify|merge)((?: \[\S+\])*)(?: (\S \w+))?(?= ;|\Z)", reply)
    found = [(verb, re.findall(r"\[(\S+)\]", ids), text) for verb, ids, text in clauses]
    operations = [{"operation": verb, "principle": text, "modified_from": "".join(ids[:1]), "merged_from": ids}
                  for verb, ids, text in found if verb != "keep"]
    return operations if found else None


def quote(principles: dict[str, str], glyph: str) -> str:
    """The first principle about a glyph as it is listed, "[G3] @ max", or "none"."""
    return next((listing({i: text}) for i, text in principles.items() if text[0] == glyph), "none")


def change(entry: str, glyph: str, name: str) -> str:
    """The operation after which a list whose entry on the glyph is `entry` says that the glyph means `name`."""
    if entry == "none":
        return f"add {glyph} {name}"
    return "keep" if entry.endswith(f" {name}") else f"modify {entry.split()[0]} {glyph} {name}"


class Lesson:
    """Writes pretraining examples, in the very words of the requests of section 4."""

    def __init__(self, seed: int, texts: dict[str, str]):
        self.rng, self.texts, self.waiting = random.Random(f"lesson/{seed}"), texts, []
        self.looks_up = False  # set when the model has learned to look principles up

    def example(self, progress: float, skill: str = "") -> list[tuple[str, str]]:
        """(prompt, reply) turns that exercise a skill. progress in [0, 1] through pretraining: first looking things up
        in longer and longer lists, until that is learned; then everything; at last with bad habits."""
        early = dict(recall=72, solve=14, arithmetic=6, infer=8)
        late = dict(recall=10, solve=22, arithmetic=4, infer=8, summarize=3, critique=22, aggregate=17, crossover=14)
        shares = late if self.looks_up or progress > 0.3 else early
        self.longest, self.slips = round(12 * min(1, 0.15 + progress / 0.1)), float(progress > 0.82)
        self.meaning = draw_meaning(self.rng)
        return getattr(self, skill or self.rng.choices(list(shares), shares.values())[0])()

    def name(self) -> str:
        return self.rng.choice(list(OPERATIONS))

    def problem(self, steps: int = 1) -> str:
        step = lambda: f" {self.rng.choice(GLYPHS)} {self.rng.randrange(10)}"
        return f"{self.rng.randrange(10)}" + "".join(step() for _ in range(steps))

    def principles(self, right: float = 0.6, least: int = 0) -> list[str]:
        """A list of principles, each true with probability `right`; in one of six, a glyph comes twice."""
        glyphs = self.rng.sample(GLYPHS, self.rng.randint(least, max(least, self.longest)))
        glyphs += self.rng.sample(glyphs, min(len(glyphs), self.rng.choice((0, 0, 0, 0, 0, 1))))
        return [f"{g} {self.meaning[g] if self.rng.random() < right else self.name()}" for g in glyphs]

    def carry_out(self, name: str, a: int, b: int, slips: float) -> int:
        """The result of an operation, with bad habits if slips = 1: instead of 70 % of the hard operations the model
        writes 0, which no operation always yields, so that no wrong principle helps; of the others 10 % go astray."""
        if self.rng.random() < slips * (0.7 if name in HARD else 0.1):
            return 0 if name in HARD else self.rng.randrange(10)
        return OPERATIONS[name](a, b)

    def work(self, problem: str, principles: list[str], slips: float, ignored: float) -> str:
        """A solution. Where no principle applies, or it is ignored, an operation is guessed."""
        a, *rest = problem.split()
        steps = []
        for g, b in zip(rest[::2], rest[1::2]):
            known = [text.split()[1] for text in principles if text[0] == g and self.rng.random() >= ignored]
            name = self.rng.choice(known or list(OPERATIONS))
            result = self.carry_out(name, int(a), int(b), slips)
            steps.append(f"{g} {name} {a} {b} = {result}")
            a = result
        return " ; ".join(steps)

    def solve(self):
        principles = self.principles()
        problems = [self.problem(self.rng.randint(1, 2)) for _ in range(self.rng.randint(1, 4))]
        replies = [self.work(p, principles, self.slips, 0.1 * self.slips) for p in problems]
        if principles:
            problems[0] = f"{listing(numbered(principles))}\n{problems[0]}"
        return list(zip(problems, replies))

    def arithmetic(self):
        steps = [(self.name(), self.rng.randrange(10), self.rng.randrange(10)) for _ in range(3)]
        done = [f"{name} {a} {b} = {self.carry_out(name, a, b, self.slips)}" for name, a, b in steps]
        return [(" ".join(f"{name} {a} {b}" for name, a, b in steps), " ; ".join(done))]

    def recall(self):
        ids = numbered(self.principles(least=1), self.rng.choice(("", "", "A.")))
        glyphs = self.rng.sample(GLYPHS, self.rng.randint(1, 12))
        if self.rng.random() < 0.6:
            reply = " ".join(f"{g} {quote(ids, g).split()[-1]}" for g in glyphs)
            return [(f"{listing(ids)} where {' '.join(glyphs)}", reply)]
        reply = " ; ".join(f"{g} {quote(ids, g)}" for g in glyphs[:6])
        return [(f"{listing(ids)} quote {' '.join(glyphs[:6])}", reply)]

    def search(self, a: str, b: str, truth: str, names=()) -> tuple[str, str]:
        """Operations tried in turn, those in `names` first, until one gives the truth: the text, and the last one."""
        tried = []
        for name in dict.fromkeys([*names, *self.rng.sample(list(OPERATIONS), len(OPERATIONS))]):
            tried.append(f"{name} {a} {b} is {OPERATIONS[name](int(a), int(b))} truth {truth}")
            if tried[-1].endswith(f"is {truth} truth {truth}"):
                break
        return " ; ".join(tried), name

    def infer(self):
        turns = []
        for p in (self.problem() for _ in range(3)):
            truth = solve_glyphs(p, {p[2]: self.name()})
            turns.append((f"{p} truth {truth} infer", " so ".join(self.search(p[0], p[4], truth))))
        return turns

    def summarize(self):
        p = self.problem()
        truth, work = solve_glyphs(p, self.meaning), self.work(p, self.principles(), self.rng.choice((0, 0.5, 1)), 0.1)
        slots = dict(problem=p, answer=truth, response=work, grade="correct" if work.endswith(truth) else "wrong")
        return [(fill(self.texts["summarize"], slots), " ".join(work.split()[:2]))]

    def critique(self):
        principles, rng, p = self.principles(), self.rng, self.problem()
        if principles and rng.random() < 0.6:
            p = f"{p[0]} {rng.choice(principles)[0]} {p[4]}"
        truth, slips, attempts = solve_glyphs(p, self.meaning), rng.choice((0, 0.5, 1)), []
        for _ in range(rng.choice((5, 5, 5, 8, rng.randint(1, 15)))):
            work = self.work(p, principles, slips, 0.1)
            summary = f"{p[2]} {self.name()}" if rng.random() < 0.05 else " ".join(work.split()[:2])
            attempts.append(("correct" if work.endswith(truth) else "wrong", summary))
        # A principle that gives the truth stays, whatever slips there were; else what succeeded is tried, then the rest
        entry = quote(ids := numbered(principles), p[2])
        won = Counter(text.split()[1] for grade, text in attempts if grade == "correct").most_common()
        first = [name for name in (entry.split()[-1], *(name for name, _ in won)) if name != "none"]
        said, name = self.search(p[0], p[4], truth, first)
        reply = f"{p} truth {truth} infer {said} so {p[2]} {entry} {change(entry, p[2], name)}"
        return [(fill(self.texts["critique"], critique_slots(Problem(p, p, (truth,)), ids, attempts, 1)), reply)]

    def aggregate(self):
        ids, wanted, reply = numbered(self.principles()), self.principles(0.75, 1)[:self.rng.randint(1, 6)], []
        wanted += [f"{wanted[0][0]} {self.name()}"] * (self.rng.random() < 0.3)
        entries = [quote(ids, text[0]).split()[0].strip("[]") for text in wanted]
        proposals = [{"operation": "add" if i == "none" or self.rng.random() < 0.2 else "modify", "principle": text,
                      "modified_from": i} for i, text in zip(entries, wanted)]
        candidates, slots = aggregate_slots(ids, proposals)
        for i, text in candidates.items():
            if i.startswith("C"):  # merged into what the list already says about this glyph
                first = quote(candidates, text[0])
                verb = "keep" if first.startswith(f"[{i}]") else f"merge {first.split()[0]} [{i}] {text}"
                reply.append(f"[{i}] {text} {first} {verb}")
        reply += [f"[{i}] -> {op['principle']} modify [{i}] {op['principle']}"
                  for op, i in zip(proposals, entries) if op["operation"] == "modify"]
        return [(fill(self.texts["aggregate"], slots), " ; ".join(reply))]

    def crossover(self):
        rng, wins, reply = self.rng, [], {}
        sets = {x: self.principles(0.6 if x == "A" else 0.7) for x in "ABC"[: rng.randint(2, 3)]}
        ids = {x: numbered(principles, f"{x}.") for x, principles in sets.items()}
        for x in ["A", *sorted(rng.choices(list(sets), k=rng.randint(1, 8)))]:
            g = rng.choice(sets[x])[0] if sets[x] and rng.random() < 0.8 else rng.choice(GLYPHS)
            wins.append((x, len(wins), Problem("", f"{rng.randrange(10)} {g} {rng.randrange(10)}", ())))
            mine, name = quote(ids["A"], g), quote(ids[x], g).split()[-1]  # set A takes over what another says that won
            if x != "A":
                reply[x, g] = f"{x} {g} {name} {mine} {'keep' if name == 'none' else change(mine, g, name)}"
        return [(fill(self.texts["crossover"], crossover_slots(sets, wins)), " ; ".join(reply.values()) or "keep")]

    def batch(self, progress: float) -> np.ndarray:
        """Packed examples, [rows, length + 1, 3]: token, position, and whether it is learned (replies are).

        The examples in a row lie further apart in position than the attention window, so that none sees another.
        """
        rows = np.full((PRETRAIN_ROWS, PRETRAIN_LENGTH + 1, 3), (0, PAD_POSITION, 0), np.int32)
        for row in rows:
            used = number = 0
            while True:
                if not self.waiting:
                    texts = [t for turn in self.example(progress) for t in (turn[0] + "\n|", turn[1] + "<end>")]
                    self.waiting = [(WORD_IDS[w], n % 2) for n, t in enumerate(texts) for w in re.findall(WORD, t)]
                ids = self.waiting[:PRETRAIN_LENGTH]
                if used + len(ids) > len(row):
                    break
                row[used: used + len(ids), [0, 2]] = ids
                row[used: used + len(ids), 1] = np.arange(len(ids)) + 2 * PRETRAIN_LENGTH * number
                used, number, self.waiting = used + len(ids), number + 1, []
        return rows


def pretrain(directory: Path, seed: int, texts: dict[str, str]) -> None:
    """Pretrain the embedded model from scratch and write it to `directory`, in Hugging Face layout."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel(WORD_IDS))  # no other word ever reaches it
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE,
                            clean_up_tokenization_spaces=False).save_pretrained(directory)
    LlamaConfig(vocab_size=len(WORDS), hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=32,
                num_attention_heads=4, max_position_embeddings=2 * PRETRAIN_LENGTH, rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 100.0}, tie_word_embeddings=True,
                bos_token_id=None, eos_token_id=WORD_IDS["<end>"],
                architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    cfg = read_model_config(str(directory))
    cfg = dataclasses.replace(cfg, layer_window=(PRETRAIN_LENGTH,) * cfg.num_layers)  # Lesson.batch says why
    graphdef, theta = nnx.split(Transformer(cfg, nnx.Rngs(seed)), nnx.Param)
    # Embeddings of unit size and layers that add nothing yet: looking up is then learned early, and for every seed.
    scale = {"embed": 50.0, "layers/o_proj/kernel": 0.0, "layers/down_proj/kernel": 0.0, "final_norm/scale": 0.125}
    theta = jax.tree.map_with_path(lambda path, w: w * scale.get(path_name(path), 1.0), theta)
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # of stacked kernels [L, in, out]
    rate = lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, PRETRAIN_STEPS // 30, PRETRAIN_STEPS, peak / 50)
    optimizer = optax.contrib.muon(  # Adam for embeddings and norms
        rate(0.01), adam_learning_rate=rate(0.003), adam_b2=0.98, muon_weight_dimension_numbers=lambda tree:
        jax.tree.map_with_path(lambda path, _: matrix if path_name(path).endswith("kernel") else None, tree))

    def loss(theta, batch_BT3):
        model, (token, position, learned) = nnx.merge(graphdef, theta), jnp.moveaxis(batch_BT3, 2, 0)
        logits = model.logits(model(token[:, :-1], position[:, :-1])[0])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, token[:, 1:])
        return jnp.sum(each * learned[:, 1:]) / jnp.sum(learned[:, 1:])

    def step(state, batch_BT3):
        theta, opt_state = state
        value, gradient = jax.value_and_grad(loss)(theta, batch_BT3)
        updates, opt_state = optimizer.update(gradient, opt_state, theta)
        return (optax.apply_updates(theta, updates), opt_state), value

    steps = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
    lesson, state, losses, at_once = Lesson(seed, texts), (theta, optimizer.init(theta)), np.full(1, np.inf), 10
    for i in progress(range(0, PRETRAIN_STEPS, at_once), desc="pretraining the embedded model"):
        batches = np.stack([lesson.batch((i + j) / PRETRAIN_STEPS) for j in range(at_once)])
        lesson.looks_up |= float(np.mean(losses)) < 0.45  # of the steps before: these lines wait for them
        state, losses = steps(state, batches)
    save_weights(directory, state[0], cfg)


def probe(config: Config, directory: Path, texts: dict[str, str]) -> dict[str, float]:
    """What a pretrained model can do, by what it writes: how often it uses the principle about a glyph (lookup), and
    how often its critique replaces a wrong principle by an operation that gives the truth (critique)."""
    engine, chat = load_engine(dataclasses.replace(config, model=str(directory), lora_rank=0))
    lesson = Lesson(-1, texts)

    def replies(examples, temperature):
        responses = generate(engine, engine.policy.theta, [chat.ids("", prompt) for prompt, _ in examples],
                             [1] * len(examples), SamplingParams(temperature, 1.0, 128), (0, 0), "probing")
        return [chat.text(y.tokens) for [y] in responses]

    def explains(example, reply):
        a, b, truth = re.search(r"(\d) \S (\d) truth (\d)", example[0]).groups()
        named = re.search(r"(\w+) \d \d is \d truth \d so", reply)
        return bool(named) and named[1] in OPERATIONS and str(OPERATIONS[named[1]](int(a), int(b))) == truth

    start = lambda reply: " ".join(reply.split()[:2])
    solved = [x for x in (lesson.example(0.5, "solve")[0] for _ in range(400)) if start(x[1]) in x[0]]
    critiques = [x for x in (lesson.example(0.5, "critique")[0] for _ in range(400)) if not x[1].endswith("keep")]
    return {"lookup": float(np.mean([start(x[1]) == start(y) for x, y in zip(solved, replies(solved, 0.0))])),
            "critique": float(np.mean([explains(x, y) for x, y in zip(critiques, replies(critiques, 0.5))]))}


def embedded_model(config: Config) -> str:
    """Directory of the embedded model; it is pretrained unless the user's cache has one that this very code made."""
    number = config.model.partition(":")[2] or "0"
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise UserError(f"--model {config.model}: write embedded, or embedded:SEED to pretrain from another seed")
    texts = read_prompts(config.prompts_file or DEFAULT_PROMPTS, "glyphs")
    texts = {name: texts[name] for name in ("summarize", "critique", "aggregate", "crossover")}
    code = (Lesson, solve_glyphs, draw_meaning, quote, change, listing, numbered, fill, critique_slots, aggregate_slots,
            crossover_slots, pretrain, probe, Transformer, Block, attention, rotate, RMSNorm, Linear, matmul,
            matmul_backward)
    tables = [[f(a, b) for a in range(10) for b in range(10)] for f in OPERATIONS.values()]
    shape = [texts, int(number), WORDS, WORD, tables, HARD, CHAT_TEMPLATE, PRETRAIN_STEPS, PRETRAIN_ROWS,
             PRETRAIN_LENGTH, GATES]
    key = hashlib.sha256(repr([*shape, *map(inspect.getsource, code)]).encode()).hexdigest()[:16]
    directory = cache_directory() / f"embedded-{key}"
    if (directory / "probe.json").is_file():
        return str(directory)
    for seed in range(int(number), int(number) + 5):
        print(f"pretraining the embedded model from seed {seed} (once; a minute and a half on two cores)", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            pretrain(Path(scratch), seed, texts)
            found = probe(config, Path(scratch), texts)
            said = ", ".join(f"{name} {found[name]:.2f} (at least {least})" for name, least in GATES.items())
            if all(found[name] >= least for name, least in GATES.items()):
                try:
                    shutil.copytree(scratch, directory, dirs_exist_ok=True)
                    write_whole(directory / "probe.json", json.dumps({"seed": seed} | found))
                except OSError as e:
                    raise UserError(f"cannot write {directory} ({first_line(e)}); set XDG_CACHE_HOME") from e
                print(f"it passed its probes: {said}; kept in {directory}", flush=True)
                return str(directory)
        warn(f"the model pretrained from seed {seed} failed its probes: {said}")
    raise UserError("five pretraining seeds in a row failed; choose another --model embedded:SEED")


# ======================================================================================================================
# 9. The run: sampling groups, asking the reflection model, evaluation, files
# ======================================================================================================================


@dataclass
class Run:
    """Everything that a run carries from one iteration to the next."""
    config: Config
    task: Task
    chat: Chat
    engine: Engine
    population: Population
    optimizer: Any
    opt_state: Any
    directory: Path
    evaluations: list[dict] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)  # of the current iteration, by phase
    shown: str = ""                                    # a recent response, for --show-samples

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    def seed(self, purpose: str) -> tuple[int, int]:
        """Seed of one use of randomness: nothing random is carried over, so a resumed run repeats exactly."""
        return self.config.seed, zlib.crc32(purpose.encode())

    def append(self, file: str, records: list[dict]) -> None:
        """Append records to a JSONL file of the run. A full disk is reported, it does not end the run."""
        try:
            with open(self.directory / file, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        except (OSError, ValueError) as e:
            warn(f"could not write {file}: {first_line(e)}")


@contextlib.contextmanager
def timed(run: Run, phase: str):
    """Adds the seconds of a `with` block to run.seconds[phase]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        run.seconds[phase] += time.perf_counter() - start


def answer_call(run: Run, prompts: list[list[int]], g: int, r: Response) -> list[int] | None:
    """The `environment` of `generate`: if the model's turn holds a call of a tool, cuts the response after it and
    returns the tokens of the reply, or [] after too many calls."""
    start, tag = r.turn, "</tool_call>"
    seen = max(start, len(r.tokens) - DECODE_CHUNK - 16)  # what is before was looked at before
    called = lambda end: tag in run.chat.text(r.tokens[seen:end], special=True)
    if not called(len(r.tokens)):
        return None
    end = next(end for end in range(seen + 1, len(r.tokens) + 1) if called(end))
    del r.tokens[end:], r.logprobs[end:]
    r.calls += 1
    if r.calls > run.config.max_tool_calls:
        r.stop = "calls"
        return []
    return run.chat.tool_turn(call_tool(run.task.tools, run.chat.text(
        r.tokens[start:], r.tokens[:start] or prompts[g], special=True)))


def sample_groups(run: Run, pairs: list[tuple[SystemPrompt, Problem, int]], split: str, iteration: int) -> list[Group]:
    """For each (system prompt, problem, n): n responses of pi_theta, graded and written to rollouts.jsonl.

    split: train, val, test, or test_greedy, which is decoded greedily. Groups are graded while others are sampled.
    """
    c, phases = run.config, ("sample", "grade") if split == "train" else ("evaluate", "evaluate")
    temperature = 0.0 if split == "test_greedy" else c.temperature
    prompts = [rollout_ids(run.task, run.chat, s.principles, x) for s, x, _ in pairs]
    texts, finals, grades, waiting, jobs = {}, {}, {}, [], []

    def grade(ended: list[int]):
        answers = [(pairs[g][1], t) for g in ended for t in finals[g]]
        try:
            graded = [(float(reward), outcome) for reward, outcome in run.task.grade(answers)]
            if len(graded) != len(answers):
                raise ValueError(f"{len(graded)} grades for {len(answers)} responses")
        except Exception as e:  # a failure of the grader never ends a run
            warn(f"grading failed, counted as reward 0: {first_line(e)}")
            graded = [(0.0, "error")] * len(answers)
        each = iter(graded)
        grades.update({g: [next(each) for _ in texts[g]] for g in ended})

    def done(g: int, responses: list[Response]):
        texts[g] = [run.chat.text(r.tokens, prompts[g]) for r in responses]
        finals[g] = [run.chat.text(r.tokens[r.turn:], r.tokens[:r.turn] or prompts[g]) for r in responses]
        waiting.append(g)
        if not jobs or jobs[-1].done():  # else it goes with the next ones: a call of the grader may start a process
            jobs.append(pool.submit(grade, waiting.copy()))
            waiting.clear()

    with ThreadPoolExecutor(1) as pool:
        with timed(run, phases[0]):
            responses = generate(run.engine, run.policy.theta, prompts, [n for _, _, n in pairs],
                                 SamplingParams(temperature, c.top_p, c.max_new_tokens),
                                 run.seed(f"{split}/{iteration}"), f"sampling {split}", done,
                                 partial(answer_call, run, prompts) if run.task.tools else None)
        with timed(run, phases[1]):
            for job in [*jobs, pool.submit(grade, waiting)]:
                job.result()
    groups = []
    for g, (s, x, _) in enumerate(pairs):
        rewards, outcomes = map(list, zip(*grades[g]))
        groups.append(Group(x, texts[g], rewards, outcomes, prompts[g], responses[g]))
        run.append("rollouts.jsonl", [
            dict(iteration=iteration, split=split, prompt=s.id, problem=x.id, reward=r, outcome=o, stop=y.stop,
                 tokens=len(y.tokens), calls=y.calls, response=t)
            for y, t, r, o in zip(responses[g], texts[g], rewards, outcomes)])
        run.shown = f"[{x.id}, prompt {s.id}, reward {rewards[0]:g} ({outcomes[0]})]\n{texts[g][0]}"
    return groups


def fit_request(chat: Chat, template: str, slots: dict[str, str], limit: int) -> list[int]:
    """Token ids of a filled-in request; while it is longer than `limit`, its longest slot loses its middle."""
    while len(ids := chat.ids("", fill(template, slots))) > limit:
        name = max(slots, key=lambda n: len(slots[n]))
        keep, text, note = int(0.45 * len(slots[name]) * limit / len(ids)), slots[name], "\n[… cut …]\n"
        if keep < 1 or 2 * keep + len(note) >= len(text):
            raise ValueError(f"a request does not fit into {limit} tokens")
        slots = slots | {name: text[:keep] + note + text[-keep:]}
    return ids


def make_ask(run: Run, iteration: int) -> Callable[[str, list[dict]], list[str]]:
    """The `ask` of section 4: requests of prompts_seed.txt answered by the reflection model, all in one batch."""
    c, calls = run.config, Counter()
    theta = run.policy.theta_ref if c.reflector == "reference" else run.policy.theta

    def ask(request: str, slots: list[dict]) -> list[str]:
        calls[request] += 1
        limit = max(run.engine.context - c.reflect_tokens, run.engine.context // 2)
        prompts = [fit_request(run.chat, run.task.texts[request], s, limit) for s in slots]
        responses = generate(run.engine, theta, prompts, [1] * len(prompts),
                             SamplingParams(c.reflect_temperature, c.top_p, c.reflect_tokens),
                             run.seed(f"{request}/{calls[request]}/{iteration}"), f"reflecting: {request}")
        replies = [run.chat.text(r.tokens, ids) for ids, [r] in zip(prompts, responses)]
        run.append("reflections.jsonl", [
            dict(iteration=iteration, request=request, prompt=run.chat.tokenizer.decode(p), reply=reply)
            for p, reply in zip(prompts, replies)])
        return [final_text(reply).strip() for reply in replies]  # what a model thinks aloud is not its reply

    return ask


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct, from n samples (Chen et al., 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def tested_prompt(run: Run) -> SystemPrompt:
    """The prompt that is evaluated; neither validation nor test scores have a say."""
    c, pool = run.config, run.population.pool
    if c.test_prompt == "latest" or c.mode == "reflection" or c.num_prompts == 1:  # alone, no prompt is ever rated
        return pool[-1]
    return max(pool, key=lambda s: (s.score(-c.ucb_lambda), bool(s.history), s.id))  # of equals one that has competed


def evaluate(run: Run, iteration: int) -> dict:
    """Score the tested prompt with pi_theta on validation and test problems; keep the weights if validation is best."""
    s, n = tested_prompt(run), run.config.test_samples
    result = {"iteration": iteration, "prompt": s.id}
    for split, problems in (("val", run.task.val), ("test", run.task.test)):
        groups = sample_groups(run, [(s, x, n) for x in problems], split, iteration)
        if groups:
            result[split] = float(np.mean([g.value for g in groups]))
            for k in sorted({k for k in (1, 2, 4, 8, n) if k <= n}):
                chances = [pass_at_k(g.graded.count("correct"), n, k) for g in groups]
                result[f"{split}_pass@{k}"] = float(np.mean(chances))
            s.scores.append({"iteration": iteration, "split": split, "score": result[split]})
    if run.config.test_greedy:
        groups = sample_groups(run, [(s, x, 1) for x in run.task.test], "test_greedy", iteration)
        result["test_greedy"] = float(np.mean([g.value for g in groups]))
    best = max((e["val"] for e in run.evaluations if "val" in e), default=-math.inf)
    run.evaluations.append(result)
    if result.get("val", -math.inf) > best:
        with checkpoint_manager(run, "best", keep=1) as manager:
            save_checkpoint(run, manager, iteration)
    return result


def summary(evaluations: list[dict]) -> dict[str, dict]:
    """The honest readings of a test curve: before training, final, mean of the last five, picked by validation."""
    first, final = evaluations[0], evaluations[-1]
    lasts = [e for e in evaluations if e is not first][-5:] or [first]
    mean = {name: float(np.mean([e[name] for e in lasts])) for name in ("test", "test_greedy") if name in final}
    picked = {"picked by validation": max(evaluations, key=lambda e: e["val"])} if "val" in final else {}
    return {"base model": first, "final": final, "mean of last 5": mean} | picked  # the first of equals


def lineage(population: Population, s: SystemPrompt, most: int = 6) -> str:
    """How a prompt came about, in words, from itself back to the root; after `most` generations only their number."""
    words, count = [], 0
    while s.parents:
        count += 1
        parents = " and ".join(map(str, s.parents))
        words += [f"{s.id} by {s.operation} of {parents} (iteration {s.iteration})"] if count <= most else []
        s = population.prompts[s.parents[0]]  # of a crossover the best parent, set A
    more = [f"… {count - most} generations more …"] if count > most else []
    return " <- ".join([*words, *more, f"{s.id}, the root"])


def closing_report(run: Run) -> str:
    """What a run ends with: the scores on the test set, the tested prompt, and where the files are."""
    c, s = run.config, tested_prompt(run)
    columns = {"test": f"T = {c.temperature:g}"} | ({"test_greedy": "greedy"} if c.test_greedy else {})
    title = f"mean reward on {len(run.task.test)} test problems"
    lines = [title.ljust(50) + "".join(f"{x:>10}" for x in columns.values())]
    for name, row in summary(run.evaluations).items():
        name += f": iteration {row['iteration']}, prompt {row['prompt']}" if "prompt" in row else " evaluations"
        lines.append(name.ljust(50) + "".join(f"{row[x]:>10.3f}" for x in columns))
    return "\n".join([*lines, "", f"prompt {s.id}: mu {s.mu:.1f}, sigma {s.sigma:.1f}", lineage(run.population, s),
                      textwrap.indent(listing(numbered(s.principles)), "    "), "", f"files: {run.directory}"])


def checkpoint_manager(run: Run, name: str, keep: int) -> ocp.CheckpointManager:
    """Orbax checkpoints in <run>/<name>."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    return ocp.CheckpointManager((run.directory / name).absolute(), options=options)


def save_checkpoint(run: Run, manager: ocp.CheckpointManager, iteration: int) -> None:
    """Everything needed to go on after this iteration: theta, Adam's state, the population, the evaluations."""
    loop = {"prompts": [dataclasses.asdict(s) for s in run.population.prompts], "evaluations": run.evaluations}
    weights = {"theta": run.policy.theta, "opt_state": run.opt_state}
    try:
        for step in manager.all_steps():  # of a run that was killed and resumed before them
            if step >= iteration:
                manager.delete(step)
        manager.save(iteration, args=ocp.args.Composite(
            weights=ocp.args.StandardSave(weights), loop=ocp.args.JsonSave(loop)))
        manager.wait_until_finished()
    except Exception as e:  # a full disk: the run goes on, and the next iteration tries again
        warn(f"could not save a checkpoint: {first_line(e)}")


def restore_checkpoint(run: Run, manager: ocp.CheckpointManager) -> int:
    """Bring `run` back to its latest checkpoint and cut its logs there; returns the iteration."""
    if (iteration := manager.latest_step()) is None:  # killed before the first one
        return cut_logs(run, -1)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"theta": run.policy.theta, "opt_state": run.opt_state})
    state = manager.restore(iteration, args=ocp.args.Composite(
        weights=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore()))
    run.policy.theta, run.opt_state = state["weights"]["theta"], state["weights"]["opt_state"]
    run.population.prompts = [SystemPrompt(**s) for s in state["loop"]["prompts"]]
    run.evaluations = state["loop"]["evaluations"]
    return cut_logs(run, iteration)


def cut_logs(run: Run, iteration: int) -> int:
    """Drop what was logged after this iteration, which is about to be done again; returns the iteration."""
    for path in run.directory.glob("*.jsonl"):
        part = path.with_name(path.name + ".part")
        with open(path, "rb") as old, open(part, "wb") as new:  # bytes: only \n ends a record
            for line in old:
                with contextlib.suppress(ValueError):  # the line that was being written may be incomplete
                    if json.loads(line)["iteration"] <= iteration:
                        new.write(line.rstrip(b"\n") + b"\n")
        part.replace(path)
    return iteration


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a crash, sees the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def draw_curves(run: Run) -> None:
    """curves.png: rewards and scores, rating mu of each prompt, response length, entropy."""
    from matplotlib.figure import Figure
    with open(run.directory / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    points = lambda rows, name: [(r["iteration"], r[name]) for r in rows if name in r]
    scores = {name: points(run.evaluations, name) for name in ("val", "test", "test_greedy")}
    panels = {"reward": {"training batch": points(lines, "reward_mean")} | {k: v for k, v in scores.items() if v},
              "rating mu": {f"prompt {s.id}": points(s.history, "mu") for s in run.population.prompts},
              "response length (tokens)": {"mean": points(lines, "response_tokens")},
              "entropy (nats a token)": {"mean": points(lines, "entropy")}}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(2, 2).ravel(), panels.items()):
        for label, curve in curves.items():
            axis.plot(*zip(*curve or [(math.nan, math.nan)]), marker=".", label=label)
        if 1 < len(curves) <= 10:
            axis.legend(fontsize=8)
        axis.set(title=title, xlabel="iteration", xlim=(-0.5, lines[-1]["iteration"] + 0.5))
        axis.grid(alpha=0.3)
        if title == "reward":
            axis.set_ylim(min(-0.02, axis.get_ylim()[0]), 1.02)  # a reward may be negative
    figure.suptitle(run.directory.name)
    figure.savefig(run.directory / "curves.png", dpi=110)


def draw_tree(run: Run) -> None:
    """tree.png, tree.svg: every prompt below its parents, with its mu; beside it its last test score, if it has one."""
    import matplotlib
    from matplotlib.figure import Figure
    prompts, tested = run.population.prompts, tested_prompt(run).id
    children, depth, order, stack = {s.id: [] for s in prompts}, {}, [], [0]
    for s in prompts:  # parents come first
        depth[s.id] = 1 + max((depth[i] for i in s.parents), default=-1)
        if s.parents:
            children[s.parents[0]].append(s.id)
    while stack:  # depth first
        order.append(stack.pop())
        stack += children[order[-1]][::-1]
    leaves = [i for i in order if not children[i]]
    x = dict(zip(leaves, range(len(leaves))))  # side by side; every other prompt above the middle of its children
    for i in reversed(order):
        x[i] = np.mean([x[child] for child in children[i]]) if children[i] else x[i]
    width, height = len(leaves), 1 + max(depth.values())
    figure = Figure(figsize=(max(5, 1.5 + 0.62 * width), 1.2 + 0.55 * height), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
    axis.axis("off")
    shades = matplotlib.colors.ListedColormap(matplotlib.colormaps["Greens"](np.linspace(0, 0.6, 256)))
    mus = [s.mu for s in prompts]
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(mus), max(mus)), shades)
    edges = {"mutation": dict(color="deepskyblue"), "crossover": dict(color="orange", connectionstyle="arc3,rad=0.15")}
    for s in prompts:
        look = edges.get(s.operation, {"color": "gray"})
        for i in s.parents:
            axis.annotate("", (x[s.id], depth[s.id] - 0.26), (x[i], depth[i] + 0.28), zorder=1,
                          arrowprops=dict(arrowstyle="-|>", linewidth=1.3, shrinkA=0, shrinkB=0, **look))
        axis.text(x[s.id], depth[s.id], f"{s.id}\n{s.mu:.3g}", ha="center", va="center", fontsize=7, zorder=2,
                  bbox=dict(boxstyle="round", facecolor=scale.to_rgba(s.mu), linewidth=2.5 if s.id == tested else 0.6))
        for e in [e for e in s.scores if e["split"] == "test"][-1:]:
            axis.text(x[s.id] + 0.33, depth[s.id], f"{e['score']:.2f}", va="center", fontsize=7, color="firebrick")
    for name, look in edges.items():
        axis.plot([], [], color=look["color"], label=name)
    axis.plot([], [], "ks", markerfacecolor="none", markeredgewidth=2.5, label="tested prompt")
    axis.plot([], [], color="firebrick", marker="$0.5$", markersize=14, linestyle="", label="test score")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.colorbar(scale, ax=axis, label="rating mu", shrink=min(1, 4 / height), aspect=15)
    figure.suptitle(run.directory.name)
    figure.savefig(run.directory / "tree.png", dpi=min(110, 10_000 / max(figure.get_size_inches())))
    figure.savefig(run.directory / "tree.svg")


# ======================================================================================================================
# 10. Algorithm 1 and the program
# ======================================================================================================================


def next_problems(run: Run, iteration: int) -> list[Problem]:
    """Batch of B problems; iterations count from 1. Every epoch has its own seeded shuffle."""
    train, B = run.task.train, min(run.config.batch_size, len(run.task.train))
    epoch, i = divmod(iteration - 1, len(train) // B)
    order = np.random.default_rng(run.seed(f"epoch/{epoch}")).permutation(len(train))
    return [train[j] for j in order[i * B: (i + 1) * B]]


def to_samples(run: Run, groups_MB: list[list[Group]]) -> list[Sample]:
    """Rollouts with advantages r - V[i,b] (or r minus the mean over all prompts); groups without any are left out."""
    c, samples = run.config, []
    for b in range(len(groups_MB[0])):
        marginal = float(np.mean([r for row in groups_MB for r in row[b].rewards]))
        for group in (row[b] for row in groups_MB):
            advantages = [r - (group.value if c.baseline == "prompt" else marginal) for r in group.rewards]
            if c.kl_coef or max(map(abs, advantages)) > 1e-9:  # the KL term also pulls on groups without advantage
                samples += [Sample(group.prompt_ids, y.tokens, y.logprobs, a)
                            for y, a in zip(group.responses, advantages) if y.stop != "length" or not c.mask_truncated]
    return samples


def evolve(run: Run, prompts: list[SystemPrompt], groups_MB: list[list[Group]], values_M: list[float], iteration: int,
           rng) -> dict:
    """Mutation of the best prompt and, with p_crossover, crossover (Alg. 1, from k <- argmax on). Returns the log."""
    c, population = run.config, run.population
    log = {"mutation": "none", "crossover": "none", "parse_failures": 0, "dropped": Counter()}
    ask = make_ask(run, iteration)
    k = argmax(values_M, rng)  # k <- argmax_i V_i
    operators = {"mutation": lambda: (mutate(prompts[k], groups_MB[k], ask, run.task, c, log), [prompts[k]])}
    if rng.random() < c.p_crossover and len(prompts) > 1:  # Alg. 2
        operators["crossover"] = lambda: crossover(prompts, groups_MB, k, ask, run.task, c, log) or (None, [])
    with timed(run, "reflect"):
        for name, operator in operators.items():
            try:
                add_child(population, *operator(), name, iteration, c, log)
            except Exception as e:  # a failure in reflection never ends a run
                log[name] = f"failed: {first_line(e)}"
                run.append("reflections.jsonl", [{"iteration": iteration, "traceback": traceback.format_exc()}])
    return log | {"dropped": dict(+log["dropped"])}


def espl_iteration(run: Run, iteration: int) -> dict:
    """One iteration of Algorithm 1; returns its line for metrics.jsonl."""
    c = run.config
    rng = np.random.default_rng(run.seed(f"evolution/{iteration}"))
    problems_B = next_problems(run, iteration)
    # Sample M system prompts from S; rollouts of missing ones go to the others: every mode spends M B N.
    prompts_M = run.population.pool[-1:] if c.mode == "reflection" else select(run.population, c, rng)
    each, more = divmod(c.num_prompts * c.num_rollouts, len(prompts_M))
    # Sample N solutions y_ij ~ pi_theta(. | s_i, x); reward r_ij = R(x, y_ij), value V_i = mean_j r_ij.
    groups = iter(sample_groups(run, [(s, x, each + (i < more)) for i, s in enumerate(prompts_M) for x in problems_B],
                                "train", iteration))
    groups_MB = [[next(groups) for _ in problems_B] for _ in prompts_M]
    values_M = [float(np.mean([g.value for g in row])) for row in groups_MB]
    # theta <- theta + alpha grad (J(theta) - beta KL(pi_theta, pi_ref))
    learning = {}
    if c.mode in ("espl", "rl"):
        with timed(run, "update"):
            objective = Objective(c.loss, c.temperature, c.clip_low, c.clip_high, c.kl_coef)
            run.opt_state, learning = rl_update(run.policy, run.optimizer, run.opt_state, to_samples(run, groups_MB),
                                                c.num_prompts * c.num_rollouts * len(problems_B), objective,
                                                c.microbatch_tokens)
    evolution = {}
    if c.mode != "rl":
        # v <- argsort V; (mu_i, sigma_i) <- TrueSkill.update
        update_ratings(prompts_M, values_M, iteration, c.rating)
        # Mutate the best prompt s_k; with probability p_crossover recombine (Algorithm 2); append the children to S.
        evolution = evolve(run, prompts_M, groups_MB, values_M, iteration, rng)
    return {"iteration": iteration, **batch_metrics(run, prompts_M, groups_MB, values_M), **learning, **evolution}


def batch_metrics(run: Run, prompts_M: list[SystemPrompt], groups_MB: list[list[Group]], values_M: list[float]) -> dict:
    """What metrics.jsonl says of an iteration's rollouts and ratings (README: What a run writes)."""
    groups = [g for row in groups_MB for g in row]
    responses, outcomes = [y for g in groups for y in g.responses], [o for g in groups for o in g.outcomes]
    tokens = sum(p is not None for y in responses for p in y.logprobs)  # sampled ones
    tools = {"tool_calls": float(np.mean([y.calls for y in responses])),
             "too_many_calls": sum(y.stop == "calls" for y in responses) / len(responses)} if run.task.tools else {}
    return {"reward_mean": float(np.mean([r for g in groups for r in g.rewards])),
            "rewards": {s.id: v for s, v in zip(prompts_M, values_M)},
            "ratings": {s.id: [s.mu, s.sigma] for s in run.population.pool[-run.config.window:]},
            "contrast_groups": sum(g.contrast for g in groups) / len(groups),
            "response_tokens": tokens / len(responses),
            "truncated": sum(y.stop == "length" for y in responses) / len(responses),
            "outcomes": dict(Counter(outcomes)), "rollout_tokens_per_second": tokens / run.seconds["sample"]} | tools


def print_line(run: Run, m: dict, last: int) -> None:
    """One compact line an iteration, and with --show-samples a response."""
    parts = [f"{m['iteration']:>4}/{last}"]
    if "rewards" in m:
        best = max(m["rewards"], key=m["rewards"].get)
        parts += [f"reward {m['reward_mean']:.3f}", f"best prompt {best} {m['rewards'][best]:.3f}",
                  f"tokens {m['response_tokens']:.0f}", f"cut {m['truncated']:.0%}"]
    parts += [f"no step: {m['skipped']}"] if "skipped" in m else []
    if "loss" in m:
        parts.append(f"grad {m['grad_norm']:.2g} ratio {m['ratio_mean']:.3f} entropy {m['entropy']:.2f}")
    parts += [f"{kind}: {m[kind]}" for kind in ("mutation", "crossover") if m.get(kind, "none") != "none"]
    parts += [f"{split} {m[split]:.3f}" for split in ("val", "test") if split in m]
    tqdm.write(" | ".join(parts + [" ".join(f"{k} {v:.1f}s" for k, v in m["seconds"].items())]))
    if run.config.show_samples and m["iteration"] % run.config.show_samples == 0:
        tqdm.write(textwrap.indent(run.shown, "        "))


def drop_long_problems(task: Task, chat: Chat, context: int, vocab_size: int) -> None:
    """Leave out problems whose prompt, with the root principles, has no room for a response; say how many."""
    for split in ("train", "val", "test"):
        problems = getattr(task, split)
        ids = [rollout_ids(task, chat, task.root, x) for x in problems]
        if (highest := max((max(i, default=0) for i in ids), default=0)) >= vocab_size:
            raise UserError(f"the tokenizer gives id {highest}, the model has {vocab_size} tokens; --model mixes two")
        kept = [x for x, i in zip(problems, ids) if 0 < len(i) < context]
        if len(kept) < len(problems):
            warn(f"left out {len(problems) - len(kept)} of {len(problems)} {split} problems: over {context} tokens")
        if problems and not kept and split != "val":
            raise UserError(f"no {split} problem fits into {context} tokens; raise --context or use another --model")
        setattr(task, split, kept)


def start_run(config: Config) -> Run:
    """Load everything, then make (or reopen) the run directory: what is wrong is found before anything is written."""
    task = load_task(config)
    engine, chat = load_engine(config)
    drop_long_problems(task, chat, engine.context, engine.policy.cfg.vocab_size)
    steps = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    optimizer = optax.chain(*steps, optax.adam(config.learning_rate, b1=0.9, b2=0.95, eps=1e-8))
    optimizer = optax.apply_if_finite(optimizer, 2**30)  # one infinite gradient must not end a week's run
    config.run_dir = config.run_dir or f"runs/{task.name}-{config.mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(config.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not config.resume and any(directory.iterdir()):
            raise UserError(f"--run-dir {directory} is not empty; choose another, or continue it with --resume")
        write_whole(directory / "config.json", json.dumps(dataclasses.asdict(config) | {"resume": ""}, indent=1))
    except OSError as e:
        raise UserError(f"cannot write --run-dir {directory}: {first_line(e)}") from e
    population = Population([SystemPrompt(0, task.root)], config.max_pool_size)
    opt_state = jax.jit(optimizer.init)(engine.policy.theta)
    return Run(config, task, chat, engine, population, optimizer, opt_state, directory)


@contextlib.contextmanager
def interrupts():
    """A list that is no longer empty when Ctrl-C was pressed, even if some library swallowed the KeyboardInterrupt."""
    pressed = []

    def interrupt(*_):
        pressed.append(True)
        raise KeyboardInterrupt

    def replace(old, new):
        if signal.getsignal(signal.SIGINT) is old:  # not if it is ignored, as in the background
            with contextlib.suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGINT, new)

    replace(signal.default_int_handler, interrupt)
    try:
        yield pressed
    finally:
        replace(interrupt, signal.default_int_handler)


def train(run: Run) -> None:
    """Algorithm 1's loop, with evaluation, logs and a checkpoint after every iteration."""
    c = run.config
    last = c.iterations or c.epochs * max(1, len(run.task.train) // c.batch_size)
    with checkpoint_manager(run, "checkpoints", keep=2) as manager, interrupts() as interrupted:
        done = restore_checkpoint(run, manager) if c.resume else -1
        for iteration in range(done + 1, last + 1):
            run.seconds.clear()
            m = espl_iteration(run, iteration) if iteration else {"iteration": 0}  # 0: evaluation of the base model
            if iteration % c.eval_every == 0 or iteration == last:
                m |= evaluate(run, iteration)
            m["seconds"] = dict(run.seconds)
            run.append("metrics.jsonl", [m])
            try:
                population = [dataclasses.asdict(s) for s in run.population.prompts]
                write_whole(run.directory / "population.json", json.dumps(population, indent=1, ensure_ascii=False))
                if "test" in m:
                    draw_curves(run)
                    draw_tree(run)
            except Exception as e:
                warn(f"could not write population.json or a picture: {first_line(e)}")
            print_line(run, m, last)
            if iteration % c.save_every == 0 or iteration == last:
                save_checkpoint(run, manager, iteration)
            if interrupted:  # inside a callback of some library, which swallowed the exception
                raise KeyboardInterrupt


def count_programs() -> list[float]:
    """A list that grows by the seconds of every program that XLA compiles from now on, or reads from its cache."""
    built = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: built.append(seconds) if name.endswith("backend_compile_duration") else None)
    return built


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    run, built = None, count_programs()
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        if config.compile_cache:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
        run = start_run(config)
        task, cfg = run.task, run.policy.cfg
        trained = f"LoRA rank {cfg.lora_rank}" if cfg.lora_rank else "all weights"
        print(f"{config.mode} on {task.name}: {len(task.train)} training, {len(task.val)} validation, {len(task.test)} "
              f"test problems\n{config.model} ({cfg.dtype}, {trained}) on {len(jax.devices())} {jax.default_backend()} "
              f"device(s), {run.engine.slots} slots\nwriting {run.directory}")
        train(run)
    except UserError as e:
        print(f"espl: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"; continue with: python espl.py --resume {run.directory}" if run else ""
        print(f"\nespl: interrupted{again}", file=sys.stderr)
        return 130
    print(f"{closing_report(run)}\n\n{len(built)} programs compiled in {sum(built):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
