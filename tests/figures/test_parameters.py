"""Bars of activated parameters: which kinds have one, and that they are drawn."""

from __future__ import annotations

import numpy as np

from moe_diffusion.figures.parameters import OTHER, _parts, parameters_picture
from moe_diffusion.models.accounting import Count


def counts(**kinds: int) -> dict[str, Count]:
    """Activated millions of each kind; twice as many in all."""
    found = {kind: Count(2 * n * 10**6, n * 10**6) for kind, n in kinds.items()}
    total = sum(kinds.values()) * 10**6
    return found | {"total": Count(2 * total, total)}


def test_small_kinds_are_joined():
    """Of 1,000 million a kind needs 20 in one model to have a bar of its own."""
    models = {
        "a": counts(attention=600, ffn=380, router=10, embedders=10),
        "b": counts(attention=900, router=20, embedders=80),
    }
    assert _parts(models) == {
        "attention": [0.6, 0.9],
        "ffn": [0.38, 0.0],
        "embedders": [0.01, 0.08],
        "router": [0.01, 0.02],
    }
    models = {"a": counts(attention=990, router=4, embedders=6)}
    assert _parts(models) == {"attention": [0.99], OTHER: [0.01]}


def test_longer_bars_have_more_colour():
    def coloured(million: int) -> int:
        picture = parameters_picture(
            {"a": counts(attention=1000), "b": counts(attention=million)}, "title"
        )
        pixels = np.asarray(picture).astype(int)
        return int((np.ptp(pixels, axis=-1) > 60).sum())

    assert coloured(900) > 1.2 * coloured(400)
