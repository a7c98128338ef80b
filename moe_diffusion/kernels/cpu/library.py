"""The C++ kernels (cpu.cc) as a library, compiled on this machine when it is first needed.

The machine's own compiler makes the most of its CPU, and nobody has to build wheels. Compiling
takes a few seconds, once: the library stays in ~/.cache/moe_diffusion/kernels. Its name holds a
hash of everything that it was made from, and one of its own bytes. A file that is not as its name
says, or that somebody else could have written, is not loaded but made again. Where no compiler
works there are no C++ kernels, and a warning says what to install.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

from moe_diffusion.caches import cache_folder, is_ours
from moe_diffusion.errors import first_line

SOURCE = Path(__file__).with_name("cpu.cc")
HEADERS = (SOURCE.with_name("cpu_product.h"), SOURCE.with_name("cpu_threads.h"))
PLAN = "moe_diffusion_plan"
ROW_PRODUCTS = "moe_diffusion_row_products"
OUTER_PRODUCTS = "moe_diffusion_outer_products"
FUNCTIONS = (PLAN, ROW_PRODUCTS, OUTER_PRODUCTS)
# Flags for the CPU at hand, to try in turn; Apple's clang knows the second.
FOR_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC")
REMEDY = "install g++ or clang, or `pip install ziglang`, or name a compiler by CXX"
NEEDS = f"needs a C++ compiler, and none works here ({REMEDY})"
MISSING = (
    "no C++ compiler works here, so experts run in plain XLA on the CPU and small ones take up to "
    f"1.7 times as long: {REMEDY}"
)


@functools.cache
def available() -> bool:
    """Whether the kernels can be called. The first call compiles, loads and registers them."""
    failures = []
    for compiler in compilers():
        try:
            library = ctypes.CDLL(str(build(compiler, cache_folder("kernels"))))
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{' '.join(compiler)}: {_reason(error)}")
            continue
        register(library)
        return True
    logging.warning("%s", "; ".join([MISSING, *failures]))
    return False


def register(library: ctypes.CDLL, suffix: str = "") -> None:
    """Registers the library's functions with XLA, `suffix` appended to their names."""
    for name in FUNCTIONS:
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name + suffix, capsule, platform="cpu")


def compilers() -> Iterator[tuple[str, ...]]:
    """Compiler commands to try in turn: the one in the variable CXX, or else all that are found."""
    if "CXX" in os.environ:
        yield tuple(shlex.split(os.environ["CXX"]))
        return
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            yield (path,)
    if importlib.util.find_spec("ziglang"):
        yield (sys.executable, "-m", "ziglang", "c++")


def build(
    compiler: tuple[str, ...], folder: Path, machine: tuple[tuple[str, ...], ...] = FOR_THIS_CPU
) -> Path:
    """Returns the path of the library in `folder`, and compiles it if it is not there yet.

    machine: alternative flags for the CPU; the first that the compiler accepts are used.
    Raises OSError or subprocess.SubprocessError if the compiler fails.
    """
    for flags in machine:
        # The macros that the compiler predefines tell its version and what the CPU can do.
        command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        defines = subprocess.run(command, capture_output=True, timeout=60)
        if defines.returncode == 0:
            break
    else:
        defines.check_returncode()
    include = jax.ffi.include_dir()
    command = [*compiler, *FLAGS, *flags, "-isystem", include, str(SOURCE)]
    parts = [path.read_bytes() for path in (SOURCE, *HEADERS)]
    parts += [defines.stdout, jaxlib.__version__.encode(), " ".join(map(str, command)).encode()]
    key = _digest(b"".join(parts))
    for path in folder.glob(f"{key}-*.so"):
        if is_ours(path) and path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink()
    logging.info("compiling %s for this CPU, once", SOURCE.name)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-o", unfinished], check=True, capture_output=True, text=True, timeout=300
        )
        os.chmod(unfinished, 0o700)
        path = folder / f"{key}-{_digest(Path(unfinished).read_bytes())}.so"
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _reason(error: Exception) -> str:
    """The compiler's first error message, or why it did not run."""
    said = getattr(error, "stderr", None) or ""
    if isinstance(said, bytes):
        said = said.decode(errors="replace")
    complaints = [line for line in said.splitlines() if "error" in line]
    return complaints[0].strip() if complaints else first_line(error)
