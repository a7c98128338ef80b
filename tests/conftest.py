"""Environment of the tests; must be set before anything imports jax. Child processes inherit it."""

import gc
import os
import sys
import time
from pathlib import Path

import pytest

# Run the GPU tests with JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Eight devices on one CPU, so that sharding is tested everywhere. XLA's older emitters and an
# undivided module compile four times as fast, and what is compiled here runs only a few times.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)
given = os.environ.get("XLA_FLAGS", "")
added = [flag for flag in FLAGS if flag.split("=")[0] not in given]
os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *added]))

# Compiled programs survive between runs, small ones too: compiling is most of the suite's time.
cache = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# The workers of pytest-xdist share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def silence_ends_with_the_test(monkeypatch):
    """A failed restore leaves reads behind, which must be gone before complaints count again."""
    before = sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", before)  # is set back
    yield
    now = sys.unraisablehook
    if now is not before and not getattr(now, "of_orbax", False):
        time.sleep(0.05)
        gc.collect()


def named_in(file: str) -> frozenset[str]:
    return frozenset((Path(__file__).parent / file).read_text().splitlines())


# Tests that `pytest --durations=0` showed to be long, where others test the same thing sooner; and
# those of them that `make test-slow` leaves out, too.
SLOW, EXHAUSTIVE = named_in("slow.txt"), named_in("exhaustive.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests of these files, before -m chooses. What is exhaustive is slow, too."""
    for item in items:
        if item.nodeid in EXHAUSTIVE:
            item.add_marker(pytest.mark.exhaustive)
        if item.nodeid in SLOW or any(item.iter_markers("exhaustive")):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """LLVM's polish costs more than it saves in programs that run a few times."""
    import jax

    for_accelerators = any(item.iter_markers("gpu")) or any(item.iter_markers("tpu_aot"))
    jax.config.update("jax_disable_most_optimizations", not for_accelerators)
