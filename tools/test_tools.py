"""Tests of report.py, evaluate.py, export.py and track.py: on a real run, and on made-up ones."""

import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import export
import jax
import numpy as np
import pytest
import report
import track
from scipy.stats import bootstrap
from test_espl import (  # noqa: F401  (hf_model and one_device are fixtures)
    assert_close,
    hf_logits,
    hf_model,
    load,
    logits,
    make_mesh,
    one_device,
    write_jsonl,
)

import espl


def tool(module, *argv):
    """Calls a tool; returns its exit code."""
    return module.main([str(arg) for arg in argv])


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """One device and one number of rows, so that few programs are compiled."""

    def on_one_device(model_parallel):
        mesh = make_mesh()
        jax.set_mesh(mesh)
        return mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(espl, "make_mesh", on_one_device)
        patch.setattr(espl, "row_count", lambda needed, most, multiple: min(8, most))
        yield


@pytest.fixture(scope="module")
def test_file(tmp_path_factory):
    glyphs = espl.task_module("glyphs")
    _, test = glyphs.problems(espl.Config(seed=0))
    return write_jsonl(tmp_path_factory.mktemp("data") / "test.jsonl", test[:12])


@pytest.fixture(scope="module")
def real(few_shapes, test_file, tmp_path_factory):
    """The directory of a run of two iterations, and what it printed. Tests do not write into it."""
    directory = tmp_path_factory.mktemp("runs") / "real"
    flags = f"--task glyphs --test-file {test_file} --iterations 2 --eval-every 2 --batch-size 6"
    flags += " --lora-rank 4 --learning-rate 0.01 --val-size 4 --test-samples 3 --save-every 1"
    assert espl.main([*flags.split(), "--run-dir", str(directory)]) == 0
    return directory


# ---- Numbers


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tested", [3, 0])
def test_the_table_is_brute_force_arithmetic_over_its_cells(trained, tested):
    """Cells that are equal by construction are there once."""
    a, b, c, d = np.random.default_rng(0).random((4, 40))
    names = ("before, root", "before, tested", "after, root", "after, tested")
    metrics = [{"loss": 0.1}] if trained else []
    metrics.append({"tested_prompt": tested, "table": dict(zip(names, (a, b, c, d)))})
    expected = {names[0]: a}
    if tested:
        expected |= {names[1]: b, "prompt alone": b - a}
    if trained:
        expected |= {names[2]: c, "weights alone": c - a}
    if tested and trained:
        expected |= {names[3]: d, "both": d - a, "interaction": (d - b) - (c - a)}
    found = report.table_of(metrics)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values)
    assert report.table_of([]) == report.table_of([{"iteration": 3}]) == {}


def test_an_interval_is_that_of_scipy():
    values = np.random.default_rng(0).random(40)
    expected = bootstrap([values], np.mean, method="percentile", random_state=1)
    assert report.interval(values) == pytest.approx(
        (values.mean(), *expected.confidence_interval), abs=0.01
    )


def test_pass_rates_count_subsets():
    rng = np.random.default_rng(0)
    solved = rng.random((9, 6)) < rng.random((9, 1))
    records = [
        {"problem": i, "reward": float(x) if x else -0.1}
        for i, row in enumerate(solved)
        for x in row
    ]
    rates = report.pass_rates(records)
    assert list(rates) == [1, 2, 4, 6]
    for k, rate in rates.items():
        tries = [any(subset) for row in solved for subset in itertools.combinations(row, k)]
        assert rate == pytest.approx(np.mean(tries))
    assert report.pass_rates([]) == {}


def test_readings_take_the_first_of_equals():
    lines = [{"test": 0.1, "val": 0.2}, {"reward_mean": 1}, {"test": 0.2, "val": 0.5}]
    lines += [{"test": 0.9, "val": 0.5}, {"test": 0.4, "val": 0.3}]
    found = report.readings(lines)
    assert [m["test"] for m in found.values()] == [0.1, 0.2, 0.4]
    assert list(report.readings([{"test": 0.5}])) == ["start", "end"]
    assert report.readings([]) == {}


def test_edits_in_words():
    for old, new, expected in [
        ("ab", "ab", []),
        ("", "ab", ["+ “a”", "+ “b”"]),
        ("abc", "xbc", ["“a” → “x”"]),
        ("abc", "ac", ["- “b”"]),
        ("abc", "axd", ["“b” → “x”", "“c” → “d”"]),
        ("abc", "xb", ["“a” → “x”", "- “c”"]),
    ]:
        assert report.edits(list(old), list(new)) == expected


# ---- The report


def test_a_run_ends_with_its_report(real, capfd):
    """The program itself started it; by hand it says the same."""
    assert (real / "curves.png").is_file() and (real / "tree.png").is_file()
    assert tool(report, real) == 0
    text = capfd.readouterr().out
    lines = list(report.read_jsonl(real / "metrics.jsonl"))
    best = max(lines[0], lines[2], key=lambda m: m["val"])
    for name, m in (("start", lines[0]), ("picked by validation", best), ("end", lines[2])):
        row = f"{name} {m['iteration']} {m['tested_prompt']} {m['val']:.3f} {m['test']:.3f}"
        assert re.search("^" + row.replace(" ", " +") + "$", text, re.M)
    rollouts = list(report.read_jsonl(real / "rollouts.jsonl"))
    for weights in ("before", "after"):
        means = []
        for prompt in (0, lines[2]["tested_prompt"]):
            split = f"test_{weights}" if weights == "before" or prompt == 0 else "test"
            cell = 2, split, prompt
            of_cell = [r for r in rollouts if (r["iteration"], r["split"], r["prompt"]) == cell]
            assert len(of_cell) == 36
            means.append(np.mean([r["reward"] for r in of_cell]))
        row = re.search(rf"^weights {weights} training(.*)$", text, re.M)[1]
        assert re.findall(r"(\S+) \(", row) == [f"{mean:.3f}" for mean in means]
    sampled = sum(sum(m["tokens"].values()) for m in lines)
    assert f"\n{sampled:,} tokens: " in text
    tested = report.read_run(real).population[lines[2]["tested_prompt"]]
    assert tested.principles and all(f"] {line}\n" in text for line in tested.principles)


def write_run(directory, population=(), metrics=(), **logs):
    """A run's directory with these files."""
    directory.mkdir(exist_ok=True)
    config = dataclasses.asdict(espl.Config(task="glyphs")) | {"files": {}}
    (directory / "config.json").write_text(json.dumps(config))
    entries = [dataclasses.asdict(s) for s in population]
    (directory / "population.json").write_text(json.dumps(entries))
    for name, records in ({"metrics": metrics} | logs).items():
        write_jsonl(directory / f"{name}.jsonl", [*records, '{"iteration": 3, "rew'])
    return directory


def random_population(size):
    """Prompts that are edited in each generation; every fifth is made by crossover."""
    rng = np.random.default_rng(size)
    population = [espl.SystemPrompt(0, [])]
    for i in range(1, size):
        parents = [i - 1, i - 2] if i % 5 == 2 else [max(0, i - rng.integers(1, 4))]
        principles = list(population[parents[0]].principles)
        for _ in range(rng.integers(1, 6)):
            text = " ".join(rng.choice(["when", "a number is", "large"], rng.integers(2, 40)))
            principles.insert(rng.integers(len(principles) + 1), text)
        operator = "crossover" if parents[1:] else "mutation"
        s = espl.SystemPrompt(i, principles, 20.0 + i, 1.0, operator, [int(p) for p in parents], i)
        population.append(s)
    return population


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    saved, save = {}, Figure.savefig

    def savefig(figure, path):
        save(figure, path)
        FigureCanvasAgg(figure).draw()
        saved[path.name] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("size", [1, 40])
def test_the_picture_of_a_lineage(size, figures, tmp_path, capsys):
    """The ancestors of the tested prompt are there, no text covers another, and all can be read."""
    population = random_population(size)
    metrics = [{"iteration": size, "test": 0.5, "tested_prompt": size - 1}]
    assert tool(report, write_run(tmp_path, population, metrics)) == 0
    figure = figures["tree.png"]
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    names = [text for text in texts if text.get_bbox_patch()]
    line = report.lineage(population, population[-1])
    assert [int(text.get_text().split()[0]) for text in names] == [s.id for s in line]
    assert f"lineage {' > '.join(str(s.id) for s in line)}\n" in capsys.readouterr().out
    said = " ".join(text.get_text() for text in texts)
    for parent, s in zip(line, line[1:]):
        added = [text for text in s.principles if text not in parent.principles]
        assert f"+ “{added[0]}"[:20] in said
        assert s.operator == "mutation" or f"crossover with {s.parents[1]}" in said
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    width, height = figure.get_size_inches() * figure.dpi
    for box in boxes:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height
    labels = figure.axes[0].get_xticklabels() + texts
    assert min(text.get_fontsize() for text in labels) / 72 * 838 / figure.get_figwidth() >= 9


def test_curves_show_what_was_logged(figures, tmp_path):
    metrics = [
        {"iteration": 0, "val": 0.5, "test": 0.25},
        {"iteration": 1, "reward_mean": -0.5},
        {"iteration": 2, "reward_mean": 0.75, "test": 0.5},
    ]
    run = report.read_run(write_run(tmp_path, metrics=metrics))
    report.draw_curves(run, tmp_path / "curves.png")
    [axis] = figures["curves.png"].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn["training batch"] == [[1, -0.5], [2, 0.75]]
    assert drawn["validation"] == [[0, 0.5]]
    assert drawn["test"] == [[0, 0.25], [2, 0.5]]
    assert axis.lines[-1].get_color() == report.COLORS["espl"]


def test_no_matplotlib_costs_only_the_pictures(real, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(real, tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert tool(report, run) == 0
    assert "no pictures: pip install matplotlib" in capsys.readouterr().out
    assert not list(run.glob("*.png"))


HOSTILE = "</pre></summary><script>x</script><img src=x onerror=y>{body}<!--\u202e\0 &amp; \" '"


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes' names, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag):
        self.tags.append(("/", tag))

    def handle_data(self, data):
        self.text += data


def write_page_of(directory, text):
    """report.html of a run in which others say `text` wherever they have a say."""
    child = espl.SystemPrompt(1, ["one", text], 26.0, 1.0, text, [0], 1)
    replies = [
        {"iteration": 1, "request": "summarize", "prompt": "p", "reply": "a summary"},
        {"iteration": 1, "request": "critique", "prompt": "p", "reply": text + "x" * 9000},
        {"iteration": 1, "request": "aggregate", "prompt": "p", "reply": text},
    ]
    made = {text: {"id": 1, "parents": [0]}}
    line = {"iteration": 1, "children": made, "no_child": {"crossover": text}, "tokens": {text: 1}}
    line |= {"test": 0.5, "tested_prompt": 1}
    write_run(directory, [espl.SystemPrompt(0, []), child], [line], reflections=replies)
    assert tool(report, directory, "--html") == 0
    return Page((directory / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_no_markup_of_others(tmp_path):
    page, plain = (write_page_of(tmp_path / str(i), text) for i, text in enumerate((HOSTILE, "ok")))
    assert page.tags == plain.tags
    assert "script" not in {tag for tag, *_ in page.tags}
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\0", "\ufffd")
    assert page.text.count(shown) >= 9
    assert "critique" in page.text and "a summary" not in page.text
    assert "characters left out" in page.text and "x" * 5000 not in page.text
    assert "default-src 'none'" in (tmp_path / "0" / "report.html").read_text(encoding="utf-8")


def test_the_page_has_every_prompt_below_its_parent(tmp_path):
    population = random_population(30)
    assert tool(report, write_run(tmp_path, population), "--html") == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    inside, found, last = [], {}, None
    for tag in re.findall(r"<div>|</div>|<summary>\d+: ", text):
        if tag == "</div>":
            inside.pop()
        elif tag == "<div>":
            inside.append(last)
        else:
            last = int(re.search(r"\d+", tag)[0])
            found[last] = inside[-1:]
    assert found == {s.id: s.parents[:1] for s in population}


@pytest.mark.parametrize(
    "kept, said",
    [
        ("config", "There is no evaluation"),
        ("metrics", "end  "),
        ("population", "There is no evaluation"),
        ("config metrics population", r"prompt \d: mu"),
    ],
)
def test_a_run_that_lacks_files(kept, said, real, tmp_path, capsys):
    for name in kept.split():
        [path] = real.glob(f"{name}.json*")
        shutil.copy(path, tmp_path)
    assert tool(report, tmp_path, "--html") == 0
    assert re.search(said, capsys.readouterr().out)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "is not the directory of a run"),
        ({"config.json": '{"model_type": "llama"}'}, "is not the directory of a run"),
        ({"population.json": "["}, "cannot read .*population.json"),
        ({"population.json": '[{"principle": 3}]'}, "cannot read .*population.json"),
    ],
)
def test_a_report_of_what_is_no_run(files, message, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert tool(report, tmp_path) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == files.keys()


def test_an_iteration_as_a_page(real, capsys):
    """Its numbers are those of update_ratings, set_advantages and add_child."""
    assert tool(report, real, "--iteration", 2) == 0
    page = capsys.readouterr().out
    run = report.read_run(real)
    row = r"^\| (\d+) \| (.*) \| (\S+) \| (\S+), (\S+) \| (\S+), (\S+) \|$"
    prompts, values, expected = [], [], []
    for i, principles, value, *ratings in re.findall(row, page, re.M):
        before, after = np.array(ratings, float).reshape(2, 2)
        prompts.append(espl.SystemPrompt(int(i), [], *before))
        values.append(float(value))
        expected.append(after)
        assert all(text in principles for text in run.population[int(i)].principles)
    assert len(prompts) == 2
    espl.update_ratings(prompts, values, 2)
    np.testing.assert_allclose([(s.mu, s.sigma) for s in prompts], expected, atol=0.02)
    row = r"^\| (\d+) \| `.*` \| \w+ \| (\S+) \| (\S+) \|$"
    prompt, rewards, advantages = np.array(re.findall(row, page, re.M), float).T
    for i in (0, 1):
        own = rewards[prompt == i]
        np.testing.assert_allclose(advantages[prompt == i], own - own.mean(), atol=0.006)
    child = run.population[-1]
    assert child.iteration == 2 and f"; {child.mu:.2f}, {child.sigma:.2f}:" in page
    for request in ("summarize", "critique", "aggregate"):
        logged = next(run.log("reflections", iteration=2, request=request))
        assert f"    {logged['prompt']}\n" in page and f"    {logged['reply']}\n" in page
    for name in re.findall(r"`(\w+)`", report.ITERATION):
        assert hasattr(espl, name)
    assert tool(report, real, "--iteration", 3) == 2
    assert "--iteration 3: " in capsys.readouterr().err


# ---- Evaluation


def test_evaluation_of_a_run(real, test_file, tmp_path, capsys):
    """It finds what the run found, or something else, and leaves the run's files as they are."""
    before = contents(real)
    run = report.read_run(real)
    assert tool(evaluate, real, "--step", "latest", "--table", "--run-dir", tmp_path / "again") == 0
    [again] = report.read_run(tmp_path / "again").metrics
    assert (again["table"], again["test"]) == (run.metrics[-1]["table"], run.metrics[-1]["test"])
    text = capsys.readouterr().out
    assert report.table_text(report.table_of(run.metrics), again["tested_prompt"]) in text
    few = write_jsonl(tmp_path / "few.jsonl", list(report.read_jsonl(Path(test_file)))[:3])
    assert tool(evaluate, real, "--test-file", few, "--test-samples", 5, "--max-new-tokens", 4) == 0
    [directory] = real.glob("eval-*")
    made = report.read_run(directory)
    rollouts = list(made.log("rollouts"))
    assert len(rollouts) == 15 and max(r["tokens"] for r in rollouts) == 4
    best = report.readings(run.metrics)["picked by validation"]
    assert made.metrics[0]["iteration"] == best["iteration"]
    text = capsys.readouterr().out
    assert f"mean reward {np.mean([r['reward'] for r in rollouts]):.3f} (" in text
    assert "pass@5 " in text and str(directory) in text
    shutil.rmtree(directory)
    assert contents(real) == before


def test_evaluation_of_a_model_with_a_prompt(test_file, tmp_path, capsys):
    population = tmp_path / "population.json"
    population.write_text('[{"id": 0, "principles": ["@ left"]}]')
    task = tmp_path / "reflected.py"  # neither a reflector nor training problems are needed
    task.write_text(
        "from glyphs import *\nDEFAULTS = DEFAULTS | {'reflector': 'no/such'}\ndel problems"
    )
    argv = ["--task", task, "--test-file", test_file, "--test-samples", 1]
    argv += ["--population", population, "--run-dir", tmp_path / "run"]
    assert tool(evaluate, *argv) == 0
    run = report.read_run(tmp_path / "run")
    assert run.population[0].principles == ["@ left"]
    rollouts = list(run.log("rollouts"))
    assert len(rollouts) == 12 and {r["split"] for r in rollouts} == {"test"}
    assert run.metrics[0]["test"] == pytest.approx(np.mean([r["reward"] for r in rollouts]))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--seed", 5], "--seed is fixed by RUN"),
        (["--batch-size", 5], "unrecognized arguments"),
        (["--step", 7], r"has no checkpoint 7; it has \[[0-2, ]+\]"),
        (["--test-samples", 0], "--test-samples"),
    ],
)
def test_bad_evaluations(argv, message, real, capsys):
    before = contents(real)
    assert tool(evaluate, real, *argv) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert contents(real) == before


# ---- Export: the truth is what transformers and peft make of the files


def write_trained(directory, base, rank):
    """A run's directory after an iteration in which all trained weights moved; also its policy."""
    policy = load(base, lora_rank=rank)
    moved = jax.tree.map(
        lambda w: w + 0.1 * np.sin(np.arange(w.size)).reshape(w.shape), policy.theta
    )
    policy = dataclasses.replace(policy, theta=moved)
    population = [espl.SystemPrompt(0, ["Check it."])]
    write_run(
        directory, population, [{"iteration": 1, "val": 0.5, "test": 0.25, "tested_prompt": 0}]
    )
    config = report.read_json(directory / "config.json", {})
    config |= {"model": str(base), "lora_rank": rank}
    (directory / "config.json").write_text(json.dumps(config))
    trainer = SimpleNamespace(opt_state={"mu": moved})
    run = SimpleNamespace(
        directory=directory, policy=policy, trainer=trainer, population=population
    )
    espl.save_checkpoint(run, {"iteration": 1, "val": 0.5})
    return policy


def loaded(model, directory):
    return type(model).from_pretrained(directory, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["gemma3-vision", "qwen3"])
def test_exported_adapters_and_merged_models_are_ours(name, hf_model, torch, tmp_path):  # noqa: F811
    directory, model = hf_model(name)
    policy = write_trained(tmp_path / "run", directory, 3)
    expected = logits(policy)
    assert np.abs(expected - logits(policy, policy.theta_ref)).max() > 0.1 * np.abs(expected).max()
    assert tool(export, tmp_path / "run", tmp_path / "merged", "--merge") == 0
    assert_close(hf_logits(torch, loaded(model, tmp_path / "merged")), expected, 1e-4)
    assert tool(export, tmp_path / "run", tmp_path / "adapter") == 0
    peft = pytest.importorskip("peft", reason="pip install peft")
    adapted = peft.PeftModel.from_pretrained(loaded(model, directory), tmp_path / "adapter")
    assert_close(hf_logits(torch, adapted), expected, 1e-4)


def test_exported_weights_are_ours_where_all_were_trained(hf_model, torch, tmp_path):  # noqa: F811
    directory, model = hf_model("gemma3-vision")
    policy = write_trained(tmp_path / "run", directory, 0)
    assert tool(export, tmp_path / "run", tmp_path / "out") == 0
    assert_close(hf_logits(torch, loaded(model, tmp_path / "out")), logits(policy), 1e-4)
    again = load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.theta, policy.theta)


def tensors_in(directory):
    from safetensors.torch import load_file

    files = directory.glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


@pytest.mark.parametrize("rank", [0, 3])
def test_a_merged_model_has_its_bases_files_and_dtype(rank, hf_model, torch, tmp_path):  # noqa: F811
    """The base has bfloat16, several files, and its table twice."""
    from safetensors.torch import save_file

    _, original = hf_model("llama3.2")
    model = type(original)._from_config(original.config).bfloat16()
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": model.lm_head.weight.clone()}, base / "x.safetensors")
    policy = write_trained(tmp_path / "run", base, rank)
    assert tool(export, tmp_path / "run", out, "--merge") == 0
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"README.md", "system_prompt.txt"}
    before, after = tensors_in(base), tensors_in(out)
    assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {torch.bfloat16}
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if rank == 0 or "_proj.weight" in name}
    up, name = policy.theta["layers"][1]["up_proj"], "model.layers.1.mlp.up_proj.weight"
    if rank:
        delta = espl.LORA_ALPHA / rank * (up["lora_a"][...] @ up["lora_b"][...]).T
        expected = before[name].float().numpy() + delta
    else:
        expected = up["kernel"][...].T
    np.testing.assert_allclose(after[name].float().numpy(), expected, rtol=2**-8, atol=1e-6)
    assert "Check it." in (out / "system_prompt.txt").read_text()


def test_an_exported_run_is_what_validation_picked(real, tmp_path, capsys):
    before, out = contents(real), tmp_path / "out"
    assert tool(export, real, out) == 0
    assert contents(real) == before
    run = report.read_run(real)
    best = report.readings(run.metrics)["picked by validation"]
    said = f"iteration {best['iteration']} of {real} with prompt {best['tested_prompt']}"
    assert said in capsys.readouterr().out
    text = (out / "system_prompt.txt").read_text()
    assert all(line in text for line in run.population[best["tested_prompt"]].principles)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "system_prompt.txt"}
    assert {path.name for path in out.iterdir()} == names


def change_base(run):
    config = json.loads((run / "config.json").read_text())
    config["model"] = str(run)
    (run / "config.json").write_text(json.dumps(config))


BAD_EXPORTS = {  # name: what is done to the run, arguments, message
    "no run": (shutil.rmtree, [], "there are no checkpoints in"),
    "full": (lambda run: (run.parent / "out").write_text(""), [], "is not an empty directory"),
    "damaged": (lambda run: shutil.rmtree(run / "checkpoints/2/weights"), [], "cannot read"),
    "another base": (change_base, ["--merge"], "restore it"),
    "no step": (lambda run: None, ["--step", "9"], "has no checkpoint 9"),
}


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_exports_are_one_line_and_leave_nothing(name, real, tmp_path, capsys):
    damage, argv, message = BAD_EXPORTS[name]
    run = shutil.copytree(real, tmp_path / "run")
    damage(run)
    before = sorted(tmp_path.iterdir())
    assert tool(export, run, tmp_path / "out", "--step", 2, *argv) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


# ---- Track


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers_of_every_iteration(name, tmp_path, monkeypatch, capsys):
    """Also of those that come while it waits; the run goes back to a checkpoint meanwhile."""
    lines = [{"iteration": i, "kl": None, "outcomes": {"wrong": i}} for i in range(4)]
    lines[3] |= {"test": 0.5, "table": {"before, root": [1.0]}}
    run = write_run(tmp_path / "run", metrics=lines[:2])
    looks = iter([lines[:1], lines[:3], lines])
    monkeypatch.setattr(track.time, "sleep", lambda _: write_run(run, metrics=next(looks)))
    started, logged = [], []

    def init(**how):
        started.append(how)
        return SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    assert tool(track, run, f"{name}:tests") == 0
    assert [(how["project"], how["name"]) for how in started] == [("tests", "run")]
    expected = [{"iteration": i, "outcomes/wrong": i} for i in range(4)]
    expected[3]["test"] = 0.5
    assert logged == list(enumerate(expected))
    monkeypatch.setitem(sys.modules, name, None)
    for to, message in ((f"{name}:tests", f"pip install {name}"), (name, "wandb:PROJECT or")):
        assert tool(track, run, to) == 2
        assert message in capsys.readouterr().err
