"""Curves: whole files or none, and what a killed or resumed run leaves behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.errors import UserError
from moe_diffusion.figures import curves, routing


def test_loss_curve_tolerates_a_killed_run(tmp_path):
    lines = [json.dumps({"step": s, "loss": 100 / s, "grad_norm": 1.0}) for s in range(1, 200)]
    lines.insert(3, json.dumps({"step": 3, "images_per_sec": 5.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 200, "lo')
    out = curves.loss_curve(path, tmp_path / "loss.png")
    with Image.open(out) as image:
        assert image.width > 400 and len(image.convert("L").getcolors()) > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_losses_of_a_resumed_run_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3}\n')
    assert curves._read_losses(path) == {1: 5.0, 2: 3.0}


def test_loss_curve_refuses(tmp_path):
    with pytest.raises(UserError, match="no metrics at"):
        curves.loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds a step and a loss"):
        curves.loss_curve(path, tmp_path / "loss.png")
    path.write_text('{"step": 1, "loss": 2}\nnoise\n{"step": 2, "loss": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        curves.loss_curve(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def coloured(picture):
    """How many colours a picture has; an empty one has few."""
    return len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0))


def test_thresholds_with_and_without_a_metric():
    rows = [{"threshold": t, "c_infer_avg": c} for t, c in (("dynamic", 2), (0.2, 3), (0.5, 1))]
    plain = curves.threshold_picture(rows, 2)
    judged = curves.threshold_picture([row | {"class_accuracy": 0.5} for row in rows], 2)
    assert coloured(judged) > coloured(plain) > 20


def test_a_sweep_has_a_line_for_each_average():
    results = [
        {"cfg": cfg, "ema": ema, "metrics": {"fid": cfg * factor}, "config": "c", "step": 1,
         "num_samples": 5}
        for ema, factor in (("0.9", 1), ("none", 2)) for cfg in (1.0, 2.0)
    ]  # fmt: skip
    both, one = curves.sweep_picture(results), curves.sweep_picture(results[:2])
    orange = (np.asarray(both).reshape(-1, 3) == (255, 127, 14)).all(1).sum()
    assert orange > 20 and not (np.asarray(one).reshape(-1, 3) == (255, 127, 14)).all(1).any()


def test_routing_with_and_without_classes():
    stats = {
        "c_infer_avg": 1.5, "blocks": [0, 1], "times": [0.0, 0.5],
        "per_layer_and_time": [[1.0, 2.0], [2.0, 1.0]],
    }  # fmt: skip
    plain = routing.capacity_picture(stats)
    bars = routing.capacity_picture(stats | {"per_class": {"0": 1.0, "null": 2.0}})
    assert bars.height > plain.height and coloured(plain) > 20
