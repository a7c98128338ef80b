"""Programs that play those of clusters."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).parent


def install(folder: Path, program: str, *names: str) -> Path:
    """Writes programs of these names, which run `program` of this folder; returns their folder."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name in names:
        text = (HERE / program).read_text()
        (place / name).write_text(f"#!{shlex.quote(sys.executable)} -IS\n{text}")
        (place / name).chmod(0o755)
    return place
