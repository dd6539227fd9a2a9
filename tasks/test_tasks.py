"""Tests of the tasks: the reward of mathematics, calls of tools, search, gym, glyphs, sums, shop.

Verdicts on answers are worked out by hand, never by the reward. reasoning-gym is replaced by a
small package that misbehaves, but for one test.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import glyphs
import mathematics
import numpy as np
import pytest
import search
import shop
import sums
import tool_calls
from test_espl import MEANS, make_mesh, make_tiny_model, one_device, write_jsonl  # noqa: F401  (a fixture)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import espl

TASKS = Path(__file__).parent


def load_task(*argv):
    return espl.load_task(espl.parse_args([*map(str, argv)]))


def fails(capfd, *argv):
    """The one line with which the program refuses its flags."""
    assert espl.main([*map(str, argv)]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("espl: error: ")
    return line


@pytest.fixture
def files(tmp_path):
    """Flags of a training and a test file with a few problems."""
    argv = []
    for part in ("train", "test"):
        records = [{"question": f"{part} {i}?", "golden_answers": ["a", f"b{i}"]} for i in range(9)]
        argv += [f"--{part}-file", write_jsonl(tmp_path / f"{part}.jsonl", records)]
    return argv


# ==================================================================================================
# Mathematics
# ==================================================================================================


def outcome(gold, answer):
    """Of a box with an answer, where gold is accepted: a text, a number or a list."""
    reward, word = mathematics.reward({"answer": gold}, rf"So it is \boxed{{{answer}}}.")
    assert reward == (1.0 if word == "correct" else 0.0)
    return word


@pytest.fixture
def new_worker(monkeypatch):
    """The test has math-verify's process for itself."""
    monkeypatch.setattr(mathematics, "WORKERS", [])


@pytest.fixture
def stand_in(tmp_path, monkeypatch, new_worker):
    """A function that puts a program in the place of math-verify."""

    def replace(source):
        path = tmp_path / "site" / "math_verify.py"
        path.parent.mkdir()
        path.write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(path.parent))

    return replace


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}} end}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace needs no partner
        (r"\boxed{a\\}}", r"a\\"),  # a line break, then a true brace
        (r"\boxed{5 or \boxed{6}}", "6"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{3} and \boxed{4", None),  # no falling back to an earlier box
        (r"\fbox{3}, \boxed 3, boxed{3}", None),
        (r"\boxed" + "{" * 10**5 + "}" * 10**5, "{" * (10**5 - 1) + "}" * (10**5 - 1)),
        (r"\boxed{" * 10**5, None),
    ],
    ids=range(11),
)
def test_last_boxed(text, content):
    start = time.process_time()
    assert mathematics.last_boxed(text) == content
    assert time.process_time() - start < 2  # quadratic work takes minutes


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"<think>\boxed{3}</think>Hm.", "no_answer"),
        (r"<think>\boxed{3}", "no_answer"),
        (r"<think>\boxed{4}</think>\boxed{3}", "correct"),
        (r"opened by the prompt \boxed{4}</think>\boxed{3}", "correct"),
        (r"\boxed{ }", "no_answer"),
    ],
)
def test_only_the_text_after_thinking_is_graded(text, expected):
    assert mathematics.reward({"answer": "3"}, espl.final_text(text))[1] == expected


@pytest.mark.parametrize(
    "gold, right, wrong",
    [
        ("42", ["042", " $42$. ", "+42", "42.0", "4.2e1"], ["43", "-42", "42.000001", "42" * 500]),
        ("1000", ["1,000", "1\\,000", "1{,}000", "10^3", "1e3"], ["1", "1000.1"]),
        ("50,\\!625", ["50625", "50,625", "50\\ 625"], ["50", "625"]),
        ("-7", ["$-7$", "−7", "-7.0", "-14/2", r"-\frac{14}{2}"], ["7", "+7", "-7.1"]),
        ("0", ["-0", "0.0", "0e5", r"0\%"], ["1", "10^{-20}"]),
        ("9" * 500, ["9" * 500], ["9" * 499 + "8", "9" * 1001]),
        (["1", "2"], ["2", "1.0"], ["3", "12"]),
        (0.00001, ["0.00001", "1e-5", "10^{-5}", r"\frac{1}{100000}", "1/100000"], ["0.00002"]),
        (3e5, ["300000", "3e5", r"3\times 10^5", "300,000.0", "3 × 10⁵"], ["300001", "3e4"]),
        (6.02e23, [r"6.02\times10^{23}", "6.02E+23", "602" + "0" * 21], [r"6.03\cdot 10^{23}"]),
        ("0.00032", ["3.2e-4", r"3.2 \cdot 10^{-4}", r"0.032\%"], ["3.2e-5", "3.2e-40"]),
        (1e-40, ["1e-40", "10^{-40}"], ["1.1e-40", "0", "1e-41"]),
        ("0.1", [".1", "1/10"], ["0.10000000000000000001", "0.1000001"]),
        (r"\frac13", ["1/3", r"\dfrac{2}{6}"], ["0.33333333333333333333", "0.333333"]),
        ("100000000000000000001", ["100000000000000000001.0"], ["10^{20}", "1e20"]),
        ("12.5", [r"12.5\%", "25/2"], [r"1.25\%", r"125\%", "1e999"]),
    ],
)
def test_numbers_need_no_process(gold, right, wrong, monkeypatch):
    monkeypatch.setattr(mathematics, "judged", lambda *_: "asked")
    assert {answer: outcome(gold, answer) for answer in right} == dict.fromkeys(right, "correct")
    assert {answer: outcome(gold, answer) for answer in wrong} == dict.fromkeys(wrong, "wrong")


def test_what_is_very_long_is_wrong_and_blanks_do_not_count():
    assert outcome("3", "3" * 5000) == "wrong"
    assert outcome("7", " " * 2000 + "7") == "correct"


PAIRS = r"""
= 35 :: 35.0\% :: 35\% :: 35.00 :: \$35 :: 35 \text{ dollars} :: x = 35
# 35 :: 3.5\% :: 0.35 :: 35.1\% :: 35 \text{ or } 36 :: 35 \text{ or 36}
= 12.5 :: 12.5\% :: \frac{25}{2} :: 12\frac{1}{2} :: $12.5\%$.
# 12.5 :: 1.25\% :: 125\% :: 12
= 0.125 :: 12.5\% :: \frac18 :: .125
= 12.5\% :: 12.5 :: \frac18
= 50\% :: \frac12 :: 0.5 :: 50
# 0.5 :: 0.5\% :: 5\%
= 1000 :: 1\ 000 :: 1\,000.00 :: 1{,}000.0 :: 1~000.0 :: 1 000 :: 10^3 :: 1,\!000
# 1000 :: 1\,0000 :: 1{,}001 :: 1\,000\,000
= 1234567.5 :: 1\,234\,567.5 :: 1,234,567.5
= 7 :: \log_2 128 :: \log_2\,128 :: \sqrt{49} :: 7.
= 503/126 :: 3 125/126 :: 3\frac{125}{126}
# 3125/126 :: 3 125/126
= 1000/3 :: 1 000/3
= \pi :: \pi. :: $\pi.$ :: \frac{2\pi}{2} :: π :: pi
= 2\pi :: 2π :: 2 pi :: \pi\cdot2
# \pi :: 3.14 :: 2\pi :: \pi.5 :: 180
= \frac{3}{8} :: 3/8 :: $\dfrac{6}{16}$. :: \tfrac38 :: ⅜ :: 3/8 cups
# \frac{3}{8} :: \frac{8}{3} :: -\frac38 :: 0.38
= 1\frac14 :: 1.25 :: \frac54 :: 1¼ :: 1 1/4
= \frac12 :: ½ :: \sin 30^\circ
= -1.5 :: -1 1/2 :: −1½ :: –\frac{3}{2}
= \emptyset :: \varnothing :: \{\} :: \varnothing. :: ∅
=! \emptyset :: \text{no solution} :: \{ \}
# \emptyset :: \{0\} :: 0 :: \{1\}
= \frac{\pi}{2} :: 90^\circ :: 90^{\circ} :: 90° :: 0.5\pi :: \pi/2
# \frac{\pi}{2} :: 90 :: 45^\circ :: \pi
= 90^\circ :: \frac{\pi}{2} :: 90 :: 90°
# 90^\circ :: 60^\circ :: \frac{\pi}{3}
= 120 :: 120^\circ :: 120\text{ degrees} :: 5!
= 1\le x<2 :: [1,2) :: x\in[1,2) :: 1 ≤ x < 2
=! 1\le x<2 :: 2>x\ge1
# 1\le x<2 :: [1,2] :: x<2
= [1,2) :: 1\le x<2 :: 1\leq x<2. :: \left[1, 2\right)
# [1,2) :: [1,2] :: (1,2) :: 1<x\le2
= (-\infty, 0) \cup [2, 3] :: [2, 3] \cup (-\infty, 0) :: (−∞, 0) ∪ [2, 3]
= \frac13 :: 0.\overline{3} :: 0.\overline{33} :: \frac{2}{6} :: 3^{-1}
# \frac13 :: 0.3 :: 0.333 :: 0.0\overline{3} :: 0.\overline{34}
= -\frac16 :: -0.1\overline{6} :: \frac{-1}{6}.
= 2.\overline{3} :: \frac{7}{3}
= i :: \sqrt{-1}
= \sqrt{-1} :: i
# i :: -i :: 1
= 1+2i :: 1+2\sqrt{-1} :: 2i+1
=! 2i :: \sqrt{-4}
= 468 :: 468.0 :: n=468 :: 2\cdot 234=468 :: 468=468
=! 468 :: 468 = n
# 468 :: 467=468 :: 468=467 :: 468 \text{ (not 467)} :: 467 \text{ or } 468 :: 468, 467 :: x=467=468
# 468 :: 468 \text{, or maybe 467}
= 2\sqrt3 :: \sqrt{12} :: 2\sqrt{3}\text{ cm} :: \frac{6}{\sqrt3} :: 2\cdot 3^{1/2}
= 2\sqrt3 :: 2√3 :: √12 :: √(12)
# 2\sqrt3 :: 3\sqrt2 :: 3.4641 :: -2\sqrt3 :: \sqrt{12}+10^{-20}
= 1,2 :: 2,1 :: \{1,2\} :: 1 \text{ and } 2 :: 1\text{ or }2
= 1, 2, 3 :: \{3, 2, 1\}
# 1,2 :: 1 :: 1,2,3 :: 1,3
#! \{1,2\} :: (1,2)
#! 1,-2 :: (-2,1)
#! (1,2) :: \{1,2\}
= (1,\frac{\pi}{2}) :: \left(1,\pi/2\right) :: (1,\ \frac{\pi}{2}). :: (1, 90^\circ)
# (1,2) :: (2,1) :: [1,2] :: (1,2,3)
= x^2-1 :: (x-1)(x+1) :: -1+x^2 :: x^2 - 1. :: x²−1
# x^2-1 :: x^2+1 :: (x-1)^2 :: y^2-1
= 4a-2 :: 2(2a - 1)
= y=2x+3 :: y = 3+2x :: 2x+3
# y=2x+3 :: y=2x-3
= \begin{pmatrix}1\\2\end{pmatrix} :: \begin{bmatrix}1\\2\end{bmatrix}
# \begin{pmatrix}1\\2\end{pmatrix} :: \begin{pmatrix}2\\1\end{pmatrix}
= \infty :: ∞ :: +\infty :: \text{infinity}
# \infty :: -\infty :: −∞
= C :: \text{C} :: \text{(C)} :: \textbf{(C)} :: (C) :: C. :: C) :: $c$ :: \mathbf{(C)}
# C :: D :: \text{(B)} :: B)
= \text{Monday} :: monday :: \text{Monday}. :: \textbf{Monday}
# Monday :: Tuesday :: \text{not Monday}
= \$6 :: 6.00 :: 6 :: 2·3 :: 2×3 :: 2\cdot 3
= 9 :: 3² :: 3^2 :: (−3)²
= 100 :: 100\text{ square units} :: 100 square units
= 10 :: 10 people :: 10~people :: 10\,\mathrm{cm} :: 10 \text{ cm}^2 :: x₁ = 10
# 10 :: 10 million :: 10 dozen :: 10 or 12 people :: people 10 :: 10 percent of 3
# 6 :: 5 \text{ or } 6 :: $5$ or $6$ :: \text{half a dozen, or 5}
# 42 :: the value) is ( 42 :: 7 ^ ^ 42
# 5 :: 1/0 :: \text{V or 4}
=! 5 :: \text{five} :: about 5 :: option 5
# \text{no} :: \text{yes}
= 5 \text{ m} :: 5 :: 5\text{ metres} :: 5 metres
#! 5 \text{ m} :: 5 \text{ cm} :: 5\text{ kg}
# 1.4142135 :: \sqrt2
# 0.10000001 :: 0.1
= 2^{100} :: 1267650600228229401496703205376 :: 4^{50}
# 2^{100} :: 1267650600228229401496703205377 :: 2^{100}+1
= 2^{-60} :: \frac{1}{2^{60}} :: \left(\frac12\right)^{60}
# 2^{-60} :: 2^{-61} :: 0 :: \frac{1}{2^{60}+1}
# (1, 2^{-60}) :: (1, 2^{-61})
= \binom{5}{2} :: 10
= \frac{1}{\sqrt{2}} :: \frac{\sqrt{2}}{2} :: 2^{-1/2}
=! \sqrt2 :: 2^{0.5}
=! \mathbb{R} :: \text{all real numbers}
#! \frac{n}{N} :: \frac{N}{n}
#! xy :: XY
#! cat :: act
=! \sqrt[3]{2} :: ∛2
=! 10000000 :: 10 million
=! 4 :: 100_2
"""  # =, for equal in a mathematician's eye, or #, then a gold and answers; !: judged otherwise


@pytest.mark.parametrize("half", [0, 1])
def test_a_table_of_answers_judged_by_hand(half):
    """What is known to be judged otherwise (docs) is to be struck off when it no longer is."""
    missed, lines = [], PAIRS.strip().split("\n")[half::2]
    for line in lines:
        gold, *answers = line.split(" :: ")
        mark, gold = gold.split(" ", 1)
        right = (mark[0] == "=") != ("!" in mark)
        for answer in answers:
            found = outcome(gold, answer)
            if found != ("correct" if right else "wrong"):
                missed.append((line[:2], gold, answer, found))
    assert missed == []
    assert len(lines) > 40


def test_any_of_several_answers_will_do():
    for answer, expected in [
        ("7", "correct"),
        ("0.5", "correct"),
        ("x", "correct"),
        ("y", "wrong"),
    ]:
        assert outcome(["7", r"\frac{1}{2}", "x"], answer) == expected


def test_records_as_they_come(tmp_path, capfd):
    """GSM8K's worked solutions, JSON numbers, lists; a sentence is refused with file and line."""
    records = [
        {"question": "a", "answer": "He has 5 * 12 = <<5*12=60>>60.\n#### 60"},
        {"question": "b", "answer": "A #### in between.\n#### 1,080"},
        '{"problem": "c", "answer": 6.02e23}\n',
        {"question": "d", "groundtruth": 142.0},
        {"question": "e", "golden_answers": ["x", "10 people"], "answer": None},
    ]
    test = write_jsonl(tmp_path / "test.jsonl", [{"question": "t", "answer": "no solution"}])
    flags = ["--test-file", test, "--val-size", 0, "--train-file"]
    task = load_task(*flags, write_jsonl(tmp_path / "train.jsonl", records))
    assert task.name == "mathematics"
    found = {x.question: x for x in task.train}
    boxes = {"a": "60", "b": "1080", "c": r"6.02\times10^{23}", "d": "142", "e": "10"}
    for question, x in found.items():
        text = rf"\boxed{{{boxes[question]}}}"
        assert espl.grade(task, [(x.record, text)]) == [(1.0, "correct")]
        assert espl.grade(task, [(x.record, r"\boxed{61}")]) == [(0.0, "wrong")]
    assert found["a"].answers == ("60",)
    for answer in ("The answer is 42", "Answer: 42", r"A total of $\frac12$", "#### it is 4", ""):
        path = write_jsonl(tmp_path / "bad.jsonl", [*records, {"question": "z", "answer": answer}])
        assert f"{path}:6" in fails(capfd, *flags, path)


def descendants_memory():
    """Resident bytes of all processes below this one, from /proc.

    A child that has not called exec yet is this process once more, and not counted.
    """
    parents, memory, own = {}, {}, Path("/proc/self/cmdline").read_bytes()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            process = Path("/proc", pid)
            if int(pid) == os.getpid() or (process / "cmdline").read_bytes() != own:
                stat = (process / "stat").read_text().rpartition(")")[2].split()
                parents[int(pid)] = int(stat[1])
                pages = int((process / "statm").read_text().split()[1])
                memory[int(pid)] = pages * os.sysconf("SC_PAGE_SIZE")
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return sum(memory.get(pid, 0) for pid in found[1:])


def measured(answers):
    """Outcomes and peak bytes of grading, in a thread, where Python allows no signals."""
    outcomes, peak = [], 0
    thread = threading.Thread(
        target=lambda: outcomes.extend(outcome("7", a + " ") for a in answers)
    )
    thread.start()
    while thread.is_alive():
        peak = max(peak, descendants_memory())
        time.sleep(0.02)
    return outcomes, peak


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc"), reason="memory is read from /proc")


@needs_proc
def test_hostile_answers_are_cheap_and_leave_the_others_alone(new_worker, monkeypatch):
    monkeypatch.setattr(mathematics, "GRADE_SECONDS", 1)
    slow = ["10^{10^{10}}", "1e1000000000", r"\binom{10^9}{5\cdot10^8}"]
    hungry = ["2^{10^9}", "(x+y+z+w)^{500}"]
    deep = [r"\frac{1}{" * 100 + "2" + "}" * 100, "(" * 400 + "1" + ")" * 400]
    odd = ["\x00", "5\x00", "\ud800", "5\ud800\udfff", "\\" * 900, "$" * 900, "%", "\n5\r\n\u2028"]
    start = time.monotonic()
    outcomes, peak = measured([*slow, *hungry, *deep, *odd, r"\sqrt{49}", r"\sqrt{50}"])
    assert outcomes[: len(slow)] == ["timeout"] * len(slow)
    assert set(outcomes[:-2]) <= {"wrong", "timeout", "error", "no_answer"}
    assert outcomes[-2:] == ["correct", "wrong"]
    assert time.monotonic() - start < len(outcomes) + 20
    assert 50e6 < peak < 1e9  # the lower bound shows that the processes were seen


@needs_proc
def test_memory_is_limited(new_worker, monkeypatch):
    monkeypatch.setattr(mathematics, "GRADE_BYTES", 250 * 2**20)
    outcomes, peak = measured(["x^{1000000}-1=(x-1)^{1000000}"])  # takes 1.4 GB when it can
    assert outcomes[0] != "correct"
    assert 50e6 < peak < 500 * 2**20


NOISY = """
import os, sys, time

def LatexExtractionConfig(**_): pass

def parse(text, *_, **__):
    print("correct\\n" * 9, flush=True)
    os.write(1, b"correct\\n")
    if "read" in text: os.read(0, 0)
    if "exit" in text: sys.exit(0)
    if "slow" in text: time.sleep(2)
    return text

def verify(gold, answer, **_):
    return gold == answer

print("correct")
"""


def test_nothing_printed_while_grading_is_taken_for_a_reply(stand_in):
    stand_in(NOISY)
    said = ["1+x", "x+2", "x+exit", "x+read", "1+x", "1+y"]
    golds = ["1+ x", "1+x", "1+x", "1+x", r"\sqrt x", "1+y"]
    assert [outcome(g, a) for g, a in zip(golds, said)] == [
        *("wrong", "wrong", "error", "wrong", "wrong", "correct"),
    ]


def test_a_reply_nobody_waited_for_is_not_the_next_ones(stand_in):
    def interrupt(*_):
        raise KeyboardInterrupt

    stand_in(NOISY)
    assert outcome("x+y", "x+z") == "wrong"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        outcome("x+slow", "x+1slow")
    signal.signal(signal.SIGALRM, before)
    assert mathematics.judged(["x+y"], ["x+y"]) == "correct"


def test_a_worker_that_was_killed_is_replaced(stand_in):
    stand_in(NOISY)
    assert outcome("2x", "x+x") == "wrong"
    [worker] = mathematics.WORKERS
    worker.kill()
    worker.wait()
    with pytest.raises(RuntimeError, match="math-verify"):
        outcome("2x", "x+x")
    assert outcome("2x", "x+x") == "wrong"


def test_without_math_verify_the_outcome_is_error(stand_in, capfd):
    stand_in("raise ImportError('no such package')")
    task = SimpleNamespace(name="t", reward=mathematics.reward)
    golds = {"2x": "x+x", "5": "5", "3x": "x+x+x"}
    answers = [({"answer": gold}, rf"\boxed{{{answer}}}") for gold, answer in golds.items()]
    assert [word for _, word in espl.grade(task, answers)] == ["error", "correct", "error"]
    assert capfd.readouterr().err.count("pip install math-verify") == 1


def test_only_installed_packages_are_imported(stand_in, tmp_path, monkeypatch):
    """Not what lies in the working directory, or beside the task's file."""
    stand_in(NOISY)
    for name in ("math_verify", "json", "fractions"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    shutil.copy(TASKS / "mathematics.py", tmp_path / "maths.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    module = espl.task_module("maths.py")
    assert module.reward({"answer": "2x"}, r"\boxed{x+x}") == (0.0, "wrong")


# ---- Data sets of the hub

HUB = {
    "aime": (["AI-MO/aimo-validation-aime:train"], ["ByteDance-Seed/BeyondAIME:test"]),
    "aime_amc": (
        ["AI-MO/aimo-validation-aime:train", "AI-MO/aimo-validation-amc:train"],
        ["ByteDance-Seed/BeyondAIME:test"],
    ),
    "hmmt": (
        [f"MathArena/hmmt_feb_{year}:train" for year in (2023, 2024, 2025)],
        ["MathArena/hmmt_nov_2025:train"],
    ),
}
SIZES = {"AI-MO/aimo-validation-aime": 90, "AI-MO/aimo-validation-amc": 83}
SIZES |= {"ByteDance-Seed/BeyondAIME": 100, "PeterJinGo/nq_hotpotqa_train": 200}


@pytest.fixture
def hub(monkeypatch):
    """The data sets that are asked for; each has about the size of the true one."""
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append(f"{path}:{split}")
        numbers = range(SIZES.get(path, 30))
        return [{"problem": f"{path}:{split} {i}", "answer": i} for i in numbers]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", HUB)
def test_data_sets_of_the_paper(name, hub, files):
    train, test = HUB[name]
    task = load_task("--task", name)
    assert hub == train + test
    assert len(task.train + task.val) == sum(SIZES.get(x[:-6], 30) for x in train)
    assert task.reward({"answer": 7}, r"\boxed{7.0}") == (1.0, "correct")
    hub.clear()
    task = load_task("--task", name, *files[:2])
    assert hub == test  # a file takes the place of the other
    assert len(task.train + task.val) == 9


def test_aime_has_the_papers_values_and_evaluates_little(hub, capsys):
    config = espl.parse_args(["--task", "aime"])
    assert vars(config) == vars(espl.Config(task="aime"))
    policy = SimpleNamespace(cfg=SimpleNamespace(dtype="float32"))
    run = SimpleNamespace(config=config, task=espl.load_task(config), policy=policy, directory="d")
    espl.announce(run)
    said = re.search(
        r"samples up to ([\d,]+) training .* ([\d,]+) evaluation", capsys.readouterr().out
    )
    trained, evaluated = (int(n.replace(",", "")) for n in said.groups())
    assert trained == 10 * 80 * 15  # the last batch of an epoch has four problems
    assert evaluated <= 4000


def test_dapo_is_read_through_its_columns(monkeypatch):
    """The hub has 1.79 million rows, each problem a hundred times; here 50,000 of 500."""
    import datasets

    rows = []
    for i in range(500):
        prompt = [{"content": f"Solve.\n\nproblem\n\n{i}\n\nEnd.", "role": "user"}]
        rows.append({"prompt": prompt, "reward_model": {"ground_truth": str(i % 7)}})
    test = [{"problem": "p", "answer": "70", "year": 2025}]
    sets = {
        "BytedTsinghua-SIA/DAPO-Math-17k": [datasets.Dataset.from_list(rows)] * 100,
        "yentinglin/aime_2025": [datasets.Dataset.from_list(test)],
    }
    sets = {name: datasets.concatenate_datasets(parts) for name, parts in sets.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: sets[path])
    start = time.process_time()
    task = load_task("--task", "dapo", "--train-size", 500)
    assert time.process_time() - start < 5
    found = {(x.question, x.answers) for x in task.train + task.val}
    assert found == {(f"problem\n\n{i}", (str(i % 7),)) for i in range(500)}
    assert [(x.question, x.answers) for x in task.test] == [("p", ("70",))]


# ==================================================================================================
# Calls of tools
# ==================================================================================================

CALL = '<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>'
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def multiply(a, b):
    if b == 0:
        exit(3)
    return f"{a * b}"


@pytest.mark.parametrize(
    "text, reply",
    [
        (CALL, "42"),
        ("<think>I use <tool_call> or </tool_call></think>" + CALL, "42"),
        ("x</think> I call\n" + CALL + "\n", "42"),
        (CALL.replace("{", "{\n ").replace("}", "\n}"), "42"),
        (CALL + CALL.replace("6", "9"), "42"),
        (CALL.replace("6", '"6"'), "6666666"),
        (CALL.replace("6", '"a\nb\t"').replace("7", "2"), "a\nb\ta\nb\t"),  # no JSON, strictly
        (CALL.replace('{"a": 6, "b": 7}', r'"{\"a\": 6, \"b\": 7}"'), "42"),
        (CALL.replace(': 6, "b": 7', ": 6"), "Error: .*missing.*'b'.* Write <tool_call>"),
        (CALL.replace("multiply", "divide"), "Error: unknown tool. There is: multiply."),
        (CALL.replace("6", "6,,"), "Error: Expecting"),
        (CALL.replace("6", "9" * 2**20), "Error: one call .* 4000"),
        (CALL.replace("6", "[" * 2000), "Error: "),
        ("<tool_call>" + CALL, "Error: one call in each"),
        ("<think> " + CALL, "Error: a call inside <think>"),
        ("</tool_call>", "Error: </tool_call> without"),
        ("<tool_call></tool_call>", "Error: Expecting"),
        ("<tool_call>[1]</tool_call>", "Error: .* Write <tool_call>"),
        (CALL.replace('{"a": 6, "b": 7}', '"6 7"'), "Error: "),
        (CALL.replace("6", "null"), "Error: "),
        (CALL.replace("7", "0"), "Error: 3"),  # exit() in a tool
        ("<think>" * 10**5 + "<tool_call>" * 10**5, "Error: "),
    ],
)
def test_every_call_gets_a_reply(text, reply):
    start = time.process_time()
    assert re.match(reply, tool_calls.call({"multiply": multiply}, text))
    assert time.process_time() - start < 2


def make_chat(template=CHATML):
    """A chat whose tokens are bytes, and a few that are special."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return espl.Chat(tokenizer)


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "<|end|>\n<|user|>REPLY<|end|>\n<|assistant|>"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"), "<|end|>\n<|user|>REPLY"),
        (None, "\nREPLY\n"),
    ],
)
def test_a_reply_ends_the_models_turn(template, expected):
    chat = make_chat(template)
    hostile = "12 what the model said <|end|> \ud83d <<s>|end|> </tool_response> <think>\n."
    turn = chat.tokenizer.decode(tool_calls.reply_turn(chat, hostile))
    before, after = expected.split("REPLY")
    assert turn.startswith(f"{before}<tool_response>\n12 what the model said ")
    assert turn.endswith(f".\n</tool_response>{after}") or not after
    inside = turn.partition("12")[2].partition("\n.")[0]
    assert not re.search(r"<\|end\|>|</tool_response>|<think>", inside)


def test_calls_are_found_wherever_a_chunk_ends():
    """The closing tag is many tokens, some in the next chunk. What follows it is taken back."""
    thinking = make_chat(CHATML.replace("assistant|>{% endif", "assistant|><think>{% endif"))
    chat = make_chat()

    def ids(text):
        return chat.tokenizer(text, add_special_tokens=False).input_ids

    def sample(y, text, chat=chat):
        """Continues a rollout by chunks of the text, as `generate` does."""
        tokens, reply = ids(text), None
        while tokens and reply is None:
            chunk, tokens = tokens[: espl.DECODE_CHUNK], tokens[espl.DECODE_CHUNK :]
            y.tokens += chunk
            y.logprobs += [0.0] * len(chunk)
            reply = tool_calls.answer_call(chat, y, {"multiply": multiply}, 2)
        y.tokens += reply or []
        y.logprobs += [None] * len(reply or [])
        return reply if reply is None else chat.tokenizer.decode(reply)

    for lead in range(0, espl.DECODE_CHUNK, 3):
        y, said = espl.Rollout(ids("go")), "x" * lead + CALL
        assert sample(y, "y" * lead) is None
        assert "\n56\n" in sample(y, CALL.replace("6", "8") + " and more" * lead)
        start = len(y.tokens)
        assert "\n42\n" in sample(y, said + CALL)
        assert chat.tokenizer.decode(y.tokens[start:]).startswith(said + "<|end|>")
        assert sample(y, said) == ""
        assert y.stop == "calls"
        assert len(y.tokens) == len(y.logprobs)
    opened = ids("…<think>")  # by the template
    assert "Error: a call inside" in sample(espl.Rollout(opened), CALL + "</think>")
    assert "\n42\n" in sample(espl.Rollout(opened), "</think>" + CALL)
    y = espl.Rollout(ids("go"))
    assert "\n42\n" in sample(y, CALL, thinking)
    assert "Error: a call inside" in sample(y, CALL, thinking)  # the reply's turn opened it


PIECES = ["<end>", "|", "</tool_call>", "</tool", "_call>"]
PIECES += [f'<tool_call>{{"name": "count", "arguments": {{"n": {n}}}}}' for n in range(5)]
PIECES += [f" {n}" for n in range(4)]


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A random model whose tokens are pieces of calls, with its chat. Other words are dropped."""
    directory = make_tiny_model(
        tmp_path_factory.mktemp("m"), vocab_size=len(PIECES), eos_token_id=0
    )
    word = "|".join(re.escape(p) for p in sorted(PIECES, key=len, reverse=True))
    core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(PIECES)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
    core.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}|"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", chat_template=template
    )
    mesh = make_mesh()
    policy = espl.read_policy(directory, espl.read_model_config(directory), mesh)
    policy.stop_ids = (0,)
    return policy, espl.Chat(tokenizer)


def count(n):
    """A tool whose replies have different lengths: 0 to 70 tokens beside the turn's."""
    return " 3" * (10 * n)


def test_responses_with_tools_are_those_of_a_loop(caller):
    """What a chunk holds beyond a call is taken back; a reply without room ends the response."""
    policy, chat = caller
    environment = partial(tool_calls.answer_call, chat, tools={"count": count}, max_calls=3)

    def in_a_loop(y, most):
        """What becomes of y's sampled tokens, one by one, with a tool that looks at each."""
        loop = espl.Rollout(y.prompt)
        while len(loop.tokens) < most:
            loop.tokens.append(y.tokens[len(loop.tokens)])
            loop.logprobs.append(0.0)
            reply = environment(loop)
            if reply is None and loop.tokens[-1] == 0:
                loop.stop = "eos"
                return loop
            if reply is not None and (not reply or len(loop.tokens) + len(reply) >= most):
                return loop
            loop.tokens += reply or []
            loop.logprobs += [None] * len(reply or [])
        return loop

    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, len(PIECES), 9).tolist() for _ in range(30)]
    stops, replied = set(), []
    for most in (30, 120):
        sampled = [espl.Rollout(prompt) for prompt in prompts]
        espl.generate(policy, policy.theta, sampled, espl.Sampling(1.5, 1.0, most), environment)
        for y in sampled:
            loop = in_a_loop(y, most)
            assert (y.tokens, y.stop) == (loop.tokens, loop.stop)
            assert [p is None for p in y.logprobs] == [p is None for p in loop.logprobs]
            full = len(y.tokens) == most
            stops.add("no room" if y.stop == "length" and not full else y.stop)
            replied += [y] if None in y.logprobs else []
    assert stops == {"eos", "length", "calls", "no room"}
    assert len(replied) > 10

    # The loss is on what the model sampled, and on nothing that a tool said.
    for y in replied:
        batch = espl.fill_rows([[y]], (1, 256), segments=True)
        [trained] = batch["target"][batch["mask"]][None]
        assert trained.tolist() == [t for t, p in zip(y.tokens, y.logprobs) if p is not None]


# ==================================================================================================
# Search
# ==================================================================================================


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Passages on five towns, in a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = []
    for i, town in enumerate(["Oslo", "Bergen", "Lima", "Quito", "Accra"]):
        text = f"{town} is a town of the number{i}. It has a harbour."
        records.append({"id": i, "title": town, "text": text})
    return write_jsonl(tmp_path / "corpus.jsonl", records)


def search_in(path):
    return search.search_tool(search.read_passages(path))


def test_search(corpus, tmp_path):
    find = search_in(corpus)
    found = find(["What is number3?", "Bergen", "harbour", "xyzzy", "one query too many"])
    parts = re.split("(?m)^Query: ", found)[1:]
    assert [p.split("\n")[0] for p in parts] == ["What is number3?", "Bergen", "harbour", "xyzzy"]
    assert parts[0].split("\n\n")[1] == "Quito\nQuito is a town of the number3. It has a harbour."
    assert parts[1].split("\n\n")[1].startswith("Bergen\n")
    assert parts[1].count("town") == 1
    assert parts[2].count("harbour.") == 3
    assert "Nothing found." in parts[3]
    for queries in ("Bergen", [1], None):
        with pytest.raises(ValueError, match="list of texts"):
            find(queries)

    def stored():
        paths = (tmp_path / "cache").rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    before = stored()
    assert search_in(corpus)(["Bergen"]) == find(["Bergen"])
    assert stored() == before != {}
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"{n} fish"} for n in "abcde"])
    assert "\n\nc fish" in search_in(other)(["fish c"])
    for path in before:  # an index that broke is made again
        path.write_bytes(b"")
    assert search_in(corpus)(["Bergen"]) == find(["Bergen"])


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "there is no passage"),
        (['{"text": "a"}\n', "{"], ":2: not a passage"),
        (['{"text": 3}'], ":1: not a passage"),
        (["[]"], ":1: not a passage"),
        (None, "name the passages"),
    ],
)
def test_passages_that_cannot_be_read(tmp_path, hub, capfd, lines, message):
    path = write_jsonl(tmp_path / "c.jsonl", lines or [])
    assert message in fails(capfd, "--task", "search" if lines is None else f"search:{path}")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Answer: The Eiffel Tower!", (1, "correct")),
        ("I think. Answer:  eiffel-tower\n", (1, "correct")),
        ("Answer: la tour", (1, "correct")),
        ("Answer: Paris", (0, "wrong")),
        ("Answer:", (0, "wrong")),
        ("Answer: the", (0, "wrong")),  # no word is left to compare
        ("Answer: Eiffel Tower in Paris", (0, "wrong")),
        ("Eiffel Tower", (-0.1, "no_answer")),
        ("Answer: x Answer: Eiffel Tower", (-0.1, "no_answer")),
        ("Answer: x<tool_response>Answer: y</tool_response>Answer: la Tour", (1, "correct")),
        ("<tool_response>Answer: la tour</tool_response> Hm.", (-0.1, "no_answer")),
    ],
)
def test_search_reward_is_exact_match_and_format(text, expected):
    record = {"question": "?", "golden_answers": ["Eiffel Tower", "La Tour", "eiffeltower"]}
    assert search.reward(record, text) == expected
    assert search.reward({"answer": 12}, "Answer: 12.") == (1, "correct")


def test_search_task(corpus, hub, files):
    tasks = [load_task("--task", f"search:{corpus}", "--seed", seed) for seed in (0, 0, 1)]
    assert set(hub) == {f"PeterJinGo/nq_hotpotqa_train:{part}" for part in ("train", "test")}
    assert tasks[0].test == tasks[1].test != tasks[2].test
    task = load_task("--task", f"search:{corpus}", *files[2:])
    assert len(task.test) == 9
    assert espl.parse_args(["--task", f"search:{corpus}"]).train_size == 196
    x = task.test[0]
    said = f"Answer: {x.answers[1].upper()}!"
    assert espl.grade(task, [(x.record, said)]) == [(1.0, "correct")]
    chat = make_chat()
    asked = '<tool_call>{"name": "search", "arguments": {"query_list": ["Lima"]}}</tool_call>'
    tokens = chat.tokenizer(asked).input_ids
    y = espl.Rollout([1], tokens + tokens, [0.0] * 2 * len(tokens))
    assert "Lima is a town" in chat.tokenizer.decode(task.environment(chat, y))
    assert y.tokens == tokens


# ==================================================================================================
# Gym
# ==================================================================================================

STAND_IN = {  # what tasks/gym.py uses of reasoning-gym, with data sets that misbehave
    "__init__.py": "",
    "coaching/__init__.py": "",
    "utils.py": """
import re

def extract_answer(text):
    found = re.findall("<answer>(.*?)</answer>", text, re.S)
    return found[-1].strip() if found else None
""",
    "coaching/base_curriculum.py": """
from types import SimpleNamespace

RangeAttributeMode = SimpleNamespace(UPPER_BOUND="alone", INCLUSIVE="all")

class DefaultCurriculumContext:
    def __init__(self, mode):
        self.mode = mode
""",
    "factory.py": """
import random
from dataclasses import dataclass

@dataclass
class Config:
    digits: int = 9
    scale: float = 1.0
    words: tuple = ()
    seed: int | None = None
    size: int = 500

class Sums:
    def __init__(self, config):
        assert config.digits < 8, "too many digits"
        self.config = config

    def __getitem__(self, i):
        assert i < self.config.size
        rng = random.Random(self.config.seed + i)
        if rng.random() < 0.1 * self.config.digits:
            raise RuntimeError("this one fails")
        a, b = (rng.randrange(10 ** self.config.digits) for _ in "ab")
        return {"question": f" {a} + {b}? ", "answer": str(a + b)}

    def score_answer(self, answer, entry):
        print("a library may print")
        return 1.0 if answer == entry["answer"] else float(eval(answer))

class Hashes(Sums):
    def __getitem__(self, i):
        return {"question": f"{i} {hash('x')}", "answer": None}

class Hangs(Sums):
    def __getitem__(self, i):
        while i > 3 or self.config.digits == 2:
            try:
                while True:
                    pass
            except Exception:
                pass
        return Sums.__getitem__(self, i)

class Curriculum:
    def set_global_level(self, level):
        if level < 0:
            raise ValueError(f"Invalid level: {level}")
        self.digits = [1, 2, 3, 9][min(level, 3)]

    def generate_configuration(self, context):
        return Config(digits=self.digits) if context.mode == "alone" else None

DATASETS = {"sums": (Sums, Config), "flat": (Sums, Config), "hashes": (Hashes, Config)}
DATASETS |= {"hangs": (Hangs, Config), "composite": (Sums, Config)}
CURRICULA = {"sums": Curriculum, "hashes": Curriculum, "hangs": Curriculum}
""",
}


@pytest.fixture
def gym(tmp_path, monkeypatch):
    """The path of the task with a stand-in for the package, few problems and short limits."""
    for name, text in STAND_IN.items():
        path = tmp_path / "site" / "reasoning_gym" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    source = (TASKS / "gym.py").read_text()
    source = re.sub("(GRADE_SECONDS|MAKE_SECONDS) = [0-9]+", r"\1 = 1", source)
    (tmp_path / "gym.py").write_text(source.replace('"test_size": 128', '"test_size": 20'))
    return f"{tmp_path}/gym.py"


def test_gym_problems(gym, capfd):
    """Their difficulty is their level's, and train and test have no problem in common."""
    argv = ["--train-size", 40, "--task"]
    tasks = [load_task(*argv, f"{gym}:sums", "--seed", seed) for seed in (3, 3, 4)]
    for task in tasks:
        assert [len(x) for x in (task.train, task.val, task.test)] == [32, 8, 20]
        for problems, digits in ((task.train + task.val, 1), (task.test, 2)):
            pairs = [re.fullmatch(r"(\d+) \+ (\d+)\?", x.question).groups() for x in problems]
            assert [str(int(a) + int(b)) for a, b in pairs] == [x.answer for x in problems]
            assert max(len(number) for pair in pairs for number in pair) == digits
    assert tasks[0].train == tasks[1].train != tasks[2].train
    assert tasks[0].test == tasks[1].test != tasks[2].test
    assert "<answer>" in tasks[0].texts["system"]
    assert not capfd.readouterr().err
    few = load_task(*argv, f"{gym}:sums,test_size=3", "--seed", 3)
    assert [x.question for x in few.test] == [x.question for x in tasks[0].test[:3]]
    same = load_task(*argv, f"{gym}:sums,digits=1")  # of 100: what is tested is not trained on
    assert not {x.question for x in same.train + same.val} & {x.question for x in same.test}
    a, b = (load_task(*argv, f"{gym}:hashes") for _ in range(2))
    assert a.train == b.train
    assert a.test[0].answer == "any that fits"


@pytest.mark.parametrize(
    "spec, note",
    [
        ("flat,digits=2", "level 1 of flat is the same as level 0"),
        ("sums,test_level=3", r"level 3 of sums fails \(too many digits\)"),
        ("hangs", "level 1 of hangs fails .*no problem of level 1 in 1 s"),
    ],
)
def test_gym_says_when_the_test_is_not_harder(gym, capfd, spec, note):
    task = load_task("--train-size", 4, "--task", f"{gym}:{spec}")
    assert task.train and task.test
    said = capfd.readouterr().err
    assert re.fullmatch(f"espl: note: {note}.*: test problems are as hard as training.*\n", said)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sms", "gym:sms: reasoning-gym has no such data set; it has sums"),
        ("composite", "no such data set; it has flat, hangs, hashes, sums"),
        (
            "sums,size=3",
            "unknown setting 'size'; it has digits, level, scale, test_level, test_size, words",
        ),
        ("sums,digits=", "digits= must be of type int"),
        ("sums,digits=2.5", "digits=2.5 must be of type int"),
        ("sums,words=[1,2],digits=1", r"words=\[1, 2\] must be of type tuple"),
        ("sums,digits=8", "too many digits"),
        ("sums,scale=2,digits=0", "all its problems are test problems"),  # 0 + 0 is all there is
        ("sums,level=-1", "Invalid level: -1"),
        ("", "gym:chain_sum: reasoning-gym has no such data set"),  # the default
    ],
)
def test_gym_errors_are_one_line(gym, capfd, spec, message):
    assert re.search(message, fails(capfd, "--task", f"{gym}:{spec}"))


def test_gym_makes_its_own_problems(gym, files, capfd):
    assert "leave out --train-file" in fails(capfd, "--task", f"{gym}:sums", *files[2:])


def test_gym_without_its_package(gym, tmp_path, capfd):
    path = tmp_path / "site/reasoning_gym/__init__.py"
    path.write_text("raise ImportError('No module named x')")
    assert "No module named x: pip install reasoning-gym" in fails(capfd, "--task", gym)


def test_gym_reward(gym, tmp_path, capfd):
    """Nothing that a model says gets more than 1, changes a file or another answer's reward."""
    task = load_task("--train-size", 4, "--task", f"{gym}:sums")
    x, file = task.test[0], tmp_path / "file"
    file.write_text("kept")
    said = {
        f"<answer>1</answer> or <answer> {x.answer}\n</answer>": (1, "correct"),
        "0.5": (0.5, "partly right"),
        "": (0, "no_answer"),
        "<answer>": (0, "no_answer"),
        "0.01": (0.01, "wrong"),
        "-3": (0, "wrong"),
        "7": (1, "correct"),
        "float('nan')": (0, "wrong"),
        "two": (0, "wrong"),
        "\ud800": (0, "wrong"),
        "exit()": (0, "wrong"),
        "__import__('os')._exit(1)": (0, "wrong"),
        "9**9**9**9": (0, "timeout"),
        "bytes(10**11)": (0, "wrong"),
        "input()": (0, "wrong"),
        "(" * 10_000: (0, "wrong"),
        f"open({str(file)!r}, 'w').write('x')": (0, "wrong"),
        f"__import__('os').remove({str(file)!r})": (0, "wrong"),
        "__import__('os').system('echo x')": (0, "wrong"),
        "open('/dev/null').read() or 0.5": (0.5, "partly right"),
    }
    texts = [f"so <answer>{t}</answer>" if t and "answer" not in t else t for t in said]
    assert dict(zip(said, espl.grade(task, [(x.record, text) for text in texts]))) == said
    assert espl.grade(task, [(x.record, texts[0])]) == [(1.0, "correct")]
    assert file.read_text() == "kept"
    assert "espl" not in capfd.readouterr().err


def test_gym_starts_its_grader_again(gym):
    task = load_task("--train-size", 4, "--task", f"{gym}:sums")
    x = task.test[0]
    for _ in range(2):
        task.reward.__globals__["WORKER"][0].kill()
        assert task.reward(x.record, f"<answer>{x.answer}</answer>") == [1.0, "correct"]


def test_gym_with_its_package():
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    task = load_task("--train-size", 5, "--task", "gym:chain_sum,max_digits=2")
    assert len(task.test) == 128
    for problems, terms in ((task.train, 2), (task.test, 3)):  # of levels 0 and 1
        sums = [re.search(r"problem: (.*) =", x.question)[1] for x in problems]
        assert {len(s.split()) // 2 + 1 for s in sums} == {terms}
        assert [str(eval(s)) for s in sums] == [x.answer for x in problems]
    x = task.test[0]
    answers = [(x.record, f"<answer>{a}</answer>") for a in (x.answer, "x", "exit()")]
    assert espl.grade(task, answers) == [(1, "correct"), (0, "wrong"), (0, "wrong")]


# ==================================================================================================
# Glyphs, sums and shop
# ==================================================================================================


def test_glyphs_is_the_default_task_and_has_its_own_defaults():
    config = espl.parse_args([])
    assert config == espl.parse_args(["--task", "glyphs"])
    assert Path(config.model) == TASKS / "glyphs_model"
    assert all(getattr(config, name) == value for name, value in glyphs.DEFAULTS.items())
    assert espl.parse_args(["--lora-rank", "8"]).lora_rank == 8
    task = espl.load_task(config)
    assert [len(x) for x in (task.train, task.val, task.test)] == [400, 16, 128]
    assert task.root == []


def test_glyph_problems_have_right_answers():
    train, test = glyphs.problems(SimpleNamespace(seed=5))
    assert len({p["problem"] for p in train}) == len(train) == 1200
    results = {g: {} for g in glyphs.GLYPHS}
    for p in train:
        a, g, b = p["problem"].split()
        results[g][int(a), int(b)] = int(p["answer"])
    meaning = {}
    for g, found in results.items():
        [meaning[g]] = [n for n, f in MEANS.items() if all(f(*x) == y for x, y in found.items())]
    assert set(meaning.values()) == set(MEANS)
    assert max(Counter(meaning.values()).values()) == 2
    for p in test:
        a, g, b, h, c = p["problem"].split()
        first = MEANS[meaning[g]](int(a), int(b))
        assert p["answer"] == str(MEANS[meaning[h]](first, int(c)))
    assert len(test) == 128
    assert glyphs.problems(SimpleNamespace(seed=5)) == (train, test)
    assert glyphs.problems(SimpleNamespace(seed=6))[1] != test


@pytest.mark.parametrize(
    "text, reward",
    [
        ("@ max 7 4 = 7", 1),
        ("@ max 7 4 = 3 ; # plus 3 4 = 7\n", 1),
        ("@ max 7 4 = 4", 0),
        ("7", 0),
        ("= 7 ;", 0),
        ("@ max 7 4 = ", 0),
    ],
)
def test_reward_of_glyphs(text, reward):
    assert glyphs.reward({"problem": "7 @ 4", "answer": "7"}, text) == reward


@pytest.mark.parametrize(
    "reply, expected",
    [
        (
            "7 % 4 truth 3 infer minus 7 4 is 3 truth 3 so % none add % minus",
            [("add", "% minus", "", [])],
        ),
        ("… so % [G3] % max modify [G3] % minus", [("modify", "% minus", "G3", ["G3"])]),
        ("… so keep", []),
        (
            "[C0] % max keep ; [C1] # left [G2] # right merge [G2] [C1] # left",
            [("merge", "# left", "G2", ["G2", "C1"])],
        ),
        (
            "[A.G1] % left modify [A.G1] % max ; C ! left none add ! left",
            [("modify", "% max", "A.G1", ["A.G1"]), ("add", "! left", "", [])],
        ),
        ("modify [G3]", [("modify", "", "G3", ["G3"])]),
        ("", None),
        ("% [G3] % max", None),
        ("keep going", None),
        ("so add %", None),
    ],
)
def test_parse_of_glyphs(reply, expected):
    keys = ("operation", "principle", "modified_from", "merged_from")
    found = glyphs.parse(reply)
    assert found == (expected and [dict(zip(keys, edit)) for edit in expected])


@pytest.mark.parametrize("seed", range(10))
def test_an_evolved_prompt_that_is_shipped_knows_its_world(seed):
    """Any of them starts a run, and most of what it says of the world of its seed is right."""
    [prompt] = espl.read_population(TASKS.parent / "docs" / "populations" / f"glyphs-{seed}.json")
    meaning = glyphs.draw_meaning(random.Random(f"glyphs/{seed}"))
    said = [text.split() for text in prompt.principles]
    right = {glyph for glyph, name in said if meaning[glyph] == name}
    assert len(right) >= 0.75 * len(meaning) and prompt.mu > 30


def test_the_requests_of_glyphs_fit():
    """The longest requests of a run have room in the model's context, and lose no word."""
    config = espl.parse_args([])
    task = espl.load_task(config)
    chat = espl.Chat(AutoTokenizer.from_pretrained(config.model))
    context = espl.read_model_config(config.model).max_context
    rng = random.Random(0)

    def principles(n, prefix=""):
        texts = [f"{rng.choice(glyphs.GLYPHS)} {rng.choice([*MEANS])}" for _ in range(n)]
        return espl.numbered(texts, prefix)

    full = principles(config.max_principles)
    attempt = "7 @ 4 = 3 ; # plus 3 4 = 7"
    graded = [f"Attempt {i} (correct):\n{attempt}" for i in range(1, config.num_rollouts + 1)]
    sets = [f"Set {x}:\n{espl.listing(principles(14, x + '.'))}" for x in "ABC"]
    slots = {
        "problem": "7 @ 4",
        "answer": "3",
        "grade": "correct",
        "response": attempt,
        "principles": espl.listing(full | {f"C{i}": "@ max" for i in range(4)}),
        "attempts": "\n\n".join(graded),
        "suggestions": "\n".join(["[G3] -> @ max"] * 4),
        "sets": "\n\n".join(sets),
        "wins": "\n\n".join(f"Problem {b} (won by set A):\n7 @ 4" for b in range(10)),
    }
    unknown = chat.tokenizer.unk_token_id
    for request in ("summarize", "critique", "aggregate", "crossover"):
        ids = chat.ids("", espl.fill(task.texts[request], slots))
        assert len(ids) <= context - config.reflect_tokens, request
        assert unknown is None or unknown not in ids
    assert (
        chat.text(chat.ids("[G0] @ max\n[G1] # plus", "7 @ 4")) == "[G0] @ max [G1] # plus 7 @ 4 |"
    )


def test_sums_are_right_and_harder_in_the_test_set():
    task = load_task("--task", "sums", "--seed", 3)
    assert [len(x) for x in (task.train, task.val, task.test)] == [256, 0, 48]
    for problems, low, high in ((task.train, 1, 29), (task.test, 30, 59)):
        for x in problems:
            a, sign, b = re.fullmatch(r"(\d+) ([+-]) (\d+) =", x.question).groups()
            assert low <= min(int(a), int(b)) and max(int(a), int(b)) <= high
            assert int(x.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    said = {"14 - 9 = 5": (1, "correct"), "It is 5 or -5.": (0, "wrong"), "five": (0, "no_answer")}
    assert {text: espl.grade(task, [({"answer": "5"}, text)])[0] for text in said} == said
    assert sums.reward({"answer": "-5"}, "-5") == 1
    assert task.parse(" Think.\nOr not.") == [{"operation": "add", "principle": "Think."}]
    assert task.parse(" \n") == []


def test_orders_agree_on_the_prices_that_the_seed_draws():
    task = load_task("--task", "shop", "--seed", 3)
    assert [len(x) for x in (task.train, task.val, task.test)] == [40, 0, 24]
    price = {}
    for x in task.train + task.test:
        number, thing = re.fullmatch(r"([2-5]) (\w+)s", x.question).groups()
        assert int(x.answer) == int(number) * price.setdefault(thing, int(x.answer) // int(number))
    assert {*price} == {*shop.GOODS} and all(11 <= p <= 39 for p in price.values())
    other = load_task("--task", "shop", "--seed", 4)
    assert {x.question: x.answer for x in other.train} != {x.question: x.answer for x in task.train}
    said = {"4 * 22 = 88": (1, "correct"), "88 coins, or 89": (0, "wrong"), "?": (0, "no_answer")}
    assert {text: espl.grade(task, [({"answer": "88"}, text)])[0] for text in said} == said


@pytest.mark.parametrize(
    "reply, prices",
    [
        ("One junt costs 34 coins.", ["junt: 34"]),
        ("So: one junt cost 34 coins,\nOne 2 perls costs 16 coins", ["junt: 34", "perl: 16"]),
        ("One 4-junt costs 34 coins. One coin costs 3 coins. One wimp costs 9.", []),
        ("The junt is dear.", []),
    ],
)
def test_parse_of_shop(reply, prices):
    """Prices of goods that the shop does not have are left out."""
    assert shop.parse(reply) == [{"operation": "add", "principle": x} for x in prices]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_price_lists_that_are_shipped_are_mostly_right(seed):
    file = TASKS.parent / "docs" / "populations" / f"shop-{seed}.json"
    [prompt] = espl.read_population(file)
    task = load_task("--task", "shop", "--seed", seed)
    right = set()
    for x in task.train:
        number, thing = x.question.split()
        right.add(f"{thing[:-1]}: {int(x.answer) // int(number)}")
    assert len(right & {*prompt.principles}) >= 12
