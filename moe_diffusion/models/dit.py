"""DiT: one class for DiT, SiT, TC-DiT, EC-DiT, DiffMoE, DSMoE, DiT-MoE and ProMoE.

They are told apart by configuration.

A class-conditional transformer on patches of an image or a latent (2212.09748), whose MLPs, in a
pattern of layers, are mixtures of experts. Layers are scanned: a period of blocks (say one dense,
one MoE) is traced and compiled once, and its parameters are stacked along a leading `layers` axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.models.blocks import (
    ZEROS,
    Attention,
    Dtype,
    LabelEmbed,
    Norm,
    TimeEmbed,
    linear,
    patchify,
    sincos_table,
    unpatchify,
)
from moe_diffusion.models.parts import compute_dtype, make_mlp, make_moe
from moe_diffusion.parallel.mesh import platform

FIELDS = {
    "reverse_time": (False, "the network's own time is 1 - t, its velocity noise - data"),
}


def check(config: ConfigDict) -> None:
    """Raises a UserError for values of the section `model` that this architecture cannot have."""
    del config  # the shared checks say it all


_MOST_UNROLLED = {"cpu": 6, "cuda": 28, "gpu": 28}  # periods, by platform
COLLECTIONS = ("params", "router_state", "losses", "metrics", "router_stats", "intermediates")
# What `cheap` keeps besides products: kernels, loops and orders, moved rows, attention's result.
_EXPENSIVE = frozenset(
    ("pallas_call", "while", "scan", "cond", "sort", "top_k", "cumsum", "gather", "all_to_all")
    + ("ragged_all_to_all", "reduce_scatter", "name")
)


def _is_expensive(primitive, *_, **params) -> bool:
    """Not elementwise, and no product of attention, which has two batch dimensions."""
    if primitive.name == "dot_general":
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return len(batch_dimensions) < 2
    return primitive.name in _EXPENSIVE


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "cheap": _is_expensive,
}


def layer_segments(pattern: tuple[bool, ...]) -> tuple[tuple[tuple[bool, ...], int], ...]:
    """Cuts a pattern of layers (True = MoE) into (period, repeats), to be scanned one by one.

    (F, T, F, T) -> (((F, T), 2),)          (F, F, T, T) -> (((F,), 2), ((T,), 2))
    """
    segments = []
    start = 0
    while start < len(pattern):
        best = (pattern[start : start + 1], 1)
        for size in (1, 2):
            period = pattern[start : start + size]
            repeats = 1
            while pattern[start + repeats * size :][:size] == period:
                repeats += 1
            if len(period) == size and repeats > 1 and repeats * size > len(best[0]) * best[1]:
                best = (period, repeats)
        segments.append(best)
        start += len(best[0]) * best[1]
    return tuple(segments)


def periods_at_once(repeats: int, remat: str, platform: str) -> int:
    """How many periods a step of the scan holds by default.

    XLA copies every layer's saved values into and out of stacked arrays, on CPU the weights too: an
    eighth of a step of DSMoE-S there, and on a GPU a quarter of the bytes that a step of DSMoE-L or
    DiT-XL moves. Hence all periods, as long as that makes the program at most six times as long,
    or 28 on GPUs, where minutes of compiling matter less. Not if anything is to be computed again:
    outside of a loop XLA:CPU keeps it instead. Not on TPU, whose stacked arrays need no filling.
    """
    most = _MOST_UNROLLED.get(platform, 1)
    return repeats if remat == "none" and repeats <= most else 1


class Block(nn.Module):
    """adaLN-Zero block: x += gate * attention(norm(x)); x += gate * ffn(norm(x))."""

    norm: str
    make_attention: Callable[..., Attention]
    make_ffn: Callable[..., nn.Module]
    dtype: Dtype

    @nn.compact
    def __call__(self, x, c, *ffn_args):
        """x [B, S, D], condition c [B, D]; what else the ffn takes -> [B, S, D]."""
        axes, width = ("embed", "mlp"), 6 * x.shape[-1]
        adaln = linear(width, axes, name="adaLN", dtype=self.dtype, kernel_init=ZEROS)(nn.silu(c))
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.split(adaln, 6, axis=-1)
        h = Norm(self.norm, name="norm1")(x, (shift_a, scale_a))
        x += gate_a[:, None] * self.make_attention(name="attn")(h)
        h = Norm(self.norm, name="norm2")(x, (shift_f, scale_f))
        return x + gate_f[:, None] * self.make_ffn()(h, *ffn_args)


class Period(nn.Module):
    """The blocks of one scan step; pattern says which have experts."""

    pattern: tuple[bool, ...]
    make_block: Callable[..., Block]
    make_mlp: Callable[..., nn.Module]
    make_moe: Callable[..., nn.Module] | None
    train: bool

    @nn.compact
    def __call__(self, x, c, is_null):
        for index, is_moe in enumerate(self.pattern):
            name = f"block_{index}"
            if is_moe:
                x = self.make_block(make_ffn=self.make_moe, name=name)(x, c, is_null, self.train)
            else:
                x = self.make_block(make_ffn=self.make_mlp, name=name)(x, c)
        return x, None


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


class DiT(nn.Module):
    """Noisy image, time and label -> prediction; see `models.build` for how a config fills this.

    image_size: side of the square input (pixels or latents); channels: of the input.
    learn_sigma: twice the channels come out; a flow uses the first half.
    positions: `sincos` (fixed table), or one of `blocks.ROPES`.
    time_scale multiplies t before its embedding. reverse_time: the network's own time runs from
      data (0) to noise (1) and its velocity is noise - data: it sees time_scale * (1 - t), and its
      velocity changes sign (not the second half of learn_sigma).
    moe_pattern: True where a block has experts.
    remat: what the backward pass computes again: `none`; `cheap`, what is elementwise, attention
      weights, and gathered weights are gathered again; `dots`, all but products with dense
      weights; `full`, everything.
    unroll: periods of layers in one step of the scan; 0: see `periods_at_once`.
    attention: None or one of kernels/attention.py.
    """

    image_size: int
    channels: int
    patch_size: int
    num_classes: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    qk_norm: bool
    qk_norm_kind: str
    qk_norm_eps: float
    norm: str
    positions: str
    learn_sigma: bool
    time_scale: float
    reverse_time: bool
    moe_pattern: tuple[bool, ...]
    make_mlp: Callable[..., nn.Module]
    make_moe: Callable[..., nn.Module] | None
    remat: str
    unroll: int
    attention: str | None
    dtype: Dtype

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def segments(self) -> tuple[tuple[tuple[bool, ...], int], ...]:
        """What is scanned: (period, repeats) after (period, repeats), see `layer_segments`."""
        return layer_segments(self.moe_pattern)

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C], t f32[B] (0 noise, 1 data), y i32[B] -> f32[B, H, W, C or 2C].

        y == num_classes is the null label (no condition). train only tells the routers.
        """
        width, dtype = self.hidden_size, self.dtype
        x = patchify(x.astype(dtype), self.patch_size)
        x = linear(width, (None, "embed"), name="patch_embed", dtype=dtype)(x)
        if self.positions == "sincos":
            x += jnp.asarray(sincos_table(self.grid, width), dtype)
        c = TimeEmbed(width, dtype, name="time_embed")(
            (1 - t if self.reverse_time else t) * self.time_scale
        )
        c += LabelEmbed(self.num_classes, width, dtype, name="label_embed")(y)
        for index in range(len(self.segments)):
            x = self._segment(index, x, c, y == self.num_classes, train)
        features = self.patch_size**2 * self.channels * (2 if self.learn_sigma else 1)
        x = FinalLayer(features, dtype, name="final")(x, c)
        x = unpatchify(x.astype(jnp.float32), self.patch_size)
        if self.reverse_time:
            x = jnp.concatenate([-x[..., : self.channels], x[..., self.channels :]], axis=-1)
        return x

    def _segment(self, index, x, c, is_null, train, *, context=0, dropout=0.0):
        """The layers of a segment, a scan over their stacked parameters.

        context: tokens before those of the image. dropout: of attention and dense MLPs.
        """
        attention = partial(
            Attention,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            qk_norm=self.qk_norm,
            qk_norm_kind=self.qk_norm_kind,
            qk_norm_eps=self.qk_norm_eps,
            positions=self.positions,
            dtype=self.dtype,
            context=context,
            dropout=dropout,
            implementation=self.attention,
        )
        make_block = partial(Block, norm=self.norm, make_attention=attention, dtype=self.dtype)
        pattern, repeats = self.segments[index]
        unroll = min(repeats, self.unroll or periods_at_once(repeats, self.remat, platform()))
        body = Period
        if self.remat != "none":
            # A loop keeps what is computed again apart by itself, straight code does not.
            body = nn.remat(Period, policy=REMAT[self.remat], prevent_cse=unroll > 1)
        scanned = nn.scan(
            body,
            variable_axes={name: 0 for name in COLLECTIONS},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=repeats,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        make_mlp = partial(self.make_mlp, dropout=dropout)
        name = f"layers_{index}"
        return scanned(pattern, make_block, make_mlp, self.make_moe, train, name=name)(
            x, c, is_null
        )[0]

    @nn.nowrap  # plain function: it makes an unbound router for its rule
    def update_router_state(self, router_state: dict, router_stats: dict) -> dict:
        """router_state after an optimizer step that saw `router_stats` (same paths, stacked)."""
        if not router_state:
            return router_state
        router = self.make_moe().make_router()

        def update(state, stats):
            if any(isinstance(value, dict) for value in state.values()):
                return {name: update(state[name], stats.get(name, {})) for name in state}
            return router.next_state(state, stats)

        return update(router_state, router_stats)


def moe_pattern(depth: int, interleave: bool, skip_first: int) -> tuple[bool, ...]:
    """Which blocks have experts: all, or the odd ones; never the first `skip_first`."""
    layers = np.arange(depth)
    moe = (layers % 2 == 1) if interleave else (layers >= 0)
    return tuple(bool(v) for v in moe & (layers >= skip_first))


def build(config: ConfigDict, losses: tuple[str, ...]) -> DiT:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio)
    return DiT(**transformer(config, losses, width), reverse_time=config.dit.reverse_time)


def transformer(config: ConfigDict, losses: tuple[str, ...], mlp_width: int) -> dict[str, Any]:
    """The fields of a class-conditional transformer that the shared keys of a config fill."""
    make_moe_layer = make_moe(config, losses)
    pattern = (False,) * config.depth
    if make_moe_layer:
        pattern = moe_pattern(config.depth, config.moe.interleave, config.moe.skip_first)
    names = ("image_size", "channels", "patch_size", "num_classes", "hidden_size", "num_heads")
    names += ("qk_norm", "qk_norm_kind", "qk_norm_eps", "norm", "positions", "learn_sigma")
    names += ("time_scale", "remat", "unroll")
    return {name: config[name] for name in names} | {
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "moe_pattern": pattern,
        "make_mlp": make_mlp(config, mlp_width),
        "make_moe": make_moe_layer,
        "attention": None if config.attention == "auto" else config.attention,
        "dtype": compute_dtype(config.dtype),
    }
