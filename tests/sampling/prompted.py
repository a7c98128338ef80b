"""A tiny model on images that are no squares, with a condition that is no label, and its data."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion.conditions import Field
from moe_diffusion.models.stack import Model

SHAPE, TOKENS, WIDTH = (4, 8, 3), 3, 5


class Prompted(Model):
    """Velocity = scale * mean of the tokens that count + strength, everywhere in the image."""

    input_shape = SHAPE

    @nn.compact
    def __call__(self, x, t, cond, train, capture=()):
        scale = self.param("scale", nn.initializers.ones, ())
        tokens = jnp.where(cond["text_mask"], cond["text"].mean(-1), 0)
        text = tokens.sum(-1) / jnp.maximum(cond["text_mask"].sum(-1), 1)
        velocity = scale * text + cond["strength"]
        return jnp.broadcast_to(velocity[:, None, None, None], x.shape)

    @nn.nowrap
    def cond_spec(self):
        return {
            "text": Field((TOKENS, WIDTH), "float32"),
            "text_mask": Field((TOKENS,), "bool"),
            "strength": Field((), "float32"),
            "style": Field((), "int32", 4),
        }

    @nn.nowrap
    def null(self, cond):
        return cond | {"text_mask": jnp.zeros_like(cond["text_mask"])}


class Prompts:
    """Record i: tokens of value i, of which the first i % 3 + 1 count, and strength i / 100."""

    image_shape = SHAPE

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return {
            "image": np.full(SHAPE, i / 50 - 1, np.float32),
            "text": np.full((TOKENS, WIDTH), i, np.float32),
            "text_mask": np.arange(TOKENS) <= i % 3,
            "strength": np.float32(i / 100),
            "style": np.int32(3),
        }
