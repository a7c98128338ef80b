"""Environments of programs that need other versions of packages than the library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moe_diffusion.caches import cache_folder
from tests import cli


def python_with(name: str) -> Path:
    """The Python of the environment of launch/<name>.txt, made on first use.

    It is kept with what else can be made again. There is no way to go on without it: where the
    registry cannot be reached, this fails.
    """
    listed = cli.ROOT / "launch" / f"{name}.txt"
    folder = cache_folder("environments") / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text() != listed.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # -I: what PYTHONPATH names is not in this environment.
        pip = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-compile", "--requirement", listed]
        ran = subprocess.run(pip, capture_output=True, text=True, timeout=cli.HANGS_AFTER)
        assert ran.returncode == 0, f"pip cannot install {listed} here: {ran.stderr[-2000:]}"
        done.write_text(listed.read_text())
    return python
