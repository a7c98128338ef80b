"""FLUX.1 (github.com/black-forest-labs/flux): a transformer on tokens of a text and of a latent.

First come blocks with two streams, text and image, which have weights of their own and attend to
both (`double`). Then both are one sequence, the text first, in blocks whose attention and MLP run
side by side (`single`). A vector of time, pooled text and guidance scale modulates every block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.checks import check_values, divides, require
from moe_diffusion.conditions import Field
from moe_diffusion.kernels.attention import attend
from moe_diffusion.models.blocks import (
    ZEROS,
    Dtype,
    FinalLayer,
    Norm,
    VectorEmbed,
    linear,
    patchify,
    rotate,
    time_features,
    unpatchify,
)
from moe_diffusion.models.parts import transformer
from moe_diffusion.models.stack import Model, Stack
from moe_diffusion.models.words import HEADS, WordEncoder
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
    needed |= {"router.name": "dense", "qk_norm_kind": "rmsnorm"}
    for key, value in needed.items():
        section, _, name = key.rpartition(".")
        found = (config[section] if section else config)[name]
        require(
            found == value,
            f"model.{key} = {found}, and model.architecture = flux has no other than {value}: set "
            f"model.{key}={value}",
        )


def rope_angles(grid: tuple[int, int], tokens: int, axes: tuple[int, ...]) -> np.ndarray:
    """Rotation angles f32[tokens, head_dim / 2] of the text's tokens, then the image's.

    An image token has the position (0, row, column), a text token (0, 0, 0). In every head axes[i]
    channels turn with number i of the position, pair j of them with the frequency
    10000^(-2 j / axes[i]).
    """
    positions = np.zeros((tokens, len(axes)))
    positions[tokens - grid[0] * grid[1] :, 1:] = np.indices(grid).reshape(2, -1).T
    frequencies = [10000.0 ** (-np.arange(0, size, 2) / size) for size in axes]
    angles = map(np.outer, positions.T, frequencies)
    return np.concatenate([*angles], axis=1).astype(np.float32)


class JointAttention(nn.Module):
    """Attention of all tokens to all, without weights: q, k, v [B, heads, L + S, d] -> the same.

    The text's L tokens stand before the S of the image. q and k are turned in f32.
    """

    grid: tuple[int, int]
    axes: tuple[int, ...]
    implementation: str | None

    def __call__(self, q, k, v):
        angles = rope_angles(self.grid, q.shape[2], self.axes)[:, None]
        turn = partial(rotate, angles=angles, interleaved=True)
        q, k = (turn(x.astype(jnp.float32)).astype(x.dtype) for x in (q, k))
        return attend(q, k, v, self.implementation)


class StreamAttention(nn.Module):
    """The weights of one stream's attention: `heads` stands before the attention, `out` behind."""

    width: int
    num_heads: int
    qk_norm_eps: float
    dtype: Dtype

    def setup(self):
        shape, axes = (
            (3, self.num_heads, self.width // self.num_heads),
            ("embed", None, "heads", None),
        )
        self.qkv = linear(shape, axes, dtype=self.dtype)
        self.q_norm = Norm("rmsnorm", self.qk_norm_eps)
        self.k_norm = Norm("rmsnorm", self.qk_norm_eps)
        self.proj = linear(self.width, ("heads", None, "embed"), dtype=self.dtype, contract=2)

    def heads(self, x):
        """[B, S, D] -> q, k, v [B, heads, S, d], of which q and k are normalised."""
        qkv = self.qkv(x).transpose(2, 0, 3, 1, 4)
        q, k, v = (part[0] for part in jax.lax.split(qkv, (1, 1, 1)))
        return self.q_norm(q), self.k_norm(k), v

    def out(self, x):
        """[B, heads, S, d] -> [B, S, D]."""
        return self.proj(x.swapaxes(1, 2))


class Block(nn.Module):
    """What both kinds of blocks are made of; each factory takes the name of what it makes.

    Attributes:
      make_attention: makes a `StreamAttention`.
      make_ffn: makes an MLP, or a layer that takes its place: (x, is_null, train) -> x.
      make_modulation: (number of values per channel, name) -> a layer from [B, D] to them.
      attention: makes a `JointAttention`.
      train: passed on to the layer in an MLP's place.
    """

    make_attention: Callable[..., nn.Module]
    make_ffn: Callable[..., nn.Module]
    make_modulation: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    train: bool
    dtype: Dtype

    def modulations(self, c, number, name):
        """c [B, D] -> `number` times [B, D]."""
        return jnp.split(self.make_modulation(number, name=name)(nn.silu(c)), number, axis=-1)

    def norm(self, x, shift, scale, name):
        return Norm(name=name)(x, (shift, scale)).astype(self.dtype)

    def ffn(self, x, name):
        # No sample lacks its condition here: `null` leaves a text of zeros.
        return self.make_ffn(name=name)(x, jnp.zeros(len(x), bool), self.train)


class DoubleBlock(Block):
    """(image [B, S, D], text [B, L, D]), c [B, D] -> the same two.

    Of each stream: x += gate * attention(norm(x)); x += gate * ffn(norm(x)), in x's dtype.
    """

    @nn.compact
    def __call__(self, carry, c):
        streams = dict(zip(("image", "text"), carry, strict=True))
        attentions, modulations, heads = {}, {}, {}
        for name, x in streams.items():
            attentions[name] = self.make_attention(name=f"{name}_attn")
            modulations[name] = self.modulations(c, 6, f"{name}_adaLN")
            h = self.norm(x, *modulations[name][:2], f"{name}_norm1")
            heads[name] = attentions[name].heads(h)
        pairs = zip(heads["text"], heads["image"], strict=True)
        joined = self.attention(name="attend")(*(jnp.concatenate(pair, axis=2) for pair in pairs))
        attended = dict(
            zip(("text", "image"), jnp.split(joined, [carry[1].shape[1]], 2), strict=True)
        )
        for name, x in streams.items():
            gate, shift, scale, gate_ffn = modulations[name][2:]
            x += (gate[:, None] * attentions[name].out(attended[name])).astype(x.dtype)
            h = self.norm(x, shift, scale, f"{name}_norm2")
            streams[name] = x + (gate_ffn[:, None] * self.ffn(h, f"{name}_mlp")).astype(x.dtype)
        return streams["image"], streams["text"]


class SingleBlock(Block):
    """x [B, L + S, D], c [B, D] -> x + gate * (attention(h) + ffn(h)), where h = norm(x)."""

    @nn.compact
    def __call__(self, x, c):
        shift, scale, gate = self.modulations(c, 3, "adaLN")
        h = self.norm(x, shift, scale, "norm")
        attention = self.make_attention(name="attn")
        out = attention.out(self.attention(name="attend")(*attention.heads(h)))
        return x + (gate[:, None] * (out + self.ffn(h, "mlp"))).astype(x.dtype)


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
      make_mlp: makes an MLP. In a single block its last layer has no bias: that of the attention,
        to which it is added, serves both.
      remat, unroll: see `Stack`.
      attention: None, or one of kernels/attention.py.
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
    make_mlp: Callable[..., nn.Module]
    remat: str
    unroll: int
    attention: str | None

    parts = {"final": "final layer", "words": "text encoder"} | dict.fromkeys(
        (f"{name}_embed" for name in ("patch", "text", "time", "pooled", "guidance")), "embedders"
    )
    layer_parts = {
        f"{stream}{name}": kind
        for stream in ("", "image_", "text_")
        for name, kind in (("attn", "attention"), ("mlp", "dense ffn"), ("adaLN", "adaLN"))
    }

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens."""
        height, width, _ = self.input_shape
        return height // PATCH, width // PATCH

    @nn.nowrap
    def layers(self, train: bool) -> Stack:
        """The stack of blocks; `train` is passed to layers in the place of MLPs."""
        kinds = ("double",) * self.depth + ("single",) * self.single_depth
        return Stack(kinds, partial(self.make_block, train=train), self.remat, self.unroll)

    @property
    def stack(self) -> Stack:
        return self.layers(train=False)

    @nn.nowrap
    def make_modulation(self, number: int, name: str) -> nn.Module:
        """The layer that gives a block `number` values per channel; starts at zero."""
        width, axes = number * self.hidden_size, ("embed", "mlp")
        return linear(width, axes, name=name, dtype=self.dtype, kernel_init=ZEROS)

    @nn.nowrap
    def make_block(self, kind: str, *, train: bool) -> Callable[..., Block]:
        """Factory of the blocks of a kind: (name=...) -> `Block`."""
        sizes = (self.hidden_size, self.num_heads, self.qk_norm_eps, self.dtype)
        single = kind == "single"
        return partial(
            SingleBlock if single else DoubleBlock,
            partial(StreamAttention, *sizes),
            partial(self.make_mlp, down_bias=not single),
            self.make_modulation,
            partial(JointAttention, self.grid, self.rope_axes, self.attention),
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

        layers = self.layers(train)
        (image, text), early = layers((image, text), c, capture=capture, stop=self.depth)
        tokens = jnp.concatenate([text, image], axis=1)
        tokens, late = layers(tokens, c, capture=capture, start=self.depth)
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
        """Zeros in place of the text, or no word; the guidance scale stays what it is."""
        return {n: v if n == "guidance" else jnp.zeros_like(v) for n, v in cond.items()}


def build(config: ConfigDict, losses: tuple[str, ...]) -> Flux:
    """The model of a section `model` of a config; see `models.build`."""
    shared = transformer(config, losses, int(config.hidden_size * config.mlp_ratio))
    names = ("input_shape", "hidden_size", "num_heads", "qk_norm_eps", "time_scale", "make_mlp")
    names += ("remat", "unroll", "attention", "dtype", "residual_dtype", "param_dtype")
    fields = {name: shared[name] for name in names} | config.flux.to_dict()
    return Flux(**fields, depth=config.depth)
