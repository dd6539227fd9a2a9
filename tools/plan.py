"""Whether a run fits, and what it costs, before anything is rented: espl.py on absent devices.

    python tools/plan.py                                          # a table of several models
    python tools/plan.py --model Qwen3-1.7B --devices H100:1      # memory, step by step
    python tools/plan.py --model DIR --devices v5e:4x4 --model-parallel 8 --lora-rank 0
    python tools/plan.py --model Qwen3-1.7B --devices H100:1 --queue       # time, on paper
    python tools/plan.py --model Qwen3-1.7B --reflector Llama-3.1-8B --devices H100:1

No weights are read and no accelerator is used: shapes are compiled, by libtpu (pip install
"jax[tpu]") or by XLA for CUDA (jax-cuda12-plugin and jax-cuda12-pjrt, in the version of jax).

A step is compiled with the rows that a run would have: as many of --length tokens as espl.py puts
into its cache. Numbers are GB, 1e9 bytes, of one device. held: everything in memory during the
step, its arguments included; peak: with its results and temporary memory. A device's memory is the
number on its name plate in GB, about 92 % of a GPU's GiB. Not counted: fragments, cuDNN's
workspace, and for --queue what devices send to each other.

A model takes minutes to compile, at XLA's lowest effort, which needs a little more memory. Results
are kept in JAX_COMPILATION_CACHE_DIR (jax's own cache cannot be read without the devices).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":  # before jax starts; it must not look for accelerators
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"}
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # of XLA only errors of Python are shown
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax._src.cudnn import fused_attention_stablehlo  # noqa: E402
from jax.experimental import mesh_utils, topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from report import new_parser, run_tool  # noqa: E402

import espl  # noqa: E402


class Device(NamedTuple):
    """Data sheet of a device."""

    gigabytes: float
    bandwidth: float  # TB/s
    flops: float  # Tflop/s in bfloat16
    dollars: float  # an hour, roughly, without a contract
    gpu: tuple = ()  # compute capability, cores, units a core, its shared memory, L2, GHz


DEVICES = {
    "H100": Device(80, 3.35, 989, 3.0, (9, 0, 132, 128, 233472, 52428800, 1.98)),
    "A100": Device(80, 2.04, 312, 1.8, (8, 0, 108, 64, 167936, 41943040, 1.41)),
    "L40S": Device(48, 0.86, 362, 0.9, (8, 9, 142, 128, 102400, 100663296, 2.52)),
    "RTX4090": Device(24, 1.01, 165, 0.5, (8, 9, 128, 128, 102400, 75497472, 2.52)),
    "v5e": Device(16, 0.82, 197, 1.2),
    "v5p": Device(95, 2.77, 459, 4.2),
    "v6e": Device(32, 1.64, 918, 2.7),
    "cpu": Device(4, 0.05, 0.5, 0),  # simulated, for tests
}
GPU = """platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{ name: "{kind}" device_vendor: "NVIDIA Corporation"
cuda_compute_capability {{ major: {gpu[0]} minor: {gpu[1]} }}
driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
dnn_version: "9.10.0" core_count: {gpu[2]} fpus_per_core: {gpu[3]} threads_per_block_limit: 1024
threads_per_warp: 32 threads_per_core_limit: 2048 registers_per_core_limit: 65536
registers_per_block_limit: 65536 shared_memory_per_core: {gpu[4]} shared_memory_per_block: 49152
shared_memory_per_block_optin: {optin} l2_cache_size: {gpu[5]} clock_rate_ghz: {gpu[6]}
memory_bandwidth: {bandwidth} device_memory_size: {bytes} block_dim_limit_x: 2147483647
block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
thread_dim_limit_y: 1024 thread_dim_limit_z: 64 }}"""

NAMES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
NAMES += ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
CUDNN = SimpleNamespace(cudnn_get_version=lambda: 91000)  # what JAX asks, as it is not here either
STOP_IDS, MAX_ROWS = (1,), 512  # of a Policy
TRAIN, VAL, TEST = 74, 16, 100  # problems of --task aime
REPLIES = 30  # of the reflector in an iteration
MODELS = {  # NAMES in config.json
    "Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936),
    "Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151936),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Gemma-3-27B": ("gemma3_text", 62, 5376, 21504, 32, 16, 128, 262208),
    "Llama-3.3-70B": ("llama", 80, 8192, 28672, 64, 8, 128, 128256),
}
TABLE = (  # model, devices, how many of them share a weight, tokens of a microbatch
    ("Qwen3-1.7B", "H100:1", 1, 4096),
    ("Qwen3-1.7B", "v5e:2x2", 1, 4096),
    ("Llama-3.1-8B", "RTX4090:1", 1, 4096),
    ("Llama-3.1-8B", "H100:1", 1, 4096),
    ("Llama-3.1-8B", "v5e:4x4", 8, 4096),
    ("Gemma-3-27B", "v5p:2x2x2", 4, 4096),
    ("Llama-3.3-70B", "H100:8", 8, 4096),
)


class Rig(NamedTuple):
    """What is planned for."""

    device: Device
    devices: str
    mesh: Mesh
    length: int  # of a row of the cache, in tokens
    microbatch_tokens: int

    @property
    def memory(self):
        return self.device.gigabytes * 1e9


def make_rig(devices, model_parallel, length, microbatch_tokens):
    """A data x model mesh, as espl.make_mesh makes it, of devices that need not be here."""
    kind, _, shape = devices.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[1-9]\d*(x\d+)*", shape):
        raise espl.UserError(f"--devices {devices}: give H100:8 or v5e:4x4; {', '.join(DEVICES)}")
    device = DEVICES[kind]
    what = f"cannot make a mesh of --devices {devices} with --model-parallel {model_parallel}"
    with espl.explained(what):
        if kind == "cpu":
            found = jax.devices()[: int(shape)]
        elif device.gpu:
            fused_attention_stablehlo.cuda_versions = CUDNN
            target = GPU.format(
                kind=kind,
                gpu=device.gpu,
                optin=device.gpu[4] - 1024,
                bandwidth=int(1e12 * device.bandwidth),
                bytes=int(1e9 * device.gigabytes),
            )
            topology = {"target_config": target, "topology": f"1x1x{shape}"}
            found = topologies.get_topology_desc("", "cuda", **topology).devices
        else:
            found = topologies.get_topology_desc(devices, "tpu").devices
        grid = np.array(found).reshape(-1, model_parallel)
        if kind.startswith("v"):
            grid = mesh_utils.create_device_mesh(grid.shape, found, allow_split_physical_axes=True)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return Rig(device, devices, mesh, length, microbatch_tokens)


def read_config(model, lora_rank, rig, frozen=False):
    """espl's configuration of a named model, of a directory, or of a model on the hub."""
    with tempfile.TemporaryDirectory() as scratch:
        if model in MODELS:
            values = dict(zip(NAMES, MODELS[model]))
            values["tie_word_embeddings"] = "Llama" not in model
            values["max_position_embeddings"] = 40960
            Path(scratch, "config.json").write_text(json.dumps(values))
            model = scratch
        cfg = espl.read_model_config(model, "bfloat16", lora_rank)
    fused = bool(rig.device.gpu) and cfg.head_dim in (64, 128) and not cfg.attention_cap
    return dataclasses.replace(cfg, fused=fused, frozen=frozen)


# ---- Memory


def laid_out(tree, mesh, spec=None):
    """Shapes with their layout: the given one, or that of the weights with the same paths."""

    def place(path, x):
        axes = espl.fit_spec(spec or espl.weight_spec(path), x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    return jax.tree.map_with_path(place, tree)


def shapes_of(cfg, mesh):
    """A Policy whose weights are shapes."""
    trained = nnx.LoRAParam if cfg.lora_rank else nnx.Nothing() if cfg.frozen else nnx.Param

    def new():
        return nnx.split(espl.Transformer(cfg, nnx.Rngs(0)), trained, ...)

    graphdef, theta, frozen = jax.eval_shape(new)
    theta, theta_ref = laid_out(theta, mesh), laid_out(theta, mesh)
    return espl.Policy(
        cfg, graphdef, theta, theta_ref, laid_out(frozen, mesh), mesh, STOP_IDS, MAX_ROWS
    )


def shapes_in(tree):
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]


def size(tree, itemsize=None):
    """Bytes on one device, each array once; itemsize: of a number, instead of the array's own."""
    total = 0
    for x in {id(x): x for x in shapes_in(tree)}.values():
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        total += math.prod(shape) * (itemsize or x.dtype.itemsize)
    return total


def adam(policy):
    """The optimizer of a run, and its state."""
    optimizer = optax.apply_if_finite(optax.adam(4e-5, b1=0.9, b2=0.95, eps=1e-8), 2**30)
    return optimizer, laid_out(jax.eval_shape(optimizer.init, policy.theta), policy.mesh)


def steps(policy, moments, rows, rig):
    """A run's programs, {name: (function, arguments)}, and its cache."""
    cfg, mesh, length, most = policy.cfg, rig.mesh, rig.length, rig.microbatch_tokens
    optimizer, _ = adam(policy)
    cache = jax.eval_shape(lambda: espl.new_cache(cfg, rows, length))
    cache = laid_out(cache, mesh, P("data", "model"))
    rollout = espl.Rollout([0] * 128, [0] * (length - 128), [0.0] * (length - 128))
    batch = next(espl.microbatches([rollout] * max(1, most // length), most, policy))
    batch = laid_out(batch, mesh, P("data"))
    gradient = laid_out(policy.theta, mesh)

    def array(*shape, dtype=np.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    temperature = array(dtype=np.float32)
    prompts = min(rows, max(1, espl.PREFILL_TOKENS // length)), length
    entering = policy, policy.theta, array(*prompts), array(*prompts)
    prefix = laid_out(jax.eval_shape(espl.prefill, *entering), mesh, P(None, "model"))
    row = array(rows), array(rows), array(rows), array(rows, 2, dtype=np.uint32)
    decoding = policy, policy.theta, cache, *row, temperature, 0.95
    programs = {
        "prefill": (espl.prefill, entering),
        "write_prefixes": (espl.write_prefixes, (cache, prefix, array(rows))),
        "decode_chunk": (espl.decode_chunk, decoding),
        "add_gradient": (espl.add_gradient, (gradient, policy, batch, array(), espl.Objective())),
        "adam_step": (espl.adam_step, (optimizer, policy.theta, moments, gradient)),
    }
    return programs, cache


def beside_arguments(function, args, rig):
    """Bytes that a program takes beside its arguments as they are: padding, results, temporary."""
    lowered = function.lower(*args)
    text = f"{jax.__version__} {rig.devices} {lowered.as_text()}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = Path(os.environ["JAX_COMPILATION_CACHE_DIR"], f"plan-{digest[:32]}.json")
    if not path.is_file():
        compiled = lowered.compile()
        m = compiled.memory_analysis()
        formats = jax.tree.leaves(compiled.input_formats)
        read = [x for x, form in zip(shapes_in(args), formats, strict=True) if form.layout]
        padding = m.argument_size_in_bytes - sum(map(size, read))
        results = m.output_size_in_bytes - m.alias_size_in_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([padding, results, m.temp_size_in_bytes]))
    return sum(json.loads(path.read_text()))


def loaded(cfg, reflector, rig):
    """What a run holds before it samples: its Policy, its reflector's, all arrays."""
    policy = shapes_of(cfg, rig.mesh)
    other = shapes_of(reflector, rig.mesh) if reflector else policy
    always = policy, other.frozen, adam(policy)[1]
    for p in (policy, other):
        p.cache_tokens = espl.cache_tokens(p.cfg, rig.mesh, size(always))
    return policy, other, always


def plan_memory(cfg, reflector, rig):
    """What a device holds: {part: bytes}, {step: (held, peak)}, and the rows of the cache."""
    policy, other, always = loaded(cfg, reflector, rig)
    rows = espl.rows_for(policy, policy.max_rows, rig.length)
    programs, cache = steps(policy, always[2], rows, rig)
    peaks = {}
    for name, (function, args) in programs.items():
        held = size((always, args, cache if name == "prefill" else []))
        try:
            peaks[name] = held, held + beside_arguments(function, args, rig)
        except jax.errors.JaxRuntimeError as e:  # libtpu finds that it does not fit
            print(f"{name}: {espl.first_line(e)}", file=sys.stderr)
            peaks[name] = held, math.inf
    parts = {
        "weights": size([policy.frozen] if cfg.lora_rank else [policy.frozen, policy.theta]),
        "adapter": size(policy.theta) if cfg.lora_rank else 0,
        "its first value": size(policy.theta_ref),
        "Adam's moments": size(always[2]),
        "reflector": size(other.frozen) if reflector else 0,
        "cache": size(cache),
    }
    return parts, peaks, rows


# ---- Time


class Clock:
    """Stands in for espl's programs on the devices: responses have given lengths, and take time.

    A decode step reads all weights and the whole cache at nine tenths of the data sheet's
    bandwidth, and takes a millisecond more. Prefill and update run at two fifths of the data
    sheet's flop/s. What devices send to each other is not counted.
    """

    def __init__(self, policy, rig):
        self.policy, self.rig = policy, rig
        self.weights = size((policy.frozen, policy.theta))
        self.operations = size((policy.frozen, policy.theta), itemsize=2)  # two for each weight
        self.seconds = self.steps = self.prefilled = 0
        self.shapes, self.read, self.ends = set(), 0, {}

    def sample(self, lengths, prompt, group=5):
        """Samples responses of these lengths to prompts of so many tokens; a group shares one."""
        rollouts = [espl.Rollout([i // group] * prompt) for i in range(len(lengths))]
        for i, n in enumerate(lengths):  # by the key that espl.generate gives to a rollout
            key = np.random.SeedSequence([0, 0, i]).generate_state(2)
            self.ends[tuple(key)] = prompt + n
        stand_ins = {
            "new_cache": self.new_cache,
            "prefill": self.prefill,
            "write_prefixes": lambda cache, keys_values, source: cache,
            "decode_chunk": self.decode_chunk,
        }
        with mock.patch.multiple(espl, **stand_ins):
            sampling = espl.Sampling(1.0, 1.0, max(lengths), label="simulating")
            espl.generate(self.policy, None, rollouts, sampling)
        return self

    def new_cache(self, cfg, rows, length):
        shape = rows, cfg.num_kv_heads, length, cfg.head_dim
        layer = jax.ShapeDtypeStruct(shape, cfg.dtype)
        laid = laid_out(layer, self.rig.mesh, P("data", "model"))
        self.read = self.weights + 2 * cfg.num_layers * size(laid)
        self.shapes.add((rows, length))
        return [(layer, layer)]

    def prefill(self, policy, theta, token, position):
        self.prefilled += token.size
        self.compute(token.size)

    def decode_chunk(self, policy, theta, cache, token, position, steps, key, *_):
        tokens = np.full((espl.DECODE_CHUNK, len(token)), -1)
        for row, n in enumerate(steps):
            left = self.ends[tuple(key[row])] - position[row] - 1 if n else 0
            n = min(n, left, len(tokens))
            tokens[:n, row] = 0
            if n == left and n:
                tokens[n - 1, row] = policy.stop_ids[0]
        count = int((tokens >= 0).sum(0).max())
        self.steps += count
        self.seconds += count * (1e-3 + self.read / (0.9e12 * self.rig.device.bandwidth))
        return cache, tokens, np.zeros(tokens.shape)

    def compute(self, tokens, passes=1):
        """A pass multiplies each token with all weights."""
        self.seconds += passes * tokens * self.operations / (0.4e12 * self.rig.device.flops)


def response_lengths(count, median, most):
    """Lognormal, as those of a thinking model on AIME."""
    drawn = median * np.exp(0.7 * np.random.default_rng(0).normal(size=count))
    return np.minimum(most, drawn).astype(int).tolist()


def job(cfg, reflector, rig):
    """Prints the seconds of an iteration of --task aime, and hours and dollars of the whole run."""
    c = espl.Config()
    policy, other, _ = loaded(cfg, reflector, rig)
    count = c.num_prompts * c.num_rollouts * c.batch_size
    lengths = response_lengths(count, 6000, c.max_new_tokens)
    queue = Clock(policy, rig).sample(lengths, 400)
    print(
        f"{count} responses of {min(lengths):,} to {max(lengths):,} tokens, {sum(lengths):,} in "
        f"all: cache of {policy.cache_tokens:,} tokens, {queue.steps:,} decode steps, "
        f"{queue.prefilled:,} tokens prefilled, {len(queue.shapes)} shapes, {queue.seconds:.0f} s"
    )
    update = Clock(policy, rig)
    update.compute(sum(lengths) / rig.mesh.shape["data"], passes=3 if cfg.lora_rank else 4)
    replies = Clock(other, rig).sample(response_lengths(REPLIES, 2000, c.reflect_tokens), 6500, 1)
    iteration = queue.seconds + update.seconds + replies.seconds
    print(
        f"an iteration: sampling {queue.seconds:.0f} s, update {update.seconds:.0f} s, "
        f"{REPLIES} replies of the reflector {replies.seconds:.0f} s"
    )
    iterations = c.epochs * math.ceil(TRAIN / c.batch_size)
    evaluations = 1 + math.ceil(iterations / c.eval_every)
    at_a_time = c.test_samples * (VAL + TEST)
    test = Clock(policy, rig).sample(response_lengths(at_a_time, 6000, c.max_new_tokens), 400, 4)
    table = 3 * TEST / (VAL + TEST)  # its fourth cell is the last evaluation
    parts = {
        f"training, {iterations} iterations": iterations * iteration,
        f"evaluation, {evaluations} times, and the table": (evaluations + table) * test.seconds,
    }
    for name, seconds in parts.items():
        dollars = seconds / 3600 * rig.mesh.size * rig.device.dollars
        print(f"{name}: {seconds / 3600:.1f} hours, {dollars:.0f} dollars")


# ---- The program


def show(parts, peaks, rows, rig):
    held = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items() if n)
    print(f"GB on a device of {rig.device.gigabytes}: {held}")
    print(f"rows of {rig.length:,} tokens decoded at once: {rows}\n")
    print("| step | held, GB | peak, GB | fits |\n| --- | --- | --- | --- |")
    for name, (held, peak) in peaks.items():
        fits = "yes" if peak <= rig.memory else "no"
        print(f"| {name} | {held / 1e9:.2f} | {peak / 1e9:.2f} | {fits} |")


def show_table(length, lora_rank):
    """A line for each of TABLE."""
    head = ["model", "devices", "data x model", "weights, GB", "sampling, GB"]
    head += [f"rows of {length:,}", "update, GB", "tokens of a microbatch"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for model, devices, model_parallel, microbatch_tokens in TABLE:
        rig = make_rig(devices, model_parallel, length, microbatch_tokens)
        with planning(rig):
            parts, peaks, rows = plan_memory(read_config(model, lora_rank, rig), None, rig)
        most = {name: peak / 1e9 for name, (_, peak) in peaks.items()}
        update = max(most.pop("add_gradient"), most.pop("adam_step"))
        cells = [model, devices, " x ".join(map(str, rig.mesh.devices.shape))]
        cells += [f"{parts['weights'] / 1e9:.1f}", f"{max(most.values()):.1f}", f"{rows}"]
        cells += [f"{update:.1f} of {rig.device.gigabytes}", f"{microbatch_tokens:,}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        jax.clear_caches()


def plan(model, devices, model_parallel, reflector, lora_rank, length, microbatch_tokens, queue):
    length = espl.bucket(max(1, length))
    if not model:
        if queue or reflector:
            raise espl.UserError("--queue and --reflector need a --model")
        show_table(length, lora_rank)
        return
    rig = make_rig(devices, model_parallel, length, microbatch_tokens)
    cfg = read_config(model, lora_rank, rig)
    other = read_config(reflector, 0, rig, frozen=True) if reflector else None
    with planning(rig):
        if queue:
            job(cfg, other, rig)
        else:
            show(*plan_memory(cfg, other, rig), rig)


@contextlib.contextmanager
def planning(rig):
    """espl on these devices."""
    with jax.set_mesh(rig.mesh), mock.patch.object(espl, "device_memory", lambda: rig.memory):
        yield


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a directory, or a hub's name")
    parser.add_argument("--devices", default="H100:1", help=f"KIND:SHAPE; {', '.join(DEVICES)}")
    parser.add_argument("--model-parallel", type=int, default=1, help="devices that share a weight")
    parser.add_argument("--reflector", help="a second model on the same devices")
    parser.add_argument("--lora-rank", type=int, default=32, help="0: train all weights")
    parser.add_argument("--length", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument(
        "--queue", action="store_true", help="time of --task aime instead of memory"
    )
    return run_tool(parser, plan, argv)


if __name__ == "__main__":
    sys.exit(main())
