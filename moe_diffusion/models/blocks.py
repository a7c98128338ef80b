"""What transformers for diffusion are made of: embedders, norms, attention, rope, adaLN, MLPs.

Every module computes in `dtype`, whatever the dtype of its weights. Logical axis names of weights:
embed, mlp, heads, expert, layers (see parallel/rules.py for where they go on a mesh). A grid is
(rows, columns) of patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.attention import attend
from moe_diffusion.parallel.weights import with_whole_weights

Dtype = Any
ROPES = ("rope1d", "rope2d", "rope2d_pairs")
XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros


class Linear(nn.Module):
    """A linear layer from the last `contract` axes to new ones, `features`.

    kernel [*inputs, *features], initialised as a matrix; `axes` names its logical axes. Tokens are
    flattened to one axis: as [B, S, D], XLA:CPU takes three times as long for the gradient of the
    kernel. The kernel keeps its axes: flattened, a scan over layers would save a copy of it.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Dtype
    kernel_init: Callable = XAVIER
    use_bias: bool = True
    contract: int = 1

    @nn.compact
    def __call__(self, x):
        lead, inputs = x.shape[: -self.contract], x.shape[-self.contract :]
        matrix = (math.prod(inputs), math.prod(self.features))

        def init(key, shape, dtype):
            return self.kernel_init(key, matrix, dtype).reshape(shape)

        init = nn.with_logical_partitioning(init, self.axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        weights = {"kernel": kernel.astype(self.dtype)}
        if self.use_bias:
            init = nn.with_logical_partitioning(ZEROS, self.axes[self.contract :])
            bias = self.param("bias", init, self.features, jnp.float32)
            weights["bias"] = bias.astype(self.dtype)

        def apply(x, weights):
            rows = x.reshape(-1, *inputs)
            y = jnp.tensordot(rows, weights["kernel"], self.contract)
            if self.use_bias:
                y += weights["bias"]
            return y.reshape(*x.shape[: len(lead)], *self.features)

        axes = {"kernel": self.axes, "bias": self.axes[self.contract :]}
        return with_whole_weights(apply, x.astype(self.dtype), weights, axes)


def linear(features: int | Sequence[int], axes: Sequence[str | None], **options) -> Linear:
    """A `Linear` to one axis or several."""
    features = (features,) if isinstance(features, int) else tuple(features)
    return Linear(features, tuple(axes), **options)


# --- positions -----------------------------------------------------------------------------------


def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed position embedding f32[rows * columns, width] of DiT.

    The first half of the channels encodes the column, the second the row; each half is [sin, cos]
    of position / 10000^(2i / half). Computed in f64, like the tables inside published files.
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    row, column = np.indices(grid)
    angles = [np.outer(position.reshape(-1), frequency) for position in (column, row)]
    halves = [f(angle) for angle in angles for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def rope_angles(kind: str, grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """Rotation angles f32[rows * columns, n, head_dim / n / 2] of the n axes of a rope.

    rope1d: one axis, the token's number in row-major order. rope2d and rope2d_pairs: the first half
    of a head turns with the row, the second with the column. Frequencies
    10000^(-i / number of pairs).
    """
    row, column = np.indices(grid)
    positions = [np.arange(row.size)] if kind == "rope1d" else [row, column]
    pairs = head_dim // len(positions) // 2
    frequency = 1.0 / 10000.0 ** (np.arange(pairs) / pairs)
    angles = [np.outer(position.reshape(-1), frequency) for position in positions]
    return np.stack(angles, axis=1).astype(np.float32)


def rotate(x: jax.Array, angles: np.ndarray, interleaved: bool = False) -> jax.Array:
    """Applies rope to x [..., S, head_dim] with angles [S, n, pairs].

    Pair i of each of the n parts of a head is (x[i], x[pairs + i]) or, interleaved,
    (x[2 i], x[2 i + 1]).
    """
    tokens, axes, pairs = angles.shape
    halves = (pairs, 2) if interleaved else (2, pairs)
    axis = -1 if interleaved else -2  # that of the two halves of a pair
    cos = np.stack([np.cos(angles)] * 2, axis=axis).reshape(tokens, -1)
    sin = np.stack([-np.sin(angles), np.sin(angles)], axis=axis).reshape(tokens, -1)
    swapped = jnp.flip(x.reshape(*x.shape[:-1], axes, *halves), axis=axis).reshape(x.shape)
    return x * cos.astype(x.dtype) + swapped * sin.astype(x.dtype)


# --- embedders -----------------------------------------------------------------------------------


def time_features(t: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Sinusoidal features f32[B, width] of f32[B]: [cos, sin] of t * max_period^(-i / half)."""
    half = width // 2
    frequency = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbed(nn.Module):
    """Times f32[B] -> [B, D]: sinusoidal features, Linear, SiLU, Linear."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, t):
        normal = nn.initializers.normal(0.02)
        make = partial(linear, self.width, dtype=self.dtype, kernel_init=normal)
        x = make((None, "embed"), name="dense_0")(time_features(t).astype(self.dtype))
        return make(("embed", None), name="dense_1")(nn.silu(x))


class LabelEmbed(nn.Module):
    """Labels i32[B] -> [B, D]; one row more than classes: the last is the null label's."""

    num_classes: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, y):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        table = self.param("embedding", init, (self.num_classes + 1, self.width), jnp.float32)
        return jnp.take(table, y, axis=0, mode="clip").astype(self.dtype)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Images [B, H, W, C] -> tokens [B, H/p * W/p, p*p*C], values in the order (row, column, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.swapaxes(2, 3).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify` for images of `grid` patches."""
    rows, columns = grid
    x = x.reshape(x.shape[0], rows, columns, patch, patch, -1)
    return x.swapaxes(2, 3).reshape(x.shape[0], rows * patch, columns * patch, -1)


# --- inside a block ------------------------------------------------------------------------------


class Norm(nn.Module):
    """`layernorm` without parameters, `layernorm_affine` with scale and bias, or `rmsnorm` with a
    scale; computed in f32. Then adaLN: scaled by 1 + scale and shifted by shift.

    Only x is kept for the backward pass: in f32 the rest is three times as much.
    """

    kind: str = "layernorm"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x, modulation: Sequence[jax.Array] | None = None):
        """x [.., D]; with modulation = (shift, scale), [B, D] each, x is [B, S, D]."""
        weights = {}
        for name, init in (("scale", nn.initializers.ones), ("bias", ZEROS)):
            if name in _NORM_WEIGHTS[self.kind]:
                init = nn.with_logical_partitioning(init, (None,))
                weights[name] = self.param(name, init, x.shape[-1:], jnp.float32)
        return jax.checkpoint(partial(_normalize, self.kind, self.eps))(x, weights, modulation)


_NORM_WEIGHTS = {"layernorm": (), "layernorm_affine": ("scale", "bias"), "rmsnorm": ("scale",)}


def _normalize(kind, eps, x, weights, modulation):
    y = x.astype(jnp.float32)
    if kind != "rmsnorm":
        y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if "scale" in weights:
        y *= weights["scale"]
    if "bias" in weights:
        y += weights["bias"]
    y = y.astype(x.dtype)
    if modulation is not None:
        shift, scale = modulation
        y = y * (1 + scale[:, None]) + shift[:, None]
    return y


def drop(x: jax.Array, rate: float) -> jax.Array:
    """Dropout (1207.0580) with the random stream "dropout"; rate 0 does nothing and needs none."""
    return nn.Dropout(rate, deterministic=False)(x) if rate else x


class MLP(nn.Module):
    """A dense MLP of a kind of kernels/mlp.py: [.., D] -> [.., D]. dropout: of its hidden units."""

    hidden_size: int
    kind: str = "gelu"
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, is_null=None, train=False):
        """x [.., D]; the other arguments are those of a layer of experts, whose place it takes."""
        del is_null, train
        make = partial(linear, dtype=self.dtype, use_bias=self.use_bias)
        names = mlp.inputs(self.kind)
        hidden = (make(self.hidden_size, ("embed", "mlp"), name=name)(x) for name in names)
        inner = jax.checkpoint(mlp.activation(self.kind))(*hidden)
        return make(x.shape[-1], ("mlp", "embed"), name="down")(drop(inner, self.dropout))


class Attention(nn.Module):
    """Multi-head self-attention, [B, S, D] -> [B, S, D].

    num_kv_heads < num_heads groups the queries: key head j serves query heads j * r .. j * r + r-1.
    With qk_norm, queries and keys pass a `Norm` before rope. positions: one of ROPES turns them
    by their place in `grid`, anything else does not. The first `context` tokens stand before the
    grid and are not turned. dropout: of the result. implementation: see kernels/attention.py.
    """

    num_heads: int
    num_kv_heads: int
    qk_norm: bool
    positions: str
    grid: tuple[int, int]
    dtype: Dtype
    qk_norm_kind: str = "rmsnorm"
    qk_norm_eps: float = 1e-6
    context: int = 0
    dropout: float = 0.0
    implementation: str | None = None

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        head_dim = width // self.num_heads

        def heads(name, *number):
            axes = ("embed", *[None] * (len(number) - 1), "heads", None)
            return linear((*number, head_dim), axes, name=name, dtype=self.dtype)(x)

        if self.num_kv_heads == self.num_heads:
            qkv = heads("qkv", 3, self.num_heads).transpose(2, 0, 3, 1, 4)
            # The gradient of a split is one concatenation, that of indexing three padded sums.
            q, k, v = (part[0] for part in jax.lax.split(qkv, (1, 1, 1)))
        else:
            q = heads("q", self.num_heads).swapaxes(1, 2)
            k = heads("k", self.num_kv_heads).swapaxes(1, 2)
            v = heads("v", self.num_kv_heads).swapaxes(1, 2)
        if self.qk_norm:
            norm = partial(Norm, self.qk_norm_kind, self.qk_norm_eps)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if self.positions in ROPES:
            angles = rope_angles(self.positions, self.grid, head_dim)
            angles = np.pad(angles, ((self.context, 0), (0, 0), (0, 0)))
            turn = partial(rotate, angles=angles, interleaved=self.positions == "rope2d_pairs")
            q, k = turn(q), turn(k)
        out = attend(q, k, v, self.implementation).swapaxes(1, 2)
        proj = linear(width, ("heads", None, "embed"), name="proj", dtype=self.dtype, contract=2)
        return drop(proj(out), self.dropout)


class TransformerBlock(nn.Module):
    """adaLN-Zero block: x += gate * attention(norm(x)); x += gate * ffn(norm(x)).

    make_ffn: makes an `MLP`, or a layer of experts (moe/layer.py). train: tells the experts.
    """

    norm: str
    make_attention: Callable[..., Attention]
    make_ffn: Callable[..., nn.Module]
    train: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, c, is_null):
        """x [B, S, D], condition c [B, D], is_null bool[B] -> [B, S, D]."""
        axes, width = ("embed", "mlp"), 6 * x.shape[-1]
        adaln = linear(width, axes, name="adaLN", dtype=self.dtype, kernel_init=ZEROS)(nn.silu(c))
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.split(adaln, 6, axis=-1)
        h = Norm(self.norm, name="norm1")(x, (shift_a, scale_a))
        x += gate_a[:, None] * self.make_attention(name="attn")(h)
        h = Norm(self.norm, name="norm2")(x, (shift_f, scale_f))
        return x + gate_f[:, None] * self.make_ffn()(h, is_null, self.train)


class FinalLayer(nn.Module):
    """adaLN, then a linear layer to the values of a patch; both start at zero."""

    features: int
    dtype: Dtype
    norm: str = "layernorm"

    @nn.compact
    def __call__(self, x, c):
        make = partial(linear, dtype=self.dtype, kernel_init=ZEROS)
        adaln = make(2 * x.shape[-1], ("embed", "mlp"), name="adaLN")(nn.silu(c))
        x = Norm(self.norm, name="norm")(x, jnp.split(adaln, 2, axis=-1))
        return make(self.features, ("embed", None), name="linear")(x)
