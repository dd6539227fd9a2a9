"""Does a run fit, before renting anything: every step of it compiled ahead of time, for devices that are not here.

    python tools/plan.py --model Qwen3-1.7B --devices H100:1                      # a named model (--help lists them)
    python tools/plan.py --model Llama-3.1-8B --devices v5e:4x4 --model-parallel 8
    python tools/plan.py --model DIR --devices v5p:2x2x2 --lora-rank 0            # a directory with a config.json
    python tools/plan.py --model Qwen3-4B --devices cpu:8 --rows 128 --length 8192 --microbatch-tokens 32768 --json
    python tools/plan.py --table A.json B.json                                    # README's, of what --json wrote
    python tools/plan.py --model Qwen3-1.7B --devices H100:1 --queue              # seconds of sampling, on paper
    python tools/plan.py --model Qwen3-1.7B --devices H100:1 --queue RUN/rollouts.jsonl
    python tools/plan.py --model Llama-3.3-70B --devices v5e:8x8 --model-parallel 8 --iteration   # with what is sent
    python tools/plan.py --model Qwen3-1.7B --devices v5e:2x2 --length 16384 --attention    # XLA's and the fused kernel

No weights and no accelerator: shapes are compiled, by libtpu (pip install "jax[tpu]") or XLA for CUDA (pip install
jax-cuda12-plugin), in seconds to minutes a program. Exit status: 0 every step fits, 1 one does not, 2 bad input.

All numbers are for one device; GB = 1e9 bytes. Beside: what lies there meanwhile and is no argument of the program.
New: results that do not overwrite an argument. Peak: beside + arguments + new + temporary. Rows: how many would fit, if
only the cache grew with them. Collectives count as often as they run: a loop of known length multiplies what is in it,
any other counts once ("a turn", in decode one step). MB: what a device holds of their results.

The steps are what a run compiles, in order: prefill of prompts of --length tokens; grow, the last layer of a cache of
half the length (the others have grown); extend by replies of 256 tokens, in as many rows as a run feeds at once; decode
at top_p 0.95; add_gradient on a microbatch of responses of 7/8 of --length, without a KL term. Not counted: fragments,
and the runtime's own reserve. A device's memory (--memory) is by default its name plate's number in GB, 5 to 7 % less
than the chip's GiB, which is about that reserve; espl.py takes 92 % of a GPU's. cpu:N shares out this machine's.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Before jax starts: it must not look for accelerators here, and simulated devices are made only then.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
if cpus := re.search(r"\bcpu:(\d+)", " ".join(sys.argv)):  # of two equal flags the last counts
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={cpus[1]}"
if __name__ == "__main__":  # XLA's libraries would tell of hardware that is not here: only Python keeps its stderr
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

import jax  # noqa: E402
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402

QWEN3 = dict(model_type="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6,
             rope_theta=1e6, max_position_embeddings=40960, tie_word_embeddings=True)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192)
LLAMA3 = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5,
              rope_theta=5e5, rope_scaling=ROPE, max_position_embeddings=131072, tie_word_embeddings=False)
GEMMA3 = dict(model_type="gemma3_text", vocab_size=262208, rms_norm_eps=1e-6, rope_theta=1e6, rope_local_base_freq=1e4,
              rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=1024, sliding_window_pattern=6,
              max_position_embeddings=131072, tie_word_embeddings=True)
of = lambda base, L, D, F, N, **more: base | dict(
    num_hidden_layers=L, hidden_size=D, intermediate_size=F, num_attention_heads=N) | more
MODELS = {  # what config.json says of the text model
    "Qwen3-0.6B": of(QWEN3, 28, 1024, 3072, 16),
    "Qwen3-1.7B": of(QWEN3, 28, 2048, 6144, 16),
    "Qwen3-4B": of(QWEN3, 36, 2560, 9728, 32),
    "Llama-3.2-1B": of(LLAMA3, 16, 2048, 8192, 32, head_dim=64, tie_word_embeddings=True,
                       rope_scaling=ROPE | dict(factor=32.0)),
    "Llama-3.1-8B": of(LLAMA3, 32, 4096, 14336, 32),
    "Llama-3.3-70B": of(LLAMA3, 80, 8192, 28672, 64),
    "Gemma-3-4B": of(GEMMA3, 34, 2560, 10240, 8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256),
    "Gemma-3-27B": of(GEMMA3, 62, 5376, 21504, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
}
MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96, "H100": 80, "A100": 80}  # GB; tpu7x: of half a chip
SPEED = {"H100": (3.35, 989), "A100": (2.04, 312), "v5e": (0.82, 197), "v5p": (2.77, 459), "v6e": (1.64, 918),
         "v4": (1.23, 275), "tpu7x": (3.69, 1154)}  # TB/s, Tflop/s in bf16 of the data sheets
LINK = {"H100": 450, "A100": 300, "v5e": 200, "v5p": 600, "v6e": 400, "v4": 300, "tpu7x": 300}  # GB/s, one way
GPUS = {"H100": dict(major=9, cores=132, fpus=128, shared=233472, l2=52428800, ghz=1.98, bandwidth=3352320000000),
        "A100": dict(major=8, cores=108, fpus=64, shared=167936, l2=41943040, ghz=1.41, bandwidth=2039040000000)}
GPU = """platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{ name: "{name}" device_vendor: "NVIDIA Corporation" cuda_compute_capability {{ major: {major} }}
driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
core_count: {cores} fpus_per_core: {fpus} threads_per_block_limit: 1024 threads_per_warp: 32 block_dim_limit_y: 65535
threads_per_core_limit: 2048 registers_per_core_limit: 65536 registers_per_block_limit: 65536 block_dim_limit_z: 65535
shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
l2_cache_size: {l2} clock_rate_ghz: {ghz} memory_bandwidth: {bandwidth} device_memory_size: 85000000000
block_dim_limit_x: 2147483647 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 }}"""


def steps(build, cfg, mesh, rows: int, length: int, microbatch_tokens: int, memory: float) -> dict:
    """The only function that knows espl.py. Hands a run's programs, in its order, to build(name, function, arguments,
    what else is on the device, per_row=how often a row's part of the cache is there, layout=the layout of a result by
    path and leaf if it does not compile), which returns the results' shapes, laid out as compiled.

    An array is a ShapeDtypeStruct; without a sharding it stands for a numpy array, which jit places. memory: bytes of a
    device. Returns {what: arrays} whose sizes are worth telling, "cache" among them.
    """
    host = lambda *shape, dtype=np.int32: jax.ShapeDtypeStruct(shape, dtype)
    lay = lambda path, x, sampler=None: espl.weight_sharding(espl.path_name(path), x.shape, mesh, sampler)
    laid_out = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lay(path, x)), tree)
    trained = nnx.LoRAParam if cfg.lora_rank else nnx.Param
    graphdef, *shapes = jax.eval_shape(lambda: nnx.split(espl.Transformer(cfg, nnx.Rngs(0)), trained, ...))
    (theta, frozen), theta_ref = map(laid_out, shapes), laid_out(shapes[0])
    optimizer = optax.apply_if_finite(optax.adam(4e-5, b1=0.9, b2=0.95, eps=1e-8), 2**30)
    moments = build("moments", espl.adam_init, (optimizer, theta), (theta_ref, frozen))
    always = theta, theta_ref, frozen, moments
    # Sampling, as espl.generate does it. Without a copy (`cast`) if the trained weights have the right type already.
    cast = jax.tree_util.tree_map_with_path(lambda path, w: w if espl.path_name(path).endswith("scale") or w.dtype ==
                                            cfg.dtype else w.update(dtype=np.dtype(cfg.dtype)), theta)

    def alone(path, x):  # a layer's weight, cut out of the stack: its layout there, without the first axis
        names = ["layers"] + [k.name for k in path if getattr(k, "name", "value") != "value"]
        return NamedSharding(mesh, P(*lay(map(jax.tree_util.DictKey, names), host(1, *x.shape), cfg).spec[1:]))
    weights = graphdef, cast, frozen
    layers = build("unstack", espl.unstack, weights, always, layout=alone)
    sampling = always, cast
    cache = build("new cache", espl.new_cache, (cfg, rows, length), (sampling, layers))
    few = max(1, espl.PIECE // length), length
    prefix = build("prefill", espl.prefill, (*weights, host(*few), host(*few)), (sampling, layers, cache), per_row=1)
    cache = build("write", espl.write_prefix, (cache, prefix, host(rows), cfg), (sampling, layers), per_row=1)
    meanwhile, shards = (sampling, layers, prefix), espl.row_shards(cfg)
    short = jax.tree.map(lambda x: x.update(shape=(*x.shape[:2], length // 2, x.shape[3])), cache[0])
    build("grow", espl.resize_layer, (short, None, cfg, length), (meanwhile, cache[1:]), per_row=1)  # the last layer
    R = espl.row_count(rows, min(rows // shards, max(1, 4 * espl.PIECE // 256 // shards)), 1)
    reply = host(shards * R, 256)
    build("extend", espl.extend, (*weights, layers, cache, host(shards, R), reply, reply), meanwhile, per_row=1)
    state = host(rows), host(rows), host(rows), host(rows, 2, dtype=np.uint32), host(2), host(dtype=np.float32)
    build("decode", espl.decode_chunk, (*weights, layers, cache, *state, 0.95), meanwhile, per_row=1)

    # The update, as espl.rl_update does it.
    T = length - length // 8
    samples = [espl.Sample([0] * (length // 8), [0] * T, [0.0] * T, 1.0)] * (microbatch_tokens // T + 1)
    batch = next(espl.microbatches(samples, microbatch_tokens, mesh.shape["data"]))
    batch = jax.tree.map(lambda x: host(*x.shape, dtype=x.dtype).update(sharding=NamedSharding(mesh, P("data"))), batch)
    with mock.patch.object(espl, "device_memory", return_value={"bytes_limit": memory}):  # of those planned for
        remat = espl.cheapest_remat(cfg, mesh, microbatch_tokens)
    gradient = build("zero gradient", espl.zeros_like, (theta,), always)
    gradient, _ = build("add_gradient", espl.add_gradient, (gradient, theta, theta_ref, graphdef, frozen, batch, host(),
                                                            espl.Objective(), remat), always)
    build("adam_step", espl.adam_step, (optimizer, theta, moments, gradient), always)
    return {"weights": (frozen, () if cfg.lora_rank else theta), "adapter": theta if cfg.lora_rank else (),
            "first value": theta_ref, "moments": moments, "unstacked copy": (cast, layers), "cache": cache}


def simulate_queue(cfg, mesh, lengths: list[int], kind: str, memory: float, prompt: int = 300):
    """Decodes responses of these lengths on paper, in the cache that espl.generate would give them: (steps, seconds,
    all of it as text).

    A step reads all weights and the whole cache, at nine tenths of the data sheet's bandwidth, and takes 1 ms beside
    (for the program's own overhead); who comes back is prefilled at two fifths of the data sheet's flop/s.
    """
    trained = nnx.LoRAParam if cfg.lora_rank else nnx.Param
    theta, frozen = jax.eval_shape(lambda: nnx.split(espl.Transformer(cfg, nnx.Rngs(0)), trained, ...))[1:]
    policy = SimpleNamespace(cfg=cfg, mesh=mesh, theta=theta, frozen=frozen, context=cfg.max_context, max_rows=512)
    used = espl.shard_bytes((frozen, theta, theta), mesh)
    policy.cache_tokens = espl.cache_tokens(policy, {"bytes_limit": memory, "bytes_in_use": used})
    fits, level = partial(espl.rows_for, policy), partial(espl.cache_length, policy)
    weights = espl.shard_bytes((frozen, theta), mesh, cfg)
    read = lambda tokens: (weights + tokens * espl.token_bytes(cfg, mesh)) / (0.9e12 * SPEED[kind][0])
    position, end, chunk = [prompt] * len(lengths), [prompt + n for n in lengths], espl.DECODE_CHUNK
    queue, live, parked = list(range(len(lengths))), [], []
    holds = lambda group: [min(position[i] + chunk, end[i]) for i in group]
    length = level(prompt + chunk)
    rows, steps, seconds, again, shapes = fits(len(queue), length), 0, 0.0, 0, set()
    while queue or live or parked:
        leave, rows, longer = espl.next_shape(holds(live), holds(parked), len(queue), rows, length, fits, level,
                                              cfg.step)
        parked += [live[i] for i in leave]
        live = [x for i, x in enumerate(live) if i not in leave]
        if longer > length:
            queue, parked, length = queue + parked, [], longer
        queue, live = queue + live[rows:], live[:rows]
        came, queue = queue[: rows - len(live)], queue[rows - len(live):]
        again += sum(position[i] for i in came if position[i] > prompt)
        live += came
        n = min(chunk, max((end[i] - position[i] for i in live), default=0))
        steps, seconds, shapes = steps + n, seconds + n * (read(rows * length) + 1e-3), shapes | {(rows, length)}
        for i in live:
            position[i] = min(position[i] + n, end[i])
        live = [i for i in live if position[i] < end[i]]
    seconds += again * 2 * weights / jnp.dtype(cfg.dtype).itemsize / (0.4e12 * SPEED[kind][1])
    return steps, seconds, (
        f"{len(lengths)} responses of {min(lengths):,} to {max(lengths):,} tokens, {sum(lengths):,} in all, on "
        f"{kind}: cache of {policy.cache_tokens:,} tokens, {steps:,} steps, {again:,} tokens prefilled again, "
        f"{len(shapes)} shapes, {seconds:.0f} s (an estimate)")


def print_attention(cfg, mesh, length: int) -> None:
    """What a layer's attention takes, forward and backward, on a row of `length` tokens a device.

    Bytes are XLA's own account (on GPUs it gives none), in which a loop counts once and a kernel's operands once: XLA's
    form is compiled for a block of queries, and multiplied by the number of blocks.
    """
    n, N, K, H = mesh.shape["data"], cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    array = lambda *shape, dtype=cfg.dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))
    print(f"| {length:,} tokens, {cfg.flash or 'no kernel'} | GB accessed | GB temporary |\n| --- | --- | --- |")
    for name, attend, T in (("XLA", espl.attention, min(length, espl.BLOCK)),
                            ("fused", espl.from_tools("flash").attention, length))[: 2 if cfg.flash else 1]:
        def both(q, k, v, *positions):
            out, pull = jax.vjp(lambda *x: attend(*x, *positions, jnp.int32(cfg.layer_window[-1]), cfg), q, k, v)
            return out, pull(out)
        positions = [array(n, size, dtype=np.int32) for size in (T, length)]
        compiled = jax.jit(both).lower(array(n, T, N, H), *[array(n, K, length, H)] * 2, *positions).compile()
        accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0) * -(-length // T) / 1e9
        print(f"| {name} | {f'{accessed:.3g}' if accessed else '-'} | {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2g} |")


def estimate(cfg, mesh, lengths: list[int], kind: str, memory: float, programs: list[dict], tokens: int) -> str:
    """Seconds of an iteration's rollouts and update on paper: the queue above, and the update's flops at two fifths of
    the data sheet's; what the compiled programs send goes at half of the data sheet's rate, while nothing else is done.
    Between hosts of eight GPUs the rate is 50 GB/s. Without reflection and evaluation, which sample too."""
    steps, decoding, text = simulate_queue(cfg, mesh, lengths, kind, memory)
    rate = 0.5e9 * (50 if kind in GPUS and mesh.size > 8 else LINK[kind])
    send = lambda step: sum(c["bytes"] for p in programs if p["step"] == step for c in p["collectives"].values()) / rate
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(
        lambda: nnx.state(espl.Transformer(cfg, nnx.Rngs(0)), nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))))
    flops = (6 if cfg.lora_rank else 8) * weights * sum(lengths)  # forward twice, and back, not to frozen weights
    update, sent = flops / (0.4e12 * SPEED[kind][1] * mesh.size), sum(lengths) / tokens * send("add_gradient")
    parts = decoding, steps * send("decode"), update, sent
    return text + ("\nan iteration on {} x {}, an estimate: sampling {:.0f} s and sending {:.0f} s, update {:.0f} s "
                   "and sending {:.0f} s: {:.0f} s").format(mesh.size, kind, *parts, sum(parts))


# ---- Nothing below knows espl.py's signatures

def measure(programs: list, name: str, f, args: tuple, alive, per_row: float = 0, layout=lambda path, x: None):
    """Compiles f for args, appends what it takes beside `alive` to programs; returns its results' shapes, laid out."""
    start, failure, collectives, exact, new, temporary = time.time(), "", {}, False, 0, 0
    lowered = f.lower(*args)
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.ShapeDtypeStruct)]
    laid_out = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:  # TPU: that a program does not fit is found when it is compiled
        if "RESOURCE_EXHAUSTED" not in (failure := str(e)):
            raise espl.UserError(f"{name} does not compile ({espl.first_line(e)[:300]})") from e
        arguments = size(arrays)
        if m := re.search(r"(temporaries \(|Used )([\d.]+)([KMGT])", failure):  # without the arguments, or with them
            temporary = int(float(m[2]) * 1024 ** (1 + "KMGT".index(m[3]))) - (arguments if m[1] == "Used " else 0)
        results = jax.tree_util.tree_map_with_path(lambda path, x: laid_out(x, layout(path, x)), lowered.out_info)
    else:
        m, formats = compiled.memory_analysis(), jax.tree.leaves(compiled.input_formats)
        arrays = [x for x, form in zip(arrays, formats, strict=True) if form.layout]  # jit leaves out what is not read
        new, arguments = m.output_size_in_bytes - m.alias_size_in_bytes, m.argument_size_in_bytes
        temporary, (collectives, exact) = m.temp_size_in_bytes, count_collectives(compiled.as_text())
        results = jax.tree.map(laid_out, lowered.out_info, compiled.output_shardings)
    beside = size((args, alive)) - size(arrays)
    peak, seconds = beside + arguments + new + temporary, round(time.time() - start, 1)
    programs.append(dict(step=name, beside=beside, arguments=arguments, new=new, temporary=temporary, peak=peak,
                         per_row=per_row, collectives=collectives, exact=exact, seconds=seconds, error=failure[:300]))
    print(f"plan: {name}: {peak / 1e9:.3g} GB, {seconds} s", file=sys.stderr)
    return results


def size(tree) -> int:
    """Bytes on one device; an array that is there twice under one name counts once."""
    arrays = {id(x): x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize for x in arrays)


def count_collectives(text: str) -> tuple[dict[str, dict], bool]:
    """({kind: {"count", "bytes"}} of a run of a compiled program, whether every loop around one has a known length)."""
    computations, lines, entry = defaultdict(list), [], ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines, entry = computations[head[2]], head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    found = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
    called = re.compile(r"(?:calls|body|\w+_computation|to_apply)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
    # A loop's length: XLA for CPU and CUDA notes it, for TPU it is the bound of a scan's condition, i < n.
    scan = r"(?s)%?([\w.-]+) = s32\[\]\S* constant\((\d+)\).*ROOT [^\n]* compare\(%?[\w.-]+, %?\1\), direction=LT"

    def walk(name: str) -> dict[str, tuple]:  # of each collective: kind, bytes, how often, is that exact
        ops = {}
        for line in computations[name]:
            if m := found.search(line):
                shapes = [int(bits) * math.prod(map(int, filter(None, dims.split(",")))) // 8
                          for bits, dims in re.findall(r"\b[a-z]+(\d+)\w*\[([\d,]*)\]", m[1])]
                if m[3] and m[2] != "all-reduce":  # of a started one: operands, results, and for some two scalars
                    shapes = [n for n in shapes if n > 4]
                    shapes = shapes[len(shapes) // 2:]
                channel = re.search(r"channel_id=\d+", line)  # TPU: it is written in each fusion that it overlaps with
                ops[channel[0] if channel else line] = m[2], sum(shapes), 1, True
            loop = re.search(r" while\(.*condition=%?([\w.-]+)", line)
            m = loop and (re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                          or re.search(scan, "\n".join(computations[loop[1]])))
            trips = int(m[m.lastindex]) if m else None if loop else 1
            for callee in re.findall(r"[\w.-]+", " ".join(map(" ".join, called.findall(line)))):
                for key, (kind, bytes_, times, exact) in walk(callee).items():
                    ops[key] = kind, bytes_, times * (trips or 1), exact and trips is not None
        return ops

    ops, totals = walk(entry).values(), defaultdict(Counter)
    for kind, bytes_, times, _ in ops:
        totals[kind].update(count=times, bytes=bytes_ * times)
    return totals, all(op[3] for op in ops)


def make_mesh(where: str, model_parallel: int) -> Mesh:
    """A data x model mesh, as espl.make_mesh makes it, of devices that need not be here."""
    (kind, shape), version, gpu = where.split(":"), jax.__version__, where.split(":")[0] in GPUS
    if kind != "cpu" and not find_spec("jax_cuda12_plugin" if gpu else "libtpu"):
        missing = f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}" if gpu else f'"jax[tpu]=={version}"'
        raise espl.UserError(f"--devices {where} needs XLA's compiler for it: pip install {missing}")
    with espl.explained(f"--devices {where}: no such devices", "a TPU is given as v5e:4x4, GPUs as H100:8"):
        if gpu:
            # cuDNN is not here either, but jax asks for its version.
            fused_attention_stablehlo.cuda_versions = SimpleNamespace(cudnn_get_version=lambda: 91000)
            target = GPU.format(name=kind, **GPUS[kind], optin=GPUS[kind]["shared"] - 1024)
            devices = topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x1x{shape}").devices
        else:  # a chip of v4 or v5p is one device; for v4, libtpu must be told
            options = {"chip_config_name": "megacore"} if kind == "v4" else {}
            devices = jax.devices() if kind == "cpu" else topologies.get_topology_desc(where, "tpu", **options).devices
    if len(devices) % model_parallel:
        raise espl.UserError(f"--model-parallel {model_parallel} does not divide the {len(devices)} devices")
    shape = len(devices) // model_parallel, model_parallel
    grid = np.array(devices).reshape(shape) if gpu or kind == "cpu" else mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True)
    jax.set_mesh(mesh := Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2))
    return mesh


def read_config(model: str, dtype: str, lora_rank: int):
    """espl's configuration of a named model, or of a directory with a config.json."""
    named = {name.lower(): config for name, config in MODELS.items()}.get(model.lower())
    with tempfile.TemporaryDirectory() as scratch:
        if named:
            (Path(scratch) / "config.json").write_text(json.dumps(named))
        elif not (Path(model) / "config.json").is_file():
            raise espl.UserError(f"--model {model}: no directory with a config.json, and none of {', '.join(MODELS)}")
        return espl.read_model_config(scratch if named else model, dtype, lora_rank)


def report(programs: list[dict], sizes: dict[str, int], memory: float, args) -> dict:
    """All that is told: the flags, sizes in bytes, the programs, how many rows fit, and the verdict."""
    slot = sizes["cache"] / args.rows
    for p in programs:
        each, p["fits"] = slot * p["per_row"], not p["error"] and p["peak"] <= memory
        p["rows"] = max(0, args.rows + int((memory - p["peak"]) // each)) if each else None
    least = min((p for p in programs if p["per_row"]), key=lambda p: p["rows"])
    worst = max([p for p in programs if not p["fits"]] or programs, key=lambda p: p["peak"])
    need = f"{worst['step']} takes {'> ' * bool(worst['error'])}{worst['peak'] / 1e9:.3g} of {memory / 1e9:.4g} GB"
    verdict = f"fits: {need}, all other steps less" if worst["fits"] else (
        f"does not fit: {need}; fewer --rows, a shorter --length, fewer --microbatch-tokens, more devices?")
    return vars(args) | dict(memory=memory, sizes=sizes, cache_bytes_a_token=slot / args.length, programs=programs,
                             rows_that_fit=least["rows"], limited_by=least["step"], fits=worst["fits"], verdict=verdict)


def show(r: dict) -> None:
    """The report as a table."""
    held = "; ".join(f"{name} {n / 1e9:.3g}" for name, n in r["sizes"].items() if n)
    print(f"{r['model']}, {r['dtype']}, LoRA rank {r['lora_rank']}, {r['rows']} rows of {r['length']:,} tokens, on "
          f"{r['devices']}, --model-parallel {r['model_parallel']}\nGB on a device of {r['memory'] / 1e9:.4g}: {held} ("
          f"{r['cache_bytes_a_token'] / 1e3:.4g} kB a token)\n\n| step | beside | arguments | new | temporary | peak | "
          "fits | rows | collectives | MB | seconds to compile |\n| --- |" + " --- |" * 10)
    for p in r["programs"]:
        kinds = ", ".join(f"{c['count']} {kind}" for kind, c in sorted(p["collectives"].items()))
        sent = sum(c["bytes"] for c in p["collectives"].values()) / 1e6
        cells = [f"{p[n] / 1e9:.3g}" for n in ("beside", "arguments", "new", "temporary", "peak")]
        cells[4] = "> " * bool(p["error"]) + cells[4]  # XLA says only a part of what a failure would have taken
        cells += ["yes" if p["fits"] else "no", "" if p["rows"] is None else p["rows"], kinds and "a turn: " * (
            not p["exact"]) + kinds, kinds and f"{sent:.3g}", f"{p['seconds']:.0f}"]
        print(f"| {p['step']} | " + " | ".join(map(str, cells)) + " |")
    print(f"\n{r['rows_that_fit']} rows of {r['length']:,} tokens fit (the limit is {r['limited_by']}), "
          f"{r['rows_that_fit'] - r['rows']} left\n{r['verdict']}")


def show_table(files: list[str]) -> None:
    """The reports in files written by --json, one a line."""
    with espl.explained(f"cannot read {', '.join(files)}", "write them with --json"):
        reports = [json.loads(Path(file).read_text()) for file in files]
    print("| model | devices | data x model | weights, GB | fullest step, GB | rows of 4,096 that fit | sent a decode "
          "step, MB | sent a reply, MB |\n| --- |" + " --- |" * 7)
    for r in reports:
        steps = {p["step"]: p for p in r["programs"]}
        worst = max(r["programs"], key=lambda p: p["peak"])  # with --rows
        sent = [sum(c["bytes"] for c in steps[name]["collectives"].values()) / 1e6 for name in ("decode", "extend")]
        sent[1] /= min(r["rows"], 4 * espl.PIECE // 256)  # replies in that call
        update = all(p["fits"] for p in r["programs"] if not p["per_row"] and p["step"] != "new cache")
        rows = int(r["rows_that_fit"] * r["length"] / 4096) if update else "does not fit"
        weights = (r["sizes"]["weights"] + r["sizes"]["unstacked copy"]) / 1e9
        cells = [r["model"], r["devices"], f"{r['data']} x {r['model_parallel']}", f"{weights:.1f}",
                 f"{worst['step']}: {worst['peak'] / 1e9:.1f} of {r['memory'] / 1e9:.0f}", rows,
                 *(f"{n:.0f}" for n in sent)]
        print("| " + " | ".join(map(str, cells)) + " |")


def parse_args():
    """The flags, checked but for what only the compiler's library knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(print(f"plan: error: {message}; see --help", file=sys.stderr) or 2)
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only a table of what --json wrote earlier")
    parser.add_argument("--model", help=f"directory, or one of {', '.join(MODELS)}")
    parser.add_argument("--devices", help=f"KIND:SHAPE; KIND is cpu, {', '.join(MEMORY)}")
    for flag, default, text in (("--model-parallel", 1, "devices along the mesh's model axis"),
                                ("--rows", 64, "responses decoded at once"), ("--length", 4096, "tokens in a row"),
                                ("--lora-rank", 32, "0: train all"), ("--microbatch-tokens", 16384, "of a gradient")):
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--memory", type=float, help="GB of a device, if not what its kind has")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--queue", nargs="?", const="", help="only simulate sampling: responses as long as in a run's "
                        "rollouts.jsonl, or 150 of lognormal length, median 6,000, sigma 0.7, at most 15,000")
    parser.add_argument("--iteration", nargs="?", const="", help="after all else, seconds of an iteration on paper, of "
                        "responses as for --queue")
    parser.add_argument("--attention", action="store_true", help="only attention to --length tokens, XLA's and fused")
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    args = parser.parse_args()
    if args.table:
        return args
    known = rf"(cpu|{'|'.join(GPUS)}):[1-9]\d*|({'|'.join(MEMORY)}):\d+(x\d+)+"
    if not args.model or not re.fullmatch(known, args.devices or ""):
        parser.error(f"give --model, and --devices as v5e:4x4, H100:8 or cpu:8; there are cpu, {', '.join(MEMORY)}")
    if (args.queue, args.iteration) != (None, None) and args.devices.startswith("cpu"):
        parser.error("--queue and --iteration need --devices with a data sheet")
    for flag, least in dict(model_parallel=1, rows=1, length=8, lora_rank=0, microbatch_tokens=1).items():
        if vars(args)[flag] < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    return args


def response_lengths(file: str) -> list[int]:
    """Tokens of the responses in a rollouts.jsonl, or without one those that --help names."""
    if not file:
        drawn = np.exp(np.log(6000) + 0.7 * np.random.default_rng(0).normal(size=150))
        return np.minimum(15_000, drawn).astype(int).tolist()
    with espl.explained(f"cannot read {file}", "it takes a run's rollouts.jsonl"):
        return [json.loads(line)["tokens"] for line in Path(file).read_text().splitlines()]


def main() -> int:
    args, programs = parse_args(), []
    try:
        if args.table:
            return show_table(args.table) or 0
        kind = args.devices.split(":")[0]
        memory = 1e9 * (args.memory or MEMORY.get(kind, 0)) or espl.device_memory()["bytes_limit"]
        mesh = make_mesh(args.devices, args.model_parallel)
        cfg = espl.fit_layout(read_config(args.model, args.dtype, args.lora_rank), mesh, memory)
        if args.queue is not None:
            return print(simulate_queue(cfg, mesh, response_lengths(args.queue), kind, memory)[2]) or 0
        if args.attention:
            return print_attention(cfg, mesh, args.length) or 0
        args.data = mesh.shape["data"]
        args.rows = -(-args.rows // args.data) * args.data  # as in a run: so many that the devices share them evenly
        arrays = steps(partial(measure, programs), cfg, mesh, args.rows, args.length, args.microbatch_tokens, memory)
    except espl.UserError as e:
        return print(f"plan: error: {e}", file=sys.stderr) or 2
    result = report(programs, {name: size(tree) for name, tree in arrays.items()}, memory, args)
    print(json.dumps(result)) if args.json else show(result)
    if args.iteration is not None and not args.json:
        print(estimate(cfg, mesh, response_lengths(args.iteration), kind, memory, programs, args.microbatch_tokens))
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
