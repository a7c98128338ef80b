"""Prepared latents: what is stored, read, drawn; and folders that are not whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion.conditions import Field, cond_of
from moe_diffusion.data import pipeline, sources
from moe_diffusion.data.latents import Latents, describe_fields, record_of
from moe_diffusion.digests import seal
from moe_diffusion.errors import UserError
from moe_diffusion.preparing.verify import verify
from tests.preparing import latents_folder as lib
from tests.preparing.latents_folder import COUNT


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Moments with flip."""
    folder = tmp_path_factory.mktemp("latents") / "out"
    return folder, lib.write(folder, lib.Images(COUNT), flip=True)


@pytest.fixture
def batches():
    made = []

    def make(source, batch=6, *, augment="none", workers=0, index=0, count=1):
        data = SimpleNamespace(
            batch_size=batch * count, augment=augment, num_workers=workers, prefetch=1
        )
        made.append(
            pipeline.make_iterator(source, data, seed=3, process_index=index, process_count=count)
        )
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def test_records_are_the_means_in_order(prepared):
    _, source = prepared
    assert len(source) == COUNT and source.image_shape == (4, 4, 2)
    assert source.cond_spec == {"label": Field((), "int32", 3)}
    indices = np.array([20, 0, 8, 7, 20])
    batch = source.take(indices)
    np.testing.assert_array_equal(batch["label"], indices % 3)
    np.testing.assert_allclose(batch["image"], lib.means(indices), atol=1e-3)
    np.testing.assert_array_equal(source[8]["image"], batch["image"][2])
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32


def test_draws_are_of_the_moments(prepared):
    """Mean and deviation as stored, a function of the seed and the position in the batch."""
    _, source = prepared
    indices = np.tile(np.arange(COUNT), 5)
    stored = source.take_stored(indices)["image"]
    drawn = source.draw(stored, range(len(indices)), seed=1, flip=False)
    noise = (drawn - lib.means(indices)) / (0.1 * 0.5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    one, two = noise[:COUNT].ravel(), noise[COUNT : 2 * COUNT].ravel()
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.15
    part = source.draw(stored[40:50], range(40, 50), seed=1, flip=False)
    np.testing.assert_array_equal(part, drawn[40:50])
    assert not np.isin(source.draw(stored, range(len(indices)), 2, False), drawn).mean() > 0.01


def test_batches_are_drawn_anew_and_scaled(prepared, batches):
    iterator = batches(prepared[1], COUNT)  # one epoch a batch
    epochs = [next(iterator) for _ in range(30)]
    labels = [np.bincount(epoch["label"]).tolist() for epoch in epochs]
    assert labels == [[7, 7, 7]] * 30 and epochs[0]["image"].dtype == np.float32
    pixels = np.stack([epoch["image"] for epoch in epochs])
    assert len(np.unique(pixels)) > 0.99 * pixels.size
    np.testing.assert_allclose(pixels.mean((0, 1)), lib.means(range(COUNT)).mean(0), atol=0.02)


def test_flip_takes_the_mirrored_image_half_of_the_time(tmp_path, batches):
    source = lib.write(tmp_path / "out", lib.Images(COUNT), flip=True, moments=False, scale=1.0)
    image = next(batches(source, 400, augment="flip"))["image"]
    left, right = image[:, :, :2, 0].mean((1, 2)), image[:, :, 2:, 0].mean((1, 2))
    mirrored = (left < right)[np.abs(left - right) > 0.15]  # from image 8 on, whatever the noise
    assert 0.35 < mirrored.mean() < 0.65
    plain = next(batches(source, 400))["image"]
    left, right = plain[:, :, :2, 0].mean((1, 2)), plain[:, :, 2:, 0].mean((1, 2))
    assert (left > right)[np.abs(left - right) > 0.15].all()


def test_stored_samples_are_of_the_gaussian_and_stay(tmp_path, batches):
    source = lib.write(tmp_path / "out", lib.Images(COUNT), moments=False)
    batch = source.take(np.arange(COUNT))
    noise = (batch["image"] - lib.means(range(COUNT))) / (0.1 * 0.5)
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.15
    one, two = (next(batches(source, COUNT)) for _ in range(2))
    np.testing.assert_array_equal(one["image"], two["image"])
    np.testing.assert_array_equal(
        np.unique(one["image"], axis=0), np.unique(batch["image"], axis=0)
    )


def test_processes_workers_and_resuming_change_nothing(prepared, batches):
    _, source = prepared
    whole = batches(source, augment="flip")
    parts = [batches(source, 2, augment="flip", index=i, count=3) for i in range(3)]
    workers = batches(source, augment="flip", workers=1)
    for number in range(5):  # into the second epoch
        batch = next(whole)
        pieces = [next(part) for part in parts]
        side_by_side = {k: np.concatenate([piece[k] for piece in pieces]) for k in batch}
        if number >= 3:
            if number == 3:
                workers.set_state({"next_index": 3})
            resumed = next(workers)
        for name, value in batch.items():
            np.testing.assert_array_equal(side_by_side[name], value)
            if number >= 3:
                np.testing.assert_array_equal(resumed[name], value)


def test_flip_without_mirrored_latents_warns_and_changes_nothing(tmp_path, batches, caplog):
    """Once, on the process that prints; the batches are those of augment=none, number by number."""
    source = lib.write(tmp_path / "out", lib.Images(COUNT))
    plain, parts = batches(source), [batches(source, 3, augment="flip", index=1, count=2)]
    assert not source.mirrored and not caplog.records
    parts.insert(0, batches(source, 3, augment="flip", index=0, count=2))
    (record,) = caplog.records
    assert "run `python -m moe_diffusion.prepare` again" in record.getMessage()
    for _ in range(5):
        images = np.concatenate([next(part)["image"] for part in parts])
        np.testing.assert_array_equal(images, next(plain)["image"])


def test_mirrored_latents_do_not_warn(prepared, batches, caplog):
    assert prepared[1].mirrored
    batches(prepared[1], augment="flip")
    assert not caplog.records


@pytest.fixture
def copy(prepared, tmp_path):
    for path in prepared[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shards_that_are_not_those_of_the_manifest(copy):
    shard = copy / "latents-00001-of-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has {len(whole) - 1} bytes where manifes"):
        Latents(str(copy))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} has no bytes where manifest.json says"):
        Latents(str(copy))
    shard.write_bytes(whole)
    record = Latents(str(copy)).take_stored(np.array([9]))["image"].tobytes()
    one_bit = bytes([record[0] ^ 1]) + record[1:]
    shard.write_bytes(whole.replace(record, one_bit))
    damaged = Latents(str(copy))
    assert damaged[8]["label"] == 2
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        damaged.take(np.array([9]))


def test_manifests_that_are_not_whole(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for text, message in (
        ("{", "is not valid JSON"),
        ("[2]", r"holds \[2\], not a table"),
        (json.dumps(manifest | {"format": 99}), "is of format 99, .* reads 1 to 4: update moe_dif"),
        (json.dumps(manifest | {"format": None}), "is of format None"),
        (json.dumps(seal(manifest | {"count": 99})), "says 99 records, its shards hold 21"),
        (json.dumps(manifest | {"scale": 0.5000001}), "manifest.json is damaged"),
        (json.dumps(manifest | {"format": 2}), "manifest.json is damaged"),
        (json.dumps({k: v for k, v in manifest.items() if k != "digest"}), "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Latents(str(copy))
    path.unlink()
    with pytest.raises(UserError, match="holds no prepared latents"):
        Latents(str(copy))


LABEL = {"name": "label", "shape": [], "dtype": "int32", "num_values": 3}
MUTANTS = (None, "text", "12", -1, 0.5, [], [None], {}, {"a": 1}, 10**9, 10**18, True, "../x")


def test_every_value_of_a_manifest(copy):
    """Each key, also inside of lists and tables, lacking or with a value of another kind.

    A mutant is refused by its name, or it changes nothing of what is read.
    """
    path = copy / "manifest.json"
    manifest, indices = json.loads(path.read_text()), np.array([0, 9, 20])
    expected = Latents(str(copy)).take(indices)
    # Numbers and texts that nothing else in the folder contradicts; those of true are 1.
    free = {("scale",), ("shift",), ("seed",), ("records",), ("shard_size",)}
    free |= {("fields", 0, "num_values")}
    refused, taken = 0, 0
    for place in places(manifest):
        for mutant in (*MUTANTS, ...):
            changed = json.loads(json.dumps(manifest))
            holder = changed
            for step in place[:-1]:
                holder = holder[step]
            if mutant is ...:
                del holder[place[-1]]
            elif type(mutant) is type(holder[place[-1]]) and mutant == holder[place[-1]]:
                continue
            else:
                holder[place[-1]] = mutant
            path.write_text(json.dumps(seal(changed)))
            try:
                batch = Latents(str(copy)).take(indices)
            except UserError as error:
                assert str(copy) in str(error), (place, mutant, error)
                refused += 1
                continue
            taken += 1
            assert np.isfinite(batch["image"]).all()
            if place not in free:
                assert place[-1] == "name" or list(batch) == list(expected), (place, mutant)
                np.testing.assert_array_equal(batch["image"], expected["image"])
    print(f"{refused} refused, {taken} harmless")
    assert refused > 400 and refused > 4 * taken


def places(value, above=()):
    """The way to every value inside of a value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*above, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*above, key))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": float("nan")}, "scale is nan, not a finite number"),
        ({"scale": 0}, "scale is 0, outside 1e-06..1e.06"),
        ({"shift": None}, "shift is None, not a number"),
        ({"shape": [4, 4, -2]}, r"shape\[2\] is -2, outside 1..65536"),
        ({"shape": [60000, 60000, 4]}, "shape and fields make records of"),
        ({"shape": [4, 4, 1]}, "statistics: mean has 2 items, outside 1..1"),
        ({"flip": False}, "has no records of .* bytes, as manifest.json says"),
        ({"fields": [LABEL | {"dtype": "O"}]}, "dtype is 'O', not one of numbers"),
        ({"fields": [LABEL | {"num_values": None}]}, "num_values is null, not the number of clas"),
        ({"fields": [LABEL | {"name": "image"}]}, "name is 'image', no new name of a field"),
    ],
)
def test_what_a_manifest_may_not_say(change, message, copy):
    path = copy / "manifest.json"
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | change)))
    with pytest.raises(UserError, match=message):
        Latents(str(copy)).take(np.array([0]))


@pytest.mark.parametrize("name", ["/etc/hostname", "../x.array_record", "a/b", ""])
def test_shards_lie_in_the_folder(name, copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["file"] = name
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(UserError, match=r"shards\[1\]: file: .* is no plain name of a file"):
        Latents(str(copy))


def test_every_flipped_bit_is_noticed_or_harmless(copy):
    """60 bits of each file. What is noticed names the file; else all records are as before.

    Most of a small shard are zeros that fill a block up, so that 40 bits are chosen elsewhere.
    """
    rng, good = np.random.default_rng(0), Latents(str(copy)).take_stored(np.arange(COUNT))
    noticed = dict.fromkeys(sorted(copy.iterdir()), 0)
    for path in noticed:
        whole = path.read_bytes()
        used = np.flatnonzero(np.frombuffer(whole, np.uint8))
        there, anywhere = 8 * rng.choice(used, 40), rng.integers(8 * len(whole), size=20)
        for bit in (*(there + rng.integers(8, size=40)), *anywhere):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = Latents(str(copy)).take_stored(np.arange(COUNT))
            except UserError as error:
                assert str(path) in str(error)
                noticed[path] += 1
            else:
                for name, value in found.items():
                    np.testing.assert_array_equal(value, good[name])
            if path.suffix == ".array_record":
                with pytest.raises(UserError, match=f"{path.name} is damaged or of another folder"):
                    verify(copy)
        path.write_bytes(whole)
    assert len(noticed) == 4 and min(noticed.values()) > 20, noticed
    assert verify(copy)["count"] == COUNT


def test_shards_of_equal_size_that_were_exchanged(copy):
    """Each is whole, so that only `verify` notices."""
    first, second = (copy / f"latents-0000{i}-of-00003.array_record" for i in (0, 1))
    bits = first.read_bytes(), second.read_bytes()
    assert len(bits[0]) == len(bits[1])
    first.write_bytes(bits[1])
    with pytest.raises(UserError, match=f"{first.name} is damaged or of another folder"):
        verify(copy)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} has no bytes"):
        verify(copy)


def test_a_model_of_another_size_is_refused(prepared):
    data = SimpleNamespace(source=f"latents:{prepared[0]}", split="train", skip_broken=False)
    label = {"label": Field((), "int32", 3)}
    assert len(sources.open_source(data, (4, 4, 2), label)) == COUNT
    for shape, spec, message in (
        ((4, 6, 2), label, r"shape \(4, 4, 2\), the model takes \(4, 6, 2\)"),
        ((4, 4, 2), {"label": Field((), "int32", 2)}, "3 classes, the model only 2"),
        (
            (4, 4, 2),
            lib.Prompts.cond_spec,
            "lacks the field 'guidance', .* lacks the field 'text'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source(data, shape, spec)


def test_records_pack_by_hand():
    """Fields in order, then the latent; no gaps."""
    fields = describe_fields({"mask": Field((3,), "bool"), "text": Field((2,), "bfloat16")})
    record = record_of({"shape": [1, 2, 1], "moments": False, "flip": False, "fields": fields})
    latent = np.array([1, -2], np.float16).reshape(1, 1, 2, 1)
    mask, text = np.array([1, 0, 1], bool), np.array([1, 2]).astype("bfloat16")
    data = np.array((mask, text, latent), record).tobytes()
    assert data.hex(" ") == "01 00 01 80 3f 00 40 00 3c 00 c0"  # bf16 1 = 3f80, fp16 -2 = c000
    found = np.frombuffer(data + data, record)
    assert record.names == ("mask", "text", "image") and found["text"].dtype == "bfloat16"
    for name, value in (("mask", mask), ("text", text), ("image", latent)):
        np.testing.assert_array_equal(found[name], np.stack([value, value]))


@pytest.mark.parametrize("settings", [{"flip": True}, {"moments": False}])
def test_a_text_like_condition_goes_through_latents_that_are_not_square(
    tmp_path, batches, settings
):
    images = lib.Prompts(COUNT)
    source = lib.write(tmp_path / "out", images, **settings)
    assert source.image_shape == (4, 6, 2) and source.cond_spec == images.cond_spec
    assert [field["name"] for field in source.manifest["fields"]] == list(images.cond_spec)
    augment = "flip" if "flip" in settings else "none"
    whole, resumed = batches(source, augment=augment), batches(source, augment=augment, workers=1)
    parts = [batches(source, 3, augment=augment, index=i, count=2) for i in range(2)]
    guidance = {float(np.float32(i / 3)): i for i in range(COUNT)}
    for number in range(5):  # into the second epoch
        batch, pieces = next(whole), [next(part) for part in parts]
        assert batch["image"].shape == (6, 4, 6, 2) and batch["image"].dtype == np.float32
        for i, scalar in enumerate(batch["guidance"].tolist()):
            for name, value in images.cond(guidance[scalar]).items():
                np.testing.assert_array_equal(batch[name][i], value)
                assert batch[name].dtype == images.cond_spec[name].dtype
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), value)
        if number == 3:
            resumed.set_state({"next_index": 3})
            for name, value in next(resumed).items():
                np.testing.assert_array_equal(value, batch[name])
    batch = source.take(np.array([20, 3]))
    assert set(cond_of(batch)) == set(images.cond_spec)
    np.testing.assert_array_equal(batch["text"][1], images.cond(3)["text"])


def test_format_1_is_read(tmp_path, batches):
    lib.write_format_1(tmp_path / "old")
    source = Latents(str(tmp_path / "old"))
    assert source.cond_spec == {"label": Field((), "int32", 3)}
    batch = source.take(np.array([4, 0]))
    assert batch["label"].tolist() == [1, 0] and batch["label"].dtype == np.int32
    expected = (np.array([[4], [0]]) + np.arange(6) / 8 - 1.0) * 0.5
    np.testing.assert_array_equal(batch["image"].reshape(2, 6), expected.astype(np.float32))
    batch = next(batches(source, 5))
    np.testing.assert_array_equal(batch["label"], (batch["image"][:, 0, 0, 0] * 2 + 1) % 3)
