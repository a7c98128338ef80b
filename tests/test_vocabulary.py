"""Prompts as numbers: by hand, what is cut, what is unknown, and what must never change."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.vocabulary import VOCABULARIES, Vocabulary, split_words

VOCABULARY = Vocabulary(["a", "seven", ",", "written", "7"])


def test_words_have_numbers_from_1_on():
    found = VOCABULARY.tokens(["A  Seven, written", "7", ""], 5)
    assert found.dtype == np.int32 and len(VOCABULARY) == 6
    assert found.tolist() == [[1, 2, 3, 4, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert [VOCABULARY.text(row) for row in found] == ["a seven, written", "7", ""]


def test_words_that_are_cut_are_named(capfd):
    found = VOCABULARY.tokens(["a seven, written 7", "a 7"], 2)
    assert found.tolist() == [[1, 2], [1, 5]]
    lost = "warning: a prompt of more than 2 tokens is cut; lost:, written 7\n"
    assert capfd.readouterr().err == lost.replace("lost:,", "lost: ,")


def test_an_unknown_word_is_named_with_those_like_it(capfd):
    with pytest.raises(UserError, match="the word 'sevne' of a prompt; words like it are: seven$"):
        VOCABULARY.tokens(["a 7", "written sevne"], 1)
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="word '!' of a prompt; its words are: a seven , written 7"):
        VOCABULARY.tokens(["seven!"], 5)
    with pytest.raises(UserError, match="word '77' of"):  # not two known numerals
        VOCABULARY.tokens(["77"], 5)


def test_a_long_word_is_not_repeated_whole():
    with pytest.raises(UserError) as error:
        VOCABULARY.tokens(["x" * 5000], 5)
    assert len(str(error.value)) < 200


def test_signs_are_words():
    assert split_words("It's (a) 7, no?") == ["it", "'", "s", "(", "a", ")", "7", ",", "no", "?"]


def test_the_words_of_digits_keep_their_places():
    """Trained models know the words by these numbers; new ones go to the end."""
    words = VOCABULARIES["digits"].words
    assert words[:20] == tuple(
        "zero one two three four five six seven eight nine 0 1 2 3 4 5 6 7 8 9".split()
    )
    assert words[20:32] == tuple(
        "a an the draw show me picture image of handwritten small sketched".split()
    )
    assert words[32:47] == tuple(
        "digit number figure , written by hand in black ink on white paper with pen".split()
    )
    assert len(set(words)) == len(words)
