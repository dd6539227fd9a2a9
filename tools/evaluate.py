"""pass@k and the 2 x 2 table {weights before, after} x {root prompt, best prompt} of a run, or of a model, on any test set.

    python tools/evaluate.py runs/aime-espl-20260214-120000                        # as the run's last line has it
    python tools/evaluate.py RUN --test-file F --test-samples 64 --max-rows 64     # on other problems, pass@1 to pass@64
    python tools/evaluate.py RUN --best                                            # the iteration that validation picked
    python tools/evaluate.py --model DIR --test-file F                             # a model has one cell: before, root

Flags of espl.py may follow: with a RUN those of OPEN and those that --resume may change. Nothing in RUN is touched:
config.json, rollouts.jsonl and a metrics.jsonl of one line go to RUN/eval-<time>/ (or --run-dir). Nothing is trained,
and no training problems are needed. --no-table evaluates the last cell only, the run's weights with the tested prompt.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

OPEN = {*espl.RESUMABLE, "run_dir", "test_file", "test_size", "test_samples", "test_greedy", "test_prompt", "temperature",
        "top_p", "max_new_tokens", "max_tool_calls", "model_parallel"}


def config_of(run: Path | None, flags: list[str]) -> espl.Config:
    """Config of the evaluation: that of the run with these flags. Raises UserError where they would make it another."""
    saved = []
    if run:
        with espl.explained(f"cannot read {run / 'config.json'}", "give an earlier run's directory"):
            old = json.loads((run / "config.json").read_text()) | {"run_dir": ""}
        for name, value in old.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                saved.append(f"--{'' if value else 'no-'}{flag}")
            elif value != "":
                saved.append(f"--{flag}={value}")
    c = espl.parse_args([*saved, *flags])
    changed = [name for name, value in vars(c).items() if run and name not in OPEN and value != old[name]]
    if changed or c.resume:
        name = (changed or ["resume"])[0].replace("_", "-")
        raise espl.UserError(f"--{name} cannot change what was trained; leave it out")
    name = f"{run or 'runs/eval'}{'/eval' if run else ''}-{time.strftime('%Y%m%d-%H%M%S')}"
    c.run_dir = c.run_dir or espl.on_host_0(lambda: name)
    return c


def evaluate(run: Path | None, best: bool, flags: list[str]) -> str:
    """The tables as text; writes the files."""
    folder = run and run / ("best" if best else "checkpoints")
    c = config_of(run, flags)
    if run and not any(folder.glob("[0-9]*")):
        raise espl.UserError(f"there is no checkpoint in {folder}")
    state, iteration = espl.start_run(c, espl.load_task(c, training=False)), 0
    if run:
        with espl.checkpoint_manager(state, str(folder.absolute()), keep=2) as manager:
            iteration = espl.restore_checkpoint(state, manager)
    m = espl.evaluate(state, iteration, table=True)
    state.append("metrics.jsonl", [m | {"tokens": dict(state.tokens), "seconds": dict(state.seconds)}])
    head = f"iteration {iteration}: {c.test_samples} responses at T = {c.temperature:g} to each test problem"
    tables = [espl.table_text(m["table"], m["prompt"], measure) for measure in m["table"]]
    return "\n\n".join([head, *tables, f"files: {state.directory}"])


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    flags = list(sys.argv[1:] if argv is None else argv)
    if not flags or {"-h", "--help"} & {*flags}:
        print(__doc__)
        return 0
    flags, join = espl.from_tools("hosts").prepare(flags)
    run = Path(flags.pop(0)) if not flags[0].startswith("-") else None
    best, flags = "--best" in flags, [f for f in flags if f != "--best"]
    try:
        join()
        print(evaluate(run, best, flags))
        return 0
    except espl.UserError as e:
        print(f"evaluate: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
