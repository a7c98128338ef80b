"""Prompts as rows of numbers, a number a word, for models that learn to read while they train.

`VOCABULARIES` has them by name (`vocabulary` in `model.flux` and `model.dit_t2i`). The place of a
word is part of what a run has learned: new words go to the end.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence

import numpy as np

from moe_diffusion.errors import UserError

TOKENS = "tokens"  # the field of a condition that holds a prompt, i32[B, L]
EMPTY = 0  # fills up a row; a row of it is a prompt without words
_WORDS = re.compile(r"\w+|[^\w\s]")
_LONGEST = 60  # characters of a user's word in a message


class Vocabulary:
    """Words, signs included, and their numbers from 1 on; 0 is `EMPTY`.

    Attributes:
      words: in lower case.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(self.words, 1)}

    def __len__(self) -> int:
        """How many numbers there are."""
        return len(self.words) + 1

    def tokens(self, prompts: Sequence[str], length: int) -> np.ndarray:
        """The prompts as i32[N, length], filled up with `EMPTY`; capitals are small letters.

        A prompt that is too long is cut; a line on stderr names the words lost.

        Raises:
          UserError: a word is unknown; the message names it and the words that look like it.
        """
        rows = [self._numbered(prompt) for prompt in prompts]
        found = np.full((len(rows), length), EMPTY, np.int32)
        for row, numbers in zip(found, rows, strict=True):
            row[: len(numbers)] = numbers[:length]
            if len(numbers) > length:
                warn_of_loss(length, self.text(numbers[length:]))
        return found

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The words of a row, between spaces; there is none before a sign."""
        text = " ".join(self.words[number - 1] for number in tokens if number != EMPTY)
        return re.sub(r" ([^\w\s])", r"\1", text)

    def _numbered(self, prompt: str) -> list[int]:
        words = split_words(prompt)
        unknown = next((word for word in words if word not in self._numbers), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self.words, n=5, cutoff=0.5)
            hint = "words like it are" if near else "its words are"
            raise UserError(
                f"the model does not know the word {unknown[:_LONGEST]!r} of a prompt; {hint}: "
                f"{' '.join(near or self.words)}"
            )
        return [self._numbers[word] for word in words]


def split_words(prompt: str) -> list[str]:
    """The words of a text in lower case; a sign that is no letter or digit is a word, too."""
    return _WORDS.findall(prompt.lower())


def warn_of_loss(length: int, lost: str) -> None:
    """One line on stderr about the words `lost` of a prompt of more than `length` tokens."""
    message = f"warning: a prompt of more than {length} tokens is cut; lost: {lost}"
    print(message, file=sys.stderr, flush=True)


_DIGITS = "zero one two three four five six seven eight nine 0 1 2 3 4 5 6 7 8 9"
_DIGITS += " a an the draw show me picture image of handwritten small sketched digit number figure"
_DIGITS += " , written by hand in black ink on white paper with pen"
_PAIRS = "zero one two three four five six seven eight nine 0 1 2 3 4 5 6 7 8 9"
_PAIRS += " a an the draw show me picture image of small handwritten"
_PAIRS += " left right to side on and then followed by after ,"
VOCABULARIES = {
    "digits": Vocabulary(_DIGITS.split()),
    "digit_pairs": Vocabulary(_PAIRS.split()),
}
