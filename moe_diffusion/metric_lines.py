"""The lines of a metrics.jsonl when a run is resumed: which stay, and what is missing."""

from __future__ import annotations

import logging

from etils import epath

from moe_diffusion.reading import table_of
from moe_diffusion.writing import save_text

RATE, MACHINE = "images_per_sec", "machine/"  # what depends on the machine: a name, a prefix


def of_machine(name: str) -> bool:
    """Whether a metric is of the machine and its load, and not of the seed."""
    return name == RATE or name.startswith(MACHINE)


_log = logging.getLogger(__name__)


def drop_after(path: epath.Path, step: int) -> None:
    """Keeps the whole lines of steps up to `step`, which a resumed run goes on from.

    The file is replaced at once or not at all. A last line without an end, as a killed process
    leaves it, goes without a word. What else is lost is told in a warning that names the file, for
    a log that is damaged must not keep a run from training: lines that hold no step, and steps
    before `step` that have no line though the lines before them are closer together.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    *whole, end = data.split(b"\n")
    steps = [_step_of(line) for line in whole]
    if broken := steps.count(None):
        _log.warning("%s: %d damaged lines are left out", path, broken)
    kept = [n for n, found in enumerate(steps) if found is not None and found <= step]
    told = sorted({0} | {steps[n] for n in kept})
    widest = max((b - a for a, b in zip(told, told[1:], strict=False)), default=step)
    if step - told[-1] > widest:
        _log.warning("%s: has no line of steps %d to %d", path, told[-1] + 1, step)
    if end or len(kept) < len(whole):
        save_text("".join(whole[n].decode() + "\n" for n in kept), path)


def _step_of(line: bytes) -> int | None:
    """The step of a line; None if it is damaged."""
    try:
        step = (table_of(line.decode()) or {}).get("step")
    except UnicodeDecodeError:
        return None
    return step if type(step) is int else None
