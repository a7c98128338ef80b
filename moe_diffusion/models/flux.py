"""FLUX.1 (github.com/black-forest-labs/flux): a transformer on tokens of a text and of a latent.

First come blocks with two streams, text and image, which have weights of their own and attend to
both (`double`). Then both are one sequence, the text first, in blocks whose attention and MLP run
side by side (`single`). A vector of time, pooled text and guidance scale modulates every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion import empty_prompt
from moe_diffusion.checks import check_values, divides, require
from moe_diffusion.conditions import Field
from moe_diffusion.models import mixture_of_blocks
from moe_diffusion.models.adaln import compressed, modulation
from moe_diffusion.models.blocks import (
    Dtype,
    FinalLayer,
    VectorEmbed,
    linear,
    patchify,
    time_features,
    unpatchify,
)
from moe_diffusion.models.flux_blocks import (
    Block,
    DoubleBlock,
    JointAttention,
    SingleBlock,
    StreamAttention,
)
from moe_diffusion.models.mixture_of_blocks import Mixture, make_layer
from moe_diffusion.models.parts import pattern_of, transformer
from moe_diffusion.models.stack import Model, Stack
from moe_diffusion.models.words import HEADS, WordEncoder
from moe_diffusion.moe.router import Router
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES

FIELDS = {
    "single_depth": (38, "blocks of one stream; model.depth counts those of two"),
    # Of heads of 64 channels; FLUX.1 has 128 and 16, 56, 56.
    "rope_axes": ((8, 28, 28), "channels of a head that turn with 0, the row and the column"),
    "text_tokens": (512, "tokens of a prompt, padding included; nothing is masked"),
    "text_width": (4096, "width of the text encoder's tokens (T5-XXL)"),
    "text_dtype": ("float32", "in which they come: float32 | bfloat16"),
    "pooled_width": (768, "width of the pooled text (CLIP-L)"),
    "guidance": (True, "embeds a guidance scale (FLUX.1 [dev]); false: none (FLUX.1 [schnell])"),
    # One of vocabulary.py. It takes the tokens of prompts and learns to encode them (words.py).
    "vocabulary": ("", "words that it reads itself; empty: it takes text and pooled text"),
}
PATCH = 2  # the latent's pixels are packed 2 x 2


def check(config: ConfigDict) -> None:
    """Raises a UserError for values of the section `model` that this architecture cannot have."""
    flux, head_dim = config.flux, config.hidden_size // config.num_heads
    check_values(
        flux,
        "model.flux.",
        choices={"text_dtype": ("float32", "bfloat16"), "vocabulary": ("", *VOCABULARIES)},
        positive=("single_depth", "text_tokens", "text_width", "pooled_width"),
    )
    axes = tuple(flux.rope_axes)
    require(
        len(axes) == 3 and sum(axes) == head_dim and all(n > 0 and n % 2 == 0 for n in axes),
        f"model.flux.rope_axes = {axes} must be three positive even numbers whose sum is "
        f"model.hidden_size / model.num_heads = {head_dim}: change them or the width of a head",
    )
    if flux.vocabulary:
        divides("heads of words.py", HEADS, "model.flux.text_width", flux.text_width)
    needed = {"patch_size": PATCH, "learn_sigma": False, "num_kv_heads": 0, "norm": "layernorm"}
    needed |= {"qk_norm_kind": "rmsnorm"}
    for key, value in needed.items():
        section, _, name = key.rpartition(".")
        found = (config[section] if section else config)[name]
        require(
            found == value,
            f"model.{key} = {found}, and model.architecture = flux has no other than {value}: set "
            f"model.{key}={value}",
        )
    pattern = pattern_of(config, num_blocks(config))
    mixture_of_blocks.check(config.mob, _kinds(config.depth, pattern))


def num_blocks(config: ConfigDict) -> int:
    """Blocks of two streams and of one."""
    return config.depth + config.flux.single_depth


def _kinds(depth: int, moe_pattern: Sequence[bool]) -> tuple[str, ...]:
    """The kind of every block: single or double, and whether with experts."""
    streams = ("double",) * depth + ("single",) * (len(moe_pattern) - depth)
    pairs = zip(streams, moe_pattern, strict=True)
    return tuple(f"{kind}_moe" if is_moe else kind for kind, is_moe in pairs)


class Flux(Model):
    """Noisy latent, time and prompt -> velocity. `models.build` fills the fields.

    The network's own time runs from data (0) to noise (1) and its velocity is noise - data, so it
    sees time_scale * (1 - t) and the sign of its output is changed. The condition is

      text [B, text_tokens, text_width]: what the text encoder returns, padding included;
      pooled f32[B, pooled_width]: one vector of the whole text;
      guidance f32[B], if the model was distilled with it: the guidance scale itself, 3.5 say;
      tokens i32[B, text_tokens] in place of text and pooled, if it has a vocabulary.

    Attributes:
      input_shape: (H, W, C) of the latent; H and W are even.
      depth, single_depth: numbers of blocks of two streams and of one.
      rope_axes: see `rope_angles`.
      text_tokens, text_width, text_dtype, pooled_width, guidance, vocabulary: of the condition.
      time_scale: multiplies 1 - t and the guidance scale before their embeddings.
      residual_dtype: of the streams that the blocks add to; inside a block all is `dtype`.
      moe_pattern: for each block, whether experts take the place of its MLPs; double ones first.
      make_mlp, make_moe: make an MLP and a layer of experts. In a single block the last layer of an
        MLP or shared expert has no bias: that of the attention, to which it is added, serves both.
      adaln_rank, adaln_shared: see `adaln.modulation`.
      mixture: which blocks are grouped, see mixture_of_blocks.py.
      remat, unroll: see `Stack`.
      attention: None, or one of kernels/attention.py.
      empty: the empty prompt, which `null` puts in; None puts in zeros.
    """

    input_shape: tuple[int, int, int]
    hidden_size: int
    num_heads: int
    depth: int
    single_depth: int
    rope_axes: tuple[int, ...]
    text_tokens: int
    text_width: int
    text_dtype: str
    pooled_width: int
    guidance: bool
    vocabulary: str
    qk_norm_eps: float
    time_scale: float
    residual_dtype: Dtype
    moe_pattern: tuple[bool, ...]
    make_mlp: Callable[..., nn.Module]
    make_moe: Callable[..., nn.Module] | None
    adaln_rank: int
    adaln_shared: bool
    mixture: Mixture
    remat: str
    unroll: int
    attention: str | None
    empty: empty_prompt.EmptyPrompt | None = None

    parts = {"final": "final layer", "words": "text encoder", "adaLN_down": "adaLN"}
    parts |= dict.fromkeys(
        (f"{name}_embed" for name in ("patch", "text", "time", "pooled", "guidance")), "embedders"
    )
    layer_parts = {
        f"{stream}{name}": kind
        for stream in ("", "image_", "text_")
        for name, kind in (("attn", "attention"), ("mlp", "dense ffn"), ("adaLN", "adaLN"))
    }
    layer_parts |= {"experts": "routed experts", "shared": "shared experts", "router": "router"}
    layer_parts |= {"block_router": "router", "predictor": "capacity predictor"}

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens."""
        height, width, _ = self.input_shape
        return height // PATCH, width // PATCH

    @nn.nowrap
    def layers(self, train: bool) -> Stack:
        """The stack of blocks; `train` is passed to layers in the place of MLPs."""
        kinds = _kinds(self.depth, self.moe_pattern)
        # Of the tokens of one stream the first are those of the text.
        make = partial(make_layer, self.make_block, self.mixture, self.text_tokens, train)
        return Stack(self.mixture.grouped(kinds), make, self.remat, self.unroll)

    @property
    def stack(self) -> Stack:
        return self.layers(train=False)

    @nn.nowrap
    def make_block(self, kind: str, *, train: bool) -> Callable[..., Block]:
        """Factory of the blocks of a kind: (name=...) -> `Block`."""
        sizes = (self.hidden_size, self.num_heads, self.qk_norm_eps, self.dtype)
        single, ffn_name = kind.startswith("single"), "moe" if kind.endswith("moe") else "mlp"
        make_ffn = self.make_moe if ffn_name == "moe" else self.make_mlp
        return partial(
            SingleBlock if single else DoubleBlock,
            partial(StreamAttention, *sizes),
            partial(make_ffn, down_bias=not single),
            partial(modulation, self.hidden_size, self.adaln_rank, self.adaln_shared, self.dtype),
            partial(JointAttention, self.grid, self.rope_axes, self.attention),
            ffn_name,
            train,
            self.dtype,
        )

    @nn.compact
    def __call__(self, x, t, cond, train: bool, capture: tuple[int, ...] = ()):
        """See `Model`. Features of a double block are (image [B, S, D], text [B, L, D]), those of a
        single block tokens [B, L + S, D], the text first."""
        width, dtype, patches = self.hidden_size, self.dtype, patchify(x, PATCH)
        embed = partial(linear, width, (None, "embed"), dtype=dtype)
        if self.vocabulary:
            sizes = len(VOCABULARIES[self.vocabulary]), self.text_width, self.pooled_width
            cond = {**cond, **WordEncoder(*sizes, dtype, name="words")(cond[TOKENS])}
        image = embed(name="patch_embed")(patches).astype(self.residual_dtype)
        text = embed(name="text_embed")(cond["text"]).astype(self.residual_dtype)
        numbers = {"time": 1 - t} | ({"guidance": cond["guidance"]} if self.guidance else {})
        vectors = {name: time_features(self.time_scale * n) for name, n in numbers.items()}
        vectors["pooled"] = cond["pooled"]
        c = sum(VectorEmbed(width, dtype, name=f"{name}_embed")(v) for name, v in vectors.items())

        cond = compressed(c, self.adaln_rank, dtype) if self.adaln_shared else c
        layers = self.layers(train)
        doubles = layers.number_of(self.depth)
        (image, text), early = layers((image, text), cond, capture=capture, stop=doubles)
        tokens = jnp.concatenate([text, image], axis=1)
        tokens, late = layers(tokens, cond, capture=capture, start=doubles)
        final = FinalLayer(patches.shape[-1], dtype, name="final")(tokens[:, text.shape[1] :], c)
        velocity = -unpatchify(final.astype(jnp.float32), PATCH, self.grid)
        return (velocity, early | late) if capture else velocity

    def cond_spec(self) -> dict[str, Field]:
        prompt = {
            "text": Field((self.text_tokens, self.text_width), self.text_dtype),
            "pooled": Field((self.pooled_width,), "float32"),
        }
        if self.vocabulary:
            words = len(VOCABULARIES[self.vocabulary])
            prompt = {TOKENS: Field((self.text_tokens,), "int32", words)}
        return prompt | ({"guidance": Field((), "float32")} if self.guidance else {})

    def null(self, cond: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The empty prompt, or no word; the guidance scale stays what it is."""
        return empty_prompt.null(cond, self.empty)

    def routers(self) -> dict[str, Router]:
        streams = {"double": ("image_", "text_"), "single": ("",)}
        found = {}
        for block in self.blocks():
            stream, _, ffn = block.kind.partition("_")
            for name in streams[stream] if ffn else ():
                found |= self.make_moe().routers(f"{block.path}/{name}moe")
        return found


def build(config: ConfigDict, losses: tuple[str, ...]) -> Flux:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio)
    shared = transformer(config, losses, width, num_blocks(config))
    names = ("input_shape", "hidden_size", "num_heads", "qk_norm_eps", "time_scale", "make_mlp")
    names += ("remat", "unroll", "attention", "dtype", "residual_dtype", "param_dtype", "make_moe")
    names += ("moe_pattern", "adaln_rank", "adaln_shared", "mixture")
    fields = {name: shared[name] for name in names} | config.flux.to_dict()
    return Flux(**fields, depth=config.depth)
