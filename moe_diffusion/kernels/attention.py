"""Attention over the tokens of an image: one function, the best that the platform has.

    softmax(q k^T / sqrt(d)) v

| implementation | what it does                                | default for                       |
|----------------|---------------------------------------------|-----------------------------------|
| `xla`          | two batched products, softmax in f32        | TPU, few scores                   |
| `own_gradient` | the same, laid out for XLA:CPU              | CPU                               |
| `splash`       | jax's Pallas kernel: scores stay on chip    | TPU, 64 MB of scores on a device  |
| `cudnn`        | cuDNN's fused kernel                        | GPU                               |

Every one takes grouped queries. What a kernel cannot take (`can_run`) is left to `xla`. The
defaults on TPU follow compiled programs (docs/benchmarks): few scores stay on the chip in XLA too.
They were never timed.
"""

from __future__ import annotations

from functools import partial
from math import gcd

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from moe_diffusion.parallel.mesh import by_group, num_batch_shards, platform

_SEQ_MINOR = splash_attention_kernel.QKVLayout.SEQ_MINOR
IMPLEMENTATIONS = ("xla", "own_gradient", "splash", "cudnn")
_PARTS = 4  # of a batch, side by side
_SPLASH_FROM = 2**26  # bytes of scores in f32
_SPLASH_BLOCKS = (512, 384, 256, 128)  # tokens of a tile: the largest that divides their number


def default_implementation(platform: str, scores: int) -> str:
    """The table above, for a mesh of "cpu", "tpu" or "cuda" / "gpu" and the scores of a device."""
    if platform == "tpu":
        return "splash" if 4 * scores >= _SPLASH_FROM else "xla"
    return "own_gradient" if platform == "cpu" else "cudnn"


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
    function = {
        "xla": _xla,
        "own_gradient": partial(by_group, _in_parts),
        "splash": partial(by_group, _splash),
        "cudnn": _cudnn,
    }[name]
    return checkpoint_name(function(q, k, v), "attention")


@jax.checkpoint
def _xla(q, k, v):
    """The S x S weights, in f32, are computed again in the backward pass: cheaper than kept."""
    b, heads, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d) * d**-0.5  # the queries of one key head side by side
    scores = jnp.einsum("bgrd,bgtd->bgrt", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bgrt,bgtd->bgrd", weights, v).reshape(b, heads, s, d)


def _in_parts(q, k, v):
    """Images in up to _PARTS parts: XLA:CPU runs a batched product on one core, several on all."""
    parts = gcd(q.shape[0], _PARTS)
    b, heads, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d)
    split = ([*lax.split(x, [b // parts] * parts)] for x in (q, k, v))
    return jnp.concatenate([_own_gradient(*part) for part in zip(*split, strict=True)]).reshape(
        b, heads, s, d
    )


@jax.custom_vjp
def _own_gradient(q, k, v):
    """Attention of q [B, H, R, d] over k, v [B, H, S, d].

    Its gradient remembers the logarithm of every row's sum and computes the weights again. All
    products are X Y or X Y^T of arrays as they lie: X^T Y takes XLA:CPU twice as long, and
    left to itself it makes one of what is written below.
    """
    return _remember(q, k, v)[0]


def _remember(q, k, v):
    scores = _scores(q, k)
    most = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - most)
    sums = exponentials.sum(-1, keepdims=True)
    out = jnp.einsum("bgrt,bgtd->bgrd", (exponentials / sums).astype(v.dtype), v)
    # Named here, or a remat policy would compute what the gradient remembers again.
    out, log_sums = (checkpoint_name(x, "attention") for x in (out, most + jnp.log(sums)))
    return out, (q, k, v, out, log_sums)


def _pull_back(residuals, d_out):
    q, k, v, out, log_sums = residuals
    weights = jnp.exp(_scores(q, k) - log_sums)
    d_weights = jnp.einsum("bgrd,bgtd->bgrt", d_out, v, preferred_element_type=jnp.float32)
    # sum_t weights d_weights = <d_out, out>
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - row) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = jnp.einsum("bgrt,bgtd->bgrd", d_scores, k)
    return (
        d_q,
        _transposed_product(d_scores, q),
        _transposed_product(weights.astype(v.dtype), d_out),
    )


def _scores(q, k):
    q = q * q.shape[-1] ** -0.5
    return jnp.einsum("bgrd,bgtd->bgrt", q, k, preferred_element_type=jnp.float32)


def _transposed_product(x, y):
    """x^T y [.., S, d] for x [.., R, S] and the narrow y [.., R, d], as (y^T x)^T."""
    y = lax.optimization_barrier(y.swapaxes(-1, -2))
    return lax.optimization_barrier(jnp.einsum("bgdr,bgrt->bgdt", y, x)).swapaxes(-1, -2)


_own_gradient.defvjp(_remember, _pull_back)


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
