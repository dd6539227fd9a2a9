"""Pictures and words about runs, finished or not: one page to read them on, the tree of prompts, curves, lineage.

    python tools/report.py runs/glyphs-espl-20260214-120000
    python tools/report.py runs/A runs/B --out compared.html    # B's curves over A's, and its flags beside A's

Writes into the (first) run's directory report.html, which needs nothing else, tree.png and tree.svg (every prompt below
its parents, with its rating mu) and curves.png, and prints the lineage of the tested prompt, the one that evaluations
report. It reads config.json, population.json and the logs, and shows what there is of them: no model is loaded and no
run disturbed. While espl.py runs it has the pictures drawn after every evaluation.

The page's curves and tree are SVG by matplotlib, about 20 kB a picture: a browser can select their text, follow their
links and exchange their colours on a dark screen. plotly would also zoom, for 4.5 MB of JavaScript in every page, a
second until it is drawn, and boxes that no keyboard reaches. What models say, and names of data, are hostile: they get
into the page through `join`, which escapes them, and the page's policy lets no script run but that of report.html.
"""

import argparse
import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import html
import io
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import espl  # noqa: E402

evaluate = espl.from_tools("evaluate")
COLORS = ("deepskyblue", "orange", "mediumorchid", "seagreen", "tomato", "slategray")  # of operators; of runs
OPERATOR_COLORS = {name: COLORS[i % len(COLORS)] for i, name in enumerate(espl.OPERATORS)}


def read_run(directory: Path) -> tuple[list[espl.SystemPrompt], list[dict], espl.SystemPrompt]:
    """Population, lines of metrics.jsonl, and the tested prompt. Raises UserError if this is not a run's directory."""
    run = read_record(directory)
    if run.notes:
        raise espl.UserError(f"cannot read the run {directory}: {'; '.join(run.notes)}")
    return run.population, run.metrics, run.tested


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


def tree_figure(population: list[espl.SystemPrompt], tested: int):
    """Every prompt below its parents, with its mu, beside it its last test score, if it has one; and the mus' scale."""
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
    for s in population:
        look = dict(color=OPERATOR_COLORS.get(s.operation, "gray"))
        look |= dict(connectionstyle="arc3,rad=0.15") if len(s.parents) > 1 else {}  # bent: they cross others' lines
        for i in s.parents:
            axis.annotate("", (x[s.id], depth[s.id] - 0.26), (x[i], depth[i] + 0.28), zorder=1,
                          arrowprops=dict(arrowstyle="-|>", linewidth=1.3, shrinkA=0, shrinkB=0, **look))
        axis.text(x[s.id], depth[s.id], f"{s.id}\n{s.mu:.3g}", ha="center", va="center", fontsize=7, zorder=2,
                  color="#111111", gid=f"node-{s.id}",
                  bbox=dict(boxstyle="round", facecolor=scale.to_rgba(s.mu), linewidth=2.5 if s.id == tested else 0.6))
        for e in [e for e in s.scores if e["split"] == "test"][-1:]:
            axis.text(x[s.id] + 0.33, depth[s.id], f"{e['score']:.2f}", va="center", fontsize=7, color="firebrick")
    return figure, scale


def draw_tree(population: list[espl.SystemPrompt], tested: int, directory: Path) -> None:
    """tree.png, tree.svg: the tree with its legend."""
    figure, scale = tree_figure(population, tested)
    [axis] = figure.axes
    for name, color in OPERATOR_COLORS.items():
        axis.plot([], [], color=color, label=name)
    axis.plot([], [], "ks", markerfacecolor="none", markeredgewidth=2.5, label="tested prompt")
    axis.plot([], [], color="firebrick", marker="$0.5$", markersize=14, linestyle="", label="test score")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.colorbar(scale, ax=axis, label="rating mu", shrink=min(1, 2.2 / (figure.get_figheight() - 1.2)), aspect=15)
    figure.suptitle(directory.resolve().name, parse_math=False)
    figure.savefig(directory / "tree.png", dpi=min(110, 10_000 / max(figure.get_size_inches())))
    figure.savefig(directory / "tree.svg")


def points(rows: list[dict], name: str) -> list[tuple[int, float]]:
    """(iteration, value) where there is one."""
    return [(r["iteration"], r[name]) for r in rows if isinstance(r.get(name), (int, float))]


def draw_curves(population: list[espl.SystemPrompt], metrics: list[dict], directory: Path) -> None:
    """curves.png: rewards and scores, rating mu of each prompt, response length, entropy."""
    from matplotlib.figure import Figure
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
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if title == "reward":
            axis.set_ylim(min(-0.02, axis.get_ylim()[0]), 1.02)  # a reward may be negative
    figure.suptitle(directory.resolve().name, parse_math=False)
    figure.savefig(directory / "curves.png", dpi=110)


def draw(directory: Path) -> tuple[list[espl.SystemPrompt], espl.SystemPrompt]:
    """All pictures of a run; espl.py calls it after every evaluation. Returns the population and the tested prompt."""
    population, metrics, tested = read_run(directory)
    with espl.explained(f"cannot draw into {directory}"):
        draw_tree(population, tested.id, directory)
        draw_curves(population, metrics, directory)
    return population, tested


# ---- report.html: what is read for it

@dataclasses.dataclass
class Record:
    """What there is of a run; what is missing is empty, and `notes` say so."""
    directory: Path
    config: dict
    metrics: list[dict]
    population: list[espl.SystemPrompt]
    tested: espl.SystemPrompt | None
    notes: list[str]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @functools.cached_property
    def lineage(self) -> list[espl.SystemPrompt]:  # of the tested prompt, the root first
        found = [self.tested] if self.tested else []
        while found and found[0].parents:
            found.insert(0, self.population[found[0].parents[0]])
        return found


def read_record(directory: Path) -> Record:
    """A run, whatever state it is in. Raises UserError if the directory holds nothing of one."""
    notes, config, population = [], {}, []
    for name in ("config.json", "population.json"):
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8"))
            if name == "population.json":
                population = [espl.SystemPrompt(**s) for s in found]
                if not all(s.id == i and all(0 <= p < i for p in s.parents) for i, s in enumerate(population)):
                    population = []
                    raise ValueError("parents come before children")
            elif {"task", "mode"} <= found.keys():
                config = found
            else:
                raise ValueError("a model's, not a run's")
        except Exception as e:
            notes.append(f"there is no {name}" if isinstance(e, OSError) else f"{name}: {espl.first_line(e)}")
    metrics = list(lines_of(directory / "metrics.jsonl"))
    notes += ["there are no prompts"] * (not population) + ["no iteration is logged"] * (not metrics)
    if not config and not metrics and not population:
        raise espl.UserError(f"cannot read the run {directory} ({notes[0]}); give the directory of a run of espl.py")
    own = {f.name for f in dataclasses.fields(espl.Config)}  # a task file's flags are no business of ours
    with espl.explained(f"cannot read the run {directory}"):
        c = espl.Config(**{k: v for k, v in config.items() if k in own})
        tested = espl.tested_prompt(SimpleNamespace(config=c, population=population)) if population else None
    return Record(directory, config, metrics, population, tested, notes)


def lines_of(path: Path) -> Iterator[dict]:
    """The records of a JSONL file, one by one: it may be larger than memory. What is no record is left out, as the last
    line may be incomplete."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(record := json.loads(line), dict) and isinstance(record.get("iteration"), int):
                    yield record


def spread(items: list, most: int) -> list:
    """At most so many of the items, evenly spaced, with the first and the last."""
    return [items[i] for i in {*np.linspace(0, len(items) - 1, most).round().astype(int)}] if items else []


def survey_rollouts(run: Record) -> tuple[dict, list[dict]]:
    """Of training rollouts {(problem, prompt): [sum of rewards, number]}; and samples: of some iterations the first
    response of training, and of the test, with each outcome."""
    picked = {0, 1, *spread([m["iteration"] for m in run.metrics], 7)}
    values, samples = defaultdict(lambda: [0.0, 0]), {}
    for r in lines_of(run.directory / "rollouts.jsonl"):
        if r["split"] == "train":
            cell = values[r["problem"], r["prompt"]]
            cell[:] = cell[0] + r["reward"], cell[1] + 1
        if r["iteration"] in picked and r["split"] in ("train", "test"):
            samples.setdefault((r["iteration"], r["split"] == "test", r["outcome"]), r)
    return values, [samples[key] for key in sorted(samples)]


def survey_reflections(run: Record) -> dict[int, list[dict]]:
    """What critique, aggregate and crossover replied, and tracebacks, by iteration: those that made the lineage, the
    latest, and some between."""
    bred = [m["iteration"] for m in run.metrics if "no_child" in m]
    picked = {*[s.iteration for s in run.lineage[1:]][-10:], *bred[-4:], *spread(bred, 10)}
    found = defaultdict(list)
    for r in lines_of(run.directory / "reflections.jsonl"):
        if r["iteration"] in picked and r.get("request") != "summarize":
            found[r["iteration"]].append({k: r.get(k) for k in ("request", "reply", "traceback")})
    return dict(sorted(found.items()))


# ---- report.html: how it is made. The page's frame, its looks and its script are report.html beside this file.

class Html(str):
    """Markup of ours. All other text is escaped on its way into the page, by `join`."""


def clean(text) -> str:
    """Text without what could hide or turn round other text: control characters and marks of direction."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]",
                  "\ufffd", str(text).replace("\r\n", "\n"))


def join(parts) -> Html:
    """Several pieces in a row; None is left out."""
    return Html("".join(x if isinstance(x, Html) else html.escape(clean(x)) for x in parts if x is not None))


def tag(name: str, *inside, **attributes) -> Html:
    """<name attributes>inside</name>. cls is class, data_x is data-x; an attribute that is None is left out."""
    given = [f' {k.replace("cls", "class").replace("_", "-")}="{html.escape(clean(v))}"'
             for k, v in attributes.items() if v is not None]
    return Html(f"<{name}{''.join(given)}>{join(inside)}</{name}>")


def table(heads, rows, label: str, cls: str | None = None, ids=()) -> Html:
    """A table that scrolls in a box of its own. A cell may be a td or th ready made; `ids` are those of the rows."""
    number = lambda x: "n" if not isinstance(x, Html) and re.fullmatch(r"[-+.,\d]+( [%\d]+)*", str(x)) else None
    cell = lambda x: x if isinstance(x, Html) and x.startswith(("<td", "<th")) else tag("td", x, cls=number(x))
    rows, ids = [[*row] for row in rows], [*ids] or [None] * len(rows)
    body = [tag("tr", *map(cell, row), id=key) for row, key in zip(rows, ids)]
    above = zip(heads, rows[0] if rows else heads)
    head = tag("thead", tag("tr", *(tag("th", x, scope="col", cls=number(below)) for x, below in above)))
    return tag("div", tag("table", head, tag("tbody", *body), cls=cls), cls="scroll", tabindex=0, role="region",
               aria_label=label)


def fold(summary, *inside, start: bool = False) -> Html:
    """A part that opens when its heading is clicked, or Enter pressed there."""
    return tag("details", tag("summary", summary), *inside, open="" if start else None)


def short(text, most: int = 6000) -> str:
    """A long text without its middle."""
    cut = len(text := str(text)) - most
    return text if cut <= 0 else f"{text[:most // 2]}\n[… {cut:,} characters left out …]\n{text[-most // 2:]}"


def svg(figure, label: str, notes: dict[str, str] | None = None) -> Html:
    """A matplotlib figure as part of the page, in the page's colours. notes: {id in the picture: hover text}; what has
    one becomes a link to the prompt's row in the table."""
    import matplotlib
    space, notes, out = "{http://www.w3.org/2000/svg}", notes or {}, io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(out, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue().replace("#000000", "currentColor")
    for i, name in enumerate((*COLORS, "firebrick")):
        text = text.replace(matplotlib.colors.to_hex(name), f"var(--c{i})")
    for e in (root := ElementTree.fromstring(text)).iter():
        if (key := e.get("id")) in notes:
            e.tag = space + "a"
            e.set("href", key.replace("node", "#prompt"))
            e.insert(0, hover := ElementTree.Element(space + "title"))
            hover.text = clean(notes[key])
        elif key and re.fullmatch(r"[A-Za-z0-9.]+_\d+", key):
            del e.attrib["id"]  # of no use, and the same in every picture
    root.set("role", "group" if notes else "img")
    root.set("aria-label", clean(label))
    ElementTree.register_namespace("", space[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return Html(ElementTree.tostring(root, encoding="unicode"))


@functools.lru_cache(None)
def likeness(a: str, b: str) -> tuple[float, difflib.SequenceMatcher]:
    """How alike two principles are, word by word: 0 to 1."""
    matcher = difflib.SequenceMatcher(None, *(re.findall(r"\S+\s*", text + " ") for text in (a, b)), autojunk=False)
    return matcher.ratio(), matcher


def changes(old: list[str], new: list[str]) -> Html:
    """A child's principles against its parent's: what was reworded, word by word, what was added, what is gone."""
    gone, items = [text for text in old if text not in new], []
    kept = len(old) - len(gone)
    for text in (text for text in new if text not in old):
        near = max(gone, key=lambda x: likeness(x, text)[0], default=None)
        if near is None or likeness(near, text)[0] < 0.4:
            items.append(tag("li", "+ ", tag("ins", text)))
            continue
        gone.remove(near)
        _, m = likeness(near, text)
        parts = []
        for kind, i, j, k, n in m.get_opcodes():
            before, after = "".join(m.a[i:j]), "".join(m.b[k:n])
            parts += [after] if kind == "equal" else [tag("del", before), " "] * (j > i) + [tag("ins", after)] * (n > k)
        items.append(tag("li", "~ ", *parts))
    items += [tag("li", "− ", tag("del", text)) for text in gone]
    return tag("ul", *items, tag("li", f"{kept} unchanged", cls="soft"), cls="diff")


def principles(s: espl.SystemPrompt) -> Html:
    """The principles of a prompt, by the ids that reflections call them."""
    items = [tag("li", tag("b", f"G{i} "), text) for i, text in enumerate(s.principles)]
    return tag("ul", *items or [tag("li", "No principles: the task's system prompt alone.")], cls="principles")


def described(s: espl.SystemPrompt) -> str:
    """A prompt in a few words."""
    parents = " of " + " and ".join(map(str, s.parents)) if s.parents else ""
    return f"prompt {s.id}: {s.operation}{parents}, iteration {s.iteration}"


# ---- report.html: its parts

CURVES = {"Reward of the training batch": ["reward_mean"], "Test score": ["test", "test_greedy"],
          "Validation score": ["val"], "Response length, tokens": ["response_tokens"],
          "Share of responses cut at the limit": ["truncated"], "Entropy, nats a token": ["entropy"],
          "Share of groups whose rewards differ": ["contrast_groups"], "Gradient norm": ["grad_norm"]}
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # of runs, besides their colours
STOPS = {"eos": "ended by itself", "length": "cut at the limit", "calls": "ended by a tool call too many"}


def headline(runs: list[Record]) -> Html:
    """The numbers to read first: of the first run, and of several a table."""
    rows = []
    for r in runs:
        tests = [m for m in r.metrics if "test" in m]
        scores = {k: f"{e['test']:.3f}" for k, e in (evaluate.summary(tests) if tests else {}).items()}
        done, planned = max([m["iteration"] for m in r.metrics], default=0), r.config.get("iterations")
        took = sum(sum(m.get("seconds", {}).values()) for m in r.metrics)
        rows.append({
            "Run": r.name, "Task": r.config.get("task") or r.config.get("train_file") or "?",
            "Mode": r.config.get("mode", "?"), "Model": r.config.get("model", "?"), "Seed": r.config.get("seed", "?"),
            "Iterations": f"{done} of {planned}" if planned else done,
            "Test before → after": f"{scores.get('base model', '–')} → {scores.get('final', '–')}",
            "Mean of last 5": scores.get("mean of last 5", "–"),
            "Picked by validation": scores.get("picked by validation", "–"),
            "Best prompt": f"{r.tested.id}, mu {r.tested.mu:.1f} ± {r.tested.sigma:.1f}" if r.tested else "–",
            "Prompts": len(r.population), "Time": f"{took / 60:.1f} min" if took < 5400 else f"{took / 3600:.1f} h"})
    tiles = [tag("div", tag("dt", k), tag("dd", v)) for k, v in rows[0].items() if k != "Run"]
    return join([tag("dl", *tiles, cls="tiles"), *[
        table(rows[0], [row.values() for row in rows], "the runs", "runs"),
        tag("p", f"Below, all but curves and configuration is of {runs[0].name}.")] * (len(runs) > 1),
        *[tag("p", f"{r.name}: {note}", cls="note") for r in runs for note in r.notes]])


def curve(axis, xy: list[tuple[int, float]], color: str, mark: str, line: str) -> None:
    """A curve; one of many points is faint, with its running mean over 15. mark: of its run, if there are several."""
    x, y = np.array(xy).T
    if len(x) > 60:
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
        y = np.convolve(np.pad(y, 7, mode="edge"), np.full(15, 1 / 15), "valid")
    axis.plot(x, y, line, color=color, linewidth=1.6, marker=mark or "o" * (len(x) <= 30), markersize=4,
              markevery=-(-len(x) // 15) if mark else 1)


def curves(runs: list[Record]) -> Iterator[Html]:
    """A picture for each metric with all runs in it, the ratings of the first run's prompts, and its evaluations."""
    from matplotlib.figure import Figure
    run, pictures, own = runs[0], {}, {s.id for s in runs[0].lineage}
    looks = list(zip(COLORS * len(runs), [*MARKS] * len(runs))) if len(runs) > 1 else [(COLORS[0], "")]
    for title, names in CURVES.items():
        found = [(xy, *look, line) for r, look in zip(runs, looks) for name, line in zip(names, ("-", ":"))
                 if (xy := points(r.metrics, name))]
        pictures[title + " (dotted: greedy)" * any(line == ":" for *_, line in found)] = [(curve, x) for x in found]
    pictures["Rating mu of each prompt (coloured: the lineage of the best)"] = [
        (lambda axis, s: axis.plot(*zip(*points(s.history, "mu")), "." if len(s.history) == 1 else "-", color=COLORS[
            0] if s.id in own else "gray", alpha=1 if s.id in own else 0.4, zorder=2 + (s.id in own)), [s])
        for s in run.population if s.history and len(run.population) > 1]
    if len(runs) > 1:
        yield tag("ul", cls="legend", *(
            tag("li", tag("b", MARKS[mark], style=f"color: var(--c{COLORS.index(color)})"), f" {r.name}")
            for r, (color, mark) in zip(runs, looks)))
    drawn = []
    for title, parts in pictures.items():
        axis = (figure := Figure(figsize=(4.6, 2.6), layout="constrained")).subplots()
        for draw_part, arguments in parts:
            draw_part(axis, *arguments)
        axis.set(xlabel="iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        drawn += [tag("figure", tag("figcaption", title), svg(figure, title))] if parts else []
    yield tag("div", *drawn, cls="grid") if drawn else tag("p", "No iteration is logged yet.")
    tested = [m for m in run.metrics if {"val", "test"} & m.keys()]
    names = [n for n in dict.fromkeys(k for m in tested for k in m) if n.startswith(("val", "test"))]
    rows = [[m["iteration"], m.get("prompt", "–"), *(f"{m[n]:.3f}" if n in m else "–" for n in names)] for m in tested]
    if rows:
        yield fold("The evaluations in numbers", table(["iteration", "prompt", *names], rows, "evaluations"))


def tree(run: Record) -> Iterator[Html]:
    """The tree as a picture whose boxes tell of their prompts."""
    if len(run.population) < 2:
        yield tag("p", "No prompt was bred, or not yet.")
        return
    notes = {f"node-{s.id}": "\n".join([
        described(s), f"mu {s.mu:.1f}, sigma {s.sigma:.1f}, {len(s.history)} tournaments",
        *(f"{e['split']} {e['score']:.3f} (iteration {e['iteration']})" for e in s.scores[-2:]),
        *(f"G{i} {short(text, 160)}" for i, text in enumerate(s.principles[:12]))]) for s in run.population}
    yield tag("p", "A box is a prompt with its rating mu, the greener the higher, below its parents; beside it its "
              "last test score; a thick frame marks the best. Hover to read a prompt, click to find it in the table.")
    yield tag("ul", *(tag("li", tag("b", "—▸", style=f"color: var(--c{COLORS.index(color)})"), f" {name}")
                      for name, color in OPERATOR_COLORS.items()), cls="legend")
    figure, _ = tree_figure(run.population, run.tested.id)
    yield tag("div", svg(figure, "evolutionary tree", notes), cls="scroll tree", tabindex=0, role="region",
              aria_label="evolutionary tree", data_show=f"node-{run.tested.id}")


def descent(run: Record) -> Iterator[Html]:
    """The lineage of the tested prompt, step by step."""
    steps = []
    for parent, s in zip(run.lineage, run.lineage[1:]):
        more = f", with {' and '.join(map(str, s.parents[1:]))}" if s.parents[1:] else ""
        heading = f"{parent.id} → {s.id}: {s.operation}{more}, iteration {s.iteration}; mu at last {s.mu:.1f}"
        steps.append(tag("div", tag("h3", heading), changes(parent.principles, s.principles), cls="card"))
    if len(steps) > 8:
        yield fold(f"The first {len(steps) - 8} of {len(steps)} steps", *steps[:-8])
    yield from steps[-8:] or [tag("p", "The best prompt is the root." if run.tested else "There is no prompt yet.")]


def prompts(run: Record) -> Iterator[Html]:
    """The table of prompts."""
    rows, own = [], {s.id for s in run.lineage}
    for s in run.population:
        score = {e["split"]: f"{e['score']:.3f}" for e in s.scores}
        rows.append([
            s.id, "★ best" if s is run.tested else "lineage" if s.id in own else "", s.operation,
            " ".join(map(str, s.parents)), s.iteration, f"{s.mu:.1f}", f"{s.sigma:.1f}", len(s.history),
            f"{s.history[-1]['value']:.3f}" if s.history else "", score.get("val", ""), score.get("test", ""),
            fold(f"{len(s.principles)} principles", principles(s))])
    heads = "id", "", "made by", "parents", "iteration", "mu", "sigma", "tournaments", "last V", "val", "test"
    yield tag("p", "A click on the head of a column sorts by it.")
    yield table([*(x and tag("button", x, type="button") for x in heads), "principles"], rows, "prompts", "sortable",
                [f"prompt-{s.id}" for s in run.population])


def heat_map(values: dict) -> Iterator[Html]:
    """Problems by prompts; empty cells in a row are one."""
    cells, columns = defaultdict(dict), sorted({prompt for _, prompt in values})
    for (problem, prompt), (total, n) in values.items():
        cells[problem][prompt] = total / n, n
    low = min([0, *(v for row in cells.values() for v, _ in row.values())])
    brief = lambda v: f"{v:.2f}".rstrip("0").rstrip(".").replace("0.", ".")
    colored = lambda v, **more: tag("td", brief(v), cls=f"v{round(10 * (v - low) / (1 - low))}", **more)
    empty = lambda n: [tag("td", colspan=n)] if n else []
    rows = []
    for problem, row in cells.items():
        mean = sum(v * n for v, n in row.values()) / sum(n for _, n in row.values())
        line, last = [tag("th", problem, scope="row"), colored(mean)], -1
        for i, prompt in enumerate(columns):
            if prompt in row:
                v, n = row[prompt]
                line += [*empty(i - last - 1), colored(v, title=f"{problem}, prompt {prompt}: {v:.2f} of {n}")]
                last = i
        rows.append((mean, line + empty(len(columns) - last - 1)))
    yield tag("p", f"V, the mean reward of training rollouts, from {low:.2g} (pale) to 1 (strong). Problems: "
              f"{len(rows)}, the hardest first; prompts: {len(columns)}. Empty: never tried.")
    yield table(["problem", "all", *columns], [line for _, line in sorted(rows, key=lambda x: x[0])],
                "problems by prompts", "heat")


def rollouts(samples: list[dict]) -> Iterator[Html]:
    """Sample responses."""
    yield tag("p", "Of some iterations the first response with each outcome." if samples else "None is logged yet.")
    for r in samples:
        sign = "✓" if r["reward"] == 1 else "✗" if r["reward"] <= 0 else "◐"
        stop = f"{STOPS.get(r['stop'], r['stop'])} after {r['tokens']} tokens"
        yield fold(f"{sign} {r['outcome']}, reward {r['reward']:.2g}: iteration {r['iteration']}, {r['split']}, prompt "
                   f"{r['prompt']}, problem {r['problem']}; {stop}", tag("pre", short(r["response"])),
                   start=r is samples[0])


def reflections(run: Record, found: dict[int, list[dict]]) -> Iterator[Html]:
    """Replies of the reflection model on the left, what became of them on the right."""
    parse, task = espl.parse_operations, str(run.config.get("task"))
    if re.fullmatch(r"\w+", task):  # one of tasks/; what else a config.json may name is not run
        with contextlib.suppress(espl.UserError):
            parse = espl.task_file(task).get("parse", parse)
    lines = {m["iteration"]: m for m in run.metrics}
    why = Counter(re.split(r" \(|;", x)[0] for m in run.metrics for x in m.get("no_child", {}).values())
    yield tag("p", f"{len(run.population[1:])} children were made. Attempts that made none: ", "; ".join(
        f"{n} × {x}" for x, n in why.most_common(6)) or "none", ". Shown are iterations of the best prompt's lineage, "
        "the latest, and some between.")
    for iteration, replies in found.items():
        m = lines.get(iteration, {})
        bred = {name: run.population[c["id"]] for name, c in m.get("children", {}).items()
                if c["id"] < len(run.population)}
        right = [join([tag("h3", described(s)), changes(run.population[s.parents[0]].principles, s.principles)])
                 for s in bred.values()]
        right += [tag("p", f"No child by {name}: {reason}") for name, reason in m.get("no_child", {}).items()]
        if m.get("dropped"):
            right.append(tag("p", "dropped: ", ", ".join(f"{n} {x}" for x, n in m["dropped"].items()), cls="soft"))
        yield fold(f"Iteration {iteration}: {', '.join(f'prompt {s.id}' for s in bred.values()) or 'no child'}", tag(
            "div", tag("div", *(reflection(r, parse, bred) for r in replies)), tag("div", *right), cls="pair"),
            start=iteration == min(found))


def reflection(r: dict, parse, bred: dict[str, espl.SystemPrompt]) -> Html:
    """A reply's operations with what became of each, and its text to unfold."""
    if r["traceback"]:
        return fold("An operator failed", tag("pre", r["traceback"]))
    operations, child = None, bred.get("crossover" if r["request"] == "crossover" else "mutation")
    with contextlib.suppress(Exception):  # a run survives its task's parser, so do we
        operations = parse(espl.final_text(str(r["reply"])).strip())
    kept, items = {text.casefold() for text in child.principles} if child else (), []
    for op in operations or []:
        text = " ".join(str(op.get("principle") or "").split())
        fate = "no child" if not child else f"in prompt {child.id}" if text.casefold() in kept else "not as it stands"
        named = [op.get(k) for k in ("modified_from", "remove_id", "merged_from") if op.get(k)]
        items.append(tag("li", tag("b", op.get("operation")), f" {', '.join(map(str, named))} {text} ",
                         tag("span", fate, cls="fate") if text else None))
    said = "could not be read" if operations is None else "" if items else "nothing to change"
    return join([tag("h3", r["request"], ": " * bool(said), said), tag("ul", *items),
                 fold("the reply", tag("pre", short(r["reply"], 3000)))])


def seconds(run: Record) -> Iterator[Html]:
    """Where the time went."""
    from matplotlib.figure import Figure
    rows = [m for m in run.metrics if m.get("seconds")]
    total = sum((Counter(m["seconds"]) for m in rows), Counter())
    if not total:
        yield tag("p", "No iteration is logged yet.")
        return
    axis = (figure := Figure(figsize=(4.6, 2.8), layout="constrained")).subplots()
    x, below = [m["iteration"] for m in rows], np.zeros(len(rows))
    for (name, _), color in zip(total.most_common(), COLORS * len(total)):
        y = np.array([m["seconds"].get(name, 0) for m in rows])
        axis.fill_between(x, below, below := below + y, step="mid", color=color, label=name, linewidth=0)
    axis.set(xlabel="iteration", ylabel="seconds", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=5, loc="outside upper left", fontsize=8, handlelength=1, columnspacing=1)
    shares = [[name, f"{s:,.1f}", f"{100 * s / sum(total.values()):.1f} %", f"{s / len(rows):,.2f}"]
              for name, s in total.most_common()]
    yield tag("div", tag("figure", svg(figure, "seconds by phase")), table(
        ["phase", "seconds", "share", "an iteration"], shares, "seconds by phase"), cls="grid")


def configuration(runs: list[Record]) -> Iterator[Html]:
    """All flags, of all runs."""
    fields = {f.name: (f.default, f.metadata["text"]) for f in dataclasses.fields(espl.Config)}
    written, rows = lambda x: json.dumps(x, ensure_ascii=False), []
    for name in dict.fromkeys([*fields, *(k for r in runs for k in r.config)]):
        default, text = fields.get(name, ("", "a flag of the task"))
        given = [written(r.config[name]) if name in r.config else "–" for r in runs]
        marked = len({*given}) > 1 if len(runs) > 1 else given[0] != written(default)
        rows.append(["★" * marked, tag("th", name, scope="row"), *given, written(default), text])
    yield tag("p", "★: the runs differ." if len(runs) > 1 else "★: not the default of espl.py.")
    yield table(["", "flag", *(r.name for r in runs), "default", "meaning"], rows, "configuration", "wide")


def page(runs: list[Record]) -> str:
    """The whole document."""
    run, frame = runs[0], Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    values, samples = survey_rollouts(run)
    sections = {
        "Curves": curves(runs), "Evolutionary tree": tree(run), "Lineage of the best prompt": descent(run),
        "Prompts": prompts(run), "Problems and prompts": heat_map(values), "Sample rollouts": rollouts(samples),
        "Reflections": reflections(run, survey_reflections(run)), "Seconds by phase": seconds(run),
        "Configuration": configuration(runs)}
    keys = {title: title.lower().replace(" ", "-") for title in sections}
    stamp = max((p.stat().st_mtime for p in run.directory.glob("*.json*")), default=0)
    body = join([
        tag("h1", " and ".join(r.name for r in runs)),
        tag("p", f"Last written {time.strftime('%Y-%m-%d %H:%M', time.localtime(stamp))}.", cls="soft"), headline(runs),
        tag("nav", *(tag("a", title, href=f"#{key}") for title, key in keys.items()), aria_label="sections"),
        *([tag("h3", f"The best prompt, {run.tested.id}"), principles(run.tested)] if run.tested else []),
        *(tag("section", tag("h2", title), *parts, id=keys[title]) for title, parts in sections.items())])
    script = hashlib.sha256(re.search("<script>(.*?)</script>", frame, re.S)[1].encode()).digest()
    frame = frame.replace("SCRIPTS", f"script-src 'sha256-{base64.b64encode(script).decode()}'")
    frame = frame.replace("<!-- title -->", tag("title", f"{run.name}: E-SPL report"))
    return frame.replace("<!-- body -->", tag("main", body))


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 0, or 2 for bad input."""
    def stop(message):
        raise espl.UserError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="+", help="a run's directory; of more the curves are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of report.html in the first run's directory")
    parser.error = stop  # instead of the usage on many lines
    try:
        args = parser.parse_args(argv)
        runs, first = [read_record(d) for d in args.run_dir], args.run_dir[0]
        with espl.explained(f"cannot make a report of {first}"):
            out = args.out or first / "report.html"
            espl.write_whole(out, page(runs))
        drawn = [str(out)]
        with contextlib.suppress(espl.UserError):  # of a run that lacks files there is the page alone
            draw(first)
            drawn += ["tree.png", "tree.svg", "curves.png"]
    except espl.UserError as e:
        print(f"report: error: {e}", file=sys.stderr)
        return 2
    if s := runs[0].tested:
        print(f"tested prompt {s.id}: mu {s.mu:.1f}, sigma {s.sigma:.1f}\n{lineage(runs[0].population, s)}")
    print(f"drawn in {first}: {', '.join(drawn)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
