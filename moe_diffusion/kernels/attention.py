"""Attention of tokens to tokens: one function with the best implementation of a platform.

    softmax(q k^T / sqrt(d)) v

Queries and keys are those of one sequence, or of two (cross-attention). Of the keys a mask may hide
some, as it does the padding of a text.

| implementation | what it does                                | default for                       |
|----------------|---------------------------------------------|-----------------------------------|
| `xla`          | two batched products, softmax in f32        | TPU, few scores                   |
| `own_gradient` | the same, laid out for XLA:CPU              | CPU                               |
| `splash`       | jax's Pallas kernel: scores stay on chip    | TPU, 64 MB of scores on a device  |
| `cudnn`        | cuDNN's fused kernel                        | GPU                               |

All of them take grouped queries. `xla` takes over what another one cannot do (`can_run`). The
defaults on TPU were never timed. They follow from compiled programs (docs/benchmarks): XLA too
keeps few scores on the chip.
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

from moe_diffusion.parallel.mesh import num_batch_shards, platform
from moe_diffusion.tensor_parallel import by_heads, num_head_parts

_SEQ_MINOR = splash_attention_kernel.QKVLayout.SEQ_MINOR
IMPLEMENTATIONS = ("xla", "own_gradient", "splash", "cudnn")
_PARTS = 4  # a batch is cut into so many, which run side by side
_HIDDEN = -1e30  # the score of a key that is not seen; infinity would make NaN where none is
_SPLASH_FROM = 2**26  # bytes of scores in f32
_SPLASH_BLOCKS = (512, 384, 256, 128)  # tokens of a tile: the largest that divides their number


def default_implementation(platform: str, scores: int) -> str:
    """The default in the table above.

    platform: "cpu", "tpu", or "cuda" / "gpu"; scores: how many scores one device has.
    """
    if platform == "tpu":
        return "splash" if 4 * scores >= _SPLASH_FROM else "xla"
    return "own_gradient" if platform == "cpu" else "cudnn"


def can_run(name: str, q: jax.Array, k: jax.Array, masked: bool = False) -> bool:
    """Whether an implementation can take queries q [B, heads, S, d] and keys k [B, .., T, d] here.

    `splash` needs S = T to be a multiple of 128 and takes no mask; on a CPU it is interpreted, for
    tests. `cudnn` needs a GPU that is present, from Ampere on, 16-bit numbers, and d to be a
    multiple of 8 up to 128.
    """
    tokens, head_dim = q.shape[2:]
    if name == "splash":
        fits = tokens == k.shape[2] and tokens % _SPLASH_BLOCKS[-1] == 0 and not masked
        return fits and platform() in ("tpu", "cpu")
    if name == "cudnn":
        # Tracing asks cuDNN for its version, so no program for absent GPUs can use it.
        if jax.default_backend() != "gpu" or platform() not in ("cuda", "gpu"):
            return False
        ampere = float(jax.local_devices()[0].compute_capability) >= 8
        return ampere and q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return True


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str | None = None,
    seen: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v.

    Args:
      q: [B, heads, S, d].
      k, v: [B, kv_heads, T, d]. Key head j serves the query heads j * r to j * r + r - 1, where
        r = heads / kv_heads.
      implementation: one of `IMPLEMENTATIONS`; None: the default for the platform of the mesh.
      seen: bool[B, T], the keys that may be attended to; None: all. Without any in a sample the
        result is the mean of its v.

    Returns:
      [B, heads, S, d], with the name "attention" for remat policies.
    """
    devices = num_batch_shards() * num_head_parts(k.shape[1])
    scores = q.size // q.shape[3] * k.shape[2] // devices
    name = implementation or default_implementation(platform(), scores)
    if not can_run(name, q, k, seen is not None):
        name = "xla"
    function = {
        "xla": _xla,
        "own_gradient": partial(by_heads, _in_parts),
        "splash": partial(by_heads, _splash),
        "cudnn": _cudnn,
    }[name]
    mask = () if seen is None else (seen[:, None, None],)  # [B, 1, 1, T]
    with jax.named_scope("attention_maps"):
        return checkpoint_name(function(q, k, v, *mask), "attention")


@jax.checkpoint
def _xla(q, k, v, *mask):
    """The backward pass computes the S x T weights in f32 again: cheaper than to keep them."""
    b, heads, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d) * d**-0.5  # the queries of one key head side by side
    scores = jnp.einsum("bgrd,bgtd->bgrt", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(_hide(scores, *mask)).astype(v.dtype)
    return jnp.einsum("bgrt,bgtd->bgrd", weights, v).reshape(b, heads, s, d)


def _hide(scores, mask=None):
    return scores if mask is None else jnp.where(mask, scores, _HIDDEN)


def _in_parts(q, k, v, *mask):
    """Cuts the batch into up to _PARTS parts: XLA:CPU runs a batched product on one core, but
    several products on all cores."""
    parts = gcd(q.shape[0], _PARTS)
    b, heads, s, d = q.shape
    q = q.reshape(b, k.shape[1], -1, d)
    split = ([*lax.split(x, [b // parts] * parts)] for x in (q, k, v, *mask))
    return jnp.concatenate([_own_gradient(*part) for part in zip(*split, strict=True)]).reshape(
        b, heads, s, d
    )


@jax.custom_vjp
def _own_gradient(q, k, v, *mask):
    """Attention of q [B, H, R, d] over k, v [B, H, T, d]; mask bool[B, 1, 1, T], or none.

    The gradient remembers the logarithm of every row's sum and computes the weights again. All
    products have the form X Y or X Y^T, because X^T Y takes XLA:CPU twice as long. Without the
    barriers in `_transposed_product` XLA would turn one of them into X^T Y.
    """
    return _remember(q, k, v, *mask)[0]


def _remember(q, k, v, *mask):
    scores = _scores(q, k, *mask)
    most = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - most)
    sums = exponentials.sum(-1, keepdims=True)
    out = jnp.einsum("bgrt,bgtd->bgrd", (exponentials / sums).astype(v.dtype), v)
    # Without these names a remat policy would compute again what the gradient remembers.
    out, log_sums = (checkpoint_name(x, "attention") for x in (out, most + jnp.log(sums)))
    return out, (q, k, v, out, log_sums, mask)


def _pull_back(residuals, d_out):
    q, k, v, out, log_sums, mask = residuals
    weights = jnp.exp(_scores(q, k, *mask) - log_sums)
    d_weights = jnp.einsum("bgrd,bgtd->bgrt", d_out, v, preferred_element_type=jnp.float32)
    # sum_t weights d_weights = <d_out, out>
    row = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - row) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = jnp.einsum("bgrt,bgtd->bgrd", d_scores, k)
    return (
        d_q,
        _transposed_product(d_scores, q),
        _transposed_product(weights.astype(v.dtype), d_out),
        *[None] * len(mask),
    )


def _scores(q, k, *mask):
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bgrd,bgtd->bgrt", q, k, preferred_element_type=jnp.float32)
    return _hide(scores, *mask)


def _transposed_product(x, y):
    """x^T y [.., T, d] for x [.., R, T] and the narrow y [.., R, d], as (y^T x)^T."""
    y = lax.optimization_barrier(y.swapaxes(-1, -2))
    return lax.optimization_barrier(jnp.einsum("bgdr,bgrt->bgdt", y, x)).swapaxes(-1, -2)


_own_gradient.defvjp(_remember, _pull_back)


def _splash(q, k, v):
    """jax's splash attention without a mask, for the images of one device."""
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
    # In a TPU's kernels float32 has one pass of bfloat16 or the six of "highest", but no "high";
    # 16-bit numbers have one pass.
    one_pass = q.dtype.itemsize == 2 or jax.config.jax_default_matmul_precision is None
    with jax.default_matmul_precision("default" if one_pass else "highest"):
        return jax.vmap(kernel)(q * head_dim**-0.5, k, v)


def _cudnn(q, k, v, mask=None):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, S, heads, d]
    if mask is not None:  # cuDNN takes one for every query
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], mask.shape[3]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out.swapaxes(1, 2)
