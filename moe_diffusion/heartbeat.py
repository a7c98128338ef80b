"""What a run tells its launcher: heartbeat.json while it lives, summary.json when it ends.

Both lie in the workdir, which may be remote, and are replaced whole. docs/observability.md has
their fields. Nothing depends on them: where they cannot be written, the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_diffusion import remote
from moe_diffusion.writing import save_text

HEARTBEAT, SUMMARY = "heartbeat.json", "summary.json"
EVERY, EVERY_REMOTE = 5.0, 60.0  # seconds between two heartbeats
_SOON = 1.0  # seconds after which a new phase is told


class Heartbeat:
    """Writes workdir/heartbeat.json every few seconds, when it is told of a step.

    It is written by the thread that trains, so that a run that hangs falls silent.

    Args:
      workdir: None for a heartbeat that is not heard.
    """

    def __init__(self, workdir: str | os.PathLike | None):
        self._place = None if workdir is None else place(workdir, HEARTBEAT)
        far = workdir is not None and remote.is_remote(workdir)
        self._every, self._last = (EVERY_REMOTE if far else EVERY), -math.inf
        self._same = {"host": socket.gethostname(), "process": os.getpid(), "started": time.time()}
        self._values: dict[str, Any] = {"phase": None}

    def beat(self, now: bool = False, **values: Any) -> None:
        """Notes values that the next heartbeats have, and writes one if it is time.

        Args:
          now: write in any case, as at the end.
          values: JSON values by field; `phase` says what the run does.
        """
        moved = values.get("phase", self._values["phase"]) != self._values["phase"]
        self._values |= values
        since = time.monotonic() - self._last
        if self._place and (now or since >= self._every or (moved and since >= _SOON)):
            self._last = time.monotonic()
            save(self._place, self._values | {"time": time.time()} | self._same)


def place(workdir: str | os.PathLike, name: str) -> str:
    """The path or URL of a file in a workdir."""
    return f"{os.fspath(workdir).rstrip('/')}/{name}"


def save(path: str, values: Mapping[str, Any]) -> None:
    """Writes a table as JSON, numbers that are not finite as null; not if that is impossible."""
    with contextlib.suppress(OSError):
        save_text(json.dumps(_plain(dict(values)), indent=1) + "\n", path)


def read_summary(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What the last end of a run told; None if it told nothing or the file is damaged."""
    from etils import epath

    with contextlib.suppress(OSError, ValueError):
        found = json.loads((epath.Path(workdir) / SUMMARY).read_text())
        return found if isinstance(found, dict) else None
    return None


def told(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a summary for people: (name, text)."""

    def number(name: str, form: str, unit: str = "") -> str:
        value = summary.get(name)
        good = isinstance(value, int | float) and math.isfinite(value)
        return f"{value:{form}}{unit}" if good else ""

    speed = [number("images_per_sec", ",.4g", " images/s")]
    if summary.get("hosts", 1) != 1:
        speed.append(number("images_per_sec_per_host", ",.4g", " per host"))
    speed += [number("mfu", ".1%", " of the peak (MFU)"), number("tflops", ",.3g", " TFLOP/s")]
    times = [number("step_ms_median", ",.4g", " ms at the median")]
    times += [number("step_ms_p90", ",.4g", " at 90%"), number("step_ms_max", ",.4g", " at most")]
    times.append(number("input_wait_ms", ",.3g", " of them for input"))
    memory = [number("memory_gb", ".3g", f" GB at most ({summary.get('memory_of', 'process')})")]
    last = summary.get("last") if isinstance(summary.get("last"), Mapping) else {}
    experts = [
        f"busiest {last['load_max']:.3g} times the average" if _is(last, "load_max") else "",
        f"{last['dead_experts']:.3g} without a token in a layer"
        if _is(last, "dead_experts")
        else "",
    ]
    rows = {"speed": speed, "steps": times, "memory": memory, "experts": experts}
    texts = {name: ", ".join(filter(None, parts)) for name, parts in rows.items()}
    return [(name, text) for name, text in texts.items() if text]


def _is(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int | float)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, Path) else value
