"""`--reflector URL`: another model reflects, on a server that speaks OpenAI's protocol. Loaded by espl.py; no program.

It takes the package openai. The key is read from OPENAI_API_KEY and written nowhere. A stand-in for it, or a server with
another protocol, needs the three functions below.
"""

import os
import re
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402  (the very module of the program that loads this)


def check(c: espl.Config) -> None:
    """Raises UserError if the server that the flags name cannot be asked."""
    if not re.match(r"https?://[^@]+$", c.reflector) or not c.reflector_model:
        raise espl.UserError("--reflector is reference, current, or http(s)://HOST/v1, without a key, and "
                             "--reflector-model")
    with espl.explained("--reflector URL needs the package of the protocol", "pip install openai"):
        __import__("openai")


def side_by_side(run: espl.Run, learn, evolve) -> tuple[dict, dict]:
    """Both results. evolve waits for a server, in a thread; the seconds saved are noted as a negative "overlap"."""
    if espl.jax.process_count() > 1:  # what they send to each other must come in the same order
        return learn(), evolve()
    start = time.perf_counter()
    with ThreadPool(1) as pool:  # of a daemon: an interrupted run need not wait for the server
        job = pool.apply_async(evolve)
        results = learn(), job.get()
    run.seconds["overlap"] = time.perf_counter() - start - run.seconds["update"] - run.seconds["reflect"]
    return results


def ask(run: espl.Run, prompts: list[str], seed: int) -> list[str]:
    """Replies of the server, "" where it failed; after 429, 5xx and silence its package tries again by itself. Raises
    NoChild if none came, or no token is left."""
    import openai
    c, key, failures, good = run.config, os.environ.get("OPENAI_API_KEY") or "none", [], []
    lost = []  # requests that nobody answered: when that is all, the others need not wait as long

    def reply(i: int) -> str:
        try:
            if 0 < c.max_reflector_tokens <= run.reflector_tokens:
                raise espl.NoChild("all of --max-reflector-tokens is spent")
            if len(lost) >= c.reflector_concurrency and not good:
                raise espl.NoChild("nobody answers")
            answer = client.chat.completions.create(
                model=c.reflector_model, messages=[{"role": "user", "content": prompts[i]}], seed=(seed + i) % 2**31,
                temperature=c.reflect_temperature, top_p=c.top_p, max_tokens=c.reflect_tokens)
            if answer.usage:
                run.tokens["reflections"] += answer.usage.completion_tokens
                run.reflector_tokens += answer.usage.total_tokens
            good.append(answer.choices[0].message.content or "")
            return good[-1]
        except Exception as e:
            lost.extend([i] * isinstance(e, openai.APIConnectionError))
            failures.append(espl.first_line(e).replace(key, "…"))
            return ""

    with (openai.OpenAI(base_url=c.reflector, api_key=key, timeout=c.reflector_timeout, max_retries=3) as client,
          ThreadPool(c.reflector_concurrency) as pool):
        replies = pool.map(reply, range(len(prompts)), chunksize=1)
    if failures:
        espl.warn(f"{len(failures)} of {len(prompts)} requests to the reflector failed: {failures[0]}")
    if len(failures) == len(prompts):
        raise espl.NoChild(f"the reflector failed: {failures[0]}")
    return replies
