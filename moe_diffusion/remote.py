"""Folders that are not on this machine, like gs://bucket/run."""

from __future__ import annotations

import importlib.util
import os
import re

from moe_diffusion.errors import UserError

# Scheme -> the packages that read and write there: files and TensorBoard events. Checkpoints need
# none (tensorstore).
_DRIVERS = {"gs": ("gcsfs",), "s3": ("s3fs", "boto3")}


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path, or what stands behind the name of a kind ("latents:gs://b"), is a URL."""
    return re.match(r"(\w+:)?[\w.+-]+://", os.fspath(path)) is not None


def check(path: str | os.PathLike, what: str) -> None:
    """Checks that a remote folder can be reached at all; a local path passes.

    Args:
      what: the flag or key that names it, for the message.

    Raises:
      UserError: nothing here reads such a folder, or the package that would is not installed.
    """
    scheme, url, _ = os.fspath(path).partition("://")
    if not url:
        return
    if scheme not in _DRIVERS:
        known = " and ".join(f"{name}://" for name in _DRIVERS)
        raise UserError(f"{what} {path}: {scheme}:// is not supported; {known} are")
    missing = [name for name in _DRIVERS[scheme] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} {path} needs a driver: pip install {' '.join(missing)}")
