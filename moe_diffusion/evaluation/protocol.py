"""Protocols, the settings of an evaluation: defaults, published ones, and the report of a result.

A published protocol is a Python file `configs/eval_<name>.py`. Its `get_protocol(arg=None)` starts
from `default()` and sets what the paper and its code say.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion import shipped
from moe_diffusion.checks import check_seed
from moe_diffusion.config.schema import leaves
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.choices import LABELS, MATMULS, QUANTIZATIONS, RESIZES, SCORES
from moe_diffusion.models.parts import compute_dtype
from moe_diffusion.sampling.conditions import spread

DEFAULTS: dict[str, Any] = {
    "name": "",
    "source": "",  # paper and file that the settings come from
    "num_samples": 50_000,
    "labels": "balanced",  # balanced (classes in order) | random (drawn with `seed`)
    "batch_size": 64,  # images sampled together, over all devices
    "seed": 0,
    "sampling": {},  # keys of the run's config.sampling that the protocol fixes
    # Keys of the run's config.model that it fixes. Fields of a router that the run's does not have
    # are left out.
    "model": {},
    "matmul": "tf32",  # how exact float32 products are, at least: see choices.MATMULS
    "cfg": (),  # guidance scales, one result each; () = the run's config.sampling.cfg
    "resize": "tensorflow",  # see inception.resize_images
    "quantize": "round",  # see images.to_pixels
    "score": "torch-fidelity",  # whose Inception Score, see choices.SCORES
    # What the published numbers were made with. A result reports what it used instead.
    "ema": "",  # decay
    "autoencoder": "",
    "reference": "",
}
CHOICES = {"labels": LABELS, "resize": RESIZES, "quantize": QUANTIZATIONS}
CHOICES |= {"score": tuple(SCORES), "matmul": tuple(MATMULS)}


def default() -> ConfigDict:
    """A new protocol. It takes no new keys, except in its sections `sampling` and `model`."""
    protocol = ConfigDict(copy.deepcopy(DEFAULTS)).lock()
    protocol.sampling.unlock()
    protocol.model.unlock()
    return protocol


def load(spec: str) -> ConfigDict:
    """Loads a protocol by its name or file. An argument may follow: "dsmoe", "jit:size=l".

    Raises:
      UserError: no such protocol (the known ones are listed), or its file fails.
    """
    name, _, arg = spec.partition(":")
    path = shipped.find_protocol(name)
    if path is None:
        raise UserError(f"no protocol {name!r}; known are: {', '.join(shipped.protocols())}")
    try:
        protocol = shipped.run_file(path).get_protocol(arg or None)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    except Exception as error:
        raise UserError(f"{path} fails: {type(error).__name__}: {error}") from error
    protocol.name = spec
    validate(protocol)
    return protocol


def validate(protocol: ConfigDict) -> None:
    """Raises a UserError at the first impossible value."""
    for key, choices in CHOICES.items():
        if protocol[key] not in choices:
            raise UserError(f"--{key} {protocol[key]!r} is unknown; choose {' | '.join(choices)}")
    for key in ("num_samples", "batch_size"):
        if protocol[key] < 1:
            raise UserError(f"{key} = {protocol[key]} must be at least 1")
    check_seed("--seed", protocol.seed)


def overrides(protocol: ConfigDict) -> tuple[str, ...]:
    """What the protocol fixes in a run's config, as overrides for `config.load`."""
    fixed = {**leaves(protocol.model, "model."), **leaves(protocol.sampling, "sampling.")}
    return tuple(f"{key}={_as_override(value)}" for key, value in fixed.items())


def _as_override(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def model_settings(model: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value of a section `model`, the dtype as it comes out on this machine."""
    found = leaves(model, "model.")
    if "model.dtype" in found:
        found["model.dtype"] = str(compute_dtype(found["model.dtype"]))
    return found


def deviations(protocol: ConfigDict, used: dict[str, Any]) -> list[str]:
    """Where an evaluation differs from its protocol, like "num_samples: 64 instead of 50000".

    Args:
      used: the settings of a result, those of the model as `model_settings` gives them; the
        autoencoder and the reference by their names. What it lacks is skipped, as much is for
        samples in a file.
    """
    wanted = {key: protocol[key] for key in ("num_samples", "labels", "batch_size", "seed")}
    given = ("resize", "quantize", "score", "matmul", "ema", "autoencoder", "reference")
    wanted |= {key: protocol[key] for key in given if protocol[key]}
    wanted |= {**protocol.sampling.to_dict(), **model_settings(protocol.model)}
    differing = [
        f"{key}: {used.get(key)} instead of {value}"
        for key, value in wanted.items()
        if used.get(key, value) != value
    ]
    if protocol.cfg and used.get("cfg", protocol.cfg[0]) not in protocol.cfg:
        scales = " or ".join(f"{scale:g}" for scale in protocol.cfg)
        differing.append(f"cfg: {used['cfg']:g} instead of {scales}")
    return differing


def make_labels(kind: str, num: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels i32[num]: "balanced", every class equally often and in order; "random", uniform."""
    if kind == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num, dtype=np.int32)
    return spread(num, num_classes).astype(np.int32)


def describe(result: dict[str, Any]) -> str:
    """One line of text: the metrics, then everything that they depend on."""
    numbers = ", ".join(f"{name} {value:.5g}" for name, value in result["metrics"].items())
    conditions = [
        f"{key} {text(value)}"
        for key, value in result.items()
        if key not in ("metrics", "warnings", "sampling") and value not in (None, "", [], {})
    ]
    return f"{numbers} ({'; '.join(conditions)})"


def text(value: Any) -> str:
    """A setting as people read it."""
    if isinstance(value, dict):
        return " ".join(f"{key}={text(item)}" for key, item in value.items() if item != "")
    if isinstance(value, list | tuple):
        return ",".join(text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
