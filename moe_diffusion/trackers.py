"""Where people watch a run: TensorBoard events, and Weights & Biases if the user names a project.

Nothing depends on these. The first failure of one is told in a line and ends that one alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import textwrap
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from moe_diffusion.errors import UserError, explained
from moe_diffusion.ornaments import ornament, warn
from moe_diffusion.writing import save_text


def check(project: str) -> None:
    """Raises a UserError if a project of Weights & Biases is named and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"train.wandb = {project!r} needs wandb: pip install wandb")


class Trackers:
    """All trackers of a run as one.

    Args:
      workdir: where TensorBoard's events go; it may be remote.
      step: the last step that is kept; a resumed run writes those after it anew.
      project: of Weights & Biases; "" for none.
      enabled: False on all but the main process, which alone tells anything.

    Raises:
      UserError: Weights & Biases is asked for and does not start.
    """

    def __init__(
        self, workdir: str | os.PathLike, step: int, project: str = "", enabled: bool = True
    ):
        self._open: dict[str, Any] = {}
        if not enabled:
            return
        if project:
            self._open["wandb"] = _WandB(workdir, project)
        with ornament("TensorBoard events"):
            self._open["TensorBoard"] = _TensorBoard(workdir, step)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The run's config, as nested dicts."""
        self._each(lambda tracker: tracker.hparams(values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: name -> [H, W, C]; uint8, or floats in [0, 1]."""
        self._each(lambda tracker: tracker.images(step, images))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                warn(f"{name} gets nothing more", error)
                with contextlib.suppress(Exception):
                    self._open.pop(name).close()


# Scheme -> what tensorboardX writes with.
_DRIVERS = {"gs": "google.cloud.storage", "s3": "boto3"}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


class _TensorBoard:
    """An event file, written by this thread.

    `tensorboardX.SummaryWriter` writes in another thread. On a full disk that thread dies, and the
    run would wait for it for ever once its queue is full.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        # Imported here because the command lines that only read need none of it.
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._summary = event_pb2.Event, summary
        scheme, remote, _ = os.fspath(workdir).partition("://")
        if not remote:
            Path(workdir).mkdir(parents=True, exist_ok=True)
        elif not _installed(_DRIVERS.get(scheme, "no_driver")):  # its writers fail twice then
            raise UserError(f"{scheme}:// needs {_DRIVERS.get(scheme, 'another writer')}")
        # Random, because two runs in one second must not write the same file.
        name = f"{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        path = os.path.join(os.fspath(workdir), f"events.out.tfevents.{name}")
        self._file = record_writer.RecordWriter(path)
        self._write(0, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step + 1, session_log=start)  # TensorBoard forgets later steps of older files

    def hparams(self, values: Mapping[str, Any]) -> None:
        text = textwrap.indent(json.dumps(dict(values), indent=4, default=str), "    ")
        self._write(0, summary=self._summary.text("hparams", text + "\n"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._summary.scalar(name, value))
        self._file.flush()

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._write(step, summary=self._summary.image(name, image, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        self._file.write(event.SerializeToString())


class _WandB:
    """A run of Weights & Biases that goes on when the workdir is resumed: wandb.json has its id."""

    def __init__(self, workdir: str | os.PathLike, project: str):
        check(project)
        import wandb

        self._wandb, place = wandb, epath.Path(workdir) / "wandb.json"
        try:
            name = str(json.loads(place.read_text())["id"])
        except (OSError, ValueError, KeyError, TypeError):  # a new run, or nothing to go on with
            name = uuid.uuid4().hex[:12]
            save_text(json.dumps({"id": name}) + "\n", place)
        remedy = "run `wandb login`, set WANDB_MODE=offline, or leave train.wandb out"
        with explained(f"train.wandb = {project!r} does not start", remedy):
            self._run = wandb.init(
                project=project,
                id=name,
                name=Path(workdir).name,
                dir=os.fspath(workdir),
                resume="allow",
            )

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
