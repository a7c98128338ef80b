"""Digits with prompts: which there are, which are held out, and that a batch is always the same."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion.conditions import Field
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.data.sources import Digits, check_fits, open_images
from moe_diffusion.digit_prompts import (
    _ENDINGS,
    _OPENINGS,
    LONGEST,
    digit_of,
    held_out_prompts,
    prompts,
)
from moe_diffusion.errors import UserError
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES, split_words

SPEC = {TOKENS: Field((12,), "int32", len(VOCABULARIES["digits"]))}
TRAINING = {digit: prompts(digit) for digit in range(10)}
HELD_OUT = {digit: prompts(digit, held_out=True) for digit in range(10)}


def test_some_prompts():
    """8 openings, 4 adjectives, 4 nouns, 2 names and 5 endings: 1,280, of which a fifth."""
    assert (len(TRAINING[7]), len(HELD_OUT[7])) == (1024, 256)
    everything = {*TRAINING[7], *HELD_OUT[7]}
    assert len(everything) == 1280
    assert {"a handwritten seven in black ink", "the digit 7, written by hand", "7"} <= everything
    assert "draw an 8 with a pen" in TRAINING[8] + HELD_OUT[8]
    assert not any("a eight" in text or "a 8" in text for text in TRAINING[8] + HELD_OUT[8])


def test_held_out_prompts_are_known_words_combined_anew():
    known = {word for texts in TRAINING.values() for text in texts for word in split_words(text)}
    for digit in range(10):
        assert not set(TRAINING[digit]) & set(HELD_OUT[digit])
        assert all(set(split_words(text)) <= known for text in HELD_OUT[digit])
    assert known == set(VOCABULARIES["digits"].words)
    # No training prompt begins and ends as a held-out one does.
    for start, opening in enumerate(_OPENINGS):
        ending, longer = _ENDINGS[-start % 5], (f"{o} " for o in _OPENINGS[start + 1 :])
        if opening and ending:
            begins = [text for text in TRAINING[7] if text.startswith(f"{opening} ")]
            longer = tuple(other for other in longer if other.startswith(f"{opening} "))
            begins = [text for text in begins if not text.startswith(longer)]
            assert len(begins) == 128 and not any(text.endswith(ending) for text in begins)


def test_prompts_that_a_model_is_asked_in():
    asked = held_out_prompts(100)
    assert len({text for text, _ in asked}) == 100
    assert [digit for _, digit in asked] == [i // 10 for i in range(100)]
    assert all(text in HELD_OUT[digit] for text, digit in asked)
    frames = {HELD_OUT[digit].index(text) for text, digit in asked}
    assert len(frames) == 100 and max(b - a for a, b in pairwise(sorted(frames))) <= 10


@pytest.mark.parametrize("split,texts", [("train", TRAINING), ("test", HELD_OUT)])
def test_records(split, texts):
    """Record i: image i // P with prompt i % P, one of P for its digit."""
    digits = Digits(split)
    source = open_images("digits_prompts", (8, 8, 1), split, cond_spec=SPEC)
    check_fits(source, "digits_prompts", (8, 8, 1), SPEC)
    assert len(source) == len(digits) * len(texts[0])
    numbers = np.array([5, len(texts[0]) + 1, len(source) - 1])
    batch = source.take(numbers)
    for i, (number, prompt) in enumerate(zip(numbers, (5, 1, -1), strict=True)):
        record = digits[number // len(texts[0])]
        np.testing.assert_array_equal(batch["image"][i], record["image"])
        words = VOCABULARIES["digits"].text(batch[TOKENS][i])
        assert words == texts[int(record["label"])][prompt]
        np.testing.assert_array_equal(source[int(number)][TOKENS], batch[TOKENS][i])


@pytest.mark.parametrize("count", [16, 100, 2048])
def test_records_that_are_spaced_evenly_differ(count):
    """Pictures and judges during training take these, and want all digits in many words."""
    source = open_images("digits_prompts", (8, 8, 1), cond_spec=SPEC)
    batch = source.take(np.arange(count) * len(source) // count)
    images = np.unique(batch["image"].reshape(count, -1), axis=0)
    assert len(images) == min(count, 1437)
    assert len(np.unique(batch[TOKENS], axis=0)) > 0.9 * count


def test_a_batch_is_the_same_whenever_it_is_made():
    """After a resume, and in two processes: image, prompt and noise."""
    source = open_images("digits_prompts", (8, 8, 1), cond_spec=SPEC)
    data = SimpleNamespace(batch_size=8, augment="dequantize", num_workers=0, prefetch=1)

    def batches(skip=0, **processes):
        iterator = make_iterator(source, data, seed=3, **processes)
        iterator.set_state({"next_index": skip})
        found = [next(iterator) for _ in range(2)]
        iterator.close()
        return found

    first, second = batches()
    assert (first[TOKENS] != second[TOKENS]).any()
    assert len(np.unique(np.concatenate([first[TOKENS], second[TOKENS]]), axis=0)) > 10
    halves = [batches(1, process_index=i, process_count=2)[0] for i in range(2)]
    for name, values in second.items():
        np.testing.assert_array_equal(batches(1)[0][name], values)
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), values)


def test_a_model_that_reads_too_little_or_nothing():
    short = {TOKENS: SPEC[TOKENS]._replace(shape=(LONGEST - 1,))}
    with pytest.raises(UserError, match="prompts of 11 tokens, the model takes 10: set its"):
        open_images("digits_prompts", (8, 8, 1), cond_spec=short)
    source = open_images("digits_prompts", (8, 8, 1), cond_spec={TOKENS: SPEC[TOKENS]})
    with pytest.raises(UserError, match="lacks the field 'label'.*has the field 'tokens'"):
        check_fits(source, "digits_prompts", (8, 8, 1), {"label": Field((), "int32", 10)})
    with pytest.raises(UserError, match="data.split='val' is unknown"):
        open_images("digits_prompts", (8, 8, 1), "val")


def test_the_digit_that_a_prompt_asks_for():
    for digit in range(10):
        every = prompts(digit) + prompts(digit, held_out=True)
        assert {digit_of(text) for text in every} == {str(digit)}
    assert digit_of("one handwritten seven") == "7" and digit_of("a fox") is None
