"""The progress of long work that has steps: a bar, or lines for a log, and how fast it is."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tqdm
from clu import platform

from moe_diffusion import heartbeat
from moe_diffusion.chips import chip_of
from moe_diffusion.metric_lines import MACHINE, RATE
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.step_times import StepTimes


class Progress:
    """Loss, images per second and remaining time: a bar on a terminal, else a line per report.

    Every report is the status of the work unit, too, for launchers that show it (`clu.platform`).

    Args:
      step: the first step is step + 1.
      num_steps: the last.
      batch_size: images per step.
      workdir: where heartbeat.json and summary.json go, from `compiling` on; None for neither.
      flops: of the model for an image, forward and backward; 0 if they are not known.
    """

    def __init__(
        self,
        step: int,
        num_steps: int,
        batch_size: int,
        workdir: str | os.PathLike | None = None,
        flops: float = 0.0,
    ):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._ended, self._first, self._last_time = step, None, 0.0
        self._enabled = is_main_process()
        self._workdir = workdir if self._enabled else None
        self._heart, self._begun, self._flops = heartbeat.Heartbeat(None), 0.0, flops
        self._times, self._values = StepTimes(), {"started_at_step": step}
        self._last: dict[str, Any] = {}
        hidden = not (self._enabled and sys.stderr.isatty())
        self._bar = tqdm.tqdm(
            initial=step, total=num_steps, unit="step", dynamic_ncols=True, disable=hidden
        )

    def update(self, step: int, ended: int | None = None) -> None:
        """Call when `step` is done. The first call, after the slow first step, starts the clock.

        ended: the last step that is done, if that is a later one. Rates count what has ended.
        """
        self._ended = ended or step
        now = time.perf_counter()
        self._times.ended(self._ended, now)
        if self._first is None:
            self._first = self._last_step, self._last_time = self._ended, now
            self._bar.unpause()
        self._bar.update(step - self._bar.n)
        self._heart.beat(step=step, phase="training")

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The time before the first step, which is announced and told. The workdir is ours now."""
        self._heart, self._begun = heartbeat.Heartbeat(self._workdir), time.perf_counter()
        same = {"num_steps": self._num_steps, "processes": jax.process_count()}
        self._heart.beat(True, step=self._ended, phase="compiling", **same)
        self.write("compiling ...")
        yield
        seconds = time.perf_counter() - self._begun
        self._values["compile_seconds"] = seconds
        self.write(f"compiled in {seconds:.1f} s")

    @contextlib.contextmanager
    def compiling_for(self, what: str) -> Iterator[None]:
        """Time in which another program is compiled amid training; it is announced and told."""
        self.write(f"compiling for {what} ...")
        start = time.perf_counter()
        with self.paused("compiling"):
            yield
        seconds = time.perf_counter() - start
        if self._first is not None:  # it does not come again in the time that is left
            self._first = self._first[0], self._first[1] + seconds
        self.write(f"compiled in {seconds:.1f} s")

    @contextlib.contextmanager
    def paused(self, phase: str = "saving") -> Iterator[None]:
        """Time that does not count as training."""
        self._heart.beat(phase=phase)
        start = time.perf_counter()
        yield
        pause = time.perf_counter() - start
        self._last_time += pause
        self._times.pause(pause)

    def next_of(self, iterator: Iterator) -> Any:
        """The next item of an iterator; the wait for it is measured."""
        start = time.perf_counter()
        item = next(iterator)
        self._times.waited(time.perf_counter() - start)
        return item

    def report(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Shows where training stands; adds to the values of a step how fast it goes.

        Args:
          values: numbers of the step, "loss" among them.

        Returns:
          The values, the loss first; images_per_sec since the last report; and under "machine/"
          what `StepTimes.lately` tells and `_use` adds. Rates are NaN if no step has ended since,
          as at the report of the very first step.
        """
        now, steps, loss = time.perf_counter(), self._ended - self._last_step, float(values["loss"])
        rate = self._batch_size * steps / (now - self._last_time) if steps else math.nan
        self._last_step, self._last_time = self._ended, now
        values = {"loss": loss} | {name: float(value) for name, value in values.items()}
        self._last = {"step": step, **values}
        self._heart.beat(loss=loss, images_per_sec=rate)
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
        measured = self._times.lately() | self._use(rate)
        return (
            values | {RATE: rate} | {f"{MACHINE}{name}": value for name, value in measured.items()}
        )

    def _use(self, rate: float) -> dict[str, float]:
        """What `rate` images per second make of the devices, and what memory the run has taken.

        tflops is 10^12 FLOP/s of all devices together, as the model's formulas count them: what is
        computed again or padded does not count. mfu is their share of the chips' bf16 peak; it is
        missing where that is unknown, as of a CPU. memory_gb is 10^9 bytes at the peak, of the
        fullest device of this process, or of the process where devices do not tell.
        """
        found: dict[str, float] = {}
        if self._flops:
            found["tflops"] = self._flops * rate / 1e12
            if chip := chip_of(jax.devices()[0].device_kind):
                peak = jax.device_count() * chip.flops / chip.devices
                found["mfu"] = self._flops * rate / peak
        used = [(device.memory_stats() or {}) for device in jax.local_devices()]
        peaks = [stats["peak_bytes_in_use"] for stats in used if "peak_bytes_in_use" in stats]
        unit = 1 if sys.platform == "darwin" else 1024
        resident = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._values["memory_of"] = "device" if peaks else "process"
        return found | {"memory_gb": max(peaks, default=resident) / 1e9}

    def write(self, message: str) -> None:
        """Prints a line without tearing the bar.

        Where the output cannot be written, as a log on a full disk, training goes on without.
        """
        if self._enabled:
            with self._bar.external_write_mode(), contextlib.suppress(OSError):
                print(message, flush=True)

    def close(self) -> None:
        """Ends the bar; if training has begun, tells how it went in summary.json."""
        self._bar.close()
        if not (self._begun and self._workdir is not None):
            return
        phase = "finished" if self._ended >= self._num_steps else "stopped"
        self._heart.beat(True, step=self._ended, phase=phase)
        heartbeat.save(heartbeat.place(self._workdir, heartbeat.SUMMARY), self._summary(phase))

    def _summary(self, phase: str) -> dict[str, Any]:
        """The fields of summary.json; docs/observability.md explains them."""
        hosts, overall = jax.process_count(), self._times.overall()
        rate = self._batch_size * 1e3 / self._times.mean_ms()
        where = {"hosts": hosts, "devices": jax.device_count()}
        where["device"] = jax.devices()[0].device_kind
        speed = {RATE: rate, f"{RATE}_per_host": rate / hosts, **overall, **self._use(rate)}
        first = {"step": self._ended, "num_steps": self._num_steps, "phase": phase}
        first |= {"time": time.time(), "seconds": time.perf_counter() - self._begun}
        return first | self._values | where | speed | {"last": self._last}
