"""Clocks, memory and the rate of the machine at hand."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_diffusion.chips import chip_of


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, all of them in turn, after one run to compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_bytes(compiled: Any) -> int:
    """Bytes that a compiled program occupies while it runs: arguments, results, temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def gemm_flops(size: int | None = None, dtype: str = "float32") -> float:
    """FLOP/s of a product of two square matrices in `dtype`, the measure of the machine."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / medians({"gemm": lambda: product(a, a)}, 10)["gemm"]


def peak_flops(dtype: str) -> float:
    """FLOP/s to compare with: of bf16 on an accelerator the data sheet's, else `gemm_flops`."""
    chip = chip_of(jax.devices()[0].device_kind)
    # No data sheet states what a CPU does, and f32 is not what an accelerator's states.
    return chip.flops if chip and dtype == "bfloat16" else gemm_flops(dtype=dtype)


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, without which a number says nothing."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the source tree that runs, or "unknown" where it is no git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
