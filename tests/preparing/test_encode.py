"""Writing latents: what the folder holds, even after interruptions, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_diffusion import digests
from moe_diffusion.data.latents import Latents
from moe_diffusion.errors import UserError
from moe_diffusion.preparing import encode
from tests import cli

from . import latents_folder as lib
from .latents_folder import COUNT


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Moments with flip."""
    folder = tmp_path_factory.mktemp("latents") / "out"
    return folder, lib.write(folder, lib.Images(COUNT), flip=True)


def test_the_manifest_says_what_is_there(prepared):
    folder, source = prepared
    shards = [shard["count"] for shard in source.manifest["shards"]]
    assert shards == [8, 8, 5] and source.manifest["count"] == COUNT
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"latents-{i:05}-of-00003.array_record" for i in range(3)),
        "manifest.json",
    ]
    # Mirroring changes nothing here; the variance is that of the means plus the Gaussian's.
    everything = lib.means(range(COUNT)).astype(np.float64)
    statistics = source.manifest["statistics"]
    np.testing.assert_allclose(statistics["mean"], everything.mean((0, 1, 2)), atol=1e-4)
    variance = everything.var((0, 1, 2)) + 0.01 * 0.5**2
    np.testing.assert_allclose(statistics["std"], np.sqrt(variance), rtol=1e-3)


def test_broken_images_are_left_out_and_listed(tmp_path):
    source = lib.write(tmp_path / "out", lib.Images(COUNT, broken=(*range(8, 16), 3)))
    assert len(source) == COUNT - 9
    assert source.manifest["skipped"] == ["image 3", *(f"image {i}" for i in range(8, 16))]
    assert [shard["count"] for shard in source.manifest["shards"]] == [7, 0, 5]
    rest = [i for i in range(COUNT) if i != 3 and not 8 <= i < 16]
    np.testing.assert_allclose(source.take(np.arange(12))["image"], lib.means(rest), atol=1e-3)
    everything = tmp_path / "broken"
    with pytest.raises(UserError, match="every image is broken"):
        lib.write(everything, lib.Images(COUNT, broken=tuple(range(COUNT))))


def test_any_number_of_processes_and_interruptions_make_the_same_folder(prepared, tmp_path):
    folder, _ = prepared
    images = lib.Images(COUNT)
    job = lib.job(tmp_path / "out", images, flip=True)
    assert encode.begin(job)
    encode.write_shards(job, 1, 2)  # the second of two processes: one shard
    with pytest.raises(UserError, match="half prepared: run the same `prepare` command again"):
        Latents(str(tmp_path / "out"))
    (tmp_path / "out" / ".latents-00002-of-00003.array_record.part").write_bytes(b"half")
    images.reads = 0
    assert encode.begin(job)
    encode.write_shards(job, 0, 1)
    assert images.reads == COUNT - 8  # what was finished is not read again
    encode.finish(job)
    assert cli.contents(tmp_path / "out") == cli.contents(folder)
    assert not encode.begin(job)  # finished


def test_other_settings_or_files_are_refused(prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(UserError, match="written with seed = 0, now it is 1: choose another fold"):
        encode.begin(lib.job(folder, lib.Images(COUNT), flip=True, seed=1))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files: choose an empty folder"):
        encode.begin(lib.job(tmp_path, lib.Images(COUNT)))


def test_not_finite_latents_stop_the_run(tmp_path):
    job = lib.job(tmp_path, lib.Images(COUNT))
    broken = encode.Job(**{**vars(job), "moments": lambda x: np.log(lib.moments(x) - 1)})
    assert encode.begin(broken)
    with (
        np.errstate(all="ignore"),
        pytest.raises(UserError, match="latents of records 0 to 3 are not finite"),
    ):
        encode.write_shards(broken, 0, 1)
    assert not list(tmp_path.glob("latents-*"))


def test_fields_that_do_not_fit_are_not_encoded(tmp_path):
    for name, wrong, message in (
        ("mask", np.float32(0), "record 0 of the data has the field 'mask', which the model do"),
        ("text", np.zeros((5, 3)), r"'text' as float64\[5, 3\], the model takes bfloat16\[5, 3\]"),
        ("tokens", np.array([9, 9], np.int16), "record 0 of the data has tokens 9, outside 0..6"),
    ):
        images = lib.Prompts(COUNT)
        good = images.cond
        images.cond = lambda i, n=name, w=wrong, good=good: good(i) | {n: w}
        with pytest.raises(UserError, match=message):
            lib.write(tmp_path / name, images)


def test_a_run_of_format_1_is_continued(tmp_path):
    """An unfinished one, too: the bytes of a record with one label are the same."""
    folder = tmp_path / "old"
    lib.write_format_1(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    settings = {k: manifest[k] for k in ("shape", "moments", "flip", "seed", "scale", "shift")}
    job = lib.job(folder, lib.Images(5), **settings, shard_size=8)
    assert "autoencoder" in job.settings
    del job.settings["autoencoder"]
    assert not encode.begin(job)
    (folder / "manifest.json").rename(folder / "prepare.json")
    assert encode.begin(job)
    job.settings["fields"][0]["num_values"] = 4
    with pytest.raises(UserError, match="was written with fields = .* choose another folder"):
        encode.begin(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "count is None, not an integer: delete it and latents-00001"),
        ({"file": "../x"}, "is not of the .* bytes of latents-00001"),
        ({"bytes": 1}, "is not of the .* bytes of latents-00001"),
        ({"sums": [[1.0]]}, "sums has 1 items, outside 2..2"),
        ({"sums": [[1.0, "x"], [1.0, 1.0]]}, r"sums\[0\]\[1\] is 'x', not a number"),
        ({"skipped": 3}, "skipped is 3, not a list"),
    ],
)
def test_a_damaged_note_is_named(change, message, tmp_path):
    """The manifest is made of the notes of the shards."""
    job = lib.job(tmp_path / "out", lib.Images(lib.COUNT))
    encode.begin(job)
    encode.write_shards(job, 0, 1)
    note = job.note(1)
    note.write_text(json.dumps(digests.seal(json.loads(note.read_text()) | change)))
    with pytest.raises(UserError, match=message):
        encode.finish(job)
    assert not (tmp_path / "out" / "manifest.json").exists()
