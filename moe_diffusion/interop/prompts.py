"""Prompts as the fields of a condition, by the text encoders of a FLUX.1 pipeline.

A pipeline is a folder as diffusers publishes it:

| folder                            | what it is              | field                   |
|-----------------------------------|-------------------------|-------------------------|
| `tokenizer/`, `text_encoder/`     | CLIP-L, 77 tokens       | `pooled` f32[B, 768]    |
| `tokenizer_2/`, `text_encoder_2/` | T5 v1.1 XXL, 512 or 256 | `text` bf16[B, L, 4096] |

FLUX.1 sees all positions of T5, padding included, whose states are not zero. So there is no mask:
neither T5 nor the model gets one (FLUX.1 [dev] was trained with 512 tokens, [schnell] with 256).
Models with cross-attention get the mask of the real tokens as a field `text_mask` bool[B, L]; T5
sees these tokens alone, too, so its states of them do not depend on L. They may leave CLIP out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.conditions import Field
from moe_diffusion.data import latents
from moe_diffusion.errors import UserError
from moe_diffusion.interop import text
from moe_diffusion.interop.tokens import open_tokenizer
from moe_diffusion.models.text import CLIPText, T5Encoder, TextEncoder

TEXT_LENGTH = 512
MASK = "text_mask"
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
      mask: T5 sees the real tokens alone, and there is a field `text_mask`, which names them.
      pooled: whether there is a field `pooled`; without it, CLIP need not be there.

    Raises:
      UserError: a file is missing, damaged or of another network, or the length is not positive.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        text_length: int = TEXT_LENGTH,
        dtype: str = "auto",
        mask: bool = False,
        pooled: bool = True,
    ):
        if text_length < 1:
            raise UserError(f"a text of {text_length} tokens is not possible: give 512 or 256")
        self._parts, self._mask = {}, mask
        places = _PLACES if pooled else _PLACES[:1]
        # All tokenizers first: they are small, and what is missing should be known at once.
        tokenizers = [open_tokenizer(Path(folder) / place) for place, _, _ in places]
        for tokenizer, (names, place, kind) in zip(tokenizers, places, strict=True):
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
        _, t5, length = self._parts["text"]
        spec = {"text": Field((length, t5.network.hidden_size), "bfloat16")}
        if self._mask:
            spec[MASK] = Field((length,), "bool")
        if "pooled" in self._parts:
            _, clip, _ = self._parts["pooled"]
            spec["pooled"] = Field((clip.network.hidden_size,), "float32")
        return spec

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"text": bf16[B, L, D], "text_mask": bool[B, L], "pooled": f32[B, P]}, those of
        `cond_spec`. A prompt that is too long is cut; a line on stderr names the words lost."""
        made = {}
        for name, (tokenizer, encoder, length) in self._parts.items():
            ids, real = tokenizer.with_mask(prompts, length)
            masked = self._mask and name == "text"
            states = encoder.encode(ids, real if masked else None)
            made[name] = states.astype(jnp.dtype(self.cond_spec[name].dtype))
            if masked:
                made[MASK] = real
        return made

    def check_made(self, made_by: Mapping[str, Any], data: str) -> None:
        """Checks that these encoders made the texts of some data.

        Args:
          made_by: what `describe` said of those that did, the entry "text" of a manifest; what it
            does not name is not checked.
          data: what they made, for the message.

        Raises:
          UserError: an encoder has other weights.
        """
        for name, (_, encoder, _) in self._parts.items():
            _check_made(name, encoder, made_by, data)

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
                # None: all positions are seen; else the field that says which
                "mask": MASK if self._mask and name == "text" else None,
            }
            for name, (_, encoder, length) in self._parts.items()
        }


def text_of_data(config: ConfigDict) -> dict[str, Any]:
    """Which encoders made the texts of `data.source`, as its manifest says it.

    Returns:
      What `PromptEncoders.describe` said; {} if the source has no texts or is not on this machine.
    """
    kind, _, folder = config.data.source.partition(":")
    if kind != "latents" or not (Path(folder) / latents.MANIFEST).is_file():
        return {}
    return latents.read_manifest(folder).get("text") or {}


def check_for_config(config: ConfigDict) -> None:
    """Checks that the encoders of `data.text_encoders` made the texts of `data.source`.

    Nothing is checked if one of them is not named, or the source has no texts.

    Raises:
      UserError: an encoder has other weights, or it cannot be read.
    """
    made_by, folder = text_of_data(config), config.data.text_encoders
    for name, (_, place, _) in zip(("text", "pooled"), _PLACES, strict=True):
        if folder and name in made_by:
            encoder = text.load(Path(folder) / place)
            _check_made(name, encoder, made_by, f"data.source={config.data.source}")


def _check_made(name: str, encoder: TextEncoder, made_by: Mapping[str, Any], data: str) -> None:
    made = made_by.get(name)
    if made and made["fingerprint"] != encoder.fingerprint:
        raise UserError(
            f"the field {name} of {data} was made by another text encoder ({made['encoder']}, "
            f"{made['fingerprint']}) than {encoder.name} ({encoder.fingerprint}): name the one "
            "that made it with data.text_encoders or --text-encoders, or prepare the data again"
        )
