"""Students side by side: the same noise and prompts through each, judged against their teacher."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.models.accounting import forward_flops, parameter_counts
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.generate import generate, pool_of
from moe_diffusion.sampling.load import load_workdir


@dataclass(frozen=True)
class Row:
    """What is told of one model.

    Attributes:
      name: of the model.
      total, activated: numbers of parameters.
      flops: of one evaluation of the network for one image.
      seconds: per image, the median over batches.
      scores: what the judge says.
      distance: root mean square difference to the teacher's images from the same noise, of pixels
        in [0, 1], a mean over images.
    """

    name: str
    total: int
    activated: int
    flops: float
    seconds: float
    scores: dict[str, float]
    distance: float

    def told(self) -> dict[str, Any]:
        """The row as a flat dict, for JSON."""
        values = asdict(self)
        scores = values.pop("scores")
        return values | scores


def compare(
    workdirs: Mapping[str, str | os.PathLike],
    conditions: Callable[[Model], dict[str, np.ndarray]],
    judge: Callable[[np.ndarray], dict[str, float]],
    *,
    seed: int = 0,
    batch_size: int = 100,
    overrides: Sequence[str] = (),
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Draws the same images with several models; the first is the teacher.

    All sample as the teacher does. The batches of the models take turns, so that times compare.

    Args:
      workdirs: name -> workdir.
      conditions: what is drawn, {field: [N, ...]}, for a model.
      judge: images f32[N, H, W, C] -> scores.
      overrides: changes to the configs, for example of `sampling`.

    Returns:
      A row for each, and its images f32[N, H, W, C].
    """
    jobs, images, seconds = {}, {name: [] for name in workdirs}, {name: [] for name in workdirs}
    for name, workdir in workdirs.items():
        config, model, variables, _ = load_workdir(workdir, tuple(overrides))
        pool = pool_of(config, batch_size)
        jobs[name] = (make_sampler(model, config, pool=pool), variables, model, pool)
    cond = conditions(next(iter(jobs.values()))[2])
    num = len(next(iter(cond.values())))
    for start in range(0, num, batch_size):
        part = {field: values[start : start + batch_size] for field, values in cond.items()}
        for name, (sampler, variables, model, pool) in jobs.items():
            options = {"seed": seed + start, "batch_size": batch_size, "pool": pool}
            began = time.perf_counter()
            images[name].append(generate(sampler, variables, part, model.input_shape, **options))
            seconds[name].append(time.perf_counter() - began)
    drawn = {name: np.concatenate(parts) for name, parts in images.items()}
    teacher = next(iter(drawn.values()))
    rows = []
    for name, (_, _, model, _) in jobs.items():
        counts = parameter_counts(model)["total"]
        flops = forward_flops(model)["total"]
        timed = sorted(seconds[name][1:] or seconds[name])  # the first compiles
        each = timed[len(timed) // 2] / batch_size
        distance = rms(drawn[name], teacher)
        scores = judge(drawn[name])
        rows.append(Row(name, counts.total, counts.activated, flops, each, scores, distance))
    return rows, drawn


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference of two sets of images in [-1, 1], with pixels in [0, 1]."""
    pixels = (np.clip(x, -1, 1).reshape(len(x), -1) / 2 for x in (a, b))
    first, second = pixels
    return float(np.sqrt(np.square(first - second).mean(1)).mean())


def table(rows: Sequence[Row], scores: Sequence[str]) -> str:
    """The rows as lines of text.

    scores: those of `Row.scores` that are shown.
    """
    head = f"{'model':<24}{'total':>9}{'activated':>11}{'MFLOPs':>9}{'ms/image':>10}"
    head += "".join(f"{name.replace('_', ' '):>18}" for name in scores)
    lines = [f"{head}{'distance':>10}"]
    for row in rows:
        numbers = f"{row.total / 1e6:>8.3f}M{row.activated / 1e6:>10.3f}M{row.flops / 1e6:>9.2f}"
        numbers += f"{1e3 * row.seconds:>10.2f}"
        numbers += "".join(f"{row.scores[name]:>18.3f}" for name in scores)
        lines.append(f"{row.name:<24}{numbers}{row.distance:>10.4f}")
    return "\n".join(lines)


def mean_rows(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of `Row.told` over several seeds: means, and the lowest and highest value of each."""
    found = []
    for rows in zip(*seeds, strict=True):
        numbers = {
            k: [row[k] for row in rows] for k, v in rows[0].items() if not isinstance(v, str)
        }
        means = {name: float(np.mean(values)) for name, values in numbers.items()}
        spread = {name: (min(values), max(values)) for name, values in numbers.items()}
        found.append({"name": rows[0]["name"], **means, "from_to": spread})
    return found


def mean_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Some values of the rows of `mean_rows` as lines of text: mean (lowest to highest)."""
    heads = "".join(f"{name.replace('_', ' '):>28}" for name in names)
    lines = [f"{'mean over seeds':<24}{heads}"]
    for row in rows:
        told = (
            f"{row[n]:.4f} ({row['from_to'][n][0]:.4f}-{row['from_to'][n][1]:.4f})" for n in names
        )
        lines.append(f"{row['name']:<24}" + "".join(f"{text:>28}" for text in told))
    return "\n".join(lines)
