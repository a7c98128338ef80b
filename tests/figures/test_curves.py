"""Curves: whole files or none, and what a killed or resumed run leaves behind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.figures import curves, routing


def test_the_loss_picture_tolerates_a_killed_run(tmp_path):
    lines = [json.dumps({"step": s, "loss": 100 / s, "grad_norm": 1.0}) for s in range(1, 200)]
    lines.insert(3, json.dumps({"step": 3, "images_per_sec": 5.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 200, "lo')
    columns = curves.read_metrics(path)
    assert columns["loss"][199] == 100 / 199 and 200 not in columns["loss"]
    image = curves.training_picture(columns)
    assert image.width > 400 and len(image.convert("L").getcolors()) > 10


def test_losses_of_a_resumed_run_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"step": 2, "loss": 3}\n')
    assert curves.read_losses(path) == {1: 5.0, 2: 3.0}


def test_metrics_that_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match="no metrics at"):
        curves.read_metrics(tmp_path / "none.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds a step and a loss"):
        curves.read_metrics(path)
    path.write_text('{"step": 1, "loss": 2}\nnoise\n{"step": 2, "loss": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        curves.read_metrics(path)


def test_small_panels_show_what_else_is_known():
    """Each row of panels adds its height; red is the idlest expert alone."""

    def red(picture):
        return (np.asarray(picture).reshape(-1, 3) == (179, 71, 46)).all(1).sum()

    steps = range(0, 100, 10)
    loss = {"loss": {step: 1 / (1 + step) for step in steps}, "grad_norm": {0: 1.0}}
    plain = curves.training_picture(loss)
    rate = {"learning_rate": {step: 1e-4 for step in steps}}
    load = {"load_max": {s: 1.5 for s in steps}, "load_min": {s: 0.5 for s in steps}}
    judged = {f"eval/{name}": {50: 3.0, 90: 2.0} for name in ("fd", "kd")}
    one_row = curves.training_picture(loss | rate | load)
    two_rows = curves.training_picture(loss | rate | load | judged)
    assert plain.width == one_row.width == two_rows.width
    assert two_rows.height - one_row.height == one_row.height - plain.height == round(1.9 * 120)
    assert red(plain) == 0 and red(one_row) > 20


def coloured(picture):
    """How many colours a picture has; an empty one has few."""
    return len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0))


def test_thresholds_with_and_without_a_metric():
    rows = [
        {"threshold": t, "c_infer_avg": c, "metrics": {}}
        for t, c in (("dynamic", 2), (0.2, 3), (0.5, 1))
    ]
    plain = curves.threshold_picture(rows, 2)
    judged = curves.threshold_picture(
        [row | {"metrics": {"class_accuracy": 0.5}} for row in rows], 2
    )
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
