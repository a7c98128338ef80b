"""What a run tells: metrics.jsonl, parameters.txt and trackers (TensorBoard).

Only the main process tells anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from clu import parameter_overview
from etils import epath

from moe_diffusion import remote
from moe_diffusion.errors import explained
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
        remedy = "make room or mend the access, then run the same command again to resume"
        with explained(f"cannot write {self._lines.name}", remedy, (OSError,)):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
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
