"""A small text encoder that is trained with its model, in the place of FLUX.1's CLIP and T5."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.models.blocks import Dtype, Norm, linear, parameter
from moe_diffusion.models.text import TextAttention, TextBlock, TextMLP

DEPTH, HEADS = 2, 4


class WordEncoder(nn.Module):
    """Tokens of a `Vocabulary`, i32[B, L] -> {"text": f32[B, L, D], "pooled": f32[B, P]}.

    A pre-norm transformer of `DEPTH` blocks over words and their places. All positions are seen,
    empty ones too, as FLUX.1 sees the padding of T5. `pooled` is a linear layer of their mean.

    Attributes:
      vocab_size: numbers of the vocabulary.
      width: D, a multiple of `HEADS`.
      pooled_width: P; 0 leaves out the field.
    """

    vocab_size: int
    width: int
    pooled_width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> dict[str, jax.Array]:
        init, options = nn.initializers.normal(0.5), {"use_bias": True, "dtype": self.dtype}

        def table(name: str, rows: int) -> jax.Array:
            return parameter(self, name, init, (None, "embed"), (rows, self.width))

        x = jnp.take(table("tokens", self.vocab_size), tokens, axis=0, mode="clip")
        x = (x + table("positions", tokens.shape[1])).astype(jnp.float32)
        make_norm, head_dim = partial(Norm, "layernorm_affine"), self.width // HEADS
        for number in range(DEPTH):
            block = TextBlock(
                make_norm,
                partial(TextAttention, HEADS, head_dim, head_dim**-0.5, **options),
                partial(TextMLP, 4 * self.width, "gelu_tanh", False, **options),
                self.dtype,
                name=f"block_{number}",
            )
            x = block(x, jnp.float32(0))
        x = make_norm(name="final_norm")(x)
        if not self.pooled_width:
            return {"text": x}
        make = partial(linear, self.pooled_width, ("embed", None), dtype=self.dtype)
        return {"text": x, "pooled": make(name="pooled")(x.mean(1))}
