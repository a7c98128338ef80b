"""Other numbers of experts per token than in training: `sample --top-k`.

Dense2MoE (2510.09094), Figure 8: columns of images of the same noise, with more and fewer experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.config.sizes import size_changes
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.figures.images import few_enough, image_grid, save_png
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling import notes
from moe_diffusion.sampling.conditions import captions
from moe_diffusion.sampling.flags import OpenRun, conditions
from moe_diffusion.sampling.generate import generate, pool_of
from moe_diffusion.sampling.load import load_config, load_workdir, rebuilt

KEY = "model.router.top_k"


def parse(text: str | None) -> list[int]:
    """The numbers of --top-k, like "0,1,2,4"; none of None. Raises a UserError for other texts."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise UserError(f"--top-k {text!r} is no list of numbers of experts: write 2, or 0,1,2,4")
    return list(dict.fromkeys(map(int, parts)))


def check(config: ConfigDict, values: Sequence[int]) -> None:
    """Raises a UserError if a token of the run's model cannot meet so many experts."""
    if "top_k" not in config.model.router:
        raise UserError(
            "--top-k is for routers in which each token chooses its experts, and this model has "
            f"model.router.name = {config.model.router.name}: leave it out"
        )
    most = config.model.moe.num_experts
    if max(values) > most:
        raise UserError(f"--top-k {max(values)} exceeds the {most} experts of a layer: lower it")


def save_columns(run: OpenRun, args: Namespace, values: Sequence[int]) -> int:
    """Draws a picture with a column for each value, and perhaps one of a teacher, of one noise.

    Returns:
      How many images a column has.

    Raises:
      UserError: the teacher is no such run, or draws other images or for other conditions.
    """
    config, model, variables, note, known, autoencoder, prompted, mesh = run
    cond = conditions(run, args)
    num = len(next(iter(cond.values())))
    batch_size = min(run.batch(args.batch), num)

    def draw(config: ConfigDict, model: Model, variables: dict) -> np.ndarray:
        pool = pool_of(config, batch_size)
        sampler = make_sampler(model, config, pool=pool)
        how = {"seed": args.seed, "batch_size": batch_size, "pool": pool, "mesh": mesh}
        images = generate(sampler, variables, cond, model.input_shape, progress=True, **how)
        return autoencoder.decode(images) if autoencoder else images

    columns = {}
    if args.teacher:
        columns["teacher"] = draw(*_teacher(run, args))
    for value in values:
        changed = config.copy_and_resolve_references()
        changed.model.router.top_k = value
        columns[f"top-k {value}"] = draw(changed, rebuilt(model, changed), variables)
    images = np.stack([*columns.values()], 1)  # [N, columns, H, W, C]
    rows = few_enough(num, (images.shape[2], images.shape[3] * len(columns)))
    texts = prompted.texts if prompted else captions(model, cond, known)
    fields = notes.settings_text(config, note, args.seed, images.shape[2:4], cond)
    if texts:
        kind = "prompt" if prompted else "label"
        fields = {kind: "\n".join(dict.fromkeys(texts)), **fields}
    fields[notes.TOP_K] = ", ".join(map(str, values))
    if args.teacher:
        fields["teacher"] = args.teacher
    grid = image_grid(
        images[rows].reshape(-1, *images.shape[2:]),
        texts and [texts[row] for row in rows for _ in columns],
        columns=len(columns),
        title=notes.title_of(config, fields),
        heads=list(columns),
    )
    save_png(grid, args.out, fields)
    return num


def _teacher(run: OpenRun, args: Namespace) -> tuple[ConfigDict, Model, dict]:
    """The run of --teacher, which draws with the settings of the other."""

    def check_same(config: ConfigDict, model: Model) -> None:
        for what, own, its in (
            ("images of shape", run.model.input_shape, model.input_shape),
            ("conditions", run.model.cond_spec(), model.cond_spec()),
            ("diffusion.path", run.config.diffusion.path, config.diffusion.path),
        ):
            if own != its:
                raise UserError(
                    f"--teacher {args.teacher} has {what} {its}, and the run {own}: name the run "
                    "that it was made of"
                )

    keys = []
    if args.size:
        factor = run.autoencoder and run.autoencoder.network.factor
        keys = size_changes(load_config(args.teacher), args.size, factor, "--size")
    how = {"mesh": run.mesh, "preset": args.preset, "before": check_same}
    config, model, variables, _ = load_workdir(args.teacher, tuple(keys), **how)
    config.sampling = run.config.sampling
    return config, model, variables
