"""Feeds whatever others may write (models, users, task files) to what reads it in espl.py, made up by a seed.

    python tools/fuzz.py                                 # 2,000 cases of each reader, in about half a minute
    python tools/fuzz.py --cases 100000 --only grader
    python tools/fuzz.py --only chat --first 81234 --cases 1    # that case again

A reader may raise nothing but UserError, and that only where it is documented; what it returns must keep its promises;
and a text of 200,000 characters must be read in two seconds, which quadratic work would not be. Prints a line a reader;
exits with 1 after the first failure, which it names.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

CALLS = espl.from_tools("calls")

BITS = [  # what texts are made of, besides single characters
    *"{}[]()\"'\\/<>|#@$%^_=,.:;&~!?*+- \n\t\r\x00\u2028\ufeff\ud800éß中🙂°｜", "0", "7", "42", "468", "1e999", "9" * 30,
    "\\boxed{", "\\boxed {", "\\frac", "\\frac{1}{2}", "\\sqrt{-1}", "\\text{ or 7}", "\\text{", "\\,", "\\ ", "{,}",
    ",\\!", "0.1\\overline{6}", "\\overline{", "^\\circ", "\\%", "\\right.", "\\varnothing", "\\pi", "\\u12", "\\ud83d",
    "\\n", "\\\\", '{"operation": "add", "principle": "x"}', '"operation"', '"principle": ', '"modified_from": "[G1]"',
    "```json", "```", "[]", "[ {", "// c", "null", "true", "NaN", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", '{"name": "f", "arguments": {"a": 1}}', '"arguments": {', "<|im_end|>", "<|", "<eos>",
    "<start_of_", "[INST]", "<s>", "[math.system]", "\n[critique]\n", "\n[a.b]\n", "{principles}", "{problem}",
    "{tools}", "word", "If so, ", "G1", "A.G0", '{"problem": "p", "answer": 1}\n', '"problem": ', '"answer": ', "{%",
    "{{ x }}"]
TEMPLATES = [
    None, "{% for m in messages %}<s>{{ m.role }} {{ m.content }}{% endfor %}<s>",
    "{{ raise_exception('') }}", "{{ oops",
    "{% for m in messages %}{{ m.content | trim }}{% if m.role != 'user' %}{{ raise_exception('') }}{% endif %}"
    "{% endfor %}",
    "{{ messages[0].content | upper }}"]
ROOT = Path(espl.__file__).parent


def text(rng: random.Random, most: int = 40) -> str:
    """A text of some bits; one in a hundred is long, by repetition of a few."""
    bits = rng.choices(BITS, k=rng.randrange(most))
    unit = "".join(bits)[:60]
    return unit * (200_000 // len(unit)) if unit and rng.random() < 0.01 else "".join(bits)


def value(rng: random.Random, depth: int = 2):
    """A value of JSON, or of Python where a task file made it."""
    kind = rng.randrange(10 if depth else 7)
    floats = [0.5, 142.0, 1e300, float("nan"), float("inf")]
    word = rng.choice(["G0", "G1", "A.G0", "C0", "add", "modify"])
    simple = [None, rng.random() < 0.5, rng.randrange(-9, 10**6), rng.choice(floats), text(rng, 6), word, ""]
    return simple[kind] if kind < 7 else (
        [value(rng, depth - 1) for _ in range(rng.randrange(4))] if kind < 9 else
        {rng.choice(["a", "operation", "answer", "problem"]): value(rng, depth - 1) for _ in range(rng.randrange(4))})


def operations(rng: random.Random):
    """A reply of the reflection model."""
    said = text(rng)
    found = espl.parse_operations(said)
    assert found is None or all(isinstance(op, dict) and "operation" in op for op in found)
    assert isinstance(espl.read_object("{" + said[:2000] + "}"), dict)
    one_line = " ".join(said.replace("think>", "").replace("`", "").split())
    wanted = [{"operation": "add", "principle": one_line}]  # what is written well is read as it is written
    assert espl.parse_operations(f"```json\n{json.dumps(wanted)}\n```") == wanted


def hygiene(rng: random.Random):
    """Operations of any kind on principles."""
    old = {f"G{i}": word for i, word in enumerate(["zero", "one", "two"][: rng.randrange(4)])}
    wanted = {
        "operation": ["add", "modify", "remove", "merge"], "modified_from": [*old], "remove_id": [*old],
        "merged_from": [["G0", "G1"], [*old]], "principle": ["new", "ONE", "If <s> so", "write here the text of it"]}
    ops = [{k: rng.choice(v) if v and rng.random() < 0.8 else value(rng) for k, v in wanted.items()}
           if rng.random() < 0.9 else value(rng) for _ in range(rng.randrange(6))]
    config = espl.Config(max_principles=rng.randrange(1, 5), max_principle_words=rng.randrange(1, 9))
    r = espl.Tournament([], [], 0, None, None, config, texts={"critique": '"write here a text of it"'})
    kinds = rng.sample(wanted["operation"], rng.randrange(1, 5))
    new = espl.apply_operations(old, ops, kinds, [espl.Problem("p", "q", ("1234",))], r)
    assert len({t.casefold() for t in new}) == len(new) <= config.max_principles and min(r.dropped.values()) >= 0
    for t in set(new) - {*old.values()}:
        assert t == " ".join(t.split()) and t and t.isprintable() and len(t.split()) <= config.max_principle_words
        assert not espl.CONTROL.search(t) and "1234" not in t and "write here" not in t
    assert ops or new == [*old.values()][: config.max_principles]


def grader(rng: random.Random):
    """A response of the model, up to where math-verify is asked."""
    said = text(rng)
    boxed = espl.last_boxed(said + "\\boxed{" * (rng.random() < 0.5) + text(rng, 9) + "}")
    for answer in (said, boxed or ""):
        plain, *other = espl.readings(answer)
        assert plain == plain.strip() and len(other) < 2 and len(plain) <= 6 * len(answer)
    number = rng.randrange(10**rng.randrange(1, 13))
    comma = rng.choice([",", "\\,", "{,}", ",\\!", "\\ ", "~", " ", ""])
    spelled = rng.choice(["", " ", "$"]) + f"{number:,}".replace(",", comma) + rng.choice(["", ".", " . ", "$", ".$"])
    assert espl.readings(spelled) == [str(number)], spelled
    assert espl.last_boxed(text(rng) + "\\boxed{" + spelled + "}") == spelled


def tools(rng: random.Random):
    """A call of a tool."""
    def f(a: int = 0) -> str:
        return 1 / a
    call = json.dumps({"name": rng.choice(["f", "g"]), "arguments": value(rng)})
    said = text(rng) + "<tool_call>" + rng.choice([call, call[: rng.randrange(len(call))], text(rng)]) + "</tool_call>"
    assert isinstance(CALLS.call_tool({"f": f}, rng.choice([said, text(rng)])), str)


def make_tokenizer(made=[]):
    """A tokenizer of bytes with special tokens of its own."""
    if not made:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        vocab = {c: i for i, c in enumerate(["<s>", "[X]", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.append(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>", additional_special_tokens=["[X]"]))
    return made[0]


def chat(rng: random.Random):
    """Texts that are rendered by a chat template: of problems and principles, which JSON brought, and of models."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = rng.choice(TEMPLATES)
    turns, said = espl.Chat(tokenizer, rng.choice(["system", "user"])), text(rng)[:2000] + "[X]"
    ids = CALLS.tool_turn(turns, said)
    assert all(isinstance(i, int) for i in ids) and 1 not in ids and isinstance(turns.text(ids), str)
    said, asked = said.replace("\ud800", ""), text(rng).replace("\ud800", "")[:2000] + "?"
    try:
        assert turns.ids(said, asked) and 1 not in espl.fit_request(turns, "{x}!", {"x": said}, 10**6)
    except espl.UserError as e:
        assert "chat template" in str(e) and tokenizer.chat_template


def refused(read, *names: str):
    """What `read` returns; None where it raises UserError, whose one line must name one of these."""
    try:
        return read()
    except espl.UserError as e:
        assert "\n" not in str(e) and any(name in str(e) for name in names), str(e)


def files(rng: random.Random, folder: Path):
    """A JSONL file of problems, and a prompts file."""
    lines = "\n".join(rng.choice([text(rng), json.dumps(value(rng)), json.dumps({
        rng.choice(["problem", "question"]): value(rng), rng.choice(["answer", "golden_answers"]): value(rng)}),
        '{"problem": "p", "answer": "1"}']) for _ in range(rng.randrange(4)))
    path = folder / "problems.jsonl"
    path.write_bytes(lines.encode("utf-8", "replace") if rng.random() < 0.9 else rng.randbytes(50))
    for problem in refused(lambda: espl.read_jsonl(str(path)), "problems.jsonl") or []:
        assert problem.question == problem.question.strip() != "" and problem.answers and "True" not in problem.answers
        assert make_tokenizer()(problem.question + problem.answer).input_ids
    seed = (ROOT / "prompts_seed.txt").read_text(encoding="utf-8")
    i, j = sorted((rng.randrange(len(seed)), rng.randrange(len(seed))))
    path, own = folder / "prompts.txt", rng.choice(["", text(rng)])
    mangled = rng.choice([seed[:i] + text(rng) + seed[j if rng.random() < 0.3 else i:], text(rng)])
    path.write_bytes(mangled.encode("utf-8", "replace"))
    found = refused(lambda: espl.read_prompts(str(path), "t", own), "prompts.txt")
    assert found is None or set(found) == set(espl.SLOTS) and all(isinstance(t, str) for t in found.values())


def tasks(rng: random.Random, folder: Path):
    """A task file."""
    shown = lambda: rng.choice([
        repr(value(rng)), "dict(seed=3)", "dict(top_p=0.5)", "{'corpus': ('', 'text')}", "x", "[1]"])
    body = [f"{name} = {shown()}" for name in ("PROMPTS", "DEFAULTS", "FLAGS", "reward", "parse", "tools", "problems")
            if rng.random() < 0.2]
    body += ["def tools(config):\n    return " + shown()] * (rng.random() < 0.2)
    body += ["def problems(config):\n    return " + rng.choice([
        shown(), f"[{shown()}], [{shown()}]",
        "[dict(problem=i, answer=i) for i in 'abcde'], [dict(problem='t', answer=1)]",
        f"[dict(problem={shown()}, answer={shown()})], [dict(problem='t', answer=1)]"])] * (rng.random() < 0.7)
    body += ["from __future__ import nothing", "1/0", "import no_such_module"][: rng.randrange(-9, 2)]
    path = folder / "task.py"
    path.write_text("\n".join(body).encode("ascii", "backslashreplace").decode())

    def load():
        task = espl.load_task(espl.parse_args(["--task", str(path)]))
        return task, espl.system_text(task, ["p"])
    task, said = refused(load, "task", "--", "section", "prompts file", "tool") or (None, "[G0] p")
    assert "[G0] p" in said and (task is None or task.train and task.test)
    for problem in task.train if task else ():
        assert problem.question and make_tokenizer()(problem.question + problem.answer).input_ids


READERS = {f.__name__: f for f in (operations, hygiene, grader, tools, chat, files, tasks)}


def fuzz(name: str, first: int, cases: int, folder: Path) -> str:
    """Runs the cases of a reader; returns what failed, or ""."""
    reader = READERS[name]
    for case in range(first, first + cases):
        rng, start = random.Random(f"{name}/{case}"), time.process_time()
        try:
            reader(rng, folder) if name in ("files", "tasks") else reader(rng)
            seconds = time.process_time() - start
            assert seconds < 2 or case == first, f"took {seconds:.1f} s"  # the first imports
        except Exception:
            return f"{name}: case {case} failed; --only {name} --first {case} --cases 1\n{traceback.format_exc()}"
    return ""


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=READERS, help="one reader")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else READERS:
            start = time.perf_counter()
            if failure := fuzz(name, args.first, args.cases, Path(folder)):
                print(failure)
                return 1
            print(f"{name}: {args.cases} cases in {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
