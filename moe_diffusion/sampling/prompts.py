"""Prompts on their way to a model: the fields of its condition. `prompt_files` reads files.

`ENCODERS` says, by a field of the condition that prompts are for, what makes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.conditions import Field
from moe_diffusion.empty_prompt import GUIDANCE
from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.interop.prompts import MASK, PromptEncoders, text_of_data
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.conditions import spread
from moe_diffusion.sampling.lazy import LazyField, lazy_fields
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES

USUAL_GUIDANCE = 3.5  # what FLUX.1 [dev] and Hyper-FLUX are published for
_MOST_GUIDANCE = 1000
_HELD = 4 << 30  # bytes of encoded prompts in memory: 1,000 of 512 tokens of T5


class PromptEncoder(Protocol):
    """Prompts -> {field: [N, ...]}, the fields of a condition that say what the prompts mean.

    A prompt that is too long is cut; a line on stderr names the words lost. What it cannot read at
    all is a UserError. Nothing stays on the devices after a call.

    Attributes:
      max_tokens: as many of a prompt are read.
    """

    max_tokens: int

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]: ...


class PipelinePrompts:
    """{"text": [N, L, D], "text_mask": [N, L], "pooled": [N, P]}, by the encoders of a pipeline.

    Which of the last two there are is that of the model: FLUX.1 takes no mask, and a model with
    cross-attention may take no pooled text.

    Args:
      spec: the condition of the model; its text has L tokens.
      folder: see `interop.prompts`.

    Raises:
      UserError: there is no folder, a part of it is missing or damaged, or the encoders make
        fields of other widths than the model takes.
    """

    def __init__(self, spec: Mapping[str, Field], folder: str | os.PathLike | None):
        if not folder:
            raise UserError(
                "prompts need the text encoders of FLUX.1: name the folder of its pipeline (with "
                "text_encoder, text_encoder_2, tokenizer and tokenizer_2) with --text-encoders or "
                "data.text_encoders"
            )
        self.max_tokens = spec["text"].shape[0]
        options = {"mask": MASK in spec, "pooled": "pooled" in spec}
        self._encoders = PromptEncoders(folder, self.max_tokens, **options)
        self._dtypes = {}
        for name, made in self._encoders.cond_spec.items():
            if made.shape != spec[name].shape:
                raise UserError(
                    f"the text encoders of {folder} make {name} {list(made.shape)}, the model "
                    f"takes {list(spec[name].shape)}: name those that belong to it"
                )
            self._dtypes[name] = jnp.dtype(spec[name].dtype)

    def check_made(self, made_by: Mapping[str, Any]) -> None:
        """Raises a UserError unless these encoders made the texts that the model was trained with.

        made_by: see `interop.prompts.PromptEncoders.check_made`.
        """
        self._encoders.check_made(made_by, "the data that this model was trained with")

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            made = self._encoders.encode(prompts)
        finally:
            self._encoders.release()
        return {name: values.astype(self._dtypes[name]) for name, values in made.items()}


class WordPrompts:
    """Of a model that has a vocabulary and encodes its words itself: {"tokens": i32[N, L]}.

    model: with `text_tokens`, L, and the name of its `vocabulary`.
    """

    def __init__(self, model: Model):
        self.max_tokens = model.text_tokens
        self._vocabulary = VOCABULARIES[model.vocabulary]

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Raises a UserError about a word that is not in the vocabulary."""
        return {TOKENS: self._vocabulary.tokens(prompts, self.max_tokens)}


# Field -> (config of the run, model, folder of text encoders or None) -> what makes the field, and
# perhaps others.
ENCODERS: dict[str, Callable[[ConfigDict, Model, str | None], PromptEncoder]] = {
    "text": lambda config, model, folder: PipelinePrompts(model.cond_spec(), folder),
    TOKENS: lambda config, model, folder: WordPrompts(model),
}


def prompt_encoder(
    config: ConfigDict,
    model: Model,
    folder: str | os.PathLike | None = None,
    known: Classes = NOTHING,
) -> PromptEncoder:
    """What encodes prompts for the model of a run.

    Args:
      folder: of text encoders, if the model needs some; None takes `data.text_encoders`.
      known: what the run knows of its data, which may say which encoders made the texts; if it
        does not, the prepared data of `data.source` is asked.

    Raises:
      UserError: the model takes no prompts, or its encoders are not there, or they are not those
        that made the texts of the training (if these are known).
    """
    fields = model.cond_spec()
    for name, make in ENCODERS.items():
        if name in fields:
            encoder = make(config, model, os.fspath(folder or config.data.text_encoders))
            if isinstance(encoder, PipelinePrompts):
                encoder.check_made(known.text or text_of_data(config))
            return encoder
    raise UserError(
        f"{config.name} takes no prompts: its condition has {', '.join(fields) or 'nothing'}; "
        "choose a model that reads texts, like configs/flux_dev.py"
    )


def takes_prompts(model: Model) -> bool:
    """Whether `prompt_encoder` knows one for the model."""
    return not ENCODERS.keys().isdisjoint(model.cond_spec())


class Prompted(NamedTuple):
    """What is drawn for prompts.

    Attributes:
      prompts: each once, in their order.
      texts: the prompt of every image.
      cond: the condition of every image, {field: [N, ...]}: arrays, or what makes the rows of
        large ones when they are asked for (`lazy.LazyField`).
    """

    prompts: list[str]
    texts: list[str]
    cond: dict[str, np.ndarray | LazyField]


def condition(
    encode: PromptEncoder,
    model: Model,
    prompts: Sequence[str],
    num: int | None = None,
    guidance: float | None = None,
    asked_by: str = "guidance",
) -> Prompted:
    """The condition of images for prompts, each of which is encoded once.

    Where the rows of all images are larger than `_HELD`, so many bytes of prompts are encoded now,
    and others when images are drawn for them; the encoders are on the devices again meanwhile.

    Args:
      num: images, spread evenly over the prompts, in order; None draws one a prompt.
      guidance: the scale that a distilled model is told; None is `USUAL_GUIDANCE`.
      asked_by: what names the scale, like "--guidance", for messages.

    Raises:
      UserError: there is no prompt, one is no text, `num` is less than the prompts, the model
        takes no guidance scale, or the encoder refuses.
    """
    prompts, spec = check_prompts(prompts), model.cond_spec()
    num = len(prompts) if num is None else num
    if num < len(prompts):
        raise UserError(f"{num} images are fewer than the {len(prompts)} prompts: draw more")
    scales = guidance_of(model, guidance, num, asked_by)
    once = list(dict.fromkeys(prompts))
    texts = [prompts[row] for row in spread(num, len(prompts))]
    numbers = {prompt: number for number, prompt in enumerate(once)}
    rows = np.array([numbers[text] for text in texts])
    of_one = sum(_bytes_of(field) for name, field in spec.items() if name != GUIDANCE)
    if of_one * num <= _HELD:
        made = {name: values[rows] for name, values in encode(once).items()}
    else:
        made = lazy_fields(encode, once, rows, max(1, _HELD // of_one))
    cond = made | scales
    lacking = sorted(spec.keys() - cond.keys())
    if lacking:
        raise UserError(f"prompts do not say {', '.join(lacking)}, which the model takes, too")
    return Prompted(once, texts, cond)


def _bytes_of(field: Field) -> int:
    return math.prod(field.shape) * jnp.dtype(field.dtype).itemsize


def guidance_of(
    model: Model, guidance: float | None, num: int, asked_by: str = "guidance"
) -> dict[str, np.ndarray]:
    """{"guidance": [num]} of a model that takes it, and {} of another; see `condition`.

    Raises:
      UserError: a scale is given to a model that takes none, or it is no scale.
    """
    field = model.cond_spec().get(GUIDANCE)
    if field is None and guidance is not None:
        raise UserError(
            f"{asked_by}: this model was not distilled with a guidance scale (nor was FLUX.1 "
            "[schnell]): leave it out; cfg guides by a second pass without the prompt"
        )
    scale = USUAL_GUIDANCE if guidance is None else guidance
    if not 0 <= scale <= _MOST_GUIDANCE:
        raise UserError(
            f"{asked_by} {scale} is not in 0..{_MOST_GUIDANCE}: {USUAL_GUIDANCE} is usual"
        )
    return {} if field is None else {GUIDANCE: np.full(num, scale, field.dtype)}


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. Raises a UserError without any, or for one that is no text."""
    if not prompts:
        raise UserError("there are no prompts: give at least one")
    for prompt in prompts:
        if not isinstance(prompt, str) or "\0" in prompt:
            raise UserError(f"{shown(prompt)} is no prompt: write a text")
        with explained(f"the prompt {shown(prompt)} is no text in UTF-8", "write it so"):
            prompt.encode()
    return list(prompts)
