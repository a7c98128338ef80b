"""Two handwritten digits side by side with prompts that say where: "a three left of a seven".

The order of the digits is in the order of the words: a bag of words cannot solve it. A prompt is
an opening and a relation between two digits, which are words or numerals, with or without an
adjective. Held out are the prompts whose opening and relation no training prompt has together (a
fifth of all), so that they are known words combined anew.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from moe_diffusion.conditions import Field
from moe_diffusion.digit_prompts import NUMERALS, WORDS, PromptedDigits, spelt
from moe_diffusion.synthetic import hashed_uniform
from moe_diffusion.vocabulary import TOKENS, split_words

VOCABULARY = "digit_pairs"
_OPENINGS = ("", "draw", "show me", "a picture of", "an image of")
# L is the left digit, R the right one.
_RELATIONS = (
    "a {L} left of a {R}",
    "a {R} right of a {L}",
    "a {L} to the left of a {R}",
    "a {R} to the right of a {L}",
    "a {L} and then a {R}",
    "a {L} followed by a {R}",
    "a {R} after a {L}",
    "a {L} on the left and a {R} on the right",
    "a {R} on the right and a {L} on the left",
    "on the left side a {L}, on the right side a {R}",
)
_ADJECTIVES = ("", "small", "handwritten")
_NAMES = (WORDS, NUMERALS)
Pair = tuple[int, int]  # the left digit, the right one


@functools.cache
def prompts(left: int, right: int, held_out: bool = False) -> tuple[str, ...]:
    """All prompts for two digits, of training or held out.

    Prompt i of a pair is that of another pair with other names.
    """
    found = []
    for (start, opening), (number, relation), adjective, names, others in product(
        enumerate(_OPENINGS), enumerate(_RELATIONS), _ADJECTIVES, _NAMES, _NAMES
    ):
        if ((start + number) % len(_OPENINGS) == 0) == held_out:
            named = {"L": f"{adjective} {names[left]}", "R": f"{adjective} {others[right]}"}
            text = f"{opening} {relation.format(**named)}"
            found.append(spelt(" ".join(text.split())))
    return tuple(found)


def held_out_prompts(number: int) -> list[tuple[str, Pair]]:
    """(prompt, digits) of `number` prompts that training never sees, spread over all 100 pairs.

    They come from all over the list, and no two pairs are asked for in the same words.
    """
    found = []
    for i in range(number):
        pair = divmod(i * 100 // number, 10)
        texts = prompts(*pair, held_out=True)
        # A step without a common divisor with the list's length, 120.
        found.append((texts[47 * i % len(texts)], pair))
    return found


def pair_of(prompt: str) -> Pair | None:
    """The digits that a prompt of this file asks for, the left one first; None for another text."""
    text = re.sub(r"\ban (?=8|eight)", "a ", " ".join(prompt.lower().split()))
    found = next(filter(None, (pattern.fullmatch(text) for pattern in _patterns())), None)
    if found is None:
        return None
    left, right = (
        (NUMERALS if found[side] in NUMERALS else WORDS).index(found[side]) for side in "LR"
    )
    return left, right


@functools.cache
def _patterns() -> tuple[re.Pattern, ...]:
    """What a prompt looks like, for every relation."""
    start, adjective = (
        "|".join(f"{text} " for text in texts if text) for texts in (_OPENINGS, _ADJECTIVES)
    )
    name = "|".join((*WORDS, *NUMERALS))
    sides = {side: f"(?:{adjective})?(?P<{side}>{name})" for side in "LR"}
    return tuple(re.compile(f"(?:{start})?{relation.format(**sides)}") for relation in _RELATIONS)


LONGEST = max(
    len(split_words(text)) for held_out in (False, True) for text in prompts(8, 8, held_out)
)


class DigitPairs(PromptedDigits):
    """A source of two images of `digits` side by side, with a prompt for them.

    Record i has image i // P on the left, a fixed one at random on the right, and prompt i % P of P
    for them. So a run draws images and prompts at random, and batch b draws the same ones whenever
    it is made.

    Args:
      digits: `data.sources.Digits`, of which this takes the images.
      held_out: whether the prompts are those that training never sees.
      cond_spec: of the model, which says how many tokens a prompt has.

    Raises:
      UserError: they are fewer than the words of a prompt.
    """

    def __init__(self, digits: Any, held_out: bool, cond_spec: Mapping[str, Field]):
        texts = (prompts(*pair, held_out) for pair in product(range(10), repeat=2))
        super().__init__("digit_pairs", digits, texts, VOCABULARY, LONGEST, cond_spec)
        height, width, channels = digits.image_shape
        self.image_shape = height, 2 * width, channels
        self._tokens = self._tokens.reshape(10, 10, *self._tokens.shape[1:])

    def __getitem__(self, index: int | np.ndarray) -> Mapping[str, np.ndarray]:
        image, prompt = np.divmod(index, self._tokens.shape[-2])
        drawn = hashed_uniform(np.atleast_1d(np.asarray(index)), 1)[0].reshape(np.shape(index))
        left, right = (
            self._digits[i] for i in (image, (drawn * len(self._digits)).astype(np.int64))
        )
        both = np.concatenate([left["image"], right["image"]], axis=-2)
        return {"image": both, TOKENS: self._tokens[left["label"], right["label"], prompt]}

    take = __getitem__
