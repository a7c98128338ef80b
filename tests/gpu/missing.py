"""Says which packages of setup.cfg this Python lacks, and the command that installs them.

    python tests/gpu/missing.py

For machines that bring their own jax, where an installation of everything would replace it.
"""

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "setup.cfg"


def missing() -> list[str]:
    """Requirements, as setup.cfg has them, whose package is not installed; pytest among them."""
    config = configparser.ConfigParser()
    config.read(CONFIG)
    wanted = config["options"]["install_requires"].split("\n") + ["pytest>=8.0"]
    return [line for line in wanted if line and not _installed(line)]


def _installed(requirement: str) -> bool:
    try:
        metadata.version(re.match(r"[\w.-]+", requirement)[0])
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    if absent := missing():
        quoted = " ".join(f"'{requirement}'" for requirement in absent)
        sys.exit(f"error: missing packages: {sys.executable} -m pip install {quoted}")
