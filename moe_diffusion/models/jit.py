"""JiT and JiTMoE: transformers on large patches of pixels that predict the image itself.

"Just image Transformers" (2511.13720; with experts 2512.01252): DiT blocks with RMSNorm, q/k norm,
SwiGLU and rope. Patches pass a bottleneck, and from some block on, copies of the class embedding
stand before the image's tokens ("in context").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.checks import check_values, require
from moe_diffusion.models.blocks import (
    Dtype,
    LabelEmbed,
    TimeEmbed,
    linear,
    patchify,
    sincos_table,
    unpatchify,
)
from moe_diffusion.models.dit import DiT, FinalLayer, layer_segments, transformer

FIELDS = {
    "bottleneck": (128, "width between the pixels of a patch and its token"),
    "in_context_tokens": (32, "class tokens before those of the image; 0 = none"),
    "in_context_start": (4, "the first block that sees them"),
    "dropout": (0.0, "in training, of attention and dense MLPs in the blocks' middle half"),
}


def check(config: ConfigDict) -> None:
    """Raises a UserError for values of the section `model` that this architecture cannot have."""
    check_values(
        config.jit,
        "model.jit.",
        positive=("bottleneck",),
        not_negative=("in_context_tokens", "in_context_start"),
        fraction=("dropout",),
    )
    require(
        config.hidden_size % 4 == 0,
        f"model.architecture = jit adds a sin-cos table, which needs model.hidden_size = "
        f"{config.hidden_size} to be a multiple of 4: change the width",
    )
    start = config.jit.in_context_start
    require(
        config.jit.in_context_tokens == 0 or start < config.depth,
        f"model.jit.in_context_start = {start} is beyond the last of model.depth = {config.depth} "
        "blocks: start earlier, or set model.jit.in_context_tokens=0",
    )


class BottleneckPatchEmbed(nn.Module):
    """Patches [B, S, p*p*C] -> [B, S, bottleneck] (no bias) -> [B, S, D] (2511.13720, sec. 4.3)."""

    bottleneck: int
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, patches):
        reduce = linear(
            self.bottleneck, (None, None), name="reduce", dtype=self.dtype, use_bias=False
        )
        return linear(self.width, (None, "embed"), name="expand", dtype=self.dtype)(reduce(patches))


class JiT(DiT):
    """Noisy image, time and label -> predicted image (diffusion.prediction=data).

    A DiT, of which it uses all fields but `reverse_time`, and more:
    bottleneck: width between pixels and tokens. in_context_tokens: how many copies of the class
      embedding, each with a learned position, stand before the image from block in_context_start
      on. dropout: in training, of attention and dense MLPs in the middle half of the blocks.
    The sin-cos table is added to the tokens whatever `positions` says, which is about rope.
    """

    bottleneck: int
    in_context_tokens: int
    in_context_start: int
    dropout: float

    @property
    def _cuts(self) -> list[int]:
        """First blocks of the parts between which blocks change: no scan runs across."""
        depth = len(self.moe_pattern)
        cuts = {0, depth}
        if self.in_context_tokens:
            cuts.add(self.in_context_start)
        if self.dropout:
            cuts |= {depth // 4, depth // 4 * 3}
        return sorted(cuts)

    @property
    def segments(self) -> tuple[tuple[tuple[bool, ...], int], ...]:
        cuts = self._cuts
        parts = (self.moe_pattern[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        return tuple(segment for part in parts for segment in layer_segments(part))

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """x [B, H, W, C], t f32[B] (0 noise, 1 data), y i32[B] -> f32[B, H, W, C or 2C].

        y == num_classes is the null label. train tells the routers and turns dropout on, which
        draws from the random stream "dropout".
        """
        width, dtype, depth = self.hidden_size, self.dtype, len(self.moe_pattern)
        embed = BottleneckPatchEmbed(self.bottleneck, width, dtype, name="patch_embed")
        x = embed(patchify(x.astype(dtype), self.patch_size))
        x += jnp.asarray(sincos_table(self.grid, width), dtype)
        label = LabelEmbed(self.num_classes, width, dtype, name="label_embed")(y)
        c = TimeEmbed(width, dtype, name="time_embed")(t * self.time_scale) + label

        block = context = 0
        for index, (period, repeats) in enumerate(self.segments):
            if self.in_context_tokens and block == self.in_context_start:
                context = self.in_context_tokens
                x = jnp.concatenate([self._in_context(label), x], axis=1)
            in_middle = depth // 4 <= block < depth // 4 * 3
            dropout = self.dropout if train and in_middle else 0.0
            is_null = y == self.num_classes
            x = self._segment(index, x, c, is_null, train, context=context, dropout=dropout)
            block += len(period) * repeats

        features = self.patch_size**2 * self.channels * (2 if self.learn_sigma else 1)
        x = FinalLayer(features, dtype, self.norm, name="final")(x[:, context:], c)
        return unpatchify(x.astype(jnp.float32), self.patch_size)

    def _in_context(self, label):
        """Class tokens [B, in_context_tokens, D] of the class embedding [B, D]."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        shape = (self.in_context_tokens, self.hidden_size)
        positions = self.param("in_context_embed", init, shape, jnp.float32)
        return label[:, None] + positions.astype(self.dtype)


def build(config: ConfigDict, losses: tuple[str, ...]) -> JiT:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio) * 2 // 3
    fields = transformer(config, losses, width)
    return JiT(**fields, **config.jit.to_dict(), reverse_time=False)
