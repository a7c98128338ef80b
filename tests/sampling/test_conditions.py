"""Which conditions are drawn where nobody names any, and who may ask for labels."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import sample
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol, runs
from moe_diffusion.models import build
from moe_diffusion.sampling import labels, load
from moe_diffusion.sampling.conditions import captions, default_conditions, spread
from tests import cli
from tests.sampling.prompted import Prompted, Prompts


@pytest.fixture(scope="module")
def digits():
    return build(configs.load("configs/digits.py").model)


def test_values_are_spread_evenly_and_in_order():
    assert spread(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert spread(5, 3).tolist() == [0, 0, 1, 1, 2]
    assert spread(3, 1000).tolist() == [0, 1, 2]


def test_labels_need_no_source(digits):
    cond = default_conditions(digits, 20)
    assert cond["label"].dtype == np.int32 and list(cond) == ["label"]
    assert cond["label"].tolist() == [i // 2 for i in range(20)]
    assert captions(digits, cond) == [str(i // 2) for i in range(20)]


def test_other_fields_are_those_of_records_that_are_spaced_evenly():
    cond = default_conditions(Prompted(), 8, Prompts())
    records = [0, 12, 25, 37, 50, 62, 75, 87]
    assert cond["text"].shape == (8, 3, 5) and cond["text"][:, 0, 0].tolist() == records
    assert cond["text_mask"].dtype == bool
    assert cond["text_mask"].sum(1).tolist() == [i % 3 + 1 for i in records]
    assert cond["strength"].dtype == np.float32
    assert cond["style"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # known values are spread
    assert captions(Prompted(), cond) == list("00112233")
    more = default_conditions(Prompted(), 200, Prompts())
    assert more["text"][:, 0, 0].tolist() == [i // 2 for i in range(200)]


def test_a_prompt_cannot_be_made_up():
    with pytest.raises(UserError, match="has text, text_mask, strength, which must come from data"):
        default_conditions(Prompted(), 8)


def test_labels_of_a_text(digits):
    assert labels.parse_labels("5,2,9", digits).tolist() == [5, 2, 9]
    assert labels.num_labels(digits, "x") == 10
    with pytest.raises(UserError, match="10 is no class; this model knows 0 to 9"):
        labels.parse_labels("3,10", digits)


def test_labels_of_a_model_without_labels(monkeypatch, tmp_path, capfd):
    message = "this model takes no labels; its condition has text, text_mask, strength, style"
    loaded = (configs.default(), Prompted(), {}, {})
    monkeypatch.setattr(load, "load_workdir", lambda *_, **__: loaded)
    monkeypatch.setattr(load, "load_config", lambda *_, **__: loaded[0])
    args = ["--workdir", tmp_path, "--labels", "3,7", "--out", tmp_path / "grid.png"]
    assert cli.refused(capfd, sample.main, args) == f"--labels: {message}"
    monkeypatch.setattr(runs, "load_workdir", lambda *_, **__: loaded)
    with pytest.raises(UserError, match=message):
        runs.RunImages(tmp_path, protocol.default())
    assert not list(tmp_path.iterdir())
