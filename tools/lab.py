"""The laboratory: the paper's comparison and its ablations, with seeds, spread and paired differences.

    python tools/lab.py compare                            # base, rl, reflection, evolution, espl; five seeds
    python tools/lab.py compare --perfect                  # also under a root prompt that states every meaning
    python tools/lab.py vary selection=softmax,uniform     # espl with the values of one flag
    python tools/lab.py vary num_prompts=1,5 num_rollouts=15,3       # of several flags that change together
    python tools/lab.py ablations                          # all of ABLATIONS, half an hour
    python tools/lab.py ratings                            # does TrueSkill's mu predict the score on the test set?
    python tools/lab.py readme                             # tables in README.md and docs/, from docs/results.json

Flags of espl.py, given last, reach every run: --iterations 30 --lora-rank 8, or --task aime instead of the embedded
world (tasks/glyphs.py). Runs are made one after the other in this process, so that programs are compiled once, in
folders of --out; runs that are finished there are not repeated. What was measured is printed as Markdown tables and
added to --results. A cell is the mean and standard deviation over the seeds. Differences are paired (same seed, so the
same world), their intervals are 95 % bootstrap intervals over the seeds.
"""

import argparse
import dataclasses
import json
import random
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import espl  # noqa: E402

MODES = {"rl": "weights alone (`--mode rl`)", "reflection": "prompts alone (`--mode reflection`)",
         "evolution": "prompts alone (`--mode evolution`)", "espl": "**E-SPL: both**"}
PERFECT = "rl under the perfect prompt"
ABLATIONS = (  # the value that is left out is the default
    "p_crossover=0,1", "selection=softmax,uniform,ucb,lucb", "rating=last", "reflector=current",
    "reflect_on=contrast,all", "max_operations=2", "num_prompts=1,5 num_rollouts=15,3", "baseline=marginal",
    "loss=ppo,cispo,reinforce")
READINGS = {"final": ("final", "test"), "final, greedy": ("final", "test_greedy"),
            "mean of last 5": ("mean of last 5", "test"), "picked by validation": ("picked by validation", "test")}


# ---- Runs ----


def perfect_prompts(seed: int, directory: Path) -> str:
    """Path of a prompts file whose root prompt says what every glyph means in the world of this seed."""
    meaning = espl.task_file("glyphs")["draw_meaning"](random.Random(f"glyphs/{seed}"))  # as its `problems` does
    known = "\n".join(f"{glyph} {name}" for glyph, name in meaning.items())
    path = directory / f"perfect-{seed}.txt"
    path.write_text(f"[glyphs.principles]\n{known}\n", encoding="utf-8")  # all else stays as the task has it
    return str(path)


def config_of(name: str, flags: list[str], seed: int, out: Path) -> espl.Config:
    """Config of one run of a row."""
    directory = out / f"{re.sub(r'[^a-z0-9_=.]+', '-', name)}-{seed}"
    prompts = ["--prompts-file", perfect_prompts(seed, out)] if name == PERFECT else []
    return espl.parse_args([*flags, *prompts, "--seed", str(seed), "--run-dir", str(directory)])


def finished_run(config: espl.Config) -> dict:
    """Evaluations and closing report of one run; from its directory if it is finished there."""
    path = Path(config.run_dir) / "finished.json"
    wanted = {k: v for k, v in vars(config).items() if k != "run_dir"}
    if path.is_file() and (done := json.loads(path.read_text()))["config"] == wanted:
        return done
    shutil.rmtree(config.run_dir, ignore_errors=True)
    run = espl.start_run(config)
    espl.train(run)
    keep = ("iteration", "prompt", "val", "test", "test_greedy")
    curve = [{k: e[k] for k in keep if k in e} for e in run.evaluations]
    for kept, e in zip(curve, run.evaluations):
        kept |= {"table": {name: mean for name, (mean, _, _) in e["table"]["reward"].items()}} if "table" in e else {}
    report = espl.closing_report(run).partition("\n\nfiles:")[0]
    path.write_text(json.dumps({"config": wanted, "curve": curve, "report": report}))
    return json.loads(path.read_text())


def settings(text: str) -> dict[str, list[str]]:
    """{row: flags of espl.py} of "FLAG=VALUE,VALUE …"; several flags change together."""
    parts = [part.partition("=") for part in text.split()]
    values = [v.split(",") for _, _, v in parts]
    if not parts or not all(map(all, values)) or len(set(map(len, values))) > 1:
        raise espl.UserError("vary takes FLAG=VALUE,VALUE, for example selection=softmax,uniform; of several flags, as "
                             "many values each")
    rows = [[(flag, v) for (flag, _, _), v in zip(parts, row)] for row in zip(*values)]
    return {" ".join(f"{flag}={v}" for flag, v in row):
            [a for flag, v in row for a in (f"--{flag.replace('_', '-')}", v)] for row in rows}


def plan(args) -> dict[str, list[str]]:
    """{row: flags of espl.py} of a command"""
    if args.command == "compare":
        rows = {mode: ["--mode", mode] for mode in MODES}
        return rows | ({PERFECT: ["--mode", "rl"]} if args.perfect else {})
    if args.command == "ratings":
        return {mode: ["--mode", mode] for mode in ("espl", "evolution")}
    rows = {"espl": ["--mode", "espl"]}
    for text in ABLATIONS if args.command == "ablations" else [" ".join(args.settings)]:
        rows |= settings(text)
    return rows


def rank_correlations(config: espl.Config, out: Path) -> dict[str, float]:
    """Spearman's rho between what a run knew of each prompt that ever competed, and the prompt's score on the test set
    under the weights before training."""
    from scipy.stats import spearmanr
    prompts = json.loads((Path(config.run_dir) / "population.json").read_text(encoding="utf-8"))
    prompts = [s for s in (espl.SystemPrompt(**s) for s in prompts) if s.history]
    shutil.rmtree(out / "frozen", ignore_errors=True)
    run = espl.start_run(dataclasses.replace(config, run_dir=str(out / "frozen")))
    groups = espl.sample_groups(run, [(s, x, 2) for s in prompts for x in run.task.test], "test", 0)
    scores = np.reshape([g.value for g in groups], (len(prompts), -1)).mean(1)
    known = {"final mu": [s.mu for s in prompts], "last V": [s.history[-1]["value"] for s in prompts],
             "mean V": [np.mean([h["value"] for h in s.history]) for s in prompts],
             "order of creation": [s.id for s in prompts]}
    return {"prompts": len(prompts)} | {name: float(spearmanr(x, scores).statistic) for name, x in known.items()}


# ---- Tables ----


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


def difference(a: list[float], b: list[float], draws: int = 10_000) -> str:
    """Mean of the paired differences a - b and its 95 % bootstrap interval."""
    differences = np.subtract(a, b)
    means = np.random.default_rng(0).choice(differences, (draws, len(a))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{differences.mean():+.3f} | {low:+.3f} to {high:+.3f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    line = ["---"] * sum(1 + cell.count("|") for cell in head)  # a cell may stand for several
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, line, *rows])


def read(curves: list[list[dict]], reading: str) -> list[float]:
    """One of READINGS of every seed's curve."""
    row, key = READINGS[reading]
    return [espl.summary(curve)[row][key] for curve in curves]


def compare_tables(section: dict) -> str:
    """Scores of all modes, differences of espl to each, and the iterations that it needs for rl's final score."""
    curves = section["curves"]
    rows = {"base model": [c[:1] for c in curves["espl"]]} | {MODES[m]: curves[m] for m in MODES}
    if PERFECT in curves:
        rows |= {"a perfect prompt, frozen weights": [c[:1] for c in curves[PERFECT]], PERFECT: curves[PERFECT]}
    rows_found = espl.summary(curves["espl"][0])
    readings = [r for r, (row, key) in READINGS.items() if key in rows_found.get(row, ())]
    scores = table(["test problems solved", *readings],
                   [[name, *(spread(read(c, r)) for r in readings)] for name, c in rows.items()])
    paired = table(["E-SPL minus, same seed", *(f"{r} | 95 % interval" for r in readings[:2])],
                   [[name, *(difference(read(curves["espl"], r), read(c, r)) for r in readings[:2])]
                    for name, c in rows.items() if name not in (MODES["espl"], PERFECT)])
    reached = [next((e["iteration"] for e in ours[1:] if e["test"] >= theirs[-1]["test"]), "never")
               for ours, theirs in zip(curves["espl"], curves["rl"])]
    tabled = all("table" in c[-1] for mode in MODES for c in curves[mode])
    gains = f"\n\n{gains_tables(section)}" * tabled
    return (f"{scores}\n\n{paired}{gains}\n\nE-SPL first reached rl's final score, that of iteration "
            f"{curves['rl'][0][-1]['iteration']}, at iteration {', '.join(map(str, reached))} (seeds "
            f"{', '.join(map(str, section['seeds']))}; its first evaluation in training was at iteration "
            f"{curves['rl'][0][1]['iteration']}).")


def cells(section: dict, mode: str, name: str) -> str:
    """Mean and spread of a cell or gain of the 2 x 2 table at the end of a mode's runs; "" where it has none."""
    values = [c[-1]["table"][name] for c in section["curves"].get(mode, ()) if name in c[-1].get("table", ())]
    return spread(values) if values else ""


def cells_tables(section: dict) -> str:
    """espl's 2 x 2 table, its gains in a sentence."""
    cell = lambda name: cells(section, "espl", name)
    square = table(["test problems solved", "root prompt", "evolved prompt"], [
        [f"weights {w} training", cell(f"{w}, root"), cell(f"{w}, best")] for w in ("before", "after")])
    return (f"{square}\n\nThe prompt alone gains {cell('prompt alone')}, the weights alone {cell('weights alone')}, "
            f"both {cell('both')}: {cell('interaction')} more than the sum of the two.")


def gains_tables(section: dict) -> str:
    """Cells and gains of all modes. Where weights are frozen there is one row of cells, in rl one column."""
    names = [name for c in section["curves"]["espl"] for name in c[-1].get("table", ())]
    title = lambda name: f"weights {name} prompt" if ", " in name else f"gain: {name}"
    return table(["at the end, same seeds in every cell", *MODES.values()], [
        [title(name), *(cells(section, mode, name) for mode in MODES)] for name in dict.fromkeys(names)])


def vary_tables(section: dict) -> str:
    """Scores of the default and of every variant, and their difference."""
    default = section["curves"]["espl"]
    cells = lambda c: [spread(read(c, "final")), spread(read(c, "mean of last 5"))]
    minus = lambda c: difference(read(c, "mean of last 5"), read(default, "mean of last 5"))
    return table(["", "final", "mean of last 5", "minus the default", "95 % interval"],
                 [[f"`{name}`", *cells(c), minus(c)] if c is not default else ["default", *cells(c), "", ""]
                  for name, c in section["curves"].items()])


def ratings_tables(section: dict) -> str:
    """Rank correlations with the score on the test set."""
    names = list(next(iter(section["rho"].values()))[0])
    return table(["Spearman's rho with the test score", *names],
                 [[f"`--mode {mode}`", " to ".join(str(f([x["prompts"] for x in found])) for f in (min, max)),
                   *(spread([x[n] for x in found]) for n in names[1:])] for mode, found in section["rho"].items()])


TABLES = {  # name: (section of the results, what makes its Markdown)
    "compare": ("compare", compare_tables), "vary": ("vary", vary_tables), "ablations": ("ablations", vary_tables),
    "ratings": ("ratings", ratings_tables), "cells": ("compare", cells_tables),
    "report": ("compare", lambda section: f"```\n{section['report']}\n```")}


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def readme(text: str, results: dict) -> str:
    """A page with what stands between <!-- NAME --> and <!-- end -->, names as in TABLES, made from the results."""
    def block(match):
        section, make = TABLES[match[2]]
        return f"{match[1]}\n{make(results[section])}\n{match[3]}"

    return re.sub(r"(<!-- (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.S)


def draw(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Learning curves: mean over seeds with a band of one standard deviation, sampled and greedy."""
    from matplotlib.figure import Figure
    keys = {k: v for k, v in {"test": "sampled", "test_greedy": "greedy"}.items() if k in curves["espl"][0][-1]}
    figure = Figure(figsize=(5.5 * len(keys), 4.5), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys.items()):
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


def seed_list(text: str) -> list[int]:
    """Seeds of "5" (0 to 4), "100-104" or "100,103"."""
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        seeds = list(range(int(match[1]), int(match[2]) + 1))
    else:
        seeds = list(map(int, text.split(","))) if re.fullmatch(r"\d+(,\d+)+", text) else []
        seeds = seeds or list(range(int(text) if text.isdecimal() else 0))
    if not seeds:
        raise espl.UserError(f"--seeds {text}: give a number of seeds (5), a range (100-104) or a list (100,103)")
    return seeds


def run_all(args, extra: list[str]) -> dict:
    """Make the runs of a command; returns its section of the results."""
    if not any(a.partition("=")[0] in ("--task", "--train-file") for a in extra):
        extra = ["--task", "glyphs", *extra]
    elif args.perfect:
        raise espl.UserError("--perfect is for the embedded world only")
    args.out.mkdir(parents=True, exist_ok=True)
    seeds, bar = seed_list(args.seeds), espl.progress
    configs = [(name, config_of(name, [*extra, *flags], seed, args.out))  # what is wrong is said before the first run
               for name, flags in plan(args).items() for seed in seeds]
    section = {"command": sys.argv[1:], "seeds": seeds, "curves": {}, "rho": {}, "report": ""}
    espl.print_line, espl.REPORT = lambda *_: None, Path("no pictures")
    espl.progress = lambda items=None, **_: espl.tqdm(disable=True) if items is None else items  # one bar is enough
    for name, config in bar(configs, desc=args.command):
        found = finished_run(config)
        section["curves"].setdefault(name, []).append(found["curve"])
        section["report"] = section["report"] or found["report"] * (name == "espl")
        if args.command == "ratings":
            section["rho"].setdefault(name, []).append(rank_correlations(config, args.out))
    return section


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compare", "vary", "ablations", "ratings", "readme"))
    parser.add_argument("settings", nargs="*", help="of vary: FLAG=VALUE,VALUE …")
    parser.add_argument("--seeds", default="5", help="how many, from 0 on; or a range or list: 100-104 or 100,103")
    parser.add_argument("--perfect", action="store_true", help="of compare: also the perfect prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--results", type=Path, help="where results are added (default: results.json in --out; for "
                        "readme: docs/results.json)")
    args, extra = parser.parse_known_args()  # what is left goes to espl.py
    try:
        if args.command == "readme":
            results = json.loads((args.results or ROOT / "docs/results.json").read_text(encoding="utf-8"))
            for page in pages():
                text = page.read_text(encoding="utf-8")
                if (new := readme(text, results)) != text:
                    espl.write_whole(page, new)
            return 0
        section = run_all(args, extra)
        path = args.results or args.out / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        espl.write_whole(path, json.dumps(results | {args.command: section}, separators=(",", ":")))
    except (espl.UserError, OSError) as e:
        print(f"lab: error: {espl.first_line(e)}", file=sys.stderr)
        return 2
    print(f"\n{TABLES[args.command][1](section)}\n\nadded to {path}")
    if args.command in ("compare", "vary"):
        draw(section["curves"], args.out / f"{args.command}.png")
        print(f"drawn in {args.out / f'{args.command}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
