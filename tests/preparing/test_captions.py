"""`prepare --captions`: pictures and prompts become latents with the fields of FLUX.1."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from moe_diffusion import prepare
from moe_diffusion.data.latents import Latents
from moe_diffusion.interop.prompts import PromptEncoders
from tests import cli, pictures
from tests.interop import pipeline_folder

CAPTIONS = ["a handwritten seven", "the digit", "a three of the three digit", "three", "a digit"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments of the command but for --out, and the folder of the pictures."""
    root = tmp_path_factory.mktemp("captions")
    (root / "pictures" / "a").mkdir(parents=True)
    lines = []
    for i, text in enumerate(CAPTIONS):
        Image.new("RGB", (20, 24), (50 * i, 0, 0)).save(root / "pictures" / "a" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"a/{i}.png", "text": text, "source": "mine"}))
    (root / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    pipeline = pipeline_folder.write(root / "flux")
    vae = pictures.write_autoencoder(root / "vae")
    args = ["--text-encoders", pipeline, "--text-length", 6, "--size", 16, "--vae", vae]
    return [str(arg) for arg in args], root / "pictures"


@pytest.fixture(scope="module")
def prepared(inputs, tmp_path_factory):
    args, folder = inputs
    out = str(tmp_path_factory.mktemp("prepared") / "out")
    args = [*args, "--captions", str(folder), "--out", out, "--guidance", "3.5"]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        prepare.main(args)
    return args, out, errors.getvalue()


def test_what_the_records_hold(inputs, prepared):
    """The states of T5 in bf16, padding included, and CLIP's state at the end of each caption."""
    _, folder = inputs
    _, out, errors = prepared
    # The third caption has six words; the sixth token is </s>.
    assert "warning: a prompt of more than 6 tokens is cut; lost: digit\n" in errors
    source = Latents(str(out))
    batch = source.take(np.arange(len(CAPTIONS)))
    assert batch["text"].shape == (5, 6, 16) and batch["text"].dtype == ml_dtypes.bfloat16
    assert batch["pooled"].shape == (5, 16) and batch["pooled"].dtype == np.float32
    assert batch["guidance"].tolist() == [3.5] * 5 and not source.mirrored
    assert batch["image"].shape == (5, 2, 2, 4)

    encoders = PromptEncoders(folder.parent / "flux", 6)
    for name, field in encoders.encode(CAPTIONS).items():
        np.testing.assert_allclose(
            np.float32(batch[name]), np.float32(field), rtol=1e-5, atol=1e-5, err_msg=name
        )
    # Each caption has states of its own, and padding is not zero.
    assert len(np.unique(batch["pooled"].round(3), axis=0)) == len(CAPTIONS)
    assert (np.abs(np.float32(batch["text"][1, -1])) > 1e-3).any()
    described = source.manifest["text"]
    assert described["text"]["length"] == 6 and described["pooled"]["length"] == 12
    assert (
        described["text"]["encoder"] == "flux/text_encoder_2" and described["text"]["mask"] is None
    )
    assert source.manifest["source"] == f"captions:{folder}"


def test_other_encoders_do_not_continue_a_folder(prepared, capfd):
    args, out, _ = prepared
    before = cli.contents(Path(out))
    message = cli.refused(capfd, prepare.main, [*args, "--text-length", "5"])
    assert "was written with text = " in message and "choose another folder for --out" in message
    assert cli.contents(Path(out)) == before


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"file_name": "1.png"}', "line 6 of {} is no object with file_name and text"),
        ("a picture", "line 6 of {} is no object with file_name and text"),
        ('["a/1.png", "text"]', "line 6 of {} is no object with file_name and text"),
        (
            '{"file_name": "a/1.png", "text": 7}',
            "line 6 of {}: text is 7, no text and no",
        ),
        ('{"file_name": 7, "text": "a"}', "line 6 of {}: file_name is 7, no text"),
        ('{"file_name": "b.png", "text": "a"}', "line 6 of {} names 'b.png', which is not there"),
        (
            '{"file_name": "../b.png", "text": "a"}',
            "6 of {} names '../b.png', which leads out",
        ),
        ('{"file_name": "a/1.png", "text": " "}', "line 6 of {}: its text is empty"),
    ],
)
def test_bad_metadata(inputs, tmp_path, capfd, line, message):
    args, folder = inputs
    pictures_folder = tmp_path / "pictures"
    pictures_folder.mkdir()
    (pictures_folder / "a").symlink_to(folder / "a")
    path = pictures_folder / "metadata.jsonl"
    path.write_text((folder / "metadata.jsonl").read_text().rstrip() + f"\n{line}\n")
    args = [*args, "--captions", str(pictures_folder), "--out", str(tmp_path / "out")]
    assert message.format(path) in cli.refused(capfd, prepare.main, args)
    assert not (tmp_path / "out").exists()


def test_what_is_missing(inputs, tmp_path, capfd):
    args, folder = inputs
    out, encoders = ["--out", str(tmp_path / "out")], args.index("--text-encoders")
    bare = args[:encoders] + args[encoders + 2 :]
    with_captions = ["--captions", str(folder), *out]
    for given, message in (
        ([*args, *out], "give one of --source and --captions"),
        ([*args, *with_captions, "--source", "digits"], "give one of --source and --captions"),
        ([*bare, *with_captions], "--captions needs --text-encoders"),
        ([*args, *out, "--source", "digits"], "--text-encoders goes with --captions only"),
        ([*args, "--captions", str(folder / "a"), *out], "no metadata.jsonl in"),
        ([*args, *with_captions, "--text-encoders", str(folder)], "no tokenizer at"),
        ([*args, *with_captions, "--text-length", "0"], "a text of 0 tokens is not possible"),
    ):
        assert message in cli.refused(capfd, prepare.main, given)
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_broken(inputs, tmp_path, capfd):
    args, folder = inputs
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "x.png", "text": "a digit"}\n{"file_name": "y.png", "text": "three"}\n'
    )
    (tmp_path / "x.png").write_bytes(b"no picture")
    Image.new("RGB", (16, 16)).save(tmp_path / "y.png")
    args = [*args, "--captions", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):  # after the bar of the progress
        prepare.main(args)
    assert "error: " + str(tmp_path / "x.png") in capfd.readouterr().err
    prepare.main([*args, "--skip-broken"])
    manifest = Latents(str(tmp_path / "out")).manifest
    assert manifest["count"] == 1 and manifest["skipped"] == [str(tmp_path / "x.png")]
