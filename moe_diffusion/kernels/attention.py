"""Attention over the tokens of an image: one function, the best that the platform has.

    softmax(q k^T / sqrt(d)) v

| implementation | what it does                                | default for                       |
|----------------|---------------------------------------------|-----------------------------------|
| `xla`          | two batched products, softmax in f32        | CPU; TPU, few scores              |
| `splash`       | jax's Pallas kernel: scores stay on chip    | TPU, 64 MB of scores on a device  |
| `cudnn`        | cuDNN's fused kernel                        | GPU                               |

Every one takes grouped queries. What a kernel cannot take (`can_run`) is left to `xla`. The
defaults on TPU follow compiled programs (docs/benchmarks): few scores stay on the chip in XLA too.
They were never timed.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from moe_diffusion.parallel.mesh import by_group, num_batch_shards, platform

_SEQ_MINOR = splash_attention_kernel.QKVLayout.SEQ_MINOR
IMPLEMENTATIONS = ("xla", "splash", "cudnn")
_SPLASH_FROM = 2**26  # bytes of scores in f32
_SPLASH_BLOCKS = (512, 384, 256, 128)  # tokens of a tile: the largest that divides their number


def default_implementation(platform: str, scores: int) -> str:
    """The table above, for a mesh of "cpu", "tpu" or "cuda" / "gpu" and the scores of a device."""
    if platform == "tpu":
        return "splash" if 4 * scores >= _SPLASH_FROM else "xla"
    return "xla" if platform == "cpu" else "cudnn"


def can_run(name: str, q: jax.Array) -> bool:
    """Whether an implementation takes queries [B, heads, S, d] of this shape and type here.

    `splash` needs S a multiple of 128 and, on anything but a TPU, is interpreted (for tests).
    `cudnn` needs a GPU that is there, Ampere or later, 16 bits, and d a multiple of 8 up to 128.
    """
    tokens, head_dim = q.shape[2:]
    if name == "splash":
        return tokens % _SPLASH_BLOCKS[-1] == 0 and platform() in ("tpu", "cpu")
    if name == "cudnn":
        # cuDNN is asked for its version while tracing: no program for absent GPUs can hold it.
        if jax.default_backend() != "gpu" or platform() not in ("cuda", "gpu"):
            return False
        ampere = float(jax.local_devices()[0].compute_capability) >= 8
        return ampere and q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return True


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for q [B, heads, S, d] and k, v [B, kv_heads, S, d].

    Key head j serves query heads j * r .. j * r + r - 1, r = heads / kv_heads. implementation None
    chooses by the platform of the mesh. The result is named "attention" for remat policies.
    """
    scores = q.size // q.shape[3] * q.shape[2] // num_batch_shards()
    name = implementation or default_implementation(platform(), scores)
    if not can_run(name, q):
        name = "xla"
    function = {"xla": _xla, "splash": partial(by_group, _splash), "cudnn": _cudnn}[name]
    return checkpoint_name(function(q, k, v), "attention")


@jax.checkpoint
def _xla(q, k, v):
    """The S x S weights, in f32, are computed again in the backward pass: cheaper than kept."""
    b, heads, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d) * d**-0.5  # the queries of one key head side by side
    scores = jnp.einsum("bgrd,bgtd->bgrt", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bgrt,bgtd->bgrd", weights, v).reshape(b, heads, s, d)


def _splash(q, k, v):
    """jax's splash attention with nothing masked; for the images of one device."""
    heads, tokens, head_dim = q.shape[1:]
    block = next(size for size in _SPLASH_BLOCKS if tokens % size == 0)
    everything = splash_attention_mask.FullMask((tokens, tokens))
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask=splash_attention_mask.MultiHeadMask([everything] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
            # Tokens along the lanes: 64 or 72 channels would be padded to 128 in memory.
            q_layout=_SEQ_MINOR,
            k_layout=_SEQ_MINOR,
            v_layout=_SEQ_MINOR,
        ),
        interpret=platform() != "tpu",
    )
    return jax.vmap(kernel)(q * head_dim**-0.5, k, v)


def _cudnn(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, S, heads, d]
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").swapaxes(1, 2)
