"""Checks of the FID Inception, whose weights are made from a recipe."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest

from moe_diffusion.evaluation import evaluator, inception

from . import cases, probe


def recipe(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """The state dict of a case: every tensor from its key, as `weights` in its config says."""

    def tensor(key: str, shape: Sequence[int]) -> np.ndarray:
        bits = np.random.PCG64(zlib.crc32(f"{seed}:{key}".encode()))
        rng = np.random.Generator(bits)
        if key.endswith("num_batches_tracked"):
            return np.zeros(shape)
        if key.endswith("running_var"):
            return 0.7 + 0.6 * rng.random(shape)
        if key.endswith(("running_mean", ".bias")):
            return 0.1 * rng.standard_normal(shape)
        if key.endswith(".bn.weight"):
            return 1 + 0.1 * rng.standard_normal(shape)
        variance = 1 / 2048 if key == "fc.weight" else 2 / np.prod(shape[1:])
        return rng.standard_normal(shape) * np.sqrt(variance)

    return {key: tensor(key, shape).astype(np.float32) for key, shape in shapes.items()}


def shrink(monkeypatch: pytest.MonkeyPatch, pool: int = 64, spatial: int = 32) -> None:
    """Makes `evaluate` quick: the network sees 107x107 pixels, its first features count."""
    apply, load = inception.apply, inception.load_weights

    def first_features(*args, **kwargs):
        features = apply(*args, **kwargs)
        return {"pool": features["pool"][:, :pool], "spatial": features["spatial"][:, :spatial]}

    def load_weights(path):
        weights = load(path)
        return weights._replace(classifier=weights.classifier[:pool])

    monkeypatch.setattr(inception, "SIZE", 107)
    monkeypatch.setattr(inception, "apply", first_features)
    monkeypatch.setattr(inception, "load_weights", load_weights)
    monkeypatch.setattr(evaluator, "INCEPTION_DIMS", {"pool": pool, "spatial": spatial})


def check(case, family: None) -> None:
    state = recipe(case.config["state_dict"], case.config["seed"])
    for key, first in case.config["weight_probe"].items():
        np.testing.assert_allclose(state[key].ravel()[: len(first)], first, rtol=1e-6)
    inception.check_state_dict(state, "golden")
    params, classifier, bias = inception.fold(state)
    images = cases.nhwc(case["in/image"]) * 255

    def run(params, images):
        resized = inception.resize_images(images, "pytorch-fid")
        layers = inception.layers(params, resized)
        means = {name: x.mean((1, 2)) for name, x in layers}
        return resized, means, inception.apply(params, images, "pytorch-fid")["pool"]

    resized, means, pool = jax.device_get(probe.jit(run)(params, images))
    rows = (resized[:, [0, 100, 298]].transpose(0, 3, 1, 2) + 1) / 2  # stored before 2x - 1
    case.compare("mid/resized_rows_0_100_298", rows)
    names = {"blk0": "pool_3", "blk1": "pool_6", "blk2": "Mixed_6e", "blk3": "Mixed_7c"}
    for key in (key for key in case.arrays if key.endswith(".channel_mean")):
        name = key.removeprefix("mid/").removesuffix(".channel_mean")
        case.compare(key, means[names.get(name, name)])
    case.compare("out/pool3", pool)
    logits = pool @ classifier
    case.compare("out/logits_nobias", logits)
    case.compare("out/logits_bias", logits + bias)
    case.assert_all_compared()
