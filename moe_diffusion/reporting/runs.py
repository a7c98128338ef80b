"""What a workdir holds, read for a report: nothing here trains, and nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from moe_diffusion import heartbeat, reading
from moe_diffusion.errors import UserError, shown
from moe_diffusion.sampling.load import CONFIG, load_config
from moe_diffusion.training.checkpoint import saved_steps

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples"
_STAGES = ("shared", "experts", "groups")  # of a distillation, in order
_LOG = 256 << 20  # bytes; a log of a million lines is as large


@dataclasses.dataclass
class Run:
    """One run.

    Attributes:
      label: its name on the page.
      folder: its workdir, which may be remote.
      config: None if config.json cannot be read; `notes` say why.
      columns: metric -> {step: value}; values that are not finite are left out.
      evaluations: the results in evaluations.jsonl, as `evaluator.evaluate` yields them.
      samples: step -> picture.
      checkpoints: their steps.
      summary: of its last end (`heartbeat.SUMMARY`); {} if it has none.
      notes: what is missing or damaged, for people.
    """

    label: str
    folder: epath.Path
    config: ConfigDict | None = None
    columns: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: dict[int, epath.Path] = dataclasses.field(default_factory=dict)
    checkpoints: list[int] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that anything tells of."""
        logged = (max(column) for column in self.columns.values())
        return max([*logged, *self.checkpoints, *self.samples], default=0)


def open_runs(workdirs: Sequence[str], labels: Sequence[str] = ()) -> list[Run]:
    """The runs of some workdirs. A distillation has one for each of its stages.

    Args:
      labels: of the workdirs; the ends of their paths by default.

    Raises:
      UserError: a folder holds no run, a folder stands there twice, or the labels do not fit.
    """
    if len(set(map(_real, workdirs))) < len(workdirs):
        raise UserError("--workdir names a folder twice: give each run once")
    labels = labels or _short(workdirs)
    if len(labels) != len(workdirs) or len(set(labels)) < len(labels):
        raise UserError(
            f"{len(workdirs)} workdirs need as many different --labels, and there are "
            f"{len(set(labels))}"
        )
    runs = []
    for workdir, label in zip(workdirs, labels, strict=True):
        places = _places(epath.Path(workdir))
        if not places:
            raise UserError(
                f"{workdir} holds no run (no {METRICS} and no checkpoint, also not in a stage of a "
                "distillation): name the folder of a training"
            )
        for name, folder in places.items():
            runs.append(_read(f"{label}/{name}" if name else label, folder))
    return runs


def _places(folder: epath.Path) -> dict[str, epath.Path]:
    """Name of a stage -> its folder; "" for a run that has none; {} if there is no run."""
    if (folder / METRICS).exists() or saved_steps(folder):
        return {"": folder}
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if (path / METRICS).exists()]

    def order(path: epath.Path) -> tuple[int, str]:
        kind = re.sub(r"\d+$", "", path.name)
        return (_STAGES.index(kind) if kind in _STAGES else len(_STAGES)), path.name

    return {path.name: path for path in sorted(found, key=order)}


def _read(label: str, folder: epath.Path) -> Run:
    run = Run(label, folder)
    try:
        run.config = load_config(folder)
    except UserError as error:
        run.notes.append(f"{CONFIG}: {error}")
    run.columns = _columns(run)
    run.evaluations = [
        record
        for _, record in _records(run, EVALUATIONS)
        if isinstance(record.get("metrics"), dict)
    ]
    for path in (folder / SAMPLES).glob("*.png"):
        if match := re.match(r"(\d{1,15})(-\d+)?$", path.stem):
            run.samples[int(match[1])] = path
    run.samples = dict(sorted(run.samples.items()))
    run.checkpoints = saved_steps(folder)
    run.summary = heartbeat.read_summary(folder) or {}
    return run


def _columns(run: Run) -> dict[str, dict[int, float]]:
    """The numbers of metrics.jsonl; if a resumed run wrote a step again, the later line counts."""
    columns: dict[str, dict[int, float]] = {}
    lost = 0
    for _, record in _records(run, METRICS):
        step = record.pop("step", None)
        if type(step) is not int:
            lost += 1
            continue
        for name, value in record.items():
            if type(value) in (int, float):
                columns.setdefault(name, {})[step] = float(value)
    if lost:
        run.notes.append(f"{METRICS}: {lost:,} lines without a step are left out")
    return {name: dict(sorted(column.items())) for name, column in columns.items()}


def _records(run: Run, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, table) of the lines of a .jsonl file; notes those that are damaged.

    A last line that is cut off in the middle (the run goes on, or was killed) is passed over.
    """
    path, broken = run.folder / name, []
    if not path.exists():
        if name == METRICS:
            run.notes.append(f"{name} is not there: no curves")
        return
    try:
        text = reading.read_text(path, "log", most=_LOG)
    except UserError as error:
        run.notes.append(str(error))
        return
    *lines, last = text.split("\n")
    for number, line in enumerate([*lines, last], 1):
        record = reading.table_of(line) if line.strip() else None
        if record is not None:
            yield number, record
        elif line.strip() and number <= len(lines):
            broken.append((number, line))
    if broken:
        number, line = broken[0]
        several = f"{len(broken):,} damaged lines are" if len(broken) > 1 else "a damaged line is"
        run.notes.append(f"{name}: {several} left out, the first is line {number}: {shown(line)}")


def _real(workdir: str) -> str:
    return workdir.rstrip("/") if "://" in workdir else os.path.realpath(workdir)


def _short(workdirs: Sequence[str]) -> list[str]:
    """As many folders of each path, from its end, as tell all of them apart."""
    parts = [[part for part in workdir.split("/") if part] for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(workdirs)


def readable(value: Any) -> str:
    """A value of a config as text."""
    if isinstance(value, tuple | list):
        return ", ".join(map(readable, value)) or "()"
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, dict):
        return ", ".join(f"{name}={readable(part)}" for name, part in value.items()) or "{}"
    with contextlib.suppress(TypeError):
        return f"{value:g}" if isinstance(value, float) and value != int(value) else str(value)
    return str(value)
