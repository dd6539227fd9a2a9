"""How fast sampling and updates are: tokens a second, and the share of what this machine could do at most.

    python tools/bench.py m                                    # random weights in a named shape (--help lists them)
    python tools/bench.py DIR --lora-rank 0 --vs hf            # a model directory; also transformers and torch on it
    python tools/bench.py qwen3-4b --dtype bfloat16 --prompts 30 --prompt-tokens 1024 --new-tokens 4096
    python tools/bench.py m --scaling                          # decode against rows and context, with a cost model
    python tools/bench.py --memory --lora-rank 0               # of an update, against one that keeps all logits
    python tools/bench.py --phases runs/A runs/B               # seconds an iteration by phase, from metrics.jsonl
    python tools/bench.py --search 1191 100000                 # the search tool on so many passages of random words

The workload: --samples responses to each of --prompts random prompts of --prompt-tokens tokens, give or take a half.
One token in 128 ends a response, so that lengths are geometric, at most --new-tokens; the update then trains on as many
rollouts of --prompt-tokens and half of --new-tokens. Medians of --runs runs after one that compiles.

Limits, measured in the same run: a multiplication of large square matrices; one of as many rows as are sampled at once
with the layers' own matrices; and reading memory. A decode step takes at least the time to read all weights and the
keys and values of the rows still alive, or to multiply these rows with all weights, whichever is longer. An update
takes at least 4 (LoRA) or 6 (all weights) flops for each weight and token. Prompts count once for all their responses.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402
from pretrain_glyphs import save_weights  # noqa: E402  (beside this file)

LLAMA = dict(model_type="llama", tie_word_embeddings=True, rms_norm_eps=1e-5, max_position_embeddings=32768)
SHAPES = {  # config.json of the models whose shape is taken
    "m": LLAMA | dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
                      intermediate_size=2048, vocab_size=32000),
    "llama-3.2-1b": LLAMA | dict(num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
                                 head_dim=64, intermediate_size=8192, vocab_size=128256),
    "qwen3-4b": LLAMA | dict(model_type="qwen3", num_hidden_layers=36, hidden_size=2560, num_attention_heads=32,
                             num_key_value_heads=8, head_dim=128, intermediate_size=9728, vocab_size=151936),
}


def timed(f, runs: int) -> tuple[float, list]:
    """Median seconds of f(), after one call that compiles, and what the calls returned."""
    f()
    seconds, results = [], []
    for _ in range(runs):
        start = time.perf_counter()
        results.append(jax.block_until_ready(f()))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), results


def limits(cfg, rows: int) -> tuple[float, float, float]:
    """Measured flop/s of large matrices, flop/s of `rows` rows with a layer's matrices, and bytes/s of reading."""
    cpu = jax.default_backend() == "cpu"
    n = 2048 if cpu else 8192
    square = jnp.ones((n, n), cfg.dtype)
    large, _ = timed(jax.jit(lambda: square @ square), 9)
    few = jnp.ones((rows, cfg.model_dim), cfg.dtype)
    many = [jnp.ones((cfg.model_dim, cfg.mlp_dim), cfg.dtype) for _ in range(16)]
    product = jax.jit(lambda x, many: [x @ w for w in many])
    small, _ = timed(lambda: product(few, many), 9)
    block = jnp.ones(2**27 if cpu else 2**30, jnp.float32)
    reading, _ = timed(lambda: jax.jit(jnp.sum)(block), 9)
    return 2 * n**3 / large, 2 * rows * many[0].size * 16 / small, block.nbytes / reading


def load(args) -> tuple[espl.Policy, Path]:
    """The model on all devices, ready to sample, and its directory (a temporary one for a named shape)."""
    mesh = espl.make_mesh(1)
    directory = Path(args.model)
    if args.model in SHAPES:
        directory = Path(args.scratch)
        (directory / "config.json").write_text(json.dumps(SHAPES[args.model] | {"dtype": args.dtype}))
        if args.vs:
            cfg = espl.read_model_config(str(directory), args.dtype)
            save_weights(directory, nnx.split(espl.Transformer(cfg, nnx.Rngs(0)), nnx.Param)[1], cfg)
    cfg = espl.read_model_config(str(directory), args.dtype, args.lora_rank)
    cfg = espl.fit_layout(cfg, mesh, espl.device_memory()["bytes_limit"])
    cfg = espl.from_tools("flash").checked(cfg) if cfg.flash else cfg
    if args.vs or args.model not in SHAPES:
        policy = espl.load_policy(str(directory), cfg, mesh)
    else:
        policy = espl.make_policy(espl.Transformer(cfg, nnx.Rngs(0)), mesh)
    policy.eos_ids, policy.context = end_tokens(cfg.vocab_size), cfg.max_context
    policy.cache_tokens = espl.cache_tokens(policy, espl.device_memory())
    policy.max_rows = args.max_rows or (64 if jax.default_backend() == "cpu" else 512)
    return policy, directory


def end_tokens(vocabulary: int) -> tuple[int, ...]:
    """One token in 128, at random: a trained model's first ones are the frequent ones."""
    return tuple(np.random.default_rng(3).choice(np.arange(4, vocabulary), 1 + vocabulary // 128, False).tolist())


def make_samples(args, vocabulary: int) -> list:
    """Rollouts for the update: --prompts groups of --samples, with random tokens and advantages."""
    rng, n = np.random.default_rng(1), args.new_tokens // 2
    return [espl.Sample(prompt, rng.integers(4, vocabulary, n).tolist(), [-10.0] * n, float(rng.normal()))
            for prompt in rng.integers(4, vocabulary, (args.prompts, args.prompt_tokens)).tolist()
            for _ in range(args.samples)]


def bench_espl(args, policy, prompts: list[list[int]]) -> dict[str, tuple[float, str, float | None]]:
    """{name: (value, unit, share of the limit)}"""
    cfg, rows = policy.cfg, args.prompts * args.samples
    table = cfg.vocab_size * cfg.model_dim  # looking tokens up costs nothing, so an untied embedding does not count
    weights = sum(w.size for w in jax.tree.leaves((policy.frozen, policy.theta))) - (0 if cfg.tied else table)
    per_token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    large, small, bandwidth = limits(cfg, rows)
    sample = lambda n, seed=0: espl.generate(policy, policy.theta, prompts, [args.samples] * len(prompts),
                                             espl.Sampling(1.0, args.top_p, n, (0, seed)))
    n = max(map(len, prompts))
    ids = np.random.default_rng(2).integers(4, cfg.vocab_size, (1, espl.bucket(n))).astype(np.int32)
    prefill, _ = timed(lambda: espl.prefill(policy.graphdef, policy.theta, policy.frozen, ids,
                                            np.arange(ids.size, dtype=np.int32)[None]), args.runs)
    first, _ = timed(lambda: sample(1), args.runs)
    sample(args.new_tokens)
    tokens, seconds, least = 0, 0.0, 0.0
    for seed in range(args.runs):
        start = time.perf_counter()
        out = sample(args.new_tokens, seed)
        seconds += time.perf_counter() - start
        lengths = np.array([[len(p), len(r.tokens)] for p, group in zip(prompts, out) for r in group])
        tokens += lengths[:, 1].sum()
        for t in range(lengths[:, 1].max()):
            live = lengths[lengths[:, 1] > t]
            read = weights * jnp.dtype(cfg.dtype).itemsize + per_token * (live[:, 0] + t).sum()
            least += max(read / bandwidth, 2 * weights * len(live) / small)
    samples, optimizer = make_samples(args, cfg.vocab_size), optax.adam(4e-5, b1=0.9, b2=0.95, eps=1e-8)
    trainer = espl.Trainer(policy, optimizer, jax.jit(optimizer.init)(policy.theta), max_tokens=args.microbatch_tokens)
    training, _ = timed(lambda: espl.rl_update(trainer, samples, rows), args.runs)
    trained = rows * (args.new_tokens // 2)  # prompts need no logits
    flops = (4 if cfg.lora_rank else 6) * (weights * trained + (weights - table) * args.prompts * args.prompt_tokens)
    return {"large matrix multiplication": (large / 1e12, "Tflop/s", None),
            f"matrix multiplication, {rows} rows": (small / 1e12, "Tflop/s", None),
            "reading memory": (bandwidth / 1e9, "GB/s", None),
            "prefill": (ids.size / prefill, "tokens/s", 2 * (weights - table) * ids.size / prefill / large),
            "first token of all rollouts": (first, "s", None),
            "rollouts": (tokens / seconds, "tokens/s", least / seconds),
            "update": (rows / training, "sequences/s", flops / training / large),
            "update, in tokens": (rows * (args.prompt_tokens + args.new_tokens // 2) / training, "tokens/s", None)}


def bench_hf(args, directory: Path, prompts: list[list[int]]) -> dict[str, tuple[float, str, None]]:
    """The same workload with transformers' generate and a plain torch policy-gradient step."""
    import torch
    from transformers import AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype)).to(device).eval()
    vocabulary = model.config.vocab_size
    rows = [p for p in prompts for _ in range(args.samples)]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in rows], device=device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in rows], device=device)
    tokens = seconds = 0.0
    for _ in range(args.runs):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                                 max_new_tokens=args.new_tokens, eos_token_id=list(end_tokens(vocabulary)),
                                 pad_token_id=0)
        tokens += int((out[:, T:].cpu() != 0).sum())
        seconds += time.perf_counter() - start
    result = {"rollouts": (tokens / seconds, "tokens/s", None)}
    model.train()
    if args.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            print("bench: without peft there is no torch update with LoRA to compare with", file=sys.stderr)
            return result
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules=names))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-5, betas=(0.9, 0.95))
    samples, n = make_samples(args, vocabulary), args.prompt_tokens

    def update():
        for i in range(0, len(samples), 6):
            x = torch.tensor([s.prompt + s.tokens for s in samples[i: i + 6]], device=device)
            advantage = torch.tensor([s.advantage for s in samples[i: i + 6]], device=device)
            logp = torch.log_softmax(model(x).logits[:, n - 1: -1].float(), -1).gather(-1, x[:, n:, None])[..., 0]
            (-(torch.exp(logp - logp.detach()) * advantage[:, None]).sum() / len(samples)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(logp.detach()[0, 0])

    training, _ = timed(update, args.runs)
    return result | {"update": (len(samples) / training, "sequences/s", None)}


def print_scaling(policy) -> None:
    """Decode and prefill rates against rows and lengths, and a cost model fitted to the decode steps."""
    cfg, found = policy.cfg, {}
    layers = espl.unstack(policy.graphdef, policy.theta, policy.frozen)
    rows_, lengths = (1, 8, 32, 64), (128, 512, 2048)
    for rows, length in ((r, n) for r in rows_ for n in lengths):
        state = [espl.new_cache(cfg, rows, length)]
        full = lambda x: np.full(rows, x, np.int32)

        def chunk():  # every row has a token to feed at each of the 64 steps
            state[0], *rest = espl.decode_chunk(
                policy.graphdef, policy.theta, policy.frozen, layers, state[0], full(5), full(length - 65), full(1000),
                np.ones((rows, 2), np.uint32), np.array([-1]), 1.0, 1.0)
            return rest

        found[rows, length] = timed(chunk, 2)[0] / espl.DECODE_CHUNK
    print("| decode, tokens/s | " + " | ".join(f"{n} tokens of context" for n in lengths) + " |\n| --- |"
          + " --- |" * len(lengths))
    for rows in rows_:
        print(f"| {rows} rows | " + " | ".join(f"{rows / found[rows, n]:.3g}" for n in lengths) + " |")
    cells = []
    for n in lengths:
        ids = np.full((1, n), 5, np.int32)
        fill = lambda: espl.prefill(policy.graphdef, policy.theta, policy.frozen, ids, np.arange(n)[None])
        seconds, _ = timed(fill, 3)
        cells.append(f"{n / seconds:.3g}")
    print("| prefill, tokens/s | " + " | ".join(cells) + " |")
    terms, seconds = np.array([[1, r, r * n] for r, n in found]), np.array(list(found.values()))
    (a, b, c), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)))  # relative errors count
    error = np.abs(terms @ (a, b, c) / seconds - 1).max()
    print(f"\nA decode step takes about {a * 1e3:.3g} ms + {b * 1e3:.3g} ms a row + {c * 1e6:.3g} us a row and cached "
          f"token (within {error:.0%}).")


def materialised(model, hidden, target, temperature):
    """espl.token_logprobs as one would write it first: all logits at once."""
    logp = jax.nn.log_softmax(model.logits(hidden) / temperature)
    return jnp.take_along_axis(logp, target[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)


def count_programs() -> list[float]:
    """A list that grows by the seconds of every program that XLA compiles from now on, or reads from its cache."""
    built = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: built.append(seconds) if name.endswith("backend_compile_duration") else None)
    return built


def print_search(sizes: list[int]) -> None:
    """Seconds that the search tool takes to start, and a query; passages of 80 words, the k-th of which has a
    probability of 1 / k."""
    task, rng = espl.task_file("search"), np.random.default_rng(0)
    vocabulary = np.array([f"word{k}" for k in range(1, 50_001)])
    chances = 1 / np.arange(1, len(vocabulary) + 1)
    text = lambda n: " ".join(rng.choice(vocabulary, n, p=chances / chances.sum()))
    print("| passages | file | first start | later starts | a query | memory |\n| --- | --- | --- | --- | --- | --- |")
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["XDG_CACHE_HOME"], path = scratch, Path(scratch) / "passages.jsonl"
            path.write_text("".join(json.dumps({"id": i, "title": f"title{i}", "text": text(80)}) + "\n"
                                    for i in range(size)))
            queries, seconds = [text(12) for _ in range(100)], []
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(2):
                start = time.perf_counter()
                search = task["search_tool"](task["read_passages"](str(path)))
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            for query in queries:
                search([query])
            seconds.append((time.perf_counter() - start) / len(queries))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
            print(f"| {size:,} | {path.stat().st_size / 1e6:.1f} MB | {seconds[0]:.2f} s | {seconds[1]:.2f} s | "
                  f"{1e3 * seconds[2]:.1f} ms | {grown:.2f} GB |", flush=True)


def print_memory(lora_rank: int, vocabulary: int = 131072) -> None:
    """Temporary memory of an update on 8 responses of 256 tokens, as compiled, against one with all logits at once."""
    espl.make_mesh(1)
    cfg = espl.ModelConfig(
        num_layers=2, model_dim=768, mlp_dim=2048, num_heads=12, num_kv_heads=4, head_dim=64, vocab_size=vocabulary,
        max_context=4096, norm_eps=1e-5, rope_frequencies=(espl.rope_frequencies({"rope_theta": 1e4}, 64),),
        layer_rope=(0, 0), layer_window=(espl.PAD_POSITION,) * 2, lora_rank=lora_rank)
    shapes = nnx.eval_shape(lambda: espl.Transformer(cfg, nnx.Rngs(0)))
    graphdef, theta, frozen = nnx.split(shapes, nnx.LoRAParam if lora_rank else nnx.Param, ...)
    [batch] = espl.microbatches([espl.Sample([1, 2], [3] * 256, [0.0] * 256, 1.0)] * 8, 8 * (256 + 64), 1)
    used = []
    for espl.token_logprobs in (espl.token_logprobs, materialised):
        jax.clear_caches()
        lowered = espl.add_gradient.lower(theta, theta, theta, graphdef, frozen, batch, 8, espl.Objective(), "layer")
        used.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    trained = f"LoRA rank {lora_rank}" if lora_rank else "all weights"
    print(f"V = {vocabulary}, {batch['token'].size} tokens, {trained}: "
          f"{used[0] / 1e9:.2f} GB; with all logits at once {used[1] / 1e9:.2f} GB; ratio {used[0] / used[1]:.2f}")


def print_phases(directories: list[str]) -> None:
    """Median seconds of an iteration by phase, a column for each run."""
    columns = []
    for d in directories:
        lines = [json.loads(line) for line in (Path(d) / "metrics.jsonl").read_text().splitlines()]
        columns.append([m["seconds"] for m in lines if m["iteration"]])
    print("| phase | " + " | ".join(directories) + " |\n| --- |" + " --- |" * len(columns))
    for phase in ("sample", "grade", "update", "reflect"):
        medians = [statistics.median(seconds.get(phase, 0) for seconds in column) for column in columns]
        print(f"| {phase} | " + " | ".join(f"{m:.3f}" for m in medians) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="m", help=f"model directory or one of {', '.join(SHAPES)}")
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--max-rows", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--microbatch-tokens", type=int, default=4500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--vs", choices=("hf",))
    parser.add_argument("--scaling", action="store_true", help="only tables of decode and prefill against sizes")
    parser.add_argument("--memory", action="store_true", help="only the temporary memory of an update at V = 128k")
    parser.add_argument("--phases", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--search", nargs="+", type=int, metavar="PASSAGES")
    args = parser.parse_args()
    if args.phases:
        print_phases(args.phases)
        return 0
    if args.search:
        print_search(args.search)
        return 0
    if args.memory:
        print_memory(args.lora_rank)
        return 0
    built = count_programs()
    with tempfile.TemporaryDirectory() as args.scratch:
        try:
            policy, directory = load(args)
        except espl.UserError as e:
            print(f"bench: error: {e}", file=sys.stderr)
            return 2
        if args.scaling:
            print_scaling(policy)
            return 0
        vocabulary, rng = policy.cfg.vocab_size, np.random.default_rng(0)
        lengths = rng.integers(args.prompt_tokens // 2, args.prompt_tokens * 3 // 2 + 1, args.prompts)
        prompts = [rng.integers(4, vocabulary, n).tolist() for n in lengths]
        ours = bench_espl(args, policy, prompts)
        memory = jax.local_devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
        theirs = bench_hf(args, directory, prompts) if args.vs else {}
    print(f"{args.model}, {args.dtype}, {f'LoRA rank {args.lora_rank}' if args.lora_rank else 'all weights'}, "
          f"{jax.default_backend()}{', fused attention' * bool(policy.cfg.flash)}; peak memory {peak:.1f} GB; "
          f"{len(built)} programs compiled in {sum(built):.0f} s\n")
    print("| | | of the limit |" + (" transformers, torch | ratio |" if theirs else ""))
    print("| --- | --- | --- |" + (" --- | --- |" if theirs else ""))
    for name, (value, unit, share) in ours.items():
        row = f"| {name} | {value:.3g} {unit} | {f'{share:.0%}' if share else ''} |"
        if theirs:
            row += f" {theirs[name][0]:.3g} | {value / theirs[name][0]:.2f} |" if name in theirs else " | |"
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
