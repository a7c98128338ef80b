"""Conditions whose rows are encoded while images are drawn: the same rows, a few at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion.conditions import Field
from moe_diffusion.sampling import prompts
from moe_diffusion.sampling.lazy import LazyField, reordered

SPEC = {"text": Field((4, 2), "float32"), "pooled": Field((3,), "float32")}
TEXTS = [f"prompt {number}" for number in range(40)]


class Encoder:
    """Rows that say which prompt they are of; remembers how many were asked for at a time."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        numbers = np.array([float(text.split()[1]) for text in texts], np.float32)
        shapes = {name: field.shape for name, field in SPEC.items()}
        return {
            name: np.broadcast_to(numbers.reshape(-1, *[1] * len(shape)), (len(texts), *shape))
            for name, shape in shapes.items()
        }


def made(held, monkeypatch, num=None, spec=SPEC):
    monkeypatch.setattr(prompts, "_HELD", held)
    encoder = Encoder()
    model = SimpleNamespace(cond_spec=lambda: spec | {"guidance": Field((), "float32")})
    return encoder, prompts.condition(encoder, model, TEXTS, num).cond


@pytest.mark.parametrize("num", [40, 100])
def test_batches_have_the_rows_of_one_call(monkeypatch, num):
    """11 float32 a prompt: ten prompts are held; batches of seven, the last one filled up."""
    whole, wanted = made(1 << 30, monkeypatch, num)
    encoder, cond = made(10 * 44, monkeypatch, num)
    assert len(whole.calls) == 1 and isinstance(wanted["text"], np.ndarray)
    assert all(isinstance(cond[name], LazyField) for name in SPEC)
    assert cond["text"].shape == (num, 4, 2) and cond["pooled"].dtype == np.float32
    for start in range(0, num, 7):
        index = np.arange(start, start + 7) % num
        for name in cond:
            np.testing.assert_array_equal(cond[name][index], wanted[name][index])
    assert max(map(len, encoder.calls)) <= 10
    asked = [text for call in encoder.calls for text in call]
    assert asked[:40] == TEXTS and set(asked[40:]) <= set(TEXTS[:3])  # those of the filling


def test_a_batch_that_is_larger_than_what_is_held(monkeypatch):
    encoder, cond = made(2 * 44, monkeypatch)
    assert cond["pooled"][np.arange(12)][:, 0].tolist() == list(range(12))
    assert [len(call) for call in encoder.calls] == [2, 10]
    cond["text"][np.arange(12)]
    assert len(encoder.calls) == 2  # fields share what is held


def test_it_looks_like_an_array(monkeypatch):
    _, cond = made(10 * 44, monkeypatch)
    pooled = cond["pooled"]
    assert len(pooled) == 40 and pooled.ndim == 2 and pooled[3].tolist() == [3, 3, 3]
    assert pooled[5:7][:, 0].tolist() == [5, 6] and pooled[np.arange(40) == 9].shape == (1, 3)
    np.testing.assert_array_equal(np.asarray(pooled)[:, 1], np.arange(40))
    order = np.random.default_rng(0).permutation(40)
    other = reordered(cond, order)
    assert isinstance(other["pooled"], LazyField) and len(other["guidance"]) == 40
    assert other["pooled"][:8][:, 0].tolist() == order[:8].tolist()
    with pytest.raises(IndexError):
        pooled[40]
