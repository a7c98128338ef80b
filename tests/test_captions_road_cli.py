"""The road from captions to pictures: a tar and a folder, records, training, prompts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from moe_diffusion import classes, prepare, sample, train
from moe_diffusion.data.latents import Latents
from tests import cli, pictures
from tests.interop import pipeline_folder
from tests.preparing import caption_places as places

pytestmark = pytest.mark.slow
STEPS, TOKENS, SIDE = 20, 8, 32


class Road(NamedTuple):
    """What differs from model to model: its config with changes, and flags of the commands."""

    config: str
    changes: dict[str, object]
    prepare: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


# Of every model: latents of 4 channels, texts of 8 tokens and 16 channels.
COMMON = {
    "model__image_size": SIDE // 8,
    "model__channels": 4,
    "data__batch_size": 8,
    "optim__eps": 1e-3,
    "train__num_steps": STEPS,
    "train__log_every": 1,
    "train__sample_every": 0,
    "train__eval_samples": 0,
    "checkpoint__every": 5,
    "sampling__steps": 2,
}
FLUX = {
    "model__flux__text_tokens": TOKENS,
    "model__flux__text_width": 16,
    "model__flux__text_dtype": "bfloat16",
    "model__flux__pooled_width": 16,
}
CROSS = {
    "model__depth": 2,
    "model__hidden_size": 32,
    "model__num_heads": 2,
    "model__moe__hidden_size": 16,
    "model__moe__num_experts": 4,
    "model__dtype": "float32",
    "model__remat": "none",
    "model__dit_t2i__text_tokens": TOKENS,
    "model__dit_t2i__text_width": 16,
    "model__dit_t2i__pooled_width": 16,
    "diffusion__cond_dropout": 0.5,  # the empty prompt takes part in every step
    "parallel__preset": "dp",
    "checkpoint__keep_every": 0,
}
ROADS = {
    "flux": Road("configs/flux_tiny.py", FLUX, ("--guidance", "3.5"), ("--guidance", "3.5")),
    "cross": Road("configs/diffmoe_t2i.py", CROSS, ("--text-mask",), ("--cfg", "2")),
}


only_cross = pytest.mark.parametrize("road", ["cross"], indirect=True)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tar and a folder of 30 images together, text encoders and an autoencoder.

    In the tar one picture is broken and one caption is empty; the folder is whole.
    """
    root = tmp_path_factory.mktemp("inputs")
    files = places.shard(0, 20)
    files["000000007.jpg"], files["000000013.txt"] = places.BROKEN, b""
    files["000000013.json"] = b"{}"
    places.write_tar(root / "tars" / "00000.tar", files)
    places.write_folder(root / "folder", 10)
    pipeline_folder.write(root / "encoders")
    pictures.write_autoencoder(root / "vae")
    return root


def prepare_args(inputs: Path, road: Road, captions: str, out: Path) -> list[str]:
    fixed = ["--captions", captions, "--text-encoders", str(inputs / "encoders")]
    fixed += ["--text-length", str(TOKENS), "--size", str(SIDE), "--vae", str(inputs / "vae")]
    fixed += ["--skip-broken", "--shard-size", "2", "--workers", "1", "--out", str(out)]
    return [*fixed, *road.prepare]


def train_args(inputs: Path, road: Road, latents: Path, workdir: Path, **changes) -> list[str]:
    values = {
        "data__source": f"latents:{latents}",
        "data__autoencoder": inputs / "vae",
        "data__text_encoders": inputs / "encoders",
    }
    values |= COMMON | road.changes | changes
    keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]
    return ["--config", road.config, "--workdir", str(workdir), *keys]


@pytest.fixture(scope="module", params=ROADS)
def road(request):
    return ROADS[request.param]


@pytest.fixture(scope="module")
def prepared(inputs, road, tmp_path_factory):
    """Both made in this process: of the tar, and of the folder."""
    out = tmp_path_factory.mktemp("prepared")
    tar, folder = f"webdataset:{inputs}/tars/{{00000..00000}}.tar", f"folder:{inputs}/folder"
    prepare.main([*prepare_args(inputs, road, tar, out / "tar"), "--shard-size", "20"])
    prepare.main([*prepare_args(inputs, road, folder, out / "folder"), "--shard-size", "20"])
    return out / "tar", out / "folder"


def test_records_of_a_tar_and_of_a_folder(inputs, prepared):
    tar, folder = (Latents(str(path)) for path in prepared)
    assert len(tar) == 18 and len(folder) == 10 and tar.cond_spec == folder.cond_spec
    assert tar.manifest["skipped_by_reason"] == {"broken text": 1, "unreadable image": 1}
    path = f"{inputs}/tars/00000.tar"
    assert tar.manifest["skipped"] == [f"{path}: 000000007", f"{path}: 000000013"]
    # The caption of an image comes again after five; no two of the five have the same states.
    texts = np.float32(tar.take(np.array([0, 1, 2, 3, 4, 5]))["text"])
    np.testing.assert_allclose(texts[0], texts[5], atol=1e-5)
    assert all(np.abs(texts[0] - other).max() > 1e-3 for other in texts[1:5])
    assert tar.null.keys() == tar.cond_spec.keys() - {"guidance"}
    if "text_mask" in tar.cond_spec:
        masks = tar.take(np.arange(18))["text_mask"]
        assert masks[:, 0].all() and tar.null["text_mask"].sum() == 1  # the end of the text


def test_a_tar_of_several_sizes(inputs, road, tmp_path):
    """Its pictures, also those that are left out, belong to the size of their shape."""
    args = prepare_args(inputs, road, f"webdataset:{inputs}/tars", tmp_path / "out")
    place = args.index("--size")
    args[place : place + 2] = ["--sizes", f"{SIDE}x{SIDE},{SIDE}x{2 * SIDE}"]
    prepare.main(args)
    found = Latents(str(tmp_path / "out"))
    assert [shape for shape, _ in found.buckets] == [(4, 4, 4), (4, 8, 4)]
    assert sum(count for _, count in found.buckets) == len(found) == 18
    assert found.manifest["skipped_by_reason"] == {"broken text": 1, "unreadable image": 1}
    assert found.null.keys() == found.cond_spec.keys() - {"guidance"}
    if road is not ROADS["cross"]:
        return
    changes = {"train__num_steps": 3, "checkpoint__every": 3}
    train.main(train_args(inputs, road, tmp_path / "out", tmp_path / "run", **changes))
    assert [line["step"] for line in cli.metrics(tmp_path / "run")] == [1, 2, 3]


@only_cross
def test_fine_tuning_begins_with_a_run_of_other_data(inputs, prepared, tmp_path, capfd):
    """Table 7's supervised fine-tuning: the same model, other captions; every array is kept."""
    road, (tar, folder) = ROADS["cross"], prepared
    first = tmp_path / "pretrained"
    train.main(train_args(inputs, road, tar, first, train__num_steps=5))
    tuned = road._replace(config="configs/diffmoe_t2i.py:stage=sft")
    changes = {"train__num_steps": 5, "init_from": first}
    capfd.readouterr()
    train.main(train_args(inputs, tuned, folder, tmp_path / "tuned", **changes))
    told = capfd.readouterr().out
    assert "init_from: all" in told and "arrays kept" in told
    args = train_args(inputs, tuned, folder, tmp_path / "other", **changes, model__patch_size=1)
    assert "model.patch_size: 2 there, 1 here" in cli.refused(capfd, train.main, args)
    train.main([*args, "--config.init.reset=auto"])
    told = capfd.readouterr().out
    assert "init_from: new: params/patch_embed/kernel\n" in told
    assert "init_from: kept: params/text_embed/dense_0/kernel\n" in told


def test_what_does_not_fit_is_refused_at_the_start(inputs, road, prepared, tmp_path, capfd):
    """Records of another length, other encoders or half a folder; nothing is written."""
    run, (_, folder) = tmp_path / "run", prepared
    copy = shutil.copytree(inputs / "encoders", tmp_path / "other")
    other = pipeline_folder.replace_t5(copy, seed=1)
    args = train_args(inputs, road, folder, run, data__text_encoders=other)
    message = f"the field text of data.source=latents:{folder} was made by another text encoder"
    assert message in cli.refused(capfd, train.main, args)
    length = next(key for key in road.changes if key.endswith("text_tokens"))
    args = train_args(inputs, road, folder, run, **{length: TOKENS + 1})
    message = f"has the field 'text' as bfloat16[{TOKENS}, 16], the model takes bfloat16[9, 16]"
    assert message in cli.refused(capfd, train.main, args)
    half = shutil.copytree(folder, tmp_path / "half")
    (half / "manifest.json").rename(half / "prepare.json")
    args = train_args(inputs, road, half, run)
    assert "is half prepared: run the same `prepare`" in cli.refused(capfd, train.main, args)
    assert not run.exists()


@only_cross
def test_prepare_is_killed_and_goes_on(inputs, road, tmp_path):
    """Of a tar: the same bytes as without the kill."""
    captions = f"webdataset:{inputs}/tars"
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    cli.succeed("prepare", *prepare_args(inputs, road, captions, undisturbed))
    args = prepare_args(inputs, road, captions, out)
    with cli.started("prepare", *args) as process:
        while len(done := list(out.glob("latents-*.json"))) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        process.kill()
    assert not (out / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    told = cli.succeed("prepare", *args)
    assert "left out: 1 for broken text\nleft out: 1 for unreadable image\n18 latents in" in told
    assert cli.contents(out) == cli.contents(undisturbed)
    finished = [path for path in times if out / f"{path.stem}.json" in done]
    assert finished and all(path.stat().st_mtime_ns == times[path] for path in finished)


@only_cross
def test_two_processes_make_the_same_folder(inputs, road, tmp_path):
    captions = f"folder:{inputs}/folder"
    cli.succeed("prepare", *prepare_args(inputs, road, captions, tmp_path / "one"))
    args = prepare_args(inputs, road, captions, tmp_path / "two")
    outputs = cli.together("prepare", *args, processes=2, optimize=False)
    assert "10 latents" in outputs[0] and "10 latents" not in outputs[1]
    assert cli.contents(tmp_path / "one") == cli.contents(tmp_path / "two")


@only_cross
def test_a_killed_run_resumes_and_draws_prompts(inputs, road, prepared, tmp_path, capfd):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    cli.succeed("train", *train_args(inputs, road, prepared[0], undisturbed))
    with cli.started("train", *train_args(inputs, road, prepared[0], workdir)) as process:
        cli.read_until(process, "step 12/")
        process.kill()
    assert 0 < max(cli.saved_steps(workdir)) < STEPS
    told = cli.succeed("train", *train_args(inputs, road, prepared[0], workdir))
    assert "resuming after step" in told
    assert cli.metrics(workdir) == cli.metrics(undisturbed)
    assert [line["step"] for line in cli.metrics(workdir)] == list(range(1, STEPS + 1))
    (state, data), (expected, _) = (cli.read_checkpoint(w, STEPS) for w in (workdir, undisturbed))
    assert data == {"next_index": STEPS}
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)

    known = classes.of_run(workdir).text
    assert known == json.loads((prepared[0] / "manifest.json").read_text())["text"]
    draw = ["--workdir", str(workdir), "--size", str(SIDE), "--out", str(tmp_path / "grid.png")]
    draw += ["--prompt", "a handwritten seven", "--prompt", "été: 七", *road.sample]
    sample.main([*draw, "--images", str(tmp_path / "drawn")])
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "drawn").iterdir())]
    assert [image.shape for image in drawn] == [(SIDE, SIDE, 3)] * 2
    assert (drawn[0] != drawn[1]).any()
    (tmp_path / "grid.png").unlink()

    # Other encoders than those of the training, also where its data is gone.
    copy = shutil.copytree(inputs / "encoders", tmp_path / "other")
    other = pipeline_folder.replace_t5(copy, seed=1)
    gone = ["--text-encoders", str(other), "--config.data.source=latents:/gone"]
    message = "the field text of the data that this model was trained with was made by another"
    assert message in cli.refused(capfd, sample.main, [*draw, *gone])
    assert not (tmp_path / "grid.png").exists()
