"""Prompts as the fields of a condition, by the text encoders of a FLUX.1 pipeline.

A pipeline is a folder as diffusers publishes it:

| folder                            | what it is              | field                   |
|-----------------------------------|-------------------------|-------------------------|
| `tokenizer/`, `text_encoder/`     | CLIP-L, 77 tokens       | `pooled` f32[B, 768]    |
| `tokenizer_2/`, `text_encoder_2/` | T5 v1.1 XXL, 512 or 256 | `text` bf16[B, L, 4096] |

FLUX.1 sees all positions of T5, padding included, whose states are not zero. So there is no mask:
neither T5 nor the model gets one (FLUX.1 [dev] was trained with 512 tokens, [schnell] with 256).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError
from moe_diffusion.interop import text
from moe_diffusion.interop.tokens import open_tokenizer
from moe_diffusion.models.text import CLIPText, T5Encoder

TEXT_LENGTH = 512
_PLACES = (("tokenizer_2", "text_encoder_2", T5Encoder), ("tokenizer", "text_encoder", CLIPText))


def is_pipeline(folder: str | os.PathLike) -> bool:
    """Whether a folder has the parts that the table above names, whatever is in them."""
    return all((Path(folder) / name).is_dir() for *names, _ in _PLACES for name in names)


class PromptEncoders:
    """The tokenizers and encoders of a pipeline folder.

    Args:
      folder: see above. Other parts of the pipeline need not be there.
      text_length: tokens of `text`.
      dtype: of the computations; "auto" is bf16 on TPU and GPU, and f32 on CPU.

    Raises:
      UserError: a file is missing, damaged or of another network, or the length is not positive.
    """

    def __init__(
        self, folder: str | os.PathLike, text_length: int = TEXT_LENGTH, dtype: str = "auto"
    ):
        if text_length < 1:
            raise UserError(f"a text of {text_length} tokens is not possible: give 512 or 256")
        self._parts = {}
        # All tokenizers first: they are small, and what is missing should be known at once.
        tokenizers = [open_tokenizer(Path(folder) / place) for place, _, _ in _PLACES]
        for tokenizer, (names, place, kind) in zip(tokenizers, _PLACES, strict=True):
            encoder = text.load(Path(folder) / place, dtype)
            if not isinstance(encoder.network, kind):
                raise UserError(
                    f"{Path(folder) / place} holds a {type(encoder.network).__name__} where "
                    f"FLUX.1 has a {kind.__name__}: name the folder of a FLUX.1 pipeline"
                )
            if len(tokenizer) > encoder.network.vocab_size:
                raise UserError(
                    f"{Path(folder) / names} has {len(tokenizer)} tokens, {place} knows only "
                    f"{encoder.network.vocab_size}: take both from one pipeline"
                )
            length = getattr(encoder.network, "max_length", text_length)
            self._parts[encoder.network.field] = tokenizer, encoder, length

    @property
    def cond_spec(self) -> dict[str, Field]:
        """The fields that `encode` computes."""
        (_, t5, length), (_, clip, _) = self._parts["text"], self._parts["pooled"]
        return {
            "text": Field((length, t5.network.hidden_size), "bfloat16"),
            "pooled": Field((clip.network.hidden_size,), "float32"),
        }

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"text": bf16[B, L, D], "pooled": f32[B, P]}. A prompt that is too long is cut; a line on
        stderr names the words lost."""
        made = {}
        for name, field in self.cond_spec.items():
            tokenizer, encoder, length = self._parts[name]
            states = encoder.encode(tokenizer(prompts, length))
            made[name] = states.astype(jnp.dtype(field.dtype))
        return made

    def release(self) -> None:
        """Frees the encoders' weights on the devices; the next `encode` places them again."""
        for _, encoder, _ in self._parts.values():
            encoder.release()

    def describe(self) -> dict[str, Any]:
        """For a manifest: which encoder made a field, how many tokens it saw, and its mask."""
        return {
            name: {
                "encoder": encoder.name,
                "fingerprint": encoder.fingerprint,
                "length": length,
                "mask": None,  # all positions are seen
            }
            for name, (_, encoder, length) in self._parts.items()
        }
