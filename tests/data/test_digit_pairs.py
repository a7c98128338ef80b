"""Pairs of digits with prompts: which there are, which are held out, which digits they ask for."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moe_diffusion.conditions import Field
from moe_diffusion.data.sources import Digits, check_fits, open_images
from moe_diffusion.digit_pairs import (
    _OPENINGS,
    _RELATIONS,
    LONGEST,
    held_out_prompts,
    pair_of,
    prompts,
)
from moe_diffusion.errors import UserError
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES, split_words

VOCABULARY = VOCABULARIES["digit_pairs"]
SPEC = {TOKENS: Field((LONGEST,), "int32", len(VOCABULARY))}
SOME = [(3, 7), (8, 1), (5, 5)]


def test_some_prompts():
    """5 openings, 10 relations, 3 adjectives and 4 ways to name two digits: 600, a fifth of which
    is held out."""
    assert (len(prompts(3, 7)), len(prompts(3, 7, held_out=True))) == (480, 120)
    everything = {*prompts(3, 7), *prompts(3, 7, held_out=True)}
    assert len(everything) == 600
    assert {"a three left of a seven", "draw a 7 to the right of a 3"} <= everything
    assert "an image of a small 8 and then a small one" in prompts(8, 1) + prompts(8, 1, True)
    assert not any("a eight" in text or "a 8" in text for text in prompts(8, 8))


def test_held_out_prompts_are_known_words_combined_anew():
    known = {word for pair in product(range(10), repeat=2) for text in prompts(*pair)
             for word in split_words(text)}  # fmt: skip
    assert known == set(VOCABULARY.words)
    for pair in SOME:
        assert not set(prompts(*pair)) & set(prompts(*pair, held_out=True))
    assert len(_RELATIONS) % len(_OPENINGS) == 0  # so that every relation is held out, too
    for relation in ("left of a 7", "followed by a 7", "right side a 7"):
        assert any(relation in text for text in prompts(3, 7, held_out=True))


def test_the_words_say_which_digit_is_left():
    for pair in SOME:
        for text in prompts(*pair) + prompts(*pair, held_out=True):
            assert pair_of(text) == pair
    assert pair_of("A  Seven right of a 3") == (3, 7)
    for other in ("a seven", "a cat left of a dog", "a three beside a seven", ""):
        assert pair_of(other) is None


def test_a_bag_of_words_does_not_say_it():
    """The two orders of two digits have prompts of the same words."""
    bags = {tuple(sorted(split_words(text))) for text in prompts(3, 7)}
    swapped = {tuple(sorted(split_words(text))) for text in prompts(7, 3)}
    assert bags == swapped


def test_prompts_that_a_model_is_asked_in():
    asked = held_out_prompts(1000)
    assert len({text for text, _ in asked}) == 1000
    assert [pair for _, pair in asked] == [divmod(i // 10, 10) for i in range(1000)]
    assert all(text in prompts(*pair, held_out=True) for text, pair in asked)


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_are_the_digits_that_their_prompts_name(split):
    source, digits = open_images("digit_pairs", (8, 16, 1), split, cond_spec=SPEC), Digits(split)
    check_fits(source, "digit_pairs", (8, 16, 1), SPEC)
    chosen = np.random.default_rng(0).integers(0, len(source), 200)
    batch = source.take(chosen)
    assert batch["image"].shape == (200, 8, 16, 1)
    labels = {
        image.tobytes(): label for image, label in zip(digits.images, digits.labels, strict=True)
    }
    for i, (image, tokens) in enumerate(zip(batch["image"], batch[TOKENS], strict=True)):
        text = VOCABULARY.text(tokens)
        halves = (image[:, :8], image[:, 8:])
        sides = [labels[np.ascontiguousarray(half).tobytes()] for half in halves]
        assert pair_of(text) == tuple(sides)
        assert text in prompts(*sides, held_out=split == "test")
        one = source[int(chosen[i])]
        np.testing.assert_array_equal(one["image"], image)
        np.testing.assert_array_equal(one[TOKENS], tokens)
    assert len({pair_of(VOCABULARY.text(row)) for row in batch[TOKENS]}) > 60


def test_a_model_with_too_few_tokens_is_told():
    short = {TOKENS: Field((LONGEST - 1,), "int32", len(VOCABULARY))}
    with pytest.raises(UserError, match=f"prompts of {LONGEST} tokens, the model takes"):
        open_images("digit_pairs", (8, 16, 1), cond_spec=short)
