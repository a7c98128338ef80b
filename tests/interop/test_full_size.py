"""FLUX.1 [dev] at its full size through `convert` and back, and a small one the same way."""

from __future__ import annotations

import math

import pytest

from moe_diffusion.convert import main
from tests.interop import full_size
from tests.interop.full_size import LAYOUTS, Sizes, round_trip

SMALL = Sizes(width=256, double=2, single=3, text=96, pooled=32, shard_bytes=4 * 10**6)


@pytest.mark.parametrize(("family", "tensors"), [("flux", 780), ("flux_diffusers", 1160)])
def test_the_tensors_are_the_published_ones(family, tensors):
    """black-forest-labs' own class has so many parameters with the fields of [dev]."""
    shapes = LAYOUTS[family](Sizes())
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == 11_901_408_320


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_small_one_comes_back_bit_by_bit(tmp_path, family):
    found = round_trip(family, tmp_path, SMALL, lambda *args: main([*map(str, args)]))
    assert found["mismatches"] == [] and found["tensors"] == len(LAYOUTS[family](SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 9}))
    with pytest.raises(RuntimeError, match="needs 0.0 GB, and 0.0 are free"):
        round_trip("flux", tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.alone
@pytest.mark.parametrize("family", LAYOUTS)
def test_the_full_size_takes_less_than_6_gb_of_memory(tmp_path, family):
    found = round_trip(family, tmp_path, Sizes())
    assert found["mismatches"] == []
    assert max(found[way]["peak_bytes"] for way in ("import", "export")) < 6e9, found
