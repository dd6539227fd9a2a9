"""A shop with unknown prices: a small instruct model sells, a larger one reflects.

    python espl.py --task shop    # Qwen2.5-Coder-0.5B- and 1.5B-Instruct, from the hub

The seed draws the prices of sixteen goods with invented names. What one of them costs is
declarative knowledge: reflection finds it, from an order and its total. To look a price up in the
prompt and to multiply by it is procedural. Test orders are of the same goods in other numbers.
Responses are so short that they need no summary. docs/real_model.md has results.
"""

import random
import re

NAMES = "flib zorp quane junt perl woff drib snerk plim gorf tweb vusk marn crole hesk blint"
GOODS = NAMES.split()

DEFAULTS = {
    "model": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "reflector": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "val_size": 0,
    "batch_size": 8,
    "num_rollouts": 4,
    "num_prompts": 2,
    "iterations": 16,
    "lora_rank": 16,
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 24,
    "reflect_on": "failures",
    "reflect_problems": 4,
    "max_operations": 1,
    "reflect_temperature": 0.5,
    "reflect_tokens": 24,
    "eval_every": 8,
    "test_samples": 3,
}

PROMPTS = """
[system]
You work at the till of a shop. Reply to an order with one sum that ends with the total, and \
nothing else, like this: 7 * 60 = 420

Prices:
{principles}

[principles]

[summarize]

[critique]
Cashiers tried:
{attempts}

But the order was: {problem}. The right total is {answer} coins. So {problem} cost {answer} coins. \
Divide {answer} by the number of them: what does one cost? Reply with one line: One ... costs ... \
coins.

[aggregate]

[crossover]
{sets}

{wins}

Which prices stand in another set and not in set A? Write one line for each: \
One ... costs ... coins.
"""


def problems(config):
    """Orders of two to five of a thing: 40 to train on, and the other 24 to test on."""
    rng = random.Random(f"shop/{config.seed}")
    price = {thing: rng.randint(11, 39) for thing in GOODS}
    orders = [
        {"problem": f"{n} {thing}s", "answer": str(n * price[thing])}
        for thing in GOODS
        for n in (2, 3, 4, 5)
    ]
    rng.shuffle(orders)
    return orders[:40], orders[40:]


def reward(record, response):
    """1 if the last number is the total."""
    numbers = re.findall(r"\d+", response)
    if not numbers:
        return 0.0, "no_answer"
    return float(numbers[-1] == record["answer"])


def parse(reply):
    """Each line "One junt costs 34 coins." as an added principle, if the shop has such a thing."""
    found = re.findall(r"[Oo]ne (?:\d+ )?(\w+?)s? costs? (\d+)", reply)
    named = [(thing, price) for thing, price in found if thing in GOODS]
    return [{"operation": "add", "principle": f"{thing}: {price}"} for thing, price in named]
