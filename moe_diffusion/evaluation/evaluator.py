"""Runs a whole evaluation: opens and checks what the user asks for, then measures it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.evaluation import inception, prompt_scores, protocol
from moe_diffusion.evaluation.choices import SCORES
from moe_diffusion.evaluation.compare import check_comparable, compare
from moe_diffusion.evaluation.digits import DigitsFeatures
from moe_diffusion.evaluation.features import (
    Extractor,
    FeatureSet,
    InceptionFeatures,
    open_features,
    save_features,
    with_vectors,
)
from moe_diffusion.evaluation.precision import matmul_precision
from moe_diffusion.evaluation.record import made_with
from moe_diffusion.evaluation.runs import RunImages
from moe_diffusion.ornaments import ornament
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.writing import append_line

DIGITS = "digits"  # the training split, the reference for runs on digits
DIGITS_SHAPE = (8, 8, 1)
DIGITS_SAMPLES = 1000
INCEPTION_DIMS = {"pool": inception.NUM_FEATURES, "spatial": inception.NUM_SPATIAL}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate and how. The fields without a description are flags of `evaluate`.

    Attributes:
      settings: a protocol (see `protocol.default`), changed by the command line.
      published: the protocol as it was published, to report deviations; None without a protocol.
      overrides: changes to the run's config; see `config.load`.
      emas: averages to judge; None stands for the run's first.
      num: how many images the command line asks for; 0 if it does not say.
      prompts: what to draw instead of labels.
      thresholds: of DiffMoE, to be tried one after the other; see `RunImages.with_threshold`. Then
        nothing need be compared: without a reference the images are only drawn.
    """

    settings: ConfigDict
    published: ConfigDict | None = None
    overrides: tuple[str, ...] = ()
    emas: tuple[str | None, ...] = (None,)
    num: int = 0
    prompts: prompt_scores.Prompts | None = None
    thresholds: tuple[float | str, ...] = ()
    workdir: str | None = None
    samples: str | None = None
    reference: str | None = None
    inception: str | None = None
    size: int = 0
    vae: str | None = None
    step: int | None = None
    save_features: str | None = None


def evaluate(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one result for each average, guidance scale and threshold.

    A result has "metrics" (name -> number), "warnings" (texts), and the settings that the numbers
    depend on.

    Raises:
      UserError: something is missing or does not fit. It is raised before any slow work begins.
    """
    variants = _variants(request)
    first = next(variants)  # raises if something is wrong with the run or the file
    digits = first.images is not None and first.images.shape == DIGITS_SHAPE
    digits = digits and not request.inception
    labelled = request.workdir and not request.prompts
    if digits and labelled and not request.num and request.published is None:
        request.settings.num_samples = DIGITS_SAMPLES
    reference = _open_reference(request, digits, first)
    extractor = None
    if reference is not None or request.save_features:
        sides = [side for side in (first, reference) if side is not None]
        extractor = _make_extractor(request, digits, sides)
    if reference is not None:
        dims = {"pool": DigitsFeatures.dims} if digits else INCEPTION_DIMS
        check_comparable(first, reference, dims)
        reference = _with_vectors(reference, extractor, request)
    heldout = None
    if digits and reference is not None and reference.name == DIGITS:
        heldout = _with_vectors(open_features(f"{DIGITS}@test"), extractor, request)
    kept: list[prompt_scores.Records] = []
    for samples in itertools.chain([first], variants):
        result, judged = _judge(samples, reference, heldout, extractor, request, kept)
        if request.workdir and is_main_process():
            with ornament("a line in evaluations.jsonl"):
                append_line(json.dumps(result), Path(request.workdir) / "evaluations.jsonl")
        yield result
        if request.save_features and is_main_process():  # last, since a full disk ends it
            save_features(judged, request.save_features)
    for records in kept if is_main_process() else ():  # all variants are through
        records.remove()


def _judge(
    samples: FeatureSet,
    reference: FeatureSet | None,
    heldout: FeatureSet | None,
    extractor: Extractor | None,
    request: Request,
    kept: list[prompt_scores.Records],
) -> tuple[dict[str, Any], FeatureSet]:
    """Draws or reads a set of images and compares it; `heldout` is of real digits.

    Without an extractor the images are drawn and forgotten. What is kept of images for prompts is
    added to `kept`.

    Returns:
      The result of `evaluate`, and the set with its features.
    """
    settings, images, scored = request.settings, samples.images, None
    if request.prompts:
        with matmul_precision(settings.matmul):
            scored, records = prompt_scores.judge(images, request.prompts, extractor)
        samples = scored.features or samples
        kept.append(records)
    elif extractor is None:
        with matmul_precision(settings.matmul):
            for _ in images.batches(settings.batch_size, request.num or settings.num_samples):
                pass
    else:
        samples = _with_vectors(samples, extractor, request, request.num)
    found, warnings = {}, []
    if reference is not None:
        found, warnings = compare(samples, reference, extractor, settings.score)
    if heldout is not None:
        found["fd_digits_heldout"] = compare(heldout, reference, extractor)[0]["fd_digits"]
    if scored:
        found = scored.metrics | found
    result: dict[str, Any] = {"metrics": found, "warnings": warnings}
    used = {"matmul": settings.matmul}
    with matmul_precision(settings.matmul):
        if isinstance(images, RunImages):
            result |= images.conditions
            warnings += images.warnings
            used |= protocol.model_settings(images.config.model)
        else:
            result |= {"samples": samples.name, "num_samples": samples.pool.count, **made_with()}
    features = extractor.note if extractor else {}
    result |= {"features": features, **(scored.notes if scored else {})}
    if "inception_score" in found:
        used["score"] = settings.score
        result["inception_score"] = {"score": settings.score, **SCORES[settings.score]}
        if result.get("labels") == "balanced" and SCORES[settings.score]["shuffle"] is None:
            warnings.append(
                "the Inception Score is that of parts in class order, each with few classes, and "
                "much too low: take --score torch-fidelity, or --labels random"
            )
    if result.get("autoencoder"):
        used["autoencoder"] = result["autoencoder"]["name"]
    if reference is not None:
        result["reference"] = {"name": reference.name, "count": reference.pool.count}
        used["reference"] = Path(reference.name).name
    used = {**result, **result.get("sampling", {}), **features, **used}
    result["protocol"] = _against(request.published, used)
    return result | {"software": result.pop("software")}, samples  # the longest last


def _with_vectors(
    features: FeatureSet, extractor: Extractor, request: Request, num: int = 0
) -> FeatureSet:
    """`features.with_vectors`, with float32 products as exact as the protocol says."""
    with matmul_precision(request.settings.matmul):
        return with_vectors(features, extractor, request.settings.batch_size, num)


def _variants(request: Request) -> Iterator[FeatureSet]:
    """Yields the sets to judge: one for a file, one for each variant of a run.

    Each average is loaded when its turn comes. The first turn checks that the run keeps them all.
    """
    scales, settings = request.settings.cfg, request.settings
    sweep = max(len(scales), 1) * len(request.emas) * max(len(request.thresholds), 1) > 1
    if request.samples:
        if len(request.emas) > 1 or (len(scales) > 1 and request.published is None):
            raise UserError("a sweep over --cfg or --ema needs --workdir: it draws images anew")
        yield open_features(request.samples, _square(request.size), request.num)
        return
    if request.prompts and request.prompts.save_images and sweep:
        raise UserError("--save-images holds one set: give one --cfg and --ema")
    if request.save_features and sweep:
        raise UserError("--save-features holds one set: give one --cfg, --ema and threshold")
    check_writable(request.workdir)
    for ema in request.emas:
        run = RunImages(
            request.workdir,
            settings,
            (*protocol.overrides(settings), *request.overrides),
            step=request.step,
            ema=ema,
            vae=request.vae,
            asked=request.prompts and request.prompts.asked,
        )
        for other in request.emas:
            run.check_ema(other)
        for cfg in scales or (run.config.sampling.cfg,):
            guided = run.with_cfg(cfg)
            for threshold in request.thresholds:
                images = guided.with_threshold(threshold)
                yield FeatureSet(str(request.workdir), images=images)
            if not request.thresholds:
                yield FeatureSet(str(request.workdir), images=guided)


def _open_reference(request: Request, digits: bool, samples: FeatureSet) -> FeatureSet | None:
    if request.reference is None:
        if digits:
            return open_features(DIGITS)
        if request.save_features or request.thresholds or request.prompts:
            return None
        raise UserError(
            "nothing to compare with: give --reference, for ImageNet 256x256 ADM's "
            "VIRTUAL_imagenet256_labeled.npz (or --save-features, to make one)"
        )
    size = _square(request.size)
    if size is None and samples.images is not None:
        size = samples.images.shape[:2]
    return open_features(request.reference, size)


def _square(side: int) -> tuple[int, int] | None:
    return (side, side) if side else None


def _make_extractor(request: Request, digits: bool, sides: list[FeatureSet]) -> Extractor:
    """The extractor of features. It needs no Inception weights if every side holds features."""
    if digits:
        return DigitsFeatures()
    settings = request.settings
    if request.inception:
        weights = inception.load_weights(request.inception)
        return InceptionFeatures(weights, settings.resize, settings.quantize, settings.batch_size)
    for side in sides:
        if side.pool is None:
            raise UserError(
                f"{side.name} are images: give the weights that make features of them as "
                "--inception, pytorch-fid's pt_inception-2015-12-05-6726825d.pth"
            )
        side.images = None  # only the stored features can be used
    return StoredFeatures()


class StoredFeatures:
    """Takes the place of an extractor when all features come from files."""

    names = {kind: name for kind, name in InceptionFeatures.names.items() if kind != "score"}
    note = {"network": "as stored"}

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        raise UserError("features can only be made of images with --inception")


def _against(published: ConfigDict | None, used: dict[str, Any]) -> dict[str, Any] | None:
    """The protocol that the user asked for, and where the result deviates from it."""
    if published is None:
        return None
    kept = {key: published[key] for key in ("name", "source", "autoencoder", "reference")}
    return kept | {"deviations": protocol.deviations(published, used)}
