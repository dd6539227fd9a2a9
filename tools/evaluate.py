"""pass@k and the 2 x 2 table {weights before, after} x {root, best prompt} of a run, or of a model, on any test set.

    python tools/evaluate.py runs/aime-espl-20260214-120000                        # as its last line has it
    python tools/evaluate.py RUN --test-file F --test-samples 64 --max-rows 64     # others, pass@1 to pass@64
    python tools/evaluate.py RUN --best                                            # what validation picked
    python tools/evaluate.py --model DIR --test-file F                             # one cell: before, root

Flags of espl.py may follow: with a RUN those of OPEN and those that --resume may change. Nothing in RUN is touched:
config.json, rollouts.jsonl and a metrics.jsonl of one line go to RUN/eval-<time>/ (or --run-dir). Nothing is trained,
and no training problems are needed. --no-table evaluates the last cell only, the run's weights with the tested prompt.
espl.py has the table, and the closing report, made at the end of every run.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

OPEN = {*espl.RESUMABLE} - {"mode"} | {
    "run_dir", "test_file", "test_size", "test_samples", "test_greedy", "test_prompt", "temperature", "top_p",
    "max_new_tokens", "max_tool_calls", "model_parallel"}


def config_of(run: Path | None, flags: list[str]) -> espl.Config:
    """Config of the evaluation: that of the run with these flags. Raises UserError where they would make it another."""
    saved = []
    if run:
        with espl.explained(f"cannot read {run / 'config.json'}", "give an earlier run's directory"):
            old = json.loads((run / "config.json").read_text())
        old |= {"run_dir": "", "track": "", "reflector": "reference", "table": True}  # these were the run's own
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
        with espl.checkpoint_manager(state, str(folder.absolute()), read_only=True) as manager:
            iteration = espl.restore_checkpoint(state, manager)
        if iteration < 0:
            raise espl.UserError(f"no checkpoint in {folder} is whole yet")
    m = espl.evaluate(state, iteration, table=True)
    state.append("metrics.jsonl", [m | {"tokens": dict(state.tokens), "seconds": dict(state.seconds)}])
    head = f"iteration {iteration}: {c.test_samples} responses at T = {c.temperature:g} to each test problem"
    tables = [table_text(m["table"], m["prompt"], measure) for measure in m["table"]]
    return "\n\n".join([head, *tables, f"files: {state.directory}"])


def make_table(run: espl.Run, iteration: int, s: espl.SystemPrompt, scores: dict[str, list[float]]) -> dict:
    """{measure: {cell or gain: [mean, low, high]}} on the test set: weights before and after training x root and tested
    prompt s, with 95 % bootstrap intervals over the problems. scores: of the last cell, which is known. Cells that are
    equal by construction (frozen weights; s is the root) are there once."""
    trained, found = int(espl.bit_sum(run.policy.theta) != espl.bit_sum(run.policy.theta_ref)), {}
    for w in ("before", "after")[: 1 + trained]:
        for p in (run.population[0], s)[: 1 + (s.id > 0)]:
            known = p is s and (w == "after") == trained
            if known or run.config.table:  # without, the last cell alone is wanted
                values = scores if known else espl.score(run, p, run.task.test, f"test_{w}", iteration)
                found[f"{w}, {'best' if p.id else 'root'}"] = np.array(list(values.values()))  # [measures, problems]
    gains = {"prompt alone": ("before, best", "before, root"), "weights alone": ("after, root", "before, root"),
             "both": ("after, best", "before, root"), "interaction": ("both", "prompt alone", "weights alone")}
    for gain, (whole, *parts) in gains.items():
        if {whole, *parts} <= found.keys():
            found[gain] = found[whole] - sum(found[part] for part in parts)
    x, rng = np.array(list(found.values())), np.random.default_rng(0)  # one draw of problems for all cells: paired
    means = [x[:, :, rng.integers(x.shape[2], size=x.shape[2])].mean(2) for _ in range(2000)]
    stats = np.stack([x.mean(2), *np.quantile(means, (0.025, 0.975), axis=0)], -1).tolist()
    return {measure: {name: row[i] for name, row in zip(found, stats)} for i, measure in enumerate(scores)}


def table_text(table: dict[str, dict], prompt: int, measure: str) -> str:
    """One measure of `make_table`'s table, as on the screen."""
    titles = {"root": "root prompt", "best": f"prompt {prompt}"}
    prompts = dict.fromkeys(name.partition(", ")[2] for name in table[measure])
    head = "".join(titles[p].rjust(28) for p in prompts if p)
    rows = {f"{measure} (95 % interval over problems)": head}
    for name, values in table[measure].items():
        weights, cell, _ = name.partition(", ")
        title = f"weights {weights} training" if cell else f"gain: {name}"
        form = "{:.3f} ({:.3f} to {:.3f})" if cell else "{:+.3f} ({:+.3f} to {:+.3f})"
        rows[title] = rows.get(title, "") + form.format(*values).rjust(28)
    return "\n".join(title.ljust(42) + cells for title, cells in rows.items())


def tabled(run: espl.Run, iteration: int, s: espl.SystemPrompt, scores: dict[str, list[float]]) -> dict:
    """{"table": …} at the end of a run, for which a failure is only a warning, unless memory ran out."""
    try:
        return {"table": make_table(run, iteration, s, scores)}
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e):
            raise
        espl.warn(f"no 2 x 2 table: {espl.first_line(e)}")
        return {}


def summary(evaluations: list[dict]) -> dict[str, dict]:
    """The honest readings of a test curve: before training, final, mean of the last five, picked by validation."""
    first, final = evaluations[0], evaluations[-1]
    lasts = (evaluations[1:] or evaluations)[-5:]
    mean = {name: float(np.mean([e[name] for e in lasts])) for name in ("test", "test_greedy") if name in final}
    picked = {"picked by validation": max(evaluations, key=lambda e: e["val"])} if "val" in final else {}
    return {"base model": first, "final": final, "mean of last 5": mean} | picked  # the first of equals


def closing_report(run: espl.Run) -> str:
    """What a run ends with: the scores on the test set, the tested prompt, and where the files are."""
    c, s = run.config, espl.tested_prompt(run)
    columns = {"test": f"T = {c.temperature:g}"} | ({"test_greedy": "greedy"} if c.test_greedy else {})
    lines = [f"mean reward on {len(run.task.test)} test problems".ljust(50)
             + "".join(f"{x:>10}" for x in columns.values())]
    for name, row in summary(run.evaluations).items():
        name += f": iteration {row['iteration']}, prompt {row['prompt']}" if "prompt" in row else " evaluations"
        lines.append(name.ljust(50) + "".join(f"{row[x]:>10.3f}" for x in columns))
    if table := run.evaluations[-1].get("table"):
        lines += ["", table_text(table, s.id, "reward")]
    return "\n".join([*lines, "", f"prompt {s.id}: mu {s.mu:.1f}, sigma {s.sigma:.1f}",
                      re.sub("^", "    ", espl.listing(espl.numbered(s.principles)), flags=re.M), "",
                      f"files: {run.directory}"])


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    flags = list(sys.argv[1:] if argv is None else argv)
    if not flags or {"-h", "--help"} & {*flags}:
        print(__doc__)
        return 0
    run = Path(flags.pop(0)) if not flags[0].startswith("-") else None
    best = "--best" in flags
    try:
        flags, join = espl.from_tools("hosts").prepare([f for f in flags if f != "--best"])
        join()
        print(evaluate(run, best, flags))
        return 0
    except espl.UserError as e:
        print(f"evaluate: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
