"""The executable specification of espl.py: `pytest test_espl.py`. Its models are made on the spot.

The model is compared with transformers, the sampler with a loop that has no cache, the gradient
with finite differences of the objective, written out as a double loop, ratings with the trueskill
package, selection with probabilities worked out by hand, and interrupted runs with one that was not
interrupted, to the bit. `python test_espl.py` writes the line numbers in espl.py's docstring.
"""

import ast
import copy
import dataclasses
import fcntl
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import zlib
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
import trueskill
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from scipy import stats
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import espl

# ==================================================================================================
# Helpers, also of the other test files
# ==================================================================================================

WORDS = ["<unk>", "<s>", "</s>", "system", "user", "assistant", "problem", "\u2028"]
WORDS += [str(n) for n in range(10)]
WORDS += [f"\\boxed{{{'0' * zeros}{n}}}" for n in range(4) for zeros in range(3)]
WORDS += [f"w{n}" for n in range(64 - len(WORDS))]
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_mesh(data=1, model=1):
    """A data x model mesh of the first devices."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=auto, devices=devices)


MEANS = {  # the operations of tasks/glyphs.py, written out independently
    "plus": lambda a, b: int(str(a + b)[-1]),
    "minus": lambda a, b: a - b if a >= b else a - b + 10,
    "times": lambda a, b: int(str(a * b)[-1]),
    "diff": lambda a, b: max(a, b) - min(a, b),
    "max": lambda a, b: a if a > b else b,
    "min": lambda a, b: b if a > b else a,
    "left": lambda a, b: a,
    "right": lambda a, b: b,
}


def write_jsonl(path, records):
    """Writes records, one a line; a string is written as it is. Returns the path as text."""
    lines = [r if isinstance(r, str) else json.dumps(r) + "\n" for r in records]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def make_tiny_model(directory, context=1024, seed=0, **changes):
    """A random Qwen 3 in Hugging Face layout: one layer, 64 words, some of which are answers.

    changes: of config.json. Returns the directory as text.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(directory)
    config = {
        "model_type": "qwen3",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "eos_token_id": [2, 5],
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    cfg = espl.read_model_config(directory)
    state = nnx.state(jax.eval_shape(lambda: espl.Transformer(cfg, nnx.Rngs(0))))
    rng, tensors = np.random.default_rng(seed), {}
    for path, weight in jax.tree_util.tree_leaves_with_path(state):
        name = espl.tensor_name(path)
        shape = weight.shape[::-1] if "_proj.weight" in name else weight.shape
        value = rng.normal(float("norm" in name), 0.3, shape)
        tensors[f"model.{name}"] = value.astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


@pytest.fixture(autouse=True)
def one_device():
    """Tests run on a mesh of one device, unless they make another one."""
    with jax.set_mesh(make_mesh()):
        yield


def assert_close(actual, expected, tolerance):
    """Equal up to a part of the largest number."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# ==================================================================================================
# The model: the truth is transformers' own, with random weights in a directory that it saved
# ==================================================================================================

GLOBAL, LOCAL = "full_attention", "sliding_attention"
ROPE = {"rope_theta": 50.0, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 50.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 5,
    "tie_word_embeddings": True,
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
LINEAR = {"rope_theta": 90.0, "rope_type": "linear", "factor": 8.0}
GEMMA3 = GEMMA | {"rope_parameters": {LOCAL: ROPE, GLOBAL: LINEAR}, "layer_types": [LOCAL, GLOBAL]}
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
TIED = {"tie_word_embeddings": True}
MODELS = {  # name: model_type, its settings, and changes that the reference must notice
    "llama2": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-3}, [{"rms_norm_eps": 1e-6}]),
    "llama3.1": ("llama", {"head_dim": 10, "rope_parameters": LLAMA3}, [{"rope_parameters": ROPE}]),
    "llama3.2": ("llama", TIED | {"rope_parameters": LLAMA3}, []),
    "gemma2": (
        "gemma2",
        GEMMA | CAPS,
        [{"attn_logit_softcapping": None}, {"sliding_window": 6}, {"query_pre_attn_scalar": 10}],
    ),
    "gemma3": ("gemma3_text", GEMMA3, [{"layer_types": [GLOBAL, LOCAL]}]),
    "gemma3-vision": ("gemma3", GEMMA3, []),
    "qwen2": ("qwen2", TIED, [{"rope_parameters": ROPE}]),
    "qwen2-window": ("qwen2", QWEN2_WINDOW, [{"sliding_window": 7}, {"max_window_layers": 0}]),
    "qwen3": ("qwen3", {"head_dim": 10}, []),
}
LENGTHS = (20, 1, 7, 13)  # of the rows, padded on the right
TOKENS = np.random.default_rng(0).integers(3, 131, (len(LENGTHS), 20))


def hf_config(model_type, **settings):
    from transformers import AutoConfig

    sizes = {"vocab_size": 131, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    settings = sizes | heads | {"tie_word_embeddings": False} | settings
    settings = copy.deepcopy(settings)  # transformers completes rope_parameters in place
    if model_type == "gemma3":
        vision = {"hidden_size": 8, "intermediate_size": 8, "image_size": 28}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 1}
        settings = {"text_config": settings, "vision_config": vision, "mm_tokens_per_image": 4}
    return AutoConfig.for_model(model_type, **settings)


@pytest.fixture(scope="session")
def hf_model(torch, tmp_path_factory):
    """hf_model(name): the directory and the model; no weight is 0 or 1."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    @cache
    def make(name):
        model_type, settings, _ = MODELS[name]
        torch.manual_seed(0)
        auto = AutoModelForImageTextToText if model_type == "gemma3" else AutoModelForCausalLM
        config = hf_config(model_type, **settings)
        model = auto.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                scale = weight.shape[1] ** -0.5 if weight.ndim == 2 else 0.3
                if re.search("[qk]_proj", key):
                    scale *= 2  # scores of several units, so that a cap matters
                weight.mul_(0.5).add_(torch.randn_like(weight) * scale)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        return directory, model

    return make


def hf_logits(torch, model, rows=None):
    """transformers' logits of each row alone, one after the other: [tokens, V]."""
    if rows is None:
        rows = [row[:n] for row, n in zip(TOKENS, LENGTHS)]
    with torch.no_grad():
        out = [model(torch.tensor(np.array(row))[None]).logits[0].float() for row in rows]
    return np.concatenate(out)


@jax.jit
def forward(policy, theta, token, position):
    model = policy.model(theta)
    return model.logits(model(token, position)[0])


def load(directory, mesh=None, dtype="float32", lora_rank=0, **changes):
    mesh = mesh or make_mesh()
    cfg = espl.read_model_config(directory, dtype, lora_rank)
    cfg = dataclasses.replace(cfg, **changes)
    with jax.set_mesh(mesh):
        return espl.read_policy(directory, cfg, mesh)


loaded = cache(load)  # for tests that do not change the policy


def logits(policy, theta=None, token=TOKENS, lengths=LENGTHS):
    """Logits [tokens, V] of padded rows."""
    place = np.arange(token.shape[1])[None]
    position = np.where(place < np.array(lengths)[:, None], place, espl.PAD_POSITION)
    with jax.set_mesh(policy.mesh):
        out = forward(policy, policy.theta if theta is None else theta, token, position)
    return np.asarray(out)[position != espl.PAD_POSITION]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, hf_model, torch):
    directory, model = hf_model(name)
    expected = hf_logits(torch, model)
    assert_close(logits(loaded(directory)), expected, 1e-4)
    model_type, settings, changes = MODELS[name]
    for change in changes:
        config = hf_config(model_type, **settings | change)
        changed = type(model)._from_config(config, attn_implementation="eager").eval()
        changed.load_state_dict(model.state_dict())
        difference = np.abs(hf_logits(torch, changed) - expected).max()
        assert difference > 1e-2 * np.abs(expected).max(), change


@pytest.mark.parametrize("name", ["llama2", "gemma2", "qwen2"])
def test_logits_on_eight_devices(name, hf_model, torch):
    """Not all heads, nor the 50 and 131 of other sizes, can be shared by four devices."""
    directory, model = hf_model(name)
    policy = loaded(directory, make_mesh(2, 4))
    assert_close(logits(policy), hf_logits(torch, model), 1e-4)
    weights = jax.tree_util.tree_leaves_with_path(policy.theta)
    shards = {espl.path_name(p): w.addressable_shards[0].data.shape for p, w in weights}
    width = policy.cfg.num_heads * policy.cfg.head_dim
    assert shards["layers/0/q_proj/kernel"] == (36, width // 4)
    assert shards["layers/0/o_proj/kernel"] == (width // 4, 36)
    assert shards["layers/0/up_proj/kernel"] == (36, 50)
    assert shards["embed_tokens"] == (131, 36)


@pytest.mark.parametrize("name", ["llama3.1", "gemma2", "gemma3", "qwen2-window", "qwen3"])
def test_sampling_through_the_cache_has_the_probabilities_of_transformers(name, hf_model, torch):
    """Prompts of one token, inside and beyond the sliding windows."""
    directory, model = hf_model(name)
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, LENGTHS)]
    for y in sample(loaded(directory), prompts, espl.Sampling(1.0, 1.0, 30), stop_ids=(131,)):
        every = log_softmax(hf_logits(torch, model, [y.prompt + y.tokens]))
        expected = every[np.arange(30) + len(y.prompt) - 1, y.tokens]
        np.testing.assert_allclose(y.logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("length", [600, 1536])
def test_long_sequences(length, hf_model, torch):
    """Queries are attended in spans."""
    directory, model = hf_model("gemma2")
    token = np.random.default_rng(1).integers(3, 131, (2, length))
    actual = logits(loaded(directory), None, token, (length, length - 50))
    assert_close(actual, hf_logits(torch, model, [token[0], token[1, :-50]]), 1e-4)


def test_lora_starts_as_the_base_model_and_equals_merging_it(hf_model):
    directory, _ = hf_model("qwen2")
    base, policy = loaded(directory), loaded(directory, lora_rank=3)
    np.testing.assert_array_equal(logits(policy), logits(base))
    np.testing.assert_array_equal(logits(policy, policy.theta_ref), logits(base))
    theta = jax.tree.map(
        lambda w: w + 0.3 * np.sin(np.arange(w.size)).reshape(w.shape), policy.theta
    )
    merged = nnx.to_pure_dict(base.theta)
    for i, layer in nnx.to_pure_dict(theta)["layers"].items():
        for name, adapter in layer.items():
            product = adapter["lora_a"] @ adapter["lora_b"]
            merged["layers"][i][name]["kernel"] += espl.LORA_ALPHA / 3 * product
    nnx.replace_by_pure_dict(base.theta, merged)
    assert np.abs(logits(base) - logits(policy)).max() > 1
    assert_close(logits(policy, theta), logits(base), 1e-4)


@pytest.mark.parametrize("name", ["llama3.1", "gemma2"])
def test_bfloat16(name, hf_model, torch, tmp_path):
    """The error is that of transformers in bfloat16."""
    _, original = hf_model(name)
    model = copy.deepcopy(original).bfloat16()
    model.save_pretrained(tmp_path)
    policy = load(tmp_path, dtype="bfloat16", lora_rank=2)
    for path, weight in jax.tree_util.tree_leaves_with_path((policy.theta, policy.frozen)):
        wide = re.search("norm|lora", espl.path_name(path))
        assert weight.dtype == (jnp.float32 if wide else jnp.bfloat16), path
    actual, theirs = logits(policy), hf_logits(torch, model)
    exact = hf_logits(torch, model.float())
    assert actual.dtype == np.float32
    assert_close(actual, theirs, 0.08)
    assert np.abs(actual - exact).mean() < 1.1 * np.abs(theirs - exact).mean()
    assert np.abs(theirs - exact).mean() < 0.03 * np.abs(exact).mean()


# ==================================================================================================
# Sampling: the truth is `whole`, the model on one sequence, without cache, padding or neighbours
# ==================================================================================================

V, CONTEXT, HORIZON = 128, 512, 300  # a response of HORIZON tokens outgrows the first cache
NEVER, CALL, EOS = V, 59, 79  # tokens: V is none
TINY = tempfile.TemporaryDirectory()


@cache
def tiny_directory(**changes):
    """Two layers, one with a sliding window, and biases."""
    shape = {"model_type": "qwen2", "vocab_size": V, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    shape |= {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6}
    shape["max_window_layers"] = 1
    directory = tempfile.mkdtemp(dir=TINY.name)
    return make_tiny_model(directory, CONTEXT, **shape | changes)


def tiny_policy(lora_rank=0, noise=0.0, mesh=None, dtype="float32", fused=False, **changes):
    """A random policy; its weights are those of pi_ref and noise."""
    policy = loaded(tiny_directory(**changes), mesh, dtype, lora_rank, fused=fused)
    rng = np.random.default_rng(0)
    kind = dtype if dtype == "float64" else "float32"

    def moved(path, w):
        value = np.asarray(w, kind) + noise * rng.normal(size=w.shape).astype(kind)
        return espl.put(value, policy.mesh, espl.weight_spec(path))

    theta = jax.tree.map_with_path(moved, policy.theta)
    return dataclasses.replace(policy, theta=theta, stop_ids=(NEVER,))


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).tolist() for n in lengths]


RAGGED = random_prompts(5, 1, 33, 12, 2, 20)


def sample(policy, prompts, sampling, environment=None, **changes):
    """Rollouts of prompts, by a policy with other stop_ids, max_rows or cache_tokens."""
    rollouts = [espl.Rollout(prompt) for prompt in prompts]
    policy = dataclasses.replace(policy, **changes)
    espl.generate(policy, policy.theta, rollouts, sampling, environment)
    return rollouts


def whole(policy, tokens, theta=None):
    """Logits [tokens, V], float64: each of what comes before and its own token."""
    length = 64 if len(tokens) <= 64 else CONTEXT
    token = np.pad(np.array(tokens), (0, length - len(tokens)))[None]
    out = forward(policy, policy.theta if theta is None else theta, token, np.arange(length)[None])
    return np.asarray(out[0], np.float64)[: len(tokens)]


def nucleus(p, top_p):
    """Which tokens stay: the likeliest until top_p is reached, and all that tie with the last."""
    order = np.sort(p)[::-1]
    last = min(int(np.searchsorted(np.cumsum(order), top_p)), len(p) - 1)
    return p >= order[last]


def response_logprobs(policy, y, temperature, top_p=1.0, theta=None):
    """The log-probability of each of a response's tokens."""
    logits = whole(policy, y.prompt + y.tokens, theta)[len(y.prompt) - 1 : -1] / temperature
    if top_p < 1:
        kept = [nucleus(p, top_p) for p in np.exp(log_softmax(logits))]
        logits = np.where(kept, logits, -np.inf)
    return log_softmax(logits)[np.arange(len(y.tokens)), y.tokens]


def assert_logprobs(y, expected, atol=1e-4):
    """Those of sampled tokens; a tool's are None."""
    ours = [e if p is None else p for p, e in zip(y.logprobs, expected, strict=True)]
    np.testing.assert_allclose(ours, expected, atol=atol)


def assert_same(a, b, atol=1e-4):
    """Two lists of rollouts agree in tokens, stop reason and log-probabilities."""
    assert [(y.tokens, y.stop) for y in a] == [(y.tokens, y.stop) for y in b]
    for x, y in zip(a, b):
        assert [p is None for p in x.logprobs] == [p is None for p in y.logprobs]
        assert_logprobs(x, [p or 0.0 for p in y.logprobs], atol)


DRAWN = espl.Sampling(0.8, 0.9, 40, (5, 1))


@pytest.fixture(scope="module")
def policy():
    with jax.set_mesh(make_mesh()):
        return tiny_policy(noise=0.02)


@pytest.fixture
def caches(monkeypatch):
    """The (rows, length) of every cache that is made."""
    made, new_cache = [], espl.new_cache

    def watched(cfg, rows, length):
        made.append((rows, length))
        return new_cache(cfg, rows, length)

    monkeypatch.setattr(espl, "new_cache", watched)
    return made


@pytest.mark.parametrize("top_p, n", [(1.0, HORIZON), (0.9, 20)])
def test_greedy_is_the_loop_without_cache(policy, caches, top_p, n):
    for y in sample(policy, RAGGED, espl.Sampling(0.0, top_p, n), max_rows=3):
        logits = whole(policy, y.prompt + y.tokens)[len(y.prompt) - 1 : -1]
        assert len(y.tokens) == len(y.logprobs) == n
        assert y.stop == "length"
        assert y.tokens == logits.argmax(-1).tolist()
    assert len({length for _, length in caches}) == 1 + (n == HORIZON)


def test_greedy_is_what_transformers_generates(hf_model, torch):
    directory, model = hf_model("llama2")
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, LENGTHS)]
    policy, stops = loaded(directory), (57, 43)
    rollouts = sample(policy, prompts, espl.Sampling(0.0, 1.0, 50), stop_ids=stops)
    for y in rollouts:
        prompt = torch.tensor([y.prompt])
        how = {"max_new_tokens": 50, "do_sample": False, "pad_token_id": 0}
        how |= {"eos_token_id": list(stops), "attention_mask": torch.ones_like(prompt)}
        theirs = model.generate(prompt, **how)
        assert y.tokens == theirs[0, len(y.prompt) :].tolist()
        assert y.stop == ("eos" if y.tokens[-1] in stops else "length")
    assert {y.stop for y in rollouts} == {"eos", "length"}


@pytest.mark.parametrize("temperature, top_p", [(0.6, 1.0), (1.7, 1.0), (1.7, 0.5)])
def test_logprobs_are_those_of_the_distribution_drawn_from(policy, temperature, top_p):
    for y in sample(policy, RAGGED * 2, espl.Sampling(temperature, top_p, 40, (1, 2))):
        assert_logprobs(y, response_logprobs(policy, y, temperature, top_p))


def test_eos_ends_a_response_and_belongs_to_it(policy):
    free = sample(policy, RAGGED, DRAWN)
    stops = free[0].tokens[0], free[1].tokens[9]
    for long, y in zip(free, sample(policy, RAGGED, DRAWN, stop_ids=stops)):
        n = next((i + 1 for i, t in enumerate(long.tokens) if t in stops), 40)
        assert y.tokens == long.tokens[:n]
        assert y.stop == ("eos" if y.tokens[-1] in stops else "length")
        np.testing.assert_allclose(y.logprobs, long.logprobs[:n], atol=1e-5)


def test_the_context_limits_a_response(policy):
    prompts = random_prompts(CONTEXT, CONTEXT - 1, CONTEXT + 5, 3, CONTEXT - 39)
    rollouts = sample(policy, prompts, DRAWN)
    assert [len(y.tokens) for y in rollouts] == [0, 1, 0, 40, 39]
    assert {y.stop for y in rollouts} == {"length"}
    assert sample(policy, [], DRAWN) == []


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.2)])
def test_sampling_uses_the_adapter(dtype, tolerance):
    policy = tiny_policy(4, noise=0.2, dtype=dtype)
    for y in sample(policy, RAGGED, espl.Sampling(0.8, 1.0, 30)):
        assert_logprobs(y, response_logprobs(policy, y, 0.8), tolerance)
        reference = response_logprobs(policy, y, 0.8, theta=policy.theta_ref)
        assert np.abs(y.logprobs - reference).max() > 0.3


def test_a_response_does_not_depend_on_rows_levels_or_neighbours(policy, caches, monkeypatch):
    """Rows are reused, caches are outgrown and shrink: nothing that stands there may leak."""
    sampling, stops = DRAWN._replace(max_new_tokens=150), (EOS,)
    prompts = RAGGED[:4] * 2
    expected = sample(policy, prompts, sampling, stop_ids=stops)
    assert len({len(y.tokens) for y in expected}) > 3
    assert caches == [(8, 256), (4, 256)]  # the longest responses move to a smaller one
    few = sample(policy, prompts, sampling, stop_ids=stops, cache_tokens=600)
    assert_same(few, expected)
    assert caches[2:] == [(2, 256), (1, 256)]
    others = sorted(random_prompts(*range(1, 40, 4), seed=1), key=len, reverse=True)
    others[5] = prompts[5]
    among = sample(policy, others, sampling, stop_ids=stops, cache_tokens=600)
    assert_same(among[5:6], expected[5:6])
    monkeypatch.setattr(espl, "cache_length", lambda longest, possible: 64 * (longest // 64 + 1))
    caches.clear()
    assert_same(sample(policy, prompts, sampling, stop_ids=stops), expected)
    assert {length for _, length in caches} == {64, 128, 192}


def test_seeds(policy):
    """Rollouts of one prompt differ, and so do seeds; one seed gives the same again."""
    prompts = RAGGED[:1] * 3
    seeds = ((1, 2), (1, 2), (1, 3), (2, 2))
    drawn = [sample(policy, prompts, DRAWN._replace(seed=seed)) for seed in seeds]
    assert_same(drawn[0], drawn[1])
    assert len({str(y.tokens) for some in drawn for y in some}) == 9


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_frequencies_are_the_probabilities(policy, top_p):
    def check(logits, tokens):
        """A chi-square test, with rare tokens in one bin."""
        p = np.exp(log_softmax(logits / 1.3))
        kept = nucleus(p, top_p) if top_p < 1 else p > 0
        expected = len(tokens) * np.where(kept, p, 0) / p[kept].sum()
        count = np.bincount(tokens, minlength=V)
        assert count[~kept].sum() == 0
        rare = expected < 8
        count, expected = (np.append(x[~rare], x[rare].sum()) for x in (count, expected))
        possible = expected > 0
        assert possible.sum() > 4
        assert stats.chisquare(count[possible], expected[possible]).pvalue > 1e-3

    prompt = RAGGED[0]
    rollouts = sample(policy, [prompt] * 4000, espl.Sampling(1.3, top_p, 2), max_rows=4000)
    first, second = np.array([y.tokens for y in rollouts]).T
    check(whole(policy, prompt)[-1], first)
    common = int(np.bincount(first).argmax())
    check(whole(policy, [*prompt, common])[-1], second[first == common])


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_exact(top_p):
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(size=(20, 300)) * rng.uniform(0.1, 10, (20, 1)),
        rng.integers(-3, 3, (20, 300)),  # ties
        rng.normal(size=(9, 300)) * 1e-6,  # neighbouring floats
        rng.normal(size=(5, 300)) * 1e3,
        [np.zeros(300)],
        1e4 * np.eye(300)[:3],
        [np.where(np.arange(300) < 3, 0, -np.inf)],
    ]
    logits = np.concatenate(rows).astype(np.float32)
    out = np.array(jax.jit(espl.nucleus, static_argnums=1)(logits, top_p))
    probs = np.array(jax.nn.softmax(logits), np.float64)
    kept = np.array([nucleus(p, top_p) for p in probs]) & (logits > -np.inf)
    np.testing.assert_array_equal(out > -np.inf, kept)
    np.testing.assert_array_equal(out[kept], logits[kept])


# ---- The queue, with a decoder that only counts


@dataclasses.dataclass
class Counted:
    """Fakes what runs on the devices: rollouts of known lengths, in caches without contents."""

    lengths: dict  # key of a rollout: tokens of its response
    calls: int = 0
    prefilled: int = 0  # rollouts

    def new_cache(self, cfg, rows, length):
        return [(np.broadcast_to(np.int8(0), (rows, 1, length, 1)),) * 2]

    def write_prefixes(self, cache, keys_values, source):
        self.prefilled += int((source >= 0).sum())
        return cache

    def decode_chunk(self, policy, theta, cache, token, position, steps, keys, *rest):
        rows, _, length, _ = cache[0][0].shape
        assert rows * length <= policy.cache_tokens or rows == 1
        assert rows <= policy.max_rows
        assert (position + steps <= length).all()
        self.calls += 1
        tokens = np.full((espl.DECODE_CHUNK, rows), -1)
        for row in range(rows):
            n = min(steps[row], espl.DECODE_CHUNK)
            tokens[:n, row] = 1
            left = self.lengths.get(tuple(keys[row]), 0) - (position[row] - 9)  # of 10 in a prompt
            if 0 < left <= n:
                tokens[left - 1 :, row] = -1
                tokens[left - 1, row] = 0  # the stop token
        return cache, tokens, np.zeros(tokens.shape)


@pytest.mark.parametrize("seed", range(8))
def test_the_queue_keeps_to_memory_and_nobody_starves(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(np.exp(rng.normal(6.5, 1.5, 200)).astype(int) + 1, 16_000)
    keys = [np.random.SeedSequence([0, 0, i]).generate_state(2) for i in range(200)]
    counted = Counted({tuple(key): int(n) for key, n in zip(keys, lengths)})
    monkeypatch.setattr(espl, "prefill", lambda *args: None)
    for name in ("new_cache", "write_prefixes", "decode_chunk"):
        monkeypatch.setattr(espl, name, getattr(counted, name))
    cfg = SimpleNamespace(max_context=20_000)
    mesh = SimpleNamespace(shape={"data": 1})
    policy = SimpleNamespace(cfg=cfg, mesh=mesh, stop_ids=(0,))
    policy.cache_tokens = int(10 ** rng.uniform(3.5, 5.5))
    policy.max_rows = int(rng.integers(20, 300))
    rollouts = [espl.Rollout([7] * 10) for _ in range(200)]
    espl.generate(policy, None, rollouts, espl.Sampling(1.0, 1.0, 16_000))
    assert [len(y.tokens) for y in rollouts] == lengths.tolist()
    assert counted.calls < 0.8 * sum(lengths // espl.DECODE_CHUNK + 2)
    assert counted.prefilled < 200 * 4


# ---- Tools in the middle of responses


def tool(y):
    """An environment: CALL gets a reply of 1, 70 or 2 tokens; a late one ends the response."""
    start = max((t + 1 for t, p in enumerate(y.logprobs) if p is None), default=0)
    if CALL not in y.tokens[start:]:
        return None
    end = y.tokens.index(CALL, start) + 1
    del y.tokens[end:], y.logprobs[end:]
    if end > 90:
        y.stop = "calls"
        return []
    [reply] = random_prompts((1, 70, 2)[(len(y.prompt) + end) % 3], seed=end)
    return [*reply[:-1], CALL]


def in_a_loop(y, most):
    """What becomes of y's sampled tokens, one by one, with a tool that looks at each."""
    loop = espl.Rollout(y.prompt)
    while len(loop.tokens) < most:
        loop.tokens.append(y.tokens[len(loop.tokens)])
        loop.logprobs.append(0.0)
        reply = tool(loop)
        if reply is None:
            if loop.tokens[-1] == EOS:
                loop.stop = "eos"
                break
        elif reply and len(loop.tokens) + len(reply) < most:
            loop.tokens += reply
            loop.logprobs += [None] * len(reply)
        else:
            break
    return loop


def test_tools_reply_in_the_middle_of_responses(policy):
    """What was sampled beyond a call is taken back. A reply without room ends a response."""
    prompts = [prompt for prompt in random_prompts(5, 1, 33, 12, seed=5) for _ in range(4)]

    def responses(most, max_rows=64):
        sampling = espl.Sampling(0.8, 1.0, most, (1, 2))
        rollouts = sample(policy, prompts, sampling, tool, stop_ids=(EOS,), max_rows=max_rows)
        for y in rollouts:
            expected = in_a_loop(y, most)
            assert y.tokens == expected.tokens
            assert y.stop == expected.stop
            assert [p is None for p in y.logprobs] == [p is None for p in expected.logprobs]
        return rollouts

    rollouts = responses(120)
    for y in rollouts:
        assert_logprobs(y, response_logprobs(policy, y, 0.8))
    assert {y.stop for y in rollouts} == {"eos", "length", "calls"}
    assert_same(responses(120, max_rows=3), rollouts)
    first = [(y.logprobs + [None]).index(None) for y in rollouts]
    long = [y.logprobs[n : n + 70] == [None] * 70 for y, n in zip(rollouts, first)]
    i = long.index(True)
    assert len(responses(first[i] + 70)[i].tokens) == first[i]
    assert len(responses(first[i] + 71)[i].tokens) == first[i] + 71


# ==================================================================================================
# RL update: the truth is the objective, written out as a double loop over rollouts and tokens
# ==================================================================================================

# An optimizer whose state after an update is the gradient of -J.
CAPTURE = optax.GradientTransformation(
    lambda theta: jax.tree.map(jnp.zeros_like, theta),
    lambda gradient, state, theta: (jax.tree.map(jnp.zeros_like, theta), gradient),
)
CAPTURE = optax.apply_if_finite(CAPTURE, 99)
ADAM = optax.apply_if_finite(optax.adam(0.01), 99)


def make_trainer(policy, optimizer=CAPTURE, **how):
    """A trainer of a copy of the policy: an update donates the weights."""
    policy = dataclasses.replace(policy, theta=jax.tree.map(jnp.copy, policy.theta))
    opt_state = optimizer.init(policy.theta)
    return espl.Trainer(policy, optimizer, opt_state, **how)


def gradient(policy, rollouts, num_rollouts=16, **how):
    """(flat gradient of -J, metrics) of a whole update."""
    trainer = make_trainer(policy, **how)
    metrics = espl.rl_update(trainer, rollouts, num_rollouts)
    found = jax.tree.leaves(trainer.opt_state.inner_state)
    return np.concatenate([np.ravel(x) for x in found]), metrics


def assert_same_metrics(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name] or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6)


def off_policy(policy, prompts, lengths, temperature=1.0, drift=0.4):
    """Random responses, drawn by about the policy; in longer ones a tool replied."""
    rng, rollouts = np.random.default_rng(0), []
    for prompt, n in zip(prompts, lengths):
        y = espl.Rollout(prompt, rng.integers(0, V, n).tolist())
        logprobs = response_logprobs(policy, y, temperature) + drift * rng.normal(size=n)
        y.logprobs = logprobs.astype(np.float32).tolist()
        y.advantage = float(np.float32(rng.normal()))
        if n > 8:
            y.logprobs[3:6] = [None] * 3
        rollouts.append(y)
    return rollouts


@pytest.fixture(scope="module")
def rollouts(policy):
    """Of the same prompt in a row, which share a row of the batch, and others."""
    a, b, c = random_prompts(5, 30, 1)
    return off_policy(policy, [a, a, a, b, b, c, a], [9, 4, 1, 12, 20, 3, 15])


def objective_by_hand(policy, rollouts, num_rollouts, o, theta, theta_0, estimator="k3"):
    """-(J - beta KL) by its equation. The weights of cispo, and of k2, are those at theta_0."""
    J = 0.0
    for y in rollouts:
        now, ref, start = (
            response_logprobs(policy, y, o.temperature, theta=weights)
            for weights in (theta, policy.theta_ref, theta_0)
        )
        for t, behaviour in enumerate(y.logprobs):
            if behaviour is None:
                continue
            ratio, weight = np.exp(now[t] - behaviour), np.exp(start[t] - behaviour)
            clipped = np.clip(ratio, 1 - o.clip, 1 + o.clip)
            match o.loss:
                case "importance_sampling":
                    J += ratio * y.advantage
                case "ppo":
                    J += min(ratio * y.advantage, clipped * y.advantage)
                case "cispo":
                    J += np.clip(weight, 1 - o.clip, 1 + o.clip) * y.advantage * now[t]
                case "reinforce":
                    J += y.advantage * now[t]
            gap = now[t] - ref[t]
            kl = weight * gap**2 / 2 if estimator == "k2" else np.exp(-gap) + gap - 1
            J -= o.kl_coef * kl
    return -J / num_rollouts


@pytest.fixture
def float64(monkeypatch):
    """espl in double precision: what it calls jnp.float32 is float64."""
    monkeypatch.setattr(espl, "jnp", SimpleNamespace(**vars(jnp) | {"float32": jnp.float64}))
    with jax.enable_x64(True):
        yield


LOSSES = ("importance_sampling", "ppo", "cispo", "reinforce")


@pytest.mark.parametrize(
    "loss, kl_coef, lora_rank",
    [(LOSSES[0], 0.1, 0), ("ppo", 0.0, 4), ("cispo", 0.1, 4), ("reinforce", 0.0, 4)],
)
def test_the_gradient_is_the_finite_difference_of_the_objective(float64, loss, kl_coef, lora_rank):
    o = espl.Objective(loss, temperature=0.7, clip=0.2, kl_coef=kl_coef)
    policy = tiny_policy(lora_rank, noise=0.05, dtype="float64", num_hidden_layers=1)
    a, b, c = random_prompts(5, 30, 1)
    rollouts = off_policy(policy, [a, a, b, c], [9, 4, 12, 3], 0.7)
    g, metrics = gradient(policy, rollouts, 11, objective=o)
    value = partial(objective_by_hand, policy, rollouts, 11, o, theta_0=policy.theta)
    np.testing.assert_allclose(metrics["loss"], value(policy.theta), rtol=1e-9)
    flat, unflatten = jax.flatten_util.ravel_pytree(policy.theta)
    for direction in np.random.default_rng(1).normal(size=(2, len(flat))):
        ahead = value(unflatten(flat + 1e-6 * direction), estimator="k2")
        behind = value(unflatten(flat - 1e-6 * direction), estimator="k2")
        np.testing.assert_allclose(g @ direction, (ahead - behind) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(loss):
    rng = np.random.default_rng(0)
    logp, advantage = jnp.array(-rng.exponential(size=50)), jnp.array(rng.normal(size=50))

    def J(x):
        return espl.surrogate(x, logp, advantage, espl.Objective(loss))[0].sum()

    np.testing.assert_allclose(jax.grad(J)(logp), advantage, rtol=1e-6)


def test_the_gradient_of_the_kl_term_is_that_of_the_kl(float64):
    """In expectation over what is drawn, on policy and off. That of the value is another one."""
    rng = np.random.default_rng(0)
    logits, other, ref = jnp.array(rng.normal(size=(3, 6)))
    ref = jax.nn.log_softmax(ref)

    def KL(x):
        logp = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def expected(x, drawn, which):
        logp, drawn = jax.nn.log_softmax(x), jax.nn.log_softmax(drawn)
        estimates = espl.kl_estimators(logp, ref, jnp.exp(logp - drawn))
        return jnp.sum(jnp.exp(drawn) * estimates[which])

    for drawn in (logits, other):
        slope = jax.grad(expected)(logits, drawn, 1)
        np.testing.assert_allclose(slope, jax.grad(KL)(logits), atol=1e-12)
    np.testing.assert_allclose(expected(logits, logits, 0), KL(logits), atol=1e-12)
    assert np.abs(jax.grad(expected)(logits, logits, 0) - jax.grad(KL)(logits)).max() > 0.05


def test_the_gradient_is_that_of_torch(hf_model, torch):
    """Packed rows, and one whose attention is recomputed in blocks."""
    rng = np.random.default_rng(0)
    directory, model = hf_model("gemma2")
    model = copy.deepcopy(model)
    prompt = TOKENS[0].tolist()
    rollouts = []
    for n in (20, 30, 1100):
        tokens, logprobs = rng.integers(3, 131, n).tolist(), rng.normal(-4, 0.1, n).tolist()
        rollouts.append(espl.Rollout(prompt, tokens, logprobs, advantage=rng.normal()))
    trainer = make_trainer(loaded(directory))
    espl.rl_update(trainer, rollouts, 3)
    for y in rollouts:
        out = model(torch.tensor(y.prompt + y.tokens)[None]).logits[0, len(prompt) - 1 : -1]
        logp = out.log_softmax(-1)[torch.arange(len(y.tokens)), torch.tensor(y.tokens)]
        loss = -y.advantage * (logp - torch.tensor(y.logprobs)).exp().sum() / 3
        loss.backward()
    theirs = {name.removeprefix("model."): w.grad.numpy() for name, w in model.named_parameters()}
    found = jax.tree_util.tree_leaves_with_path(trainer.opt_state.inner_state)
    assert len(found) == len(theirs)
    for path, ours in found:
        expected = theirs[espl.tensor_name(path)]
        ours = np.asarray(ours).T if "kernel" in espl.path_name(path) else np.asarray(ours)
        assert_close(ours, expected, 1e-3)


def test_what_was_just_sampled_has_an_importance_ratio_of_1(policy):
    """The update computes the sampler's log-probabilities; and what the metrics say."""
    prompts = [prompt for prompt in RAGGED for _ in range(2)]
    rollouts = sample(policy, prompts, espl.Sampling(0.6, 1.0, 40, (1, 2)), tool)
    _, m = gradient(policy, rollouts, objective=espl.Objective(temperature=0.6, kl_coef=0.1))
    assert m["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert m["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert m["trained_rollouts"] == 12
    entropy, kl = [], []
    for y in rollouts:
        logp = log_softmax(whole(policy, y.prompt + y.tokens)[len(y.prompt) - 1 : -1] / 0.6)
        gap = response_logprobs(policy, y, 0.6)
        gap -= response_logprobs(policy, y, 0.6, theta=policy.theta_ref)
        sampled = [p is not None for p in y.logprobs]
        entropy += (-(np.exp(logp) * logp).sum(-1))[sampled].tolist()
        kl += (np.exp(-gap) + gap - 1)[sampled].tolist()
    assert m["trained_tokens"] == len(kl) < sum(len(y.tokens) for y in rollouts)
    assert m["entropy"] == pytest.approx(np.mean(entropy), rel=1e-4)
    assert m["kl"] == pytest.approx(np.mean(kl), rel=1e-3)


def test_the_gradient_does_not_depend_on_rows_padding_or_microbatches(policy, rollouts):
    """Responses that share a row do not see each other."""
    together, m = gradient(policy, rollouts)
    scale = np.abs(together).max()
    assert m["grad_norm"] == pytest.approx(np.linalg.norm(together), rel=1e-5)
    alone = sum(gradient(policy, [y])[0] for y in rollouts)
    np.testing.assert_allclose(alone, together, atol=1e-5 * scale)
    small, n = gradient(policy, rollouts, max_tokens=1)
    np.testing.assert_allclose(small, together, atol=1e-5 * scale)
    assert_same_metrics(n, m)
    neutral = dataclasses.replace(rollouts[1], advantage=0.0)
    more, n = gradient(policy, [*rollouts[:3], neutral, *rollouts[3:], espl.Rollout([1, 2])])
    np.testing.assert_allclose(more, together, atol=1e-5 * scale)
    assert n["trained_rollouts"] == m["trained_rollouts"] + 1
    half, _ = gradient(policy, rollouts, 32)
    np.testing.assert_allclose(half * 2, together, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "prompt, lengths, most",
    [
        (300, [40] * 20, 20 * 340 / 2),  # a prompt is there once for its responses
        (2, [10, 60, 200, 500] * 5, 20 * 512),  # long responses do not make short ones long
        (40, [9, 31, 20] * 7, 21 * 128),
    ],
)
def test_microbatches_waste_little(policy, prompt, lengths, most):
    prompts = random_prompts(*[prompt] * 6)
    rollouts = [espl.Rollout(prompts[i // 4], [3] * n, [-1.0] * n) for i, n in enumerate(lengths)]
    batches = list(espl.microbatches(rollouts, 2400, policy))
    assert sum(b["mask"].sum() for b in batches) == sum(lengths)
    assert max(b["token"].size for b in batches) <= 2400
    assert sum(b["token"].size for b in batches) < most
    assert len({b["token"].shape for b in batches}) <= 4


def start(directory, **flags):
    """A run of a task with two problems, on all devices."""
    task = directory / "pair.py"
    records = [{"problem": q, "answer": "1"} for q in ("w1", "w2")]
    text = f"def problems(c):\n    return {records[:1]}, {records[1:]}\n"
    task.write_text(text + "def reward(record, response):\n    return 0\n")
    model = make_tiny_model(directory / "model")
    how = {"task": str(task), "model": model, "run_dir": str(directory / "run"), "lora_rank": 4}
    return espl.start_run(espl.Config(**how | flags))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adam_is_that_of_torch_with_the_papers_settings(max_grad_norm, tmp_path, torch):
    assert espl.Config().learning_rate == 4e-5
    trainer = start(tmp_path, learning_rate=0.01, max_grad_norm=max_grad_norm).trainer
    theta, opt_state = trainer.policy.theta, trainer.opt_state
    leaves, unflatten = jax.tree.flatten(theta)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in leaves]
    adam = torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    nans = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), theta)
    for _ in range(2):  # both are left out
        theta, opt_state, _ = espl.adam_step(trainer.optimizer, theta, opt_state, nans)
    rng = np.random.default_rng(0)
    for _ in range(3):
        slopes = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        g = jax.tree.unflatten(unflatten, slopes)
        theta, opt_state, norm = espl.adam_step(trainer.optimizer, theta, opt_state, g)
        for weight, slope in zip(theirs, slopes):
            weight.grad = torch.tensor(slope)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        adam.step()
        assert float(norm) == pytest.approx(np.sqrt(sum((x**2).sum() for x in slopes)), rel=1e-5)
    for ours, weight in zip(jax.tree.leaves(theta), theirs):
        np.testing.assert_allclose(ours, weight.detach(), atol=1e-5)


def snapshot(*trees):
    return [np.array(x) for x in jax.tree.leaves(trees)]


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(policy, rollouts):
    trainer = make_trainer(policy, ADAM)
    before = snapshot(trainer.policy.theta)
    assert set(espl.rl_update(trainer, [espl.Rollout([1])], 1)) == {"skipped"}
    broken = [*rollouts, dataclasses.replace(rollouts[0], advantage=math.nan)]
    assert espl.rl_update(trainer, broken, 8)["steps_left_out"] == 1
    for a, b in zip(before, snapshot(trainer.policy.theta)):
        np.testing.assert_array_equal(a, b)
    assert espl.rl_update(trainer, rollouts, 8)["steps_left_out"] == 1
    after = snapshot(trainer.policy.theta)
    assert all((a != b).any() and np.isfinite(b).all() for a, b in zip(before, after))


def test_the_eos_token_is_trained(policy):
    y = espl.Rollout(RAGGED[0], [EOS], advantage=1.0)
    y.logprobs = response_logprobs(policy, y, 1.0).tolist()
    trainer = make_trainer(policy, ADAM)
    m = espl.rl_update(trainer, [y], 1)
    assert m["trained_tokens"] == 1
    assert m["loss"] == pytest.approx(-1.0, abs=1e-4)
    assert (response_logprobs(trainer.policy, y, 1.0) > y.logprobs).all()


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_learning(lora_rank):
    """A bandit: even tokens are right after two prompts, odd ones after the others. Only weights
    that are trained change, and all of them."""
    trainer = make_trainer(tiny_policy(lora_rank), ADAM)
    policy, prompts, history = trainer.policy, RAGGED[:4], []
    theta, kept = snapshot(policy.theta), snapshot(policy.frozen, policy.theta_ref)
    while len(history) < 60 and min(history[-3:], default=0) <= 0.9:
        sampling = espl.Sampling(1.0, 1.0, 4, (7, len(history)))
        rollouts = sample(policy, [p for p in prompts for _ in range(16)], sampling)
        for i, y in enumerate(rollouts):
            y.reward = np.mean(np.array(y.tokens) % 2 == i // 16 % 2)
        for i in range(0, 64, 16):
            baseline = espl.mean_reward([espl.Group(None, None, rollouts[i : i + 16])])
            for y in rollouts[i : i + 16]:
                y.advantage = y.reward - baseline
        espl.rl_update(trainer, rollouts, 64)
        history.append(np.mean([y.reward for y in rollouts]))
    assert history[0] < 0.6
    assert min(history[-3:]) > 0.9, history
    for a, b in zip(kept, snapshot(policy.frozen, policy.theta_ref)):
        np.testing.assert_array_equal(a, b)
    weights = jax.tree_util.tree_leaves_with_path(policy.theta)
    for (path, after), before in zip(weights, theta, strict=True):
        assert ("lora" in espl.path_name(path)) == bool(lora_rank)
        assert after.dtype == np.float32
        assert (after != before).any(), path


# ==================================================================================================
# Several devices, memory, and the fused kernel
# ==================================================================================================


def shards(tree):
    return [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("lora_rank, data, model", [(0, 8, 1), (0, 4, 2), (4, 2, 4)])
def test_an_update_on_eight_devices_is_that_on_one(lora_rank, data, model, monkeypatch):
    """The gradient, also while it is summed, and the weights are laid out alike."""
    how = {"noise": 0.02, "num_hidden_layers": 1}
    one = tiny_policy(lora_rank, **how)
    rollouts = off_policy(one, random_prompts(5, 1, 30, 3, 9), [9, 4, 1, 12, 20])
    expected, m = gradient(one, rollouts)
    mesh = make_mesh(data, model)
    with jax.set_mesh(mesh):
        trainer = make_trainer(tiny_policy(lora_rank, mesh=mesh, **how))
        layout = shards(trainer.policy.theta)
        sums, add_gradient = [], espl.add_gradient

        def watched(*args):
            sums.append(add_gradient(*args))
            return sums[-1]

        monkeypatch.setattr(espl, "add_gradient", watched)
        assert (layout != shards(one.theta)) == (model > 1)
        assert_same_metrics(espl.rl_update(trainer, rollouts, 16), m)
        found = trainer.opt_state.inner_state
        assert shards(found) == shards(trainer.policy.theta) == shards(sums[0][0]) == layout
        g = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])
        np.testing.assert_allclose(g, expected, atol=1e-5 * np.abs(expected).max())


COLLECTIVE = r" = (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def test_sampling_on_eight_devices_is_that_on_one(monkeypatch):
    """A decode step sends activations and tokens, and no part of the cache."""
    alone = sample(tiny_policy(4, noise=0.02), RAGGED, DRAWN, max_rows=8)
    calls, decode_chunk = [], espl.decode_chunk

    def watched(*args):
        calls.append(args)
        return decode_chunk(*args)

    monkeypatch.setattr(espl, "decode_chunk", watched)
    mesh = make_mesh(4, 2)
    with jax.set_mesh(mesh):
        many = tiny_policy(4, noise=0.02, mesh=mesh)
        assert_same(sample(many, RAGGED, DRAWN, max_rows=8), alone)
        compiled = decode_chunk.lower(*calls[0]).compile()
    cache = jax.tree.leaves(compiled.output_shardings[0])
    assert {x.shard_shape((8, 2, 256, 8)) for x in cache} == {(2, 1, 256, 8)}
    results = " ".join(re.findall(COLLECTIVE, compiled.as_text()))
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", results)]
    assert 0 < sum(sizes) < 0.1 * len(cache) * 8 * 2 * 256 * 8


def update_memory(policy, B, T):
    """Bytes of one device that an update of B responses of T tokens needs for the time being."""
    rollouts = [espl.Rollout([1], [3] * T, [0.0] * T) for _ in range(B)]
    [batch] = espl.microbatches(rollouts, B * T, policy)
    assert batch["token"].shape == (B, T)
    with jax.set_mesh(policy.mesh):
        batch = {name: espl.put(x, policy.mesh, P("data")) for name, x in batch.items()}
        lowered = espl.add_gradient.lower(policy.theta, policy, batch, 1, espl.Objective())
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_the_logits_of_a_whole_batch_never_exist():
    mesh, heads = make_mesh(8), {"num_attention_heads": 1, "num_key_value_heads": 1}
    with jax.set_mesh(mesh):
        policy = tiny_policy(4, mesh=mesh, vocab_size=2**15, **heads)
    assert update_memory(policy, 64, 512) < 64 * 512 * 2**15 * 4 / 6 / 8


def test_kept_outputs_of_linears_change_nothing_but_memory(monkeypatch):
    """They are kept if a twelfth of the memory holds them; `made` counts their bytes itself."""
    policy = tiny_policy(4, num_hidden_layers=3)
    weights = [path for path, _ in jax.tree.leaves_with_path(policy.frozen)]
    shapes = [x.shape for x in jax.tree.leaves(policy.frozen)]
    kernels = [s for path, s in zip(weights, shapes) if espl.path_name(path).endswith("kernel")]
    made = 512 * sum(d_out for _, d_out in kernels) * 4
    for share, keep in ((11, False), (17, True)):
        monkeypatch.setattr(espl, "device_memory", lambda share=share: share * made)
        assert espl.linears_fit(policy, 512) == keep
    y = espl.Rollout([1] * 9, [3, 4] * 250, [-2.0] * 500, advantage=1.0)
    [batch] = espl.microbatches([y], 512, policy)
    found = []
    for keep in (False, True):
        monkeypatch.setattr(espl, "linears_fit", lambda *_, keep=keep: keep)
        espl.add_gradient.clear_cache()
        args = jax.tree.map(jnp.zeros_like, policy.theta), policy, batch, 1
        compiled = espl.add_gradient.lower(*args, espl.Objective()).compile()
        found.append((compiled(*args)[0], compiled.memory_analysis().temp_size_in_bytes))
    espl.add_gradient.clear_cache()
    (again, less), (kept, more) = found
    assert more > less
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), again, kept)


@pytest.mark.parametrize(("gigabytes", "left"), [(6, 2), (16, 3), (84, 12)])
def test_the_cache_leaves_memory_for_the_rest(monkeypatch, gigabytes, left):
    """Beside 4 GB of weights it leaves 15 % of the rest, or 3 GB: here 12, 3, and all of 2 GB."""
    policy = tiny_policy(4)
    monkeypatch.setattr(espl, "device_memory", lambda: gigabytes * 1e9)
    tokens = espl.cache_tokens(policy.cfg, make_mesh(1), 4e9)
    row = sum(x.nbytes for x in jax.tree.leaves(espl.new_cache(policy.cfg, 1, 128)))
    assert gigabytes - 4 - tokens * row / 128 / 1e9 == pytest.approx(left, abs=1e-6)


def test_the_scores_of_long_sequences_never_exist():
    policy = tiny_policy(4, num_hidden_layers=1)
    assert update_memory(policy, 1, 4096) < policy.cfg.num_heads * 4096**2 * 4


@pytest.mark.parametrize(
    "changes, flags, fused",
    [
        ({}, {}, True),
        ({"head_dim": 8}, {}, False),
        ({"model_type": "gemma2"}, {}, False),  # which caps its scores
        ({}, {"dtype": "float32"}, False),
        ({}, {"attention": "xla"}, False),
    ],
)
def test_where_attention_is_fused(changes, flags, fused, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = make_tiny_model(tmp_path, **{"head_dim": 64} | changes)
    policy, _ = espl.load_policy(espl.Config(model=model, **flags))
    assert policy.cfg.fused == fused
    assert policy.cfg.dtype == flags.get("dtype", "bfloat16")


def test_fused_attention_is_attention(monkeypatch):
    """XLA's implementation stands in for cuDNN's."""
    kernel, windows = jax.nn.dot_product_attention, set()

    def stand_in(*args, implementation, **how):
        assert implementation == "cudnn"
        windows.add(how["local_window_size"])
        return kernel(*args, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    token = np.array(random_prompts(1024, 1024))
    expected = logits(tiny_policy(), token=token, lengths=(900, 600))
    assert_close(logits(tiny_policy(fused=True), token=token, lengths=(900, 600)), expected, 1e-4)
    assert windows == {None, (5, 0)}


# ==================================================================================================
# Directories of models, and chat templates
# ==================================================================================================


def assert_same_weights(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.theta, b.theta)


def test_a_checkpoint_in_several_files(hf_model, tmp_path):
    """Only the files that the index names are read."""
    directory, model = hf_model("llama2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(directory / "model.safetensors", tmp_path / "model-old.safetensors")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_weights(load(tmp_path), load(directory))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(espl.UserError, match="appears twice"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_text_weights_of_a_multimodal_checkpoint(prefix, hf_model, tmp_path):
    """Other towers are left out, and an output table that is the embedding."""
    directory, _ = hf_model("gemma3")
    tensors = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = tensors[prefix + "embed_tokens.weight"]
    for name in ("vision_tower.patch.weight", "model.multi_modal_projector.norm.weight"):
        tensors[name] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)
    assert_same_weights(load(tmp_path), load(directory))


def write_config(directory, name, remove=(), **changes):
    model_type, settings, _ = MODELS[name]
    config = hf_config(model_type, **settings).to_dict() | changes
    config = {key: value for key, value in config.items() if key not in remove}
    (directory / "config.json").write_text(json.dumps(config))


OLD_GEMMA3 = {"rope_theta": 90.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}
OLD_GEMMA3["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
OLD_LLAMA3 = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    "name, old",
    [("llama3.1", {"rope_theta": 50.0, "rope_scaling": OLD_LLAMA3}), ("gemma3", OLD_GEMMA3)],
)
def test_config_json_of_older_transformers(name, old, tmp_path):
    write_config(tmp_path, name)
    new = espl.read_model_config(tmp_path)
    write_config(
        tmp_path, name, ["rope_parameters", "layer_types", "_sliding_window_pattern"], **old
    )
    assert espl.read_model_config(tmp_path) == new


def test_config_json_of_gemma_3_4b_leaves_most_to_defaults(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    cfg = espl.read_model_config(tmp_path)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (8, 4, 256)
    assert cfg.windows == tuple(espl.PAD_POSITION if i % 6 == 5 else 1024 for i in range(34))
    local, everywhere = cfg.rope_frequencies[4:6]
    np.testing.assert_allclose(local, 1e4 ** -(np.arange(128) / 128), 1e-5)
    np.testing.assert_allclose(everywhere, 1e6 ** -(np.arange(128) / 128) / 8, 1e-5)
    assert cfg.tied


YARN = {
    "rope_theta": 1e4,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama2", {"model_type": "mistral"}, "mistral"),
        ("llama2", {"model_type": "no_such_model"}, "config.json.*no_such_model"),
        ("llama2", {"rope_parameters": YARN}, "'yarn'"),
        ("llama2", {"num_hidden_layers": "many"}, "config.json.*num_hidden_layers"),
        ("qwen3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quanti"),
        ("llama2", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh is not.*, silu is"),
        ("gemma2", {"hidden_activation": "silu"}, "silu is not"),
        ("gemma3-vision", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quanti"),
    ],
)
def test_models_that_are_refused(name, change, message, tmp_path):
    write_config(tmp_path, name, **change)
    with pytest.raises(espl.UserError, match=message) as e:
        espl.read_model_config(tmp_path)
    assert "\n" not in str(e.value)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_shape(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (without("model.layers.1.self_attn.k_proj.weight"), "layers.1.self_attn.k_proj.weight"),
        (without("lm_head.weight"), "lm_head.weight"),
        (with_shape("model.layers.0.mlp.up_proj.weight", 50, 35), r"up_proj.*50, 35.*50, 36"),
        (with_shape("model.layers.0.self_attn.q_proj.bias", 36), "q_proj.bias"),
        (
            with_shape("model.layers.2.input_layernorm.weight", 36),
            "layers.2.input_layernorm",
        ),
        (b"<html>404 not found</html>", "safetensors|read the weights"),
        (b"", "read the weights"),
        (None, "embed_tokens|no .*safetensors"),
    ],
)
def test_damaged_checkpoints(damage, message, hf_model, tmp_path):
    shutil.copytree(hf_model("llama2")[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    if damage is None:
        file.unlink()
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file)
    with pytest.raises(espl.UserError, match=message) as e:
        load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_directory_without_a_readable_config(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(espl.UserError, match=f"config.json of {tmp_path}"):
        espl.read_model_config(tmp_path)


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
REFUSING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}<|model|>"
)
DROPPING = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}<|model|>"

DATED = "{{ bos_token }}{{ date_string }}{% for m in messages %} {{ m.content }}{% endfor %}"
OPENING = "{% for m in messages %}{{ m.content }} {% endfor %}<think>"


def make_chat(template, special=(), **kwargs):
    """A Chat over a tokenizer of bytes that puts <bos> before every text."""
    vocab = {c: i for i, c in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = template
    return espl.Chat(tokenizer, **kwargs)


@pytest.mark.parametrize(
    "template, kwargs, system, expected",
    [
        (CHATML, {}, "S x", "<|system|>S x<end>\n<|user|>Ü 1<end>\n<|assistant|>"),
        (CHATML, {}, "", "<|user|>Ü 1<end>\n<|assistant|>"),
        (CHATML, {"thinking": False}, "", "<|user|>Ü 1<end>\n<|assistant|><think></think>"),
        (CHATML, {"role": "user"}, "S", "<|user|>Ü 1\n\nS<end>\n<|assistant|>"),
        (REFUSING, {}, "S\n", "<bos><|user|>S\n\n\nÜ 1<|model|>"),
        (REFUSING, {"role": "user"}, "S", "<bos><|user|>Ü 1\n\nS<|model|>"),
        (DROPPING, {}, "S", "<|user|>S\n\nÜ 1<|model|>"),
        (DATED, {}, "", "<bos>26 Jul 2024 Ü 1"),  # not today's: a run could not be repeated
        (None, {}, "S", "<bos>S\n\nÜ 1\n\n"),
        (None, {}, "", "<bos>Ü 1\n\n"),
    ],
)
def test_chat_templates(template, kwargs, system, expected):
    chat = make_chat(template, **kwargs)
    assert chat.tokenizer.decode(chat.ids(system, "Ü 1")) == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "always the same"])
def test_a_chat_template_that_cannot_work(template):
    with pytest.raises(espl.UserError, match="chat template"):
        make_chat(template).ids("S", "U")


FAMILIES = [  # special tokens
    ["<s>", "</s>", "<unk>"],
    ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_7|>"],
    ["<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<mask>"],
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"],
    ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜tool▁outputs▁end｜>", "[SEP]", "[SEP]x"],
]


@pytest.mark.parametrize("special", FAMILIES)
def test_no_request_holds_special_tokens(special):
    chat = make_chat(None, special)
    ids = set(chat.tokenizer.convert_tokens_to_ids(special))
    assert ids <= set(chat.tokenizer("".join(special)).input_ids)
    for token in special:
        text = chat.clean(f"a{token}b {token[:2]}{token}{token[2:]}")
        assert not ids & set(chat.tokenizer(text).input_ids)
    text = "If x < 3 and |y| > 2, or [x] <= y, try <b>, a[0] | b."
    assert chat.clean(text) == text


@pytest.mark.parametrize("special", [[], ["<think>", "</think>", "<end>"]])
def test_thinking_is_no_part_of_an_answer(special):
    """Whether <think> is a special token or text, and whether the template opens it."""
    chat = make_chat(CHATML, special)
    for said, final in (("<think>a</think>b", "b"), ("<think>a", ""), ("b", "b")):
        tokens = chat.tokenizer(said + "<end>" * bool(special), add_special_tokens=False).input_ids
        assert espl.final_text(chat.text(tokens)) == final
    opened = chat.tokenizer("<|assistant|><think>\n").input_ids
    for said, final in (("a</think>b", "b"), ("a", "")):
        tokens = chat.tokenizer(said).input_ids
        assert espl.final_text(chat.text(tokens, opened)) == final


@pytest.mark.parametrize(
    "files, template, expected",
    [
        ({"config": 2}, None, {2}),
        ({"config": [5, 3], "generation_config": 4}, None, {3, 4, 5}),
        ({"config": None, "generation_config": [4, 9]}, None, {4, 9}),
        ({"config": 5}, CHATML, {5, 257}),  # the template writes <end> behind an answer
    ],
)
def test_stop_tokens(files, template, expected, tmp_path):
    for name, eos in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": eos}))
    chat = make_chat(template, ["<end>"])
    assert espl.stop_tokens(tmp_path, chat) == tuple(sorted(expected))


def test_a_model_without_a_stop_token_is_refused(tmp_path):
    with pytest.raises(espl.UserError, match="eos_token_id"):
        espl.stop_tokens(tmp_path, make_chat(None))


# ==================================================================================================
# Evolution
# ==================================================================================================


def rated(*ratings):
    """System prompts with these (mu, sigma), each with a principle of its own."""
    prompts = []
    for i, (mu, sigma) in enumerate(ratings):
        prompts.append(espl.SystemPrompt(i, [f"principle {i}"], mu, sigma))
    return prompts


def graded(rewards, name="q", s=None, stops=()):
    """Rollouts with these rewards. Response j to problem q is q<j>."""
    rollouts = []
    for j, reward in enumerate(rewards):
        outcome = "correct" if reward == 1 else "wrong"
        stop = stops[j] if stops else "eos"
        rollouts.append(espl.Rollout([1], [7], [-1.0], stop, f"{name}{j}", reward, outcome))
    return espl.Group(s, espl.Problem(name, f"question {name}", (f"truth-{name}",)), rollouts)


def test_contrast_is_a_difference_of_rewards():
    assert all(graded(rewards).contrast for rewards in ([1, 0], [0.4, 0.9], [-0.1, 0]))
    assert not any(graded(rewards).contrast for rewards in ([1, 1], [0.6, 0.6]))


def chosen(population, draws, **flags):
    """How often `select` chose which ids."""
    c = espl.Config(**flags)
    picks = [espl.select(population, c, np.random.default_rng(i)) for i in range(draws)]
    return Counter(tuple(s.id for s in pick) for pick in picks)


@pytest.mark.parametrize("selection", ["top_random", "softmax", "uniform", "ucb", "lucb"])
def test_selected_prompts_are_distinct_and_of_the_window(selection, monkeypatch):
    population = rated((99, 1), (98, 1), (20, 1), (21, 1), (22, 1), (23, 1))  # the best are too old
    seen = chosen(population, 50, selection=selection, window=4)
    assert all(len(set(ids)) == 3 and set(ids) <= {2, 3, 4, 5} for ids in seen)
    monkeypatch.setattr(espl, "MAX_POOL_SIZE", 2)
    assert set(chosen(population, 5, selection=selection)) == {(4, 5)}


SCORES = np.array([24, 25, 26, 24.5])  # mu + 2 sigma; the lower bounds are 20, 13, 2, 22.5
FOUR_RATED = ((22, 1), (19, 3), (14, 6), (23.5, 0.5))
PAIRS = list(itertools.combinations(range(4), 2))


def softmax_of_pairs(temperature):
    """Probabilities of the pairs that are drawn one after the other."""
    p = scipy.special.softmax(SCORES / temperature)
    return {(i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in PAIRS}


@pytest.mark.parametrize(
    "selection, M, flags, expected",
    [
        ("ucb", 2, {}, {(1, 2): 1}),
        ("ucb", 2, {"ucb_lambda": 0.0}, {(0, 3): 1}),
        ("lucb", 3, {}, {(1, 2, 3): 1}),  # the safest is 3, then the best upper bounds are 2 and 1
        ("top_random", 2, {}, {(0, 2): 1 / 3, (1, 2): 1 / 3, (2, 3): 1 / 3}),
        ("uniform", 2, {}, dict.fromkeys(PAIRS, 1 / 6)),
        ("softmax", 2, {"selection_temperature": 2.0}, softmax_of_pairs(2.0)),
    ],
)
def test_selection_has_the_right_probabilities(selection, M, flags, expected):
    seen = chosen(rated(*FOUR_RATED), 2000, selection=selection, num_prompts=M, **flags)
    assert set(seen) == set(expected)
    counts = [seen[ids] for ids in expected]
    if len(counts) > 1:
        wanted = 2000 * np.array(list(expected.values()))
        assert scipy.stats.chisquare(counts, wanted).pvalue > 1e-3


@pytest.mark.parametrize("selection", ["top_random", "ucb", "lucb"])
def test_the_seed_decides_between_equals(selection):
    seen = chosen(rated((25, 8), (25, 8), (9, 1)), 200, selection=selection, num_prompts=1)
    assert set(seen) == {(0,), (1,)} and 60 < seen[(0,)] < 140
    best = Counter(espl.argmax([5, 7, 1, 7], np.random.default_rng(i)) for i in range(200))
    assert set(best) == {1, 3} and 60 < best[1] < 140


@pytest.mark.parametrize(
    "values, ranks",
    [
        ([0.2, 0.9, 0.5], [2, 0, 1]),
        ([0.50, 0.495, 0.489], [0, 0, 0]),  # each ties with its neighbour
        ([0.489, 0.50, 0.4895], [1, 0, 1]),  # more than .01 below
        ([0.51, 0.50, 0.30], [0, 0, 1]),  # .01 ties, though as floats it is 0.010000000000000009
    ],
)
def test_ratings_are_trueskills_in_any_order_of_prompts(values, ranks):
    ratings = [(25, 25 / 3), (28, 6), (21, 3)]
    game = trueskill.TrueSkill(25, 25 / 3, 25 / 6, 25 / 300, 0.10)
    expected = game.rate([(trueskill.Rating(*r),) for r in ratings], ranks)
    found = []
    for order in itertools.permutations(range(3)):
        prompts = rated(*ratings)
        espl.update_ratings([prompts[i] for i in order], [values[i] for i in order], 7)
        found.append([(s.mu, s.sigma) for s in prompts])
        assert [s.history[0]["rank"] for s in prompts] == ranks
    assert all(r == found[0] for r in found)  # to the bit
    np.testing.assert_allclose(found[0], [(r.mu, r.sigma) for (r,) in expected], rtol=1e-3)


def test_ratings_by_hand():
    """Two prompts end as in trueskill's documentation, and one that is alone keeps its rating."""
    a, b = rated((25, 25 / 3), (25, 25 / 3))
    espl.update_ratings([a, b], [0.4, 0.8], 1)
    assert (a.mu, b.mu) == (pytest.approx(20.604, abs=1e-3), pytest.approx(29.396, abs=1e-3))
    assert a.sigma == b.sigma == pytest.approx(7.171, abs=1e-3)
    [alone] = rated((30, 2))
    espl.update_ratings([alone], [0.9], 3)
    assert alone.history == [{"iteration": 3, "value": 0.9, "rank": 0, "mu": 30, "sigma": 2}]


def test_a_child_inherits_its_rating_and_must_be_new():
    """The mean of (30, 2) and (20, 4) is weighted by precisions, 1/4 and 1/16."""
    population, c = rated((30, 2), (20, 4), (10, 1)), espl.Config(delta_sigma=3.0, window=1)
    child = espl.add_child(population, ["new"], population[:2], "crossover", 5, c)
    rating = pytest.approx(28), pytest.approx(math.sqrt(16 / 5 + 9))
    assert child == espl.SystemPrompt(3, ["new"], *rating, "crossover", [0, 1], 5)
    with pytest.raises(espl.NoChild, match="equal to prompt 0"):  # which has left the window
        espl.add_child(population, ["principle 0"], [child], "mutation", 6, c)
    assert population[3:] == [child]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, 0),
        ({"ucb_lambda": 0.0}, 1),
        ({"test_prompt": "latest"}, 2),
        ({"mode": "reflection"}, 2),
        ({"mode": "rl"}, 0),
        ({"num_prompts": 1}, 2),
    ],
)
def test_the_surest_prompt_is_tested_or_the_latest(flags, expected):
    run = SimpleNamespace(config=espl.Config(**flags), population=rated((25, 1), (30, 5), (24, 1)))
    assert espl.tested_prompt(run).id == expected


def test_a_prompt_older_than_the_pool_is_not_tested(monkeypatch):
    monkeypatch.setattr(espl, "MAX_POOL_SIZE", 2)
    run = SimpleNamespace(config=espl.Config(), population=rated((25, 1), (30, 5), (24, 1)))
    assert espl.tested_prompt(run).id == 2


# ---- Reading edits

ADD = '{"operation": "add", "principle": "x"}'
FENCE = f"```json\n[{ADD}]\n```"
PUNCTUATION = "See http://a.b, C# and // /* so */ ,] and {1, {2}} [3] ]}"
LATEX = (
    r"\frac{1}{2} \binom{n}{k} \times \theta \rho \sqrt{2} \(x\) \{1\} \pi \alpha",
    r"\neq \nu \nabla \upsilon \underline{u} \bar \right \text \forall \union",
)


@pytest.mark.parametrize(
    "reply, principles",
    [
        (f"I thought about it.\n\n{FENCE}\nThat is all.", ["x"]),
        (f"The list:\n[\n  {ADD},\n  {ADD}\n]\nDone.", ["x", "x"]),
        (FENCE.replace("\n", "\r\n"), ["x"]),
        (FENCE.replace('"x"', '"draft"') + "\nBetter:\n" + FENCE, ["x"]),
        (FENCE + "\n```python\nprint({'a': 1})\n```", ["x"]),
        (FENCE + "\n```python\nx = []\n```", ["x"]),
        ('```python\ns = "\n```\n' + FENCE, ["x"]),
        ("Set ``` before code.\n" + FENCE, ["x"]),
        (f'A 5" pipe.\n[\n  {ADD}\n]', ["x"]),
        (f"The set [{{1, 2}}] matters. [{ADD}] ends.", ["x"]),
        (f"[ // first\n {ADD}, # why\n]", ["x"]),
        (ADD.replace("x", PUNCTUATION), [PUNCTUATION]),
        (ADD.replace("x", "line\nbreak\tand tab"), ["line\nbreak\tand tab"]),
        (ADD.replace("x", r"a\n\"b\" caf\u00e9 \\frac"), ['a\n"b" café \\frac']),
        *[(FENCE.replace("x", latex), [latex]) for latex in LATEX],  # backslashes not doubled
        (f"[{ADD}, {{'operation': 'add', 'principle': 'y'}}]", ["x", "y"]),
        (f'```json\n[{ADD}, {{"operation": "add", "principle": "cut of', ["x"]),
        (f'[{ADD}, {{"operation": "add", "principle": "cut of\\', ["x"]),
        (f'[{ADD}, {{"operation": "add", "principle": "\\frac{{1}}{{n}} cut of', ["x"]),
        (f"<think>{FENCE.replace('x', 'z')}</think>{FENCE}", ["x"]),
        ('{"operations": [' + ADD + "]}", ["x"]),
        (FENCE + "\nNo: []", ["x"]),
        ("```json\n[]\n```", []),
        ("Nothing should change: [ ]\n", []),
        ("So **[]**.", []),
        ("", None),
        ("No change.", None),
        ("<think>hm</think>\nSo **[]**.", []),
        (ADD.replace("x", r"Try A.\nuse B"), ["Try A.\nuse B"]),
        ("We need [] to hold elements.", None),
        ('[{"principle": "x"}]', None),
        (f"<think>{FENCE}</think>No change.", None),
        (f"<think>{FENCE}", None),
        (f"{FENCE}<think>but", None),
    ],
)
def test_edits_are_read_as_carelessly_as_models_write_them(reply, principles):
    edits = espl.parse_edits(reply)
    assert (edits and [e.get("principle") for e in edits]) == principles


FRAGMENTS = [*"[]{}\"'\\`,:#/é\n", "```json", FENCE, ADD, "[]", '"operation"', '"add"', "<think>"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(["G0", "add"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=6,
)
EDIT = st.fixed_dictionaries(
    {"operation": JSON | st.sampled_from(["add", "modify", "merge", "remove"])},
    optional=dict.fromkeys(("principle", "modified_from", "merged_from", "remove_id"), JSON),
)


@settings(max_examples=150, deadline=None, database=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5)), st.lists(EDIT | JSON, max_size=3)
)
def test_no_reply_breaks_the_reader(fragments, value):
    read = espl.parse_edits("".join(fragments)) or []
    for edits in (read, espl.edits_in(value)):
        assert all("operation" in e for e in edits)
        principles, dropped = applied(edits)
        assert all(isinstance(p, str) and p for p in principles)
        assert sum(dropped.values()) <= len(edits)


UNITS = ["}", '"', '\\"', "`", "``` ", ", ", " \n", "[\n", "a", "[] "]


@pytest.mark.parametrize("unit", UNITS)
def test_reading_takes_linear_time(unit):
    for end in ("", '"}]', "a"):
        start = time.process_time()
        espl.parse_edits(unit * (40_000 // len(unit)) + end)
        assert time.process_time() - start < 1


# ---- Applying edits

ALL_KINDS = ("add", "modify", "remove", "merge")
FOUR = ["zero", "one", "two", "three"]


def add(text="new text"):
    return {"operation": "add", "principle": text}


def modify(old, text="new text"):
    return {"operation": "modify", "principle": text, "modified_from": old}


def merge(old, text="new text"):
    return {"operation": "merge", "principle": text, "merged_from": old}


def remove(old):
    return {"operation": "remove", "remove_id": old}


def tournament(ask=None, groups=(), best=0, **flags):
    prompts = [row[0].prompt for row in groups]
    return espl.Tournament(prompts, groups, best, ask, espl.parse_edits, espl.Config(**flags))


def applied(edits, principles=FOUR, kinds=ALL_KINDS, problems=(), prefix="", **flags):
    """The principles that edits make of these, and what was dropped."""
    r = tournament(**flags)
    ids = espl.numbered(principles, prefix)
    return espl.apply_edits(ids, edits, kinds, problems, r), +r.dropped


@pytest.mark.parametrize(
    "edits, result",
    [
        ([add(" a\n b ")], [*FOUR, "a b"]),
        ([modify("G1", "1!")], ["zero", "1!", "two", "three"]),
        ([modify("[G1]", "1!")], ["zero", "1!", "two", "three"]),  # as the listing shows ids
        ([remove("G0")], ["one", "two", "three"]),
        ([merge(["G1", "G3"], "m")], ["zero", "m", "two"]),
        ([merge(["G3", "G1", "G3"], "m")], ["zero", "two", "m"]),  # in place of the first named
        ([merge(["G0", "G1"], "m"), modify("G0", "n")], ["n", "two", "three"]),
        ([add("a"), add("b"), remove("G2")], ["zero", "one", "three", "a", "b"]),
        ([add("ZERO"), add("a"), add("A")], [*FOUR, "a"]),  # of equal principles the first stays
    ],
)
def test_edits_are_applied_in_order(edits, result):
    assert applied(edits) == (result, {})


PROBLEM = espl.Problem("p", "?", ("204",))


@pytest.mark.parametrize(
    "edit, why",
    [
        ({"operation": "delete"}, "unknown operation"),
        (modify("G9"), "unknown id"),
        (modify("B.G0"), "unknown id"),
        (remove("G9"), "unknown id"),
        (merge(["G0", "C7"]), "unknown id"),
        (merge(["G0", "G0"]), "unknown id"),
        (add("..."), "no text"),
        ({"operation": "add"}, "no text"),
        (modify("G0", ["x"]), "no text"),
        (add("half a pair \ud83d"), "no text"),
        (add("a\x00b"), "no text"),
        (add("w" * 769), "too long"),
        (add("So compute 204 first"), "leaks a problem"),
    ],
)
def test_a_bad_edit_is_dropped_alone_and_counted(edit, why):
    longest = "w " * 63 + "w" * 642
    result, dropped = applied([add(longest), edit, modify("G3", "new")], problems=[PROBLEM])
    assert result == ["zero", "one", "two", "new", longest] and dropped == {why: 1}


def test_edits_may_name_what_earlier_ones_left():
    edits = [merge(["G0", "G1"], "m"), modify("G1", "lost"), remove("G2"), remove("G2")]
    assert applied(edits) == (["m", "three"], {"unknown id": 2})
    assert applied([remove("G0"), add("a"), add("b")], max_principles=4)[0] == [*FOUR[1:], "a"]
    assert applied([add(), remove("G0")], kinds=("modify",)) == (FOUR, {"unknown operation": 2})


def test_an_echo_of_a_request_is_invalid():
    """The examples that a request shows are read, and none may be applied."""
    texts = espl.read_texts("", "")
    for request, prefix in (("critique", ""), ("aggregate", ""), ("crossover", "A.")):
        echo = espl.parse_edits(texts[request])
        assert len(echo) >= 2
        ten = [str(i) for i in range(10)]
        assert applied(echo, ten, prefix=prefix)[0] == ten


WORDS_13 = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.mark.parametrize(
    "principle, question, answer, leak",
    [
        (f"Note: {WORDS_13.upper()}!", WORDS_13, "1", True),
        (" - ".join(WORDS_13.split()[1:]) + " y", WORDS_13, "1", True),  # any run of twelve
        (" ".join(WORDS_13.split()[2:]) + " two one", WORDS_13, "1", False),  # eleven in a row
        ("If asked how many primes are below 5, sieve", "How many primes are below 5?", "15", True),
        ("Primes lie below: sieve.", "Primes lie below?", "15", False),  # too short to be told
        ("so x=204, then", "?", "204", True),
        ("Use 2043 or 1204 or 204.5 or 1.204", "?", "204", False),
        ("try -42", "?", "-42", False),
        ("it is 3.142", "?", "3.142", True),
        (r"prove \frac{1} {23}", "?", r"\frac{1}{23}", True),
        ("Ask about Marie Curie.", "?", "Marie Curie", True),
        ("Ask about Marie.", "?", "Marie Curie", False),
        ("Write six in words.", "?", "six", False),
        ("Find the sum of all digits.", "Find the sum of all", "?", False),
    ],
)
def test_a_principle_must_not_give_a_problem_away(principle, question, answer, leak):
    x = espl.Problem("p", question, ("no such answer", answer))
    assert espl.leaks(principle, x) == leak
    assert len(applied([add(principle)], problems=[PROBLEM, x])[0]) == 5 - leak
    assert len(applied([add(principle)], problems=[x], allow_leaks=True)[0]) == 5


# ---- Mutation and crossover


class Script:
    """An `ask` that answers from a script {request: [reply, ...]} and remembers its slots."""

    def __init__(self, **script):
        self.script = {name: iter(replies) for name, replies in script.items()}
        self.asked = {name: [] for name in script}

    def __call__(self, request, slots):
        for s in slots:
            assert set(s) >= set(espl.SLOTS[request])
            assert all(isinstance(text, str) for text in s.values())
        self.asked[request] += slots
        return [next(self.script[request]) for _ in slots]


PARENT = espl.SystemPrompt(4, ["zero", "one"])
FOUR_PROBLEMS = {"a": [1, 0], "b": [0, 0], "c": [-0.1, 1.0], "d": [1, 1]}


def mutation(ask, names="abcd", **flags):
    """(the child's principles or why there is none, dropped) of a mutation of the best, PARENT."""
    won = [graded(FOUR_PROBLEMS[x], x, PARENT) for x in names]
    lost = [graded([0], x) for x in names]
    r = tournament(ask, [lost, won], best=1, **flags)
    try:
        child, parents = espl.mutate(r)
        assert parents == [PARENT]
        return child, +r.dropped
    except espl.NoChild as e:
        return str(e), +r.dropped


def test_mutation_summarises_criticises_aggregates():
    ask = Script(
        summarize=["sum a0", "sum a1", "sum c0", ""],
        critique=[
            json.dumps([add("add 0"), add("add 1"), add("add 2")]),
            json.dumps([modify("G7"), merge(["G0", "G1"]), modify("G1", "1\n !"), add("add c")]),
        ],
        aggregate=[json.dumps([merge(["G0", "C2"], "0 and c"), add("no"), modify("G1", "1!")])],
    )
    child, dropped = mutation(ask)
    assert child == ["0 and c", "1!", "add 0", "add 1"]
    assert dropped == {"unknown id": 1, "unknown operation": 2}
    listed = "[G0] zero\n[G1] one"
    assert [s["response"] for s in ask.asked["summarize"]] == ["a0", "a1", "c0", "c1"]
    attempts = "Attempt 1 (wrong, reward -0.1):\nsum c0\n\nAttempt 2 (correct):\n(no summary)"
    asked = {"problem": "question c", "answer": "truth-c", "principles": listed}
    assert ask.asked["summarize"][2] == asked | {"response": "c0", "grade": "wrong, reward -0.1"}
    assert ask.asked["critique"][1] == asked | {"attempts": attempts, "max_operations": "2"}
    candidates = listed + "\n[C0] add 0\n[C1] add 1\n[C2] add c"
    assert ask.asked["aggregate"] == [{"principles": candidates, "suggestions": "[G1] -> 1 !"}]


@pytest.mark.parametrize(
    "flags, names",
    [
        ({"reflect_on": "contrast"}, "ac"),
        ({"reflect_on": "failures"}, "abc"),
        ({"reflect_on": "all"}, "abcd"),
        ({"reflect_on": "all", "reflect_problems": 3}, "abc"),
    ],
)
def test_problems_that_a_mutation_reflects_on(flags, names):
    ask = Script(summarize=["s"] * 8, critique=["[]"] * 4)  # [] is an answer: not asked again
    assert mutation(None, "bd")[0] == "no problem to reflect on (--reflect-on contrast)"
    why, _ = mutation(ask, **flags)
    assert [s["problem"][-1] for s in ask.asked["critique"]] == list(names)
    assert "(0 critiques unreadable)" in why


@pytest.mark.parametrize(
    "critiques, plans, child, failed",
    [
        (["?", f"[{ADD}]"], ["[]"], "['zero', 'one', 'x']", 0),
        (["?", "?"], [], "(1 critiques unreadable)", 1),
        (["", json.dumps([remove("G0")])], [], "(0 critiques unreadable)", 0),
        ([f"[{ADD}]"], ["?", "```json\n[]\n```"], "['zero', 'one', 'x']", 0),
        ([f"[{ADD}]"], ["?", "[] or not"], "unreadable", 1),
        ([f"[{ADD}]"], ["?", "<think>[]"], "unreadable", 1),
        ([json.dumps([modify("G1", "1")])], ["[]"], "['zero', 'one']", 0),  # the plan decides
    ],
)
def test_what_cannot_be_read_is_asked_for_once_more(critiques, plans, child, failed):
    ask = Script(summarize=["s"] * 2, critique=critiques, aggregate=plans)
    found, dropped = mutation(ask, "ab")
    assert child in str(found) and dropped["unreadable reply"] == failed
    asked = [len(ask.asked[name]) for name in ("critique", "aggregate")]
    assert asked == [len(critiques), len(plans)]


def test_an_empty_aggregate_section_needs_no_parser():
    """`ask` returns "[]" for it, which a task's own grammar need not know."""
    ask = Script(summarize=["s"] * 2, critique=["x"], aggregate=["[]"])
    r = tournament(ask, [[graded(FOUR_PROBLEMS["a"], "a", PARENT)]])
    r.parse = lambda reply: [{"operation": "add", "principle": reply}] if reply == "x" else None
    assert espl.mutate(r)[0] == [*PARENT.principles, "x"]


def test_only_the_unreadable_ones_are_asked_again():
    slots = [dict.fromkeys(espl.SLOTS["critique"], name) for name in "abc"]
    ask = Script(critique=["[]", "?", f"[{ADD}]", f"[{ADD}]"])
    edits = tournament(ask).ask_for_edits("critique", slots)
    assert [len(e) for e in edits] == [0, 1, 1] and ask.asked["critique"] == [*slots, slots[1]]
    greedy = tournament(Script(critique=["?"]), reflect_temperature=0.0)  # it would say the same
    assert greedy.ask_for_edits("critique", slots[:1]) == [None]


def test_mutation_drops_leaks_of_proposal_and_plan():
    ask = Script(
        summarize=["s"] * 2,
        critique=[json.dumps([add("It is truth-a"), add("fine")])],
        aggregate=[json.dumps([modify("G0", "Say truth-a")])],
    )
    child, dropped = mutation(ask, "a")
    assert child == ["zero", "one", "fine"] and dropped == {"leaks a problem": 2}


def crossover(ask, rewards, best):
    """(principles and parents, or why there is no child; dropped) of prompts with these values."""
    texts = [["b zero"], ["a zero", "a one"], ["c"]]
    groups = []
    for i, row in enumerate(rewards):
        s = espl.SystemPrompt(10 + i, texts[i])
        groups.append([graded([r], f"q{b}", s) for b, r in enumerate(row)])
    r = tournament(ask, groups, best)
    try:
        return espl.crossover(r), +r.dropped
    except espl.NoChild as e:
        return str(e), +r.dropped


@pytest.mark.parametrize(
    "values, best, won",
    [
        ([[0.9, 0.1, 0.5], [0.2, 0.8, 0.7], [0.2, 0.1, 0.9]], 0, {0: [0], 1: [1], 2: [2]}),
        ([[0.1, 0.9], [0.8, 0.5]], 1, {1: [0], 0: [1]}),  # the best one is set A
        ([[0.9, 0.28], [0.2, 0.29]], 0, {0: [0], 1: [1]}),  # .01 above is enough
        ([[0.9, 0.511], [0.2, 0.52]], 0, {}),  # .009 is not
        ([[0.9, 0.5, 0.1], [0.2, 0.5, 0.7], [0.2, 0.5, 0.7]], 0, {}),  # a shared win is nobody's
        ([[0.5, 0.5], [0.9, 0.4], [0.4, 0.9]], 0, {}),  # the best one must win a problem
        ([[0.9, 0.9], [0.1, 0.1]], 0, {}),  # and so must another one
    ],
)
def test_parents_strictly_won_a_problem(values, best, won):
    ask = Script(crossover=["[]"])
    found, _ = crossover(ask, values, best)
    if not won:
        assert "strictly won" in found and not ask.asked["crossover"]
        return
    assert [s.id - 10 for s in found[1]] == list(won)
    [slots] = ask.asked["crossover"]
    told = re.findall(r"Problem (\d) \(won by set (\w)\):\nquestion q\1", slots["wins"])
    expected = [(str(b), letter) for letter, i in zip("ABC", won) for b in won[i]]
    assert told == expected


def test_crossover_edits_set_a():
    edits = [modify("A.G0", "a zero, improved"), modify("B.G0", "no"), add("from b")]
    edits += [merge(["A.G0", "A.G1"]), add("truth-q1"), remove("A.G1")]
    ask = Script(crossover=["Reasons [A.G0].\n" + json.dumps(edits)])
    (child, parents), dropped = crossover(ask, ((0.0, 1.0), (1.0, 0.2), (0.5, 0.2)), best=1)
    assert child == ["a zero, improved", "from b"] and [s.id for s in parents] == [11, 10]
    assert dropped == {"unknown id": 1, "unknown operation": 1, "leaks a problem": 1}
    sets = "Set A:\n[A.G0] a zero\n[A.G1] a one\n\nSet B:\n[B.G0] b zero"
    assert ask.asked["crossover"][0]["sets"] == sets
    why, dropped = crossover(Script(crossover=["?", "still nothing"]), ((0, 1), (1, 0)), best=1)
    assert "unreadable" in why and dropped == {"unreadable reply": 1}


# ==================================================================================================
# Words, data, rewards, flags
# ==================================================================================================


def task_saying(texts):
    return espl.Task("t", "t.py", [], [], [], texts, None)


@pytest.mark.parametrize("section", [name for name, slots in espl.SLOTS.items() if slots])
def test_a_section_without_a_slot_is_named(section):
    for slot in espl.SLOTS[section]:
        others = "".join(f"{{{s}}}" for s in espl.SLOTS[section] if s != slot)
        with pytest.raises(espl.UserError, match=rf"\[{section}\] lacks the slot {{{slot}}}"):
            espl.read_texts(f"[{section}]\n{others}", "")


def test_a_misspelt_section_is_named():
    with pytest.raises(espl.UserError, match=r"have a section \[sumarize\]; .* summarize"):
        espl.read_texts("[sumarize]\nBriefly: {response}", "")


def test_a_tasks_sections_replace_the_seeds_and_a_file_replaces_both(tmp_path):
    body = '{x}, \\frac{1}{2}, {"operation": "add"}, [no section] here,\n[[1, 2]]\n\n{sets} {wins}'
    seed = espl.read_texts("", "")
    assert seed.keys() == espl.SLOTS.keys() and task_saying(seed).root == []
    own = f"a comment\n[principles]\n one \n\ntwo\n[crossover]\n{body}\n"
    texts = espl.read_texts(own, "")
    assert texts["crossover"] == body and "{attempts}" in texts["critique"]
    assert task_saying(texts).root == ["one", "two"]
    (tmp_path / "p.txt").write_text("[principles]\nthree", encoding="utf-8-sig")
    changed = espl.read_texts(own, str(tmp_path / "p.txt"))
    assert changed == texts | {"principles": "three"}


def test_an_empty_section_is_not_asked(chat):
    texts = espl.read_texts("[summarize]\n\n[aggregate]\n", "")
    assert texts["summarize"] == texts["aggregate"] == ""
    run = espl.Run(espl.Config(), task_saying(texts), chat, SimpleNamespace(policy=None), [], None)
    slots = [{"response": "4 * 2"}, {"response": "8"}]
    assert espl.ask(run, 1, Counter(), "summarize", slots) == ["4 * 2", "8"]
    [plan] = espl.ask(run, 1, Counter(), "aggregate", [{"principles": "p", "suggestions": "s"}])
    assert espl.parse_edits(plan) == []


def test_slots_are_filled_in_one_pass():
    slots = {"problem": "{answer} {problem}", "answer": r"\1 \g<0> {problem}"}
    filled = espl.fill(r'{problem}|{answer}|{unknown} \frac{1}{2} {"a": {}} {{answer}}', slots)
    assert filled == (
        r"{answer} {problem}|\1 \g<0> {problem}|{unknown} \frac{1}{2} "
        r'{"a": {}} {\1 \g<0> {problem}}'
    )


def test_the_paragraph_of_principles_is_left_out_while_there_are_none():
    texts = {"system": "first\n\nuse these:\n{principles}\n\nlast"}
    task = task_saying(texts)
    assert espl.system_text(task, []) == "first\n\nlast"
    text = espl.system_text(task, ["Try {principles}.", "Use C."])
    assert text == "first\n\nuse these:\n[G0] Try {principles}.\n[G1] Use C.\n\nlast"


def lesson(folder, train, test=({"question": "t", "answer": 1},), code="", **flags):
    """The task of a file with a reward and these records."""
    (folder / "lesson.py").write_text(f"def reward(record, response):\n    return 1\n\n{code}\n")
    files = {"train_file": write_jsonl(folder / "a", train)}
    files["test_file"] = write_jsonl(folder / "b", test)
    return espl.load_task(espl.Config(task=str(folder / "lesson.py"), **files, **flags))


@pytest.mark.parametrize(
    "record, question, answers",
    [
        ({"problem": " p ", "answer": 0}, "p", ("0",)),
        ({"question": "q", "groundtruth": "x "}, "q", ("x",)),
        ({"question": "q", "golden_answers": ["a", 2]}, "q", ("a", "2")),
        ({"question": "q", "answer": 142.5}, "q", ("142.5",)),
        ({"question": "q", "answer": 142.0}, "q", ("142",)),
    ],
)
def test_records_become_problems(record, question, answers, tmp_path):
    [x] = lesson(tmp_path, [record, "\n"]).train
    assert (x.question, x.answers, x.record) == (question, answers, record)
    assert x.id == f"{tmp_path / 'a'}:1"


@pytest.mark.parametrize("answer", ["1e400", "NaN", "true", "null", '""', "[]", "{}", '["a", ""]'])
def test_what_is_no_answer_is_refused(answer, tmp_path):
    with pytest.raises(espl.UserError, match="a:1 needs `problem`"):
        lesson(tmp_path, [f'{{"problem": "p", "answer": {answer}}}\n'])


def test_equal_questions_and_test_questions_leave_the_training_set(tmp_path):
    code = "def prepare(record):\n    return record | {'question': record['question'].lower()}"
    train = [{"question": q, "answer": 1} for q in ("a", "b", " A ", "t", "c")]
    test = [{"question": q, "answer": 1} for q in ("T", "t", "u")]
    task = lesson(tmp_path, train, test, code)
    assert sorted(x.question for x in task.train + task.val) == ["a", "b", "c"]
    assert [x.question for x in task.test] == ["t", "u"]


@pytest.mark.parametrize(
    "n, val_size, train_size, sizes",
    [(100, 16, 256, (84, 16)), (100, 16, 50, (40, 10)), (9, 0, 256, (9, 0))],
)
def test_the_seed_holds_out_validation_problems(n, val_size, train_size, sizes, tmp_path):
    records = [{"problem": f"p{i}", "answer": i} for i in range(n)]
    flags = {"val_size": val_size, "train_size": train_size}
    one, two, other = (lesson(tmp_path, records, seed=s, **flags) for s in (0, 0, 1))
    assert (len(one.train), len(one.val)) == sizes
    assert not [x for x in one.train if x in one.val]
    assert (one.train, one.val) == (two.train, two.val) and one.train != other.train


@pytest.mark.parametrize("n, B, sizes", [(19, 10, [10, 9]), (9, 3, [3, 3, 3])])
def test_every_epoch_trains_on_every_problem(n, B, sizes):
    task = SimpleNamespace(train=list(range(n)))
    run = espl.Run(espl.Config(batch_size=B, epochs=2), task, None, None, [], None)
    last = espl.last_iteration(run)
    order = [espl.next_problems(run, i + 1) for i in range(last)]
    assert [len(batch) for batch in order] == sizes * 2
    first, second = sum(order[: last // 2], []), sum(order[last // 2 :], [])
    assert sorted(first) == sorted(second) == task.train and first != second


def grades_of(reward, *texts):
    """Grades of responses by a reward that depends only on them."""
    task = SimpleNamespace(name="t", reward=lambda record, response: reward(response))
    return espl.grade(task, [({}, text) for text in texts])


@pytest.mark.parametrize(
    "reward, expected",
    [
        (sum([1 / 9] * 9), (1.0, "correct")),
        (1 - 9e-7, (1.0, "correct")),
        (0.25, (0.25, "partly right")),
        (-0.5, (-0.5, "wrong")),
        ((0.5, "close"), (0.5, "close")),
        (2, (0.0, "error")),
        (math.nan, (0.0, "error")),
        ("good", (0.0, "error")),
        (None, (0.0, "error")),
        ((1, "a", "b"), (0.0, "error")),
    ],
)
def test_rewards(reward, expected):
    assert grades_of(lambda text: reward, "x") == [expected]


@pytest.mark.parametrize("failure", [KeyError("colour"), SystemExit("colour")])
def test_a_reward_that_fails_counts_as_0_with_one_warning(failure, capsys):
    def reward(text):
        if text == "odd":
            raise failure
        return 1

    error = 0.0, "error"
    assert grades_of(reward, "odd", "even", "odd") == [error, (1.0, "correct"), error]
    [warning] = capsys.readouterr().err.splitlines()
    assert "the reward of task t failed" in warning and "colour" in warning
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        grades_of(reward, "odd")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [0.5, -0.5]),
        ({"baseline": "marginal"}, [0.25, -0.75, 0.25, 0.25]),
        ({"mask_truncated": True}, [0.5]),
        ({"kl_coef": 0.1}, [0.5, -0.5, 0, 0]),
    ],
)
def test_advantages(flags, expected):
    """One problem, two prompts with rewards (1, 0) and (1, 1); each second response is cut off."""
    groups = [[graded(r, stops=("eos", "length"))] for r in ([1, 0], [1, 1])]
    rollouts = espl.set_advantages(groups, espl.Config(**flags))
    assert [y.advantage for y in rollouts] == pytest.approx(expected)


def test_the_marginal_baseline_is_that_of_each_problem():
    groups = [[graded([1, 0]), graded([0, 0])], [graded([1, 1]), graded([1, 0])]]
    rollouts = espl.set_advantages(groups, espl.Config(baseline="marginal"))
    expected = [0.25, -0.75, 0.25, 0.25, -0.25, -0.25, 0.75, -0.25]
    assert [y.advantage for y in rollouts] == pytest.approx(expected)


def test_prompts_that_did_equally_well_tie_exactly():
    """V_i is no mean of means, which differ by rounding where rewards come in another order."""
    zeros = [0] * 5
    a = [graded(r) for r in ([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], zeros)]
    b = [graded(r) for r in ([1, 1, 1, 0, 0], zeros, zeros, zeros)]
    assert np.mean([g.value for g in a]) != np.mean([g.value for g in b])
    assert espl.mean_reward(a) == espl.mean_reward(b) == 0.15


# ---- Flags


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        espl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, field in espl.Config.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}[ ,].*\(default: {re.escape(str(field.default))}\)", text), name


PAPER = """batch_size 10, num_rollouts 5, num_prompts 3, window 10, max_operations 2, lora_rank 32,
learning_rate 4e-5, kl_coef 0, p_crossover 0.2, ucb_lambda 2, delta_sigma 1, epochs 10,
temperature 0.6, top_p 0.95, max_new_tokens 15000, train_size 256"""


def test_the_defaults_are_the_papers():
    c = espl.Config()
    for line in PAPER.split(","):
        name, value = line.split()
        assert getattr(c, name) == float(value)
    assert (c.mode, c.selection, c.reflector) == ("espl", "top_random", "reference")
    assert (c.loss, c.baseline) == ("importance_sampling", "prompt")
    assert espl.MAX_POOL_SIZE == 200


def test_a_tasks_defaults_give_way_to_flags_and_it_reads_its_argument(tmp_path, monkeypatch):
    path = tmp_path / "lesson.py"
    path.write_text(
        "import beside\nDEFAULTS = dict(batch_size=beside.SIZE, loss='ppo')\nreward = len"
    )
    (tmp_path / "beside.py").write_text("SIZE = 7")
    c = espl.parse_args(["--task", f"{path}:chain:9", "--loss", "cispo", "--no-thinking"])
    assert (c.batch_size, c.loss, c.thinking, c.window) == (7, "cispo", False, 10)
    assert c.task_argument == "chain:9"
    monkeypatch.chdir(tmp_path)
    c = espl.parse_args(["--task", "lesson.py", "--test-file", "beside.py"])
    assert (c.task, c.test_file) == (str(path), str(tmp_path / "beside.py"))
    path.write_text("DEFAULTS = dict(iterations=5)\nreward = len")
    assert espl.parse_args(["--task", str(path)]).iterations == 5
    assert espl.parse_args(["--task", str(path), "--epochs=2"]).iterations == 0  # by epochs
    both = espl.parse_args(["--task", str(path), "--epochs=2", "--iterations=3"])
    assert both.iterations == 3
    assert espl.Config(task="gym").task_argument == ""


def test_a_task_does_not_replace_a_module_of_pythons(tmp_path):
    problems = "def problems(config): return [], [dict(problem='p', answer=1)]"
    (tmp_path / "math.py").write_text(f"reward = len\n{problems}")
    task = espl.load_task(espl.Config(task=str(tmp_path / "math.py")))
    assert task.name == "math" and sys.modules["math"] is math


def test_a_task_may_grade_in_processes(tmp_path):
    """They must find its functions by module and name."""
    path = tmp_path / "pooled.py"
    path.write_text(
        "import pickle\ndef work(text): return len(text)\n"
        "def reward(record, text): return pickle.loads(pickle.dumps(work))(text)"
    )
    assert espl.task_module(str(path)).reward({}, "abc") == 3


# ==================================================================================================
# Runs
# ==================================================================================================

MODES = ("espl", "evolution", "reflection", "rl")
EXAM = '''
"""A made-up task. The reward is arbitrary but fixed, so that a random model earns it sometimes."""

import zlib

DEFAULTS = dict(
    batch_size=4, num_rollouts=3, max_new_tokens=12, max_rows=8, reflect_tokens=16, temperature=1.0,
    top_p=1.0, lora_rank=2, iterations=3, test_samples=2, val_size=2, learning_rate=0.05,
    max_principles=12, p_crossover=1.0, save_every=9,
)
PROMPTS = """
[system]
w1 w2

w3 {principles}
[principles]

[summarize]
{problem} {principles} {response} {grade} {answer}
[critique]
{problem} {principles} {attempts} {answer} {max_operations}
[aggregate]
{principles} {suggestions}
[crossover]
{sets} {wins}
"""


def problems(config):
    records = [{"problem": f"problem w{i} {i}", "answer": i % 3} for i in range(15)]
    return records[:12], records[12:]


def reward(record, response):
    verdict = zlib.crc32(response.encode()) % 16
    if verdict == 15:
        raise ValueError("this reward is broken, für immer")
    return float(verdict % 3 == record["answer"])


def parse(reply):
    """Any reply with a word becomes an edit, so that a random model evolves its prompts."""
    text = f"w{zlib.crc32(reply.encode()) % 1000} é {reply[:9]}"
    return [{"operation": "add", "principle": text}] if reply else None
'''


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """A folder with a tiny model, a task and espl.py, which needs no other file of ours."""
    folder = tmp_path_factory.mktemp("exam")
    for name in ("espl.py", "prompts_seed.txt"):
        shutil.copy(espl.HERE / name, folder)
    make_tiny_model(folder / "model", context=128)
    (folder / "exam.py").write_text(EXAM, encoding="utf-8")
    return folder


def command(exam, directory, *more):
    """The command line of a small run."""
    flags = ["--task", exam / "exam.py", "--model", exam / "model", "--run-dir", directory, *more]
    return [str(f) for f in flags]


def play(argv, code=0, **patches):
    """Runs main(argv) with other functions in place of some of espl's; returns the Run."""
    runs, start_run = [], espl.start_run

    def start(c):
        runs.append(start_run(c))
        return runs[0]

    patches = {"start_run": start, "subprocess": SimpleNamespace(run=print)} | patches
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(espl, name, value)
        try:
            assert espl.main([str(a) for a in argv]) == code
        finally:
            for run in runs:
                run.lock.close()  # as the end of the process would
    return runs[0] if runs else None


def read_lines(run, name):
    text = (run.directory / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def metrics_of(run):
    """metrics.jsonl without its clock."""
    return [m | {"seconds": None} for m in read_lines(run, "metrics")]


def prompts_of(run):
    return json.loads((run.directory / "population.json").read_text(encoding="utf-8"))


def learned(run):
    return run.policy.theta, run.trainer.opt_state


def equal(a, b):
    """Whether two trees of arrays are equal to the bit."""
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def assert_same_run(a, b):
    assert metrics_of(a) == metrics_of(b) and prompts_of(a) == prompts_of(b)
    assert equal(learned(a), learned(b))
    for name in ("rollouts", "reflections"):
        assert read_lines(a, name) == read_lines(b, name)


@pytest.fixture(scope="module")
def run_of(exam):
    """run_of(mode): a run of three iterations, made once. `given` is what rl_update was given."""
    runs = {}

    def make(mode):
        if mode in runs:
            return runs[mode]
        given, rl_update = [], espl.rl_update

        def update(trainer, rollouts, number):
            given.append((len(rollouts), number))
            return rl_update(trainer, rollouts, number)

        runs[mode] = play(command(exam, exam / mode, "--mode", mode), rl_update=update)
        runs[mode].given = given
        return runs[mode]

    return make


@pytest.mark.parametrize("mode", MODES)
def test_the_logs_of_a_run_agree(run_of, mode):
    run = run_of(mode)
    names = {p.name for p in run.directory.iterdir()}
    logs = {"metrics.jsonl", "rollouts.jsonl", "population.json", "config.json"}
    assert names - {"lock", "reflections.jsonl"} == logs | {"checkpoints"}
    lines, rollouts = read_lines(run, "metrics"), read_lines(run, "rollouts")
    assert [m["iteration"] for m in lines] == [0, 1, 2, 3]
    assert [m["iteration"] for m in lines if "val" in m and "test" in m] == [0, 3]
    for m, B in zip(lines[1:], (4, 4, 2)):  # of ten problems two are left for the third batch
        now = [r for r in rollouts if r["iteration"] == m["iteration"]]
        made = [r for r in now if r["split"] == "train"]
        each = Counter(r["problem"] for r in made).values()
        assert list(each) == [9] * B  # M N of each problem in every mode
        shares = Counter((r["prompt"], r["problem"]) for r in made).values()
        assert max(shares) - min(shares) <= 1  # the share of missing prompts goes to the others
        for s, value in m["values"].items():
            assert value == np.mean([r["reward"] for r in made if str(r["prompt"]) == s])
        assert m["reward_mean"] == pytest.approx(np.mean([r["reward"] for r in made]))
        assert m["response_tokens"] == np.mean([r["tokens"] for r in made])
        rewards = {}
        for r in made:
            rewards.setdefault((r["prompt"], r["problem"]), set()).add(r["reward"])
        assert m["contrast_groups"] == np.mean([len(found) > 1 for found in rewards.values()])
        assert m["truncated"] == np.mean([r["stop"] == "length" for r in made])
        assert m["outcomes"] == Counter(r["outcome"] for r in made)
        assert m["tokens"]["rollouts"] == sum(r["tokens"] for r in made)
        rest = sum(r["tokens"] for r in now) - m["tokens"]["rollouts"]
        assert m["tokens"].get("evaluation", 0) == rest
    assert {r["outcome"] for r in rollouts} == {"correct", "wrong", "error"}


@pytest.mark.parametrize("mode", MODES)
def test_what_learns(run_of, mode):
    run, prompts, lines = run_of(mode), prompts_of(run_of(mode)), metrics_of(run_of(mode))
    frozen = equal(run.policy.theta, run.policy.theta_ref)
    assert frozen == (mode in ("evolution", "reflection")) and bool(run.given) != frozen
    assert [total for _, total in run.given] == [] if frozen else [36, 36, 18]  # N M B
    assert mode != "espl" or any(0 < with_signal < total for with_signal, total in run.given)
    if mode == "rl":
        assert len(prompts) == 1 and all(list(m["values"]) == ["0"] for m in lines[1:])
        return
    assert [s["id"] for s in prompts] == list(range(len(prompts))) and len(prompts) >= 3
    for m in lines[1:]:
        known = [str(s["id"]) for s in prompts if s["iteration"] < m["iteration"]]
        competing = known[-1:] if mode == "reflection" else known[:3]
        assert len(m["values"]) == len(competing)
        assert mode != "reflection" or list(m["values"]) == competing
    for s in prompts[1:]:
        m = lines[s["iteration"]]
        assert m["children"][s["operator"]] == {"id": s["id"], "parents": s["parents"]}
        assert s["parents"][0] == m["batch_winner"]
    operators = {s["operator"] for s in prompts} - {"root"}
    assert operators == ({"mutation"} if mode == "reflection" else {"mutation", "crossover"})
    assert lines[1]["dropped"]["unknown operation"]  # the plan's "add"


@pytest.mark.parametrize("mode", MODES)
def test_the_last_line_has_the_table_of_the_rollouts(run_of, mode):
    run = run_of(mode)
    last = metrics_of(run)[-1]
    table, tested = last["table"], last["tested_prompt"]
    final = [r for r in read_lines(run, "rollouts") if r["iteration"] == 3]
    cells = {"before, root": ("test_before", 0), "before, tested": ("test_before", tested)}
    cells |= {"after, root": ("test_after", 0), "after, tested": ("test", tested)}
    for name, split_and_prompt in cells.items():
        cell = [r for r in final if (r["split"], r["prompt"]) == split_and_prompt]
        for x, score in zip(run.task.test, table[name], strict=True):
            assert score == np.mean([r["reward"] for r in cell if r["problem"] == x.id])
    assert last["test"] == pytest.approx(np.mean(table["after, tested"]))
    if mode in ("evolution", "reflection"):
        assert table["before, tested"] == table["after, tested"]  # all have the same seeds


def test_before_is_the_base_model_and_after_is_not(run_of):
    """Frozen weights are those before training: the same root prompt then gets the same texts."""

    def texts(mode, split):
        lines = read_lines(run_of(mode), "rollouts")
        return [r["text"] for r in lines if (r["split"], r["prompt"]) == (split, 0)]

    assert texts("rl", "test_before") == texts("evolution", "test_before")
    assert texts("rl", "test_before") != texts("rl", "test_after")


def test_a_run_trains_the_distribution_that_it_samples(exam, tmp_path):
    flags = ["--mode", "rl", "--iterations", "2", "--temperature", "0.6", "--kl-coef", "0.1"]
    first, *later = metrics_of(play(command(exam, tmp_path / "run", *flags)))[1:]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and all(m["kl"] > 1e-4 for m in later)
    for m in (first, *later):
        assert m["ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_flags_reach_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(espl, "cache_tokens", lambda *_: 4711)
    how = {"loss": "ppo", "temperature": 0.7, "clip": 0.1, "kl_coef": 0.05}
    how |= {"microbatch_tokens": 99, "max_rows": 3, "model_parallel": 2}
    run = start(tmp_path, prompt_role="user", thinking=False, **how)
    assert run.trainer.objective == espl.Objective("ppo", 0.7, 0.1, 0.05)
    assert (run.trainer.max_tokens, run.policy.max_rows, run.policy.cache_tokens) == (99, 3, 4711)
    assert (run.chat.role, run.chat.thinking) == ("user", False)
    assert dict(run.policy.mesh.shape) == {"data": 4, "model": 2}


def test_what_is_sampled_graded_and_counted(tmp_path, monkeypatch):
    """The weights, settings, seeds and tool of the sampler; only what follows </think> counts."""
    chat, calls = make_chat(OPENING), []
    responses = [chat.tokenizer(text).input_ids[1:] for text in ("no</think>yes", "yes")]

    def generate(policy, theta, rollouts, sampling, environment):
        calls.append((theta, sampling, environment("y")))
        for y, tokens in zip(rollouts, responses):
            y.tokens, y.logprobs = tokens, [None] + [0.0] * (len(tokens) - 1)

    def reward(record, text):
        return float(text == "yes"), text

    def environment(chat, y):
        return chat, y

    monkeypatch.setattr(espl, "generate", generate)
    task = task_saying({"system": "{principles}"})
    task = dataclasses.replace(task, reward=reward, environment=environment)
    c = espl.Config(temperature=0.3, top_p=0.8, max_new_tokens=7, run_dir=str(tmp_path))
    run = espl.Run(c, task, chat, SimpleNamespace(policy=SimpleNamespace(theta="now")), [], None)
    jobs = [(espl.SystemPrompt(0, []), espl.Problem("p", "q", ("a",)), 2)]
    for split, iteration, theta in (
        ("train", 1, None),
        ("train", 2, None),
        ("test", 2, None),
        ("test_before", 2, "base"),
    ):
        [g] = espl.sample_groups(run, jobs, split, iteration, theta)
        assert [(y.reward, y.outcome) for y in g.rollouts] == [(1, "yes"), (0, "wrong")]
    thetas, samplings, replies = zip(*calls)
    assert thetas == ("now", "now", "now", "base")
    assert {s[:3] for s in samplings} == {(0.3, 0.8, 7)}
    first, second, test, before = (s.seed for s in samplings)
    assert test == before and len({first, second, test}) == 3
    assert all(reply[0] is chat and reply[1] == "y" for reply in replies)
    sampled = 2 * sum(len(tokens) - 1 for tokens in responses)  # a tool's token does not count
    assert run.tokens == {"rollouts": sampled, "evaluation": sampled}


def test_evaluations_come_when_they_are_due(monkeypatch):
    """And an iteration's seconds and tokens are its own."""
    due, seen = [], []
    c = espl.Config(iterations=7, eval_every=3, save_every=2)
    run = SimpleNamespace(config=c, seconds=Counter(), tokens=Counter(), task=None)

    def iterate(run, iteration):
        run.seconds["update"] += 1
        run.tokens["rollouts"] += 1
        return {}

    def evaluate(run, iteration, last):
        due.append((iteration, last))
        return {"test": 0.5}

    def write_logs(run, metrics):
        seen.append((dict(run.seconds), dict(run.tokens)))

    saved = []
    fakes = {"espl_iteration": iterate, "evaluate": evaluate, "write_logs": write_logs}
    fakes |= {"print_line": str, "save_checkpoint": lambda run, m: saved.append(m["iteration"])}
    for name, fake in fakes.items():
        monkeypatch.setattr(espl, name, fake)
    espl.train(run)
    assert due == [(0, False), (3, False), (6, False), (7, True)]
    assert saved == [0, 2, 3, 4, 6, 7]
    assert seen == [({}, {})] + [({"update": 1}, {"rollouts": 1})] * 7


def breeding(operator, chance, monkeypatch, times=1):
    """How often an operator is tried."""
    monkeypatch.setattr(espl, "OPERATORS", {"it": (operator, lambda c: chance)})
    run = SimpleNamespace(config=espl.Config(), population=[])
    winner = SimpleNamespace(winner=SimpleNamespace(id=0), dropped={})
    rng = np.random.default_rng(0)
    return sum(bool(espl.breed(run, winner, 1, rng)["no_child"]) for _ in range(times))


def test_an_operator_has_its_chance(monkeypatch):
    assert espl.OPERATORS["crossover"][1](espl.Config(p_crossover=0.37)) == 0.37

    def operator(tournament):
        raise espl.NoChild("none")

    tried = breeding(operator, 0.3, monkeypatch, 1000)
    assert scipy.stats.binomtest(tried, 1000, 0.3).pvalue > 1e-4


def test_only_want_of_memory_leaves_an_operator(monkeypatch):
    def exhausted(tournament):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(jax.errors.JaxRuntimeError):
        breeding(exhausted, 1.0, monkeypatch)
    assert breeding(lambda tournament: 1 / 0, 1.0, monkeypatch) == 1


def test_reflections_are_logged(run_of):
    lines = read_lines(run_of("evolution"), "reflections")
    asked = Counter(r["request"] for r in lines if r["iteration"] == 1)
    assert asked["summarize"] == 9 * asked["critique"] > 0  # for each rollout; for each problem
    assert {r["request"] for r in lines} == {"summarize", "critique", "aggregate", "crossover"}
    assert all(r["prompt"] and isinstance(r["reply"], str) for r in lines)
    assert "\u2028" in json.dumps(lines, ensure_ascii=False)  # it ends no line of a log


def test_the_seed_decides_everything_and_test_answers_nothing(exam, run_of, tmp_path, capsys):
    """The same run with other answers to the test problems: only test scores differ."""
    one = run_of("espl")
    answers = [x.record | {"answer": (x.record["answer"] + 1) % 3} for x in one.task.test]
    test_file = tmp_path / "test.jsonl"
    write_jsonl(test_file, answers)
    two = play(command(exam, tmp_path / "two", "--test-file", test_file))
    assert equal(learned(one), learned(two))
    assert prompts_of(one) == prompts_of(two)
    for a, b in zip(read_lines(one, "rollouts"), read_lines(two, "rollouts"), strict=True):
        assert a == b if a["split"] == "train" else a["text"] == b["text"]
    tests = [[m["test"] for m in metrics_of(run) if "test" in m] for run in (one, two)]
    assert tests[0] != tests[1]

    other = command(exam, tmp_path / "other", "--seed", 1, "--iterations", 1, "--mode", "evolution")
    seeded = play(other)
    assert seeded.task.train != one.task.train
    assert read_lines(seeded, "rollouts")[0]["text"] != read_lines(one, "rollouts")[0]["text"]

    capsys.readouterr()
    test_file.write_text(test_file.read_text() + "\n")
    assert espl.main(["--resume", str(two.directory)]) == 2
    assert "test.jsonl has changed since the run began" in capsys.readouterr().err


# ---- Resume


class Killed(BaseException):
    """As a kill: nothing in espl.py handles it."""


KILLS = [  # (function, which call of it, whether it was done), one after the other in the same run
    ("generate", 1, False),  # iteration 0
    ("save_checkpoint", 1, False),
    ("grade", 3, False),  # iteration 1, after a resume without a checkpoint
    ("rl_update", 1, True),
    ("update_ratings", 1, True),
    ("ask", 2, True),
    ("write_whole", 2, False),  # its line is in metrics.jsonl, population.json is the old one
    ("print_line", 1, True),
    ("save_checkpoint", 1, False),  # iteration 2; 1 was not saved
    ("score", 3, True),  # the table of iteration 3
]


def killing(name, call, done):
    """espl's function of this name, which ends the program at one of its calls."""
    function, calls = getattr(espl, name), itertools.count(1)

    def dying(*args, **kwargs):
        now = next(calls) == call
        if now and not done:
            raise Killed
        result = function(*args, **kwargs)
        if now:
            raise Killed
        return result

    return {name: dying}


def test_a_run_killed_in_every_phase_equals_one_that_was_not(exam, run_of, tmp_path, capsys):
    argv = command(exam, tmp_path / "run", "--save-every", 2)
    for kill in KILLS:
        with pytest.raises(Killed):
            play(argv, **killing(*kill))
        argv = ["--resume", tmp_path / "run"]
    for name in ("rollouts", "metrics"):
        with open(tmp_path / "run" / f"{name}.jsonl", "a") as file:
            file.write('{"iteration": 9, "split": "train"}\n{"iteration": 9, "rewa')
    (tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    capsys.readouterr()
    run = play(argv)
    assert re.findall(r"^ +(\d) \|", capsys.readouterr().out, re.M) == ["3"]
    assert_same_run(run, run_of("espl"))


def test_ctrl_c_says_how_to_go_on(exam, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a folder"
    play(command(exam, path), 130, tested_prompt=interrupt)
    advice = f"espl: interrupted; continue with: python espl.py --resume '{path}'"
    assert capsys.readouterr().err.strip().endswith(advice)


def test_a_process_killed_from_outside(exam, run_of, tmp_path):
    """It has no screen, an ASCII locale and 64-bit JAX; the run is the same."""
    path = tmp_path / "run"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    wide = {"JAX_ENABLE_X64": "1"}
    argv = [sys.executable, espl.__file__, *command(exam, path, "--save-every", 1)]
    with open("/dev/full", "w") as full:
        environment = os.environ | ascii_locale | wide
        child = subprocess.Popen(argv, env=environment, stdout=full, stderr=subprocess.PIPE)
        log = path / "metrics.jsonl"
        while not (log.is_file() and '"iteration": 1' in log.read_text()):
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.kill()
        error = child.communicate()[1].decode()
    assert "Traceback" not in error and "this reward is broken, f?r immer" in error
    assert_same_run(play(["--resume", path]), run_of("espl"))


def damage(checkpoint):
    for path in checkpoint.glob("weights/**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_left_for_the_one_before(run_of, tmp_path, capsys):
    """The run has those of iterations 0 and 3. If none is whole, nothing is changed."""
    path = tmp_path / "run"
    shutil.copytree(run_of("espl").directory, path)
    damage(path / "checkpoints" / "3")
    run = play(["--resume", path])
    assert "warning: checkpoint 3 is damaged" in capsys.readouterr().err
    assert_same_run(run, run_of("espl"))
    for checkpoint in (path / "checkpoints").iterdir():
        damage(checkpoint)
    assert espl.main(["--resume", str(path)]) == 2
    assert "has no readable checkpoint" in capsys.readouterr().err
    assert read_lines(run, "rollouts") == read_lines(run_of("espl"), "rollouts")


def test_resuming_cuts_the_logs_and_no_other_file(tmp_path):
    """A user may keep the problems in the directory of the run."""
    for name in ("metrics.jsonl", "train.jsonl"):
        (tmp_path / name).write_text('{"iteration": 3}\n')
    assert espl.resume(SimpleNamespace(directory=tmp_path)) == -1
    assert not (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "train.jsonl").read_text()


def test_only_one_process_writes_a_run(run_of, capsys):
    directory = run_of("espl").directory
    with open(directory / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert espl.main(["--resume", str(directory)]) == 2
    assert f"another process is writing {directory}" in capsys.readouterr().err


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    policy = SimpleNamespace(theta={"a": jnp.ones(2)})
    trainer = SimpleNamespace(opt_state={"b": jnp.zeros(3)})
    run = SimpleNamespace(directory=tmp_path, policy=policy, trainer=trainer, population=[])
    for iteration, val in enumerate([0.1, 0.9, 0.9, 0.3, 0.2]):
        espl.save_checkpoint(run, {"iteration": iteration, "val": val})
    espl.save_checkpoint(run, {"iteration": 5})
    with espl.checkpoints(run, read_only=True) as manager:
        assert sorted(manager.all_steps()) == [1, 4, 5]


def test_a_moved_run_goes_on_in_another_mode(run_of, tmp_path, monkeypatch):
    """What the first mode learned is the second one's start."""
    before = run_of("rl")
    shutil.copytree(before.directory, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    flags = ["--mode", "evolution", "--iterations", "5", "--microbatch-tokens", "512"]
    after = play(["--resume", "moved", *flags])
    assert after.directory == tmp_path / "moved"
    assert metrics_of(after)[:4] == metrics_of(before) and len(metrics_of(after)) == 6
    assert equal(learned(after), learned(before)) and len(prompts_of(after)) > 1
    assert not equal(after.policy.theta, after.policy.theta_ref)


def test_bad_resume(exam, run_of, tmp_path, capsys):
    other_batch = run_of("espl").directory, "--batch-size", "5"
    other_rate = run_of("espl").directory, "--learning-rate", "5"
    capsys.readouterr()
    for argv, message in (
        ([tmp_path], "cannot read .*/config.json"),
        ([exam / "model"], "cannot read .*/config.json"),
        (other_batch, "--batch-size cannot change when resuming"),
        (other_rate, "--learning-rate cannot change when resuming"),
    ):
        assert espl.main(["--resume", *map(str, argv)]) == 2
        assert re.fullmatch(f"espl: error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["prompts_file", "population"])
def test_a_run_whose_files_have_changed_is_not_resumed(flag, tmp_path):
    file = tmp_path / "file"
    file.write_text('[{"principles": []}]' if flag == "population" else "[system]\n{principles}")
    run = start(tmp_path, **{flag: str(file)})
    run.config.resume = run.config.run_dir
    for changed in (False, True):
        run.lock.close()
        file.write_text(file.read_text() + "\n" * changed)
        with (
            pytest.raises(espl.UserError, match=f"{file} has changed") if changed else nullcontext()
        ):
            espl.open_directory(run)


# ---- Starting from a population; reflectors


def test_a_population_goes_on_with_ratings_and_lineage(exam, run_of, tmp_path):
    first = run_of("espl")
    file = first.directory / "population.json"
    assert espl.read_population(file) == first.population
    argv = command(exam, tmp_path / "run", "--mode", "evolution", "--iterations", 1)
    run = play([*argv, "--population", file])
    assert [s.id for s in run.population] == list(range(len(run.population)))
    new = run.population[len(first.population) :]
    assert new and all(s.iteration == 1 for s in new)
    edited = tmp_path / "edited.json"
    edited.write_text('[{"principles": ["Sieve."]}, {"id": 9, "principles": [], "mu": 30}]')
    root, other = espl.read_population(edited)
    assert (root.id, root.mu, root.operator) == (0, 25.0, "root")
    assert (other.id, other.mu) == (1, 30)
    kept = [(5, []), (7, [0, 5]), (9, [7, 8]), (12, [28])]  # others were cut out
    entries = [{"id": i, "parents": parents, "principles": []} for i, parents in kept]
    edited.write_text(json.dumps(entries))
    assert [s.parents for s in espl.read_population(edited)] == [[], [0], [1], []]


@pytest.fixture(scope="module")
def chat(exam):
    from transformers import AutoTokenizer

    return espl.Chat(AutoTokenizer.from_pretrained(exam / "model"))


@pytest.mark.parametrize("reflector", ["reference", "current", "judge"])
def test_who_reflects(chat, reflector, tmp_path, monkeypatch):
    """Requests leave room for the reply, and no two of them have the same seed."""
    seen = []

    def generate(policy, theta, rollouts, sampling):
        assert sampling[:3] == (0.3, 0.95, 20)
        assert not any(2 in y.prompt for y in rollouts)  # </s>
        seen.append((theta, [len(y.prompt) for y in rollouts], sampling.seed))
        for y in rollouts:
            y.tokens, y.logprobs = [20, 21], [0.0, 0.0]

    monkeypatch.setattr(espl, "generate", generate)
    policy = SimpleNamespace(theta="current", theta_ref="reference")
    judge = SimpleNamespace(theta="no", theta_ref="judge")
    policy.cfg = judge.cfg = SimpleNamespace(max_context=100)
    task = SimpleNamespace(texts={"summarize": "w1 {a}"})
    flags = {"reflect_temperature": 0.3, "reflect_tokens": 20, "run_dir": str(tmp_path)}
    c = espl.Config(reflector=reflector, **flags)
    other = (judge, chat) if reflector == "judge" else None
    run = espl.Run(c, task, chat, SimpleNamespace(policy=policy), [], other)
    calls = Counter()
    for lengths in ((3, 500), (1,)):
        slots = [{"a": "</s> " + "w2 " * n} for n in lengths]
        assert len(espl.ask(run, 1, calls, "summarize", slots)) == len(lengths)
    (theta, (short, long), seed), (_, _, other_seed) = seen
    assert theta == reflector and short < long <= 80 and seed != other_seed
    assert run.tokens["reflections"] == 6


@pytest.mark.parametrize("seed", range(4))
def test_a_request_is_cut_until_it_fits(chat, seed):
    rng = np.random.default_rng(seed)
    slots = {n: " ".join(f"w{i}" for i in range(rng.integers(1, 300))) for n in "abc"}
    template, limit = "w1 {a} w2 {b} w3 {c}", int(rng.integers(60, 400))
    whole_request = chat.ids("", espl.fill(template, slots))
    ids = espl.fit_request(chat, template, slots, limit)
    assert len(ids) <= limit and (ids == whole_request) == (len(whole_request) <= limit)
    assert len(ids) > min(len(whole_request), limit) // 2
    assert ids[:3] == whole_request[:3] and ids[-1] == whole_request[-1]
    assert ("[... cut ...]" in str(slots)) == (len(whole_request) > limit)
    with pytest.raises(espl.NoChild, match="does not fit into 50"):
        espl.fit_request(chat, "w1 " * 60 + "{a}", {"a": "w2"}, 50)


@pytest.fixture
def server(monkeypatch):
    """A chat server: its url, the requests that came, and answer(request) -> (status, body)."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-4711")
    state = SimpleNamespace(seen=[], answer=completion)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append(request | {"key": self.headers["Authorization"]})
            status, body = state.answer(request)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{listening.server_port}/v1#judge"
        yield state
        listening.shutdown()


def completion(request):
    text = f"<think>w</think> reply {zlib.crc32(request['messages'][0]['content'].encode())}"
    choice = {"index": 0, "finish_reason": "stop"}
    choice["message"] = {"role": "assistant", "content": text}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return 200, answer | {"choices": [choice]}


def test_a_server_reflects(exam, run_of, server, tmp_path, capsys):
    """It fails from the second iteration on, which does not end the run."""

    def print_line(m):
        if m["iteration"] == 1:
            server.answer = lambda request: (404, {"error": {"message": "gone"}})

    argv = command(exam, tmp_path / "run", "--reflector", server.url, "--iterations", 2)
    run = play(argv, print_line=print_line)
    assert {(r["model"], r["key"]) for r in server.seen} == {("judge", "Bearer sk-4711")}
    first, second = metrics_of(run)[1:]
    assert list(first["children"]) == ["mutation"] and not second["children"]
    assert first["grad_norm"] == metrics_of(run_of("espl"))[1]["grad_norm"]
    assert re.search("--reflector .* failed: .*gone", capsys.readouterr().err)
    logged = [r["prompt"] for r in read_lines(run, "reflections") if r["iteration"] == 1]
    asked = [r["messages"][0]["content"] for r in server.seen]
    assert sorted(asked[: len(logged)]) == sorted(logged)
    assert "reply" in str(run.population) and "think" not in str(run.population)


def test_a_server_that_refuses_the_first_requests_ends_the_run(exam, server, tmp_path, capsys):
    server.answer = lambda request: (401, {"error": {"message": "no such key"}})
    play(command(exam, tmp_path / "run", "--mode", "evolution", "--reflector", server.url), 2)
    assert re.search("espl: error: --reflector http.*no such key", capsys.readouterr().err)


def test_a_request_that_is_too_long_for_the_server_ends_no_run(server, capsys):
    def answer(request):
        if request["messages"][0]["content"] == "long":
            return 400, {"error": {"message": "context too long"}}
        return completion(request)

    server.answer = answer
    replies = espl.ask_server(espl.Config(reflector=server.url), ["a", "long"], first=True)
    assert "reply" in replies[0] and replies[1] == ""
    assert "warning: --reflector" in capsys.readouterr().err


def test_a_server_that_fails_once_is_asked_again(server):
    def answer(request):
        server.answer = completion
        return 500, {"error": {"message": "try again"}}

    server.answer = answer
    assert "reply" in espl.ask_server(espl.Config(reflector=server.url), ["a"], first=True)[0]


def test_a_reply_without_choices_is_empty(server):
    server.answer = lambda request: (200, completion(request)[1] | {"choices": None})
    c = espl.Config(reflector=server.url)
    assert espl.ask_server(c, ["a", "b"], first=True) == ["", ""]


def test_another_model_reflects(exam, run_of, tmp_path):
    other = make_tiny_model(tmp_path / "other", context=256, seed=1)
    argv = command(exam, tmp_path / "run", "--mode", "evolution", "--iterations", 1)
    run = play([*argv, "--reflector", other])
    policy, _ = run.reflector
    assert policy.cfg.dtype == "float32" and policy.cfg.frozen  # on a CPU
    assert not jax.tree.leaves(policy.theta)
    mine, theirs = (read_lines(r, "reflections")[0] for r in (run_of("evolution"), run))
    assert mine["prompt"] == theirs["prompt"] and mine["reply"] != theirs["reply"]
    argv = command(exam, tmp_path / "rl", "--mode", "rl", "--iterations", 1)
    assert play([*argv, "--reflector", other]).reflector is None  # rl does not reflect


# ---- What must not end a run, and what must


def test_failures_that_end_no_run(exam, tmp_path, capsys):
    """Reflection fails, and the disk is full for logs and checkpoints."""

    def broken(*_, **__):
        raise RuntimeError("it broke\nbadly")

    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("rollouts.jsonl", "population.part"):
        (directory / name).symlink_to("/dev/full")
    argv = command(exam, directory, "--mode", "espl", "--iterations", 1)
    run = play(argv, ask=broken, checkpoints=broken)
    error = capsys.readouterr().err
    for what in ("write rollouts.jsonl", "write population.json", "save a checkpoint"):
        assert f"warning: could not {what} (" in error
    assert "warning: mutation failed; the run goes on\nTraceback" in error
    assert metrics_of(run)[1]["no_child"]["mutation"] == "failed: it broke"
    assert run.population[0].history


def test_a_batch_without_signal_makes_no_step(exam, tmp_path):
    records = [{"problem": f"problem {i}", "answer": 77} for i in range(5)]
    hopeless = write_jsonl(tmp_path / "t.jsonl", records)
    more = ("--train-file", hopeless, "--iterations", 1, "--val-size", 0, "--batch-size", 6)
    run = play(command(exam, tmp_path / "run", *more))
    m = metrics_of(run)[1]
    assert m["skipped"] and "loss" not in m and "val" not in m
    assert not m["children"] and set(m["no_child"]) == {"mutation", "crossover"}
    assert equal(run.policy.theta, run.policy.theta_ref)


def test_out_of_memory_is_one_line(exam, tmp_path, capsys):
    def exhausted(*_):
        return jnp.zeros(2**42).block_until_ready()  # 16 TiB

    run = play(command(exam, tmp_path / "run", "--mode", "rl"), 2, rl_update=exhausted)
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("espl: error: out of memory; lower --microbatch-tokens")
    assert line.endswith(f"python espl.py --resume {run.directory}")


BAD_FILES = {
    "empty.jsonl": "\n\n",
    "malformed.jsonl": '{"problem": "p", "answer": 1}\n{oops\n',
    "silent.jsonl": '{"problem": " ", "answer": 1}\n',
    "syntax.py": "def",
    "defaults.py": "reward = len\nDEFAULTS = dict(colour=1)",
    "choice.py": "reward = len\nDEFAULTS = dict(selection='softmx')",
    "type.py": "reward = len\nDEFAULTS = dict(iterations='60')",
    "texts.txt": "[critique]",
    "fails.py": "reward = len\ndef problems(config):\n    1 / 0",
    "none.py": "reward = len",
    "empty.json": "[]",
    "text.json": '[{"principles": "Sieve."}]',
    "field.json": '[{"principles": [], "colour": 1}]',
    "number.json": '[{"principles": [1]}]',
    "null.json": '[{"principles": null}]',
    "binary.txt": "\udcff\udcfe",
}
BAD_FLAGS = [
    ("--batch-size 0", "--batch-size 0: must be from 1"),
    ("--temperature nan", "--temperature nan: must be"),
    ("--top-p 1.5", "--top-p 1.5: must be from 1e-06 to 1"),
    ("--num-prompts 27", "--num-prompts 27: must be from 1 to 26"),  # sets have letters
    ("--loss foo", "--loss: invalid choice: 'foo'.*ppo"),
    ("--batchsize 5", "--batchsize 5; see python espl.py --help"),
    ("--train-file {d}/none.jsonl", r"cannot read .*none\.jsonl"),
    ("--train-file {d}/empty.jsonl", "no training problems"),
    ("--test-file {d}/empty.jsonl", "has no test problems; give it a --test-file"),
    ("--train-file {d}/malformed.jsonl", r"malformed\.jsonl:2 needs `problem`"),
    ("--train-file {d}/silent.jsonl", r"silent\.jsonl:1 needs `problem`"),
    ("--prompts-file {d}/binary.txt", "cannot read the prompts"),
    ("--task glyph", "--task glyph: there is no .*glyph.py"),
    ("--task {d}/syntax.py", "cannot load .*syntax.py .*invalid syntax"),
    ("--task {d}/defaults.py", "defaults.py has wrong DEFAULTS .*colour"),
    ("--task {d}/choice.py", "choice.py has wrong DEFAULTS .selection cannot be 'softmx'"),
    ("--task {d}/type.py", "type.py has wrong DEFAULTS .iterations cannot be '60'"),
    ("--prompts-file {d}/texts.txt", r"\[critique\] lacks the slot"),
    ("--task {d}/fails.py", "fails.py has no problems .*division by zero"),
    ("--task {d}/none.py", "none.py has no test problems"),
    ("--population {d}/empty.json", "empty.json must be a list of prompts"),
    ("--population {d}/text.json", "text.json must be a list of prompts with lists of principles"),
    ("--population {d}/number.json", "number.json must be a list of prompts .*int found"),
    ("--population {d}/null.json", "null.json must be a list of prompts .*None"),
    ("--population {d}/field.json", "field.json must be a list of prompts .*colour"),
    ("--model nobody/nothing", "cannot get nobody/nothing"),
    ("--model {d}/gpt2", "gpt2.*llama"),
    ("--model {d}/narrow", "tensor embed_tokens.weight is .*64, 16.*60, 16"),
    ("--model {d}/mute", "tokenizer"),
    ("--model-parallel 3", "--model-parallel 3 does not divide the devices"),
    ("--run-dir {exam}/exam.py", "cannot write --run-dir .*exam.py"),
    ("--run-dir {exam}/evolution", "holds a run; continue it with --resume"),
    ("--distributed here", "--distributed"),
]


@pytest.fixture(scope="module")
def bad(exam, run_of, tmp_path_factory):
    run_of("evolution")
    folder = tmp_path_factory.mktemp("bad")
    for name, text in BAD_FILES.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    changes = {"gpt2": {"model_type": "gpt2"}, "narrow": {"vocab_size": 60}, "mute": {}}
    for name, change in changes.items():
        shutil.copytree(exam / "model", folder / name)
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for path in (folder / "mute").glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_input_is_one_line(exam, bad, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(exam.rglob("*"))
    argv = command(exam, tmp_path / "run", *flags.format(d=bad, exam=exam).split())
    assert espl.main(argv) == 2
    *others, line = capsys.readouterr().err.strip().split("\n")
    assert re.match(f"espl: error: .*{message}", line)
    assert not [w for w in others if not w.startswith("espl: warning")]
    assert not (tmp_path / "run").exists() and sorted(exam.rglob("*")) == before


def test_a_line_an_iteration(capsys):
    m = {"iteration": 49, "reward_mean": 0.86, "values": {24: 0.9}, "batch_winner": 26}
    m |= {"loss": 0.0, "grad_norm": 0.384, "entropy": 0.112, "seconds": {"a": 0.1, "b": 0.2}}
    m |= {"children": {"mutation": {"id": 28, "parents": [26]}}, "no_child": {"crossover": "none"}}
    espl.print_line(m)
    parts = ("  49 |", "0.860", "0.38", "0.11", " 26 ", "28 from 26", "crossover: none", "0.3 s")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and all(part in out for part in parts)


def test_two_processes_do_what_one_does(exam, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    small = ("--iterations", 1, "--learning-rate", 1e-4)
    environment = dict(os.environ)
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    children = []
    for index in range(2):
        address = f"127.0.0.1:{port},2,{index}"
        argv = command(exam, tmp_path / "two", *small, "--distributed", address)
        argv = [sys.executable, exam / "espl.py", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(argv, env=environment, **pipes))
    try:
        outputs = [child.communicate(timeout=100) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    said = ["writing" in out for out, _ in outputs]
    assert said == [True, False], outputs
    one = play(command(exam, tmp_path / "one", *small))
    two = SimpleNamespace(directory=tmp_path / "two")
    for read in (prompts_of, metrics_of):
        numbers, others = jax.tree.flatten(read(one)), jax.tree.flatten(read(two))
        assert numbers[1] == others[1]
        for x, y in zip(numbers[0], others[0]):
            assert x == y or x == pytest.approx(y, abs=1e-4, rel=1e-4)


# ==================================================================================================
# The file itself
# ==================================================================================================

SOURCE = Path(espl.__file__)


def with_line_numbers(source):
    """The text of espl.py, whose docstring says at which lines the functions of Algorithm 1 are."""
    tree = ast.parse(source)
    lines = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    docstring = ast.get_docstring(tree, clean=False)

    def with_line(match):
        return f"{match[1]}{match[2]}{lines[match[2]]:>{len(match[3])}}"

    # A row is: the algorithm's line, what it does, the function, the function's line.
    row = re.compile(r"^(    \d[-\d]* .* )(\w+)( +\d+)$", re.M)
    return source.replace(docstring, row.sub(with_line, docstring), 1)


def test_the_docstring_knows_the_lines_of_algorithm_1():
    source = SOURCE.read_text(encoding="utf-8")
    assert with_line_numbers(source) == source, "run: python test_espl.py"
    moved = source.replace("\nimport argparse", "\n\nimport argparse", 1)
    rows = re.findall(r"(\w+) +(\d+)$", with_line_numbers(moved)[:4000], re.M)
    assert len(rows) == 14
    for name, line in rows:
        assert moved.splitlines()[int(line) - 1].startswith(f"def {name}(")


def test_espl_is_plain():
    """Short enough to be read beside the paper, in short functions, and in one file."""
    source = SOURCE.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings, longest, imported = set(), 0, set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Constant(str())):
                docstrings.update(range(node.lineno, node.end_lineno + 1))
            case ast.FunctionDef():
                longest = max(longest, node.end_lineno - node.lineno + 1)
            case ast.Import():
                imported.update(name.name for name in node.names)
            case ast.ImportFrom():
                imported.add(node.module)
            case ast.Assign() | ast.AnnAssign() | ast.NamedExpr():
                assert not isinstance(node.value, ast.Lambda), f"line {node.lineno}"
    layout = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER FSTRING_END"
    tokens = depth = 0  # of f-strings, which have parts since Python 3.12
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"
        if not depth and kind not in layout.split() and token.start[0] not in docstrings:
            tokens += 1
        depth += kind == "FSTRING_START"
    ours = {path.stem for path in SOURCE.parent.rglob("*.py")}
    assert not {name.split(".")[0] for name in imported} & ours
    assert longest <= 50
    assert tokens <= 18_900 and source.count("\n") <= 2_550


if __name__ == "__main__":
    SOURCE.write_text(with_line_numbers(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
