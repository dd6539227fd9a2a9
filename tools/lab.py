"""The laboratory: the paper's comparison and its ablations, with seeds, spread and paired differences.

    python tools/lab.py compare                            # all rows of MODES; five seeds
    python tools/lab.py compare --perfect                  # also under a root prompt that states every meaning
    python tools/lab.py vary selection=softmax,uniform     # espl with the values of one flag
    python tools/lab.py vary num_prompts=1,5 num_rollouts=15,3       # of several flags that change together
    python tools/lab.py ablations                          # all of ABLATIONS, half an hour
    python tools/lab.py ratings                            # does TrueSkill's mu predict the score on the test set?
    python tools/lab.py models DIR DIR                     # rl, evolution and espl with each of these models
    python tools/lab.py readme                             # tables in README.md and docs/, from docs/results.json

Flags of espl.py, given last, reach every run: --iterations 30 --lora-rank 8, or --task aime instead of the embedded
world (tasks/glyphs.py). Runs are made one after the other in this process, so that programs are compiled once, in
folders of --out; runs that are finished there are not repeated. What was measured is printed as Markdown tables and
added to --results. A cell is the mean and standard deviation over the seeds. Differences are paired (same seed, so the
same world), with 95 % intervals over the seeds: bootstrap, and t. Tokens are those sampled in training, by rollouts and
by reflections; what is read, and evaluation, does not count.
"""

import argparse
import dataclasses
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import espl  # noqa: E402

evaluate = espl.from_tools("evaluate")

# The rows of compare. More rollouts, more iterations: so many that rl samples as many tokens as espl of that seed, its
# reflections included. "A, then B": half of the iterations in mode A, the others in mode B (as in BetterTogether).
MORE, LONGER = "rl, more rollouts", "rl, more iterations"
MODES = {"rl": "weights alone (`--mode rl`)", MORE: "weights alone, more rollouts",
         LONGER: "weights alone, more iterations", "reflection": "prompts alone (`--mode reflection`)",
         "evolution": "prompts alone (`--mode evolution`)", "evolution, then rl": "prompts, then weights",
         "rl, then evolution": "weights, then prompts", "espl": "**E-SPL: both**"}
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


def spend(config: espl.Config, name: str, rl: list[dict], ours: list[dict]) -> None:
    """Let a run of rl (its curve: `rl`) sample at least as many tokens as espl did (`ours`), as row MORE or LONGER."""
    times = sum(ours[-1]["tokens"].values()) / sum(rl[-1]["tokens"].values())
    if name == LONGER:
        config.iterations = math.ceil(times * rl[-1]["iteration"])
    else:
        config.num_prompts, config.num_rollouts = 1, math.ceil(times * config.num_prompts * config.num_rollouts)


def train(config: espl.Config, then: str) -> espl.Run:
    """A run; with `then`, the second half of its iterations in that mode."""
    run = espl.start_run(config)
    if then:
        iterations = espl.last_iteration(run)
        config.iterations = iterations // 2
        espl.train(run)
        resume = ["--resume", config.run_dir, "--mode", then, "--iterations", str(iterations)]
        run = espl.start_run(espl.parse_args(resume))
    espl.train(run)
    return run


def tokens_sampled(run: espl.Run) -> dict[int, dict[str, int]]:
    """{iteration: tokens of rollouts and of reflections up to there}."""
    total, found = Counter(rollouts=0, reflections=0), {}
    for line in (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        m = json.loads(line)
        total.update(m["tokens"])
        found[m["iteration"]] = {k: total[k] for k in ("rollouts", "reflections")}
    return found


def finished_run(config: espl.Config, then: str = "") -> dict:
    """Evaluations and closing report of one run; from its directory if it is finished there."""
    path = Path(config.run_dir) / "finished.json"
    wanted = {k: v for k, v in vars(config).items() if k != "run_dir"}
    if path.is_file() and (done := json.loads(path.read_text()))["config"] == wanted:
        return done
    shutil.rmtree(config.run_dir, ignore_errors=True)
    run = train(config, then)
    keep, tokens = ("iteration", "prompt", "val", "test", "test_greedy"), tokens_sampled(run)
    curve = [{k: e[k] for k in keep if k in e} | {"tokens": tokens[e["iteration"]]} for e in run.evaluations]
    for kept, e in zip(curve, run.evaluations):
        kept |= {"table": {name: mean for name, (mean, _, _) in e["table"]["reward"].items()}} if "table" in e else {}
    report = evaluate.closing_report(run).partition("\n\nfiles:")[0]
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
        rows = {mode: ["--mode", mode.partition(",")[0]] for mode in sorted(MODES, key=(MORE, LONGER).__contains__)}
        return rows | ({PERFECT: ["--mode", "rl"]} if args.perfect else {})
    if args.command == "models":
        models = {Path(model).name: model for model in args.settings}
        if not models or len(models) < len(args.settings):
            raise espl.UserError("models takes directories of different names")
        return {f"{mode} of {name}": ["--mode", mode, "--model", model]
                for name, model in models.items() for mode in ("rl", "evolution", "espl")}
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
    """Mean of the paired differences a - b and its 95 % intervals, bootstrap and t."""
    from scipy.stats import t
    differences, n = np.subtract(a, b), len(a)
    mean, means = differences.mean(), np.random.default_rng(0).choice(differences, (draws, n)).mean(1)
    half = t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5 if n > 1 else np.inf
    intervals = np.quantile(means, (0.025, 0.975)), (mean - half, mean + half)
    return " | ".join([f"{mean:+.3f}", *(f"{low:+.3f} to {high:+.3f}" for low, high in intervals)])


def table(head: list[str], rows: list[list[str]]) -> str:
    line = ["---"] * sum(1 + cell.count("|") for cell in head)  # a cell may stand for several
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, line, *rows])


def read(curves: list[list[dict]], reading: str) -> list[float]:
    """One of READINGS of every seed's curve."""
    row, key = READINGS[reading]
    return [evaluate.summary(curve)[row][key] for curve in curves]


def readings_of(curves: list[list[dict]]) -> list[str]:
    """Those of READINGS that there are: greedy responses and validation are not always evaluated."""
    found = evaluate.summary(curves[0])
    return [r for r, (row, key) in READINGS.items() if key in found.get(row, ())]


def compared(section: dict) -> dict[str, list[list[dict]]]:
    """{title: curves} of a comparison's rows, as they are shown."""
    curves = section["curves"]
    rows = {"base model": [c[:1] for c in curves["espl"]]} | {MODES[m]: curves[m] for m in MODES if m in curves}
    if PERFECT in curves:
        rows |= {"a perfect prompt, frozen weights": [c[:1] for c in curves[PERFECT]], PERFECT: curves[PERFECT]}
    return rows


def scores_table(section: dict) -> str:
    """Scores of all rows, and the tokens that they sampled; the iterations that espl needs for rl's final score."""
    curves, rows = section["curves"], compared(section)
    readings = readings_of(curves["espl"])
    tokens = lambda c: " + ".join(f"{np.mean([x[-1]['tokens'][k] for x in c]) / 1000:.0f}"
                                  for k in ("rollouts", "reflections"))
    scores = table(["test problems solved", *readings, "thousand tokens: rollouts + reflections"],
                   [[name, *(spread(read(c, r)) for r in readings), tokens(c)] for name, c in rows.items()])
    reached = [next((e["iteration"] for e in ours[1:] if e["test"] >= theirs[-1]["test"]), "never")
               for ours, theirs in zip(curves["espl"], curves["rl"])]
    at = [e["iteration"] for e in curves["rl"][0]]
    return (f"{scores}\n\nE-SPL first reached rl's final score, that of iteration {at[-1]}, at iteration "
            + ", ".join(f"{i} ({n} of {len(reached)} seeds)" for i, n in Counter(reached).items())
            + f"; its first evaluation in training was at iteration {at[1]}.")


def paired_table(section: dict) -> str:
    """Differences of espl to every row."""
    ours, rows = section["curves"]["espl"], compared(section)
    readings = readings_of(ours)[:2]
    return table(["E-SPL minus, same seed", *(f"{r} | 95 %, bootstrap | 95 %, t" for r in readings)],
                 [[name, *(difference(read(ours, r), read(c, r)) for r in readings)]
                  for name, c in rows.items() if name not in (MODES["espl"], PERFECT)])


def compare_tables(section: dict) -> str:
    """All of a comparison."""
    parts = [scores_table, paired_table] + [gains_tables] * ("table" in section["curves"]["espl"][0][-1])
    return "\n\n".join(part(section) for part in parts)


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
    modes = [mode for mode in MODES if mode in section["curves"]]
    return table(["at the end, same seeds in every cell", *(MODES[mode] for mode in modes)], [
        [title(name), *(cells(section, mode, name) for mode in modes)] for name in dict.fromkeys(names)])


def vary_tables(section: dict) -> str:
    """Scores of the default and of every variant, and their difference."""
    default = section["curves"]["espl"]
    cells = lambda c: [spread(read(c, "final")), spread(read(c, "mean of last 5"))]
    minus = lambda c: difference(read(c, "mean of last 5"), read(default, "mean of last 5"))
    return table(["", "final", "mean of last 5", "minus the default", "95 %, bootstrap", "95 %, t"],
                 [[f"`{name}`", *cells(c), minus(c)] if c is not default else ["default", *cells(c), "", "", ""]
                  for name, c in section["curves"].items()])


def ratings_tables(section: dict) -> str:
    """Rank correlations with the score on the test set."""
    names = list(next(iter(section["rho"].values()))[0])
    return table(["Spearman's rho with the test score", *names],
                 [[f"`--mode {mode}`", " to ".join(str(f([x["prompts"] for x in found])) for f in (min, max)),
                   *(spread([x[n] for x in found]) for n in names[1:])] for mode, found in section["rho"].items()])


def models_table(section: dict) -> str:
    """Final scores of every model's modes, and in how many seeds espl's is the highest."""
    rows, curves = [], section["curves"]
    for model in dict.fromkeys(name.partition(" of ")[2] for name in curves):
        finals = {mode: read(curves[f"{mode} of {model}"], "final") for mode in ("rl", "evolution", "espl")}
        base = [c[0]["test"] for c in curves[f"espl of {model}"]]
        won = sum(ours > max(others) for *others, ours in zip(*finals.values()))
        rows.append([f"`{model}`", *map(spread, [base, *finals.values()]), f"{won} of {len(base)}"])
    return table(["model", "base model", *(f"`--mode {m}`" for m in finals), "seeds in which E-SPL's is highest"], rows)


TABLES = {  # name: (section of the results, what makes its Markdown)
    "compare": ("compare", compare_tables), "vary": ("vary", vary_tables), "ablations": ("ablations", vary_tables),
    "ratings": ("ratings", ratings_tables), "models": ("models", models_table), "scores": ("compare", scores_table),
    "paired": ("compare", paired_table), "gains": ("compare", gains_tables), "cells": ("compare", cells_tables),
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
    """Learning curves, against iterations and against tokens: mean over seeds, a band of one standard deviation."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    labels = "iteration", "thousand tokens sampled by rollouts and reflections"
    axes = dict(zip(labels, figure.subplots(1, 2, sharey=True)))
    for name, runs in curves.items():
        evaluations = list(zip(*runs))  # up to the last that all seeds have
        scores = np.array([[e["test"] for e in at] for at in evaluations])
        mean, sd = scores.mean(1), scores.std(1, ddof=min(1, len(runs) - 1))
        tokens = [np.mean([sum(e["tokens"].values()) for e in at]) / 1000 for at in evaluations]
        for axis, x in zip(axes.values(), ([np.mean([e["iteration"] for e in at]) for at in evaluations], tokens)):
            [line] = axis.plot(x, mean, marker="o", markersize=3, label=name, clip_on=False, zorder=3)
            axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.12, linewidth=0)
    for label, axis in axes.items():
        axis.set(xlabel=label, title="test problems solved", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
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
    command = re.sub(r" --(out|results|compile-cache)[ =]\S+", "", " ".join(sys.argv[1:])).split()  # not of this machine
    section = {"command": command, "seeds": seeds, "curves": {}, "rho": {}, "report": ""}
    espl.print_line = espl.from_tools("report").draw = lambda *_: None
    espl.progress = lambda items=None, **_: espl.tqdm(disable=True) if items is None else items  # one bar is enough
    for name, config in bar(configs, desc=args.command):
        curves = section["curves"].setdefault(name, [])
        if name in (MORE, LONGER):
            spend(config, name, *(section["curves"][mode][len(curves)] for mode in ("rl", "espl")))
        found = finished_run(config, name.partition(", then ")[2])
        curves.append(found["curve"])
        section["report"] = section["report"] or found["report"] * (name == "espl")
        if args.command == "ratings":
            section["rho"].setdefault(name, []).append(rank_correlations(config, args.out))
    return section


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compare", "vary", "ablations", "ratings", "models", "readme"))
    parser.add_argument("settings", nargs="*", help="of vary: FLAG=VALUE,VALUE …; of models: directories")
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
    if args.command in ("compare", "vary", "models"):
        draw(section["curves"], args.out / f"{args.command}.png")
        print(f"drawn in {args.out / f'{args.command}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
