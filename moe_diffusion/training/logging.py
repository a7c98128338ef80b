"""What a run tells: metrics.jsonl, TensorBoard events and a progress bar.

All of it is silent on every process but the main one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorboardX
import tqdm
from etils import epath

from moe_diffusion.errors import UserError
from moe_diffusion.parallel.distributed import is_main_process


class MetricWriter:
    """clu's `MetricWriter` interface over `workdir/metrics.jsonl` and TensorBoard events.

    metrics.jsonl has one JSON object a line, {"step": 100, "loss": 0.25, ...}; a number that is
    not finite is null. Opening drops the lines past `step`, as a resumed run writes them anew.

    Args:
      workdir: where the files lie.
      step: of the restored state.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        self._enabled = is_main_process()
        if not self._enabled:
            return
        path = epath.Path(workdir) / "metrics.jsonl"
        _drop_after(path, step)
        self._lines = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._lines.write(json.dumps({"step": step, **line}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._lines.name} ({error.strerror}): make room or mend the "
                "access, then run the same command again to resume"
            ) from error
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: name -> [H, W, C] or [N, H, W, C]; uint8, or floats in [0, 1]."""
        if not self._enabled:
            return
        for name, image in images.items():
            image = np.asarray(image)
            add = self._events.add_images if image.ndim == 4 else self._events.add_image
            add(name, image, step, dataformats="HWC" if image.ndim == 3 else "NHWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        if not self._enabled:
            return
        for name, text in texts.items():
            self._events.add_text(name, text, step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Shows the hyperparameters as one indented JSON text."""
        text = json.dumps(dict(hparams), indent=4, default=str)
        self.write_texts(0, {"hparams": "".join(f"    {line}\n" for line in text.splitlines())})

    def flush(self) -> None:
        if self._enabled:
            self._events.flush()

    def close(self) -> None:
        if self._enabled:
            with contextlib.suppress(OSError):  # a full disk was complained about where it mattered
                self._lines.close()
                self._events.close()


def _drop_after(path: epath.Path, step: int) -> None:
    """Keeps the whole lines of steps up to `step`; the file is replaced at once or not at all."""
    if not path.exists():
        return
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if kept != lines:
        part = path.parent / ".metrics.jsonl.part"
        part.write_text("".join(kept))
        part.replace(path)


def _step_of(line: str) -> float:
    """Infinity for a line that a killed process left incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """Loss, images per second and remaining time: a bar on a terminal, else a line per report.

    Args:
      step: the first step is step + 1.
      num_steps: the last.
      batch_size: images per step.
    """

    def __init__(self, step: int, num_steps: int, batch_size: int):
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._last = (step, None)  # of the last report: step, time
        self._paused = 0.0
        self._enabled = is_main_process()
        self._bar = None
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm.tqdm(initial=step, total=num_steps, unit="step", dynamic_ncols=True)

    def update(self, step: int) -> None:
        """Call when `step` is done. The first call, after compilation, starts the clock."""
        if self._last[1] is None:
            self._last = (step, time.perf_counter())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def report(self, step: int, loss: float) -> float:
        """Shows where training stands; returns images per second since the last report.

        That is NaN for the very first step, whose time is compilation.
        """
        last_step, last_time = self._last
        now = time.perf_counter()
        seconds = now - last_time - self._paused
        self._last, self._paused = (step, now), 0.0
        rate = self._batch_size * (step - last_step) / seconds if step > last_step else math.nan
        text = f"loss {loss:.4g}" + (f", {rate:.4g} images/s" if rate > 0 else "")
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return rate
        if rate > 0:
            left = (self._num_steps - step) * self._batch_size / rate
            text = f"{text}, {tqdm.tqdm.format_interval(left)} left"
        self.write(f"step {step}/{self._num_steps}: {text}")
        return rate

    def write(self, message: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(message)
        elif self._enabled:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
