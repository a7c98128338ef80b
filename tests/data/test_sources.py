"""Sources: what the records are, and that data which does not fit the model is refused."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from moe_diffusion import synthetic
from moe_diffusion.conditions import Field
from moe_diffusion.data import sources
from moe_diffusion.errors import UserError


def _data(source, split="train"):
    return SimpleNamespace(source=source, split=split, skip_broken=False)


def _labels(num_classes):
    return {"label": Field((), "int32", num_classes)}


def _model(image_size=8, channels=1, num_classes=10):
    """What a class-conditional model takes."""
    return (image_size, image_size, channels), _labels(num_classes)


def test_digits_split_is_whole_disjoint_and_stratified():
    train, test = sources.Digits("train"), sources.Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    images = np.concatenate([train.images, test.images]).reshape(1797, 64)
    # The same images as the package's, as multisets: nothing lost, nothing in both splits.
    original = load_digits().data
    np.testing.assert_array_equal(
        np.sort((images + 1) * 8 @ np.arange(1.0, 65.0) ** 2),
        np.sort(original @ np.arange(1.0, 65.0) ** 2),
    )
    share = np.bincount(test.labels) / np.bincount(np.concatenate([train.labels, test.labels]))
    np.testing.assert_allclose(share, 0.2, atol=0.005)


def test_digits_records():
    source = sources.Digits("test")
    record = source[7]
    assert record["image"].shape == source.image_shape == (8, 8, 1)
    assert record["image"].dtype == np.float32 and record["label"].dtype == np.int32
    levels = np.unique(source.images)
    np.testing.assert_array_equal(levels, np.linspace(-1, 1, source.levels))
    batch = source.take(np.array([7, 3]))
    np.testing.assert_array_equal(batch["image"][0], record["image"])
    assert batch["label"][0] == record["label"]


def test_synthetic_is_deterministic_in_range_and_any_shape():
    source = synthetic.Synthetic((6, 4, 3), _labels(5), size=50)
    batch = source.take(np.arange(50))
    assert batch["image"].shape == (50, 6, 4, 3) and batch["image"].dtype == np.float32
    assert np.abs(batch["image"]).max() <= 1 and batch["image"].std() > 0.1
    np.testing.assert_array_equal(np.bincount(batch["label"]), [10] * 5)
    again = synthetic.Synthetic((6, 4, 3), _labels(5), size=50)[13]
    np.testing.assert_array_equal(again["image"], batch["image"][13])
    assert again["label"] == batch["label"][13] == 3
    assert len(np.unique(batch["image"].reshape(50, -1), axis=0)) == 50


def test_synthetic_classes_can_be_told_apart():
    source = synthetic.Synthetic((8, 8, 3), _labels(10), size=400)
    batch = source.take(np.arange(400))
    images = batch["image"].reshape(400, -1)
    distance = np.linalg.norm(images[200:, None] - images[None, :200], axis=-1)
    nearest = batch["label"][:200][distance.argmin(axis=1)]
    assert np.mean(nearest == batch["label"][200:]) > 0.8  # chance: 0.1


def test_synthetic_makes_every_field_of_a_condition():
    spec = {
        "text": Field((7, 40), "bfloat16"),
        "pooled": Field((40,), "float32"),
        "mask": Field((7,), "bool"),
        "tokens": Field((3,), "uint8", 5),
        "sizes": Field((), "int64"),
        "guidance": Field((), "float32"),
    }
    source = synthetic.Synthetic((6, 4, 3), spec, size=50)
    indices = np.array([33, 0, 8])
    batch = source.take(indices)
    sources.check_batch(batch, indices, spec)
    for name, values in source[8].items():
        np.testing.assert_array_equal(values, batch[name][2])
    np.testing.assert_array_equal(batch["mask"].sum(1), 1 + indices % 7)
    assert batch["mask"][1].tolist() == [True] + 6 * [False]
    np.testing.assert_array_equal(batch["tokens"], (indices[:, None] + np.arange(3)) % 5)
    assert batch["sizes"].tolist() == [33, 0, 8]
    text = source.take(np.arange(50))["text"].astype(np.float64)
    assert abs(text.mean()) < 0.05 and abs(text.std() - 1) < 0.02
    assert not np.array_equal(text[:, 0], source.take(np.arange(50))["pooled"])
    assert len(np.unique(source.take(np.arange(50))["guidance"])) == 50
    bare = synthetic.Synthetic((6, 4, 3), {}, size=50).take(indices)
    assert set(bare) == {"image"} and len(np.unique(bare["image"].reshape(3, -1), axis=0)) == 3


def test_synthetic_is_what_it_has_always_been():
    """Recorded before conditions had fields."""
    batch = synthetic.Synthetic((8, 8, 4), _labels(1000)).take(np.array([7, 65_535, 1234]))
    assert batch["label"].tolist() == [7, 535, 234] and batch["label"].dtype == np.int32
    digest = hashlib.md5(batch["image"].tobytes()).hexdigest()
    assert digest == "5ea91700e0232694f1b0976f95c92b66"


def test_hashed_uniform_is_uniform_and_independent():
    a, b = synthetic.hashed_uniform(np.arange(10_000), 2)
    np.testing.assert_allclose(np.histogram(a, 10, (0, 1))[0], 1000, atol=150)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.05


def test_open_source():
    assert len(sources.open_source(_data("digits", "test"), *_model())) == 360
    spec = {"text": Field((4, 8), "bfloat16"), "label": Field((), "int32", 1000)}
    source = sources.open_source(_data("synthetic"), (16, 24, 4), spec)
    assert source.image_shape == (16, 24, 4) and source.cond_spec == spec


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (_data("digit"), _model(), "'digit' is unknown; known are: digits, synthetic, folder:<pa"),
        (_data("folder:"), _model(), "'folder:' is unknown"),
        (_data("folder:/x", "test"), _model(), "means nothing to folder: sources; name the fol"),
        (_data("digits", "dev"), _model(), "'dev' is unknown; known are: train, test"),
        (_data("digits"), _model(32, 4), r"shape \(8, 8, 1\), the model takes \(32, 32, 4\)"),
        (_data("digits"), _model(num_classes=9), "10 classes, the model only 9: set model.num_cl"),
        (
            _data("digits"),
            ((8, 8, 1), _labels(10) | {"text": Field((4, 8), "float32")}),
            "source=digits lacks the field 'text', which the model takes: choose other data or",
        ),
        (_data("digits"), ((8, 8, 1), {}), "has the field 'label', which the model does not take"),
        (
            _data("digits"),
            ((8, 8, 1), {"label": Field((10,), "float32")}),
            r"has the field 'label' as int32\[\], the model takes float32\[10\]: choose other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, model, message):
    with pytest.raises(UserError, match=message):
        sources.open_source(data, *model)


def test_a_source_with_more_values_than_the_model_takes_is_refused():
    source = synthetic.Synthetic((8, 8, 1), {"tokens": Field((4,), "int32", 7)})
    sources.check_fits(source, "mine", (8, 8, 1), {"tokens": Field((4,), "int32", 8)})
    with pytest.raises(UserError, match="mine has 7 values of 'tokens', the model only 6: choose"):
        sources.check_fits(source, "mine", (8, 8, 1), {"tokens": Field((4,), "int32", 6)})
    source.cond_spec = {"tokens": Field((4,), "int32")}
    with pytest.raises(UserError, match="has inf values of 'tokens', the model only 6"):
        sources.check_fits(source, "mine", (8, 8, 1), {"tokens": Field((4,), "int32", 6)})


def test_missing_latents_say_what_to_prepare_and_how(tmp_path):
    folder = tmp_path / "imagenet256"
    with pytest.raises(UserError) as caught:
        sources.open_source(_data(f"latents:{folder}"), *_model(32, 4, 1000))
    message = str(caught.value)
    for part in (
        f"{folder} is not there",
        "32x32x4 latents with the condition label. An example, where the autoencoder has 8 pixels",
        "python -m moe_diffusion.prepare --source folder:/data --size 256x256 --vae sd-vae-ft-ema/",
        f"--out {folder}",
        "--config.data.source=synthetic",
    ):
        assert part in message
    spec = {"text": Field((4, 8), "bfloat16"), "guidance": Field((), "float32")}
    message = "32x48x4 latents with the condition text, guidance.* --size 256x384 --vae"
    with pytest.raises(UserError, match=message):
        sources.open_source(_data(f"latents:{folder}"), (32, 48, 4), spec)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no prepared latents"):
        sources.open_source(_data(f"latents:{folder}"), *_model(32, 4, 1000))


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_is_refused_by_record(label):
    source = sources.Digits("train")
    source.labels[[41, 99]] = label
    with pytest.raises(UserError, match=f"record 41 of the data has label {label}, outside 0..9"):
        sources.check_fits(source, "digits", (8, 8, 1), _labels(10))
