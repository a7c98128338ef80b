"""The blocks of FLUX.1: double-stream and single-stream, with any layer in the place of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion.kernels.attention import attend
from moe_diffusion.models.adaln import activated
from moe_diffusion.models.blocks import Dtype, Norm, linear, rotate


def rope_angles(grid: tuple[int, int], tokens: int, axes: tuple[int, ...]) -> np.ndarray:
    """Rotation angles f32[tokens, head_dim / 2] of the text's tokens, then the image's.

    An image token has the position (0, row, column), a text token (0, 0, 0). In every head axes[i]
    channels turn with number i of the position, pair j of them with the frequency
    10000^(-2 j / axes[i]).
    """
    positions = np.zeros((tokens, len(axes)))
    positions[tokens - grid[0] * grid[1] :, 1:] = np.indices(grid).reshape(2, -1).T
    frequencies = [10000.0 ** (-np.arange(0, size, 2) / size) for size in axes]
    angles = map(np.outer, positions.T, frequencies)
    return np.concatenate([*angles], axis=1).astype(np.float32)


class JointAttention(nn.Module):
    """Attention of all tokens to all, without weights: q, k, v [B, heads, L + S, d] -> the same.

    The text's L tokens stand before the S of the image. q and k are turned in f32.
    """

    grid: tuple[int, int]
    axes: tuple[int, ...]
    implementation: str | None

    def __call__(self, q, k, v):
        angles = rope_angles(self.grid, q.shape[2], self.axes)[:, None]
        turn = partial(rotate, angles=angles, interleaved=True)
        q, k = (turn(x.astype(jnp.float32)).astype(x.dtype) for x in (q, k))
        return attend(q, k, v, self.implementation)


class StreamAttention(nn.Module):
    """The weights of one stream's attention: `heads` stands before the attention, `out` behind."""

    width: int
    num_heads: int
    qk_norm_eps: float
    dtype: Dtype

    def setup(self):
        shape, axes = (
            (3, self.num_heads, self.width // self.num_heads),
            ("embed", None, "heads", None),
        )
        self.qkv = linear(shape, axes, dtype=self.dtype)
        self.q_norm = Norm("rmsnorm", self.qk_norm_eps)
        self.k_norm = Norm("rmsnorm", self.qk_norm_eps)
        self.proj = linear(self.width, ("heads", None, "embed"), dtype=self.dtype, contract=2)

    def heads(self, x):
        """[B, S, D] -> q, k, v [B, heads, S, d], of which q and k are normalised."""
        qkv = self.qkv(x).transpose(2, 0, 3, 1, 4)
        q, k, v = (part[0] for part in jax.lax.split(qkv, (1, 1, 1)))
        return self.q_norm(q), self.k_norm(k), v

    def out(self, x):
        """[B, heads, S, d] -> [B, S, D]."""
        return self.proj(x.swapaxes(1, 2))


class Block(nn.Module):
    """What both kinds of blocks are made of; each factory takes the name of what it makes.

    Attributes:
      make_attention: makes a `StreamAttention`.
      make_ffn: makes an MLP, or a layer that takes its place: (x, is_null, train) -> x.
      make_modulation: (number of values per channel, name) -> a layer that makes them of what
        `adaln.activated` returns.
      attention: makes a `JointAttention`.
      ffn_name: "mlp", or "moe" for experts; the stream's name stands before it.
      train: passed on to the layer in an MLP's place.
    """

    make_attention: Callable[..., nn.Module]
    make_ffn: Callable[..., nn.Module]
    make_modulation: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    ffn_name: str
    train: bool
    dtype: Dtype

    def modulations(self, c, number, name):
        """The condition -> `number` times [B, D]."""
        make = partial(self.make_modulation, number, name=name)
        return jnp.split(make()(activated(c)), number, axis=-1)

    def norm(self, x, shift, scale, name):
        return Norm(name=name)(x, (shift, scale)).astype(self.dtype)

    def ffn(self, x, stream=""):
        # No sample lacks its condition here: `null` leaves a text of zeros.
        make = partial(self.make_ffn, name=f"{stream}{self.ffn_name}")
        return make()(x, jnp.zeros(len(x), bool), self.train)


class DoubleBlock(Block):
    """(image [B, S, D], text [B, L, D]), condition c (adaln.py) -> the same two.

    Of each stream: x += gate * attention(norm(x)); x += gate * ffn(norm(x)), in x's dtype.
    """

    @nn.compact
    def __call__(self, carry, c):
        streams = dict(zip(("image", "text"), carry, strict=True))
        attentions, modulations, heads = {}, {}, {}
        for name, x in streams.items():
            attentions[name] = self.make_attention(name=f"{name}_attn")
            modulations[name] = self.modulations(c, 6, f"{name}_adaLN")
            h = self.norm(x, *modulations[name][:2], f"{name}_norm1")
            heads[name] = attentions[name].heads(h)
        pairs = zip(heads["text"], heads["image"], strict=True)
        joined = self.attention(name="attend")(*(jnp.concatenate(pair, axis=2) for pair in pairs))
        attended = dict(
            zip(("text", "image"), jnp.split(joined, [carry[1].shape[1]], 2), strict=True)
        )
        for name, x in streams.items():
            gate, shift, scale, gate_ffn = modulations[name][2:]
            x += (gate[:, None] * attentions[name].out(attended[name])).astype(x.dtype)
            h = self.norm(x, shift, scale, f"{name}_norm2")
            streams[name] = x + (gate_ffn[:, None] * self.ffn(h, f"{name}_")).astype(x.dtype)
        return streams["image"], streams["text"]


class SingleBlock(Block):
    """x [B, L + S, D], condition c -> x + gate * (attention(h) + ffn(h)), where h = norm(x)."""

    @nn.compact
    def __call__(self, x, c):
        shift, scale, gate = self.modulations(c, 3, "adaLN")
        h = self.norm(x, shift, scale, "norm")
        attention = self.make_attention(name="attn")
        out = attention.out(self.attention(name="attend")(*attention.heads(h)))
        return x + (gate[:, None] * (out + self.ffn(h))).astype(x.dtype)
