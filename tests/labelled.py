"""The base of toy models that take a label."""

import jax.numpy as jnp

from moe_diffusion.conditions import Field
from moe_diffusion.models.stack import Model


class Labelled(Model):
    """A class-conditional model; a subclass has the field num_classes."""

    def cond_spec(self):
        return {"label": Field((), "int32", self.num_classes)}

    def null(self, cond):
        return {"label": jnp.full_like(cond["label"], self.num_classes)}
