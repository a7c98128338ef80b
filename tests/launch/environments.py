"""Environments of programs that need other versions of packages than the library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moe_diffusion.caches import cache_folder


def python_with(requirement: str) -> Path:
    """The Python of an environment with one requirement, made on first use.

    It is kept with what else can be made again. There is no way to go on without it: where the
    registry cannot be reached, this fails.
    """
    folder = cache_folder("environments") / requirement.replace("==", "-")
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        ran = subprocess.run([*pip, requirement], capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, f"pip cannot install {requirement} here: {ran.stderr[-2000:]}"
        done.touch()
    return python
