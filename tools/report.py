"""Pictures and words about a run, finished or not: the tree of its prompts, its curves, whence its best prompt came.

    python tools/report.py runs/glyphs-espl-20260214-120000

Writes into the run directory tree.png and tree.svg (every prompt below its parents, with its rating mu) and curves.png
(rewards, ratings, response length, entropy), and prints the lineage of the tested prompt, the one that evaluations
report. It reads config.json, population.json and metrics.jsonl; no model is loaded and no run disturbed. While espl.py
runs it has the pictures drawn after every evaluation.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import espl  # noqa: E402

COLORS = ("deepskyblue", "orange", "mediumorchid", "seagreen", "tomato", "slategray")  # of espl.OPERATORS, in order


def read_run(directory: Path) -> tuple[list[espl.SystemPrompt], list[dict], espl.SystemPrompt]:
    """Population, lines of metrics.jsonl, and the tested prompt. Raises UserError if this is not a run's directory."""
    with espl.explained(f"cannot read the run {directory}", "give the directory of a run that has done an iteration"):
        population = json.loads((directory / "population.json").read_text(encoding="utf-8"))
        population = [espl.SystemPrompt(**s) for s in population]
        *lines, _ = (directory / "metrics.jsonl").read_text(encoding="utf-8").split("\n")  # the last: incomplete
        metrics = [json.loads(line) for line in lines]
        given = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        own = {f.name for f in dataclasses.fields(espl.Config)}  # a task file's flags are no business of ours
        config = espl.Config(**{k: v for k, v in given.items() if k in own})
        if not population or not metrics:
            raise ValueError("its logs are empty")
        return population, metrics, espl.tested_prompt(SimpleNamespace(config=config, population=population))


def lineage(population: list[espl.SystemPrompt], s: espl.SystemPrompt, most: int = 6) -> str:
    """How a prompt came about, in words, from itself back to the root; after `most` generations only their number."""
    words, count = [], 0
    while s.parents:
        count += 1
        parents = " and ".join(map(str, s.parents))
        words += [f"{s.id} by {s.operation} of {parents} (iteration {s.iteration})"] if count <= most else []
        s = population[s.parents[0]]  # of a crossover the best parent, set A
    more = [f"… {count - most} generations more …"] if count > most else []
    return " <- ".join([*words, *more, f"{s.id}, the root"])


def places(population: list[espl.SystemPrompt]) -> tuple[dict[int, float], dict[int, int], int]:
    """Of each prompt the column and the generation in the tree; and how many columns there are."""
    children, depth, order, stack = {s.id: [] for s in population}, {}, [], [0]
    for s in population:  # parents come first
        depth[s.id] = 1 + max((depth[i] for i in s.parents), default=-1)
        if s.parents:
            children[s.parents[0]].append(s.id)
    while stack:  # depth first
        order.append(stack.pop())
        stack += children[order[-1]][::-1]
    leaves = [i for i in order if not children[i]]
    x = dict(zip(leaves, range(len(leaves))))  # side by side; every other prompt above the middle of its children
    for i in reversed(order):
        x[i] = np.mean([x[child] for child in children[i]]) if children[i] else x[i]
    return x, depth, len(leaves)


def draw_tree(population: list[espl.SystemPrompt], tested: int, directory: Path) -> None:
    """tree.png, tree.svg: every prompt below its parents, with its mu; beside it its last test score, if it has one."""
    import matplotlib
    from matplotlib.figure import Figure
    x, depth, width = places(population)
    height = 1 + max(depth.values())
    figure = Figure(figsize=(max(5, 1.5 + 0.62 * width), 1.2 + 0.55 * height), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
    axis.axis("off")
    shades = matplotlib.colors.ListedColormap(matplotlib.colormaps["Greens"](np.linspace(0, 0.6, 256)))
    mus = [s.mu for s in population]
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(mus), max(mus)), shades)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(espl.OPERATORS)}
    for s in population:
        look = dict(color=colors.get(s.operation, "gray"))
        look |= dict(connectionstyle="arc3,rad=0.15") if len(s.parents) > 1 else {}  # bent: they cross others' lines
        for i in s.parents:
            axis.annotate("", (x[s.id], depth[s.id] - 0.26), (x[i], depth[i] + 0.28), zorder=1,
                          arrowprops=dict(arrowstyle="-|>", linewidth=1.3, shrinkA=0, shrinkB=0, **look))
        axis.text(x[s.id], depth[s.id], f"{s.id}\n{s.mu:.3g}", ha="center", va="center", fontsize=7, zorder=2,
                  bbox=dict(boxstyle="round", facecolor=scale.to_rgba(s.mu), linewidth=2.5 if s.id == tested else 0.6))
        for e in [e for e in s.scores if e["split"] == "test"][-1:]:
            axis.text(x[s.id] + 0.33, depth[s.id], f"{e['score']:.2f}", va="center", fontsize=7, color="firebrick")
    for name, color in colors.items():
        axis.plot([], [], color=color, label=name)
    axis.plot([], [], "ks", markerfacecolor="none", markeredgewidth=2.5, label="tested prompt")
    axis.plot([], [], color="firebrick", marker="$0.5$", markersize=14, linestyle="", label="test score")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.colorbar(scale, ax=axis, label="rating mu", shrink=min(1, 4 / height), aspect=15)
    figure.suptitle(directory.resolve().name)
    figure.savefig(directory / "tree.png", dpi=min(110, 10_000 / max(figure.get_size_inches())))
    figure.savefig(directory / "tree.svg")


def draw_curves(population: list[espl.SystemPrompt], metrics: list[dict], directory: Path) -> None:
    """curves.png: rewards and scores, rating mu of each prompt, response length, entropy."""
    from matplotlib.figure import Figure
    points = lambda rows, name: [(r["iteration"], r[name]) for r in rows if name in r]
    scores = {name: points(metrics, name) for name in ("val", "test", "test_greedy")}
    panels = {"reward": {"training batch": points(metrics, "reward_mean")} | {k: v for k, v in scores.items() if v},
              "rating mu": {f"prompt {s.id}": points(s.history, "mu") for s in population},
              "response length (tokens)": {"mean": points(metrics, "response_tokens")},
              "entropy (nats a token)": {"mean": points(metrics, "entropy")}}
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(2, 2).ravel(), panels.items()):
        for label, curve in curves.items():
            axis.plot(*zip(*curve or [(math.nan, math.nan)]), marker=".", label=label)
        if 1 < len(curves) <= 10:
            axis.legend(fontsize=8)
        axis.set(title=title, xlabel="iteration", xlim=(-0.5, metrics[-1]["iteration"] + 0.5))
        axis.grid(alpha=0.3)
        if title == "reward":
            axis.set_ylim(min(-0.02, axis.get_ylim()[0]), 1.02)  # a reward may be negative
    figure.suptitle(directory.resolve().name)
    figure.savefig(directory / "curves.png", dpi=110)


def draw(directory: Path) -> tuple[list[espl.SystemPrompt], espl.SystemPrompt]:
    """All pictures of a run; espl.py calls it after every evaluation. Returns the population and the tested prompt."""
    population, metrics, tested = read_run(directory)
    with espl.explained(f"cannot draw into {directory}"):
        draw_tree(population, tested.id, directory)
        draw_curves(population, metrics, directory)
    return population, tested


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    def stop(message):
        raise espl.UserError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run's directory")
    parser.error = stop  # instead of the usage on many lines
    try:
        directory = parser.parse_args(argv).run_dir
        population, s = draw(directory)
    except espl.UserError as e:
        print(f"report: error: {e}", file=sys.stderr)
        return 2
    print(f"tested prompt {s.id}: mu {s.mu:.1f}, sigma {s.sigma:.1f}\n{lineage(population, s)}\n"
          f"drawn in {directory}: tree.png, tree.svg, curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
