"""`sample --top-k`: other numbers of experts per token than in training."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import sample
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.sampling import top_k
from tests import cli
from tests.sampling.tiny_run import FLUX, FLUX_MOE, make_run


def test_numbers_of_experts():
    assert top_k.parse(None) == [] and top_k.parse("2") == [2]
    assert top_k.parse("0, 1,2,4,2") == [0, 1, 2, 4]
    for text in ("", "two", "-1", "1,,2", "1.5", "²", "123456"):
        with pytest.raises(UserError, match="--top-k '.*' is no list of numbers of experts"):
            top_k.parse(text)


def test_routers_that_can_have_other_numbers():
    config = configs.load(FLUX, FLUX_MOE)
    top_k.check(config, [0, 4])
    with pytest.raises(UserError, match="--top-k 5 exceeds the 4 experts of a layer"):
        top_k.check(config, [0, 5])
    for router in ("diffmoe", "expert_choice", "expert_race", "dense"):
        with pytest.raises(UserError, match=f"this model has model.router.name = {router}"):
            top_k.check(configs.load(f"configs/digits.py:router={router}"), [1])


def test_what_columns_do_not_have(tmp_path, capfd):
    common = ["--workdir", tmp_path, "--out", tmp_path / "a.png"]
    for flags, message in (
        (["--top-k", "0,1", "--npz", "x.npz"], "--npz is for one value of --top-k"),
        (["--top-k", "0", "--teacher", "t", "--images", "x"], "--images is for one value"),
        (["--teacher", "t"], "--teacher is a column beside those of --top-k: give --top-k, too"),
        (["--top-k", "few"], "--top-k 'few' is no list of numbers"),
        (["--top-k", "1"], "is not a workdir"),
    ):
        assert message in cli.refused(capfd, sample.main, [*common, *flags])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX with experts, and a dense one."""
    folder = tmp_path_factory.mktemp("flux")
    variables = make_run(folder / "moe", base=FLUX, small=FLUX_MOE)
    make_run(folder / "dense", "model.router.name=dense", base=FLUX, small=FLUX_MOE)
    return folder, variables


@pytest.mark.slow
def test_no_expert_is_the_shared_one_alone(flux):
    """Against the run's two experts per token with all weights of the routed experts zero."""
    config = configs.load(FLUX, FLUX_MOE)
    flat = flatten_dict(flux[1]["params"], sep="/")
    without = {k: v * ("/experts/" not in k) for k, v in flat.items()}
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.full(2, 0.5)
    cond = {"tokens": jnp.arange(24, dtype=jnp.int32).reshape(2, 12)}

    def output(params, *changes):
        model = build(configs.load(FLUX, [*FLUX_MOE, *changes]).model)
        params = unflatten_dict(params, sep="/")
        return jax.jit(lambda p: model.apply({"params": p}, x, t, cond, False))(params)

    assert config.model.router.top_k == 2
    none = output(flat, "model.router.top_k=0")
    np.testing.assert_allclose(none, output(without), atol=1e-6)
    assert np.abs(none - output(flat)).max() > 1e-3


@pytest.mark.slow
def test_columns_are_the_pictures_of_each(flux, tmp_path, monkeypatch, capsys):
    """The column of 0 is what --top-k 0 draws alone, and the teacher's what it draws itself."""
    shown, image_grid = [], top_k.image_grid
    monkeypatch.setattr(
        top_k, "image_grid", lambda *a, **k: shown.append(a[0]) or image_grid(*a, **k)
    )

    def draw(run, *args):
        common = ["--workdir", flux[0] / run, "--prompt", "a 5", "--prompt", "7", "--json", *args]
        sample.main(list(map(str, common)))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    arrays = {}
    for run, *flags in (("moe", "--top-k", 0), ("dense",)):
        said = draw(run, *flags, "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz")
        assert said.get("top_k") == ([0] if flags else None)
        with np.load(tmp_path / "x.npz") as file:
            arrays[run] = file["arr_0"]
        with Image.open(tmp_path / "x.png") as image:
            assert image.text.get("top_k") == ("0" if flags else None)
    said = draw(
        "moe", "--top-k", "0,4", "--teacher", flux[0] / "dense", "--out", tmp_path / "y.png"
    )
    assert said["top_k"] == [0, 4] and said["num"] == 2
    with Image.open(tmp_path / "y.png") as image:
        assert image.text["top_k"] == "0, 4" and image.text["prompt"] == "a 5\n7"
        assert image.text["teacher"] == str(flux[0] / "dense")
    columns = shown[0].reshape(2, 3, 8, 8, 1)
    np.testing.assert_allclose(columns[:, 0], arrays["dense"], atol=1e-5)
    np.testing.assert_allclose(columns[:, 1], arrays["moe"], atol=1e-5)
    assert np.abs(columns[:, 2] - columns[:, 1]).max() > 1e-3


@pytest.mark.slow
def test_a_teacher_of_another_kind(flux, tmp_path, capfd):
    make_run(tmp_path / "digits")
    args = ["--workdir", flux[0] / "moe", "--prompt", "7", "--top-k", "1", "--out"]
    args += [tmp_path / "x.png", "--teacher", tmp_path / "digits"]
    message = cli.refused(capfd, sample.main, args)
    assert "has conditions" in message and "name the run that it was made of" in message
    assert not (tmp_path / "x.png").exists()
