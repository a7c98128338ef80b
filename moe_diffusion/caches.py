"""Where things lie that can be made again: compiled programs and kernels, small classifiers."""

from __future__ import annotations

from pathlib import Path

import jax


def cache_folder(name: str) -> Path:
    """The folder of one kind of such things, ~/.cache/moe_diffusion/<name>; it may not exist yet.

    Raises:
      RuntimeError: the user has no home folder.
    """
    return Path.home() / ".cache" / "moe_diffusion" / name


def keep_programs(folder: str) -> None:
    """Keeps compiled programs between runs: in `folder`, "" the default one, "off" nowhere."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder or jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder or str(cache_folder("jax")))
