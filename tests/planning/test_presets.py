from __future__ import annotations

import pytest

from moe_diffusion.planning.presets import Outcome, amount, recommend

LIMIT = 16 * 10**9


def outcomes(**sent):
    return {name: Outcome(True, 10**9, size) for name, size in sent.items()}


@pytest.mark.parametrize(
    "sent,best",
    [
        ({"dp": 100, "zero1": 110, "fsdp": 150}, "dp"),
        ({"dp": 200, "zero1": 190, "fsdp": 150}, "fsdp"),
        ({"dp": 101, "zero1": 100, "fsdp": 100}, "dp"),  # too close to be worth it
        ({"fsdp": 150, "fsdp_ep": 120}, "fsdp_ep"),
        ({"dp": 0}, "dp"),
    ],
)
def test_the_preset_that_sends_least(sent, best):
    assert recommend(outcomes(**sent), LIMIT)[0] == best


def test_what_does_not_fit_is_not_recommended_and_the_reason_says_so():
    found = outcomes(dp=10**9, zero1=2 * 10**9, fsdp=3 * 10**9)
    found["dp"] = Outcome(False, 21 * 10**9, None, "for the state and gradients alone")
    best, reason = recommend(found, LIMIT)
    assert best == "zero1"
    assert reason == (
        "it fits and sends 2 GB a step from each chip; dp does not fit (21 GB for the state and "
        "gradients alone, a chip has 16 GB); fsdp sends 3 GB a step"
    )


def test_a_key_that_the_preset_needs_is_named():
    found = outcomes(fsdp=150) | {"fsdp_ep": Outcome(True, 10**9, 120, "parallel.expert=16")}
    best, reason = recommend(found, LIMIT)
    assert best == "fsdp_ep" and reason.startswith("with parallel.expert=16, it fits")


def test_nothing_fits():
    assert recommend({"dp": Outcome(False, None, None)}, LIMIT) == (None, "no preset fits")


@pytest.mark.parametrize(
    "size,text",
    [(None, "?"), (0, "0 B"), (999, "999 B"), (1.05e6, "1.05 MB"), (999.9e6, "1 GB")]
    + [(16.9e9, "16.9 GB"), (1234e9, "1,234 GB")],
)
def test_amounts(size, text):
    assert amount(size) == text
