"""The embedded world, which a model of 146,000 weights (glyphs_model/) learns in a minute: the default task.

Twelve glyphs stand for eight operations; each run's seed draws anew which is which. Training problems have one step
("7 @ 4"), test problems two ("7 @ 4 # 2"), worked from left to right; a principle reads "@ max". What a glyph means is
declarative knowledge, found by reflection. Carrying operations out is procedural: the model was taught bad habits there
(tools/pretrain_glyphs.py, which also taught it the language of the requests below). To espl.py this is a task like any
other, and its model one more directory.
"""

import random
import re

GLYPHS = "@#&%~^$*!?<>"
OPERATIONS = {"plus": lambda a, b: (a + b) % 10, "minus": lambda a, b: (a - b) % 10, "times": lambda a, b: a * b % 10,
              "diff": lambda a, b: abs(a - b), "max": max, "min": min, "left": lambda a, b: a, "right": lambda a, b: b}

DEFAULTS = dict(  # what such a small model needs instead of the paper's values
    model="tasks/glyphs_model", lora_rank=0, train_size=416, learning_rate=3e-4,
    max_grad_norm=1.0, temperature=1.0, top_p=1.0, max_new_tokens=32, iterations=60, reflect_on="failures",
    reflect_problems=4, max_operations=1, reflect_tokens=128, reflect_temperature=0.5, max_principles=14,
    test_samples=2, test_greedy=True, save_every=10, microbatch_tokens=7200)

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


def solve(problem: str, meaning: dict[str, str]) -> str:
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


def problems(config) -> tuple[list[dict], list[dict]]:
    """All 1,200 one-step problems, to train on, and 128 two-step ones, to test on."""
    rng = random.Random(f"glyphs/{config.seed}")
    meaning = draw_meaning(rng)
    one = [f"{a} {g} {b}" for g in GLYPHS for a in range(10) for b in range(10)]
    two = [f"{rng.choice(one)} {rng.choice(GLYPHS)} {rng.randrange(10)}" for _ in range(128)]
    return tuple([{"problem": x, "answer": solve(x, meaning)} for x in part] for part in (one, two))


def reward(record: dict, response: str) -> float:
    """1 if the digit after the last "=", which must end the response, is the answer."""
    said = re.search(r"= (\d)\s*\Z", response)
    return float(said is not None and said[1] == record["answer"])


def parse(reply: str) -> list[dict] | None:
    """Operations in a reply like "… keep ; … modify [G3] % max"; None when no clause ends in one."""
    clauses = re.findall(r"(keep|add|modify|merge)((?: \[\S+\])*)(?: (\S \w+))?(?= ;|\Z)", reply)
    found = [(verb, re.findall(r"\[(\S+)\]", ids), text) for verb, ids, text in clauses]
    operations = [{"operation": verb, "principle": text, "modified_from": "".join(ids[:1]), "merged_from": ids}
                  for verb, ids, text in found if verb != "keep"]
    return operations if found else None
