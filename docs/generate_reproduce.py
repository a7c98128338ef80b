"""Writes the lists of docs/reproduce.md: every table and figure, its command, needs and hours.

  python -m docs.generate_reproduce
  python -m docs.generate_reproduce --write docs/reproduce.md

Run it when an item of configs/papers/ changes: a test fails while docs/reproduce.md is stale.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from docs import pages
from moe_diffusion import config as configs
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.evaluation import protocol
from moe_diffusion.models import build
from moe_diffusion.models.accounting import BACKWARD, forward_flops
from moe_diffusion.reproduction import tables
from moe_diffusion.reproduction.items import Item, Row, papers

BEGIN = "<!-- begin: written by docs.generate_reproduce -->"
# FLOP/s of an H200: bf16 by its data sheet, and TF32 as measured for a large product; and the share
# of it that a training step of ours reached there, by kind of model.
BF16, TF32 = 989e12, 374e12
SHARES = {"dense": 0.40, "token_choice": 0.22}
OTHER_SHARE = 0.18


@functools.cache
def _cost(spec: str) -> tuple[float, float, float, int]:
    """FLOPs of a forward pass, share of the peak, FLOPs of the training, checkpoints kept."""
    config = configs.load(spec)
    flops = forward_flops(build(config.model))["total"]
    steps, every = config.train.num_steps, config.checkpoint.keep_every
    training = (1 + BACKWARD) * flops * config.data.batch_size * steps
    share = SHARES.get(config.model.router.name, OTHER_SHARE)
    return flops, share, training, max(1, steps // every if every else 1)


def _passes(sampling: dict, cfg: float) -> int:
    """Evaluations of the network for one image."""
    stages = {"heun": 2, "dopri5": 3}.get(sampling.get("sampler"), 1)  # dopri5: a rough guess
    return stages * sampling.get("steps", 250) * (2 if cfg != 1 else 1)


def _judging_hours(row: Row, spec: str) -> float:
    """H200 hours for the images of a protocol."""
    flops, share, _, _ = _cost(spec)
    how = protocol.load(row.protocol)
    peak = TF32 if how.model.get("dtype") == "float32" else BF16
    passes = sum(_passes(how.sampling.to_dict(), cfg) for cfg in how.cfg)
    return how.num_samples * passes * flops / (share * peak) / 3600


def hours(item: Item) -> tuple[float, float]:
    """H200 hours for training, and for sampling, of all rows and commands of an item."""
    specs = {row.config for row in item.rows if row.config}
    training = sum(_cost(spec)[2] / (_cost(spec)[1] * BF16) / 3600 for spec in specs)
    sampling = 0.0
    for row in item.rows:
        spec = row.config or item.model
        if row.protocol:
            every = _cost(spec)[3] if "fid" in item.curves else 1
            sampling += every * _judging_hours(row, spec)
    for text in item.commands:
        number = int(found[1]) if (found := re.search(r"--num (\d+)", text)) else 50_000
        gammas = text.partition("--gammas ")[2].split(" ")[0].count(",") + 1
        flops, share, _, _ = _cost(item.model)
        passes = 500  # 250 steps of Heun, as the papers' class-conditional models
        if "flux" in item.model:
            passes = _passes(configs.load(item.model).sampling.to_dict(), 1.0)
        sampling += gammas * number * passes * flops / (share * TF32) / 3600
    return training, sampling


def _duration(value: float) -> str:
    if value < 0.1:
        return "minutes" if value else ""
    return f"{value:,.1f} h" if value < 100 else f"{value:,.0f} h"


def _needs(item: Item) -> str:
    needs = []
    if item.counts or (item.rows and all("digits" in row.config for row in item.rows)):
        return "nothing"
    if any(row.config for row in item.rows):
        pixels = any("jit" in row.config for row in item.rows)
        needs.append("ImageNet" if pixels else "ImageNet latents")
    if item.needs_run:
        needs.append(f"a run of `{item.model.removeprefix('configs/')}`")
    judged = any(row.protocol for row in item.rows) or any("{files}" in c for c in item.commands)
    if judged:
        needs.append("Inception, reference")
    return ", ".join(needs)


def line(item: Item) -> str:
    """A line of the list."""
    if item.missing:
        return f"| {item.title} | not yet: {item.missing} | | | |"
    run = " --run RUN" if item.needs_run else ""
    flags = " FILES" if "Inception" in _needs(item) else ""
    training, sampling = (0, 0) if item.counts else hours(item)
    cells = [item.title, f"`reproduce {item.name}{run}{flags}`", _needs(item)]
    return "| " + " | ".join([*cells, _duration(training), _duration(sampling)]) + " |"


def content() -> str:
    """One list for each paper, and the tables of parameters, which need no training."""
    parts = []
    for paper, items in papers().items():
        head = "| what | command | needs | training, H200 hours | sampling, H200 hours |"
        rows = [head, "|---|---|---|---:|---:|", *map(line, items)]
        parts += [f"## {paper}", "\n".join(rows)]
    counted = [item for items in papers().values() for item in items if item.counts]
    parts.append("## Our figures that need no training")
    parts += [tables.counted(item).replace("# ", "### ", 1).strip() for item in counted]
    return "\n\n".join(parts)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    pages.main("generate_reproduce", __doc__, BEGIN, content, argv)


if __name__ == "__main__":
    main()
