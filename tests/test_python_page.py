"""docs/python.md: its examples run, one after the other, and the names that it lists are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import moe_diffusion
from tests import cli
from tests.sampling.tiny_run import make_run

PAGE = (cli.ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
GOLDEN = cli.ROOT / "tests" / "goldens" / "dsmoe_rope2d"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with all that the examples name."""
    make_run(tmp_path / "runs" / "digits")
    shutil.copy(GOLDEN / "weights.safetensors", tmp_path / "DSMoE-S-E16.safetensors")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_data", None)


def test_the_examples(folder):
    found = {}
    for block in BLOCKS:
        if block.startswith('"""my_data.py"""'):
            (folder / "my_data.py").write_text(block)
        else:
            exec(compile(block, "docs/python.md", "exec"), found)
    assert found["images"].shape == (2, 8, 8, 1) and found["images"].dtype == np.float32
    assert found["pixels"].shape == (4, 8, 8, 1) and found["pixels"].dtype == np.uint8
    assert len(found["pictures"]) == 8 and isinstance(found["pictures"][0], Image.Image)
    assert found["latents"].shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(found["same"], found["velocity"])
    # Every row of `up` has the sum of a token, and every row of `down` adds up 16 of its GELUs.
    total = jnp.sum(found["tokens"], axis=-1, keepdims=True)
    gelu = 0.5 * total * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (total + 0.044715 * total**3)))
    np.testing.assert_allclose(found["output"], jnp.broadcast_to(16 * gelu, (1, 8, 4)), rtol=1e-5)
    assert jnp.isfinite(found["value"])

    from moe_diffusion.data.sources import open_images

    source = open_images("my_data:Stripes", (4, 4, 1))
    assert len(source) == 1000 and source.class_names == ["horizontal", "vertical"]
    np.testing.assert_array_equal(source[0]["image"][:, 0, 0], [-1, 1, -1, 1])
    np.testing.assert_array_equal(source[1]["image"][0, :, 0], [-1, 1, -1, 1])


def test_the_names_of_the_table():
    table = PAGE.partition("## Parts")[2].partition("```")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = {re.match(r"\w+", text)[0] for row in rows for text in re.findall(r"`(.*?)`", row)}
    assert names == set(moe_diffusion._PLACES)
    for name in names:
        assert getattr(moe_diffusion, name).__name__ == moe_diffusion._PLACES[name][1]
        assert name in dir(moe_diffusion)
    with pytest.raises(AttributeError, match="'moe_diffusion' has no attribute 'Rooter'"):
        _ = moe_diffusion.Rooter


def test_the_package_itself_is_light():
    """No jax, no numpy, and 0.3 s at the very most; a command line and a router need more."""
    code = (
        "import time; start = time.perf_counter(); import moe_diffusion; import sys;"
        "print(time.perf_counter() - start, *{'jax', 'flax', 'numpy'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cli.ROOT
    )
    seconds, *heavy = result.stdout.split()
    assert float(seconds) < 0.3 and not heavy
