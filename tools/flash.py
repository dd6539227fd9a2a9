"""Fused attention for long sequences on GPUs and TPUs: cuDNN's, and JAX's splash attention.

espl.py loads this file; without it, and wherever `choose` says "", attention is written out in XLA (`espl.attention`).
docs/hardware.md says what is known of it: nothing of it has run on its hardware yet, so `checked` compares it first.
"""

import contextlib
import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import espl  # noqa: E402  (the very module of the program that loads this)


def choose(cfg: espl.ModelConfig, mesh) -> str:
    """The platform whose kernel does for this mesh's devices, and the model's heads and numbers; "" if none does."""
    platform = mesh.devices.flat[0].platform
    heads = {"gpu": (64, 128), "tpu": (64, 128, 256)}.get(platform, ())
    return platform if cfg.dtype == "bfloat16" and not cfg.attention_cap and cfg.head_dim in heads else ""


def checked(cfg: espl.ModelConfig) -> espl.ModelConfig:
    """cfg, without `flash` if the kernel fails on these devices, or differs in values or gradients from espl.attention."""
    # Windows of a thousand tokens and more would hide an error of one.
    windows = tuple(w if w == espl.PAD_POSITION else min(w, 100) for w in cfg.layer_window)
    small = dataclasses.replace(cfg, layer_window=windows)
    B, T, S, N, K, H = jax.device_count(), 1024, 64, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    own = jnp.broadcast_to(9 + jnp.arange(T), (B, T))  # positions, behind a prompt of 9 tokens
    keys = jnp.concatenate([jnp.broadcast_to(jnp.r_[:9, [espl.PAD_POSITION] * (S - 9)], (B, S)), own], 1)

    @jax.jit
    def difference():
        shapes = (B, T, N, H), (B, K, S + T, H), (B, K, S + T, H), (B, T, N, H)
        *qkv, g = (jax.random.normal(jax.random.key(i), shape, cfg.dtype) for i, shape in enumerate(shapes))

        def values(attend, window):
            out, pull = jax.vjp(lambda *qkv: attend(*qkv, own, keys, window, small), *qkv)
            return [x.astype(jnp.float32) for x in (out, *pull(g))]
        pairs = [pair for w in map(jnp.int32, sorted(set(windows)))
                 for pair in zip(values(attention, w), values(espl.attention, w))]
        return jnp.max(jnp.stack([jnp.linalg.norm(x - y) / jnp.linalg.norm(y) for x, y in pairs]))

    reason = ""
    try:
        compiled = difference.lower().compile()
    except Exception as e:
        reason = espl.first_line(e)
    if not espl.highest(bool(reason)):  # what one process cannot do, none does
        differ = math.inf
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            differ = float(compiled())
        reason = "" if differ < 0.03 else f"it differs by {differ:.2g}"  # by .003 where bfloat16 alone rounds
        if not reason:
            return cfg
    espl.warn(f"fused attention is not used ({reason or 'another process has none'}): long sequences take more time")
    return dataclasses.replace(cfg, flash="")


def attention(q_BTNH, k_BKSH, v_BKSH, query_position_BT, _, window, cfg: espl.ModelConfig):
    """espl.attention by a kernel that keeps scores out of memory. The keys are those of a row's prompt, then its own T.

    Such kernels are causal by index, so tokens move to their positions: a row's own keys follow those of its prompt at
    once, and padding comes last, where no token sees it.
    """
    T, N, K = *q_BTNH.shape[1:3], k_BKSH.shape[1]
    mesh, windows = jax.sharding.get_abstract_mesh(), sorted(set(cfg.layer_window))
    if not mesh.empty and N % mesh.shape["model"] == 0 != K % mesh.shape["model"]:  # a head's keys beside its queries
        copies = mesh.shape["model"] // math.gcd(K, mesh.shape["model"])
        copies = copies if N % (K * copies) == 0 else N // K
        k_BKSH, v_BKSH = (jnp.repeat(x, copies, 1) for x in (k_BKSH, v_BKSH))

    def local(q, k, v, start_B, window):  # on one device
        S = k.shape[2] + -k.shape[2] % espl.BLOCK
        place = jax.vmap(lambda row, x, i: jax.lax.dynamic_update_slice_in_dim(row, x, i, 1))
        empty = lambda x, before: jnp.pad(before, ((0, 0), (0, 0), (0, S - before.shape[2]), (0, 0)))
        q = place(empty(q, q[:, :, :0]), q, start_B)
        k, v = (place(empty(x, x[:, :, :-T]), x[:, :, -T:], start_B) for x in (k, v))
        out = jax.lax.switch(jnp.searchsorted(jnp.array(windows), window),
                             [partial(kernel, window=w, cfg=cfg) for w in windows], q, k, v)
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, T, 1))(out, start_B)

    args = q_BTNH.swapaxes(1, 2), k_BKSH, v_BKSH, query_position_BT[:, 0], window
    if not mesh.empty:  # kernels are not laid out by the compiler
        specs = *[P("data", "model")] * 3, P("data"), P()
        specs = tuple(espl.fit_spec(spec, x.shape, mesh) for spec, x in zip(specs, args))
        local = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return local(*args).swapaxes(1, 2)


def kernel(q_BNSH, k_BKSH, v_BKSH, window: int, cfg: espl.ModelConfig):
    """Causal attention by index to the last `window` keys: cuDNN's on GPUs, on TPUs (or interpreted, to test it)
    JAX's splash attention."""
    everything = window >= q_BNSH.shape[2]
    if cfg.flash == "gpu":
        out = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q_BNSH, k_BKSH, v_BKSH)), scale=cfg.attention_scale, is_causal=True,
            local_window_size=None if everything else (window - 1, 0), implementation="cudnn")
        return out.swapaxes(1, 2)
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes, CausalMask, LocalMask, MultiHeadMask, make_splash_mha)
    shape = (q_BNSH.shape[2],) * 2
    mask = CausalMask(shape) if everything else LocalMask(shape, (window - 1, 0), 0)
    sizes = BlockSizes(**{f"block_{name}": espl.BLOCK for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")})
    splash = make_splash_mha(MultiHeadMask([mask] * q_BNSH.shape[1]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                             interpret=cfg.flash != "tpu")
    return jax.vmap(splash)(q_BNSH * jnp.asarray(cfg.attention_scale, q_BNSH.dtype), k_BKSH, v_BKSH)
