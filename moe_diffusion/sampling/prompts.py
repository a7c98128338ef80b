"""Prompts on their way to a model: from files and flags, and to the fields of its condition.

`ENCODERS` says, by a field of the condition that prompts are for, what makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.interop.prompts import MASK, PromptEncoders, text_of_data
from moe_diffusion.models.stack import Model
from moe_diffusion.reading import Key, check_keys, read_text, table_of
from moe_diffusion.sampling.conditions import spread
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES

GUIDANCE = "guidance"  # the field of models that were distilled with a guidance scale
USUAL_GUIDANCE = 3.5  # what FLUX.1 [dev] and Hyper-FLUX are published for
_MOST_GUIDANCE = 1000
_LARGEST = 1 << 20  # bytes of a file of prompts
_LINE = {"prompt": Key((str,)), "category": Key((str,), "")}  # of a file .jsonl


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

    config: of the run; reads `model.flux`.
    """

    def __init__(self, config: ConfigDict):
        self.max_tokens = config.model.flux.text_tokens
        self._vocabulary = VOCABULARIES[config.model.flux.vocabulary]

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Raises a UserError about a word that is not in the vocabulary."""
        return {TOKENS: self._vocabulary.tokens(prompts, self.max_tokens)}


# Field -> (config of the run, model, folder of text encoders or None) -> what makes the field, and
# perhaps others.
ENCODERS: dict[str, Callable[[ConfigDict, Model, str | None], PromptEncoder]] = {
    "text": lambda config, model, folder: PipelinePrompts(model.cond_spec(), folder),
    TOKENS: lambda config, model, folder: WordPrompts(config),
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
      cond: the condition of every image, {field: [N, ...]}.
    """

    prompts: list[str]
    texts: list[str]
    cond: dict[str, np.ndarray]


def condition(
    encode: PromptEncoder,
    model: Model,
    prompts: Sequence[str],
    num: int | None = None,
    guidance: float | None = None,
    asked_by: str = "guidance",
) -> Prompted:
    """The condition of images for prompts, each of which is encoded once.

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
    rows = [numbers[text] for text in texts]
    cond = {name: values[rows] for name, values in encode(once).items()} | scales
    lacking = sorted(spec.keys() - cond.keys())
    if lacking:
        raise UserError(f"prompts do not say {', '.join(lacking)}, which the model takes, too")
    return Prompted(once, texts, cond)


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


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a file in UTF-8 of at most 1 MiB, one a line; empty lines are left out.

    A line of a file `.jsonl` is an object with a `prompt` and perhaps a `category`.

    Raises:
      UserError: there is no such file, it is larger or no text, it has no prompt, or a line of a
        file `.jsonl` is something else.
    """
    return [prompt for prompt, _ in _read(path)]


def read_categories(path: str | os.PathLike) -> dict[str, str]:
    """Prompt -> category, of the prompts of a file of `read_prompts` that have one.

    Raises:
      UserError: as `read_prompts`, or a prompt has several categories.
    """
    found: dict[str, str] = {}
    for prompt, category in _read(path):
        if category and found.setdefault(prompt, category) != category:
            raise UserError(
                f"{path} has the prompt {shown(prompt)} in the categories {shown(found[prompt])} "
                f"and {shown(category)}: leave one"
            )
    return found


def _read(path: str | os.PathLike) -> list[tuple[str, str]]:
    """(prompt, category or "") of every line that is not empty."""
    lines = read_text(path, "file of prompts", _LARGEST).split("\n")
    if os.fspath(path).endswith(".jsonl"):
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        found = [_of_line(line, f"line {number} of {path}") for number, line in numbered]
    else:
        found = [(line.strip(), "") for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} has no prompts: write one a line")
    return found


def _of_line(line: str, where: str) -> tuple[str, str]:
    table = table_of(line)
    remedy = 'write {"prompt": "...", "category": "..."}'
    if table is None:
        raise UserError(f"{where} is no JSON object: {remedy}")
    check_keys(table, _LINE, where, remedy)
    if not table["prompt"].strip():
        raise UserError(f"{where}: prompt is empty: {remedy}")
    return table["prompt"].strip(), table.get("category", "").strip()
