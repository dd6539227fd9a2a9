"""The laboratory: the paper's comparison on the embedded world, with seeds, spread and paired differences.

    python tools/lab.py compare                            # base, rl, reflection, evolution, espl; five seeds
    python tools/lab.py compare --perfect                  # also a root prompt that states every meaning
    python tools/lab.py vary selection=top_random,softmax,uniform        # espl with one flag varied
    python tools/lab.py compare --iterations 30 --lora-rank 8            # flags of espl.py reach every run

Runs one after the other in this process, so that programs are compiled once, into --out; runs that are finished there
are not repeated. Prints Markdown tables and writes results.json and a picture of the learning curves to --out. Every
row is a mean and standard deviation over seeds of the share of test problems solved; intervals are 95 % bootstrap
intervals of the paired difference (same seed, so the same world) over the seeds.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

MODES = ("rl", "reflection", "evolution", "espl")
READINGS = {"final": "test", "final, greedy": "test_greedy", "mean of last 5": "last", "picked by validation": "picked"}


def perfect_prompts(seed: int, directory: Path) -> str:
    """Path of a prompts file whose root prompt says what every glyph means in the world of this seed."""
    meaning = espl.draw_meaning(random.Random(f"glyphs/{seed}"))
    text = Path(espl.DEFAULT_PROMPTS).read_text(encoding="utf-8")
    known = "\n".join(f"{glyph} {name}" for glyph, name in meaning.items())
    path = directory / f"perfect-{seed}.txt"
    path.write_text(text.replace("[glyphs.principles]\n", f"[glyphs.principles]\n{known}\n"), encoding="utf-8")
    return str(path)


def evaluations(name: str, flags: list[str], seed: int, out: Path) -> list[dict]:
    """The evaluations of one run, first to last; from its directory if it is finished there."""
    directory = out / f"{name}-{seed}"
    argv = ["--task", "glyphs", "--seed", str(seed), "--run-dir", str(directory), *flags]
    config = espl.parse_args(argv)
    path, wanted = directory / "finished.json", {k: v for k, v in vars(config).items() if k != "run_dir"}
    if path.is_file() and (done := json.loads(path.read_text()))["config"] == wanted:
        return done["evaluations"]
    shutil.rmtree(directory, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", str(Path(config.compile_cache).expanduser()))
    run = espl.start_run(config)
    espl.train(run)
    path.write_text(json.dumps({"config": wanted, "evaluations": run.evaluations}))
    return run.evaluations


def readings(found: list[dict]) -> dict[str, float]:
    """The honest readings of one run's test curve."""
    lasts = [e["test"] for e in found if e["iteration"]][-5:]  # iteration 0 is before training
    return found[-1] | {"last": float(np.mean(lasts)), "picked": max(found, key=lambda e: e["val"])["test"]}


def interval(differences: list[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (draws, len(differences))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


def print_tables(rows: dict[str, list[dict]], reference: str, seeds: list[int]) -> None:
    """rows: {name: readings of each seed}. Differences are those of `reference` minus each other row."""
    print(f"\nSeeds {', '.join(map(str, seeds))}; share of test problems solved\n\n| | " + " | ".join(READINGS)
          + " |\n| --- |" + " --- |" * len(READINGS))
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(spread([r[key] for r in found]) for key in READINGS.values()) + " |")
    print(f"\n| {reference} minus | final | 95 % interval | final, greedy | 95 % interval |\n| --- |" + " --- |" * 4)
    for name, found in rows.items():
        if name != reference:
            cells = []
            for key in ("test", "test_greedy"):
                differences = [a[key] - b[key] for a, b in zip(rows[reference], found)]
                low, high = interval(differences)
                cells.append(f"{np.mean(differences):+.3f} | {low:+.3f} to {high:+.3f}")
            print(f"| {name} | " + " | ".join(cells) + " |")


def print_efficiency(curves: dict[str, list[list[dict]]]) -> None:
    """Iterations that espl needs for the final score of rl."""
    needed = [next((e["iteration"] for e in ours if e["test"] >= theirs[-1]["test"]), None)
              for ours, theirs in zip(curves["espl"], curves["rl"])]
    print(f"\nespl reaches rl's score of iteration {curves['rl'][0][-1]['iteration']} by iteration "
          f"{', '.join(map(str, needed))} (evaluated every {curves['rl'][0][1]['iteration']})")


def draw(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Learning curves: mean over seeds with a band of one standard deviation, sampled and greedy."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), (("test", "T = 1"), ("test_greedy", "greedy"))):
        for name, runs in curves.items():
            at = [e["iteration"] for e in runs[0]]
            scores = np.array([[e[key] for e in run] for run in runs])
            mean, sd = scores.mean(0), scores.std(0, ddof=min(1, len(runs) - 1))
            [line] = axis.plot(at, mean, marker="o", markersize=3, label=name, clip_on=False, zorder=3)
            axis.fill_between(at, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="iteration", title=f"test problems solved, {title}", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    figure.savefig(path, dpi=110)


def plan(args) -> dict[str, list[str]]:
    """{row: flags of espl.py}"""
    if args.command == "vary":
        flag, _, values = args.setting.partition("=")
        if not values:
            raise espl.UserError("vary takes FLAG=VALUE,VALUE, for example selection=top_random,softmax")
        return {f"{flag}={v}": [f"--{flag.replace('_', '-')}", v] for v in values.split(",")}
    perfect = {"rl, perfect prompt": ["--mode", "rl"]} if args.perfect else {}
    return {mode: ["--mode", mode] for mode in MODES} | perfect


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compare", "vary"))
    parser.add_argument("setting", nargs="?", default="", help="of vary: FLAG=VALUE,VALUE,…")
    parser.add_argument("--seeds", default="5", help="how many, from 0 on, or a list: 100,101")
    parser.add_argument("--perfect", action="store_true", help="also the perfect prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args, extra = parser.parse_known_args()  # what is left goes to espl.py
    bar, curves = espl.progress, {}
    espl.print_line = lambda *_: None
    espl.progress = lambda items=None, **_: espl.tqdm(disable=True) if items is None else items  # one bar is enough
    try:
        seeds = list(map(int, args.seeds.split(","))) if "," in args.seeds else list(range(int(args.seeds)))
        args.out.mkdir(parents=True, exist_ok=True)
        rows = plan(args)
        for name, flags, seed in bar([(n, f, s) for n, f in rows.items() for s in seeds], desc=args.command):
            perfect = ["--prompts-file", perfect_prompts(seed, args.out)] if "perfect" in name else []
            curves.setdefault(name, []).append(evaluations(name, flags + perfect + extra, seed, args.out))
    except (espl.UserError, ValueError) as e:
        print(f"lab: error: {espl.first_line(e)}", file=sys.stderr)
        return 2
    tables = {name: [readings(found) for found in runs] for name, runs in curves.items()}
    frozen = lambda runs: [found[0] | {"last": found[0]["test"], "picked": found[0]["test"]} for found in runs]
    first = {"base": frozen(next(iter(curves.values())))}
    if args.perfect:
        first["perfect prompt, frozen weights"] = frozen(curves["rl, perfect prompt"])
    print_tables(first | tables, "espl" if args.command == "compare" else next(iter(rows)), seeds)
    if args.command == "compare":
        print_efficiency(curves)
    draw(curves, args.out / f"{args.command}.png")
    results = {"seeds": seeds, "argv": sys.argv[1:], "curves": curves}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{args.out / f'{args.command}.png'}, {args.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
