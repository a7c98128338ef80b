"""Pictures that the work does not need: their failure is a line, whatever it is."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import train
from moe_diffusion.errors import UserError
from moe_diffusion.figures import curves
from moe_diffusion.figures import images as figures
from moe_diffusion.ornaments import ornament
from moe_diffusion.sampling import hooks
from tests import cli
from tests.full_disk import full_disk

PICTURE = Image.new("L", (5, 4), 77)


def test_any_failure_is_one_line(capfd):
    with ornament("the picture a.png"):
        raise ValueError("first\nsecond")
    assert capfd.readouterr().err == "warning: without the picture a.png (first)\n"
    with pytest.raises(KeyboardInterrupt), ornament("a picture"):
        raise KeyboardInterrupt


def test_a_picture_that_nobody_named_replaces_only_ours(tmp_path):
    path = tmp_path / "sweep.png"
    assert figures.save_ornament(lambda: PICTURE, path) == path
    assert figures.save_ornament(lambda: PICTURE, path) == path  # ours
    PICTURE.save(path)  # a user's own
    mine = path.read_bytes()
    for _ in range(2):
        assert figures.save_ornament(lambda: PICTURE, path) == tmp_path / "sweep-2.png"
    (tmp_path / "sweep-2.png").write_text("notes")
    assert figures.save_ornament(lambda: PICTURE, path) == tmp_path / "sweep-3.png"
    (tmp_path / "link.png").symlink_to("nowhere")
    assert figures.own_name(tmp_path / "link.png").name == "link-2.png"
    assert path.read_bytes() == mine and (tmp_path / "sweep-2.png").read_text() == "notes"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_that_has_the_log_too_ends_nothing(tmp_path, capfd):
    """stderr is a file here, which takes ten bytes of the warning."""
    with full_disk():
        assert figures.save_ornament(lambda: PICTURE, tmp_path / "a.png") is None
    assert capfd.readouterr().err == "warning: w" and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_warning(tmp_path, capsys):
    with full_disk():
        assert figures.save_ornament(lambda: PICTURE, tmp_path / "a.png") is None
    error = capsys.readouterr().err
    assert error.startswith(f"warning: without the picture {tmp_path}/a.png (cannot write ")
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


DRAW = """
import pathlib, sys
from moe_diffusion.figures.curves import training_picture
from moe_diffusion.figures.images import save_ornament
place = save_ornament(lambda: training_picture({"loss": {1: 2.0, 2: 1.0}}), sys.argv[1])
print(place)
import os, matplotlib
print(os.environ.get("MPLBACKEND"), matplotlib.rcParams["backend"])
"""


@pytest.mark.parametrize(
    "variables, backend",
    [
        ({"MPLBACKEND": "nonsense"}, "nonsense "),
        ({"MPLBACKEND": "svg"}, "svg svg"),
        ({"MPLCONFIGDIR": "/dev/null/no", "HOME": "/dev/null"}, "None "),
    ],
)
def test_the_environment_of_matplotlib_does_not_matter(variables, backend, tmp_path):
    """A backend that is not there, one that is (it stays set), and no place for a cache."""
    found = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "loss.png")],
        env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | variables,
        cwd=cli.ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    first, second = found.stdout.splitlines()
    assert first == str(tmp_path / "loss.png") and second.startswith(backend), found.stdout
    assert figures.is_ours(tmp_path / "loss.png") and "Traceback" not in found.stderr


def test_training_ends_well_without_its_pictures(tmp_path, monkeypatch, capfd):
    """Samples that are not finite, and a picture of the loss that cannot be drawn."""

    def not_finite(self, state):
        raise UserError("samples are not finite: try more steps")

    def no_font(columns):
        raise RuntimeError("no font")

    monkeypatch.setattr(hooks.FixedSamples, "draw", not_finite)
    monkeypatch.setattr(curves, "training_picture", no_font)
    changes = {"train__sample_every": 2, "train__eval_samples": 8, "train__samples": 2}
    train.main([*cli.digits(**changes), "--workdir", str(tmp_path), "--json"])
    out, error = capfd.readouterr()
    told = [line for line in error.splitlines() if line.startswith("warning:")]
    assert told == [
        "warning: without the samples of step 2 (samples are not finite: try more steps)",
        "warning: without the evaluation of step 2 (samples are not finite: try more steps)",
        f"warning: without the picture {tmp_path}/loss.png (no font)",
    ]
    assert cli.saved_steps(tmp_path) == [1, 2, 3]
    lines = out.splitlines()
    assert lines[-1].startswith('{"step": 3') and "\ncurves" not in out
    assert f"checkpoints  {tmp_path}/checkpoints (steps 1, 2, 3)" in lines
    command = f"draw images  python -m moe_diffusion.sample --workdir {tmp_path} --out grid.png"
    assert command in lines


def test_pictures_of_many_images_show_some():
    """60 megapixels hold 12,106 images of (64 * 1.1)^2 pixels, and 756 of 256x256 with a gap."""
    assert figures.few_enough(100, (8, 8, 1)).tolist() == list(range(100))
    shown = figures.few_enough(50_000, (8, 8, 1))
    assert len(shown) == 12_106 and shown[0] == 0 and len(np.unique(shown)) == len(shown)
    assert len(figures.few_enough(50_000, (256, 256, 3))) == 756
