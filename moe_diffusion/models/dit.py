"""DiT: one class for DiT, SiT, TC-DiT, EC-DiT, DiffMoE, DSMoE, DiT-MoE and ProMoE.

All of them are class-conditional transformers on patches of an image or a latent (2212.09748). In
some blocks, experts take the place of the MLP. The models differ only in their config. dit_t2i.py
has one for texts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.models import adaln, blocks, mixture_of_blocks
from moe_diffusion.models.parts import pattern_of, transformer
from moe_diffusion.models.patches import PatchTransformer

FIELDS = {"reverse_time": (False, "the network's own time is 1 - t, its velocity noise - data")}


def check(config: ConfigDict) -> None:
    """Raises a UserError for values of the section `model` that this architecture cannot have."""
    names = ("dense", "moe")
    kinds = [names[is_moe] for is_moe in pattern_of(config, config.depth)]
    mixture_of_blocks.check(config.mob, kinds)


class DiT(PatchTransformer):
    """Noisy image, time and label -> prediction; most fields are those of `PatchTransformer`.

    Attributes:
      reverse_time: the network's own time runs from data (0) to noise (1), and its own velocity is
        noise - data. So it sees time_scale * (1 - t), and the sign of its velocity is changed. The
        second half of the channels (learn_sigma) keeps its sign.
    """

    reverse_time: bool

    @nn.compact
    def __call__(self, x, t, cond, train: bool, capture: tuple[int, ...] = ()):
        """See `Model`. Only the routers use `train`; features are tokens [B, S, D]."""
        width, dtype = self.hidden_size, self.dtype
        embed = blocks.linear(width, (None, "embed"), name="patch_embed", dtype=dtype)
        x = embed(blocks.patchify(x, self.patch_size)).astype(self.residual_dtype)
        if self.positions == "sincos":
            x += jnp.asarray(blocks.sincos_table(self.grid, width), x.dtype)
        time = (1 - t if self.reverse_time else t) * self.time_scale
        c = blocks.VectorEmbed(width, dtype, name="time_embed")(blocks.time_features(time))
        of_cond, *seen_by_blocks = self.condition(cond)
        c += of_cond
        modulating = adaln.compressed(c, self.adaln_rank, dtype) if self.adaln_shared else c
        x, features = self.layers(train)(x, modulating, *seen_by_blocks, capture=capture)
        x = self.to_image(x, c)
        if self.reverse_time:
            channels = self.input_shape[-1]
            x = jnp.concatenate([-x[..., :channels], x[..., channels:]], axis=-1)
        return (x, features) if capture else x

    @nn.nowrap
    def condition(self, cond: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        """What `__call__` adds to the time [B, D], is_null bool[B], and more for the blocks."""
        label = cond["label"]
        embed = blocks.LabelEmbed(self.num_classes, self.hidden_size, name="label_embed")
        return embed(label), label == self.num_classes


def build(config: ConfigDict, losses: tuple[str, ...]) -> DiT:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio)
    return DiT(
        **transformer(config, losses, width, config.depth), reverse_time=config.dit.reverse_time
    )
