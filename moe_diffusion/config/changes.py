"""What may change in the config of a run when it is resumed, and the record of what did."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from moe_diffusion.config.defaults import COMPUTATION, FIXED, RUN_CONTROL
from moe_diffusion.config.draft import is_draft
from moe_diffusion.config.schema import leaves, settle, unknown_key
from moe_diffusion.errors import UserError, explained
from moe_diffusion.writing import save_text

# Keys that the order of the records depends on, see data/pipeline.py.
ORDER = ("data.source", "data.split", "data.batch_size", "seed")
RECORD = "changes.jsonl"  # beside a run's config.json


class Change(NamedTuple):
    """A key with its value before and after; None where a config does not have the key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("absent" if value is None else value for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def compare(old: ConfigDict, new: ConfigDict) -> list[str]:
    """`differences` as texts, "key: old value -> new value"."""
    return [str(change) for change in differences(old, new)]


def differences(old: ConfigDict, new: ConfigDict) -> list[Change]:
    """What makes two configs different runs, in the order of the keys.

    Keys under `RUN_CONTROL` (how long to run, how to save, sample and shard) are left out.
    """
    before, after = _values(old), _values(new)
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(RUN_CONTROL)
    ]


def allowed_changes(
    old: ConfigDict, new: ConfigDict, allowed: Collection[str], workdir: str | os.PathLike
) -> list[Change]:
    """What changes if the run of `old` is resumed with `new`.

    Args:
      allowed: keys that may change, of `train --allow-change`; they need not.
      workdir: of the run, for messages.

    Raises:
      UserError: `allowed` names no key, or one of `FIXED`; or a key changes that is not allowed to.
    """
    known = _values(old) | _values(new)
    for key in allowed:
        if key not in known:
            raise UserError(f"--allow-change: {unknown_key(key, known)}")
    changes = differences(old, new)
    for change in changes:
        why = _fixed(change.key)
        if why and change.key in allowed:
            raise UserError(
                f"--allow-change {change.key}: {change} cannot be, because {why}: set it back to "
                f"resume, or begin another run with --config.init_from={workdir}"
            )
    others = [change for change in changes if change.key not in allowed]
    if others:
        possible = ",".join(change.key for change in others if not _fixed(change.key))
        raise UserError(
            f"{workdir} belongs to a run with another config ({'; '.join(map(str, others))}): "
            "choose another workdir, or set these back to resume"
            + (f", or go on with --allow-change {possible}" if possible else "")
        )
    return changes


def consequences(changes: Sequence[Change]) -> list[str]:
    """A line for each change, and what a change of the data's order means."""
    lines = [f"changed: {change}" for change in changes]
    if any(change.key in ORDER for change in changes):
        lines.append(
            "the data's order: batch n is now batch n of the new settings, as if the run had begun "
            "with them; the same records in another folder keep their order"
        )
    return lines


def record_changes(workdir: str | os.PathLike, step: int, changes: Sequence[Change]) -> None:
    """Adds a line to workdir/changes.jsonl for each change that does not stand there yet.

    A line is {"step", "key", "old", "new", "time"}: the steps after `step` have the new value. The
    file is written whole, because remote files cannot grow.

    Raises:
      UserError: the file is damaged, or cannot be written.
    """
    if not changes:
        return
    path = epath.Path(workdir) / RECORD
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with explained(f"{path} is damaged", "mend it, or move it away", (ValueError, AttributeError)):
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        told = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    for change in changes:
        line = json.loads(json.dumps({"step": step, **change._asdict()}, default=str))
        if line not in told:  # a run that was killed at once has recorded it
            lines.append({**line, "time": now})
    with explained(f"cannot write {path}", "choose another folder", (OSError,)):
        save_text("".join(json.dumps(line) + "\n" for line in lines), path)


def _values(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, also of every loss weight."""
    config = settle(config) if is_draft(config) else config
    values = {**leaves(config), **leaves(config.loss_weights, "loss_weights.")}
    del values["loss_weights"]
    return values


def _fixed(key: str) -> str | None:
    """Why a key cannot change; None if it can."""
    why = (
        why
        for name, why in FIXED.items()
        if key == name or name[-1] == "." and key.startswith(name)
    )
    return None if key in COMPUTATION else next(why, None)
