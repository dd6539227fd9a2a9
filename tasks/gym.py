"""Any data set of reasoning-gym: a hundred generators of puzzles, each with a grader and levels of difficulty.

    pip install reasoning-gym
    python espl.py --task gym --gym chain_sum                     # trains on level 0, tests on level 1
    python espl.py --task gym --gym chain_sum:max_digits=3 --gym-level 1 --gym-test-level 4

docs/gym.md says what a level is, and which data sets work. The package is used in a process of its own, which runs this
file: there hashes of strings, on which some generators depend, are the same in every run; and each answer is graded in
a fork with limits of time and memory, since some graders eval() what the model wrote.
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

FLAGS = {"gym": ("chain_sum", "data set of reasoning-gym, with any settings of it: name:key=value,key=value"),
         "gym_level": (0, "level of the training problems"), "gym_test_level": (1, "level of the test problems")}
DEFAULTS = dict(test_size=128)
GRADE_SECONDS, GRADE_BYTES = 5, 2 * 2**30  # of time and address space, for each answer
MAKE_SECONDS = 30  # until a new problem is there; else there are no more
WORKER = []  # the process that made the problems, and grades

PROMPTS = """
[system]
Solve the problem you are given. Reason step by step, then end with the final answer and nothing else, in the form that
the problem asks for, between these tags:
<answer>the final answer</answer>

Before you begin, read the following principles carefully, and use those that apply:
{principles}

[principles]
"""


def problems(config) -> tuple[list[dict], list[dict]]:
    """Training and test problems, from seeds that are disjoint for both, and for runs with other seeds below 1,024."""
    wanted = [config.gym, config.seed % 1024 * 2**21, config.gym_level, config.gym_test_level,
              config.train_size, config.test_size or DEFAULTS["test_size"]]
    worker = subprocess.Popen([sys.executable, "-P", __file__, json.dumps(wanted)], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": "0"})
    WORKER[:] = [worker]
    made = json.loads(worker.stdout.readline() or '{"error": "the process that makes the problems ended"}')
    if "error" in made:
        raise ValueError(made["error"])
    if made["note"]:
        print("espl: note:", made["note"], file=sys.stderr)
    return made["train"], made["test"]


def tools(config) -> dict:
    """None; but that problems from files cannot be graded is found here."""
    if config.train_file or config.test_file:
        raise ValueError("gym makes its own problems; leave out --train-file and --test-file")
    return {}


def reward(record: dict, response: str) -> tuple[float, str]:
    """The data set's own score, 0 to 1, of what the last <answer></answer> holds, and the outcome: correct (1), wrong
    (up to 0.1, which graders give for mere answers), partly right; no_answer; timeout, when grading took too long."""
    [worker] = WORKER
    worker.stdin.write(json.dumps([record["part"], record["problem"], response]) + "\n")
    worker.stdin.flush()
    if not (line := worker.stdout.readline()):
        raise RuntimeError("the grader's process ended")
    return tuple(json.loads(line))


# ---- What runs in that process

def read_spec(spec: str) -> tuple[str, dict]:
    """Name and settings in "name:key=value,key=value". Raises ValueError with what is wrong."""
    from reasoning_gym.factory import DATASETS
    name, _, rest = spec.partition(":")
    known = sorted({*DATASETS} - {"composite"})  # that one mixes others, which are objects
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise ValueError(f"--gym {name}: reasoning-gym has no such data set; it has {', '.join(close)}")
    defaults, settings = vars(DATASETS[name][1]()), {}
    for key, _, value in (pair.partition("=") for pair in re.split(r",(?=\w+=)", rest) if rest):
        if key not in defaults or key in ("seed", "size"):
            known = sorted({*defaults} - {"seed", "size"})
            raise ValueError(f"--gym {name}: {key!r} is no setting of it; it has {', '.join(known)}")
        with contextlib.suppress(ValueError, SyntaxError):  # a text needs no quotes
            value = ast.literal_eval(value)
        kind = type(defaults[key])
        if kind in (int, float, bool, str, list, tuple) and type(value) not in (kind, int if kind is float else kind):
            raise ValueError(f"--gym {name}: {key}={value} must be of type {kind.__name__}, as {defaults[key]} is")
        settings[key] = value
    return name, settings


def level_config(name: str, level: int, settings: dict):
    """The data set's config at a level: each attribute of its curriculum there, or at its last. Settings go first."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import CURRICULA, DATASETS
    if name not in CURRICULA:
        return DATASETS[name][1](**settings)
    curriculum = CURRICULA[name]()
    curriculum.set_global_level(level)
    alone = DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND)  # without the levels below
    return dataclasses.replace(curriculum.generate_configuration(context=alone), **settings)


def draw(name: str, level: int, settings: dict, n: int, taken=()) -> tuple:
    """The data set, and up to n {question: entry} that are not taken. Raises what the generator raises if none is."""
    from reasoning_gym.factory import DATASETS
    signal.signal(signal.SIGALRM, lambda *_: sys.exit())  # no Exception: generators pass over those
    found, error = {}, ValueError(f"--gym {name}: all its problems are test problems; lower --test-size")
    try:
        signal.alarm(MAKE_SECONDS)
        data_set = DATASETS[name][0](level_config(name, level, settings | {"size": 4 * n}))
        for i in range(4 * n):
            try:
                entry = data_set[i]
            except Exception as e:  # of this one
                error = e
                continue
            if (question := entry["question"].strip()) not in taken and question not in found:
                found[question] = entry
                signal.alarm(MAKE_SECONDS)
            if len(found) == n:
                break
    except SystemExit:
        error = TimeoutError(f"--gym {name}: no problem of level {level} in {MAKE_SECONDS} s")
    signal.alarm(0)
    if not found:
        raise error
    return data_set, found


def make(spec: str, seed: int, level: int, test_level: int, train_size: int, test_size: int) -> tuple[dict, str]:
    """{"train": …, "test": …} as of `draw`, and "" or the reason why the test problems are not harder."""
    name, settings = read_spec(spec)
    note, of_test = "", settings | {"seed": seed + 2**20}
    try:
        test = draw(name, test_level, of_test, test_size)
        if level_config(name, level, of_test) == level_config(name, test_level, of_test) and level < test_level:
            note = f"is the same as level {level}"
    except Exception as e:  # some levels of some data sets do not work; if it is not that, the next line fails, too
        test, note = draw(name, level, of_test, test_size), f"fails ({e or type(e).__name__})"
    train = draw(name, level, settings | {"seed": seed}, train_size, test[1])
    note = note and f"level {test_level} of {name} {note}: test problems are as hard as training problems"
    return {"train": train, "test": test}, note


def no_access(event: str, args: tuple) -> None:
    """An audit hook: what is graded may compute, and read files, but not write, start, send or delete anything."""
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.")) and event != "os.listdir":
        raise PermissionError(event)


def graded(data_set, entry: dict, response: str) -> tuple[float, str]:
    """Score and outcome of a response, found in a child process."""
    from reasoning_gym.utils import extract_answer
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            signal.alarm(GRADE_SECONDS)
            with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
                resource.setrlimit(resource.RLIMIT_AS, (GRADE_BYTES, GRADE_BYTES))
            sys.addaudithook(no_access)
            answer = extract_answer(response)
            os.write(theirs, b"none" if answer is None else str(float(data_set.score_answer(answer, entry))).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM or said == "none":
        return 0.0, "no_answer" if said else "timeout"
    score = min(max(0.0, float(said or 0)), 1.0)  # a grader that raises says nothing
    return score, "correct" if score == 1 else "partly right" if score > 0.1 else "wrong"


def serve(wanted: list) -> None:
    """Prints the problems, or an error, as a line; then, for every line [part, question, response], the reward."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may look like a reply
    say = lambda x: print(json.dumps(x), file=out, flush=True)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        parts, note = make(*wanted)
    except ImportError as e:
        return say({"error": f"{e}: pip install reasoning-gym"})
    except Exception as e:
        return say({"error": f"{e or type(e).__name__}"})
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends whatever a grader is doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends, and this with it
    say({"note": note} | {part: [
        {"problem": question, "answer": str(entry["answer"] or "any that fits"), "part": part}
        for question, entry in entries.items()] for part, (_, entries) in parts.items()})
    for line in sys.stdin:
        part, question, response = json.loads(line)
        data_set, entries = parts[part]
        say(graded(data_set, entries[question], response))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
