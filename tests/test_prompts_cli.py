"""`sample --prompt`, with a FLUX.1 of random weights: what it draws, and what it refuses."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import moe_diffusion
from moe_diffusion import config as configs
from moe_diffusion import sample
from moe_diffusion.errors import UserError
from moe_diffusion.interop import transfer
from moe_diffusion.models.text import TextEncoder
from moe_diffusion.sampling import bound
from moe_diffusion.sampling.load import load_workdir
from moe_diffusion.training.checkpoint import StoredWeights
from tests import cli
from tests.sampling import flux_folder


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PROMPTS = ["a handwritten seven", "three", "the digit of a seven"]
HEIGHT, WIDTH = 2 * flux_folder.SIDE, 3 * flux_folder.SIDE
SIZE = f"{HEIGHT}x{WIDTH}"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The folder of a pipeline, its text file of prompts beside it, and the workdir of it."""
    folder = flux_folder.write(tmp_path_factory.mktemp("flux") / "FLUX.1-tiny")
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS[:1] + ["", *PROMPTS[1:], ""]))
    return folder, flux_folder.convert(folder, folder.parent / "run")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = flux_folder.write(tmp_path_factory.mktemp("schnell") / "FLUX.1-tiny", guidance=False)
    return flux_folder.convert(folder, folder.parent / "run")


def draw(flux, out, *args):
    """Images in out/ of the prompts of the file, two at a time."""
    folder, workdir = flux
    fixed = ["--workdir", workdir, "--size", SIZE, "--steps", 2, "--out", out / "grid.png"]
    fixed += ["--npz", out / "samples.npz", "--vae", folder, "--json"]
    if "--prompt" not in args:
        fixed += ["--prompts", folder.parent / "prompts.txt"]
    sample.main([str(arg) for arg in (*fixed, *args)])
    with np.load(out / "samples.npz") as arrays:
        return dict(arrays)


def has(shape):
    """Whether an array of this shape is on a device."""
    return any(array.shape == shape for array in jax.live_arrays())


@pytest.fixture(scope="module")
def drawn(flux, tmp_path_factory):
    """What a call of two batches wrote, what it printed, and what it did in which order."""
    out, did = tmp_path_factory.mktemp("drawn"), []
    table = (len(flux_folder.pipeline_folder.PIECES) + 3, 16)  # T5's; nothing else has its shape

    def spy(patch, kind, name):
        method = getattr(kind, name)

        def spied(*args, **kwargs):
            result = method(*args, **kwargs)
            did.append((name, has(table)))
            return result

        patch.setattr(kind, name, spied)

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (
            (TextEncoder, "encode"),
            (StoredWeights, "read_tree"),
            (bound.BoundObserver, "apply"),
        ):
            spy(patch, kind, name)
        arrays = draw(flux, out, "--images", out / "singles", "--batch", 2)
    return out, arrays, did


def test_one_image_for_each_prompt(drawn):
    out, arrays, _ = drawn
    assert arrays["arr_0"].shape == (3, HEIGHT, WIDTH, 3)
    assert arrays["prompts"].tolist() == PROMPTS and arrays["guidance"].tolist() == [3.5] * 3
    assert arrays.keys() == {"arr_0", "prompts", "guidance"}
    assert len({image.tobytes() for image in arrays["arr_0"]}) == 3


def test_encoders_are_gone_before_the_transformer_comes(drawn):
    """T5 and then CLIP run, with T5 on the device; it is not there when the weights are read."""
    assert drawn[2][:3] == [("encode", True), ("encode", True), ("read_tree", False)]


def test_batches_share_one_program(drawn, flux, tmp_path, monkeypatch):
    """Two batches of two trace the network as often as one of three; the images are the same."""
    traces = [name for name, _ in drawn[2]].count("apply")
    apply, calls = bound.BoundObserver.apply, []

    def counted(*args):
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(bound.BoundObserver, "apply", counted)
    arrays = draw(flux, tmp_path, "--batch", 3)
    assert 0 < traces == len(calls)
    np.testing.assert_allclose(arrays["arr_0"], drawn[1]["arr_0"], atol=2e-5)


def test_pictures_say_how_they_came_to_be(drawn, flux):
    out, _, _ = drawn
    settings = {"seed": "0", "sampler": "euler", "steps": "2", "cfg": "1.0", "guidance": "3.5"}
    settings |= {"size": SIZE, "model": "flux_diffusers", "step": "0", "ema": "none"}
    settings |= {"version": moe_diffusion.__version__, "Software": "moe_diffusion"}
    for number, prompt in enumerate(PROMPTS):
        with Image.open(out / "singles" / f"{number:06}.png") as image:
            assert image.size == (WIDTH, HEIGHT)
            assert image.text == settings | {"prompt": prompt, "image": str(number)}
    with Image.open(out / "grid.png") as image:
        assert image.text == settings | {"prompt": "\n".join(PROMPTS)}


def test_what_is_printed(flux, tmp_path, capfd):
    """Prompts of the command line, one twice, in other letters; one with words that are cut."""
    prompts = ["été: 七", "a the " * 6 + "seven\ndigit", "été: 七"]
    args = [word for prompt in prompts for word in ("--prompt", prompt)]
    arrays = draw(flux, tmp_path, *args, "--num-per-prompt", 2, "--images", tmp_path / "singles")
    captured = capfd.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last["prompts"] == prompts[:2] and (last["num"], last["steps"]) == (6, 2)
    assert arrays["prompts"].tolist() == [p for p in prompts for _ in range(2)]
    cut = [line for line in captured.err.splitlines() if line.startswith("warning")]
    # CLIP reads 12 tokens: its two ends and ten words of the fourteen.
    assert cut == ["warning: a prompt of more than 12 tokens is cut; lost: a the seven digit"]
    with Image.open(tmp_path / "singles" / "000004.png") as image:
        assert image.text["prompt"] == prompts[2]


def test_python_draws_the_same(drawn, flux):
    folder, workdir = flux
    pipe = moe_diffusion.load(workdir, autoencoder=folder)
    options = {"size": (HEIGHT, WIDTH), "steps": 2, "batch_size": 2}
    images = pipe(prompts=PROMPTS, **options)
    np.testing.assert_allclose(images, drawn[1]["arr_0"], atol=2e-5)
    assert not has((len(flux_folder.pipeline_folder.PIECES) + 3, 16))
    other = pipe(prompts=PROMPTS[0], num=3, guidance=30.0, **options)
    assert len(pipe._samplers) == 1  # another guidance scale is no other program
    assert other.shape == images.shape and abs(other[0] - images[0]).max() > 1e-3
    for arguments, message in (
        ({"prompts": [], "size": 32}, "there are no prompts: give at least one"),
        ({"prompts": [7], "size": 32}, "7 is no prompt: write a text"),
        ({"prompts": "a", "labels": 3}, "labels and prompts both say what to draw"),
        ({"prompts": ["a", "the"], "num": 1, "size": 32}, "1 images are fewer than the 2 prompts"),
        ({"prompts": "a", "size": 40}, "size 40: this model draws multiples of 16 pixels"),
        ({"prompts": "a", "guidance": -1, "size": 32}, "guidance -1 is not in 0..1000"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**arguments)


def test_bfloat16_stays(tmp_path):
    """What is stored in bf16 is kept so, and computed in it on an accelerator."""
    folder = flux_folder.write(tmp_path / "FLUX.1-tiny", dtype="bfloat16")
    workdir = flux_folder.convert(folder, tmp_path / "run")
    config, model, variables, _ = load_workdir(workdir, ("model.image_size=4",))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
    assert config.model.dtype == "auto" and config.data.text_encoders == str(folder)
    assert model.input_shape == (4, 4, 4) and config.sampling.time_shift == "resolution"


def test_without_prompts_there_must_be_data(flux, tmp_path, capfd):
    args = ["--workdir", flux[1], "--size", 32, "--out", tmp_path / "x.png"]
    refused = cli.refused(capfd, sample.main, args)
    assert refused.endswith("; or say what to draw with --prompt") and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_guidance_scale_with_texts_of_data(flux, tmp_path):
    args = ["--workdir", flux[1], "--size", 32, "--guidance", 2, "--out", tmp_path / "x.png"]
    args += ["--num", 2, "--config.data.source=synthetic", "--steps", 1]
    sample.main([str(arg) for arg in (*args, "--npz", tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["guidance"].tolist() == [2, 2] and arrays["text"].shape == (2, 512, 16)


BAD = [
    (
        ["--size", "1000"],
        "--size 1000: this model draws multiples of 16 pixels; the nearest is 992",
    ),
    (
        ["--size", "30x70"],
        "--size 30x70: this model draws multiples of 16 pixels; the nearest is 3",
    ),
    (["--size", "big"], "--size 'big' is no size"),
    (["--guidance", "-1"], "--guidance -1.0 is not in 0..1000"),
    (["--guidance", "nan"], "--guidance nan is not in 0..1000"),
    (["--prompts", "{tmp}/prompts.txt"], "--prompt and --prompts both say what to draw"),
    (["--labels", "3"], "--prompt and --labels do not go together"),
    (["--num-per-class", "3"], "--prompt and --num-per-class do not go together"),
    (["--num-per-prompt", "0"], "--num-per-prompt and --batch must be at least 1"),
    (["--prompt", "b", "--num", "1"], "1 images are fewer than the 2 prompts"),
    (["--prompt", "\udcff"], "is no text in UTF-8"),
    (["--text-encoders", "{tmp}/absent"], "no tokenizer at {tmp}/absent/tokenizer_2"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_an_impossible_wish_writes_nothing(flux, tmp_path, capfd, args, message):
    args = ["--workdir", flux[1], "--prompt", "a", "--size", "32", "--out", tmp_path / "x", *args]
    args = [str(arg).replace("{tmp}", str(tmp_path)).replace("/x", "/x.png") for arg in args]
    assert message.replace("{tmp}", str(tmp_path)) in cli.refused(capfd, sample.main, args)
    assert not any(tmp_path.iterdir())


def test_files_of_prompts(flux, tmp_path, capfd):
    path = tmp_path / "prompts.txt"
    args = ["--workdir", str(flux[1]), "--out", str(tmp_path / "x.png"), "--prompts", str(path)]
    for data, message in (
        (None, f"no file of prompts at {path}"),
        (b"\n \n", f"{path} has no prompts: write one a line"),
        (b"a\xff", f"{path} is no text in UTF-8"),
        (b"a\0b", "is no prompt: write a text"),
        (b"a" * 2**20 + b"b", f"{path} is larger than 1,048,576 bytes"),
    ):
        if data is not None:
            path.write_bytes(data)
        assert message in cli.refused(capfd, sample.main, args)
    assert not (tmp_path / "x.png").exists()


def test_without_a_guidance_scale_or_encoders(flux, schnell, tmp_path, capfd):
    """[schnell] was not distilled with guidance scales."""
    args = ["--prompt", "a", "--size", "32", "--out", str(tmp_path / "x.png"), "--workdir"]
    refused = cli.refused(capfd, sample.main, [*args, str(schnell), "--guidance", "3.5"])
    assert "--guidance: this model was not distilled with a guidance scale" in refused
    bare = shutil.copytree(flux[1], tmp_path / "run")
    config = configs.load_json(bare / "config.json", ["data.text_encoders="])
    configs.save_json(config, bare / "config.json")
    message = "prompts need the text encoders of FLUX.1: name the folder of its pipeline"
    assert message in cli.refused(capfd, sample.main, [*args, str(bare)])
    assert not (tmp_path / "x.png").exists()


# What lies where a shard or a file should be, as a refused or half download leaves it (None:
# nothing), and the message.
DAMAGED = [
    (0, None, "names shards that are not beside it"),
    (1, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "is a pointer of Git LFS"),
    (0, b"<!DOCTYPE html>\n<html>log in</html>", "is the answer of a server ('<!DOCTYPE html>"),
    (1, b"Access to model black-forest-labs/FLUX.1-dev is restricted.", "agree to the terms"),
]
DAMAGED_ENCODERS = [
    ("text_encoder_2/model.safetensors", b"version https://git-lfs", "is a pointer of Git LFS"),
    ("text_encoder_2/config.json", b"<html>", "config.json is the answer of a server"),
    ("text_encoder/model.safetensors", None, "should hold one weight file"),
    ("tokenizer_2/spiece.model", None, "no tokenizer at"),
    ("tokenizer/merges.txt", None, "no tokenizer at"),
    ("tokenizer/vocab.json", b"version https://git-lfs", "is a pointer of Git LFS"),
]


def damage(flux, tmp_path, place, data):
    folder = shutil.copytree(flux[0], tmp_path / "damaged")
    (folder / place).unlink()
    if data is not None:
        (folder / place).write_bytes(data)
    return folder


@pytest.mark.parametrize("shard, data, message", DAMAGED)
def test_a_download_that_is_not_whole_is_not_imported(flux, tmp_path, shard, data, message):
    folder = damage(flux, tmp_path, f"transformer/{flux_folder.SHARDS[shard]}", data)
    with pytest.raises(UserError) as caught:
        transfer.import_folder("flux_diffusers", folder, tmp_path / "run")
    assert message in str(caught.value) and flux_folder.SHARDS[shard] in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place, data, message", DAMAGED_ENCODERS)
def test_text_encoders_that_are_not_whole(flux, tmp_path, capfd, place, data, message):
    folder = damage(flux, tmp_path, place, data)
    args = ["--workdir", flux[1], "--prompt", "a", "--size", 32, "--text-encoders", folder]
    args += ["--out", tmp_path / "x.png"]
    refused = cli.refused(capfd, sample.main, [str(arg) for arg in args])
    assert message in refused and str(folder / place.split("/")[0]) in refused
    assert not (tmp_path / "x.png").exists()
