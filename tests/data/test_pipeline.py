"""Batches: order, sharding, augmentation, and resuming in the middle of an epoch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion.conditions import Field, cond_of
from moe_diffusion.data import pipeline, sources
from moe_diffusion.errors import UserError


class Numbered:
    """Record i is an image whose every pixel is i; read one by one, like files."""

    cond_spec = {"label": Field((), "int32", 10)}
    image_shape = (2, 2, 1)

    def __init__(self, size, bad_record=None):
        self.size = size
        self.bad_record = bad_record

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = 10 if index == self.bad_record else index % 10
        return {"image": np.full((2, 2, 1), index, np.float32), "label": np.int32(label)}


@pytest.fixture
def make():
    """Makes iterators and closes them after the test."""
    made = []

    def make(source, batch=4, *, seed=0, index=0, count=1, augment="none", workers=0, prefetch=2):
        data = SimpleNamespace(
            batch_size=batch * count, augment=augment, num_workers=workers, prefetch=prefetch
        )
        part = {"process_index": index, "process_count": count}
        made.append(pipeline.make_iterator(source, data, seed=seed, **part))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def _ids(iterator, batches):
    """The records of some batches of a `Numbered` source, [batches, B]."""
    return np.array([next(iterator)["image"][:, 0, 0, 0] for _ in range(batches)], int)


def _assert_equal(a, b):
    assert a.keys() == b.keys() and "image" in a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_batches_have_the_promised_form(make):
    batch = next(make(sources.Digits("train"), 16))
    assert batch["image"].shape == (16, 8, 8, 1) and batch["image"].dtype == np.float32
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32


def test_every_epoch_holds_every_record_once_in_another_order(make):
    # 3 epochs of 10 records are 6 batches of 5; batches of 4 straddle the epochs.
    ids = _ids(make(Numbered(10), 5), 6).reshape(3, 10)
    for epoch in ids:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert len({tuple(epoch) for epoch in ids}) == 3
    np.testing.assert_array_equal(_ids(make(Numbered(10), 4), 7).ravel(), ids.ravel()[:28])


def test_batch_larger_than_the_data(make):
    ids = _ids(make(Numbered(3), 10), 1)[0]
    np.testing.assert_array_equal(np.sort(ids[:9].reshape(3, 3)), [[0, 1, 2]] * 3)


def test_labels_stay_with_their_images(make):
    batch = next(make(Numbered(100), 50))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 10, batch["label"])


def test_same_seed_same_batches(make):
    source = sources.Digits("train")
    one, two, other = (make(source, 64, seed=s, augment="dequantize") for s in (5, 5, 6))
    for _ in range(30):  # more than one epoch
        a, b, c = next(one), next(two), next(other)
        _assert_equal(a, b)
        assert not np.array_equal(a["image"], c["image"])


def test_any_integer_is_a_seed_and_no_seed_is_another_shifted(make):
    # With seed + epoch as key of an epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
    epochs = {tuple(_ids(make(Numbered(20), 20, seed=s), 3)[e]) for s in (-1, 0, 1) for e in (0, 1)}
    assert len(epochs) == 6


@pytest.mark.parametrize("augment", ["none", "dequantize", "flip"])
def test_processes_side_by_side_are_the_single_process(make, augment):
    source = sources.Digits("train")
    whole = make(source, 12, augment=augment)
    parts = [make(source, 4, index=i, count=3, augment=augment) for i in range(3)]
    for _ in range(3):
        shards = [next(part) for part in parts]
        together = {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}
        _assert_equal(together, next(whole))


def test_processes_see_disjoint_records(make):
    seen = [set(_ids(make(Numbered(24), 3, index=i, count=2), 4).ravel()) for i in range(2)]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 24


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_in_the_middle_of_an_epoch(make, prefetch):
    source = sources.Digits("train")
    first = make(source, 100, augment="dequantize", prefetch=prefetch)
    for _ in range(9):
        next(first)
    state = first.get_state()
    assert state == {"next_index": 9}
    expected = [next(first) for _ in range(9)]  # into the second epoch
    resumed = make(source, 100, augment="dequantize", prefetch=prefetch)
    next(resumed)  # a state may also be set on an iterator that has begun
    resumed.set_state(state)
    assert resumed.get_state() == state
    for batch in expected:
        _assert_equal(next(resumed), batch)


def test_worker_processes_change_nothing_and_share_the_state(make):
    source = Numbered(50)
    plain, workers = make(source, 4), make(source, 4, workers=2)
    for _ in range(3):
        next(plain)
    workers.set_state(plain.get_state())
    for _ in range(14):  # into the second epoch
        _assert_equal(next(workers), next(plain))
    assert workers.get_state() == plain.get_state() == {"next_index": 17}


def test_flip_mirrors_about_half_of_the_images(make):
    source = sources.Digits("train")
    plain, flipped = next(make(source, 400)), next(make(source, 400, augment="flip"))
    np.testing.assert_array_equal(plain["label"], flipped["label"])
    as_is = (flipped["image"] == plain["image"]).all((1, 2, 3))
    mirrored = (flipped["image"] == plain["image"][:, :, ::-1]).all((1, 2, 3))
    assert (as_is | mirrored).all()
    assert 150 < mirrored.sum() < 250  # 200 expected, standard deviation 10


def test_dequantize_stays_within_half_a_level(make):
    source = sources.Digits("train")
    plain, noisy = make(source, 256), make(source, 256, augment="dequantize")
    # In levels, of which 17 reach from -1 to 1.
    noise = [(next(noisy)["image"] - next(plain)["image"]) / (2 / 16) for _ in range(2)]
    assert noise[0].dtype == np.float32
    assert -0.5001 < noise[0].min() < -0.49 and 0.49 < noise[0].max() < 0.5001
    np.testing.assert_allclose([noise[0].mean(), noise[0].std()], [0, 12**-0.5], atol=0.01)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03  # new in every batch


def test_augmentations_that_do_not_fit_are_refused(make):
    with pytest.raises(UserError, match="'mirror' is unknown; known: none, flip, dequantize"):
        make(Numbered(4), augment="mirror")
    with pytest.raises(UserError, match="quantised"):
        make(Numbered(4), augment="dequantize")


def test_a_batch_that_the_processes_cannot_share_is_refused():
    data = SimpleNamespace(batch_size=10, augment="none", num_workers=0, prefetch=0)
    with pytest.raises(UserError, match="number of processes = 4 does not divide data.batch"):
        pipeline.make_iterator(Numbered(20), data, seed=0, process_index=1, process_count=4)


class Prompted(Numbered):
    """Record i has a text of i's, a mask of 1 + i % 3 places, tokens and a scalar; one by one."""

    image_shape = (2, 4, 1)
    cond_spec = {
        "text": Field((3, 2), "bfloat16"),
        "mask": Field((3,), "bool"),
        "tokens": Field((2,), "int32", 30),
        "guidance": Field((), "float32"),
    }
    changes = {}

    def __getitem__(self, index):
        record = {
            "image": np.full((2, 4, 1), index, np.float32),
            "text": np.full((3, 2), index).astype("bfloat16"),
            "mask": np.arange(3) <= index % 3,
            "tokens": np.array([index, 0], np.int32),
            "guidance": np.float32(index / 7),
        }
        return record | (self.changes if index == 13 else {})


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_every_field_of_a_condition_travels_with_its_image(make, augment):
    source = Prompted(20)
    iterator, parts = (
        make(source, 6, augment=augment),
        [make(source, 3, augment=augment, index=i, count=2) for i in range(2)],
    )
    for _ in range(5):  # into the second epoch
        batch = next(iterator)
        assert set(cond_of(batch)) == set(source.cond_spec)
        for name, field in source.cond_spec.items():
            assert batch[name].shape == (6, *field.shape) and batch[name].dtype == field.dtype
        for i in range(6):
            record = source[int(batch["image"][i, 0, 0, 0])]
            for name in source.cond_spec:
                np.testing.assert_array_equal(batch[name][i], record[name])
        shards = [next(part) for part in parts]
        _assert_equal({k: np.concatenate([s[k] for s in shards]) for k in batch}, batch)


def test_batches_with_a_condition_resume_bit_for_bit(make):
    source = Prompted(20)
    first, resumed = make(source, 6), make(source, 6, workers=1)
    for _ in range(4):
        next(first)
    resumed.set_state(first.get_state())
    for _ in range(3):
        expected, found = next(first), next(resumed)
        _assert_equal(found, expected)
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": np.array([0, 30], np.int32)},
            "record 13 .* has tokens 30, outside 0..29: mend",
        ),
        ({"tokens": np.array([-1, 30], np.int32)}, "record 13 .* has tokens -1, outside 0..29"),
    ],
)
def test_a_value_out_of_range_is_named_by_record_and_field(make, monkeypatch, changes, message):
    monkeypatch.setattr(Prompted, "changes", changes)
    with pytest.raises(UserError, match=message):
        next(make(Prompted(20), 20))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"text": Field((3, 4), "bfloat16")}, r"'text' as bfloat16\[3, 2\], .* bfloat16\[3, 4\]"),
        ({"guidance": Field((), "float16")}, r"'guidance' as float32\[\], .* takes float16\[\]"),
        ({"style": Field((), "int32", 3)}, "lacks the field 'style', which the model takes"),
        ({"mask": None}, "record .* has the field 'mask', which the model does not take"),
    ],
)
def test_fields_that_a_source_does_not_hold_to_are_refused(make, monkeypatch, spec, message):
    wrong = {name: field for name, field in (Prompted.cond_spec | spec).items() if field}
    monkeypatch.setattr(Prompted, "cond_spec", wrong)
    with pytest.raises(UserError, match=message):
        next(make(Prompted(20), 4))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_label_out_of_range_is_found_when_read(make, prefetch):
    iterator = make(Numbered(20, bad_record=13), 20, prefetch=prefetch)
    with pytest.raises(UserError, match="record 13 of the data has label 10, outside 0..9"):
        next(iterator)


def test_closed_iterator_says_so(make):
    iterator = make(Numbered(8))
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
