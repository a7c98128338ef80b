"""The heap of XLA:CPU: it consists of huge pages, and keeps what a step frees for the next."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from importlib.metadata import entry_points

import jax

from moe_diffusion.errors import UserError

# malloc.h of glibc, mman.h of Linux
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Gives the main thread a heap of huge pages that never shrinks, on CPU under Linux.

    XLA:CPU allocates its temporaries, a gigabyte for DSMoE-S, anew in every step. By default such
    blocks go back to the kernel when freed, and the next step waits until their pages are zeroed
    again: 0.7 of 5.8 CPU seconds a step. Pages of 2 MB save another 5%. The price is that the
    process never shrinks.

    Only the heap of the main thread can grow to any size. Therefore the main thread has to start
    programs itself, and asynchronous dispatch is turned off. XLA's own threads have heaps of their
    own for what a product needs: tracing and compiling leave the main heap full of holes, where the
    search for a place would take 5% of a step.

    Call it before jax starts its threads, that is, before jax is asked for a device.

    Returns:
      Whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or not _runs_on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mmap for large blocks, no trimming.
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    if done:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _grow_heap_of_huge_pages(_host_memory())
    return bool(done)


def make_room(size: int) -> None:
    """Prepares the heap for a state of `size` bytes: parameters, gradients, moments and averages.

    For a state that fills a third of the machine, large blocks are returned again when freed. One
    block that outlives a step cuts the hole where the step's temporaries were, and those of the
    next step no longer fit into it. Accelerators complain by themselves where something does not
    fit; the kernel would kill the process without a word.

    Raises:
      UserError: the state does not fit into the memory of a CPU.
    """
    if jax.default_backend() != "cpu":
        return
    memory = _host_memory()
    if size + 1e9 > memory:
        raise UserError(
            f"parameters, gradients, moments and averages take {size / 1e9:.1f} GB, and the "
            f"machine has {memory / 1e9:.1f} GB: save with optim.mu_dtype=bfloat16, "
            "ema.decays=() or a smaller model"
        )
    if size > memory / 3 and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)  # both as they are by default
        libc.malloc_trim(0)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _grow_heap_of_huge_pages(size: int) -> None:
    """Grows the heap by `size` bytes of address space, for which the kernel may use huge pages.

    No page is touched, so no memory is used yet. Where the kernel refuses, nothing changes.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(size)
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, block + size - start, _MADV_HUGEPAGE)
        libc.free(block)


def _runs_on_cpu() -> bool:
    """Whether jax will run on CPU, without starting it: by its setting or what is installed."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")
