"""The demonstration with prompts: what it prints, that it is quick again, and what it reaches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import demo

TINY = {"model.hidden_size": 16, "model.num_heads": 2, "model.flux.rope_axes": (2, 4, 2)}
TINY |= {"model.depth": 1, "model.flux.single_depth": 2, "model.flux.text_width": 16}
TINY |= {"data.batch_size": 8, "sampling.steps": 1, "sampling.sampler": "euler"}
TINY |= {"optim.warmup_steps": 1, "train.sample_every": 0, "sampling.cfg": 1.0}


def run(capfd, workdir, **keys):
    """The last line of the demonstration, and all that it printed before."""
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    demo.main(["--config", "configs/digits_flux.py", "--workdir", str(workdir), *arguments])
    *lines, last = capfd.readouterr().out.splitlines()
    return json.loads(last), lines


def test_trains_draws_and_ends_with_a_line(tmp_path, capfd):
    keys = TINY | {"train.num_steps": 2}
    result, lines = run(capfd, tmp_path, **keys)
    assert {"prompt_accuracy", "classifier_accuracy", "seconds", "picture"} <= result.keys()
    assert "class_accuracy" not in result
    assert lines[0] == "digits_flux: 1,471,488 images, 8 x cpu, preset dp"
    assert lines[-1].startswith("200 of 1000 drawn digits: ")
    assert np.asarray(Image.open(result["picture"])).std() > 1
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert metrics["step"] == 2 and 0.5 < metrics["loss"] < 3


@pytest.mark.slow
def test_held_out_prompts_are_drawn_after_two_minutes(tmp_path, capfd):
    """400 of the 1,500 steps, the schedule as short; they reached 0.000 when this was written."""
    keys = {"train.num_steps": 400, "optim.warmup_steps": 50, "train.sample_every": 0}
    result, _ = run(capfd, tmp_path, **keys)
    assert result["prompt_accuracy"] > 0.85
    assert result["nearest_train_distance"] > 0.7 * result["nearest_train_distance_heldout"]
    again, lines = run(capfd, tmp_path, **keys)
    assert any("already trained" in line for line in lines)
    assert again["prompt_accuracy"] == result["prompt_accuracy"]
