"""The laboratory: modes and ablations of E-SPL over seeds, each run in a child process of its own.

    python tools/lab.py compare --seeds 10             # all rows of MODES; also draws compare.png
    python tools/lab.py ablations                      # espl, and with the values in ABLATIONS
    python tools/lab.py vary selection=softmax,uniform # espl with other values of a flag
    python tools/lab.py models DIR DIR                 # rl, evolution and espl with other models
    python tools/lab.py ratings                        # does mu predict a prompt's test score?
    python tools/lab.py order --seeds 20               # both at once, or one after the other
    python tools/lab.py shop --flags "--model DIR ..." # rl, evolution and espl of a real model
    python tools/lab.py shift                          # prompts or weights carried to a new world
    python tools/lab.py plasticity                     # rl in a new world from trained weights
    python tools/lab.py kl                             # reward against KL(pi_theta || pi_ref)
    python tools/lab.py readme --results docs/results.json     # tables and picture of the pages

The task is the embedded world (tasks/glyphs.py), except for `shop` (tasks/shop.py). Finished runs
in --out are not repeated. Every evaluation of every run is added to --results; `readme` writes the
tables that stand between <!-- NAME --> and <!-- end --> in README.md and docs/*.md. A cell is the
mean and standard deviation over the seeds. Differences are paired (same seed, so the same world),
with a 95 % bootstrap interval over the seeds. Tokens are those sampled in training, by rollouts and
by reflections.
"""

import dataclasses
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import report  # noqa: E402

import espl  # noqa: E402

# Rows of `compare`. "A, then B": half of the iterations in each mode, as in BetterTogether.
LONGER, PERFECT = "rl, more iterations", "rl under the perfect prompt"
MODES = {
    "rl": "weights alone (`--mode rl`)",
    "reflection": "prompts alone (`--mode reflection`)",
    "evolution": "prompts alone (`--mode evolution`)",
    "espl": "**E-SPL: both**",
    "evolution, then rl": "prompts, then weights",
    "rl, then evolution": "weights, then prompts",
    LONGER: "weights alone, as many tokens as E-SPL",
    PERFECT: PERFECT,
}
ABLATIONS = (  # the value that is left out is the default
    "p_crossover=0,1",
    "selection=softmax,uniform,ucb,lucb",
    "reflector=current",
    "reflect_on=contrast,all",
    "num_prompts=1,5 num_rollouts=15,3",
    "baseline=marginal",
)
PLASTICITY = {"rl, untrained weights": "", "rl after rl": "rl", "rl after espl": "espl"}
SHIFT = ("nothing carried", "prompts carried", "weights carried", "prompts and weights carried")
PICTURES = {"compare": "compare.png", "shop": "real_model.png"}  # of sections, in docs
DRAWN = {  # their curves
    "rl": "weights alone",
    "reflection": "prompts, one at a time",
    "evolution": "prompts alone",
    "espl": "E-SPL: both",
}
READINGS = ("final", "mean of last 5", "picked by validation")


# ---- Runs


def rows_of(command, settings):
    """The rows of a command, {name: flags of espl.py}. A row may need what the ones before made."""
    if command == "compare":
        return {name: ["--mode", re.split("[ ,]", name)[0]] for name in MODES}
    if command == "models":
        rows = {}
        for model in settings:
            for mode in ("rl", "evolution", "espl"):
                rows[f"{mode} of {name_of(model)}"] = ["--mode", mode, "--model", model]
        return rows
    if command == "order":
        names = [name for name in MODES if name == "espl" or ", then " in name]
        return {name: ["--mode", re.split("[ ,]", name)[0]] for name in names}
    if command == "shop":
        return {mode: ["--mode", mode, "--task", "shop"] for mode in ("rl", "evolution", "espl")}
    if command == "ratings":
        return {mode: ["--mode", mode] for mode in ("espl", "evolution")}
    if command == "plasticity":
        names = ("rl", "espl", *PLASTICITY)
        return {name: ["--mode", re.split("[ ,]", name)[0]] for name in names}
    if command == "shift":
        return {name: [] for name in ("espl", *SHIFT)}
    if command == "kl":  # so small a weight changes next to nothing, but the KL is logged
        return {mode: ["--mode", mode, "--kl-coef", "1e-9"] for mode in ("rl", "espl")}
    rows = {"espl": []}
    for text in ABLATIONS if command == "ablations" else [" ".join(settings)]:
        rows |= varied(text)
    return rows


def name_of(model):
    return Path(model).name


def varied(text):
    """Rows of "FLAG=VALUE,VALUE ..."; several flags change together."""
    flags = re.findall(r"(\w+)=(\S+)", text)
    rows = {}
    for values in zip(*(values.split(",") for _, values in flags)):
        row = {flag: value for (flag, _), value in zip(flags, values)}
        name = " ".join(f"{flag}={value}" for flag, value in row.items())
        rows[name] = [f"--{flag.replace('_', '-')}={value}" for flag, value in row.items()]
    if not rows:
        raise espl.UserError("vary takes FLAG=VALUE,VALUE, for example selection=softmax,uniform")
    return rows


def directory_of(name, seed, out):
    return out / f"{re.sub('[^a-z0-9_=.]+', '-', name)}-{seed}"


def more_flags(name, seed, out):
    """The flags of a row that depend on the seed and on other rows' runs."""
    ours = directory_of("espl", seed, out)
    another_world = f"--seed={seed + 1000}"
    if name == PERFECT:
        return ["--prompts-file", perfect_prompts(seed, out)]
    if name == LONGER:
        spent = curve_of(directory_of("rl", seed, out))[-1]
        times = sum(curve_of(ours)[-1]["tokens"].values()) / sum(spent["tokens"].values())
        return [f"--iterations={math.ceil(times * spent['iteration'])}"]
    if name in PLASTICITY:
        first = PLASTICITY[name]
        carried = [f"--model={exported(directory_of(first, seed, out))}"] if first else []
        return [another_world, *carried]
    if name not in SHIFT:
        return []
    flags = [another_world]
    if "prompts" in name:
        flags.append(f"--population={ours / 'population.json'}")
    if "weights" in name:
        flags.append(f"--model={exported(ours)}")
    return flags


def exported(directory):
    """A run's last weights as a model directory, which is made unless it is there."""
    model = directory / "exported"
    if not model.is_dir():
        log = directory / "export.log"
        child(log, "tools/export.py", directory, model, "--merge", "--step=latest")
    return model


def perfect_prompts(seed, out):
    """A prompts file whose root prompt says what every glyph means in the world of this seed."""
    meaning = espl.task_module("glyphs").draw_meaning(random.Random(f"glyphs/{seed}"))
    known = [f"{glyph} {name}" for glyph, name in meaning.items()]
    path = out / f"perfect-{seed}.txt"
    path.write_text("\n".join(["[principles]", *known]), encoding="utf-8")
    return str(path)


def child(log, program, *argv):
    """Runs a program of the project, whose output goes to a file."""
    with open(log, "w") as file:
        command = [sys.executable, ROOT / program, *argv]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        raise espl.UserError(f"{lines[-1]}; see {log}")


def finished_run(name, flags, out, seed):
    """The directory of a row's run, which is made unless it is there."""
    directory = directory_of(name, seed, out)
    flags = [*flags, f"--seed={seed}", f"--run-dir={directory}", *more_flags(name, seed, out)]
    c, then = espl.parse_args(flags), name.partition(", then ")[2]
    stages = [flags]
    if then:
        first = [*flags, f"--iterations={c.iterations // 2}"]
        second = [f"--resume={directory}", f"--mode={then}", f"--iterations={c.iterations}"]
        stages, c.mode = [first, second], then
    saved = report.read_json(directory / "config.json", {})
    metrics = list(report.read_jsonl(directory / "metrics.jsonl"))
    wanted = dataclasses.asdict(c).items()
    done = metrics and "table" in metrics[-1] and c.iterations in (0, metrics[-1]["iteration"])
    if not done or not wanted <= saved.items():
        shutil.rmtree(directory, ignore_errors=True)
        for i, stage in enumerate(stages):
            child(out / f"{directory.name}.{i}.log", "espl.py", *stage)
    return directory


def curve_of(directory):
    """The evaluations of a run, the last with its 2 x 2 table and the table's gains. The KL is the
    mean over the iterations since the evaluation before."""
    run, tokens, kl, curve = report.read_run(directory), Counter(), [], []
    for m in run.metrics:
        tokens.update(m["tokens"])
        if m.get("kl") is not None:
            kl.append(m["kl"])
        if "test" in m:
            point = {name: m[name] for name in ("iteration", "val", "test") if name in m}
            if kl:
                point["kl"] = float(np.mean(kl))
            spent = {kind: tokens[kind] for kind in ("rollouts", "reflections")}
            curve.append(point | {"prompt": m["tested_prompt"], "tokens": spent})
            kl = []
    cells = report.table_of(run.metrics)
    curve[-1]["table"] = {name: float(scores.mean()) for name, scores in cells.items()}
    return curve


def rank_correlations(directory):
    """Spearman's rho between what a run knew of each prompt that ever competed, and the prompt's
    score on the test set under the weights before training."""
    from scipy.stats import spearmanr

    frozen = directory / "frozen"
    shutil.rmtree(frozen, ignore_errors=True)
    run = espl.start_run(
        espl.Config(**espl.saved_flags({"resume": directory}) | {"run_dir": str(frozen)})
    )
    prompts = [s for s in report.read_run(directory).population if s.history]
    scores = [np.mean(espl.score(run, s, run.task.test, "test", 0)) for s in prompts]
    values = [[h["value"] for h in s.history] for s in prompts]
    known = {
        "final mu": [s.mu for s in prompts],
        "last V": [v[-1] for v in values],
        "mean V": [np.mean(v) for v in values],
        "order of creation": [s.id for s in prompts],
    }
    rho = {name: float(spearmanr(x, scores).statistic) for name, x in known.items()}
    return {"prompts": len(prompts)} | rho


# ---- Tables


def read(curves, reading):
    """One of READINGS of every seed's curve."""
    if reading == "mean of last 5":
        return [np.mean([e["test"] for e in curve[-5:]]) for curve in curves]
    name = "end" if reading == "final" else reading
    return [report.readings(curve).get(name, curve[-1])["test"] for curve in curves]


def spread(values):
    deviation = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def markdown(head, rows):
    lines = [" | ".join(cells) for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def scores_table(section):
    """Scores of all rows, and E-SPL's minus theirs."""
    curves = section["curves"]
    rows = {MODES.get(name, f"`{name}`"): c for name, c in curves.items()}
    if "rl" in curves:
        rows["base model"] = [c[:1] for c in curves["rl"]]
    if PERFECT in curves:
        rows["a perfect prompt, frozen weights"] = [c[:1] for c in curves[PERFECT]]
    lines = []
    for title, theirs in rows.items():
        line = [title, *(spread(read(theirs, reading)) for reading in READINGS)]
        line += [difference(curves["espl"], theirs, reading) for reading in READINGS[:2]]
        spent = [list(c[-1].get("tokens", {}).values()) for c in theirs]
        line.append(" + ".join(f"{n / 1000:.0f}" for n in np.mean(spent, axis=0)))
        lines.append(line)
    differences = [f"E-SPL minus it, {reading}" for reading in READINGS[:2]]
    head = ["test problems solved", *READINGS, *differences]
    return markdown([*head, "thousand tokens: rollouts + reflections"], lines)


def cell(curves, name):
    """A cell or gain of the 2 x 2 tables at the end of runs; "" where no seed has it."""
    values = [c[-1]["table"][name] for c in curves if name in c[-1]["table"]]
    return spread(values) if values else ""


def square_table(section):
    """E-SPL's 2 x 2 table."""
    lines = []
    for weights in ("before", "after"):
        names = [f"{weights}, {prompt}" for prompt in ("root", "tested")]
        cells = [cell(section["curves"]["espl"], name) for name in names]
        lines.append([f"weights {weights} training", *cells])
    return markdown(["test problems solved", "root prompt", "tested prompt"], lines)


def gains_table(section):
    """The 2 x 2 tables of all modes, and their gains."""
    modes = [mode for mode in MODES if mode in section["curves"]]
    lines = []
    for name in section["curves"]["espl"][0][-1]["table"]:
        title = f"weights {name} prompt" if ", " in name else f"gain: {name}"
        lines.append([title, *(cell(section["curves"][mode], name) for mode in modes)])
    head = [MODES[mode] for mode in modes]
    return markdown(["at the end, same seeds in every cell", *head], lines)


def course_table(section, baseline=None):
    """Test scores, and the KL if it was logged, at every evaluation. With a baseline, a row, the
    rows before it are left out, and the last column is the final score minus the baseline's."""
    all_curves, lines = section["curves"], []
    names = [*all_curves]
    for name in names[names.index(baseline) if baseline else 0 :]:
        line, curves = [name], all_curves[name]
        for evaluations in zip(*curves):
            kl = [e["kl"] for e in evaluations if "kl" in e]
            cell = spread([e["test"] for e in evaluations])
            line.append(f"{cell}, KL {np.mean(kl):.3g}" if kl else cell)
        if baseline:
            line.append(difference(curves, all_curves[baseline], "final"))
        lines.append(line)
    head = ["iteration", *(str(e["iteration"]) for e in curves[0])]
    return markdown(head + [f"final, minus `{baseline}`"] * bool(baseline), lines)


def difference(ours, theirs, reading):
    return report.interval_text(np.subtract(read(ours, reading), read(theirs, reading)), "+")


def ratings_table(section):
    lines = []
    for mode, found in section["rho"].items():
        lines.append([mode, *(spread([x[name] for x in found]) for name in found[0])])
    return markdown(["Spearman's rho with the test score", *found[0]], lines)


TABLES = {  # name: section of the results, function
    "scores": ("compare", scores_table),
    "gains": ("compare", gains_table),
    "cells": ("compare", square_table),
    "vary": ("vary", scores_table),
    "ablations": ("ablations", scores_table),
    "ratings": ("ratings", ratings_table),
    "models": ("models", course_table),
    "order": ("order", scores_table),
    "shop": ("shop", scores_table),
    "shop_course": ("shop", course_table),
    "shop_cells": ("shop", square_table),
    "shift": ("shift", partial(course_table, baseline=SHIFT[0])),
    "plasticity": ("plasticity", partial(course_table, baseline=[*PLASTICITY][0])),
    "kl": ("kl", partial(course_table, baseline="rl")),
}


def write_pages(results):
    """Tables of README.md and docs/*.md, and the pictures in docs."""

    def block(match):
        if match[1] not in TABLES:
            return match[0]
        section, make = TABLES[match[1]]
        return f"<!-- {match[1]} -->\n{make(results[section])}\n<!-- end -->"

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        new = re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)
        page.write_text(new, encoding="utf-8")
    for section, picture in PICTURES.items():
        if section in results:
            draw(results[section]["curves"], ROOT / "docs" / picture)


def draw(curves, path):
    """Learning curves of the modes: the mean over seeds, and a band of one deviation."""
    figure = report.new_figure(420)
    axis, ends = figure.subplots(), []
    for mode, color in report.COLORS.items():
        if mode not in curves:
            continue
        scores = np.array([[e["test"] for e in curve] for curve in curves[mode]])
        at = [e["iteration"] for e in curves[mode][0]]
        mean, sd = scores.mean(0), scores.std(0, ddof=min(1, len(scores) - 1))
        axis.plot(at, mean, color=color, linewidth=2.5 if mode == "espl" else 1.5)
        axis.fill_between(at, mean - sd, mean + sd, color=color, alpha=0.12, linewidth=0)
        ends.append((mean[-1], f" {DRAWN[mode]}, {mean[-1]:.0%}", color))
    place, height = -1.0, 0.055  # of a label
    for y, text, color in sorted(ends):
        place = max(y, place + height)  # labels do not touch
        axis.annotate(text, (at[-1], place), color=color, va="center", annotation_clip=False)
    axis.set(xlabel="iteration", ylabel="test problems solved", xlim=(0, at[-1]), ylim=(0, 1))
    figure.savefig(path)


def laboratory(command, settings, seeds, first, flags, jobs, out, results):
    """Makes the runs of a command, adds its section to the results and prints its tables."""
    out = out.resolve()
    saved = results or out / "results.json"
    if command == "readme":
        with espl.explained(f"cannot make the pages from {saved}; give --results"):
            write_pages(report.read_json(saved, {}))
        return
    out.mkdir(parents=True, exist_ok=True)
    numbers = list(range(first, first + seeds))
    section = {"seeds": numbers, "settings": settings, "flags": flags, "curves": {}}
    if command == "models" and (not settings or len({*map(name_of, settings)}) < len(settings)):
        raise espl.UserError("models: name one or more directories, no two of the same name")
    rows, directories = rows_of(command, settings), {}
    with espl.explained("--flags"):
        shared = shlex.split(flags)
    for name, row in rows.items():
        row[:0] = shared  # what makes a row comes last, so it counts
        c = espl.parse_args(row)  # so that bad input is found before the first run
        if ", then " in name and not c.iterations:
            raise espl.UserError("rows that switch modes need --iterations")
    with ThreadPool(jobs) as pool:
        for name, row in espl.progress(rows.items(), desc=command):
            make = partial(finished_run, name, row, out)
            directories[name] = pool.map(make, numbers)
            section["curves"][name] = [curve_of(d) for d in directories[name]]
    if command == "ratings":
        section["rho"] = {n: [rank_correlations(d) for d in ds] for n, ds in directories.items()}
    if command == "compare":
        draw(section["curves"], out / "compare.png")
    sections = report.read_json(saved, {}) | {command: section}  # others may have written it
    saved.write_text(json.dumps(sections, separators=(",", ":")))
    print(f"added to {saved}")
    for wanted, make in TABLES.values():
        if wanted == command:
            print(f"\n{make(section)}")


def main(argv=None):
    parser = report.new_parser(__doc__)
    commands = (*dict.fromkeys(section for section, _ in TABLES.values()), "readme")
    parser.add_argument("command", choices=commands)
    parser.add_argument(
        "settings", nargs="*", help="of vary: FLAG=VALUE,VALUE; models: directories"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--flags", default="", help='of espl.py for all runs: "--iterations 30"')
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--results", type=Path, help="a JSON file (default: results.json in --out)")
    return report.run_tool(parser, laboratory, argv)


if __name__ == "__main__":
    sys.exit(main())
