"""Any data set of reasoning-gym: a hundred generators of puzzles, each with a grader and levels.

    pip install reasoning-gym
    python espl.py --task gym:chain_sum                    # trains on level 0, tests on level 1
    python espl.py --task gym:chain_sum,level=1,test_level=4,test_size=64,max_digits=3

What follows these three are settings of the data set (docs/tasks.md). The package is used in a
process of its own, which runs this file: there hashes of strings, on which some generators depend,
are the same in every run; and each answer is graded in a fork with limits of time, memory and
access, since some graders call eval() on what the model wrote.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import os
import re
import resource
import signal
import subprocess
import sys

OURS = {"level": 0, "test_level": 1, "test_size": 128}  # settings of this file, with defaults
GRADE_SECONDS = 5  # of time, for each answer
GRADE_BYTES = 2 * 2**30  # of address space
MAKE_SECONDS = 30  # until a new problem is there; else there are no more
WORKER = []  # the process that made the problems and grades, and what it was started with

PROMPTS = """
[system]
Solve the problem you are given. Reason step by step, then end with the final answer and nothing
else, in the form that the problem asks for, between these tags:
<answer>the final answer</answer>

Before you begin, read the following principles carefully, and use those that apply:
{principles}

[principles]
"""


def problems(config):
    """(training, test) problems, from seeds that differ between them and between runs."""
    if config.train_file or config.test_file:
        raise ValueError("gym makes its own problems; leave out --train-file and --test-file")
    seed = config.seed % 1024 * 2**21
    made = start([config.task_argument or "chain_sum", seed, config.train_size])
    if "error" in made:
        raise ValueError(made["error"])
    if made["note"]:
        print("espl: note:", made["note"], file=sys.stderr)
    return made["train"], made["test"]


def start(wanted):
    """Starts the process that makes the problems and grades. Returns its first reply."""
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__, json.dumps(wanted)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    WORKER[:] = [worker, wanted]
    return json.loads(worker.stdout.readline() or '{"error": "the process ended"}')


def reward(record, response):
    """The data set's own score, 0 to 1, of what the last <answer></answer> holds, and the outcome.

    Outcomes are correct (1), wrong (up to 0.1, which graders give for mere answers), partly right,
    no_answer, and timeout, where grading took too long.
    """
    for _ in range(2):
        worker, wanted = WORKER
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps([record["part"], record["problem"], response]) + "\n")
            worker.stdin.flush()
            if line := worker.stdout.readline():
                return json.loads(line)
        start(wanted)  # the process ended, for example for want of memory
    raise RuntimeError("the grader's process ended twice")


# ---- What runs in that process


def serve(spec, seed, train_size):
    """Prints the problems, or an error; then, for each line [part, question, response], a grade."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may look like a reply

    def say(value):
        print(json.dumps(value), file=replies, flush=True)

    sys.dont_write_bytecode = True
    try:
        parts, note = make(spec, seed, train_size)
    except Exception as e:
        advice = ": pip install reasoning-gym" if isinstance(e, ImportError) else ""
        say({"error": f"{str(e) or type(e).__name__}{advice}"})
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends whatever a grader is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends, and this with it
    reply = {"note": note}
    for part, (_, entries) in parts.items():
        reply[part] = []
        for question, entry in entries.items():
            answer = str(entry["answer"] or "any that fits")
            reply[part].append({"problem": question, "answer": answer, "part": part})
    say(reply)
    for line in sys.stdin:
        part, question, response = json.loads(line)
        data_set, entries = parts[part]
        say(graded(data_set, entries[question], response))


def make(spec, seed, train_size):
    """{"train": …, "test": …} as of `draw`, and "" or why the test problems are not harder."""
    name, settings = read_spec(spec)
    level, test_level, test_size = (settings.pop(key) for key in OURS)
    note, of_test = "", settings | {"seed": seed + 2**20}
    try:
        test = draw(name, test_level, of_test, test_size)
        same = level_config(name, level, of_test) == level_config(name, test_level, of_test)
        if same and level < test_level:
            note = f"is the same as level {level}"
    except Exception as e:  # some levels do not work; if it is not that, the next line fails, too
        test = draw(name, level, of_test, test_size)
        note = f"fails ({str(e) or type(e).__name__})"
    train = draw(name, level, settings | {"seed": seed}, train_size, test[1])
    if note:
        note = (
            f"level {test_level} of {name} {note}: test problems are as hard as training problems"
        )
    return {"train": train, "test": test}, note


def read_spec(spec):
    """(name, settings) of "name,key=value", with those of OURS."""
    from reasoning_gym.factory import DATASETS

    name, *pairs = re.split(r",(?=\w+=)", spec)
    known = sorted({*DATASETS} - {"composite"})  # that one mixes others, which are objects
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise ValueError(
            f"gym:{name}: reasoning-gym has no such data set; it has {', '.join(close)}"
        )
    defaults, settings = vars(DATASETS[name][1]()) | OURS, OURS.copy()
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in defaults or key in ("seed", "size"):
            known = sorted({*defaults} - {"seed", "size"})
            raise ValueError(f"gym:{name}: unknown setting {key!r}; it has {', '.join(known)}")
        with contextlib.suppress(ValueError, SyntaxError):  # a text needs no quotes
            value = ast.literal_eval(value)
        kind = type(defaults[key])
        right = (int, float) if kind is float else (kind,)
        if kind in (int, float, bool, str, list, tuple) and type(value) not in right:
            raise ValueError(f"gym:{name}: {key}={value} must be of type {kind.__name__}")
        settings[key] = value
    return name, settings


def level_config(name, level, settings):
    """The configuration of a data set at a level, without easier problems."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import CURRICULA, DATASETS

    if name not in CURRICULA:
        return DATASETS[name][1](**settings)
    curriculum = CURRICULA[name]()
    curriculum.set_global_level(level)
    alone = DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)  # without the levels below
    return dataclasses.replace(curriculum.generate_configuration(context=alone), **settings)


def draw(name, level, settings, n, taken=()):
    """The data set, and up to n {question: entry} that are not taken; at least one, or an error."""
    from reasoning_gym.factory import DATASETS

    signal.signal(signal.SIGALRM, lambda *_: sys.exit())  # no Exception: generators pass over those
    found, error = {}, ValueError(f"gym:{name}: all its problems are test problems")
    try:
        signal.alarm(MAKE_SECONDS)
        data_set = DATASETS[name][0](level_config(name, level, settings | {"size": 4 * n}))
        for i in range(4 * n):
            try:
                entry = data_set[i]
            except Exception as e:  # of this one
                error = e
                continue
            question = entry["question"].strip()
            if question not in taken and question not in found:
                found[question] = entry
                signal.alarm(MAKE_SECONDS)
            if len(found) == n:
                break
    except SystemExit:
        error = TimeoutError(f"gym:{name}: no problem of level {level} in {MAKE_SECONDS} s")
    signal.alarm(0)
    if not found:
        raise error
    return data_set, found


def graded(data_set, entry, response):
    """Score and outcome of a response, found in a fork."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(theirs, score(data_set, entry, response).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return 0.0, "timeout"
    if said == "none":
        return 0.0, "no_answer"
    value = min(max(0.0, float(said or 0)), 1.0)  # a grader that raises says nothing
    outcome = "correct" if value == 1 else "partly right" if value > 0.1 else "wrong"
    return value, outcome


def score(data_set, entry, response):
    """What the data set's grader says, as text; "none" without an answer. Limits this process."""
    from reasoning_gym.utils import extract_answer

    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    signal.alarm(GRADE_SECONDS)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (GRADE_BYTES, GRADE_BYTES))
    sys.addaudithook(no_access)
    answer = extract_answer(response)
    return "none" if answer is None else str(float(data_set.score_answer(answer, entry)))


def no_access(event, args):
    """An audit hook: a grader may compute and read files, not write, start, send or delete."""
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    acts = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes."))
    if writes or (acts and event != "os.listdir"):
        raise PermissionError(event)


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
