"""`prepare --captions`: pictures and prompts become latents with the fields of FLUX.1."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from moe_diffusion import digests, prepare, train
from moe_diffusion.data.latents import Latents
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.errors import UserError
from moe_diffusion.interop.prompts import PromptEncoders
from moe_diffusion.preparing.captions import Captioned, open_pairs
from tests import cli, pictures
from tests.data import test_latents
from tests.interop import pipeline_folder
from tests.preparing import caption_places
from tests.preparing.scenes import Scenes

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


def test_training_with_other_encoders_is_refused(inputs, prepared, tmp_path, capfd):
    """Before anything is written; without a T5 it is not known which one would be used."""
    other = shutil.copytree(inputs[1].parent / "flux", tmp_path / "other")
    shutil.rmtree(other / "text_encoder")  # it is not reached
    pipeline_folder.replace_t5(other, seed=1)
    changes = {"model.image_size": 2, "model.channels": 4, "model.flux.text_width": 16}
    changes |= {"model.flux.text_tokens": 6, "model.flux.pooled_width": 16}
    changes |= {"model.flux.text_dtype": "bfloat16", "data.source": f"latents:{prepared[1]}"}
    args = ["--config", "configs/flux_tiny.py", "--workdir", str(tmp_path / "run")]
    args += [f"--config.{key}={value}" for key, value in changes.items()]
    message = f"the field text of data.source=latents:{prepared[1]} was made by another text enc"
    encoders = f"--config.data.text_encoders={other}"
    assert message in cli.refused(capfd, train.main, [*args, encoders])
    longer = "--config.model.flux.text_tokens=7"
    message = "has the field 'text' as bfloat16[6, 16], the model takes bfloat16[7, 16]"
    assert message in cli.refused(capfd, train.main, [*args, longer])
    assert not (tmp_path / "run").exists()


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
def test_bad_metadata(inputs, tmp_path, line, message):
    _, folder = inputs
    (tmp_path / "a").symlink_to(folder / "a")
    path = tmp_path / "metadata.jsonl"
    path.write_text((folder / "metadata.jsonl").read_text().rstrip() + f"\n{line}\n")
    with pytest.raises(UserError) as caught:
        open_pairs(str(tmp_path), skip_broken=False)
    assert message.format(path) in str(caught.value)


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


# --- several captions, a mask, and what is left out -----------------------------------------------


@pytest.fixture(scope="module")
def several(inputs, tmp_path_factory):
    """Three captions an image, with a mask and without CLIP: the arguments, and the folder.

    The first image has two captions, the second one, and the third four. Four are unusable.
    """
    args, folder = inputs
    root = tmp_path_factory.mktemp("several")
    bare = shutil.copytree(folder.parent / "flux", root / "flux")
    shutil.rmtree(bare / "text_encoder")
    shutil.rmtree(bare / "tokenizer")
    rows = [
        {"file_name": "0.png", "captions": ["a handwritten seven", "seven"]},
        {"file_name": "1.png", "text": "three", "captions": ["three"]},
        {"file_name": "2.png", "captions": ["the", "digit", "the digit", "a digit"]},
        {"file_name": "small.png", "text": "a digit"},
        {"file_name": "broken.png", "text": "a digit"},
        {"file_name": "0.png", "text": " "},
        {"file_name": "none.png", "text": "a digit"},
    ]
    for number in range(3):
        Image.new("RGB", (16 + number, 16), (80 * number, 9, 9)).save(root / f"{number}.png")
    Image.new("RGB", (300, 15)).save(root / "small.png")
    (root / "broken.png").write_bytes(b"no picture")
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [*args, "--captions", f"folder:{root}", "--text-encoders", str(bare), "--text-mask"]
    args += ["--no-pooled", "--captions-per-image", "3", "--min-size", "16", "--shard-size", "4"]
    args += ["--out", str(root / "out")]
    prepare.main([*args, "--skip-broken"])
    return args, Latents(str(root / "out"))


def test_one_of_several_captions_is_drawn(several):
    """Each as often as the others, the same for all fields; a function of seed and position."""
    _, source = several
    assert source.cond_spec.keys() == {"text", "text_mask"}
    assert source.cond_spec["text"].shape == (6, 16)
    assert source.manifest["captions"] == {"per_image": 3, "fields": ["text", "text_mask"]}
    stored = source.take_stored(np.arange(3))
    assert stored["text"].shape == (3, 3, 6, 16) and stored["captions"].tolist() == [2, 1, 3]
    lengths = [[4, 2, 4], [2, 2, 2], [2, 2, 3]]  # of words and </s>; two captions are repeated
    assert stored["text_mask"].sum(-1).tolist() == lengths
    first = source.take(np.arange(3))
    assert first.keys() == {"image", "text", "text_mask"} and first["text_mask"].dtype == bool
    np.testing.assert_array_equal(first["text"], stored["text"][:, 0])

    wide = source.take_stored(np.tile(np.arange(3), 200))
    drawn = source.draw_captions(wide, range(600), seed=5)
    assert drawn["text"].dtype == ml_dtypes.bfloat16 and drawn["text"].shape == (600, 6, 16)
    numbers = []
    for row in range(600):
        same = (wide["text"][row] == drawn["text"][row]).all((1, 2))
        assert (wide["text_mask"][row][same] == drawn["text_mask"][row]).all()
        numbers.append(int(same.argmax()))
    counts = [np.bincount(numbers[image::3], minlength=3) for image in range(3)]
    assert counts[1].tolist() == [200, 0, 0] and counts[0][2] == 0
    assert all(abs(count - 100) < 25 for count in counts[0][:2])
    assert all(abs(count - 67) < 25 for count in counts[2])
    part = {name: values[40:50] for name, values in wide.items()}
    part = source.draw_captions(part, range(40, 50), seed=5)
    np.testing.assert_array_equal(part["text"], drawn["text"][40:50])
    other = source.draw_captions(wide, range(600), seed=6)
    assert (other["text"] != drawn["text"]).any()


def test_batches_of_several_captions_resume_exactly(several):
    """Two processes have the two halves of the batches of one, from any batch on."""
    _, source = several
    made = []

    def batches(size, index=0, count=1, start=0):
        data = SimpleNamespace(batch_size=size, augment="none", num_workers=0, prefetch=1)
        iterator = make_iterator(source, data, seed=3, process_index=index, process_count=count)
        made.append(iterator)
        iterator.set_state({"next_index": start})
        return iterator

    whole = batches(6)
    expected = [next(whole) for _ in range(4)]
    assert expected[0].keys() == {"image", "text", "text_mask"}
    halves = [batches(6, index, 2, start=2) for index in range(2)]
    for batch in expected[2:]:
        parts = [next(half) for half in halves]
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)
    for iterator in made:
        iterator.close()


def test_a_masked_text_does_not_depend_on_its_padding(several):
    args, source = several
    folder = args[len(args) - args[::-1].index("--text-encoders")]
    batch = source.take(np.arange(3))
    longer = PromptEncoders(folder, 9, mask=True, pooled=False).encode(["three"])
    assert longer.keys() == {"text", "text_mask"} and longer["text_mask"].sum() == 2
    np.testing.assert_allclose(
        np.float32(longer["text"][0, :2]), np.float32(batch["text"][1, :2]), rtol=2e-2, atol=1e-3
    )
    described = source.manifest["text"]
    assert described.keys() == {"text"} and described["text"]["mask"] == "text_mask"


def test_the_empty_prompt_is_stored(several, prepared, tmp_path, capfd):
    args, source = several
    folder = args[len(args) - args[::-1].index("--text-encoders")]
    made = PromptEncoders(folder, 6, mask=True, pooled=False).encode([""])
    assert source.null.keys() == {"text", "text_mask"} and source.null["text_mask"].sum() == 1
    for name, values in made.items():
        assert source.null[name].dtype == values.dtype
        np.testing.assert_array_equal(source.null[name], values[0], err_msg=name)
    with_pooled = Latents(prepared[1])
    assert {name: value.shape for name, value in with_pooled.null.items()} == {
        "text": (6, 16),
        "pooled": (16,),
    }
    assert "captions" not in with_pooled.manifest
    copy = shutil.copytree(prepared[1], tmp_path / "copy")
    path = copy / with_pooled.manifest["null"]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = f"{path} is not what manifest.json says: copy the folder again"
    assert message in cli.refused(capfd, prepare.main, ["--verify", "--out", str(copy)])
    path.unlink()
    with pytest.raises(UserError, match="empty_prompt.bin cannot be read"):
        Latents(str(copy))


def test_what_a_manifest_says_of_captions(several, tmp_path):
    """A wrong value is refused, or changes no text that is read."""
    args, source = several
    copy = Path(shutil.copytree(args[-1], tmp_path / "copy"))
    path, indices = copy / "manifest.json", np.arange(3)
    manifest, expected = source.manifest, source.take(indices)
    counts = {"refused": 0, "taken": 0}
    entries = {key: manifest[key] for key in ("captions", "null", "text", "skipped_by_reason")}
    for place in test_latents.places(entries):
        for mutant in (*test_latents.MUTANTS, ["text", "text"], ["guidance"]):
            changed = json.loads(json.dumps(manifest))
            holder = changed
            for step in place[:-1]:
                holder = holder[step]
            holder[place[-1]] = mutant
            path.write_text(json.dumps(digests.seal(changed)))
            try:
                found = Latents(str(copy))
                batch = found.take(indices)
            except UserError as error:
                assert str(copy) in str(error), (place, mutant, error)
                counts["refused"] += 1
                continue
            counts["taken"] += 1
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name], values, err_msg=f"{place}: {mutant}")
            assert found.null.keys() <= source.null.keys(), (place, mutant)
    assert counts["refused"] > 3 * counts["taken"], counts


def test_a_folder_of_format_3(prepared, tmp_path):
    """It had no empty prompt, and did not count what was left out by reason."""
    copy = Path(shutil.copytree(prepared[1], tmp_path / "copy"))
    path, new = copy / "manifest.json", ("null", "skipped_by_reason")
    manifest = json.loads(path.read_text()) | {"format": 3}
    (copy / manifest["null"]["file"]).unlink()
    old = {key: value for key, value in manifest.items() if key not in new}
    path.write_text(json.dumps(digests.seal(old)))
    source, now = Latents(str(copy)), Latents(prepared[1])
    assert source.null == {} and source.text_encoders == now.text_encoders
    for name, values in now.take(np.arange(3)).items():
        np.testing.assert_array_equal(source.take(np.arange(3))[name], values)


def test_what_is_left_out_is_counted(several, capfd):
    args, source = several
    root = Path(args[-1]).parent
    reasons = {"broken text": 1, "no image": 1, "small image": 1, "unreadable image": 1}
    assert source.manifest["skipped_by_reason"] == reasons
    names = [f"{root}/small.png", f"{root}/broken.png"]
    metadata = f"{root}/metadata.jsonl"
    assert source.manifest["skipped"] == [*names, f"line 6 of {metadata}", f"line 7 of {metadata}"]
    args = [*args[:-1], str(root / "other")]
    assert f"line 6 of {metadata}: its text is empty" in cli.refused(capfd, prepare.main, args)
    assert not (root / "other").exists()
    lines = (root / "metadata.jsonl").read_text().splitlines(keepends=True)
    for line, message in (
        (3, "small.png has 15x300 pixels, and --min-size is 16: lower that, or leave out"),
        (4, "broken.png cannot be read as an image"),
    ):
        (root / "metadata.jsonl").write_text(lines[line])
        pairs = open_pairs(str(root), skip_broken=False)
        encoders = SimpleNamespace(cond_spec={})
        with pytest.raises(UserError, match=message):
            Captioned(pairs, (16, 16, 3), encoders, min_size=16).read(0)
    for flag, value, told in (
        ("--captions-per-image", "0", "--captions-per-image 0 is not in 1..255"),
        ("--min-size", "0", "--min-size 0 is no size"),
    ):
        assert told in cli.refused(capfd, prepare.main, [*args, flag, value])


@pytest.mark.slow
def test_other_kinds_are_prepared(inputs, tmp_path):
    """JourneyDB and a set of TensorFlow Datasets, with two captions an image."""
    args, folder = inputs
    caption_places.write_journeydb(tmp_path / "journeydb", 3)
    Scenes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    args = [*args, "--captions-per-image", "2", "--skip-broken", "--captions"]
    scenes = [f"tfds:{tmp_path}/scenes/1.0.0", "--caption-key", "captions.text"]
    for number, (kind, count) in enumerate((([f"journeydb:{tmp_path}/journeydb"], 3), (scenes, 2))):
        out = tmp_path / f"out{number}"
        prepare.main([*args, *kind, "--out", str(out)])
        source = Latents(str(out))
        assert len(source) == count
        assert source.take_stored(np.arange(count))["captions"].tolist() == [2] * count
