"""What a run did: a report in words, two pictures, a page to look things up, one iteration in full.

    python tools/report.py RUN [RUN ...]       # prints the report, draws curves.png and tree.png
    python tools/report.py RUN --html          # also writes report.html: prompts, reflections
    python tools/report.py RUN --iteration 9   # prints that iteration of Algorithm 1 as Markdown

The run may be finished, going on or killed: what its files have is shown. No model is loaded.
espl.py starts this program at the end of a run. Other tools import its first part.
"""

import argparse
import base64
import contextlib
import dataclasses
import difflib
import html
import itertools
import json
import math
import sys
import textwrap
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = {"espl": "#0072b2", "evolution": "#009e73", "reflection": "#cc79a7", "rl": "#d55e00"}
VALIDATION, FAINT = "#e69f00", "#9a9a9a"
WIDTH = 838  # pixels of a picture in a README; pictures are laid out for it
GAINS = {  # of the 2 x 2 table: what is subtracted from what
    "prompt alone": ("before, tested", "before, root"),
    "weights alone": ("after, root", "before, root"),
    "both": ("after, tested", "before, root"),
    "interaction": ("both", "prompt alone", "weights alone"),
}


# ---- For all tools


def new_parser(text):
    """A parser of arguments for `run_tool`; the text is a tool's docstring."""

    def refuse(message):
        raise espl.UserError(f"{message}; see --help")

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=layout)
    parser.error = refuse
    return parser


def run_tool(parser, function, argv=None):
    """Calls function with the arguments. Returns the exit code: 2 for bad input, 130 if stopped."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for terminals without accents
    try:
        function(**vars(parser.parse_args(argv)))
    except espl.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print("error: out of memory; lower --max-rows", file=sys.stderr)
        return 2
    return 0


def read_jsonl(path):
    """Yields the records of a JSONL file, none if it is missing; half a last line is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def read_json(path, default):
    """The value in a JSON file, or the default if there is no file."""
    with espl.explained(f"cannot read {path}"):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


@dataclass
class SavedRun:
    """What a run's directory has; what is missing is empty."""

    directory: Path
    config: dict
    metrics: list[dict]
    population: list[espl.SystemPrompt]

    @property
    def tested(self):
        """The prompt that the last evaluation tested, or None."""
        end = readings(self.metrics).get("end")
        if end and end["tested_prompt"] < len(self.population):
            return self.population[end["tested_prompt"]]
        return None

    def scores_of(self, s):
        """The last scores of a prompt: {"val": 0.5, "test": 0.5}, or {}."""
        lines = [m for m in self.metrics if m.get("tested_prompt") == s.id]
        return {split: m[split] for m in lines for split in ("val", "test") if split in m}

    def log(self, name, **wanted):
        """Yields the records of a log that have these values."""
        for record in read_jsonl(self.directory / f"{name}.jsonl"):
            if all(record.get(key) == value for key, value in wanted.items()):
                yield record


def read_run(directory):
    """A run's directory as SavedRun. Raises UserError if nothing in it is a run's."""
    directory = Path(directory)
    config = read_json(directory / "config.json", {})
    metrics = list(read_jsonl(directory / "metrics.jsonl"))
    with espl.explained(f"cannot read {directory / 'population.json'}"):
        entries = read_json(directory / "population.json", [])
        population = [espl.SystemPrompt(**entry) for entry in entries]
    if not metrics and not population and "mode" not in config:
        raise espl.UserError(f"{directory} is not the directory of a run of espl.py")
    return SavedRun(directory, config, metrics, population)


def readings(metrics):
    """The evaluations that are reported: {name: line of metrics.jsonl}, {} if there was none."""
    evaluations = [m for m in metrics if "test" in m]
    found = {}
    if evaluations:
        found["start"] = evaluations[0]
        validated = [m for m in evaluations if "val" in m]
        if validated:
            found["picked by validation"] = max(validated, key=lambda m: m["val"])  # the first
        found["end"] = evaluations[-1]
    return found


def interval(values):
    """Mean of the values, and a 95 % bootstrap interval (percentiles)."""
    values = np.asarray(values, float)
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return values.mean(), low, high


def table_of(metrics):
    """The 2 x 2 table at the end of a run, and its gains: {name: score of each problem}.

    A gain is a difference on each problem, hence paired. Cells that must be equal (no weight was
    trained, or the root is the tested prompt) appear once. {}: the run has no table.
    """
    last = metrics[-1] if metrics else {}
    trained = any("loss" in m for m in metrics)
    cells = {}
    for name, scores in last.get("table", {}).items():
        weights, prompt = name.split(", ")
        if (weights == "before" or trained) and (prompt == "root" or last["tested_prompt"] > 0):
            cells[name] = np.array(scores)
    for gain, (whole, *parts) in GAINS.items():
        if {whole, *parts} <= cells.keys():
            cells[gain] = cells[whole] - sum(cells[part] for part in parts)
    return cells


def rewards_by(name, rollouts):
    """{value of that name: rewards} of records of rollouts.jsonl."""
    rewards = defaultdict(list)
    for r in rollouts:
        rewards[r[name]].append(r["reward"])
    return rewards


def pass_rates(rollouts):
    """{k: pass@k} on some problems: the probability that one of k responses has a reward of 1.

    If c of n responses have, C(n - c, k) of the C(n, k) choices of k fail: an unbiased estimate.
    """
    rewards = rewards_by("problem", rollouts).values()
    n = min(map(len, rewards), default=0)
    rates = {}
    for k in sorted({*(2**i for i in range(n.bit_length())), n} - {0}):
        failed = [math.comb(len(r) - r.count(1), k) / math.comb(len(r), k) for r in rewards]
        rates[k] = 1 - sum(failed) / len(failed)
    return rates


def new_figure(height):
    """An empty figure of a README's width in the style of all pictures, the height in pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "font.size": 9,  # 12 pixels in a README
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
    return Figure(figsize=(WIDTH / 100, height / 100), dpi=200, layout="constrained")


# ---- The report in words


def closing_report(run):
    """What there is to say of a run."""
    parts = [f"{run.config.get('mode', 'a run')} on {run.config.get('task', 'some task')}"]
    parts.append(scores_text(run))
    cells = table_of(run.metrics)
    if cells:
        parts.append(table_text(cells, run.metrics[-1]["tested_prompt"]))
    if run.tested:
        parts.append(prompt_text(run))
    used = [usage(run.metrics, "tokens"), usage(run.metrics, "seconds")]
    parts.append("\n".join([*used, f"files: {run.directory}"]))
    return "\n\n".join(parts)


def scores_text(run):
    """The scores at the start, where validation picked, and at the end, and pass@k there."""
    found = readings(run.metrics)
    if not found:
        return "There is no evaluation: metrics.jsonl has no test score."
    lines = ["mean reward".ljust(22) + "iteration   prompt      val     test"]
    for name, m in found.items():
        val = f"{m['val']:.3f}" if "val" in m else ""
        place = f"{m['iteration']:>9}{m['tested_prompt']:>9}"
        lines.append(f"{name:<22}{place}{val:>9}{m['test']:>9.3f}")
    at_the_end = run.log("rollouts", split="test", iteration=found["end"]["iteration"])
    rates = pass_rates(at_the_end)
    if len(rates) > 1:
        lines.append("at the end " + rates_text(rates))
    return "\n".join(lines)


def rates_text(rates):
    return ", ".join(f"pass@{k} {rate:.3f}" for k, rate in rates.items())


def interval_text(values, sign=""):
    mean, low, high = interval(values)
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def table_text(cells, tested):
    """The cells of `table_of` and their gains with 95 % intervals; tested: the prompt's id."""
    heads = ["root prompt"]
    if tested > 0:
        heads.append(f"prompt {tested}")
    rows = {"mean reward (95 % interval)": heads}
    for name, values in cells.items():
        weights, is_cell, _ = name.partition(", ")
        title = f"weights {weights} training" if is_cell else f"gain: {name}"
        text = interval_text(values, "" if is_cell else "+")
        rows.setdefault(title, []).append(text)
    lines = [title.ljust(28) + "".join(f"{x:>26}" for x in row) for title, row in rows.items()]
    return "\n".join(lines)


def prompt_text(run):
    """The tested prompt with its rating and lineage."""
    s = run.tested
    line = [str(ancestor.id) for ancestor in lineage(run.population, s)]
    text = espl.listing(espl.numbered(s.principles))
    head = f"prompt {s.id}: mu {s.mu:.1f}, sigma {s.sigma:.1f}; lineage {' > '.join(line)}"
    return head + "\n" + textwrap.indent(text, "    ")


def usage(metrics, name):
    """Tokens or seconds of a run, by what they were used for."""
    total = Counter()
    for m in metrics:
        total.update(m.get(name, {}))
    whole = sum(total.values())
    parts = [f"{kind} {n:,.0f} ({n / whole:.0%})" for kind, n in total.most_common() if n]
    return f"{whole:,.0f} {name}: {', '.join(parts) or 'none'}"


def lineage(population, s):
    """A prompt's ancestors, the root first, and itself; of a crossover the best parent counts."""
    line = [s]
    while line[0].parents:
        line.insert(0, population[line[0].parents[0]])
    return line


def edits(old, new):
    """What turned one list of principles into another: '+ “text”', '- “text”', '“old” → “new”'."""
    found = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, i, j, k, n in matcher.get_opcodes():
        if kind == "equal":
            continue
        for before, after in itertools.zip_longest(old[i:j], new[k:n]):  # an edit keeps its place
            if before is None:
                found.append(f"+ “{after}”")
            elif after is None:
                found.append(f"- “{before}”")
            else:
                found.append(f"“{before}” → “{after}”")
    return found


def described(s):
    """A prompt's origin in a few words."""
    parents = " and ".join(map(str, s.parents))
    return f"{s.operator} of {parents}, iteration {s.iteration}" if parents else "the root"


# ---- Pictures


def draw(run):
    """Draws what there is to draw. Returns what to say about it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no pictures: pip install matplotlib"
    quiet = warnings.catch_warnings(action="ignore")  # of letters that the font lacks
    with quiet, espl.explained(f"cannot draw into {run.directory}"):
        draw_curves(run, run.directory / "curves.png")
        if not run.tested:
            return "pictures: curves.png, but no tree.png, as no prompt was tested"
        draw_lineage(run, run.directory / "tree.png")
    return "pictures: curves.png, tree.png"


def draw_curves(run, path):
    """Mean rewards over the iterations: training batches, validation, test."""
    figure = new_figure(height=340)
    axis = figure.subplots()
    test_color = COLORS.get(run.config.get("mode"), COLORS["espl"])
    curves = {
        "reward_mean": ("training batch", FAINT, "-"),
        "val": ("validation", VALIDATION, "o-"),
        "test": ("test", test_color, "o-"),
    }
    for name, (label, color, style) in curves.items():
        points = [(m["iteration"], m[name]) for m in run.metrics if name in m]
        if points:
            axis.plot(*zip(*points), style, color=color, label=label, markersize=4)
    axis.set(xlabel="iteration", ylabel="mean reward")
    axis.set_ylim(min(0, axis.get_ylim()[0]), max(1, axis.get_ylim()[1]))
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path)


def draw_lineage(run, path, most=24):
    """How the tested prompt came about: its ancestors by iteration, and the edit of each step.

    Arrows go down and to the right, so in the left half a label stands on the right of its prompt
    and rises, in the right half it stands on the left and sinks.
    """
    line = lineage(run.population, run.tested)[-most:]
    labels = [step_label(run, s) for s in line]
    bottoms = list(itertools.accumulate(max(46, 15 * len(label) + 24) for label in labels))
    first, last = line[0].iteration, max(line[-1].iteration, line[0].iteration + 1)
    margin = 0.08 * (last - first)
    figure = new_figure(height=bottoms[-1] + 60)
    axis = figure.subplots()
    axis.set(xlabel="iteration", xlim=(first - margin, last + margin), ylim=(bottoms[-1], 0))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_visible(False)
    axis.spines["left"].set_visible(False)
    before = None
    for s, label, top, bottom in zip(line, labels, [0, *bottoms], bottoms):
        right = s.iteration < (first + last) / 2
        y = bottom - 20 if right else top + 20
        if before:
            color = VALIDATION if s.operator == "crossover" else COLORS["espl"]
            arrow = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (s.iteration, y - 14), before, arrowprops=arrow)
        before = s.iteration, y + 14
        width = 2.5 if s is line[-1] else 0.8
        frame = {"boxstyle": "round", "facecolor": "white", "linewidth": width}
        name = f"{s.id}   μ {s.mu:.1f}"
        axis.text(s.iteration, y, name, ha="center", va="center", bbox=frame)
        side = {"ha": "left", "va": "bottom"} if right else {"ha": "right", "va": "top"}
        how = {"textcoords": "offset points", "multialignment": "left", "parse_math": False}
        offset = (37, -6) if right else (-37, 6)
        axis.annotate("\n".join(label), (s.iteration, y), offset, **side, **how)
    figure.savefig(path)


def step_label(run, s, most=4):
    """Lines beside a prompt: the edit that made it, and its last test score."""
    lines = []
    if s.parents:
        for edit in edits(run.population[s.parents[0]].principles, s.principles):
            lines += textwrap.wrap(edit, 48, max_lines=2, placeholder=" …")
    if len(lines) > most:
        lines[most - 1 :] = [f"… {len(lines) - most + 1} lines more"]
    if len(s.parents) > 1:
        lines.insert(0, f"crossover with {', '.join(map(str, s.parents[1:]))}")
    scores = run.scores_of(s)
    return lines + [f"test {scores['test']:.3f}"] if "test" in scores else lines


# ---- report.html. Its frame is the file beside this one; all texts pass `escaped`.


def escaped(text):
    """Text for a page. Characters that are invisible, or turn others round, are replaced."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return html.escape(shown)


def block(text, most=4000):
    """A text as it is; a long one without its middle."""
    left_out = len(text) - most
    if left_out > 0:
        half = most // 2
        text = f"{text[:half]}\n[... {left_out:,} characters left out ...]\n{text[-half:]}"
    return f"<pre>{escaped(text)}</pre>"


def fold(title, *parts):
    """A part that opens by a click on its title."""
    return f"<details><summary>{escaped(title)}</summary>{''.join(parts)}</details>"


def write_page(run):
    """Writes report.html, which needs no other file."""
    pictures = []
    for path in (run.directory / "curves.png", run.directory / "tree.png"):
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            pictures.append(f'<img src="data:image/png;base64,{data}" alt="{path.stem}">')
    sections = {
        "Prompts": family_tree(run) or ["There is no population.json, or it is empty."],
        "Reflections": reflections(run) or ["There is no reflection in reflections.jsonl."],
        "Flags": [block(json.dumps(run.config, indent=1))],
    }
    title = escaped(run.directory.resolve().name)
    body = [f"<h1>{title}</h1>", block(closing_report(run), 10**6), *pictures]
    for name, parts in sections.items():
        body += [f"<h2>{name}</h2>", *parts]
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = espl.fill(frame, {"title": title, "body": "\n".join(body)})
    path = run.directory / "report.html"
    with espl.explained(f"cannot write {path}"):
        path.write_text(page, encoding="utf-8")


def family_tree(run):
    """Every prompt, with its principles, and its descendants inside it."""
    inside = defaultdict(list)  # by parent; None: the roots
    tested = run.tested
    for s in reversed(run.population):  # children come after their parents
        scores = "".join(f", {split} {x:.3f}" for split, x in run.scores_of(s).items())
        title = f"{s.id}: {described(s)}; mu {s.mu:.1f}, sigma {s.sigma:.1f}{scores}"
        if s is tested:
            title += "; tested prompt"
        parts, parent = [block(espl.listing(espl.numbered(s.principles)))], None
        if s.parents:
            parent = s.parents[0]
            changes = edits(run.population[parent].principles, s.principles)
            parts.insert(0, block("\n".join(changes)))
        part = f"{fold(title, *parts)}<div>{''.join(inside[s.id])}</div>"
        inside[parent].insert(0, part)
    return inside[None]


def reflections(run):
    """The reflector's replies by iteration, without summaries, and what came of them."""
    replies = defaultdict(list)
    for r in run.log("reflections"):
        if r["request"] != "summarize":
            replies[r["iteration"]].append(fold(r["request"], block(r["reply"])))
    parts = []
    for m in run.metrics:
        if m["iteration"] in replies:
            children = [f"+{child['id']} by {name}" for name, child in m["children"].items()]
            barren = [f"none by {name}: {why}" for name, why in m["no_child"].items()]
            title = f"{m['iteration']}: {'; '.join(children + barren)}"
            parts.append(fold(title, *replies[m["iteration"]]))
    return parts


# ---- One iteration of Algorithm 1 as a page

ITERATION = """# Iteration {iteration} of `--task {task} --mode {mode} --seed {seed}`

What the functions of `espl.py` did in one iteration of Algorithm 1, from the files of a run by
`python tools/report.py RUN --iteration {iteration}`.

## Lines 3 to 7, 10 and 11: prompts, rollouts, ratings

`next_problems` took a batch of problems and `select` chose prompts. `sample_groups` sampled
rollouts of each prompt on each problem, `grade` graded them. V_i is a prompt's `mean_reward`; by
V_i `update_ratings` ranked the prompts and changed their ratings (mu, sigma).

{prompts}

## Lines 8 and 9: the weights

`set_advantages` subtracted the baseline ({baseline}) from each reward. The rollouts of one problem,
{problem}:

{rollouts}

Rollouts of groups without an advantage are left out. `rl_update`: {update}.

## Lines 12 to 15: reflection

`argmax` took prompt {batch_winner}. `mutate` and `crossover` made the requests to the reflector
(`ask`). The first of each kind, as it was sent, and its reply:

{requests}

## Lines 16 to 21: children

`parse_edits`, or the task's own parser, read the edits in the last reply, `apply_edits` applied
the valid ones, and `add_child` gave the child its rating (mu, sigma).

{children}
"""


def iteration_page(run, iteration):
    """An iteration in Markdown. Raises UserError if the files lack it."""
    line = next((m for m in run.metrics if m["iteration"] == iteration and "values" in m), None)
    rollouts = list(run.log("rollouts", split="train", iteration=iteration))
    if not (line and rollouts and run.population and run.config):
        raise espl.UserError(
            f"--iteration {iteration}: {run.directory} has no complete record of it"
        )
    update = "took no step"
    if "loss" in line:
        update = "trained on {trained_rollouts} rollouts, gradient norm {grad_norm:.2f}"
    problem = reflected_problem(run, line, rollouts)
    slots = {"batch_winner": "(none)"} | run.config | line
    slots |= {
        "prompts": prompts_table(run, line),
        "problem": problem,
        "rollouts": rollouts_table(run, [r for r in rollouts if r["problem"] == problem]),
        "update": update.format(**line),
        "requests": requests_text(run, iteration) or "None was made.",
        "children": children_text(run, line),
    }
    return espl.fill(ITERATION, {name: str(value) for name, value in slots.items()})


def prompts_table(run, line):
    """The prompts of the batch: principles, V_i, ratings before and after."""
    rows = [("prompt", "principles", "V_i", "before", "after")]
    for key, value in line["values"].items():
        s = run.population[int(key)]
        principles = "<br>".join(map(code, s.principles)) or "(none)"
        before, after = (rating(run, s, line["iteration"] + i) for i in (0, 1))
        rows.append((key, principles, f"{value:.3f}", before, after))
    return markdown_table(rows)


def rating(run, s, iteration):
    s = rated_before(run, s, iteration)
    return f"{s.mu:.2f}, {s.sigma:.2f}"


def rated_before(run, s, iteration):
    """A copy of a prompt with its rating before an iteration's tournament."""
    played = [entry for entry in s.history if entry["iteration"] < iteration]
    if played:
        return dataclasses.replace(s, mu=played[-1]["mu"], sigma=played[-1]["sigma"])
    if not s.parents:
        return espl.SystemPrompt(s.id, s.principles)
    parents = [rated_before(run, run.population[i], s.iteration + 1) for i in s.parents]
    c = espl.Config(delta_sigma=run.config["delta_sigma"])
    return espl.add_child([], s.principles, parents, s.operator, s.iteration, c)


def reflected_problem(run, line, rollouts):
    """The first problem that the reflection on the best prompt saw."""
    best = line.get("batch_winner", rollouts[0]["prompt"])
    rewards = rewards_by("problem", [r for r in rollouts if r["prompt"] == best])
    for problem, got in rewards.items():
        if min(got) < (1 if run.config["reflect_on"] == "failures" else max(got)):
            return problem
    return rollouts[0]["problem"]


def rollouts_table(run, rollouts):
    """The rollouts of a problem with their advantages."""
    rewards = rewards_by("prompt" if run.config["baseline"] == "prompt" else "problem", rollouts)
    rows = [("prompt", "response", "outcome", "reward", "advantage")]
    for r in rollouts:
        baseline = np.mean(rewards.get(r["prompt"]) or rewards[r["problem"]])
        advantage = f"{r['reward'] - baseline:+.2f}"
        rows.append((r["prompt"], code(r["text"]), r["outcome"], f"{r['reward']:g}", advantage))
    return markdown_table(rows)


def requests_text(run, iteration):
    """The first request of each kind and its reply."""
    found = defaultdict(list)
    for r in run.log("reflections", iteration=iteration):
        found[r.get("request")].append(r)
    parts = []
    for request, records in found.items():
        if request:
            first = records[0]
            parts.append(f"### {request}: 1 of {len(records)}")
            parts += [literal(first["prompt"]), "The reply:", literal(first["reply"])]
    return "\n\n".join(parts)


def children_text(run, line):
    """The children with their edits and ratings, or why there is none."""
    parts = []
    for made in line.get("children", {}).values():
        s = run.population[made["id"]]
        changes = edits(run.population[s.parents[0]].principles, s.principles)
        parts.append(f"Prompt {s.id}, {described(s)}; {rating(run, s, s.iteration + 1)}:")
        parts.append(literal("\n".join(changes)))
    for name, why in line.get("no_child", {}).items():
        parts.append(f"No child by {name}: {why}.")
    return "\n\n".join(parts)


def markdown_table(rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "\n".join(lines)


def code(text, most=100):
    """A text in a line of Markdown, literally; of a long one the beginning."""
    text = espl.one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{text[:most]} ...`" if len(text) > most else f"`{text}`"


def literal(text):
    return textwrap.indent(text, "    ", lambda line: True)


# ---- The program


def report(runs, html, iteration):
    for directory in runs:
        run = read_run(directory)
        if iteration is not None:
            print(iteration_page(run, iteration))
            continue
        print(closing_report(run))
        print(draw(run))
        if html:
            write_page(run)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument("--html", action="store_true", help="also write RUN/report.html")
    parser.add_argument("--iteration", type=int, help="print this iteration as Markdown instead")
    return run_tool(parser, report, argv)


if __name__ == "__main__":
    sys.exit(main())
