"""`evaluate --prompts` and `sample --save-images`: scores, folders for scorers, stopped, resumed.

A FLUX that reads digits and was trained for two steps; a CLIP of random weights.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from moe_diffusion import evaluate, sample, train
from moe_diffusion.evaluation import inception, prompt_scores, scorers
from moe_diffusion.evaluation.images import FolderImages
from moe_diffusion.interop import clip
from moe_diffusion.sampling import layouts, saved
from tests import cli
from tests.golden.inception import recipe, shrink
from tests.interop import clip_folder
from tests.sampling import flux_folder
from tests.test_flux_demo import TINY

PROMPTS = ["a handwritten seven", "three", "the digit 5 , written by hand"]
GENEVAL = [{"tag": "colors", "include": [], "prompt": text} for text in PROMPTS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CLIP and files of prompts beside each other."""
    folder = tmp_path_factory.mktemp("scores")
    clip_folder.write(folder / "clip")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    (folder / "dpg").mkdir()
    for number, text in enumerate(PROMPTS):
        (folder / "dpg" / f"{number}.txt").write_text(text)
    table = {f"id{n}": {"category": "food", "prompt": text} for n, text in enumerate(PROMPTS)}
    (folder / "meta_data.json").write_text(json.dumps(table))
    table = [{"id": f"{n}-0", "prompt": text} for n, text in enumerate(PROMPTS)]
    (folder / "bench.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def trained(files):
    """The same folder, with a workdir in it."""
    keys = [f"--config.{key}={value}" for key, value in TINY.items()]
    train.main(["--config", "configs/digits_flux.py", "--workdir", str(files / "run"), *keys])
    return files


def measure(folder, capsys, *args):
    """The result of a call on the run, and what it printed before."""
    fixed = ["--workdir", folder / "run", "--batch", 4]
    evaluate.main([str(arg) for arg in (*fixed, *args, "--json")])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


class Stop(BaseException):
    """Stands for a kill."""


def stopped_after(monkeypatch, kind, name, calls):
    """Lets a method work so many times, and then stops the command."""
    method, made = getattr(kind, name), []

    def counted(*args, **kwargs):
        if len(made) == calls:
            raise Stop
        made.append(1)
        return method(*args, **kwargs)

    monkeypatch.setattr(kind, name, counted)


@pytest.mark.slow
def test_scores_of_prompts(trained, capsys):
    """CLIP score, the digits' judge and Fréchet distance, with all that they depend on."""
    args = ["--prompts", trained / "prompts.txt", "--clip", trained / "clip"]
    args += ["--images-per-prompt", 2]
    result, lines = measure(trained, capsys, *args)
    found = result["metrics"]
    assert {"clip_score", "clip_s", "prompt_accuracy", "fd_digits"} <= found.keys()
    assert found["clip_s"] == pytest.approx(found["clip_score"] / 40)
    told = result["prompts"]
    assert (told["file"], told["count"], len(told["sha256"])) == ("prompts.txt", 3, 64)
    assert result["num_samples"] == 6 and result["resolution"] == "8x8" and "labels" not in result
    assert (result["sampler"], result["steps"], result["cfg"]) == ("euler", 1, 1.0)
    encoder = clip.load(trained / "clip")
    assert result["clip"]["fingerprint"] == encoder.fingerprint and result["clip"]["name"] == "clip"
    assert result["clip"]["clip_score"] == "mean of 100 max(cos, 0)"
    assert lines[-1].startswith("clip_score ") and "; resolution 8x8" in lines[-1]
    assert not (trained / "run" / prompt_scores.FOLDER).exists()
    kept = (trained / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(kept[-1]) == result


@pytest.mark.slow
def test_a_score_of_saved_pictures_is_the_same(trained, tmp_path, capsys):
    """The files hold what was scored: their CLIP score by hand; images are those of `sample`."""
    out = tmp_path / "flat"
    args = ["--prompts", trained / "prompts.txt", "--images-per-prompt", 2, "--clip"]
    result, _ = measure(trained, capsys, *args, trained / "clip", "--save-images", out)
    told = json.loads((out / "prompts.json").read_text())
    assert list(told) == [f"{n:06}.png" for n in range(6)] and told["000005.png"] == PROMPTS[2]
    pictures = next(FolderImages(out).batches(6, 6))
    encoder = clip.load(trained / "clip")
    vectors = encoder.of_texts([told[f"{n:06}.png"] for n in range(6)])
    cosines = (encoder.of_pictures(pictures) * vectors).sum(-1)
    by_hand = 100 * np.maximum(cosines, 0).mean()
    assert result["metrics"]["clip_score"] == pytest.approx(by_hand, abs=1e-4)
    other = tmp_path / "other"
    fixed = ["--workdir", trained / "run", "--prompts", trained / "prompts.txt"]
    sample.main(list(map(str, [*fixed, "--num-per-prompt", 2, "--save-images", other])))
    for path in sorted(out.glob("*.png")):
        with Image.open(path) as a, Image.open(other / path.name) as b:
            assert np.array_equal(a, b) and b.text["prompt"] == a.text["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name", [(scorers.ClipScore, "rows"), (prompt_scores.Records, "write")]
)
def test_stopped_and_resumed(kind, name, trained, tmp_path, capsys, monkeypatch):
    """Killed in the second of two batches, while scoring or keeping; the next call draws one."""
    args = ["--prompts", trained / "geneval.jsonl", "--benchmark", "geneval"]
    args += ["--clip", trained / "clip", "--num", 16, "--layout", "geneval", "--save-images"]
    wanted, _ = measure(trained, capsys, *args, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, kind, name, 1)
        with pytest.raises(Stop):
            measure(trained, capsys, *args, tmp_path / "images")
    (records,) = (trained / "run" / prompt_scores.FOLDER).iterdir()
    assert [path.name for path in records.iterdir()] == ["rows_000000000.npz"]
    drawn = []
    rows = scorers.ClipScore.rows
    with monkeypatch.context() as patch:
        patch.setattr(
            scorers.ClipScore, "rows", lambda s, i, t: drawn.append(len(i)) or rows(s, i, t)
        )
        found, _ = measure(trained, capsys, *args, tmp_path / "images")
    assert found == wanted and sum(drawn) == 16 - 8  # batches of 8, one a device
    whole, resumed = (cli.contents(tmp_path / n) for n in ("whole", "images"))
    assert whole == resumed


@pytest.mark.slow
def test_a_damaged_record_and_a_lost_picture_are_made_again(trained, tmp_path, capsys, monkeypatch):
    args = ["--prompts", trained / "prompts.txt", "--clip", trained / "clip", "--num", 24]
    args += ["--save-images", tmp_path / "images"]
    wanted, _ = measure(trained, capsys, *args)
    before = cli.contents(tmp_path / "images")
    for spoil in ("record", "picture"):
        with monkeypatch.context() as patch:
            patch.setattr(prompt_scores.Records, "remove", lambda self: None)
            measure(trained, capsys, *args)
        (records,) = (trained / "run" / prompt_scores.FOLDER).iterdir()
        assert len(list(records.iterdir())) == 3
        if spoil == "record":
            (records / "rows_000000008.npz").write_bytes(b"PK")
        else:
            (tmp_path / "images" / "000009.png").unlink()
        found, _ = measure(trained, capsys, *args)
        assert found == wanted and cli.contents(tmp_path / "images") == before


@pytest.mark.slow
def test_layouts_of_scorers(trained, tmp_path, capsys):
    """Each folder as its scorer reads it, from `sample`; a second call draws nothing."""

    def draw(name, file, *args, benchmark=None):
        out = tmp_path / name
        fixed = ["--workdir", trained / "run", "--prompts", trained / file, "--batch", 4]
        fixed += ["--benchmark", benchmark or name, "--save-images", out, "--json", *args]
        sample.main(list(map(str, fixed)))
        first = json.loads(capsys.readouterr().out.splitlines()[-1])
        before = cli.contents(out)
        sample.main(list(map(str, fixed)))
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (first["drawn"], last["drawn"]) == (first["num"], 0)
        assert cli.contents(out) == before and first["layout"] == name
        return out, {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}

    hidden = layouts.MADE_WITH
    out, names = draw("geneval", "geneval.jsonl")
    assert names == {hidden} | {
        f"0000{n}/{name}" for n in range(3) for name in
        ("metadata.jsonl", *(f"samples/000{k}.png" for k in range(4)))
    }  # fmt: skip
    assert json.loads((out / "00002" / "metadata.jsonl").read_text()) == GENEVAL[2]
    single = [np.asarray(Image.open(out / f"00001/samples/000{k}.png")) for k in range(4)]

    out, names = draw("dpg", "dpg")
    assert names == {hidden, "0.png", "1.png", "2.png"} and not (out / layouts.PARTS).exists()
    grid = np.asarray(Image.open(out / "1.png"))
    assert grid.shape == (16, 16)
    rows = [np.concatenate(single[:2], 1), np.concatenate(single[2:], 1)]
    np.testing.assert_array_equal(grid, np.concatenate(rows))  # the same seed and numbers

    _, names = draw("t2i_compbench", "prompts.txt", "--num-per-prompt", 2)
    assert names == {hidden} | {f"samples/{PROMPTS[n // 2]}_{n:06}.png" for n in range(6)}

    _, names = draw("mjhq", "meta_data.json")
    assert names == {hidden, "food/id0.png", "food/id1.png", "food/id2.png"}

    out, names = draw("imagereward", "bench.json", "--num-per-prompt", 2)
    images = {f"images/{n}-0_{k}.png" for n in range(3) for k in range(2)}
    assert names == {hidden, "prompts.json"} | images
    told = json.loads((out / "prompts.json").read_text())
    assert told[1] == {
        "id": "1-0", "prompt": "three", "generations": ["images/1-0_0.png", "images/1-0_1.png"]
    }  # fmt: skip
    out, _ = draw("mps", "bench.json")
    assert json.loads((out / "prompts.json").read_text())[2]["image_path"] == ["images/2-0_0.png"]


@pytest.mark.slow
def test_a_grid_that_was_stopped(trained, tmp_path, monkeypatch):
    """Killed within a grid of DPG-Bench: images of it that are there are not lost."""
    args = ["--workdir", trained / "run", "--prompts", trained / "dpg", "--benchmark", "dpg"]
    args = list(map(str, [*args, "--batch", 3, "--save-images"]))
    sample.main([*args, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stopped_after(patch, saved.Folder, "write", 2)
        with pytest.raises(Stop):
            sample.main([*args, str(tmp_path / "a")])
    assert len(list((tmp_path / "a" / layouts.PARTS).iterdir())) == 2  # of six images
    sample.main([*args, str(tmp_path / "a")])
    assert cli.contents(tmp_path / "a") == cli.contents(tmp_path / "whole")


BAD = [
    (["--clip", "{t}/clip"], "--clip needs --prompts, a file of them"),
    (["--prompts", "{t}/prompts.txt", "--benchmark", "mjhq"], "is no file of prompts of mjhq"),
    (["--prompts", "{t}/absent.txt"], "no file of prompts at {t}/absent.txt"),
    (["--prompts", "{t}/prompts.txt", "--clip", "{t}/dpg"], "should hold one weight file"),
    (["--prompts", "{t}/prompts.txt", "--labels", "random"], "both say what to draw"),
    (["--prompts", "{t}/prompts.txt", "--num", "2"], "--num 2 are fewer than the 3 prompts"),
    (["--prompts", "{t}/prompts.txt", "--layout", "flat"], "--layout is of --save-images"),
    (["--prompts", "{t}/prompts.txt", "--images-per-prompt", "0"], "must be at least 1"),
    (
        ["--prompts", "{t}/prompts.txt", "--save-images", "{t}/x", "--layout", "geneval"],
        "--layout geneval names what only prompts of geneval have",
    ),
    (
        ["--prompts", "{t}/dpg", "--benchmark", "dpg", "--num", "6", "--save-images", "{t}/x"],
        "--layout dpg has 4 images of each prompt, not 6 of 3",
    ),
    (["--prompts", "{t}/prompts.txt", "--save-images", "{t}/dpg"], "{t}/dpg is not empty"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args[1:]) for args, _ in BAD])
def test_what_is_refused(args, message, files, capfd):
    """Before the run is looked at."""
    before = cli.contents(files)
    given = [arg.replace("{t}", str(files)) for arg in args]
    refused = cli.refused(capfd, evaluate.main, ["--workdir", files / "absent", *given])
    assert message.replace("{t}", str(files)) in refused
    assert cli.contents(files) == before


@pytest.mark.slow
def test_what_is_refused_of_a_run(trained, tmp_path, capfd):
    args = ["--workdir", trained / "run", "--prompts", trained / "prompts.txt", "--save-images"]
    args = list(map(str, [*args, tmp_path / "a"]))
    sample.main(args)
    before = cli.contents(tmp_path)
    refused = cli.refused(capfd, sample.main, [*args, "--seed", "1"])
    assert f"{tmp_path}/a has images of other settings (seed: '0' instead of '1')" in refused
    refused = cli.refused(capfd, sample.main, [*args, "--out", "x.png", "--npz", "x.npz"])
    assert "--save-images and --npz do not go together" in refused
    args = ["--workdir", trained / "run", "--prompts", trained / "prompts.txt", "--guidance", 3]
    assert "was not distilled with a guidance" in cli.refused(capfd, evaluate.main, args)
    assert cli.contents(tmp_path) == before


def test_prompts_that_cannot_be_names(files, tmp_path, capfd):
    """T2I-CompBench knows pictures by their prompts, up to the first underscore."""
    for text in ("a cat/dog", "a_cat", "../x", "é" * 130):
        path = tmp_path / "color_val.txt"
        path.write_text(f"three\n{text}\n")
        args = ["--workdir", files / "absent", "--prompts", path, "--benchmark", "t2i_compbench"]
        refused = cli.refused(capfd, sample.main, [*args, "--save-images", tmp_path / "x"])
        assert "cannot be the name of a picture, by which T2I-CompBench knows it" in refused
    table = {"a": {"category": "../b", "prompt": "three"}}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    args = ["--workdir", files / "absent", "--prompts", tmp_path / "meta_data.json"]
    args += ["--benchmark", "mjhq", "--save-images", tmp_path / "x"]
    assert "'../b' is no plain name" in cli.refused(capfd, sample.main, args)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_latents_text_encoders_and_inception(files, tmp_path, capsys, monkeypatch):
    """A FLUX.1 whose text encoders and autoencoder come from a pipeline; FID against a folder."""
    shrink(monkeypatch)
    save_file(recipe(inception.tensor_shapes(), seed=0), tmp_path / "inception.safetensors")
    folder = flux_folder.write(tmp_path / "FLUX.1-tiny")
    workdir = flux_folder.convert(folder, tmp_path / "run")
    (tmp_path / "real").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "real" / f"{number}.png")
    args = ["--workdir", workdir, "--vae", folder, "--prompts", files / "prompts.txt"]
    args += ["--config.model.image_size=4", "--steps", 2, "--images-per-prompt", 2]
    args += ["--clip", files / "clip", "--reference", tmp_path / "real", "--guidance", 2]
    args += ["--inception", tmp_path / "inception.safetensors", "--json"]
    evaluate.main(list(map(str, args)))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"clip_score", "clip_s", "fid", "sfid", "kid", "precision"} <= result["metrics"].keys()
    assert "prompt_accuracy" not in result["metrics"]
    assert (result["guidance"], result["resolution"], result["num_samples"]) == (2.0, "32x32", 6)
    assert result["reference"]["count"] == 9 and result["autoencoder"]["name"]


@pytest.mark.slow
def test_a_sweep(trained, capsys, monkeypatch):
    """Two averages are two results; those that are done are kept until all are."""
    args = ["--prompts", trained / "prompts.txt", "--ema", "0.999,none", "--num", 8]
    with monkeypatch.context() as patch:
        stopped_after(patch, scorers.PromptedDigit, "rows", 1)
        with pytest.raises(Stop):
            measure(trained, capsys, *args)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stopped_after(patch, scorers.PromptedDigit, "rows", 1)
        result, _ = measure(trained, capsys, *args)
    first, second = result["results"]
    assert (first["ema"], second["ema"]) == ("0.999", "none")
    assert first["metrics"]["fd_digits"] != second["metrics"]["fd_digits"]
    assert not (trained / "run" / prompt_scores.FOLDER).exists()


@pytest.mark.slow
def test_a_killed_process(trained, tmp_path):
    """SIGKILL after some of 100 batches; the second process draws the others, and says the same."""
    args = ["--workdir", trained / "run", "--prompts", trained / "prompts.txt", "--num", 200]
    args += ["--clip", trained / "clip", "--batch", 2, "--json", "--save-images"]
    wanted = json.loads(cli.succeed("evaluate", *args, tmp_path / "whole").splitlines()[-1])
    with cli.started("evaluate", *args, tmp_path / "images") as process:
        place = trained / "run" / prompt_scores.FOLDER
        end = time.monotonic() + cli.HANGS_AFTER
        while len(list(place.glob("*/rows_*.npz"))) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.wait()
    there = len(list(place.glob("*/rows_*.npz")))
    assert 5 <= there < 100 and len(list((tmp_path / "images").glob("*.png"))) < 200
    again = cli.succeed("evaluate", *args, tmp_path / "images")
    assert json.loads(again.splitlines()[-1]) == wanted
    whole, resumed = (cli.contents(tmp_path / name) for name in ("whole", "images"))
    assert whole == resumed
