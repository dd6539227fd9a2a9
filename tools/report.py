"""Pictures and words about runs, finished or not: one page to read them on, the tree of prompts, curves, lineage.

    python tools/report.py runs/glyphs-espl-20260214-120000
    python tools/report.py runs/A runs/B --out compared.html    # B's curves over A's, and its flags beside A's

Writes into the (first) run's directory report.html, which needs nothing else, tree.png and tree.svg (every prompt below
its parents, with its rating mu) and curves.png, and prints the lineage of the tested prompt, the one that evaluations
report. It reads config.json, metrics.jsonl, population.json, rollouts.jsonl and reflections.jsonl, and shows what there
is of them; no model is loaded and no run disturbed. While espl.py runs it has the pictures drawn after every evaluation.

The page's curves and tree are SVG by matplotlib, about 20 kB a picture, in which a browser can select text, follow links
and exchange colours for a dark screen. plotly would do more (zoom), for 4.5 MB of JavaScript in every page, which no
phone and no diff likes. All that models, data sets and directories are called or say is hostile: it only gets into the
page through `tag`, which escapes it, and the page's policy lets no script run but the one below.
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

COLORS = ("deepskyblue", "orange", "mediumorchid", "seagreen", "tomato", "slategray")  # of operators; of runs
OPERATOR_COLORS = {name: COLORS[i % len(COLORS)] for i, name in enumerate(espl.OPERATORS)}


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
    figure.suptitle(directory.resolve().name, parse_math=False)
    figure.savefig(directory / "curves.png", dpi=110)


def draw(directory: Path) -> tuple[list[espl.SystemPrompt], espl.SystemPrompt]:
    """All pictures of a run; espl.py calls it after every evaluation. Returns the population and the tested prompt."""
    population, metrics, tested = read_run(directory)
    with espl.explained(f"cannot draw into {directory}"):
        draw_tree(population, tested.id, directory)
        draw_curves(population, metrics, directory)
    return population, tested


# ---- The page: what is read for it

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


def attempt(path: Path, read, empty, notes: list[str]):
    """What `read` makes of a file; `empty` and a note if the file is missing or broken."""
    try:
        return read(path)
    except Exception as e:
        notes.append(f"{path.name} {'is missing' if isinstance(e, OSError) else f'is broken: {espl.first_line(e)}'}")
        return empty


def lines_of(path: Path) -> Iterator[dict]:
    """The records of a JSONL file, one by one, for it may be larger than memory; a line that is no record is left out,
    as is a last line that is still being written."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = json.loads(line)
                record["iteration"] + 0
                yield record


def read_config(path: Path) -> dict:
    """The run's flags; a model's directory has a config.json, too, but no mode."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not {"mode", "task"} <= config.keys():
        raise ValueError("it is not a run's")
    return config


def read_population(path: Path) -> list[espl.SystemPrompt]:
    """The prompts of population.json, parents before children."""
    population = [espl.SystemPrompt(**s) for s in json.loads(path.read_text(encoding="utf-8"))]
    if not population or any(s.id != i or not all(0 <= p < i for p in s.parents) for i, s in enumerate(population)):
        raise ValueError("its prompts are not in order")
    return population


def read_record(directory: Path) -> Record:
    """A run for the page. Raises UserError if the directory holds nothing of one."""
    notes, own = [], {f.name for f in dataclasses.fields(espl.Config)}
    config = attempt(directory / "config.json", read_config, {}, notes)
    metrics = attempt(directory / "metrics.jsonl", lambda path: list(lines_of(path)), [], notes)
    population = attempt(directory / "population.json", read_population, [], notes)
    if not config and not metrics and not population:
        advice = "give the directory of a run of espl.py"
        raise espl.UserError(f"cannot read the run {directory}: {'; '.join(notes) or 'its logs are empty'}; {advice}")
    given = espl.Config(**{k: v for k, v in config.items() if k in own})
    tested = espl.tested_prompt(SimpleNamespace(config=given, population=population)) if population else None
    return Record(directory, config, metrics, population, tested, notes)


def spread(items, most: int) -> list:
    """At most so many of the items, evenly spaced, with the first and the last."""
    items = sorted(items)
    return [items[i] for i in sorted({*np.linspace(0, len(items) - 1, most).round().astype(int)})] if items else []


def survey_rollouts(run: Record) -> tuple[dict, dict]:
    """Of training rollouts {(problem, prompt): [sum of rewards, number]}; and samples of all: of some iterations the
    first response with each outcome in each split."""
    picked = {0, 1, *spread([m["iteration"] for m in run.metrics], 7)}
    values, samples = defaultdict(lambda: [0.0, 0]), {}
    for r in attempt(run.directory / "rollouts.jsonl", lines_of, [], run.notes):
        if r["split"] == "train":
            cell = values[r["problem"], r["prompt"]]
            cell[:] = cell[0] + r["reward"], cell[1] + 1
        if r["iteration"] in picked:
            samples.setdefault((r["iteration"], r["split"] != "train", r["split"], r["outcome"]), r)
    return values, dict(sorted(samples.items()))


def survey_reflections(run: Record) -> dict[int, list[dict]]:
    """What was replied to critique, aggregate and crossover, and tracebacks, in iterations that are worth a look: those
    that made the lineage, the latest, and some between."""
    made = [s.iteration for s in run.lineage[1:]]
    bred = [m["iteration"] for m in run.metrics if "no_child" in m]
    picked, found = {*made[-10:], *bred[-4:], *spread(bred, 10)}, defaultdict(list)
    for r in attempt(run.directory / "reflections.jsonl", lines_of, [], run.notes):
        if r["iteration"] in picked and r.get("request") != "summarize":
            found[r["iteration"]].append({k: r.get(k) for k in ("request", "reply", "traceback")})
    return dict(sorted(found.items()))


# ---- The page: how it is made

class Html(str):
    """Markup of ours. `tag` escapes every other text."""


def clean(text) -> str:
    """Text without what could hide or turn round other text: control characters and marks of direction."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]", "\ufffd",
                  str(text).replace("\r\n", "\n"))


def tag(name: str, *inside, **attributes) -> Html:
    """<name attributes>inside</name>. cls is class, data_x is data-x; None in `inside` and attributes is left out."""
    given = "".join(f' {k.replace("cls", "class").replace("_", "-")}="{html.escape(clean(v))}"'
                    for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def join(parts) -> Html:
    """Several pieces of markup in a row; other text among them is escaped."""
    return Html("".join(x if isinstance(x, Html) else html.escape(clean(x)) for x in parts if x is not None))


def table(heads, rows, label: str, keys=(), cls: str = "") -> Html:
    """A table that scrolls in its own box. `keys`: an id for each row; a row may be a tr, ready made."""
    number = lambda x: "n" if not isinstance(x, Html) and re.fullmatch(r"[-+−±.,%→s\d ]*", str(x)) else None
    cells = lambda row: join(tag("td", x, cls=number(x)) for x in row)
    keys = [*keys] + [None] * len(rows)
    body = join(row if isinstance(row, Html) else tag("tr", cells(row), id=key) for key, row in zip(keys, rows))
    head = tag("thead", tag("tr", *(x if isinstance(x, Html) else tag("th", x, scope="col") for x in heads)))
    return tag("div", tag("table", head, tag("tbody", body), cls=cls), cls="scroll", tabindex=0, role="region",
               aria_label=label)


def fold(summary, *inside, start=False) -> Html:
    """A part that opens when its heading is clicked, or Enter pressed there."""
    return tag("details", tag("summary", summary), *inside, open="" if start else None)


def short(text, most: int = 6000) -> str:
    """A long text without its middle."""
    cut = len(text := str(text)) - most
    return text if cut <= 0 else f"{text[:most // 2]}\n[… {cut:,} characters left out …]\n{text[-most // 2:]}"


def svg(figure, label: str, notes: dict[str, str] | None = None) -> Html:
    """A matplotlib figure as part of the page, its colours those of the page. notes: {id in the picture: hover text};
    what has one becomes a link to the prompt's row."""
    import matplotlib
    space, notes = "{http://www.w3.org/2000/svg}", notes or {}
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(out := io.StringIO(), format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    for i, name in enumerate((*COLORS, "firebrick")):
        text = text.replace(matplotlib.colors.to_hex(name), f"var(--c{i})")
    root = ElementTree.fromstring(text.replace("#000000", "currentColor"))
    for e in root.iter():
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
    return Html(ElementTree.tostring(root, encoding="unicode"))


# ---- The page: its looks. Colours are Okabe and Ito's, made lighter or darker until they can be told from the ground.

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --ink: #1c2128; --soft: #5a6370; --line: #d8d4cc; --card: #fff;
  --link: #0a58a8; --in: #dceafa; --out: #fae6cf; --low: #f2efe8; --high: #084a91; --highink: #fff;
  --c0: #0072b2; --c1: #c2550a; --c2: #a8478a; --c3: #00785a; --c4: #8a6d00; --c5: #5a6370; --c6: #a3241b }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --ink: #e4e6e9; --soft: #a0a8b3; --line: #3a414a;
  --card: #1d2126; --link: #7db8f5; --in: #17395c; --out: #55370f; --low: #262b31; --high: #8cc6ff; --highink: #0b1622;
  --c0: #56b4e9; --c1: #f0a030; --c2: #dd94bf; --c3: #3cc7a0; --c4: #e6d94a; --c5: #b4bbc4; --c6: #ff9a8c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 84rem; background: var(--bg);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3, h4 { font-size: 1rem; margin: 1rem 0 .3rem } p { margin: .4rem 0; max-width: 75ch; overflow-wrap: anywhere }
a { color: var(--link) } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.soft, .fate { color: var(--soft) } .note { border-left: 4px solid var(--c1); padding-left: .7rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.tiles div, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 6px }
.tiles div { padding: .5rem .8rem } dt { color: var(--soft); font-size: .85rem }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.2rem 0 0 }
.principles, .diff, .pair ul { list-style: none; margin: .3rem 0; padding: 0; max-width: 85ch }
.principles li, .diff li { padding: .1rem 0; overflow-wrap: anywhere } .principles b { color: var(--soft) }
ins, del { border-radius: 3px; padding: 0 .15em; white-space: pre-wrap } ins { background: var(--in); text-decoration: none }
del { background: var(--out); text-decoration-thickness: 1px } .fate { font-size: .85rem; white-space: nowrap }
.fate::before { content: "→ " } .card { padding: 0 .9rem .5rem; margin: .5rem 0 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .5rem 0; padding: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-weight: 600; font-size: .95rem } svg { fill: currentColor; display: block }
figure svg { width: 100%; height: auto } svg text { font-family: inherit !important } svg a:hover { opacity: .7 }
.scroll { overflow: auto; max-height: 85vh; margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card) }
.tree svg { zoom: 1.15; margin: 0 auto } table { border-collapse: separate; border-spacing: 0; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid var(--line); max-width: 34rem;
  overflow-wrap: break-word } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600 } thead th { position: sticky; top: 0; background: var(--card); z-index: 1; white-space: nowrap }
td details { border: 0; background: none; margin: 0; min-width: 8.5rem } td details[open] { min-width: min(70vw, 28rem) }
tr:target td, .marked { background: var(--in) } th button { font: inherit; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; text-decoration: underline dotted } .heat { font-size: .72rem; line-height: 1.1 }
.heat td, .heat th { padding: .22rem .25rem; min-width: 1.75rem; text-align: center; border: 0 }
.heat th[scope=row] { position: sticky; left: 0; background: var(--card); text-align: left; white-space: nowrap;
  max-width: 38vw; overflow: hidden; text-overflow: ellipsis }
details { margin: .4rem 0; padding: .35rem .8rem } td details, .pair details { padding: 0 } .pair details { border: 0 }
summary { cursor: pointer; overflow-wrap: anywhere } .pair { display: grid; gap: 0 2rem }
@media (min-width: 60rem) { .pair { grid-template-columns: 1fr 1fr } } .pair > * { min-width: 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  max-height: 60vh; overflow: auto; margin: .5rem 0; padding: .6rem; background: var(--bg); border-radius: 4px }
@media print { .scroll, pre { max-height: none; overflow: visible } nav { display: none } }
""" + "".join(
    f".v{i} {{ background: color-mix(in oklab, var(--high) {10 * i}%, var(--low))"
    f"{'; color: var(--highink)' * (i > 5)} }}\n" for i in range(11))
SCRIPT = """
for (const button of document.querySelectorAll(".sortable th button")) button.onclick = () => {
  const head = button.parentNode, down = head.ariaSort === "descending", body = head.closest("table").tBodies[0];
  const key = row => row.cells[head.cellIndex].textContent;
  const rows = [...body.rows].sort((a, b) => key(b).localeCompare(key(a), undefined, {numeric: true}));
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = down ? "ascending" : "descending";
  body.append(...(down ? rows.reverse() : rows));
};
for (const box of document.querySelectorAll("[data-show]")) {  // the tested prompt of a large tree
  const at = document.querySelector(`a[id="${box.dataset.show}"]`).getBoundingClientRect(), own = box.getBoundingClientRect();
  box.scrollTo(at.x - own.x - own.width / 2, at.y - own.y - own.height / 2);
}
"""


# ---- The page: its sections. Each gives a heading and what is below it.

CURVES = {"Reward of the training batch": ["reward_mean"], "Test score": ["test", "test_greedy"],
          "Validation score": ["val"], "Response length, tokens": ["response_tokens"],
          "Share of responses cut at the limit": ["truncated"], "Entropy, nats a token": ["entropy"],
          "Share of groups whose rewards differ": ["contrast_groups"], "Gradient norm": ["grad_norm"]}
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # of runs, as their colours
STOPS = {"eos": "ended by itself", "length": "cut at the limit", "calls": "ended by a tool call too many"}


def points(rows: list[dict], name: str) -> list[tuple[int, float]]:
    """(iteration, value) where there is one."""
    return [(r["iteration"], r[name]) for r in rows if isinstance(r.get(name), (int, float))]


def curve(axis, xy: list[tuple[int, float]], color: str, mark: str, line: str = "-") -> None:
    """A curve: of few points with marks, of many faint, with its running mean over 15."""
    x, y = np.array(xy).T
    if many := len(x) > 60:
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
        y = np.convolve(np.pad(y, 7, mode="edge"), np.full(15, 1 / 15), "valid")
    axis.plot(x, y, line, color=color, linewidth=1.6, marker=mark, markersize=4, markevery=max(1, len(x) // 20) if many
              else None)


def curves_section(runs: list[Record]) -> tuple[str, Html]:
    from matplotlib.figure import Figure
    looks, pictures = list(zip(COLORS * len(runs), [*MARKS] * len(runs))), []

    def picture(title, draw):
        axis = (figure := Figure(figsize=(4.6, 2.6), layout="constrained")).subplots()
        draw(axis)
        axis.set(xlabel="iteration")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        pictures.append(tag("figure", tag("figcaption", title), svg(figure, title)))

    for title, names in CURVES.items():
        found = [(points(r.metrics, name), *look, line) for r, look in zip(runs, looks)
                 for name, line in zip(names, ("-", ":"))]
        title += " (dotted: greedy)" * any(xy and line == ":" for xy, *_, line in found)
        if any(xy for xy, *_ in found):
            picture(title, lambda axis: [curve(axis, *x) for x in found if x[0]])
    r, own = runs[0], {s.id for s in runs[0].lineage}
    if any(s.history for s in r.population) and len(r.population) > 1:
        picture("Ratings mu (coloured: the lineage of the tested prompt)", lambda axis: [
            axis.plot(*zip(*points(s.history, "mu")), "." if len(s.history) == 1 else "-", zorder=2 + (s.id in own),
                      color=COLORS[0] if s.id in own else "gray", alpha=1 if s.id in own else 0.35)
            for s in r.population if s.history])
    legend = [tag("li", tag("b", MARKS[mark], style=f"color:var(--c{COLORS.index(color)})"), f" {r.name}")
              for r, (color, mark) in zip(runs, looks)] if len(runs) > 1 else []
    return "Curves", join([tag("ul", *legend, cls="legend"), tag("div", *pictures, cls="grid")] if pictures else
                          [tag("p", "No iteration has been logged yet.")])


def headline(runs: list[Record]) -> Html:
    """The numbers to read first: of the first run, and of several a table."""
    rows, number = [], lambda e, name="test": f"{e[name]:.3f}" if name in e else "–"
    for r in runs:
        c, tests = r.config, [m for m in r.metrics if "test" in m]
        readings = espl.summary(tests) if tests else {}
        before, final, mean, picked = [number(readings.get(k, {})) for k in (
            "base model", "final", "mean of last 5", "picked by validation")]
        done, planned = max([m["iteration"] for m in r.metrics], default=0), c.get("iterations")
        took = sum(sum(m.get("seconds", {}).values()) for m in r.metrics)
        rows.append({
            "Run": r.name, "Task": c.get("task") or c.get("train_file") or "?", "Mode": c.get("mode", "?"),
            "Model": c.get("model", "?"), "Seed": c.get("seed", "?"),
            "Iterations": f"{done} of {planned}" if planned else str(done), "Test before": before, "Test after": final,
            "Mean of last 5": mean, "Picked by validation": picked, "Prompts": str(len(r.population)),
            "Time": f"{took / 3600:.1f} h" if took > 5400 else f"{took / 60:.1f} min" if took > 90 else f"{took:.0f} s"})
    first, s = rows[0], runs[0].tested
    tiles = {k: first[k] for k in ("Task", "Mode", "Model", "Iterations")} | {
        "Test score, before → after": f"{first['Test before']} → {first['Test after']}",
        "Best prompt": tag("a", f"{s.id}, mu {s.mu:.1f} ± {s.sigma:.1f}", href=f"#prompt-{s.id}") if s else "–"} | {
        k: first[k] for k in ("Mean of last 5", "Picked by validation", "Prompts", "Time")}
    parts = [tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in tiles.items()), cls="tiles")]
    if len(rows) > 1:
        parts += [table(rows[0], [list(row.values()) for row in rows], "the runs"),
                  tag("p", f"Everything but curves and configuration is of the first run, {first['Run']}.")]
    parts += [tag("p", f"Note: {r.name}: {note}", cls="note") for r in runs for note in r.notes]
    if s:
        parts += [tag("h3", f"The best prompt, {s.id}"), principles(s)]
    return join(parts)


def principles(s: espl.SystemPrompt) -> Html:
    """The principles of a prompt, by the ids that reflections call them."""
    if not s.principles:
        return tag("p", "No principles: the task's system prompt alone.")
    return tag("ul", *(tag("li", tag("b", f"G{i} "), text) for i, text in enumerate(s.principles)), cls="principles")


def evaluations_section(run: Record) -> tuple[str, Html]:
    tested = [m for m in run.metrics if {"val", "test"} & m.keys()]
    names = [n for n in dict.fromkeys(k for m in tested for k in m) if re.match("val|test", n)]
    show = lambda m, name: f"{m[name]:.3f}" if isinstance(m.get(name), float) else str(m.get(name, "–"))
    rows = [[str(m["iteration"]), show(m, "prompt"), *(show(m, n) for n in names)] for m in tested]
    return "Evaluations", table(["iteration", "prompt", *names], rows, "evaluations") if rows else tag(
        "p", "No evaluation has been logged yet.")


def described(s: espl.SystemPrompt) -> str:
    """A prompt in a few words."""
    parents = " of " + " and ".join(map(str, s.parents)) if s.parents else ""
    return f"prompt {s.id}: {s.operation}{parents}, iteration {s.iteration}"


def tree_section(run: Record) -> tuple[str, Html]:
    title = "Evolutionary tree"
    if len(run.population) < 2:
        return title, tag("p", "There is but one prompt: nothing was bred (yet).")
    notes = {}
    for s in run.population:
        score = [f"{e['split']} {e['score']:.3f} (iteration {e['iteration']})" for e in s.scores[-2:]]
        notes[f"node-{s.id}"] = "\n".join([
            described(s), f"mu {s.mu:.1f}, sigma {s.sigma:.1f}, {len(s.history)} tournaments", *score,
            *(f"G{i} {text}" for i, text in enumerate(short(x, 160) for x in s.principles[:12]))])
    figure, _ = tree_figure(run.population, run.tested.id)
    colors = [tag("li", tag("b", "—▸", style=f"color:var(--c{i % len(COLORS)})"), f" {name}")
              for i, name in enumerate(OPERATOR_COLORS)]
    text = ("A box is a prompt with its rating mu, the greener the higher, below its parents; beside it its last test "
            "score; a thick frame marks the tested prompt. Hover to read a prompt, click to find it in the table.")
    return title, join([tag("p", text), tag("ul", *colors, cls="legend"), tag(
        "div", svg(figure, "evolutionary tree", notes), cls="scroll tree", tabindex=0, role="region",
        aria_label="tree", data_show=f"node-{run.tested.id}")])


@functools.lru_cache(None)
def likeness(a: str, b: str) -> difflib.SequenceMatcher:
    """Two principles compared word by word."""
    return difflib.SequenceMatcher(None, re.split(r"(\s+)", a), re.split(r"(\s+)", b), autojunk=False)


def changes(old: list[str], new: list[str]) -> Html:
    """A child's principles against its parent's: what was reworded, word by word, what was added, what is gone."""
    gone, items = [text for text in old if text not in new], []
    kept = len(old) - len(gone)
    for text in (text for text in new if text not in old):
        near = max(gone, key=lambda x: likeness(x, text).ratio(), default=None)
        if near is None or likeness(near, text).ratio() < 0.5:
            items.append(tag("li", "+ ", tag("ins", text)))
            continue
        gone.remove(near)
        m, parts = likeness(near, text), []
        for kind, i, j, k, n in m.get_opcodes():
            before, after = "".join(m.a[i:j]), "".join(m.b[k:n])
            parts += [after] if kind == "equal" else [tag(t, x) for t, x in (("del", before), ("ins", after)) if x]
        items.append(tag("li", "~ ", *parts))
    items += [tag("li", "− ", tag("del", text)) for text in gone]
    return tag("ul", *items, tag("li", f"{kept} unchanged", cls="soft"), cls="diff")


def lineage_section(run: Record) -> tuple[str, Html]:
    steps = []
    for parent, s in zip(run.lineage, run.lineage[1:]):
        heading = f"{parent.id} → {s.id}: {s.operation}, iteration {s.iteration}; mu now {s.mu:.1f}" + (
            f"; with {', '.join(map(str, s.parents[1:]))}" if s.parents[1:] else "")
        steps.append(tag("div", tag("h3", heading), changes(parent.principles, s.principles), cls="card"))
    early = [fold(f"the first {len(steps) - 8} of {len(steps)} steps", *steps[:-8])] if len(steps) > 8 else []
    return "Lineage of the best prompt", join([*early, *steps[-8:]] or [tag("p", "It is the root.")])


def prompts_section(run: Record) -> tuple[str, Html]:
    rows, own = [], {s.id for s in run.lineage}
    for s in run.population:
        score = {e["split"]: f"{e['score']:.3f}" for e in s.scores}
        mark = "★ tested" if s is run.tested else "lineage" if s.id in own else ""
        rows.append([
            str(s.id), mark, s.operation, ", ".join(map(str, s.parents)), str(s.iteration), f"{s.mu:.1f}",
            f"{s.sigma:.1f}", str(len(s.history)), f"{s.history[-1]['value']:.3f}" if s.history else "",
            score.get("val", ""), score.get("test", ""), fold(f"{len(s.principles)} principles", principles(s))])
    heads = ["id", "", "made by", "parents", "iteration", "mu", "sigma", "tournaments", "last V", "val", "test", ""]
    heads = [tag("th", tag("button", h, type="button"), scope="col") if h else tag("th") for h in heads]
    return "Prompts", join([tag("p", "A click on a column's head sorts by it."), table(
        heads, rows, "prompts", [f"prompt-{s.id}" for s in run.population], "sortable")])


def heat_section(values: dict) -> tuple[str, Html]:
    """Problems by prompts, empty cells in a row put together."""
    title, of = "Problems and prompts: V", defaultdict(dict)
    for (problem, prompt), (total, n) in values.items():
        of[problem][prompt] = total / n, n
    if not of:
        return title, tag("p", "No training rollout has been logged yet.")
    columns = sorted({prompt for _, prompt in values}, key=lambda i: (str(type(i)), i))
    low = min(0, *(v for row in of.values() for v, _ in row.values()), 0)
    mean = {problem: sum(v * n for v, n in row.values()) / sum(n for _, n in row.values()) for problem, row in of.items()}
    brief = lambda v: "1" if v > 0.995 else f"{v:.2f}".replace("0.", ".").rstrip("0").rstrip(".") or "0"
    shade = lambda v: f"v{max(0, min(10, round(10 * (v - low) / (1 - low))))}"
    rows = []
    for problem in sorted(of, key=lambda x: -mean[x]):
        cells, gap = [tag("th", problem, scope="row"), tag("td", f"{mean[problem]:.2f}", cls=shade(mean[problem]))], 0
        for prompt in columns:
            if prompt not in of[problem]:
                gap += 1
                continue
            v, n = of[problem][prompt]
            cells += [tag("td", colspan=gap)] * bool(gap)
            cells.append(tag("td", brief(v), cls=shade(v), title=f"{problem}, prompt {prompt}: V {v:.2f} of {n}"))
            gap = 0
        rows.append(tag("tr", *cells, *[tag("td", colspan=gap)] * bool(gap)))
    text = (f"Mean reward of training rollouts, {len(of)} problems (the most often solved first) by {len(columns)} "
            f"prompts, from {low:.2f} (pale) to 1 (dark). Empty: never tried.")
    return title, join([tag("p", text), table(["problem", "all", *columns], rows, "problems by prompts", (), "heat")])


def rollouts_section(samples: dict) -> tuple[str, Html]:
    items = []
    for r in samples.values():
        sign = "✓" if r["reward"] == 1 else "✗" if r["reward"] <= 0 else "◐"
        stop = f"{STOPS.get(r.get('stop'), r.get('stop'))} after {r.get('tokens')} tokens"
        items.append(fold(
            f"{sign} {r['outcome']}, reward {r['reward']:.2g}: iteration {r['iteration']}, {r['split']}, prompt "
            f"{r['prompt']}, problem {r['problem']}; {stop}", tag("pre", short(r["response"])), start=not items))
    return "Sample rollouts", join([tag("p", "Of some iterations the first response with each outcome."), *items]
                                   if items else [tag("p", "No rollout has been logged yet.")])


def reflections_section(run: Record, found: dict[int, list[dict]]) -> tuple[str, Html]:
    parse, task = espl.parse_operations, str(run.config.get("task", ""))
    if re.fullmatch(r"\w+", task):  # one of tasks/; what else a config.json names is not run
        with contextlib.suppress(espl.UserError):
            parse = espl.task_file(task).get("parse", parse)
    lines = {m["iteration"]: m for m in run.metrics}
    cards = []
    for iteration, replies in found.items():
        m = lines.get(iteration, {})
        bred = {name: run.population[c["id"]] for name, c in m.get("children", {}).items()
                if c["id"] < len(run.population)}
        left = [reflection(r, parse, bred) for r in replies]
        right = [join([tag("h4", described(s)), changes(run.population[s.parents[0]].principles, s.principles)])
                 for s in bred.values()]
        right += [tag("p", f"no child by {name}: {why}") for name, why in m.get("no_child", {}).items()]
        right += [tag("p", f"dropped: {', '.join(f'{n} {why}' for why, n in m['dropped'].items())}", cls="soft")
                  ] if m.get("dropped") else []
        made = ", ".join(f"prompt {s.id}" for s in bred.values()) or "no child"
        cards.append(fold(f"iteration {iteration}, best prompt {m.get('best', '?')}: {made}", tag(
            "div", tag("div", *left), tag("div", *right), cls="pair"), start=not cards))
    why = Counter(text for m in run.metrics for text in m.get("no_child", {}).values())
    tries = sum(len(m.get("children", {})) + len(m.get("no_child", {})) for m in run.metrics)
    text = (f"{tries} attempts to breed made {len(run.population[1:])} prompts. Left what the reflection model proposed, "
            "right what became of it; iterations of the lineage, the latest, and some between.")
    reasons = [tag("p", "Why there was no child: ", "; ".join(f"{n} × {x}" for x, n in why.most_common(5)), ".")]
    return "Reflections", join([tag("p", text), *reasons * bool(why), *cards] if tries or cards else
                               [tag("p", "Nothing was reflected on (yet).")])


def reflection(r: dict, parse, bred: dict[str, espl.SystemPrompt]) -> Html:
    """A reply's operations with what became of each, and its text to unfold."""
    if r["traceback"]:
        return fold("an operator failed", tag("pre", r["traceback"]))
    request, reply = str(r["request"]), str(r["reply"])
    child, found = bred.get("crossover" if request == "crossover" else "mutation"), None
    with contextlib.suppress(Exception):  # a task's parser may not be made for a reply that it once choked on
        found = parse(espl.final_text(reply).strip())
    kept = {text.casefold() for text in child.principles} if child else ()
    items = []
    for op in found or []:
        text = " ".join(str(op.get("principle") or "").split())
        fate = "no child" if not child else f"in prompt {child.id}" if text.casefold() in kept else "not as it stands"
        named = [op.get(k) for k in ("modified_from", "remove_id", "merged_from") if op.get(k)]
        items.append(tag("li", tag("b", op.get("operation")), f" {', '.join(map(str, named))} ", text, " ",
                         tag("span", fate, cls="fate") if text else None))
    said = f"{request}: {'could not be read' if found is None else f'{len(items)} operations'}"
    return fold(said, tag("ul", *items), tag("pre", short(reply, 3000)))


def seconds_section(run: Record) -> tuple[str, Html]:
    from matplotlib.figure import Figure
    rows = [m for m in run.metrics if m.get("seconds")]
    total = sum((Counter(m["seconds"]) for m in rows), Counter())
    if not total:
        return "Seconds by phase", tag("p", "No iteration has been logged yet.")
    axis = (figure := Figure(figsize=(9, 2.8), layout="constrained")).subplots()
    x, below = [m["iteration"] for m in rows], np.zeros(len(rows))
    for (name, _), color in zip(total.most_common(), COLORS * len(total)):
        y = np.array([m["seconds"].get(name, 0) for m in rows])
        axis.bar(x, y, 0.9, below, color=color, label=name)
        below += y
    axis.set(xlabel="iteration", ylabel="seconds")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1, 1))
    share = [[name, f"{s:,.1f}", f"{100 * s / sum(total.values()):.1f} %", f"{s / len(rows):,.2f}"]
             for name, s in total.most_common()]
    return "Seconds by phase", join([tag("figure", svg(figure, "seconds by phase")), table(
        ["phase", "seconds", "share", "an iteration"], share, "seconds by phase")])


def configuration_section(runs: list[Record]) -> tuple[str, Html]:
    fields = {f.name: f for f in dataclasses.fields(espl.Config)}
    rows = []
    for name in dict.fromkeys([*fields, *(k for r in runs for k in r.config)]):
        given = [json.dumps(r.config[name], ensure_ascii=False) if name in r.config else "–" for r in runs]
        default = json.dumps(fields[name].default) if name in fields else "–"
        told = fields[name].metadata["text"] if name in fields else "a flag of the task"
        marked = len({*given}) > 1 if len(runs) > 1 else given[0] != default
        cells = [tag("th", name, scope="row"), *(tag("td", x) for x in given), tag("td", default), tag("td", told)]
        rows.append(tag("tr", *cells, cls="marked" if marked else None))
    text = "Marked: where the runs differ." if len(runs) > 1 else "Marked: what is not espl.py's default."
    return "Configuration", join([tag("p", text), table(
        ["flag", *(r.name for r in runs), "default", ""], rows, "configuration")])


def page(runs: list[Record]) -> str:
    """The whole document."""
    run = runs[0]
    values, samples = survey_rollouts(run)
    found = survey_reflections(run) if run.config.get("mode") != "rl" else {}
    sections = [curves_section(runs), evaluations_section(run), tree_section(run), lineage_section(run),
                prompts_section(run), heat_section(values), rollouts_section(samples),
                reflections_section(run, found), seconds_section(run), configuration_section(runs)]
    first = headline(runs)  # now, for the notes of all that was read
    keys = [re.sub(r"\W+", "-", title.lower()) for title, _ in sections]
    written = max((p.stat().st_mtime for p in run.directory.glob("*.json*")), default=time.time())
    stamp = f"Last written {time.strftime('%Y-%m-%d %H:%M', time.localtime(written))}."
    body = tag("body", tag("header", tag("h1", " and ".join(r.name for r in runs)), tag("p", stamp, cls="soft")), tag(
        "main", first, tag("nav", *(tag("a", title, href=f"#{key}") for (title, _), key in zip(sections, keys)),
                           aria_label="sections"),
        *(tag("section", tag("h2", title), inside, id=key) for (title, inside), key in zip(sections, keys))),
        tag("script", Html(SCRIPT)))
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"{tag('title', run.name, ': E-SPL report')}<style>{STYLE}</style></head>\n{body}</html>\n")


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
