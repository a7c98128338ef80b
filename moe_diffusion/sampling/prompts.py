"""From prompts in words to the condition of a model.

`ENCODERS` says, by a field of the condition that prompts are for, what makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES


class PromptEncoder(Protocol):
    """Prompts -> {field: [N, ...]}, the fields of a condition that say what the prompts mean.

    A prompt that is too long is cut; a line on stderr names the words lost. What it cannot read at
    all is a UserError.

    Attributes:
      max_tokens: as many of a prompt are read.
    """

    max_tokens: int

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]: ...


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


ENCODERS: dict[str, Callable[[ConfigDict], PromptEncoder]] = {TOKENS: WordPrompts}


def prompt_encoder(config: ConfigDict, model: Model) -> PromptEncoder:
    """What encodes prompts for the model of a run.

    Raises:
      UserError: nothing that makes a field of its condition from prompts is known.
    """
    fields = model.cond_spec()
    for name, make in ENCODERS.items():
        if name in fields:
            return make(config)
    raise UserError(
        f"{config.name} takes no prompts: its condition has {', '.join(fields) or 'nothing'}; "
        "choose a model with model.flux.vocabulary, like configs/digits_flux.py"
    )
