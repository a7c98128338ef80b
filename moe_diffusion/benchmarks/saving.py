"""What a checkpoint costs the steps that are made while it is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moe_diffusion import config as configs
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.synthetic import Synthetic
from moe_diffusion.training.loop import train

SAVES = 3  # checkpoints that are measured
EVERY = 12  # steps between them
WARM = 2  # first steps, which are not counted


def bench_saving(spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A real run of a config in a temporary folder, with SAVES checkpoints before its last.

    ratio: median time of the steps that begin or end while a checkpoint is under way over that of
    the others; most: the longest of them over the same.

    Raises:
      UserError: no step ended during a save, or each did.
    """
    steps = EVERY * (SAVES + 1)
    own = {"train.num_steps": steps, "checkpoint.every": EVERY, "checkpoint.keep_last": 1}
    own |= {"train.sample_every": 1, "train.log_every": steps, "optim.schedule": "constant"}
    own |= {"optim.warmup_steps": 0, "data.source": "synthetic"}
    config = configs.load(spec, [f"{key}={value}" for key, value in own.items()] + [*overrides])
    model = build(config.model, losses=sorted(config.loss_weights))
    source = Synthetic(model.input_shape, model.cond_spec())
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock(Path(folder) / "checkpoints")

        def images() -> Any:
            return make_iterator(source, config.data, seed=config.seed)

        train(config, model, make_loss(model, config), images, folder, hooks=[clock.tick])
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    seconds = np.diff(clock.times)
    under_way = np.array(clock.saving)
    saving = under_way[1:] | under_way[:-1]
    usual = seconds[~saving & (np.arange(len(seconds)) >= WARM)]
    if not saving.any() or not len(usual):
        raise UserError(
            f"{saving.sum()} of {len(saving)} steps ended during a save: change checkpoint.every"
        )
    ratios = seconds[saving] / np.median(usual)
    return {
        "config": config.name,
        "batch": config.data.batch_size,
        "gigabytes": size / 1e9,
        "seconds": float(np.median(usual)),
        "steps_saving": int(saving.sum()),
        "ratio": float(median(ratios)),
        "most": float(ratios.max()),
    }


class _Clock:
    """A hook that notes when each step ended, and whether a save was under way then."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.times: list[float] = []
        self.saving: list[bool] = []

    def tick(self, step: int, state: Any) -> None:
        del step, state
        self.times.append(time.perf_counter())
        self.saving.append(any(self._folder.glob("*.orbax-checkpoint-tmp*")))
