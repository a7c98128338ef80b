"""What a run tells: metrics.jsonl, parameters.txt, trackers (TensorBoard) and a progress bar.

Only the main process tells anything.
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
import tqdm
from clu import parameter_overview, platform
from etils import epath

from moe_diffusion import remote
from moe_diffusion.errors import UserError
from moe_diffusion.metric_lines import drop_after
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.trackers import Trackers
from moe_diffusion.writing import save_text


class MetricWriter:
    """Writes `workdir/metrics.jsonl`, tells the trackers, and lists the parameters once.

    `clu.metric_writers` would do this, but it cannot be imported without TensorFlow.
    metrics.jsonl has one JSON object a line, {"step": 100, "loss": 0.25, ...}; a number that is
    not finite is null. Opening drops the lines past `step`, since a resumed run writes them anew.

    Args:
      workdir: where the files lie.
      step: of the restored state.
      project: of Weights & Biases, see `Trackers`.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0, project: str = ""):
        self._folder, is_main = epath.Path(workdir), is_main_process()
        path = self._folder / "metrics.jsonl" if is_main else epath.Path(os.devnull)
        if is_main:
            drop_after(path, step)
        self._trackers = Trackers(workdir, step, project, enabled=is_main)
        self._lines = remote.open_log(path)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **dict.fromkeys(values), **finite}
        try:
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._lines.name} ({error.strerror}): make room or mend the "
                "access, then run the same command again to resume"
            ) from error
        self._trackers.scalars(step, finite)

    def write_outputs(self, step: int, outputs: Mapping[str, Any]) -> None:
        """Writes numbers as scalars, all else as images [H, W, C]: uint8, or floats in [0, 1]."""
        numbers = {name: value for name, value in outputs.items() if np.ndim(value) == 0}
        if numbers:
            self.write_scalars(step, numbers)
        self._trackers.images(step, {k: v for k, v in outputs.items() if k not in numbers})

    def write_setup(self, hparams: Mapping[str, Any], params: Any) -> None:
        """Writes what stays the same in a run.

        Args:
          hparams: the run's config, for the trackers.
          params: tree; parameters.txt lists the shape, dtype, size and sharding of every array.
        """
        self._trackers.hparams(hparams)
        if is_main_process():
            table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
            save_text(table + "\n", self._folder / "parameters.txt")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was complained about where it mattered
            self._lines.close()
        self._trackers.close()


class Progress:
    """Loss, images per second and remaining time: a bar on a terminal, else a line per report.

    Every report is the status of the work unit, too, for launchers that show it (`clu.platform`).

    Args:
      step: the first step is step + 1.
      num_steps: the last.
      batch_size: images per step.
    """

    def __init__(self, step: int, num_steps: int, batch_size: int):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._ended, self._first, self._last_time = step, None, 0.0
        self._enabled = is_main_process()
        hidden = not (self._enabled and sys.stderr.isatty())
        self._bar = tqdm.tqdm(
            initial=step, total=num_steps, unit="step", dynamic_ncols=True, disable=hidden
        )

    def update(self, step: int, ended: int | None = None) -> None:
        """Call when `step` is done. The first call, after the slow first step, starts the clock.

        ended: the last step that is done, if that is a later one. Rates count what has ended.
        """
        self._ended = ended or step
        if self._first is None:
            self._first = self._last_step, self._last_time = self._ended, time.perf_counter()
            self._bar.unpause()
        self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def report(self, step: int, loss: float) -> float:
        """Shows where training stands; returns images per second since the last report.

        That is NaN if no step has ended since, as in the report of the very first step.
        """
        now, steps = time.perf_counter(), self._ended - self._last_step
        rate = self._batch_size * steps / (now - self._last_time) if steps else math.nan
        self._last_step, self._last_time = self._ended, now
        text = f"loss {loss:.4g}" + (f", {rate:.4g} images/s" if rate > 0 else "")
        self._bar.set_postfix_str(text)
        if self._ended > self._first[0] and step < self._num_steps:
            # Of the whole time up to now, in which checkpoints and samples have their share.
            each = (now - self._first[1]) / (self._ended - self._first[0])
            text += f", {tqdm.tqdm.format_interval((self._num_steps - step) * each)} left"
        text = f"step {step}/{self._num_steps}: {text}"
        platform.work_unit().set_task_status(text)
        if self._bar.disable:
            self.write(text)
        return rate

    def write(self, message: str) -> None:
        """Prints a line without tearing the bar.

        Where the output cannot be written, as a log on a full disk, training goes on without.
        """
        if self._enabled:
            with self._bar.external_write_mode(), contextlib.suppress(OSError):
                print(message, flush=True)

    def close(self) -> None:
        self._bar.close()
