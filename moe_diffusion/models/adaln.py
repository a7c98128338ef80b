"""Modulation by adaLN: what a block makes of its condition, whole or compressed (Dense2MoE).

A block's modulation is a layer from the condition c [B, D] to n values per channel, n D of them. In
FLUX.1 these layers have 27% of all parameters. Dense2MoE compresses them (2510.09094, section 4.1):
the layer D -> n D becomes D -> rank -> n D. The first of the two may be shared by all blocks.
"""

from __future__ import annotations

from functools import partial

import jax
from flax import linen as nn

from moe_diffusion.models.blocks import ZEROS, Dtype, linear

# c [B, D], or with a shared compression (c, what is left of it [B, rank])
Condition = jax.Array | tuple[jax.Array, jax.Array]


def activated(c: Condition) -> jax.Array:
    """What a modulation takes: SiLU(c) [B, D], or what a shared compression left of it."""
    return c[1] if isinstance(c, tuple) else nn.silu(c)


def vector(c: Condition) -> jax.Array:
    """The condition itself, [B, D]."""
    return c[0] if isinstance(c, tuple) else c


def modulation(
    width: int, rank: int, shared: bool, dtype: Dtype, number: int, name: str
) -> nn.Module:
    """The layer from `activated(c)` to [B, number * width]. It starts at zero.

    Args:
      rank: width between the two layers; 0 has one layer.
      shared: the first layer is not the block's own, see `compressed`.
    """
    last = partial(linear, number * width, dtype=dtype, kernel_init=ZEROS)
    if not rank:
        return last(("embed", "mlp"), name=name)
    return Compressed(rank, shared, partial(last, (None, "mlp")), dtype, name=name)


def compressed(c: jax.Array, rank: int, dtype: Dtype) -> Condition:
    """c [B, D] with the compression that all blocks share; in a model's compact method."""
    down = linear(rank, ("embed", None), use_bias=False, name="adaLN_down", dtype=dtype)
    return c, down(nn.silu(c))


class Compressed(nn.Module):
    """Two layers, `down` and `up`, without an activation between them."""

    rank: int
    shared: bool
    make_up: partial
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        if not self.shared:
            down = partial(linear, self.rank, ("embed", None), use_bias=False, dtype=self.dtype)
            x = down(name="down")(x)
        return self.make_up(name="up")(x)
