"""Handwritten digits with written prompts: "a handwritten seven", "the digit 7, written by hand".

A prompt is an opening, an adjective, a noun, the digit as a word or a numeral, and an ending; most
parts may be absent. Held out are the prompts whose opening and ending no training prompt has
together (a fifth of all), so that they are known words combined anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from moe_diffusion.conditions import Field
from moe_diffusion.errors import UserError
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES, split_words

VOCABULARY = "digits"
_OPENINGS = ("", "a", "the", "one", "draw a", "show me a", "a picture of the", "an image of a")
_ADJECTIVES = ("", "handwritten", "small", "sketched")
_NOUNS = ("", "digit", "number", "figure")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMERALS = tuple("0123456789")
_ENDINGS = ("", ", written by hand", "in black ink", "on white paper", "with a pen")


def prompts(digit: int, held_out: bool = False) -> list[str]:
    """All prompts for a digit, of training or held out; a digit's prompt i is another's with its
    name in place of the other's."""
    found = []
    for (start, opening), adjective, noun, name, (end, ending) in product(
        enumerate(_OPENINGS), _ADJECTIVES, _NOUNS, (WORDS[digit], str(digit)), enumerate(_ENDINGS)
    ):
        if ((start + end) % len(_ENDINGS) == 0) == held_out:
            text = " ".join(filter(None, (opening, adjective, noun, name, ending)))
            found.append(spelt(text))
    return found


def spelt(text: str) -> str:
    """A text put together from parts, with "an" before an eight and no space before a comma."""
    return re.sub(r"\ba (?=8|eight)", "an ", text).replace(" ,", ",")


def held_out_prompts(number: int) -> list[tuple[str, int]]:
    """(prompt, digit) of `number` prompts that training never sees, the digits in order.

    They come from all over the list, and no two digits are asked for in the same words.
    """
    each = number // 10
    texts = [prompts(digit, held_out=True) for digit in range(10)]
    # Steps of about the golden ratio, which is without a common divisor with the list's length.
    return [
        (texts[digit][97 * (10 * i + digit) % len(texts[digit])], digit)
        for digit in range(10)
        for i in range(each)
    ]


def digit_of(prompt: str) -> str | None:
    """The digit that a prompt asks for, like "7": its last numeral or number word, if it has one.

    "one handwritten seven" asks for a seven.
    """
    named = [word for word in split_words(prompt) if word in WORDS or word in NUMERALS]
    if not named:
        return None
    return named[-1] if named[-1] in NUMERALS else str(WORDS.index(named[-1]))


LONGEST = max(len(split_words(text)) for held_out in (False, True) for text in prompts(8, held_out))


class PromptedDigits:
    """What sources of digits with prompts share: the field `tokens`, and the tokens of all prompts.

    Args:
      name: of the source.
      digits: `data.sources.Digits`, of which the images are taken.
      texts: the prompts of each digit or pair, as many of each.
      vocabulary: a name of `VOCABULARIES`.
      longest: words of a prompt, at most.
      cond_spec: of the model, which says how many tokens a prompt has.

    Raises:
      UserError: they are fewer than the words of a prompt.
    """

    def __init__(
        self,
        name: str,
        digits: Any,
        texts: Iterable[Sequence[str]],
        vocabulary: str,
        longest: int,
        cond_spec: Mapping[str, Field],
    ):
        length = cond_spec[TOKENS].shape[0] if TOKENS in cond_spec else longest
        if length < longest:
            raise UserError(
                f"data.source={name} has prompts of {longest} tokens, the model takes {length}: "
                f"set its text_tokens to {longest}, like model.flux.text_tokens={longest}"
            )
        words = VOCABULARIES[vocabulary]
        self.image_shape, self.levels = digits.image_shape, digits.levels
        self.cond_spec = {TOKENS: Field((length,), "int32", len(words))}
        self._digits = digits
        self._tokens = np.stack([words.tokens(row, length) for row in texts])  # [.., prompt, token]

    def __len__(self) -> int:
        return len(self._digits) * self._tokens.shape[-2]


class DigitPrompts(PromptedDigits):
    """A source of every image of `digits` with every prompt for its digit.

    Record i is image i // P with prompt i % P of P. So a run draws images and prompts at random,
    and batch b draws the same ones whenever it is made.

    Args:
      digits: `data.sources.Digits`, of which this takes the images and, instead of labels, prompts.
      held_out: whether the prompts are those that training never sees.
      cond_spec: of the model, which says how many tokens a prompt has.

    Raises:
      UserError: they are fewer than the words of a prompt.
    """

    def __init__(self, digits: Any, held_out: bool, cond_spec: Mapping[str, Field]):
        texts = (prompts(digit, held_out) for digit in range(10))
        super().__init__("digits_prompts", digits, texts, VOCABULARY, LONGEST, cond_spec)

    def __getitem__(self, index: int | np.ndarray) -> Mapping[str, np.ndarray]:
        image, prompt = np.divmod(index, self._tokens.shape[1])
        record = self._digits[image]
        return {"image": record["image"], TOKENS: self._tokens[record["label"], prompt]}

    take = __getitem__
