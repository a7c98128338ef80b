"""What DiT and JiT share: both are transformers on patches of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.conditions import Field
from moe_diffusion.models.adaln import activated, modulation
from moe_diffusion.models.blocks import (
    Attention,
    CrossAttention,
    Dtype,
    FinalLayer,
    Norm,
    unpatchify,
)
from moe_diffusion.models.mixture_of_blocks import Mixture, make_layer
from moe_diffusion.models.stack import Model, Stack
from moe_diffusion.moe.router import Router


class TransformerBlock(nn.Module):
    """adaLN-Zero block: x += gate * attention(norm(x)); x += gate * ffn(norm(x)), in x's dtype.

    With a text, x += cross(norm(x), text) stands between the two.

    Attributes:
      make_cross: makes a `CrossAttention`; None: there is no text.
      make_ffn: makes an `MLP`, or a layer of experts (moe/layer.py).
      make_modulation: makes the layer from `adaln.activated` to 6 values per channel.
      train: passed on to the layer of experts.
    """

    norm: str
    make_attention: Callable[..., Attention]
    make_ffn: Callable[..., nn.Module]
    make_modulation: Callable[..., nn.Module]
    train: bool
    dtype: Dtype
    make_cross: Callable[..., CrossAttention] | None = None

    @nn.compact
    def __call__(self, x, c, is_null, *text):
        """x [B, S, D], condition c (adaln.py), is_null bool[B] -> [B, S, D].

        text: [B, L, D], and bool[B, L], which of its tokens are seen.
        """
        adaln = self.make_modulation(6, "adaLN")(activated(c))
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.split(adaln, 6, axis=-1)
        h = Norm(self.norm, name="norm1")(x, (shift_a, scale_a)).astype(self.dtype)
        x += (gate_a[:, None] * self.make_attention(name="attn")(h)).astype(x.dtype)
        if self.make_cross:
            h = Norm(self.norm, name="norm_cross")(x).astype(self.dtype)
            x += self.make_cross(name="cross")(h, *text).astype(x.dtype)
        h = Norm(self.norm, name="norm2")(x, (shift_f, scale_f)).astype(self.dtype)
        return x + (gate_f[:, None] * self.make_ffn()(h, is_null, self.train)).astype(x.dtype)


class PatchTransformer(Model):
    """The base class of DiT and JiT: fields, condition and layers. `models.build` fills the fields.

    Attributes:
      input_shape: (H, W, C) of the input, pixels or latents; H and W are multiples of patch_size.
      num_classes: cond is {"label": i32[B]}, and label num_classes stands for "no label".
      learn_sigma: twice the channels come out; a flow uses the first half.
      positions: `sincos` (fixed table), or one of `blocks.ROPES`.
      time_scale: multiplies t before its embedding.
      residual_dtype: of the stream that the blocks add to; inside a block all is `dtype`.
      adaln_rank, adaln_shared: see `adaln.modulation`.
      mixture: which blocks are grouped, see mixture_of_blocks.py.
      moe_pattern: for each block, whether it has experts.
      remat, unroll: see `Stack`.
      attention: None, or one of kernels/attention.py.
    """

    input_shape: tuple[int, int, int]
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
    residual_dtype: jnp.dtype
    adaln_rank: int
    adaln_shared: bool
    mixture: Mixture
    moe_pattern: tuple[bool, ...]
    make_mlp: Callable[..., nn.Module]
    make_moe: Callable[..., nn.Module] | None
    remat: str
    unroll: int
    attention: str | None

    embedders = ("patch_embed", "time_embed", "label_embed", "in_context_embed")
    parts = {"final": "final layer", "adaLN_down": "adaLN"} | dict.fromkeys(embedders, "embedders")
    layer_parts = {"attn": "attention", "mlp": "dense ffn", "adaLN": "adaLN", "router": "router"}
    layer_parts |= {"experts": "routed experts", "shared": "shared experts"}
    layer_parts |= {"block_router": "router"}
    layer_parts |= {"norm1": "norms", "norm2": "norms", "predictor": "capacity predictor"}
    layer_parts |= {"cross": "cross-attention", "norm_cross": "norms"}
    reads_text = False  # whether every block has cross-attention

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width, _ = self.input_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every block: "moe" or "dense"."""
        return tuple("moe" if is_moe else "dense" for is_moe in self.moe_pattern)

    @nn.nowrap
    def layers(self, train: bool) -> Stack:
        """The stack of blocks. `train` is passed to the routers and turns dropout on."""
        make = partial(make_layer, self.make_block, self.mixture, 0, train)
        return Stack(self.mixture.grouped(self.kinds), make, self.remat, self.unroll)

    @property
    def stack(self) -> Stack:
        return self.layers(train=False)

    @nn.nowrap
    def make_block(self, kind: str, *, train: bool, context: int = 0, dropout: float = 0.0):
        """Factory of the blocks of a kind: (name=...) -> `TransformerBlock`.

        Args:
          context: number of tokens before those of the image.
          dropout: of attention and dense MLPs.
        """
        names = ("num_heads", "num_kv_heads", "qk_norm", "qk_norm_kind", "qk_norm_eps", "positions")
        options = {name: getattr(self, name) for name in (*names, "grid", "dtype")}
        options |= {"context": context, "dropout": dropout, "implementation": self.attention}
        ffn = self.make_moe if kind.startswith("moe") else partial(self.make_mlp, dropout=dropout)
        make_attention = partial(Attention, **options)
        sizes = (self.hidden_size, self.adaln_rank, self.adaln_shared, self.dtype)
        layers = (make_attention, ffn, partial(modulation, *sizes))
        cross = partial(CrossAttention, **options) if self.reads_text else None
        return partial(TransformerBlock, self.norm, *layers, train, self.dtype, cross)

    @nn.nowrap
    def to_image(self, tokens: jax.Array, c: jax.Array, norm: str = "layernorm") -> jax.Array:
        """Tokens [B, S, D], condition [B, D] -> f32[B, H, W, C or 2C]; for use in `__call__`."""
        features = self.patch_size**2 * self.input_shape[-1] * (2 if self.learn_sigma else 1)
        x = FinalLayer(features, self.dtype, norm, name="final")(tokens, c)
        return unpatchify(x.astype(jnp.float32), self.patch_size, self.grid)

    def cond_spec(self) -> dict[str, Field]:
        return {"label": Field((), "int32", self.num_classes)}

    def null(self, cond: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"label": jnp.full_like(cond["label"], self.num_classes)}

    def routers(self) -> dict[str, Router]:
        found = {}
        for path in dict.fromkeys(b.path for b in self.blocks() if b.kind.startswith("moe")):
            found |= self.make_moe().routers(f"{path}/moe")
        return found
