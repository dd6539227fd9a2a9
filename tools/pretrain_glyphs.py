"""Pretrains the model of the embedded world (tasks/glyphs.py), a directory in Hugging Face layout.

    python tools/pretrain_glyphs.py                              # tasks/glyphs_model, some minutes
    python tools/pretrain_glyphs.py --seed 7 --out runs/model7   # for espl.py --model runs/model7

The model, a Llama of 146,000 weights and 106 words, learns from lessons that are made on the spot:
to look principles up in a list, to solve problems by them, and to reflect as espl.py asks it to.
Every lesson draws anew what the glyphs mean, so the model learns the language and no meaning. The
last lessons teach bad habits in carrying operations out, which RL can cure and no principle can.
A model is kept only if it passes two probes. MADE.md, beside the weights, says how they were made
and what their hash is.
"""

import dataclasses
import hashlib
import importlib.metadata
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from report import new_parser, run_tool  # noqa: E402

import espl  # noqa: E402

glyphs = espl.task_module("glyphs")
OPERATIONS = list(glyphs.OPERATIONS)
HARD = ("plus", "minus", "times", "diff")
WORDS = ["<end>", "|", ";", "=", "->", *"0123456789", *glyphs.GLYPHS, *OPERATIONS, *"ABCDE"]
WORDS += ["correct", "wrong", "attempt", "truth", "none", "infer", "is", "so"]
WORDS += ["keep", "add", "modify", "merge"]
WORDS += ["summarize", "critique", "aggregate", "crossover", "where", "quote"]
WORDS += [f"[{letter}{i}]" for letter in ("G", "A.G", "C") for i in range(16)]
WORD_IDS = {word: i for i, word in enumerate(WORDS)}


def pattern_of(word):
    """A regular expression for a word, but not in "Set B:" and "Attempt 3 (correct)"."""
    return rf"\b{word}\b(?!:| \()" if word.isalnum() else re.escape(word)


# The tokenizer takes these words out of a text and passes over everything else.
WORD = "|".join(map(pattern_of, sorted(WORDS, key=len, reverse=True)))
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}|"

STEPS, ROWS, LENGTH = 5000, 5, 192  # of pretraining: steps, and the shape of a batch
STEPS_A_CALL = 10
EARLY = {"recall": 72, "solve": 14, "arithmetic": 6, "infer": 8}  # shares of the skills
LATE = {
    "recall": 10,
    "solve": 22,
    "arithmetic": 4,
    "infer": 8,
    "summarize": 3,
    "critique": 22,
    "aggregate": 17,
    "crossover": 14,
}
GATES = {"lookup": 0.9, "critique": 0.75}  # what a model must reach in `probe`


# ---- Lessons: (prompt, reply) examples of all that the model must know


def first_words(text):
    return " ".join(text.split()[:2])


def quote(principles, glyph):
    """The first principle about a glyph as it is listed, "[G3] @ max", or "none"."""
    for i, text in principles.items():
        if text[0] == glyph:
            return espl.listing({i: text})
    return "none"


def change(entry, glyph, name):
    """The edit after which a list, whose entry on the glyph is given, says that it means `name`."""
    if entry == "none":
        return f"add {glyph} {name}"
    if entry.endswith(f" {name}"):
        return "keep"
    return f"modify {entry.split()[0]} {glyph} {name}"


class Lesson:
    """Writes examples in the very words of the requests that the reflector gets."""

    def __init__(self, seed, texts):
        self.rng, self.texts = random.Random(f"lesson/{seed}"), texts
        self.waiting = []  # an example that did not fit into the last row
        self.looks_up = False  # set when the model has learned to look principles up

    def example(self, progress, skill=""):
        """(prompt, reply) turns that exercise a skill; progress in [0, 1] through pretraining.

        At first the model looks things up in longer and longer lists, until it can. Then there is
        everything, and at last there are bad habits.
        """
        shares = LATE if self.looks_up or progress > 0.3 else EARLY
        self.longest = round(12 * min(1, 0.15 + progress / 0.1))
        self.slips = 1.0 if progress > 0.82 else 0.0
        self.meaning = glyphs.draw_meaning(self.rng)
        if not skill:
            [skill] = self.rng.choices(list(shares), shares.values())
        return getattr(self, skill)()

    def operation(self):
        return self.rng.choice(OPERATIONS)

    def problem(self, steps=1):
        text = f"{self.rng.randrange(10)}"
        for _ in range(steps):
            text += f" {self.rng.choice(glyphs.GLYPHS)} {self.rng.randrange(10)}"
        return text

    def principles(self, right=0.6, least=0):
        """A list of principles, each true with probability `right`.

        In one list of six a glyph comes twice.
        """
        count = self.rng.randint(least, max(least, self.longest))
        chosen = self.rng.sample(glyphs.GLYPHS, count)
        twice = self.rng.choice((0, 0, 0, 0, 0, 1))
        chosen += self.rng.sample(chosen, min(len(chosen), twice))
        texts = []
        for glyph in chosen:
            true = self.rng.random() < right
            texts.append(f"{glyph} {self.meaning[glyph] if true else self.operation()}")
        return texts

    def carry_out(self, name, a, b, slips):
        """The result of an operation; slips: how strong the bad habits are, in [0, 1].

        With all of them the model writes 0 instead of 70 % of the hard operations. No operation
        always yields 0, so no wrong principle helps. Of the other operations 10 % go astray.
        """
        if self.rng.random() < slips * (0.7 if name in HARD else 0.1):
            return 0 if name in HARD else self.rng.randrange(10)
        return glyphs.OPERATIONS[name](a, b)

    def work(self, problem, principles, slips, ignored):
        """A solution. An operation is guessed where no principle applies, or where it is ignored,
        which happens with probability `ignored`."""
        a, *rest = problem.split()
        steps = []
        for glyph, b in zip(rest[::2], rest[1::2]):
            known = []
            for text in principles:
                if text[0] == glyph and self.rng.random() >= ignored:
                    known.append(text.split()[1])
            name = self.rng.choice(known or OPERATIONS)
            result = self.carry_out(name, int(a), int(b), slips)
            steps.append(f"{glyph} {name} {a} {b} = {result}")
            a = result
        return " ; ".join(steps)

    def solve(self):
        """One to four problems of one or two steps under the same principles."""
        principles = self.principles()
        problems = [self.problem(self.rng.randint(1, 2)) for _ in range(self.rng.randint(1, 4))]
        replies = [self.work(p, principles, self.slips, 0.1 * self.slips) for p in problems]
        if principles:
            problems[0] = f"{espl.listing(espl.numbered(principles))}\n{problems[0]}"
        return list(zip(problems, replies))

    def arithmetic(self):
        """Three operations to carry out."""
        steps = []
        for _ in range(3):
            steps.append((self.operation(), self.rng.randrange(10), self.rng.randrange(10)))
        done = [
            f"{name} {a} {b} = {self.carry_out(name, a, b, self.slips)}" for name, a, b in steps
        ]
        return [(" ".join(f"{name} {a} {b}" for name, a, b in steps), " ; ".join(done))]

    def recall(self):
        """What a list says about some glyphs: the operations, or whole entries."""
        ids = espl.numbered(self.principles(least=1), self.rng.choice(("", "", "A.")))
        asked = self.rng.sample(glyphs.GLYPHS, self.rng.randint(1, 12))
        if self.rng.random() < 0.6:
            reply = " ".join(f"{glyph} {quote(ids, glyph).split()[-1]}" for glyph in asked)
            return [(f"{espl.listing(ids)} where {' '.join(asked)}", reply)]
        asked = asked[:6]
        reply = " ; ".join(f"{glyph} {quote(ids, glyph)}" for glyph in asked)
        return [(f"{espl.listing(ids)} quote {' '.join(asked)}", reply)]

    def search(self, problem, truth, first=()):
        """Operations tried in turn, those in `first` before others, until one gives the truth.

        Returns the text, and the last operation.
        """
        a, _, b = problem.split()
        tried = []
        for name in dict.fromkeys([*first, *self.rng.sample(OPERATIONS, len(OPERATIONS))]):
            result = str(glyphs.OPERATIONS[name](int(a), int(b)))
            tried.append(f"{name} {a} {b} is {result} truth {truth}")
            if result == truth:
                break
        return " ; ".join(tried), name

    def infer(self):
        """Three times: which operation explains the answer to a problem?"""
        turns = []
        for _ in range(3):
            problem = self.problem()
            truth = glyphs.solve(problem, {problem[2]: self.operation()})
            reply = " so ".join(self.search(problem, truth))
            turns.append((f"{problem} truth {truth} infer", reply))
        return turns

    def grade(self, work, truth):
        return "correct" if work.endswith(truth) else "wrong"

    def request(self, name, slots, reply):
        """A request as espl.py would make it, with its reply."""
        return [(espl.fill(self.texts[name], slots), reply)]

    def summarize(self):
        problem = self.problem()
        truth = glyphs.solve(problem, self.meaning)
        work = self.work(problem, self.principles(), self.rng.choice((0, 0.5, 1)), 0.1)
        grade = self.grade(work, truth)
        slots = {"problem": problem, "answer": truth, "response": work, "grade": grade}
        return self.request("summarize", slots, first_words(work))

    def critique(self):
        """A principle that gives the truth stays, whatever slips there were. Else the model tries
        what succeeded most often, then everything else."""
        rng, principles, problem = self.rng, self.principles(), self.problem()
        if principles and rng.random() < 0.6:
            problem = f"{problem[0]} {rng.choice(principles)[0]} {problem[4]}"
        glyph, truth = problem[2], glyphs.solve(problem, self.meaning)
        slips, rollouts, summaries, won = rng.choice((0, 0.5, 1)), [], [], Counter()
        for _ in range(rng.choice((5, 5, 5, 8, rng.randint(1, 15)))):
            work = self.work(problem, principles, slips, 0.1)
            name = self.operation() if rng.random() < 0.05 else work.split()[1]
            outcome = self.grade(work, truth)
            rollouts.append(espl.Rollout([], outcome=outcome))
            summaries.append(f"{glyph} {name}")
            if outcome == "correct":
                won[name] += 1
        entry = quote(espl.numbered(principles), glyph)
        first = [name for name, _ in won.most_common()]
        if entry != "none":
            first.insert(0, entry.split()[-1])
        tried, name = self.search(problem, truth, first)
        edit = change(entry, glyph, name)
        reply = f"{problem} truth {truth} infer {tried} so {glyph} {entry} {edit}"
        asked = espl.Problem(problem, problem, (truth,))
        group = espl.Group(espl.SystemPrompt(0, principles), asked, rollouts)
        slots = espl.critique_slots(group, iter(summaries), espl.Config())
        return self.request("critique", slots, reply)

    def aggregate(self):
        """What was added is merged into what the list already says about its glyph."""
        principles = espl.numbered(self.principles())
        wanted = self.principles(0.75, 1)[: self.rng.randint(1, 6)]
        again = f"{wanted[0][0]} {self.operation()}"
        if self.rng.random() < 0.3:
            wanted.append(again)
        candidates, suggested, modified, merged = dict(principles), [], [], []
        for text in wanted:
            entry = quote(principles, text[0]).split()[0]
            if entry == "none" or self.rng.random() < 0.2:
                candidates[f"C{len(candidates) - len(principles)}"] = text
            else:
                suggested.append(f"{entry} -> {text}")
                modified.append(f"{entry} -> {text} modify {entry} {text}")
        for i, text in candidates.items():
            first = quote(candidates, text[0])
            place = first.split()[0]
            edit = "keep" if place == f"[{i}]" else f"merge {place} [{i}] {text}"
            if i not in principles:
                merged.append(f"[{i}] {text} {first} {edit}")
        slots = {
            "principles": espl.listing(candidates),
            "suggestions": "\n".join(suggested) or "(none)",
        }
        return self.request("aggregate", slots, " ; ".join(merged + modified))

    def crossover(self):
        """Set A takes over what another set, which won a problem, says about its glyph."""
        rng, sets, ids = self.rng, [], {}
        for letter in "ABC"[: rng.randint(2, 3)]:
            principles = self.principles(0.6 if letter == "A" else 0.7)
            ids[letter] = espl.numbered(principles, f"{letter}.")
            sets.append(f"Set {letter}:\n{espl.listing(ids[letter])}")
        wins, clauses = [], {}
        winners = sorted(rng.choices(list(ids), k=rng.randint(1, 8)))
        for b, letter in enumerate(["A", *winners]):
            theirs = list(ids[letter].values())
            about = theirs and rng.random() < 0.8
            glyph = rng.choice(theirs)[0] if about else rng.choice(glyphs.GLYPHS)
            problem = f"{rng.randrange(10)} {glyph} {rng.randrange(10)}"
            wins.append(f"Problem {b} (won by set {letter}):\n{problem}")
            mine, name = quote(ids["A"], glyph), quote(ids[letter], glyph).split()[-1]
            edit = "keep" if name == "none" else change(mine, glyph, name)
            if letter != "A":
                clauses[letter, glyph] = f"{letter} {glyph} {name} {mine} {edit}"
        slots = {"sets": "\n\n".join(sets), "wins": "\n\n".join(wins)}
        return self.request("crossover", slots, " ; ".join(clauses.values()) or "keep")

    def batch(self, progress):
        """Packed examples, [ROWS, LENGTH + 1, 3]: token, position, whether it is learned.

        Replies are learned. The examples in a row lie further apart in position than the attention
        window, so that none sees another.
        """
        rows = np.full((ROWS, LENGTH + 1, 3), (0, espl.PAD_POSITION, 0), np.int32)
        self.waiting = self.waiting or self.tokens(progress)
        for row in rows:
            start = first = 0
            while start + len(self.waiting) <= len(row):
                n = len(self.waiting)
                row[start : start + n, [0, 2]] = self.waiting
                row[start : start + n, 1] = range(first, first + n)
                start, first = start + n, first + 2 * LENGTH
                self.waiting = self.tokens(progress)
        return rows

    def tokens(self, progress):
        """The next example as (token id, whether it is learned), at most LENGTH of them."""
        found = []
        for prompt, reply in self.example(progress):
            found += [(WORD_IDS[word], 0) for word in re.findall(WORD, prompt + "\n|")]
            found += [(WORD_IDS[word], 1) for word in re.findall(WORD, reply + "<end>")]
        return found[:LENGTH]


# ---- Pretraining


def write_shape(directory):
    """Tokenizer, chat template and config.json of the model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(WORD_IDS))  # no other word ever reaches it
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=WORD_IDS["<end>"],
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)


def save_weights(directory, weights):
    """Writes a model's weights (no adapter) as Hugging Face's model.safetensors."""
    from safetensors.numpy import save_file

    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(weights):
        name, x = espl.tensor_name(path), np.asarray(leaf)
        name = name if name == "lm_head.weight" else f"model.{name}"
        kernel = espl.path_name(path).endswith("kernel")  # torch keeps [out, in]
        tensors[name] = np.ascontiguousarray(x.T if kernel else x)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def make_optimizer():
    """Muon for the matrices of the layers, Adam for embeddings and norms."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)

    def matrices(theta):
        return jax.tree.map_with_path(
            lambda path, _: matrix if espl.path_name(path).endswith("kernel") else None, theta
        )

    def rate(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 30, STEPS, peak / 50)

    return optax.contrib.muon(
        rate(0.01),
        adam_learning_rate=rate(0.003),
        adam_b2=0.98,
        muon_weight_dimension_numbers=matrices,
    )


def new_model(cfg, seed):
    """Embeddings have unit size and layers add nothing yet: so looking things up is learned early,
    and for every seed."""
    model = espl.Transformer(cfg, nnx.Rngs(seed))
    model.embed_tokens[...] *= 50.0
    model.norm.weight[...] *= 0.125
    for block in model.layers:
        block.o_proj.kernel[...] *= 0.0
        block.down_proj.kernel[...] *= 0.0
    return model


def pretrain(directory, seed, texts):
    """Pretrains the model from scratch and writes it, in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    write_shape(directory)
    cfg = espl.read_model_config(directory)
    cfg = dataclasses.replace(cfg, windows=(LENGTH,) * cfg.num_layers)  # see Lesson.batch
    graphdef, theta = nnx.split(new_model(cfg, seed), nnx.Param)
    optimizer = make_optimizer()

    def loss(theta, batch_BT3):
        model = nnx.merge(graphdef, theta)
        token, position, learned = jnp.moveaxis(batch_BT3, 2, 0)
        hidden, _ = model(token[:, :-1], position[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), token[:, 1:])
        return jnp.mean(losses, where=learned[:, 1:] > 0)

    def step(state, batch_BT3):
        theta, opt_state = state
        value, gradient = jax.value_and_grad(loss)(theta, batch_BT3)
        updates, opt_state = optimizer.update(gradient, opt_state, theta)
        return (optax.apply_updates(theta, updates), opt_state), value

    steps = jax.jit(partial(jax.lax.scan, step))
    lesson, state, mean_loss = Lesson(seed, texts), (theta, optimizer.init(theta)), np.inf
    for i in espl.progress(range(0, STEPS, STEPS_A_CALL), desc="pretraining"):
        batches = np.stack([lesson.batch((i + j) / STEPS) for j in range(STEPS_A_CALL)])
        lesson.looks_up |= mean_loss < 0.45
        state, losses = steps(state, batches)
        mean_loss = float(np.mean(losses))
    save_weights(directory, state[0])


# ---- Probes: what a pretrained model can do, by what it writes


def probe(directory, texts, questions=400):
    """How often it uses the principle about a glyph (lookup), and how often its critique replaces
    a wrong principle, or adds a missing one, by an operation that gives the truth (critique)."""
    policy, chat = espl.load_policy(espl.Config(model=str(directory), lora_rank=0))
    lesson = Lesson(-1, texts)

    def share(examples, temperature, is_right):
        rollouts = [espl.Rollout(chat.ids("", prompt)) for prompt, _ in examples]
        sampling = espl.Sampling(temperature, 1.0, 128, label="probing")
        espl.generate(policy, policy.theta, rollouts, sampling)
        replies = [chat.text(y.tokens) for y in rollouts]
        return float(np.mean([is_right(*x, reply) for x, reply in zip(examples, replies)]))

    solved = [lesson.example(0.5, "solve")[0] for _ in range(questions)]
    critiques = [lesson.example(0.5, "critique")[0] for _ in range(questions)]
    solved = [x for x in solved if first_words(x[1]) in x[0]]
    critiques = [x for x in critiques if not x[1].endswith("keep")]
    return {
        "lookup": share(solved, 0.0, looks_up),
        "critique": share(critiques, 0.5, explains),
    }


def looks_up(prompt, wanted, reply):
    return first_words(wanted) == first_words(reply)


def explains(prompt, wanted, reply):
    """Whether the operation that a critique proposes gives the truth."""
    a, b, truth = re.search(r"(\d) \S (\d) truth (\d)", prompt).groups()
    named = re.search(rf"({'|'.join(OPERATIONS)}) \d \d is \d truth \d so", reply)
    return bool(named) and str(glyphs.OPERATIONS[named[1]](int(a), int(b))) == truth


# ---- The program

MADE = """# How this model was made

    python tools/pretrain_glyphs.py --seed {}

- on: {}
- with: {}
- probes: {}
- sha256 of model.safetensors: {}

The bits depend on these versions and on the processor. With others the command makes another
model, which passes the same probes.
"""


def make(seed, out):
    """Writes the model of a seed, if it passes the probes."""
    with espl.explained(f"cannot write --out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / "MADE.md").is_file():
            raise espl.UserError(f"--out {out} is not empty and holds no model of this tool")
    texts = espl.read_texts(glyphs.PROMPTS, "")
    with tempfile.TemporaryDirectory() as scratch:
        pretrain(Path(scratch), seed, texts)
        found = probe(scratch, texts)
        probes = ", ".join(f"{k} {found[k]:.4f} (at least {GATES[k]})" for k in GATES)
        if any(found[k] < GATES[k] for k in GATES):
            raise espl.UserError(f"the model failed its probes: {probes}; choose another --seed")
        write_made(Path(scratch), seed, probes)
        # Without their modes: safetensors makes files that only their owner can read.
        shutil.copytree(scratch, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    print(f"the model passed its probes: {probes}; written to {out}")


def write_made(directory, seed, probes):
    """MADE.md: how this model was made, and the hash of its weights."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    text = MADE.format(seed, jax.default_backend(), versions, probes, digest)
    (directory / "MADE.md").write_text(text, encoding="utf-8")


def main(argv=None):
    parser = new_parser(__doc__)
    shipped = ROOT / "tasks" / "glyphs_model"
    parser.add_argument("--seed", type=int, default=0, help="of weights and lessons")
    parser.add_argument("--out", type=Path, default=shipped, help="default: tasks/glyphs_model")
    return run_tool(parser, make, argv)


if __name__ == "__main__":
    sys.exit(main())
