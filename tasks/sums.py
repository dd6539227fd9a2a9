"""Sums and differences, for a small instruct model: a real pretrained one learns on two cores (docs/small_model.md).

    python espl.py --task sums                      # HuggingFaceTB/SmolLM2-135M-Instruct, from the hub or --model DIR

Numbers are below 30 in training problems and from 30 to 59 in test problems. So small a model writes no JSON: it is asked
for one sentence of advice, and the first line of what it replies is proposed as a new principle.
"""

import random
import re

DEFAULTS = dict(
    model="HuggingFaceTB/SmolLM2-135M-Instruct", temperature=1.0, top_p=1.0, max_new_tokens=16, learning_rate=2e-4,
    max_grad_norm=1.0, iterations=20, eval_every=5, test_size=48, test_samples=2, val_size=0, reflect_on="contrast",
    reflect_problems=4, reflect_tokens=48, reflect_temperature=0.7, max_operations=1, max_principles=4)

PROMPTS = """
[system]
You are a calculator. Reply with the number only.

{principles}

[principles]

[summarize]
A pupil was asked: {problem}
The right answer is {answer}. The pupil wrote: {response}
That is {grade}. In one sentence, what did the pupil do?

[critique]
Pupils were asked: {problem}
The right answer is {answer}. This is what they did:

{attempts}

Their rules so far:
{principles}

Complete this advice to all pupils in one sentence, without any numbers: When you are asked for a sum or a difference,

[aggregate]
These are rules for pupils:
{principles}
{suggestions}
Are they good? Answer yes or no.

[crossover]
These sets of rules helped pupils with different questions:
{sets}

{wins}

Complete this advice to all pupils in one sentence, without any numbers: When you are asked for a sum or a difference,
"""


def problems(config) -> tuple[list[dict], list[dict]]:
    """(training, test): "a + b =" and "a - b =", drawn by the seed."""
    rng, parts = random.Random(f"sums/{config.seed}"), []
    for low, high in ((1, 30), (30, 60)):
        pairs = [(a, sign, b) for a in range(low, high) for b in range(low, high) for sign in "+-"]
        parts.append([{"problem": f"{a} {sign} {b} =", "answer": str(a + b if sign == "+" else a - b)}
                      for a, sign, b in rng.sample(pairs, len(pairs))])
    return parts[0], parts[1]


def reward(record: dict, response: str) -> tuple[float, str]:
    """1 if the last number of the response is the answer."""
    numbers = re.findall(r"-?\d+", response)
    right = bool(numbers) and numbers[-1] == record["answer"]
    return float(right), "correct" if right else "wrong" if numbers else "no_answer"


def parse(reply: str) -> list[dict]:
    """The reply's first line as an operation, which a plan of revision (see [aggregate]) may not have."""
    first = reply.strip().partition("\n")[0]
    return [{"operation": "add", "principle": first}] if first else []
