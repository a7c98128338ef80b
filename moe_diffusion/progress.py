"""The progress of long work that has steps: a bar, or lines for a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator

import tqdm
from clu import platform

from moe_diffusion.parallel.distributed import is_main_process


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
