"""What transformers for diffusion are made of: embedders, norms, attention, rope, adaLN, MLPs.

Every module with a `dtype` computes in it, whatever the dtype of its weights. Every axis of a
weight has a logical name: embed, mlp, heads, expert, layers or None; parallel/rules.py says where
it goes on a mesh. A grid is (rows, columns) of patches.
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
from moe_diffusion.tensor_parallel import split_linear

Dtype = Any
ROPES = ("rope1d", "rope2d", "rope2d_pairs")
XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros


def parameter(module: nn.Module, name: str, init: Callable, axes: Sequence, shape: Sequence):
    """A parameter f32[shape] of a module, its axes named for the mesh."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Linear(nn.Module):
    """A linear layer from the last `contract` axes of x to new ones, `features`.

    The kernel is [*inputs, *features] and starts as a matrix of that size would. It keeps its axes:
    a scan over layers would save a copy of a flattened one. Tokens are flattened to one axis,
    because XLA:CPU takes three times as long for the gradient of the kernel of x [B, S, D].

    Attributes:
      features: sizes of the new axes.
      axes: the logical axis of every axis of the kernel.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Dtype
    kernel_init: Callable = XAVIER
    use_bias: bool = True
    contract: int = 1

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-self.contract :]
        matrix = (math.prod(inputs), math.prod(self.features))

        def init(key, shape, dtype):
            return self.kernel_init(key, matrix, dtype).reshape(shape)

        axes = {"kernel": self.axes, "bias": self.axes[self.contract :]}
        weights = {"kernel": parameter(self, "kernel", init, self.axes, (*inputs, *self.features))}
        if self.use_bias:
            weights["bias"] = parameter(self, "bias", ZEROS, axes["bias"], self.features)
        weights = {name: weight.astype(self.dtype) for name, weight in weights.items()}

        def apply(x, weights):
            y = jnp.tensordot(x.reshape(-1, *inputs), weights["kernel"], self.contract)
            if self.use_bias:
                y += weights["bias"]
            return y.reshape(*x.shape[: -self.contract], *self.features)

        return split_linear(apply, x.astype(self.dtype), weights, axes, self.contract)


def linear(features: int | Sequence[int], axes: Sequence[str | None], **options) -> Linear:
    """A `Linear` to one new axis or several. options: its other attributes."""
    features = (features,) if isinstance(features, int) else tuple(features)
    return Linear(features, tuple(axes), **options)


# --- positions -----------------------------------------------------------------------------------


def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """The fixed position embedding f32[rows * columns, width] of DiT.

    The first half of the channels encodes the column, the second the row. Each half is [sin, cos]
    of position / 10000^(2i / half). The table is computed in f64, like those in published files.
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    row, column = np.indices(grid)
    angles = [np.outer(position.reshape(-1), frequency) for position in (column, row)]
    halves = [f(angle) for angle in angles for f in (np.sin, np.cos)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def rope_angles(kind: str, grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """Rotation angles f32[rows * columns, n, head_dim / n / 2] of a rope with n axes.

    rope1d has one axis, the token's number in row-major order. rope2d and rope2d_pairs have two:
    the first half of a head turns with the row, the second with the column. The frequency of pair i
    is 10000^(-i / number of pairs).
    """
    row, column = np.indices(grid)
    positions = [np.arange(row.size)] if kind == "rope1d" else [row, column]
    pairs = head_dim // len(positions) // 2
    frequency = 1.0 / 10000.0 ** (np.arange(pairs) / pairs)
    angles = [np.outer(position.reshape(-1), frequency) for position in positions]
    return np.stack(angles, axis=1).astype(np.float32)


def rotate(x: jax.Array, angles: np.ndarray, interleaved: bool = False) -> jax.Array:
    """Applies rope to x [..., S, head_dim] with angles [S, n, pairs].

    A head has n parts. Pair i of a part is (x[i], x[pairs + i]), or (x[2 i], x[2 i + 1]) if they
    are interleaved.
    """
    tokens, axes, pairs = angles.shape
    halves = (pairs, 2) if interleaved else (2, pairs)
    axis = -1 if interleaved else -2  # on which the two halves of a pair lie
    cos = np.stack([np.cos(angles)] * 2, axis=axis).reshape(tokens, -1)
    sin = np.stack([-np.sin(angles), np.sin(angles)], axis=axis).reshape(tokens, -1)
    swapped = jnp.flip(x.reshape(*x.shape[:-1], axes, *halves), axis=axis).reshape(x.shape)
    return x * cos.astype(x.dtype) + swapped * sin.astype(x.dtype)


# --- embedders -----------------------------------------------------------------------------------


def time_features(t: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """f32[B] -> sinusoidal features f32[B, width]: [cos, sin] of t * max_period^(-i / half)."""
    half = width // 2
    frequency = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class VectorEmbed(nn.Module):
    """Vectors [B, n], like the sinusoidal features of a time, -> [B, D]: Linear, SiLU, Linear."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(0.02)
        make = partial(linear, self.width, dtype=self.dtype, kernel_init=normal)
        x = make((None, "embed"), name="dense_0")(x)
        return make(("embed", None), name="dense_1")(nn.silu(x))


class LabelEmbed(nn.Module):
    """Labels i32[B] -> f32[B, D], from a table of a row per class and a last one for "no label"."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, y):
        init, shape = nn.initializers.normal(0.02), (self.num_classes + 1, self.width)
        table = parameter(self, "embedding", init, (None, "embed"), shape)
        return jnp.take(table, y, axis=0, mode="clip").astype(jnp.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Images [B, H, W, C] -> tokens [B, H/p * W/p, p*p*C]; a token is (row, column, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch * c)
    return x.swapaxes(2, 3).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`, for images of `grid` patches."""
    rows, columns = grid
    x = x.reshape(x.shape[0], rows, columns, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(x.shape[0], rows * patch, columns * patch, -1)


# --- inside a block ------------------------------------------------------------------------------


class Norm(nn.Module):
    """A norm over the last axis, then adaLN's y * (1 + scale) + shift if it is modulated.

    `layernorm` has no parameters, `layernorm_affine` has scale and bias, `rmsnorm` has a scale. The
    norm is computed in f32. The backward pass keeps x alone: the rest is three times as much.
    """

    kind: str = "layernorm"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x, modulation: Sequence[jax.Array] | None = None):
        """x [.., D]; with modulation = (shift, scale), [B, D] each, x is [B, S, D]."""
        weights = {}
        for name in _NORM_WEIGHTS[self.kind]:
            weights[name] = parameter(self, name, _NORM_INITS[name], (None,), x.shape[-1:])
        return jax.checkpoint(partial(_normalize, self.kind, self.eps))(x, weights, modulation)


_NORM_WEIGHTS = {"layernorm": (), "layernorm_affine": ("scale", "bias"), "rmsnorm": ("scale",)}
_NORM_INITS = {"scale": nn.initializers.ones, "bias": ZEROS}


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
    """Dropout (1207.0580) from the random stream "dropout". Rate 0 needs no stream."""
    return nn.Dropout(rate, deterministic=False)(x) if rate else x


class MLP(nn.Module):
    """A dense MLP, [.., D] -> [.., D].

    Attributes:
      kind: one of kernels/mlp.py; `gelu` with biases is Eq. 1 of Dense2MoE (2510.09094).
      down_bias: whether the last layer has a bias, if the others have (`use_bias`).
      dropout: rate at which hidden units are dropped.
    """

    hidden_size: int
    kind: str = "gelu"
    use_bias: bool = True
    down_bias: bool = True
    dtype: Dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, is_null=None, train=False):
        """x [.., D]. The other arguments serve a layer of experts, whose place this takes."""
        del is_null, train
        make = partial(linear, dtype=self.dtype)
        bias, inputs = self.use_bias, mlp.inputs(self.kind)
        up = partial(make, self.hidden_size, ("embed", "mlp"), use_bias=bias)
        inner = jax.checkpoint(mlp.activation(self.kind))(*(up(name=name)(x) for name in inputs))
        down = make(x.shape[-1], ("mlp", "embed"), name="down", use_bias=bias and self.down_bias)
        return down(drop(inner, self.dropout))


class Attention(nn.Module):
    """Multi-head self-attention, [B, S, D] -> [B, S, D].

    Attributes:
      num_kv_heads: if smaller than num_heads by a factor r, queries are grouped: key head j serves
        the query heads j * r .. j * r + r - 1.
      qk_norm: queries and keys pass a `Norm` before rope.
      positions: one of ROPES turns queries and keys by their place in `grid`; anything else does
        not.
      context: so many tokens stand before the grid; they are not turned.
      dropout: rate at which values of the result are dropped.
      implementation: see kernels/attention.py.
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
            # A split's gradient is one concatenation; that of indexing is three padded sums.
            q, k, v = (part[0] for part in jax.lax.split(qkv, (1, 1, 1)))
        else:
            q = heads("q", self.num_heads).swapaxes(1, 2)
            k, v = (heads(name, self.num_kv_heads).swapaxes(1, 2) for name in "kv")
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


class CrossAttention(Attention):
    """Attention of the image's tokens to those of a text, [B, S, D] -> [B, S, D].

    The fields are those of `Attention`; nothing is turned. It starts at zero, so that a model with
    it begins as one without.
    """

    @nn.compact
    def __call__(self, x, text, seen=None):
        """x [B, S, D], text [B, L, D], seen bool[B, L]: the text's tokens that are not padding."""
        width, make = x.shape[-1], partial(linear, dtype=self.dtype)
        head_dim, kv_axes = width // self.num_heads, ("embed", None, "heads", None)
        q = make((self.num_heads, head_dim), ("embed", "heads", None), name="q")(x).swapaxes(1, 2)
        kv = make((2, self.num_kv_heads, head_dim), kv_axes, name="kv")(text)
        k, v = (part[0] for part in jax.lax.split(kv.transpose(2, 0, 3, 1, 4), (1, 1)))
        if self.qk_norm:
            norm = partial(Norm, self.qk_norm_kind, self.qk_norm_eps)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        out = attend(q, k, v, self.implementation, seen).swapaxes(1, 2)
        axes = ("heads", None, "embed")
        proj = make(width, axes, name="proj", kernel_init=ZEROS, contract=2)
        return drop(proj(out), self.dropout)


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
