"""Trainings that are disturbed in one way each end with the bits of an undisturbed one.

`python -m tests.campaign.disturbed` disturbs any number of them, in all ways.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.campaign import disturbed
from tests.campaign.disturbances import KINDS


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return disturbed.undisturbed(tmp_path_factory.mktemp("campaign") / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "results"),
    [
        ("killed during a save", {disturbed.EXACT}),
        ("SIGTERM", {disturbed.EXACT}),
        ("SIGINT", {disturbed.EXACT}),
        ("killed with data workers", {disturbed.EXACT}),
        ("full disk", {disturbed.EXACT, disturbed.NAMED}),
        ("second run", {disturbed.NAMED}),
        ("flipped bit in a checkpoint", {disturbed.EXACT, disturbed.NAMED}),
        ("config.json damaged", {disturbed.NAMED}),
    ],
)
def test_a_disturbed_run_ends_as_an_undisturbed_one(tmp_path, expected, kind, results):
    run = disturbed.disturb(tmp_path / "case", kind, turn=0, seed=1, expected=expected)
    assert run["result"] in results, run


def test_one_bit_is_a_difference():
    end = {
        "params/w": np.array([0.5, -0.0], np.float32),
        "data": {"next_index": 30},
        "metrics of step 1": {"step": 1, "loss": 1.25},
    }
    assert disturbed.differences(end, {name: value for name, value in end.items()}) == []
    others = {
        "params/w": [
            np.array([0.5, 0.0], np.float32),  # the sign of zero
            np.nextafter(end["params/w"], np.float32(1)),
            end["params/w"].astype(np.float64),
            end["params/w"][None],
        ],
        "data": [{"next_index": 29}, {}],
        "metrics of step 1": [{"step": 1, "loss": float(np.nextafter(1.25, 2))}],
    }
    for name, values in others.items():
        for value in values:
            assert disturbed.differences(end | {name: value}, end) == [name]
        assert disturbed.differences({n: v for n, v in end.items() if n != name}, end) == [name]
    assert disturbed.differences(end | {"more": 1}, end) == ["more"]


def test_the_table_counts_every_run_once():
    results = [disturbed.EXACT, disturbed.NAMED, disturbed.FAULT, disturbed.LEFT_OUT]
    runs = [{"kind": "killed", "result": result} for result in results[:3]]
    runs += [{"kind": "full disk", "result": result} for result in results]
    rows = disturbed.table(runs).splitlines()
    assert rows[2:] == [
        "| killed | 3 | 1 | 1 | 1 | 0 |",
        "| full disk | 4 | 1 | 1 | 1 | 1 |",
        "| all | 7 | 2 | 2 | 2 | 1 |",
    ]
    assert len(KINDS) == 22 and all(kind.__doc__ for kind in KINDS.values())
