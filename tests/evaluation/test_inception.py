"""The FID Inception: its weight files, its resizing, and features on one and on many devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import inception
from moe_diffusion.evaluation.features import InceptionFeatures
from tests.golden.inception import recipe


@pytest.fixture(scope="module")
def state():
    return recipe(inception.tensor_shapes(), seed=0)


@pytest.fixture
def file(state, tmp_path):
    def write(**changes):
        tensors = {key: value for key, value in (state | changes).items() if value is not None}
        save_file(tensors, tmp_path / "inception.safetensors")
        return tmp_path / "inception.safetensors"

    return write


def test_the_tensors_are_those_of_the_published_file():
    shapes = inception.tensor_shapes()
    assert len(shapes) == 94 * 5 + 2
    assert sum(np.prod(shape) for shape in shapes.values()) == 23_885_392
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)


@pytest.mark.parametrize("layout", ["torch-fidelity", "pytorch-fid"])
def test_both_layouts_are_recognised(layout, file):
    counts = {}
    if layout == "pytorch-fid":  # keeps what PyTorch's batch norm counts
        counts = {"Mixed_7c.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    weights = inception.load_weights(file(**counts))
    assert weights.note["layout"] == layout and len(weights.note["sha256"]) == 16
    assert weights.classifier.shape == (2048, 1008)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AuxLogits.fc.weight": np.zeros(3)}, "is torchvision's Inception, another network"),
        ({"fc.bias": None}, r"1 tensors are missing \(fc.bias, ...\) and 0 unknown"),
        ({"head.w": np.zeros(3)}, r"0 tensors are missing and 1 unknown \(head.w, ...\)"),
        ({"fc.bias": np.zeros(1000)}, r"fc.bias is \(1000,\), should be \(1008,\)"),
        ({"fc.bias": np.full(1008, np.nan)}, "fc.bias holds NaN or infinity"),
    ],
    ids=["torchvision", "missing", "foreign", "shape", "nan"],
)
def test_another_file_is_refused(changes, message, file):
    changes = {key: v if v is None else v.astype(np.float32) for key, v in changes.items()}
    with pytest.raises(UserError, match=message):
        inception.load_weights(file(**changes))


def test_a_graph_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="is TensorFlow's graph: give pytorch-fid's"):
        inception.load_weights(tmp_path / "classify_image_graph_def.pb")
    with pytest.raises(UserError, match="no weight file at"):
        inception.load_weights(tmp_path / "nothing.pth")


def test_resizing_by_hand():
    """A ramp stays a ramp; the two conventions differ in where it begins."""
    side = 23 * 13  # 299 pixels are 23 of 13 each
    ramp = np.broadcast_to(np.arange(13.0)[:, None], (13, 5))[None, ..., None].repeat(3, -1)
    where = np.arange(side) / 23
    resized = np.asarray(inception.resize_images(ramp.astype(np.float32), "tensorflow"))
    np.testing.assert_allclose(resized[0, :, 0, 0], (np.minimum(where, 12) - 128) / 128, atol=1e-6)
    resized = np.asarray(inception.resize_images(ramp.astype(np.float32), "pytorch-fid"))
    centred = np.clip((np.arange(side) + 0.5) / 23 - 0.5, 0, 12)
    np.testing.assert_allclose(resized[0, :, 0, 0], centred / 127.5 - 1, atol=1e-6)


@pytest.fixture(scope="module")
def weights(state):
    return inception.Weights(*inception.fold(state), {})


def test_features_have_the_published_sizes(weights):
    images = jax.ShapeDtypeStruct((2, 64, 48, 3), np.float32)
    shapes = jax.eval_shape(inception.apply, weights.params, images)
    assert shapes["pool"].shape == (2, 2048) and shapes["spatial"].shape == (2, 2023)


@pytest.mark.slow
def test_features_do_not_depend_on_company(weights, monkeypatch):
    """Each of eight devices takes its share, and what fills up the last batch is cut off."""
    monkeypatch.setattr(inception, "SIZE", 107)  # a tenth of the work, the same network
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    extractor = InceptionFeatures(weights, "tensorflow", "round", batch_size=8)
    found = extractor(images)
    assert found["pool"].shape == (9, 2048)
    # Backwards, alone, and as floats in [-1, 1], as samples come.
    again = extractor(images[8:6:-1] / np.float32(127.5) - 1)
    for name, rows in again.items():
        np.testing.assert_allclose(rows, found[name][8:6:-1], rtol=1e-4, atol=1e-5)
    assert np.abs(found["pool"][0] - found["pool"][1]).max() > 0.1
    # Grey images are shown in all three channels.
    grey = images[:1, ..., :1]
    shown = extractor(grey.repeat(3, axis=-1))
    np.testing.assert_array_equal(extractor(grey)["pool"], shown["pool"])
