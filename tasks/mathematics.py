r"""The reward of mathematics: 1 if the last \boxed{} of a response holds an accepted answer, or 0.

Numbers that are written in digits are compared here, exactly. Everything else is judged by the
package math-verify, in a process of its own that runs this file: sympy can loop for ever, or take
all memory, on 9^{9^{9^9}}. Each answer gets a fork of that process, which the kernel limits.

This is also the task of --train-file and --test-file without --task.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from fractions import Fraction

LONGEST_ANSWER = 1000  # characters; what is longer is a derivation or an attack
GRADE_SECONDS = 5  # of time, for each answer
GRADE_BYTES = 400 * 2**20  # of address space
SENTENCE = r".*\banswer\b|\W*(?:[a-z]+ )*[a-z]{2,} [a-z]{2,}\b.*\d"
WORKERS = []  # the process that judges, while it waits for an answer


def prepare(record):
    """The record with its accepted answers as the list `answer`.

    Of a worked solution as in GSM8K the answer is what follows the last ####. Raises ValueError for
    a sentence like "The answer is 42", which no answer in a box would equal.
    """
    answers = []
    for answer in accepted(record):
        if isinstance(answer, str):
            answer = answer.rpartition("####")[2].strip()
            if re.match(SENTENCE, answer, re.I | re.S):
                raise ValueError(f"give the number or formula alone, not {answer!r}")
        answers.append(answer)
    return record | {"answer": answers}


def hub(config, train, test):
    """(training, test) records of data sets "owner/name:split" on the Hugging Face hub.

    A file that is given takes the place of its part, which is not downloaded then.
    """
    from datasets import load_dataset

    records = [], []
    for part, file, names in zip(records, (config.train_file, config.test_file), (train, test)):
        for name in [] if file else names:
            path, split = name.split(":")
            part.extend(load_dataset(path, split=split))
    return records


def accepted(record):
    """The accepted answers of a record: texts or numbers."""
    for name in ("answer", "groundtruth", "golden_answers"):
        if record.get(name) is not None:
            return record[name] if isinstance(record[name], list) else [record[name]]
    return []


def reward(record, response):
    """(reward, outcome): correct, wrong, no_answer, timeout, or error where math-verify failed."""
    said = (last_boxed(response) or "").strip()
    if not said:
        return 0.0, "no_answer"
    if len(said) > LONGEST_ANSWER:
        return 0.0, "wrong"
    texts, values = readings(said)
    asked = []
    for answer in accepted(record):
        gold_texts, gold_values = readings(str(answer))
        if texts[0] in gold_texts or values & gold_values:
            return 1.0, "correct"
        if not values or not gold_values:  # numbers need no second opinion
            asked += gold_texts
    outcome = judged(asked, texts) if asked else "wrong"
    return float(outcome == "correct"), outcome


def last_boxed(text):
    r"""Content of the last \boxed{}; None if there is none, or its braces do not balance."""
    *before, rest = re.split(r"\\boxed\s*\{", text)
    if not before:
        return None
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest, re.S):  # an escaped brace needs no partner
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[: token.start()]
    return None


# ---- How an answer is read

SYMBOLS = {
    "−": "-",
    "–": "-",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "×": r"\times ",
    "÷": r"\div ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "π": r"\pi ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "°": r"^\circ ",
}

NOT_A_UNIT = "and|or|not|but|percent|hundred|thousand|million|billion|dozen|sin|cos|tan|log|mod"
RULES = (  # what math-verify misreads, and what is meant
    (r"\A[\s$(]*\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}[\s$).]*\Z", r"\1"),
    (r"√\s*(\d+|\\pi|\w|\([^()]*\)|\{[^{}]*\})", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\sqrt\{-1\}", "i"),
    (r"\\colon", ":"),
    (r"(?<!\.)(?<!\\right)\.(?=[\s$]*\Z)", ""),  # a full stop
    (r"(?<![\d.,/])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<=\d)[eE]([+-]?\d+)", r"\\cdot 10^{\1}"),
    # 467=468 and 468 \text{ (not 467)} are two answers, of which neither counts.
    (r"(^|=)\s*(\d+)\s*=(?!\s*\2\s*\Z)(?=\s*\d+\s*\Z)", r"\1\2, "),
    (
        r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}\d]{0,99}\b(?:not|or|but)\b[^{}\d]{0,99}(\d++)[^{}]*\}",
        r", \1",
    ),
    # A unit is not read: 10 people, 10 \text{ cm}.
    (
        rf"(?<=[\d}}])(?:\\[ ,;:]|[\s~])*(?!.*\b(?:{NOT_A_UNIT})\b)"
        r"(?:\\(?:text|mathrm)\{[^{}\d]*\}|[\s~][A-Za-z]{3}[A-Za-z\s]*)\Z",
        "",
    ),
)


def readings(text):
    """How an answer may be read: texts for math-verify, and the set of numbers that it may mean."""
    text = plain(text)
    words = text.strip("$.:() \n")
    if re.fullmatch(r"[A-Za-z][A-Za-z\s]*", words):  # words, or the letter of a choice
        return [" ".join(words.lower().split())], set()
    values = numbers(text)
    if len(values) == 1:
        [value] = values
        if value.denominator == 1:
            return [str(value)], values
        return [f"\\frac{{{value.numerator}}}{{{value.denominator}}}"], values
    degrees = r"(?<![\d.])([\d.]++)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})"
    radians = re.sub(degrees, r"\\frac{\1\\pi}{180}", text)
    return list(dict.fromkeys([text, radians])), values


def plain(text):
    """An answer in the LaTeX that math-verify reads as it is meant."""
    text = re.sub("[¼½¾⅐-⅞]", in_latex("\\frac{%s}{%s}"), text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", in_latex("^{%s}"), text)
    text = re.sub("[₀-₉]+", in_latex("_{%s}"), text)
    text = text.translate(str.maketrans(SYMBOLS))
    space = r"\s(?!\d{3}\s*/\s*\d{3})"  # 3 125/126 is a mixed number
    thousands = rf"(?<![\w.])\d{{1,3}}(?:(?:\\[ ,;:]|\{{,\}}|,\\!|~|{space})\d{{3}})+(?!\d)"
    text = re.sub(thousands, without_marks, text)
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\overline\{(\d+)\}", repeating, text)
    for pattern, meaning in RULES:
        text = re.sub(pattern, meaning, text)
    return text.strip()


def in_latex(form):
    """A replacement for re.sub: what Unicode says that symbols stand for, in a form of LaTeX."""

    def replacement(match):
        meant = unicodedata.normalize("NFKC", match[0])
        return form % tuple(meant.split("\u2044"))  # the bar of a fraction

    return replacement


def without_marks(match):
    """1\\,000 without what parts its thousands."""
    return re.sub(r"\D", "", match[0])


def repeating(match):
    """0.1\\overline{6} as a fraction: (16 - 1) / 90."""
    whole, once, period = match.groups()
    nines = "9" * len(period) + "0" * len(once)
    return f"\\frac{{{whole}{once}{period}-{whole + once or 0}}}{{{nines}}}"


def numbers(text):
    """The numbers that a text of digits may mean: 12.5 % is 0.125, or 12.5. Others mean none."""
    text, percent = re.subn(r"\s*\\?%\Z", "", re.sub(r"\\?\$", "", text).strip())
    power = r"10\s*\^\s*\{?([+-]?\d+)\}?\Z"
    text = re.sub(rf"\s*(?:\\times|\\cdot|\*|x)\s*{power}", r"e\1", text)
    text = re.sub(rf"\A([+-]?){power}", r"\g<1>1e\2", text)
    fraction = r"\A([+-]?)\\[dt]?frac\s*(?:(\d)|\{([+-]?\d+)\})\s*(?:(\d)|\{(\d+)\})\Z"
    text = re.sub(fraction, r"\1\2\3/\4\5", text)
    number = r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?(e[+-]?\d{1,3}|/\d+)?"
    if not re.fullmatch(number, text):
        return set()
    try:
        value = Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return set()
    if not percent:
        return {value}
    return {value / 100, value if abs(value) >= 1 else value / 100}


# ---- Math-verify's process


def judged(golds, answers):
    """The outcome of an answer that math-verify has to judge. Raises RuntimeError without it.

    A process that does not reply, or whose reply nobody waits for, is not asked again.
    """
    if WORKERS:
        worker = WORKERS.pop()
    else:
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__, str(GRADE_SECONDS), str(GRADE_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # by which sympy orders terms
        )
    with contextlib.suppress(BrokenPipeError):  # it has ended
        worker.stdin.write(json.dumps([golds, answers]) + "\n")
        worker.stdin.flush()
    outcome = worker.stdout.readline().strip()
    if not outcome:
        raise RuntimeError("math-verify's process ended; try pip install math-verify")
    WORKERS.append(worker)
    return outcome


def serve(seconds, max_bytes):
    """Prints an outcome for each line [golds, answers] of the input."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may look like a reply
    # What this caches is inherited by the forks, which makes them three times as fast.
    equal(["[1,2)", "x^2-1"], ["(x+1)(\\frac{x}{1}-1)"])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            judge(line, seconds, max_bytes)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        outcomes = {0: "correct", 1: "wrong", -signal.SIGALRM: "timeout"}
        print(outcomes.get(code, "error"), file=replies, flush=True)


def judge(line, seconds, max_bytes):
    """Ends a fork of the process; its exit code is the outcome.

    The default action of SIGALRM ends it whatever it is doing, which may be one long call in C.
    """
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
            resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        os._exit(0 if equal(*json.loads(line)) else 1)
    except BaseException:
        os._exit(2)


def equal(golds, answers):
    """Whether math-verify calls any of the answers equal to any of the accepted ones."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Its plain-text extractor would pick any number out of a sentence.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    for gold in golds:
        for answer in answers:
            pair = [parse(f"\\boxed{{{x}}}", config, parsing_timeout=None) for x in (gold, answer)]
            rounded = re.search(r"\.\d", gold + answer)
            if verify(
                *pair,
                numeric_precision=15 if rounded else 100,  # digits
                allow_set_relation_comp=True,
                timeout_seconds=None,
                raise_on_error=True,
            ):
                return True
    return False


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
