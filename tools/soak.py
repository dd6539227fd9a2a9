"""Kills runs and resumes them until they are through, and compares them with one that was left alone.

    python tools/soak.py --kills 30
    python tools/soak.py --memory 500    # iterations: what a long run takes in memory, programs and files, and a picture
    python tools/soak.py --hosts         # several processes: tools/soak_hosts.py

The runs are of the default task, cut short. Kills come with SIGKILL at random instants and at the worst ones: while
sampling, grading, updating, reflecting, in the middle of writing a checkpoint, of `best` or of population.json, between
a line of metrics.jsonl and its checkpoint, while pictures are drawn; every other time twice in a row; and with SIGTERM,
after which a run has to end by itself. A run that is through must have the metrics (but for the clock), population,
logs and weights of the undisturbed one, to the bit. Takes about half a minute a kill on two slow cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUN = ("--iterations 5 --eval-every 2 --save-every 2 --test-size 12 --test-samples 1 --batch-size 6 --num-rollouts 4 "
       "--p-crossover 0.5").split()
FILES = ("rollouts.jsonl", "reflections.jsonl", "population.json")
PHASES = {  # name: (what is called then, by its dotted name in espl, whether the kill comes after the call or before)
    "sampling": ("decode", False), "grading": ("grade", False), "updating": ("add_gradient", True),
    "updated": ("rl_update", True), "reflecting": ("ask", False), "reflected": ("breed", True),
    "evaluated": ("evaluate", True), "population": ("Path.replace", False), "metrics": ("print_line", True),
    "picture": ("picture", False), "checkpoint": ("ocp.CheckpointManager.wait_until_finished", False),
    "saved": ("save_checkpoint", True)}
CLOCK = ("seconds", "rollout_tokens_per_second")


def dies(function, after: bool, calls: int):
    """`function`, which ends its process with SIGKILL at the given call; the others are unchanged."""
    left = [calls]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        result = function(*args, **kwargs) if left[0] or after else None
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def doomed(phase: str, calls: int, argv: list[str]) -> int:
    """espl.py in this process, to be killed in a phase."""
    import matplotlib.figure
    import espl
    name, after = PHASES[phase]
    *path, last = name.split(".")
    owner = matplotlib.figure.Figure if phase == "picture" else espl
    for part in path:
        owner = getattr(owner, part)
    last = "savefig" if phase == "picture" else last
    setattr(owner, last, dies(getattr(owner, last), after, calls))
    return espl.main(argv)


def start(argv: list[str], *doom: str) -> subprocess.Popen:
    """espl.py in a process of its own; with a doom, (phase, call), by way of this file."""
    program = [str(Path(__file__).resolve()), "--doomed", *doom] if doom else [str(ROOT / "espl.py")]
    return subprocess.Popen([sys.executable, "-u", *program, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=ROOT)


def disturbed(argv: list[str], rng: random.Random, phase: str) -> tuple[str, int, str]:
    """One start of a run that is killed, or comes through: (what was done to it, exit code, its output)."""
    if phase in PHASES:
        calls = rng.choice([1, 1, 2, 3])
        process = start(argv, phase, str(calls))
        text = process.communicate()[0]
        return f"{phase}, call {calls}", process.returncode, text
    process, text = start(argv), ""
    for line in process.stdout:  # compiling and loading are not what is tested
        text += line
        if line.startswith("writing"):
            break
    seconds = rng.uniform(0, 12)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL if phase == "instant" else signal.SIGTERM)
    return f"{phase}, {seconds:.1f} s after its start", process.wait(), text + process.stdout.read()


def watch(iterations: int, out: Path, argv: list[str]) -> int:
    """A run in this process that notes its memory and the programs it has compiled after each iteration."""
    import jax
    import matplotlib.figure
    import numpy as np
    import espl
    programs, notes, print_line = [], [], espl.print_line
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: programs.append(name) if name.endswith("backend_compile_duration") else None)

    def noted(run, m):
        print_line(run, m)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        notes.append((m["iteration"], pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(programs)))

    espl.print_line = noted
    code = espl.main(["--iterations", str(iterations), "--run-dir", str(out / "long"), *argv])
    iteration, memory, compiled = np.array(notes).T
    late = iteration >= iterations * 0.4  # by then prompts are as long, and batches as odd, as they get
    slope = 100 * np.polyfit(iteration[late], memory[late], 1)[0]
    figure = matplotlib.figure.Figure((7, 3), layout="constrained")
    left = figure.add_subplot(xlabel="iteration", ylabel="resident memory, MB")
    left.plot(iteration, memory, color="tab:blue")
    right = left.twinx()
    right.plot(iteration, compiled, color="tab:red", linestyle="dashed")
    right.set_ylabel("programs compiled or read (dashed)")
    figure.savefig(out / "memory.png", dpi=120)
    print(f"memory {memory[late][0]:.0f} MB at iteration {iteration[late][0]:.0f}, {memory[-1]:.0f} at {iterations}: "
          f"{slope:+.2f} MB in 100 iterations; programs {compiled[late][0]:.0f} -> {compiled[-1]:.0f}")
    for path in sorted((out / "long").iterdir()):
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        print(f"{sum(f.stat().st_size for f in files) / 1e6:9.2f} MB  {path.name}")
    print(f"drawn: {out / 'memory.png'}")
    return code


def state(directory: Path) -> dict:
    """All that two runs must have in common."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    found = {"metrics.jsonl": [{k: v for k, v in m.items() if k not in CLOCK} for m in lines]}
    found |= {name: (directory / name).read_bytes() for name in FILES}
    for name in ("checkpoints", "best"):
        options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        with ocp.CheckpointManager((directory / name).absolute(), options=options) as manager:
            step = manager.latest_step()
            loop = manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
        reader, weights = ocp.PyTreeCheckpointer(), directory.absolute() / name / str(step) / "weights"
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), reader.metadata(weights).item_metadata.tree)
        saved = reader.restore(weights, ocp.args.PyTreeRestore(restore_args=as_numpy))  # other devices may have saved it
        found[name] = step, [(str(path), x.tobytes()) for path, x in jax.tree.leaves_with_path(saved)], loop
    return found


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 1 if a run differs or ends in another way than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--memory", type=int, default=0, metavar="ITERATIONS", help="instead: watch one long run")
    parser.add_argument("--hosts", nargs="?", const="", metavar="CASE", help="instead: several processes, in cases "
                        "whose name this matches")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="is emptied")
    args, more = parser.parse_known_args(argv)  # more: flags of espl.py
    rng, kills, rounds, began = random.Random(args.seed), 0, 0, time.time()
    shutil.rmtree(args.out, ignore_errors=True)
    if args.hosts is not None:
        import soak_hosts
        return soak_hosts.main(args.out.absolute(), args.hosts)
    if args.memory:
        return watch(args.memory, args.out, more)
    directories = {name: (args.out / name).absolute() for name in ("whole", "killed")}
    fresh = {name: [*RUN, *more, "--run-dir", str(d)] for name, d in directories.items()}
    assert start(fresh["whole"]).wait() == 0, "the undisturbed run failed"
    expected, plan = state(directories["whole"]), []
    killed = directories["killed"]
    while kills < args.kills or killed.exists():
        if killed.exists() and not (killed / "config.json").is_file():
            shutil.rmtree(killed)  # killed before there was anything to resume
        resume = ["--resume", str(killed)] if killed.exists() else fresh["killed"]
        if not plan:
            plan = rng.sample([*PHASES, *["instant", "SIGTERM"] * 3], len(PHASES) + 6)
            plan = [phase for i, phase in enumerate(plan) for _ in range(1 + i % 2)]
        left_alone = kills >= args.kills
        what, code, text = ("none", start(resume).wait(), "") if left_alone else disturbed(resume, rng, plan.pop())
        kills += code in (-signal.SIGKILL, 128 + signal.SIGTERM)
        print(f"{kills:>3} kills, {time.time() - began:5.0f} s | {what} | exit {code} | "
              + (text.strip().split("\n")[-1][:70] if text else ""), flush=True)
        if code == 0:
            found, rounds = state(killed), rounds + 1
            if wrong := [name for name in expected if found[name] != expected[name]]:
                print(f"DIFFERS from the undisturbed run: {', '.join(wrong)}; see {args.out}")
                return 1
            print(f"equal to the undisturbed run, to the bit: {', '.join(found)}", flush=True)
            shutil.rmtree(killed)
        elif code not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            print(f"{text}\nexit code {code} was not to be expected")
            return 1
    print(f"{kills} kills in {rounds} runs; all of them ended as if nothing had happened")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--doomed"]:
        sys.exit(doomed(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    sys.exit(main())
