"""Host memory on CPU: keep what a step frees, since the next step wants the same again."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from importlib.metadata import entry_points

import jax

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory; returns whether it did (only on Linux, running on CPU).

    XLA:CPU allocates its temporaries, a gigabyte for DSMoE-S, anew in every step. By default such
    blocks go back to the kernel when freed, and the next step waits for their pages to be zeroed
    again: 0.7 of 5.8 CPU seconds a step. The price is that the process never shrinks.

    To be called before jax starts its threads, that is, before it is asked for a device.
    """
    if platform.libc_ver()[0] != "glibc" or not _runs_on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mmap for large blocks, no trimming, and one heap for all threads, which alone can grow.
    return all(
        mallopt(name, value)
        for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    )


def _runs_on_cpu() -> bool:
    """Whether jax will run on CPU, without starting it: by its setting or what is installed."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")
