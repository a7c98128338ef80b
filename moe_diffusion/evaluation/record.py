"""What a result was made with, besides the settings of its protocol."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import moe_diffusion
from moe_diffusion import shipped
from moe_diffusion.data import latents
from moe_diffusion.evaluation.precision import matmul_used
from moe_diffusion.models.parts import compute_dtype

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_OF_ROUTERS = ("group", "threshold", "max_capacity")  # fields that decide who competes, and how far


def made_with(
    config: ConfigDict | None = None,
    devices: int | None = None,
    threshold: float | str | None = None,
) -> dict[str, Any]:
    """The model's numbers, the machine and the software, as JSON takes them.

    Args:
      config: of the run that drew the images; None for images or features from a file.
      devices: how many worked; None for all.
      threshold: of the router, if it is not the config's.

    Returns:
      * dtype: of the model's computations, "auto" resolved: float32 | bfloat16.
      * router: its name and, as far as it has them, group (whose tokens compete), threshold and
        max_capacity (bound at inference, 0 = none).
      * training_data: its augmentation, and whether it really had mirrored images: "yes", "no", or
        "unknown" for latents that are not on this machine.
      * matmul: how float32 arrays are multiplied, see `precision.matmul_used`.
      * devices: their number and kind.
      * software: versions; of this package also the commit.

      The first three only with a config.
    """
    record: dict[str, Any] = {}
    if config is not None:
        record |= {"dtype": str(compute_dtype(config.model.dtype)), "router": _router(config)}
        if threshold is not None:
            record["router"]["threshold"] = threshold
        record["training_data"] = {"augment": config.data.augment, "mirrored": _mirrored(config)}
    kind = jax.local_devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return record | {
        "matmul": matmul_used(),
        "devices": {"count": devices or jax.device_count(), "kind": kind},
        "software": {
            "moe_diffusion": code_version(),
            "python": platform.python_version(),
            **versions,
        },
    }


def code_version() -> str:
    """The package's version, and the commit if the code is a git checkout."""
    command = ["git", "-C", str(shipped.CHECKOUT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if shipped.CHECKOUT:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=10)
            commit = ran.stdout.strip()
    return f"{moe_diffusion.__version__}+{commit}" if commit else moe_diffusion.__version__


def _router(config: ConfigDict) -> dict[str, Any]:
    router = config.model.router
    if router.name == "dense":
        return {"name": router.name}
    return {"name": router.name} | {key: router[key] for key in _OF_ROUTERS if key in router}


def _mirrored(config: ConfigDict) -> str:
    """Whether training saw mirrored images."""
    kind, _, folder = config.data.source.partition(":")
    if config.data.augment != "flip":
        return "no"
    if kind != "latents":
        return "yes"
    if not (Path(folder) / latents.MANIFEST).is_file():
        return "unknown"
    return "yes" if latents.read_manifest(folder)["flip"] else "no"
