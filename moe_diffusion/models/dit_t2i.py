"""DiT for texts: the transformer of dit.py whose blocks attend to the tokens of a prompt.

DiffMoE's text-to-image models (2503.14487, section 3.3) are DiffMoE and DiT with cross-attention;
their code and geometry are not published. Here cross-attention stands between self-attention and
MLP, as in PixArt (2310.00426, figure 4). The text's tokens pass two layers to the model's width.
One vector of the whole text is added to the time, as in SD3 (2403.03206, figure 2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion import empty_prompt
from moe_diffusion.checks import check_values, divides
from moe_diffusion.conditions import Field
from moe_diffusion.models import dit
from moe_diffusion.models.blocks import VectorEmbed
from moe_diffusion.models.parts import transformer
from moe_diffusion.models.words import HEADS, WordEncoder
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES

FIELDS = {
    "text_tokens": (256, "tokens of a prompt, padding included"),
    "text_width": (4096, "width of the text encoder's tokens (T5-XXL)"),
    "text_dtype": ("bfloat16", "in which they come: float32 | bfloat16"),
    "text_mask": (True, "padding is not attended to"),
    "pooled_width": (768, "width of the pooled text (CLIP-L); 0 = there is none"),
    # One of vocabulary.py. It takes the tokens of prompts and learns to encode them (words.py).
    "vocabulary": ("", "words that it reads itself; empty: it takes text and pooled text"),
}


def check(config: ConfigDict) -> None:
    """Raises a UserError for values of the section `model` that this architecture cannot have."""
    text = config.dit_t2i
    check_values(
        text,
        "model.dit_t2i.",
        choices={"text_dtype": ("float32", "bfloat16"), "vocabulary": ("", *VOCABULARIES)},
        positive=("text_tokens", "text_width"),
        not_negative=("pooled_width",),
    )
    if text.vocabulary:
        divides("heads of words.py", HEADS, "model.dit_t2i.text_width", text.text_width)
    dit.check(config)


class TextDiT(dit.DiT):
    """Noisy image, time and prompt -> prediction; most fields are those of `PatchTransformer`.

    The condition is

      text [B, text_tokens, text_width]: what the text encoder returns, padding included;
      text_mask bool[B, text_tokens], with `text_mask`: false for padding;
      pooled f32[B, pooled_width], unless that is 0: one vector of the whole text;
      tokens i32[B, text_tokens] in place of these, if it has a vocabulary.

    Attributes:
      text_tokens, text_width, text_dtype, text_mask, pooled_width, vocabulary: of the condition.
      empty: the empty prompt, which `null` puts in; None puts in zeros.
    """

    text_tokens: int
    text_width: int
    text_dtype: str
    text_mask: bool
    pooled_width: int
    vocabulary: str
    empty: empty_prompt.EmptyPrompt | None = None

    parts = {**dit.DiT.parts, "words": "text encoder"}
    parts |= {"text_embed": "embedders", "pooled_embed": "embedders"}
    reads_text = True

    @nn.nowrap
    def condition(self, cond: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        """See `DiT.condition`; the blocks get the text [B, L, D] and which of its tokens count."""
        dtype, told = self.dtype, cond
        if self.vocabulary:
            sizes = len(VOCABULARIES[self.vocabulary]), self.text_width, self.pooled_width
            told = WordEncoder(*sizes, dtype, name="words")(cond[TOKENS])
        text = VectorEmbed(self.hidden_size, dtype, name="text_embed")(told["text"])
        vector = jnp.zeros((), dtype)
        if "pooled" in told:
            vector = VectorEmbed(self.hidden_size, dtype, name="pooled_embed")(told["pooled"])
        same = [
            jnp.all(cond[name] == value, axis=tuple(range(1, value.ndim)))
            for name, value in self.null(cond).items()
        ]
        is_null = jnp.stack(same).all(0)
        return vector, is_null, text, *([told["text_mask"]] if "text_mask" in told else [])

    def cond_spec(self) -> dict[str, Field]:
        if self.vocabulary:
            words = len(VOCABULARIES[self.vocabulary])
            return {TOKENS: Field((self.text_tokens,), "int32", words)}
        spec = {"text": Field((self.text_tokens, self.text_width), self.text_dtype)}
        if self.text_mask:
            spec["text_mask"] = Field((self.text_tokens,), "bool")
        if self.pooled_width:
            spec["pooled"] = Field((self.pooled_width,), "float32")
        return spec

    def null(self, cond: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The empty prompt, or no word."""
        return empty_prompt.null(cond, self.empty)


def build(config: ConfigDict, losses: tuple[str, ...]) -> TextDiT:
    """The model of a section `model` of a config; see `models.build`."""
    width = int(config.hidden_size * config.mlp_ratio)
    shared = transformer(config, losses, width, config.depth)
    return TextDiT(**shared, reverse_time=False, **config.dit_t2i.to_dict())
