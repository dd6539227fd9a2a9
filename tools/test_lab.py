"""Tests of lab.py, bench.py, plan.py and pretrain_glyphs.py."""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import bench
import jax
import lab
import numpy as np
import plan
import pretrain_glyphs as pretraining
import pytest
import report
import scipy.special
import scipy.stats
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from test_espl import (  # noqa: F401  (one_device is a fixture)
    MEANS,
    assert_close,
    hf_logits,
    logits,
    make_tiny_model,
    one_device,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import espl

glyphs = espl.task_module("glyphs")
TEXTS = espl.read_texts(glyphs.PROMPTS, "")
SHIPPED = Path(glyphs.__file__).with_name("glyphs_model")


# ---- The laboratory


def curve(*tests, val=(0.1, 0.5, 0.9, 0.2, 0.9, 0.1, 0.3), tokens=(700, 300), **table):
    """Evaluations every ten iterations."""
    points = []
    for i, (test, v) in enumerate(zip(tests, val)):
        spent = {"rollouts": tokens[0] * i, "reflections": tokens[1] * i}
        points.append({"iteration": 10 * i, "test": test, "val": v, "tokens": spent})
    points[-1]["table"] = {name.replace("_", ", "): value for name, value in table.items()}
    return points


def cells(text):
    """{first cell: the others} of a Markdown table."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.split("\n")]
    return {line[0]: line[1:] for line in lines}


def test_readings():
    c = curve(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert lab.read([c, c], "final") == [0.6] * 2
    assert lab.read([c, c], "mean of last 5") == pytest.approx([0.4] * 2)
    assert lab.read([c, c], "picked by validation") == [0.2] * 2  # the first of equals


def test_differences_are_paired_and_their_intervals_bootstrap():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0.4, 0.3, 12)  # differs much from seed to seed
    ours = theirs + rng.normal(0.2, 0.05, 12)
    runs = {"rl": [curve(0.1, x) for x in theirs], "espl": [curve(0.1, x) for x in ours]}
    found = cells(lab.scores_table({"curves": runs}))
    text = found[lab.MODES["rl"]][3]
    mean, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", text).groups())
    data = (ours - theirs,)
    expected = scipy.stats.bootstrap(data, np.mean, method="percentile", rng=0).confidence_interval
    assert [mean, low, high] == pytest.approx([np.mean(data), *expected], abs=0.003)
    assert found[lab.MODES["rl"]][0] == f"{theirs.mean():.3f} +- {theirs.std(ddof=1):.3f}"
    assert found[lab.MODES["espl"]][3] == "+0.000 (+0.000 to +0.000)"
    assert found["base model"][0] == "0.100 +- 0.000"
    assert found[lab.MODES["rl"]][-1] == "1 + 0"  # thousand tokens


def test_the_2_x_2_tables():
    """Of two seeds. rl has one column, evolution one row."""
    full = [
        curve(0.0, 0.9, before_root=0.2, before_tested=0.4, after_root=0.3, after_tested=0.9),
        curve(0.0, 0.7, before_root=0.4, before_tested=0.6, after_root=0.3, after_tested=0.7),
    ]
    rl = [curve(0.0, 0.3, before_root=0.2, after_root=0.3)] * 2
    section = {"curves": {"espl": full, "rl": rl, "evolution": [curve(0.0, 0.0, before_root=0.1)]}}
    square = cells(lab.square_table(section))
    assert square["weights before training"] == ["0.300 +- 0.141", "0.500 +- 0.141"]
    assert square["weights after training"] == ["0.300 +- 0.000", "0.800 +- 0.141"]
    gains = cells(lab.gains_table(section))
    assert gains["weights after, root prompt"] == ["0.300 +- 0.000", "", "0.300 +- 0.000"]
    assert gains["weights after, tested prompt"] == ["", "", "0.800 +- 0.141"]


def test_the_course_of_runs():
    runs = [curve(0.1, 0.3), curve(0.3, 0.5)]
    runs[0][1]["kl"] = runs[1][1]["kl"] = 0.5
    found = cells(lab.course_table({"curves": {"rl": runs}}))
    assert found["iteration"] == ["0", "10"]
    assert found["rl"] == ["0.200 +- 0.141", "0.400 +- 0.141, KL 0.5"]
    longer = [curve(0.1, 0.6), curve(0.3, 0.6)]
    curves = {"evolution": runs, "rl": runs, "espl": longer}
    found = cells(lab.course_table({"curves": curves}, baseline="rl"))
    assert found["iteration"] == ["0", "10", "final, minus `rl`"]
    assert found["espl"][-1] == "+0.200 (+0.100 to +0.300)"
    assert found["rl"][-1] == "+0.000 (+0.000 to +0.000)" and "evolution" not in found


def test_the_kl_of_a_curve_is_the_mean_since_the_evaluation_before(tmp_path):
    evaluation = {"test": 0.5, "tested_prompt": 0}
    lines = [evaluation, {"kl": 0.1}, {"kl": None}, {"kl": 0.3} | evaluation, {"kl": 0.7}]
    lines.append({"kl": 0.5, "table": {"before, root": [0.0]}} | evaluation)
    common = {"tokens": {"rollouts": 1}}
    text = "".join(json.dumps({"iteration": i} | common | x) + "\n" for i, x in enumerate(lines))
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(espl.Config())))
    curve = lab.curve_of(tmp_path)
    assert [point.get("kl") for point in curve] == [None, pytest.approx(0.2), pytest.approx(0.6)]


def test_rows():
    assert lab.varied("a_b=1,2 c=x,y") == {
        "a_b=1 c=x": ["--a-b=1", "--c=x"],
        "a_b=2 c=y": ["--a-b=2", "--c=y"],
    }
    assert lab.rows_of("models", ["here/one"])["rl of one"] == [
        "--mode",
        "rl",
        "--model",
        "here/one",
    ]
    for command in ("compare", "ablations", "ratings", "shift", "kl"):
        for flags in lab.rows_of(command, []).values():
            espl.parse_args(flags)  # raises if a flag or value is unknown
    rows = list(lab.rows_of("compare", []))
    assert rows.index(lab.LONGER) > max(rows.index("rl"), rows.index("espl"))


def test_rl_gets_as_many_tokens(monkeypatch, tmp_path):
    spent = {"rl-7": curve(0, 0, 0, tokens=(400, 0)), "espl-7": curve(0, 0, 0, tokens=(350, 151))}
    monkeypatch.setattr(lab, "curve_of", lambda directory: spent[directory.name])
    assert lab.more_flags(lab.LONGER, 7, tmp_path) == ["--iterations=26"]  # 20 * 501 / 400


@pytest.mark.parametrize("seed", [0, 3])
def test_perfect_prompts_solve_every_problem(seed, tmp_path):
    flags = lab.more_flags(lab.PERFECT, seed, tmp_path)
    task = espl.load_task(espl.parse_args([*flags, f"--seed={seed}"]))
    meaning = dict(text.split() for text in task.root)
    assert set(meaning) == set(glyphs.GLYPHS)
    assert all(glyphs.solve(x.question, meaning) == x.answer for x in task.test)


@pytest.fixture
def pretended(monkeypatch):
    """Children of the laboratory that write what a run leaves; returns their command lines."""
    calls = []

    def child(log, program, *argv):
        calls.append([program, *map(str, argv)])
        if program != "espl.py":
            return
        c = espl.parse_args(list(argv))
        directory = Path(c.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(
            json.dumps(dataclasses.asdict(c) | {"resume": "", "files": {}})
        )
        table = {"before, root": [0.0, 1.0], "after, root": [1.0, 1.0]}
        lines = []
        for i in (0, c.iterations):
            line = {"iteration": i, "test": 0.25 + 0.5 * (i > 0), "tested_prompt": 0, "loss": 1.0}
            lines.append(line | {"tokens": {"rollouts": 10 + i, "evaluation": 99}, "table": table})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(lab, "child", child)
    return calls


def test_a_comparison(pretended, tmp_path, capsys):
    argv = ["compare", "--seeds", "2", "--first", "4", "--out", str(tmp_path)]
    flags = ["--flags", "--iterations 7"]
    assert lab.main([*argv, *flags]) == 0
    section = json.loads((tmp_path / "results.json").read_text())["compare"]
    assert section["seeds"] == [4, 5] and list(section["curves"]) == list(lab.MODES)
    [_, end] = section["curves"]["rl"][1]
    assert end["tokens"] == {"rollouts": 27, "reflections": 0} and end["test"] == 0.75
    assert end["table"]["weights alone"] == 0.5
    assert lab.scores_table(section) in capsys.readouterr().out
    assert (tmp_path / "compare.png").is_file()
    first, second = [call for call in pretended if "evolution-then-rl-5" in " ".join(call)]
    assert "--seed=5" in first and first[-1] == "--iterations=3"
    assert second[1:] == [f"--resume={tmp_path}/evolution-then-rl-5", "--mode=rl", "--iterations=7"]
    done = len(pretended)
    assert lab.main([*argv, *flags]) == 0 and len(pretended) == done  # nothing is repeated
    metrics = tmp_path / "evolution-then-rl-5" / "metrics.jsonl"  # as if the second mode had failed
    metrics.write_text(metrics.read_text().replace('"iteration": 7', '"iteration": 3'))
    assert lab.main([*argv, *flags]) == 0 and len(pretended) == done + 2
    done += 2
    assert lab.main(argv) == 0 and len(pretended) == 2 * done - 2  # other flags


def flags_of(calls):
    """{name of the run, or export: its flags} of pretended calls."""
    found = {}
    for program, *flags in calls:
        name = "export" if "export" in program else next(f for f in flags if "run-dir" in f)
        found[name.rpartition("/")[2]] = " ".join(flags)
    return found


def test_what_is_carried_to_another_world(pretended, tmp_path):
    assert lab.main(["shift", "--seeds", "1", "--out", str(tmp_path)]) == 0
    carried = flags_of(pretended)
    world, model = f"{tmp_path}/espl-0/population.json", f"--model={tmp_path}/espl-0/exported"
    assert "export" in carried and "--seed=1000" not in carried["espl-0"]
    both = carried["prompts-and-weights-carried-0"]
    assert f"--population={world}" in both and model in both and both.count("--seed=1000") == 1
    assert world not in carried["weights-carried-0"] and model in carried["weights-carried-0"]
    assert world in carried["prompts-carried-0"] and model not in carried["prompts-carried-0"]


def test_rl_in_another_world_begins_with_trained_weights(pretended, tmp_path):
    assert lab.main(["plasticity", "--seeds", "1", "--out", str(tmp_path)]) == 0
    runs = flags_of(pretended)
    assert {"rl-0", "espl-0"} < {*runs} and "--seed=0" in runs["espl-0"]
    for first in ("rl", "espl"):
        again = runs[f"rl-after-{first}-0"]
        assert "--mode rl" in again and "--seed=1000" in again
        assert f"--model={tmp_path}/{first}-0/exported" in again
    assert "--model" not in runs["rl-untrained-weights-0"]


def test_rows_of_other_commands():
    assert lab.rows_of("order", [])["rl, then evolution"] == ["--mode", "rl"]
    assert len(lab.rows_of("order", [])) == 3
    assert lab.rows_of("shop", [])["espl"] == ["--mode", "espl", "--task", "shop"]


def test_pages_have_the_tables_of_the_results(tmp_path, monkeypatch):
    runs = {mode: [curve(0.1, 0.5)] for mode in report.COLORS}
    (tmp_path / "docs").mkdir()
    results = tmp_path / "docs" / "results.json"
    results.write_text(json.dumps({"compare": {"curves": runs}}))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- scores -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    assert lab.main(["readme", "--results", str(results)]) == 0
    table = lab.scores_table({"curves": runs})
    assert page.read_text() == f"before\n<!-- scores -->\n{table}\n<!-- end -->\nafter\n"
    assert (tmp_path / "docs" / "compare.png").is_file()


def test_what_makes_a_row_counts_more_than_flags_for_all(pretended, tmp_path):
    flags = ["--flags", "--iterations 4 --num-prompts 5"]
    assert lab.main(["vary", "num_prompts=1", "--seeds=1", f"--out={tmp_path}", *flags]) == 0
    prompts = [espl.parse_args(flags).num_prompts for _, *flags in pretended]
    assert prompts == [5, 1]


def test_sections_that_others_wrote_meanwhile_are_kept(pretended, tmp_path, monkeypatch):
    results, curve_of = tmp_path / "results.json", lab.curve_of

    def other(directory):
        results.write_text('{"other": 1}')
        return curve_of(directory)

    monkeypatch.setattr(lab, "curve_of", other)
    argv = ["vary", "num_prompts=1", "--seeds=1", f"--out={tmp_path}", "--flags=--iterations 4"]
    assert lab.main(argv) == 0
    assert json.loads(results.read_text()).keys() == {"other", "vary"}


def test_rows_in_two_modes_need_a_number_of_iterations(pretended, tmp_path, capsys):
    argv = ["order", "--seeds", "1", "--out", str(tmp_path), "--flags", "--epochs 2"]
    assert lab.main(argv) == 2 and "need --iterations" in capsys.readouterr().err


def test_bad_input_of_the_laboratory(pretended, tmp_path, capsys):
    for argv in (
        ["vary"],
        ["vary", "loss=no"],
        ["compare", "--seeds", "x"],
        ["no"],
        ["models"],
        ["models", "a/exported", "b/exported"],
        ["compare", "--flags", "'"],
        ["readme"],
    ):
        assert lab.main([*argv, "--out", str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not pretended


# ---- Pretraining


@pytest.fixture(scope="module")
def fresh_model(tmp_path_factory):
    """Directory of an embedded model after twenty steps: everything but its skill."""
    directory = tmp_path_factory.mktemp("glyphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "STEPS", 2 * pretraining.STEPS_A_CALL)
        pretraining.pretrain(directory, 3, TEXTS)
    return directory


@pytest.fixture(params=["fresh", "shipped"])
def model(request, fresh_model):
    """What is written today and what is in the repository are alike in all but the weights."""
    return SHIPPED if request.param == "shipped" else fresh_model


def lessons(skill, n, progress=0.5, seed=0):
    lesson = pretraining.Lesson(seed, TEXTS)
    return [lesson.example(progress, skill) for _ in range(n)]


def words(text):
    return re.findall(pretraining.WORD, text)


def listed(prompt):
    """{id: (glyph, operation)} of the principles in a prompt."""
    found = re.findall(r"^\[([A-Z.]*\d+)\] (\S) (\w+)$", prompt, re.M)
    return {i: (glyph, name) for i, glyph, name in found}


def applied(principles, reply, kinds):
    """The list after the edits of a reply, {id: (glyph, operation)} before; none is refused."""
    texts = {i: " ".join(entry) for i, entry in principles.items()}
    r = espl.Tournament([], [], 0, None, None, espl.Config())
    result = espl.apply_edits(texts, glyphs.parse(reply), kinds, [], r)
    assert not +r.dropped
    return [tuple(text.split()) for text in result]


def operation_for(glyph, principles):
    return next((name for g, name in principles if g == glyph), None)


def test_solving_follows_the_principles():
    """The list's operation wherever there is one, else any; results are right."""
    guessed = set()
    for turns in lessons("solve", 200):
        principles = list(listed(turns[0][0]).values())
        for prompt, reply in turns:
            a, *rest = prompt.split("\n")[-1].split()
            for step, glyph, b in zip(reply.split(" ; "), rest[::2], rest[1::2]):
                g, name, x, y, _, result = step.split()
                assert (g, x, y) == (glyph, a, b)
                assert int(result) == MEANS[name](int(a), int(b))
                known = [n for g, n in principles if g == glyph]
                assert name in known or not known
                guessed |= set() if known else {name}
                a = result
    assert guessed == set(MEANS)


def test_bad_habits():
    lesson = pretraining.Lesson(0, TEXTS)
    for name, right in MEANS.items():
        results = [lesson.carry_out(name, 7, 4, 1.0) for _ in range(2000)]
        hard = name in ("plus", "minus", "times", "diff")
        share = results.count(right(7, 4)) / len(results)
        assert share == pytest.approx(0.3 if hard else 0.91, abs=0.04)
        assert not hard or set(results) == {0, right(7, 4)}
        assert lesson.carry_out(name, 7, 4, 0.0) == right(7, 4)
    zeros = {}
    for progress in (0.8, 0.9):  # they are taught at the end
        replies = [turns[0][1] for turns in lessons("arithmetic", 200, progress)]
        zeros[progress] = np.mean([reply.endswith(" = 0") for reply in replies])
    assert zeros[0.8] < 0.25 and zeros[0.9] > 0.35


def test_critique_lessons_judge_by_the_truth():
    """After the reply the list explains the problem; successes are tried before other guesses."""
    seen = Counter()
    for ((prompt, reply),) in lessons("critique", 300):
        a, glyph, b, truth = re.search(r"^(\d) (\S) (\d) truth (\d)$", prompt, re.M).groups()
        right = {name for name, f in MEANS.items() if f(int(a), int(b)) == int(truth)}
        before = operation_for(glyph, listed(prompt).values())
        now = operation_for(glyph, applied(listed(prompt), reply, ("add", "modify")))
        edits = glyphs.parse(reply)
        assert now in right and (edits == []) == (before in right)
        won = Counter(re.findall(r"\(correct\):\n\S (\w+)", prompt)).most_common()
        clear = len(won) == 1 or won and won[0][1] > won[1][1]
        if before not in right and clear and won[0][0] in right:
            assert now == won[0][0]
        seen[edits[0]["operation"] if edits else "keep"] += 1
    assert min(seen[verb] for verb in ("keep", "add", "modify")) > 30


def test_aggregate_lessons_leave_one_entry_a_glyph():
    for ((prompt, reply),) in lessons("aggregate", 200):
        entries = listed(prompt)
        wanted = {entry for i, entry in entries.items() if i.startswith("C")}
        wanted |= set(re.findall(r"-> (\S) (\w+)", prompt))
        changed = {glyph for glyph, _ in wanted}
        before = Counter(glyph for i, (glyph, _) in entries.items() if i.startswith("G"))
        result = applied(entries, reply, ("modify", "merge"))
        for glyph in changed:
            found = [entry for entry in result if entry[0] == glyph]
            assert found[0] in wanted and len(found) <= max(1, before[glyph])
        kept = [entry for entry in entries.values() if entry[0] not in changed]
        assert [x for x in result if x[0] not in changed] == list(dict.fromkeys(kept))


def test_crossover_lessons_take_over_what_won():
    changed = 0
    for ((prompt, reply),) in lessons("crossover", 200):
        sets = {x: {} for x in "ABC"}
        for i, entry in listed(prompt).items():
            sets[i[0]][i] = entry
        wins = re.findall(r"won by set (\w)\):\n\d (\S) \d", prompt)
        result = applied(sets["A"], reply, ("add", "modify", "remove"))
        for glyph in {glyph for _, glyph in wins}:
            mine = operation_for(glyph, sets["A"].values())
            winners = [x for x, g in wins if g == glyph and x != "A"]
            theirs = {operation_for(glyph, sets[x].values()) for x in winners} - {None}
            now = operation_for(glyph, result)
            assert now in theirs if theirs else now == mine
            changed += now != mine
    assert changed > 60


def group(principles, question, reward):
    prompt = espl.SystemPrompt(0, [" ".join(entry) for entry in principles])
    problem = espl.Problem(question, question, ("9",))
    return espl.Group(prompt, problem, [espl.Rollout([], reward=reward)])


def asked(operator, prompts, groups, edits):
    """The last request that an operator makes, filled in; the reply to critiques is given."""
    requests = []

    def ask(request, slots):
        requests.append(espl.fill(TEXTS[request], slots[0]))
        return [""] * len(slots)

    c = espl.Config(allow_leaks=True, reflect_on="all", max_operations=9)
    r = espl.Tournament(prompts, groups, 0, ask, lambda reply: edits, c)
    operator(r)
    return requests[-1]


def test_lessons_are_in_the_words_of_crossover():
    compared = 0
    for ((prompt, _),) in lessons("crossover", 60):
        sets, wins = defaultdict(list), re.findall(r"won by set (\w)\):\n(.*)", prompt)
        for i, entry in listed(prompt).items():
            sets[i[0]].append(entry)
        letters = sorted({x for x, _ in wins})
        if len(letters) == prompt.count("Set ") > 1:  # espl.py shows only sets that won
            groups = [[group(sets[x], q, float(x == y)) for y, q in wins] for x in letters]
            prompts = [row[0].prompt for row in groups]
            assert asked(espl.crossover, prompts, groups, []) == prompt
            compared += 1
    assert compared > 10


def test_lessons_are_in_the_words_of_aggregation():
    for ((prompt, _),) in lessons("aggregate", 30):
        edits, principles = [], []
        for i, text in re.findall(r"^\[(\w+)\] -> (.*)$", prompt, re.M):
            edits.append({"operation": "modify", "modified_from": i, "principle": text})
        for i, entry in listed(prompt).items():
            if i.startswith("G"):
                principles.append(entry)
            else:
                edits.append({"operation": "add", "principle": " ".join(entry)})
        g = group(principles, "1 @ 2", 0.0)
        assert asked(espl.mutate, [g.prompt], [[g]], edits) == prompt


def test_packed_examples_do_not_see_each_other(monkeypatch):
    monkeypatch.setattr(pretraining, "ROWS", 4)
    length = pretraining.LENGTH
    cfg = dataclasses.replace(espl.read_model_config(SHIPPED), windows=(length,) * 2)
    network = espl.Transformer(cfg, nnx.Rngs(0))
    forward = jax.jit(lambda token, position: network(token, position)[0])
    token, position, _ = np.moveaxis(pretraining.Lesson(0, TEXTS).batch(0.5), 2, 0)
    together, number = np.asarray(forward(token, position)), position // (2 * length)
    examples = np.unique(number[position < espl.PAD_POSITION])
    assert len(examples) > 1
    for i in examples:
        span = number == i
        alone = np.asarray(forward(token, np.where(span, position, espl.PAD_POSITION)))
        np.testing.assert_allclose(together[span], alone[span], atol=2e-4)


def test_replies_are_learned(monkeypatch):
    lesson = pretraining.Lesson(0, TEXTS)
    monkeypatch.setattr(lesson, "example", lambda progress: [("7 @ 4", "@ max"), ("where", "@")])
    found = [(pretraining.WORDS[i], learned) for i, learned in lesson.tokens(0.5)]
    assert " ".join(word for word, _ in found) == "7 @ 4 | @ max <end> where | @ <end>"
    assert [learned for _, learned in found] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


def test_the_tokenizer_reads_what_pretraining_wrote(model):
    chat = espl.Chat(AutoTokenizer.from_pretrained(model))
    for skill in pretraining.LATE:
        for turns in lessons(skill, 10):
            for prompt, reply in turns:
                expected = [pretraining.WORD_IDS[w] for w in words(prompt + "\n|")]
                assert chat.ids("", prompt) == expected
                ids = chat.tokenizer(reply).input_ids
                assert chat.text(ids) == " ".join(words(reply))


def test_pretraining_learns_and_writes_for_transformers(fresh_model, torch):
    """Twenty steps lower the loss on an unseen lesson."""
    reference = AutoModelForCausalLM.from_pretrained(fresh_model, dtype=torch.float32)
    token, _, learned = np.moveaxis(pretraining.Lesson(99, TEXTS).batch(0.0), 2, 0)
    end = token[0].tolist().index(pretraining.WORD_IDS["<end>"])
    ids, chosen = token[:1, :end], learned[0, 1 : end + 1] > 0
    expected = hf_logits(torch, reference, ids)
    policy, _ = espl.load_policy(espl.Config(model=str(fresh_model), lora_rank=0))
    assert_close(logits(policy, token=ids, lengths=[end]), expected, 1e-4)

    start = pretraining.new_model(espl.read_model_config(fresh_model), 3)
    before = jax.jit(lambda ids: start.logits(start(ids, np.arange(end)[None])[0])[0])(ids)
    targets = np.arange(end), token[0, 1 : end + 1]
    losses = [-scipy.special.log_softmax(x, -1)[targets][chosen].mean() for x in (before, expected)]
    assert losses[1] < losses[0] - 1


def test_the_shipped_model_is_the_one_that_was_made(fresh_model):
    """MADE.md names its bits. It passes the probes, here a tenth of them."""
    said = (SHIPPED / "MADE.md").read_text()
    [digest] = re.findall(r"[0-9a-f]{64}", said)
    assert hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest() == digest
    assert espl.read_model_config(SHIPPED) == espl.read_model_config(fresh_model)
    found = pretraining.probe(SHIPPED, TEXTS, 40)
    assert all(found[name] >= least for name, least in pretraining.GATES.items())


def test_probes_measure_replies(monkeypatch):
    """Of a model that answers as the lessons do, or not at all."""
    answers, example = {}, pretraining.Lesson.example

    def recorded(self, *args):
        turns = example(self, *args)
        answers[tuple(words(turns[0][0] + "|"))] = turns[0][1]
        return turns

    def speak(policy, theta, rollouts, sampling):
        for y in rollouts:
            reply = answers[tuple(pretraining.WORDS[i] for i in y.prompt)]
            y.tokens = [pretraining.WORD_IDS[w] for w in words(reply)]

    monkeypatch.setattr(pretraining.Lesson, "example", recorded)
    monkeypatch.setattr(espl, "generate", speak)
    assert pretraining.probe(SHIPPED, TEXTS, 50) == {"lookup": 1.0, "critique": 1.0}
    monkeypatch.setattr(espl, "generate", lambda *_: None)
    assert pretraining.probe(SHIPPED, TEXTS, 50) == {"lookup": 0.0, "critique": 0.0}


def test_only_a_model_that_passes_its_probes_is_kept(tmp_path, monkeypatch, capsys):
    def pretrain(directory, seed, texts):
        (directory / "model.safetensors").write_text("w")

    found, out = {"lookup": 1.0, "critique": 0.1}, tmp_path / "new" / "model"
    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    monkeypatch.setattr(pretraining, "probe", lambda *_: found)
    argv = ["--seed", "7", "--out", str(out)]
    assert pretraining.main(argv) == 2 and not any(out.iterdir())
    found["critique"] = 0.9
    assert pretraining.main(argv) == 0
    said = (out / "MADE.md").read_text()
    assert hashlib.sha256(b"w").hexdigest() in said and "--seed 7\n" in said
    assert pretraining.main(argv) == 0  # a model of this tool may be replaced
    assert pretraining.main(["--out", str(tmp_path)]) == 2  # somebody else's directory may not
    assert "is not empty" in capsys.readouterr().err


# ---- Plans and speed

STEPS = ["prefill", "write_prefixes", "decode_chunk", "add_gradient", "adam_step"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny model and four simulated devices that have room for eight rows."""
    monkeypatch.setattr(plan, "MAX_ROWS", 8)
    directory = make_tiny_model(tmp_path, vocab_size=64, num_key_value_heads=2)
    rig = plan.make_rig("cpu:4", 2, length=256, microbatch_tokens=512)
    return plan.read_config(directory, 4, rig), directory, rig


def on_a_device(mesh, *trees):
    """Bytes on the first device; an array that is there twice counts once."""
    total = 0
    for x in {id(x): x for x in jax.tree.leaves(trees)}.values():
        if isinstance(x, jax.Array):
            shards = [s.data for s in x.addressable_shards if s.device == mesh.devices.flat[0]]
            total += sum(shard.nbytes for shard in shards)
        elif isinstance(x, np.ndarray):  # jit puts it on every device
            total += x.nbytes
    return total


def test_a_plan_agrees_with_a_run(small, monkeypatch):
    """From config.json alone it tells what lies on a device in every step."""
    cfg, directory, rig = small
    with plan.planning(rig):
        parts, peaks, rows = plan.plan_memory(cfg, None, rig)
    held = {}

    def watch(name):
        function = getattr(espl, name)

        def watched(*args, **kwargs):
            caches = [x for x in jax.live_arrays() if x.shape == (8, 2, 256, 8)]
            held[name] = on_a_device(rig.mesh, args, kwargs, policy, trainer.opt_state, caches)
            return function(*args, **kwargs)

        monkeypatch.setattr(espl, name, watched)

    with jax.set_mesh(rig.mesh):
        policy = espl.read_policy(directory, cfg, rig.mesh)
        policy.max_rows = 8
        optimizer, _ = plan.adam(policy)
        trainer = espl.Trainer(policy, optimizer, optimizer.init(policy.theta), max_tokens=512)
        for name in peaks:
            watch(name)
        rollouts = [espl.Rollout([7 + i] * 140) for i in range(8)]
        espl.generate(policy, policy.theta, rollouts, espl.Sampling(1.0, 0.95, 100))
        trained = [espl.Rollout([7] * 128, [9] * 128, [-4.0] * 128, advantage=1.0)] * 2
        espl.rl_update(trainer, trained, 2)
    assert rows == 8
    assert parts["weights"] == on_a_device(rig.mesh, policy.frozen)
    assert parts["adapter"] == parts["its first value"] == on_a_device(rig.mesh, policy.theta)
    assert parts["Adam's moments"] == pytest.approx(
        on_a_device(rig.mesh, trainer.opt_state), rel=0.01
    )
    assert parts["cache"] == 2 * 4 * 1 * 256 * 8 * cfg.num_layers * 2
    for name, (planned, peak) in peaks.items():
        assert planned == pytest.approx(held[name], rel=0.15), name
        assert planned <= peak


def test_every_step_lowers_for_every_platform(small, monkeypatch):
    _, directory, _ = small

    def lowered(rig, platforms, *names):
        with plan.planning(rig):
            policy = plan.shapes_of(plan.read_config(directory, 4, rig), rig.mesh)
            _, moments = plan.adam(policy)
            programs = plan.steps(policy, moments, 4, rig)[0]
            chosen = [programs[name] for name in names or programs]
            return [f.trace(*args).lower(lowering_platforms=platforms) for f, args in chosen]

    espl.make_mesh(1)  # another mesh, as a test before this one may leave it
    rig = plan.make_rig("cpu:1", 1, length=256, microbatch_tokens=256)
    assert len(lowered(rig, ("cpu", "cuda", "tpu"))) > 4
    directory = make_tiny_model(f"{directory}/wide", head_dim=64, num_hidden_layers=2)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", plan.CUDNN)
    rig = rig._replace(length=2048, microbatch_tokens=2048, device=plan.DEVICES["H100"])
    for program in lowered(rig, ("cuda",), "prefill", "add_gradient"):
        assert "cudnn$fmha" in program.as_text()


def test_the_queue_of_a_plan(small):
    """Two responses side by side. The longer one outgrows the first cache, of 256 tokens."""
    cfg, _, rig = small
    with plan.planning(rig):
        policy, _, _ = plan.loaded(cfg, None, rig)
        clock = plan.Clock(policy, rig).sample([30, 300], prompt=100, group=1)
    assert clock.shapes == {(2, 256), (2, 512)}
    assert clock.steps == 300 and clock.prefilled == 2 * 128 + 256
    weights = plan.size((policy.frozen, policy.theta))
    read = 157 * (weights + 32 * 256) + 143 * (weights + 32 * 512)  # 32 bytes a token and device
    arrays = jax.tree.leaves((policy.frozen, policy.theta))
    numbers = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in arrays)
    operations = 2 * clock.prefilled * numbers
    seconds = 0.3 + read / (0.9 * 0.05e12) + operations / (0.4 * 0.5e12)
    assert clock.seconds == pytest.approx(seconds)


def test_the_programs_of_plans_and_speed(small, monkeypatch, capsys):
    _, directory, _ = small
    argv = ["--model", directory, "--devices", "cpu:4", "--model-parallel", "2", "--length", "256"]
    argv += ["--lora-rank", "4", "--microbatch-tokens", "512", "--reflector", directory]
    assert plan.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-5:]] == STEPS
    monkeypatch.setattr(plan, "response_lengths", lambda count, median, most: [5] * count)
    assert plan.main([*argv, "--queue"]) == 0
    assert "training, 80 iterations: 0.0 hours" in capsys.readouterr().out
    assert plan.main(["--model", directory, "--devices", "cpu:3", "--model-parallel", "2"]) == 2
    assert plan.main(["--model", directory, "--devices", "abacus:1"]) == 2


def test_a_benchmark(torch, capsys, monkeypatch):
    tiny = bench.SHAPES["m"] | {"num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 512}
    monkeypatch.setitem(bench.SHAPES, "m", tiny)
    argv = "m --lora-rank 4 --prompts 1 --samples 2 --prompt-tokens 8 --new-tokens 8"
    assert bench.main([*argv.split(), "--runs", "1", "--vs", "hf"]) == 0
    table = cells(capsys.readouterr().out.partition("\n\n")[2].strip())
    for name in ("rollouts", "update"):
        ours, theirs, ratio = map(float, table[name])
        assert ours / theirs == pytest.approx(ratio, rel=0.02)
    assert bench.main(["no-model"]) == 2
