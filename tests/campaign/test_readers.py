"""Some of the damaged inputs of `python -m tests.campaign`: few of each kind, and 3,000 in all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from tests.campaign import readers
from tests.campaign.mutations import mutations, whole

# Of the inputs of these kinds so many are damaged in a way that is noticed, at least.
REFUSED = {"run_config": 0.7, "overrides": 0.4, "weights": 0.8, "manifests": 0.5, "features": 0.4}
REFUSED |= {"autoencoders": 0.5, "hyperparameters": 0.4, "checkpoints": 0.8, "shards": 0.5}


@pytest.mark.parametrize("number", [150, pytest.param(3000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", readers.KINDS, ids=lambda kind: kind.__name__)
def test_damaged_inputs(kind, number, tmp_path):
    count = max(4, -(-number * readers.KINDS[kind] // 100))
    counts = readers.campaign(kind, count, 0 if number < 1000 else 2, tmp_path)
    print(dict(counts))
    assert counts["refused"] >= (REFUSED.get(kind.__name__, 0.2) * count if number > 1000 else 1)


def test_the_kinds_make_a_whole():
    assert sum(readers.KINDS.values()) == 100


def test_the_same_seed_gives_the_same_mutations():
    value = {"a": [1, 2.5, "x"], "b": {"c": None}}
    for kind in ("json", "yaml"):
        once, again = (list(mutations(value, kind, 7, 50)) for _ in range(2))
        assert once == again and len({data for _, data in once}) > 30
        assert once != list(mutations(value, kind, 8, 50))
    assert any(b"NaN" in data for _, data in mutations(value, "json", 0, 200))
    texts = [data for _, data in mutations(value, "yaml", 0, 300)]
    assert any(b"os.system" in data for data in texts)
    arrays = {"x": np.ones((2, 3), np.float32)}
    found = list(mutations(arrays, "npz", 0, 100))
    assert found == list(mutations(arrays, "npz", 0, 100))
    assert json.loads(whole(value, "json")) == yaml.safe_load(whole(value, "yaml")) == value
