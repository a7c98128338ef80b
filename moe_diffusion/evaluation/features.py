"""Feature vectors of images: how they are computed, read and stored."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import inception
from moe_diffusion.evaluation.archives import Archive, open_archive
from moe_diffusion.evaluation.images import (
    Images,
    check_range,
    is_source,
    open_images,
    to_pixels,
)
from moe_diffusion.evaluation.metrics import (
    Gaussian,
    Moments,
    check_covariance,
    check_finite,
    chosen,
    gaussian_of,
)
from moe_diffusion.interop.tensors import listed
from moe_diffusion.writing import save_arrays

MAX_VECTORS = 50_000  # kept for all but mean and covariance, which use every vector
_PER_DEVICE = 32  # images; 299 x 299 pixels each take about 20 MB in the network
_VECTOR_KEYS = ("features", "activations")  # in our files; in those of DiffMoE and DSMoE


@dataclasses.dataclass
class FeatureSet:
    """One side of a comparison. A file may hold only a part of it; `with_vectors` adds the rest."""

    name: str
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    vectors: np.ndarray | None = None  # f32[N, D]
    images: Images | None = None


class Extractor(Protocol):
    """Maps a batch of `images.Images` to {"pool": f32[B, D], and perhaps "spatial": f32[B, D2]}."""

    names: dict[str, str]  # kind of metric -> the name under which it is reported
    note: dict[str, Any]  # what the extractor is, for the result

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]: ...


class InceptionFeatures:
    """The FID network on all devices; every process takes its share of a batch.

    Args:
      resize, quantize: see `inception.resize_images` and `images.to_pixels`.
      batch_size: the most images in one call.
    """

    names = {
        "frechet": "fid",
        "spatial": "sfid",
        "score": "inception_score",
        "precision": "precision",
        "recall": "recall",
        "kernel": "kid",
    }

    def __init__(self, weights: inception.Weights, resize: str, quantize: str, batch_size: int):
        self.classifier = weights.classifier
        self.note = {**weights.note, "resize": resize, "quantize": quantize}
        self._quantize = quantize
        devices = np.array(jax.local_devices())
        share = math.ceil(batch_size / (len(devices) * jax.process_count()))
        self._chunk = min(_PER_DEVICE, share) * len(devices)
        mesh = Mesh(devices, ("image",))
        self._split = NamedSharding(mesh, PartitionSpec("image"))
        self._params = jax.device_put(weights.params, NamedSharding(mesh, PartitionSpec()))
        # Each device runs the program of a single device on its own images.
        self._apply = jax.jit(
            jax.shard_map(
                functools.partial(inception.apply, resize=resize),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("image")),
                out_specs=PartitionSpec("image"),
                check_vma=False,
            )
        )

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        pixels = to_pixels(batch, self._quantize)
        if pixels.shape[-1] == 1:
            pixels = pixels.repeat(3, axis=-1)
        count, step = len(pixels), self._chunk * jax.process_count()
        pixels = np.pad(pixels, [(0, -count % step)] + [(0, 0)] * 3)
        parts = []
        for start in range(0, len(pixels), step):
            own = pixels[start + jax.process_index() * self._chunk :][: self._chunk]
            part = jax.device_get(self._apply(self._params, jax.device_put(own, self._split)))
            if jax.process_count() > 1:
                part = multihost_utils.process_allgather(part, tiled=True)
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def collect(
    batches: Iterable[np.ndarray], total: int, extractor: Extractor, name: str
) -> FeatureSet:
    """Computes the features of all images, batch by batch.

    Args:
      total: number of images; of more than MAX_VECTORS, a choice of vectors is kept.
      name: of the set, for the progress bar and messages.

    Raises:
      UserError: an image is not finite or not in [-1, 1], or a feature is not finite.
    """
    moments: dict[str, Moments] = {}
    vectors, seen, kept = [], 0, chosen(total, MAX_VECTORS)
    with tqdm(total=total, unit="image", desc=f"features of {name}", disable=None) as bar:
        for batch in batches:
            check_range(batch, name)
            for kind, rows in extractor(batch).items():
                moments.setdefault(kind, Moments(rows.shape[1])).add(rows)
                if kind == "pool":
                    own = kept[(kept >= seen) & (kept < seen + len(batch))] - seen
                    vectors.append(np.asarray(rows[own], np.float32))
            seen += len(batch)
            bar.update(len(batch))
    gaussians = {kind: m.gaussian() for kind, m in moments.items()}
    return FeatureSet(name, gaussians["pool"], gaussians.get("spatial"), np.concatenate(vectors))


def with_vectors(
    features: FeatureSet, extractor: Extractor, batch_size: int, num: int = 0
) -> FeatureSet:
    """Adds the features of a set's images, the first `num` or all; keeps stored statistics."""
    if features.vectors is not None or features.images is None:
        return features
    num = num or len(features.images)
    batches = features.images.batches(batch_size, num)
    found = collect(batches, num, extractor, features.name)
    if features.pool is None:
        return dataclasses.replace(found, images=features.images)
    return dataclasses.replace(features, vectors=found.vectors)


def open_features(text: str, size: tuple[int, int] | None = None, num: int = 0) -> FeatureSet:
    """Opens a set of images, or an `.npz` with images, features, statistics, or all of them.

    It reads ADM's reference batches (arr_0, mu, sigma, mu_s, sigma_s), pytorch-fid's statistics
    (mu, sigma), features of this library and of DiffMoE and DSMoE, and arrays of images.

    Args:
      size: see `open_images`.
      num: takes only the first `num` images or features; 0 takes all.

    Raises:
      UserError: the set is missing, unreadable, of an unknown kind or not finite, or it has fewer
        than `num` images.
    """
    if is_source(text) or not text.endswith(".npz"):
        features = FeatureSet(text, images=open_images(text, size))
    else:
        features = _open_archive(Path(text))
    available = features.vectors if features.vectors is not None else features.images
    if num and (available is None or len(available) < num):
        raise UserError(
            f"{text} has {0 if available is None else len(available)} images, {num} are asked for: "
            "lower --num or make more"
        )
    if num and features.vectors is not None:
        vectors = features.vectors[:num]
        features = FeatureSet(text, gaussian_of(vectors), vectors=vectors)
    return features


def _open_archive(path: Path) -> FeatureSet:
    with open_archive(path) as archive:
        features = _read_archive(archive, path)
    return features


def _read_archive(archive: Archive, path: Path) -> FeatureSet:
    keys = archive.headers.keys()
    features = FeatureSet(str(path))
    found = next((key for key in _VECTOR_KEYS if key in keys), None)
    if found:
        shape = archive.headers[found].shape
        if len(shape) != 2 or min(shape) < 1:
            raise UserError(f"{found} of {path} has shape {shape}, not [N, D]")
        features.vectors = archive.numbers(found, np.float32)
        check_finite(features.vectors)
    count = _count(archive, path) if "count" in keys else 0
    if found and count not in (0, len(features.vectors)):
        raise UserError(
            f"{path} says {count} images and holds {len(features.vectors)} feature vectors: make "
            "it again"
        )
    count = len(features.vectors) if found else count
    if {"mu", "sigma"} <= keys:
        features.pool = _gaussian(archive, "mu", "sigma", count, path)
        if found and features.vectors.shape[1] != len(features.pool.mean):
            raise UserError(
                f"{found} and mu of {path} have {features.vectors.shape[1]} and "
                f"{len(features.pool.mean)} dimensions, which do not fit: make it again"
            )
    elif found:
        features.pool = gaussian_of(features.vectors)
    if {"mu_s", "sigma_s"} <= keys:
        features.spatial = _gaussian(archive, "mu_s", "sigma_s", count, path)
    if "arr_0" in keys:
        features.images = open_images(str(path))
    if features.pool is None and features.images is None:
        raise UserError(
            f"{path} holds {listed(sorted(keys)) or 'nothing'}: wanted are images (arr_0), "
            "features, or statistics (mu and sigma)"
        )
    return features


def _count(archive: Archive, path: Path) -> int:
    """How many images a file says that its statistics are of."""
    shape, _, dtype = archive.headers["count"]
    count = archive.numbers("count", np.float64) if shape == () and dtype.kind in "iu" else None
    if count is None or count < 0:
        raise UserError(f"count of {path} is no number of images: make the file again")
    return int(count)


def _gaussian(archive: Archive, mu: str, sigma: str, count: int, path: Path) -> Gaussian:
    mean, covariance = (archive.headers[key].shape for key in (mu, sigma))
    if len(mean) != 1 or not mean[0] or covariance != (*mean, *mean):
        raise UserError(
            f"{mu} and {sigma} of {path} have shapes {mean} and {covariance}, which do "
            "not fit: fetch the file again"
        )
    mean, covariance = (archive.numbers(key, np.float64) for key in (mu, sigma))
    check_covariance(covariance, f"{sigma} of {path}")
    return Gaussian(mean, covariance, count)


def save_features(features: FeatureSet, path: str | os.PathLike) -> None:
    """Writes an `.npz` that `open_features` and pytorch-fid read, whole or not at all."""
    arrays = {"mu": features.pool.mean, "sigma": features.pool.covariance}
    if features.spatial is not None:
        arrays |= {"mu_s": features.spatial.mean, "sigma_s": features.spatial.covariance}
    save_arrays(path, {"features": features.vectors, "count": features.pool.count, **arrays})
