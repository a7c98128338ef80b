"""An architecture outside the package: a small model of images that are described by words.

Its condition is the features of a text [L, D], a mask of them and a number. Its layers are of three
kinds, whose carry is two streams of tokens, and two kinds have experts, with a router each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.checks import check_values
from moe_diffusion.conditions import Field
from moe_diffusion.models.blocks import (
    FinalLayer,
    Norm,
    VectorEmbed,
    linear,
    patchify,
    time_features,
    unpatchify,
)
from moe_diffusion.models.parts import make_mlp, make_moe
from moe_diffusion.models.stack import Model, Stack
from moe_diffusion.moe.routers.expert_race import ExpertRace

FIELDS = {
    "text_length": (5, "words of a text"),
    "text_width": (3, "numbers that stand for a word"),
}


def check(config):
    check_values(config.texty, "model.texty.", positive=("text_length", "text_width"))


class Reading(nn.Module):
    """Image tokens [B, S, D] look at the words [B, L, D] that a mask bool[B, L] shows."""

    @nn.compact
    def __call__(self, image, words, mask):
        width = image.shape[-1]
        make = partial(linear, width, ("embed", "heads"), dtype=image.dtype)
        query, key, value = make(name="q")(image), make(name="k")(words), make(name="v")(words)
        scores = jnp.einsum("bsd,bld->bsl", query, key) / width**0.5
        scores = jnp.where(mask[:, None], scores, -1e9)
        return jnp.einsum("bsl,bld->bsd", jax.nn.softmax(scores), value)


class Layer(nn.Module):
    """The image reads the text, the text changes, and the image passes a network or experts."""

    make_ffn: Any
    train: bool

    @nn.compact
    def __call__(self, carry, c, mask, is_null):
        image, words = carry["image"], carry["words"]
        image += Reading(name="attn")(image, words, mask)
        words += linear(words.shape[-1], ("embed", None), name="words", dtype=words.dtype)(words)
        image += self.make_ffn()(Norm()(image + c[:, None]), is_null, self.train)
        return {"image": image, "words": words}


class Texty(Model):
    input_shape: tuple[int, int, int]
    patch_size: int
    width: int
    text_length: int
    text_width: int
    kinds: tuple[str, ...]
    makers: tuple[Any, ...]  # of what stands in the layers "dense", "choice" and "race"
    # "words_embed" and the layers' "words" are left out: whoever asks must live with that.
    parts = {"image_embed": "embedders", "time_embed": "embedders", "final": "final layer"}
    layer_parts = {
        "attn": "attention",
        "mlp": "dense ffn",
        "router": "router",
        "experts": "routed experts",
    }

    def cond_spec(self):
        return {
            "text": Field((self.text_length, self.text_width), "float32"),
            "text_mask": Field((self.text_length,), "bool"),
            "guidance": Field((), "float32"),
        }

    def null(self, cond):
        """No word; the number stays what it is."""
        empty = {name: jnp.zeros_like(cond[name]) for name in ("text", "text_mask")}
        return {**cond, **empty}

    @nn.nowrap
    def maker(self, kind):
        return self.makers[("dense", "choice", "race").index(kind)]

    @nn.nowrap
    def layers(self, train):
        return Stack(self.kinds, lambda kind: partial(Layer, self.maker(kind), train), unroll=1)

    @property
    def stack(self):
        return self.layers(False)

    def routers(self):
        return {
            f"{block.path}/moe/router": self.maker(block.kind)().make_router()
            for block in self.blocks()
            if block.kind != "dense"
        }

    @nn.compact
    def __call__(self, x, t, cond, train, capture=()):
        height, width, channels = self.input_shape
        grid, features = (height // self.patch_size, width // self.patch_size), self.width
        image = linear(features, (None, "embed"), name="image_embed", dtype=jnp.float32)(
            patchify(x.astype(jnp.float32), self.patch_size)
        )
        words = linear(features, (None, "embed"), name="words_embed", dtype=jnp.float32)(
            cond["text"]
        )
        embed = partial(VectorEmbed, features, jnp.float32)
        c = embed(name="time_embed")(time_features(t))
        c += embed(name="guidance_embed")(time_features(cond["guidance"]))
        mask = cond["text_mask"]
        carry = {"image": image, "words": words}
        layers = self.layers(train)
        carry, captured = layers(carry, c, mask, ~mask.any(-1), capture=capture)
        out = FinalLayer(self.patch_size**2 * channels, jnp.float32, name="final")(
            carry["image"], c
        )
        out = unpatchify(out, self.patch_size, grid)
        return (out, captured) if capture else out


def build(config, losses):
    choice = make_moe(config, losses)
    race = partial(choice, make_router=partial(ExpertRace, config.moe.num_experts), group="sample")
    return Texty(
        input_shape=(config.image_size, config.image_width, config.channels),
        patch_size=config.patch_size,
        width=config.hidden_size,
        text_length=config.texty.text_length,
        text_width=config.texty.text_width,
        kinds=("dense", "choice", "race") * (config.depth // 3),
        makers=(make_mlp(config, 2 * config.hidden_size), choice, race),
        param_dtype=jnp.dtype(config.param_dtype),
    )
