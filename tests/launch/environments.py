"""Environments of programs that need other versions of packages than the library."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import cli

FOLDER = cli.ROOT / ".pytest_cache" / "environments"


def python_with(name: str) -> Path:
    """The Python of the environment of launch/<name>.txt, made on first use.

    It is kept beside what else the tests can make again. There is no way to go on without it: where
    the registry cannot be reached, this fails.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may want it at the same time
        return _made(name)


def _made(name: str) -> Path:
    listed = cli.ROOT / "launch" / f"{name}.txt"
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"# {sys.version}\n{listed.read_text()}"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        # Without a pip of its own, which takes seconds: that of this environment serves it.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        pip += ["--no-compile", "--disable-pip-version-check", "--requirement", listed]
        # What PYTHONPATH names is not in this environment.
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        ran = subprocess.run(
            pip, env=env, cwd=folder, capture_output=True, text=True, timeout=cli.HANGS_AFTER
        )
        assert ran.returncode == 0, f"pip cannot install {listed} here: {ran.stderr[-2000:]}"
        done.write_text(wanted)
    return python
