"""An artificial world for a model of 146,000 weights (glyphs_model/), which learns it in a minute.

This is the default task. Twelve glyphs stand for eight operations; the seed of a run decides which
is which. Training problems have one step ("7 @ 4"), test problems two ("7 @ 4 # 2", worked from
left to right); a principle reads "@ max". What a glyph means is declarative knowledge, which
reflection finds. Carrying operations out is procedural: tools/pretrain_glyphs.py taught the model
bad habits there. It also taught it the language of the requests below.
"""

import random
import re
from pathlib import Path

GLYPHS = "@#&%~^$*!?<>"
OPERATIONS = {
    "plus": lambda a, b: (a + b) % 10,
    "minus": lambda a, b: (a - b) % 10,
    "times": lambda a, b: a * b % 10,
    "diff": lambda a, b: abs(a - b),
    "max": max,
    "min": min,
    "left": lambda a, b: a,
    "right": lambda a, b: b,
}

DEFAULTS = {  # what such a small model needs instead of the paper's values
    "model": str(Path(__file__).with_name("glyphs_model")),
    "train_size": 416,
    "lora_rank": 0,
    "iterations": 60,
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "microbatch_tokens": 1024,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 32,
    "reflect_on": "failures",
    "reflect_problems": 4,
    "max_operations": 1,
    "reflect_temperature": 0.5,
    "reflect_tokens": 128,
    "max_principles": 14,
    "eval_every": 10,
    "test_samples": 2,
    "save_every": 10,
}

PROMPTS = """
[system]
{principles}

[principles]

[summarize]
{problem} truth {answer} attempt
{response}
{grade} summarize

[critique]
{principles}
{problem} truth {answer}
{attempts}
critique

[aggregate]
{principles}
{suggestions}
aggregate

[crossover]
{sets}
{wins}
crossover
"""


def solve(problem, meaning):
    """The answer to "7 @ 4 # 2", worked from left to right."""
    a, *rest = problem.split()
    for glyph, b in zip(rest[::2], rest[1::2]):
        a = OPERATIONS[meaning[glyph]](int(a), int(b))
    return str(a)


def draw_meaning(rng):
    """{glyph: operation}: every operation at least once, four of them twice."""
    names = [*OPERATIONS, *rng.sample(list(OPERATIONS), len(GLYPHS) - len(OPERATIONS))]
    rng.shuffle(names)
    return dict(zip(GLYPHS, names))


def problems(config):
    """All 1,200 problems of one step, to train on, and 128 of two steps, to test on."""
    rng = random.Random(f"glyphs/{config.seed}")
    meaning = draw_meaning(rng)
    one = [f"{a} {glyph} {b}" for glyph in GLYPHS for a in range(10) for b in range(10)]
    two = [f"{rng.choice(one)} {rng.choice(GLYPHS)} {rng.randrange(10)}" for _ in range(128)]
    train = [{"problem": x, "answer": solve(x, meaning)} for x in one]
    test = [{"problem": x, "answer": solve(x, meaning)} for x in two]
    return train, test


def reward(record, response):
    """1 if the digit after the last "=", which must end the response, is the answer."""
    said = re.search(r"= (\d)\s*\Z", response)
    return float(said is not None and said[1] == record["answer"])


def parse(reply):
    """Edits in a reply like "… keep ; … modify [G3] % max"; None when no clause ends in one."""
    clauses = re.findall(
        r"(keep|add|modify|merge)((?: \[\S+\])*)(?: (\S \w+))?(?= ;|\Z)",
        reply,
    )
    edits = []
    for operation, named, text in clauses:
        ids = re.findall(r"\[(\S+)\]", named)
        edit = {"operation": operation, "principle": text}
        edit |= {"modified_from": "".join(ids[:1]), "merged_from": ids}
        if operation != "keep":
            edits.append(edit)
    return edits if clauses else None
