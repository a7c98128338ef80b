"""The FID Inception v3: the 1008-class TensorFlow network of 2015 in its PyTorch port.

Weights: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid or the `weights-inception-...` file
of torch-fidelity. Both name the tensors as torchvision does. Two things differ from torchvision's
own network: average pools do not count the padding, and the last block has a max pool.
Source: arXiv 1512.00567; pytorch-fid `inception.py`; ADM (arXiv 2105.05233) `evaluator.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion.errors import UserError
from moe_diffusion.interop.files import read_state_dict

SIZE = 299  # side of the images that the network sees
NUM_FEATURES = 2048
NUM_SPATIAL = 17 * 17 * 7  # ADM's sFID: the first 7 channels of a 17x17 layer
NUM_CLASSES = 1008
_BN_EPS = 1e-3

Params = dict[str, dict[str, jax.Array]]


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU. With stride 1 it is padded to keep the size."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# Layers outside the blocks. "valid" marks a convolution without padding, "max" is a 3x3 max pool
# with stride 2.
_STEM = (
    (Conv("Conv2d_1a_3x3", 32, (3, 3), 2), "valid"),
    (Conv("Conv2d_2a_3x3", 32, (3, 3)), "valid"),
    (Conv("Conv2d_2b_3x3", 64, (3, 3)), "same"),
    "max",
    (Conv("Conv2d_3b_1x1", 80), "valid"),
    (Conv("Conv2d_4a_3x3", 192, (3, 3)), "valid"),
    "max",
)

# A block is a tuple of branches, whose outputs are concatenated. A branch is a chain of
# convolutions and pools ("avg", "max": stride 1; "max/2"); a tuple in it forks the chain.
_Branch = tuple[Any, ...]


def _block_a(pooled: int) -> tuple[_Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("avg", Conv("branch_pool", pooled)),
    )


_BLOCK_B = (
    (Conv("branch3x3", 384, (3, 3), 2),),
    (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), 2),
    ),
    ("max/2",),
)


def _block_c(width: int) -> tuple[_Branch, ...]:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("avg", Conv("branch_pool", 192)),
    )


_BLOCK_D = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
    ("max/2",),
)


def _block_e(pool: str) -> tuple[_Branch, ...]:
    def fork(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            fork("branch3x3dbl_3"),
        ),
        (pool, Conv("branch_pool", 192)),
    )


_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("avg"),
    "Mixed_7c": _block_e("max"),  # max only here, as the network was trained
}
_SPATIAL = "Mixed_6d.branch1x1"  # TensorFlow's mixed_6/conv


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """PyTorch name -> shape of every tensor that the network needs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def chain(layers: _Branch, prefix: str, width: int) -> int:
        """Records the layers' tensors; returns the width of the output."""
        for layer in layers:
            if isinstance(layer, Conv):
                name = prefix + layer.name
                shapes[f"{name}.conv.weight"] = (layer.width, width, *layer.kernel)
                for part in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{name}.bn.{part}"] = (layer.width,)
                width = layer.width
            elif isinstance(layer, tuple):
                width = sum(chain((conv,), prefix, width) for conv in layer)
        return width

    width = chain(tuple(layer[0] for layer in _STEM if layer != "max"), "", 3)
    for name, branches in _BLOCKS.items():
        width = sum(chain(branch, f"{name}.", width) for branch in branches)
    return shapes | {"fc.weight": (NUM_CLASSES, width), "fc.bias": (NUM_CLASSES,)}


class Weights(NamedTuple):
    """What a weight file holds, and where it comes from."""

    params: Params  # batch norm folded into {"kernel": [h, w, in, out], "bias": [out]}
    classifier: np.ndarray  # f32[2048, 1008], without bias, as the Inception Score takes it
    bias: np.ndarray  # f32[1008]
    note: dict[str, str]  # file, sha256, layout


def load_weights(path: str | os.PathLike) -> Weights:
    """Reads the published file, or the same tensors as `.safetensors`.

    Raises:
      UserError: the file is missing, unreadable, or of another network. The message tells whether
        it is torchvision's own Inception or TensorFlow's graph.
    """
    path = Path(path)
    if path.suffix == ".pb":
        raise UserError(f"{path.name} is TensorFlow's graph: give {_PUBLISHED}")
    state = read_state_dict(path)
    layout = check_state_dict(state, path.name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    params, classifier, bias = fold(state)
    return Weights(
        params, classifier, bias, {"file": path.name, "sha256": digest[:16], "layout": layout}
    )


_PUBLISHED = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth (or torch-fidelity's file)"


def check_state_dict(state: Mapping[str, Any], name: str) -> str:
    """Checks that these are the FID network's tensors.

    Returns:
      Whose file it is: "pytorch-fid", or "torch-fidelity", which leaves num_batches_tracked out.

    Raises:
      UserError: tensors are missing, unknown, misshaped or not finite.
    """
    if any(key.startswith("AuxLogits.") for key in state):
        raise UserError(f"{name} is torchvision's Inception, another network: give {_PUBLISHED}")
    wanted = tensor_shapes()
    missing = sorted(wanted.keys() - state.keys())
    known = (*wanted, *(key.replace("running_var", "num_batches_tracked") for key in wanted))
    foreign = sorted(state.keys() - set(known))
    if missing or foreign:
        raise UserError(
            f"{name} is not the FID Inception: {len(missing)} tensors are missing"
            f"{f' ({missing[0]}, ...)' if missing else ''} and {len(foreign)} unknown"
            f"{f' ({foreign[0]}, ...)' if foreign else ''}: give {_PUBLISHED}"
        )
    for key, shape in wanted.items():
        if tuple(state[key].shape) != shape:
            raise UserError(
                f"{name} is not the FID Inception: {key} is {tuple(state[key].shape)}, "
                f"should be {shape}: give {_PUBLISHED}"
            )
        if not np.isfinite(state[key]).all():
            raise UserError(f"{name}: {key} holds NaN or infinity: fetch the file again")
    return "pytorch-fid" if any("num_batches" in key for key in state) else "torch-fidelity"


def fold(state: Mapping[str, Any]) -> tuple[Params, np.ndarray, np.ndarray]:
    """Folds batch norm into the convolutions; returns them, the classifier's weight, its bias."""
    params = {}
    for key in tensor_shapes():
        layer, _, rest = key.partition(".conv.weight")
        if rest or key == layer:
            continue
        gamma, beta, mean, variance = (
            np.asarray(state[f"{layer}.bn.{part}"], np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / np.sqrt(variance + _BN_EPS)
        kernel = np.asarray(state[key], np.float64).transpose(2, 3, 1, 0) * factor
        params[layer] = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(beta - mean * factor, jnp.float32),
        }
    return params, np.asarray(state["fc.weight"], np.float32).T, np.asarray(state["fc.bias"])


def apply(params: Params, images: jax.Array, resize: str = "tensorflow") -> dict[str, jax.Array]:
    """Computes the features of a batch.

    Args:
      images: f32[B, H, W, 3] in [0, 255], any size.
      resize: see `resize_images`.

    Returns:
      "pool" f32[B, 2048], "spatial" f32[B, 2023] (ADM's sFID layer, rows first).
    """
    outputs = {}
    for name, value in layers(params, resize_images(images, resize)):
        if name == _SPATIAL:
            outputs["spatial"] = value[..., :7].reshape(len(value), -1)
    return outputs | {"pool": value.mean((1, 2))}


def resize_images(images: jax.Array, method: str) -> jax.Array:
    """[B, H, W, 3] in [0, 255] -> [B, 299, 299, 3] in about [-1, 1], bilinear, no antialiasing.

    "tensorflow" aligns the top left corners of the pixels and returns (x - 128) / 128. So does the
    graph of 2015, which ADM's evaluator and torch-fidelity follow. "pytorch-fid" aligns the centres
    of the pixels and returns x / 127.5 - 1. The two give slightly different FIDs.
    """
    offset = {"tensorflow": 0.0, "pytorch-fid": 0.5}[method]
    for axis in (1, 2):
        images = _interpolate(images, axis, offset)
    return (images - 128) / 128 if method == "tensorflow" else images / 127.5 - 1


def _interpolate(images: jax.Array, axis: int, offset: float) -> jax.Array:
    size = images.shape[axis]
    where = np.clip((np.arange(SIZE) + offset) * (size / SIZE) - offset, 0, size - 1)
    low = np.floor(where).astype(np.int32)
    share = (where - low).astype(np.float32)
    share = share.reshape(-1, *(1,) * (images.ndim - axis - 1))
    below, above = (jnp.take(images, i, axis) for i in (low, np.minimum(low + 1, size - 1)))
    return below + (above - below) * share


def layers(params: Params, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """Runs the network; yields (name, output) of each layer of the stem, branch and block."""
    for index, layer in enumerate(_STEM):
        if layer == "max":
            x = _pool(x, "max/2")
            yield f"pool_{index}", x
        else:
            x = _convolve(params[layer[0].name], x, layer[0].stride, layer[1])
            yield layer[0].name, x
    for name, branches in _BLOCKS.items():
        outputs = []
        for branch in branches:
            y = x
            for step in branch:
                y = _step(params, f"{name}.", step, y)
            if isinstance(branch[-1], Conv):
                yield f"{name}.{branch[-1].name}", y
            outputs.append(y)
        x = jnp.concatenate(outputs, axis=-1)
        yield name, x


def _step(params: Params, prefix: str, step: Any, x: jax.Array) -> jax.Array:
    if isinstance(step, Conv):
        padding = "same" if step.stride == 1 else "valid"
        return _convolve(params[prefix + step.name], x, step.stride, padding)
    if isinstance(step, tuple):
        return jnp.concatenate([_step(params, prefix, conv, x) for conv in step], axis=-1)
    return _pool(x, step)


def _convolve(layer: dict[str, jax.Array], x: jax.Array, stride: int, padding: str) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        padding.upper(),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(x + layer["bias"])


def _pool(x: jax.Array, kind: str) -> jax.Array:
    """A 3x3 pool. "avg" divides by the number of pixels that lie inside the image."""

    def window(x: jax.Array, start: float, combine: Callable, stride: int) -> jax.Array:
        sizes, padding = (1, 3, 3, 1), "SAME" if stride == 1 else "VALID"
        return jax.lax.reduce_window(x, start, combine, sizes, (1, stride, stride, 1), padding)

    if kind == "avg":
        inside = window(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add, 1)
        return window(x, 0.0, jax.lax.add, 1) / inside
    return window(x, -jnp.inf, jax.lax.max, 2 if kind == "max/2" else 1)
