"""Host memory on CPU: huge pages, and what a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from importlib.metadata import entry_points

import jax

# malloc.h of glibc, mman.h of Linux
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Makes the main heap one of huge pages that never shrinks; returns whether (Linux, on CPU).

    XLA:CPU allocates its temporaries, a gigabyte for DSMoE-S, anew in every step. By default such
    blocks go back to the kernel when freed, and the next step waits for their pages to be zeroed
    again: 0.7 of 5.8 CPU seconds a step. Pages of 2 MB save another 5%. The price is that the
    process never shrinks.

    Only the main thread's heap can grow to any size, so it has to start programs itself: no
    asynchronous dispatch. XLA's own threads keep heaps of their own for what a product needs; in
    the main one, which tracing and compiling leave full of holes, the search for a place takes
    5% of a step.

    To be called before jax starts its threads, that is, before it is asked for a device.
    """
    if platform.libc_ver()[0] != "glibc" or not _runs_on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No mmap for large blocks, no trimming.
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    if done:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _grow_heap_of_huge_pages(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return bool(done)


def return_freed_memory() -> None:
    """Undoes the keeping for large blocks: for models whose state fills the machine.

    One block that outlives a step cuts the hole where the step's temporaries were, and the next
    step's no longer fit into it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)  # both as they are by default
        libc.malloc_trim(0)


def _grow_heap_of_huge_pages(size: int) -> None:
    """Grows the heap by `size` bytes of address space that the kernel may back with huge pages.

    Nothing is touched, so no memory is used yet. Where the kernel refuses, all stays as it was.
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


def host_memory() -> int | None:
    """Bytes of memory that training on CPU can use; None on accelerators, which tell themselves."""
    if jax.default_backend() != "cpu":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _runs_on_cpu() -> bool:
    """Whether jax will run on CPU, without starting it: by its setting or what is installed."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")
