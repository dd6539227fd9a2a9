"""Sums and differences, for a small instruct model: a real pretrained one learns on two cores.

    python espl.py --task sums                # HuggingFaceTB/SmolLM2-135M-Instruct, from the hub

Numbers are below 30 in training problems and from 30 to 59 in test problems. So small a model
writes no JSON: it is asked for one sentence of advice, and the first line of its reply is proposed
as a new principle. docs/real_model.md has results.
"""

import random
import re

DEFAULTS = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "val_size": 0,
    "iterations": 20,
    "learning_rate": 2e-4,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 16,
    "reflect_problems": 4,
    "max_operations": 1,
    "reflect_temperature": 0.7,
    "reflect_tokens": 48,
    "max_principles": 4,
    "eval_every": 5,
    "test_samples": 2,
}

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

Complete this advice to all pupils in one sentence, without any numbers: \
When you are asked for a sum or a difference,

[aggregate]
These are rules for pupils:
{principles}
{suggestions}
Are they good? Answer yes or no.

[crossover]
These sets of rules helped pupils with different questions:
{sets}

{wins}

Complete this advice to all pupils in one sentence, without any numbers: \
When you are asked for a sum or a difference,
"""


def problems(config):
    """All problems below 30, to train on, and 48 others, to test on, in the seed's order."""
    rng = random.Random(f"sums/{config.seed}")
    return drawn(rng, 1, 30), drawn(rng, 30, 60)[:48]


def drawn(rng, low, high):
    """All sums and differences of two numbers from low to high - 1, shuffled."""
    records = []
    for a in range(low, high):
        for b in range(low, high):
            records.append({"problem": f"{a} + {b} =", "answer": str(a + b)})
            records.append({"problem": f"{a} - {b} =", "answer": str(a - b)})
    rng.shuffle(records)
    return records


def reward(record, response):
    """1 if the last number of the response is the answer."""
    found = re.findall(r"-?\d+", response)
    if not found:
        return 0.0, "no_answer"
    return float(found[-1] == record["answer"])


def parse(reply):
    """The reply's first line as an added principle. That of an aggregate reply is ignored."""
    first = reply.strip().partition("\n")[0]
    return [{"operation": "add", "principle": first}] if first else []
