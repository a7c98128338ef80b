"""`python -m moe_diffusion.curves`: a metric of several runs in one picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import curves
from tests import cli


@pytest.fixture
def runs(tmp_path):
    """Two runs of 20 steps, of which the second also has another metric."""
    for run, more in (("a", {}), ("b", {"eval/fd": 3.0})):
        (tmp_path / run).mkdir()
        lines = [json.dumps({"step": s, "loss": 1 / s} | more) for s in range(1, 21)]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_picture_of_two_runs(runs, tmp_path, capsys):
    out = tmp_path / "new" / "loss.png"
    curves.main([*runs, "--labels", "4x3,2x6", "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"out": str(out), "metric": "loss", "last": {"4x3": 0.05, "2x6": 0.05}}
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.width == 11 * 120 and len(np.unique(pixels, axis=0)) > 50


def test_what_cannot_be_drawn(runs, tmp_path, capfd):
    out = ["--out", tmp_path / "x.png"]
    for args, message in (
        ([*runs, *out, "--metric", "eval/fid"], "has no metric 'eval/fid': choose"),
        ([runs[0], runs[0], *out], "2 runs need as many different names, and there are 1"),
        ([*runs, *out, "--labels", "one"], "2 runs need as many different names"),
        ([tmp_path / "c", *out], "no metrics at"),
        ([*runs, *out, "--after", 20], "--after 20 leaves nothing: the last step is 20"),
        ([*runs, "--out", tmp_path / "x.jpg"], "x.jpg will be a .png file"),
    ):
        assert message in cli.refused(capfd, curves.main, args)
    assert not (tmp_path / "x.png").exists()
