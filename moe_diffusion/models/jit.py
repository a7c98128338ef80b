"""JiT and JiTMoE: transformers on large patches of pixels that predict the image itself.

"Just image Transformers" (2511.13720; with experts 2512.01252) are DiT blocks with RMSNorm, q/k
norm, SwiGLU and rope. Patches pass through a bottleneck. From some block on, copies of the class
embedding stand before the image's tokens ("in context").
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.checks import check_values, require
from moe_diffusion.models import blocks
from moe_diffusion.models.parts import transformer
from moe_diffusion.models.patches import PatchTransformer

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
    for key, unset in (("adaln_rank", 0), ("mob.groups", ("none",))):
        section, _, name = key.rpartition(".")
        found = (config[section] if section else config)[name]
        require(
            found == unset,
            f"model.{key} = {found} is for model.architecture = dit and flux: set it to {unset}",
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
    dtype: blocks.Dtype

    @nn.compact
    def __call__(self, patches):
        make = partial(blocks.linear, dtype=self.dtype)
        x = make(self.bottleneck, (None, None), name="reduce", use_bias=False)(patches)
        return make(self.width, (None, "embed"), name="expand")(x)


class JiT(PatchTransformer):
    """Noisy image, time and label -> predicted image (diffusion.prediction=data).

    Most fields are those of `PatchTransformer`. Here `positions` only chooses the kind of rope: the
    sin-cos table is always added to the tokens.

    Attributes:
      bottleneck: width between pixels and tokens.
      in_context_tokens: number of copies of the class embedding, each with a learned position, that
        stand before the image's tokens.
      in_context_start: the first block that sees these copies.
      dropout: in training, of attention and dense MLPs in the middle half of the blocks.
    """

    bottleneck: int
    in_context_tokens: int
    in_context_start: int
    dropout: float

    @property
    def kinds(self) -> tuple[str, ...]:
        """Like "moe.context.dropout": names all that differs, so that no scan mixes such blocks."""
        depth = len(self.moe_pattern)

        def kind(block: int, base: str) -> str:
            context = bool(self.in_context_tokens) and block >= self.in_context_start
            middle = bool(self.dropout) and depth // 4 <= block < depth // 4 * 3
            return base + ".context" * context + ".dropout" * middle

        return tuple(kind(block, base) for block, base in enumerate(super().kinds))

    @nn.nowrap
    def make_block(self, kind: str, *, train: bool):
        context = self.in_context_tokens if ".context" in kind else 0
        dropout = self.dropout if train and ".dropout" in kind else 0.0
        return super().make_block(kind, train=train, context=context, dropout=dropout)

    @nn.compact
    def __call__(self, x, t, cond, train: bool, capture: tuple[int, ...] = ()):
        """See `Model`. The routers use `train`, and it turns dropout on.

        Dropout draws from the random stream "dropout". Features are tokens [B, S, D]; those of
        blocks with class tokens begin with them.
        """
        width, dtype, label = self.hidden_size, self.dtype, cond["label"]
        embed = BottleneckPatchEmbed(self.bottleneck, width, dtype, name="patch_embed")
        x = embed(blocks.patchify(x, self.patch_size))
        x += jnp.asarray(blocks.sincos_table(self.grid, width), dtype)
        embedded = blocks.LabelEmbed(self.num_classes, width, name="label_embed")(label)
        time = blocks.time_features(t * self.time_scale)
        c = blocks.VectorEmbed(width, dtype, name="time_embed")(time) + embedded

        layers, is_null = self.layers(train), label == self.num_classes
        first = self.in_context_start if self.in_context_tokens else 0
        x, early = layers(x, c, is_null, capture=capture, stop=first)
        x = x.astype(self.residual_dtype)
        if self.in_context_tokens:
            x = jnp.concatenate([self._in_context(embedded).astype(x.dtype), x], axis=1)
        x, late = layers(x, c, is_null, capture=capture, start=first)
        x = self.to_image(x[:, self.in_context_tokens :], c, self.norm)
        return (x, early | late) if capture else x

    def _in_context(self, embedded):
        """Class embedding f32[B, D] -> class tokens f32[B, in_context_tokens, D]."""
        init, shape = nn.initializers.normal(0.02), (self.in_context_tokens, self.hidden_size)
        positions = blocks.parameter(self, "in_context_embed", init, (None, "embed"), shape)
        return embedded[:, None] + positions


def build(config: ConfigDict, losses: tuple[str, ...]) -> JiT:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio) * 2 // 3
    return JiT(**transformer(config, losses, width, config.depth), **config.jit.to_dict())
