"""What the command lines that draw images of a run share: their flags, and what these open.

Nothing here imports jax before the flags have been read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_diffusion.checks import check_seed
from moe_diffusion.cli import Parser
from moe_diffusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from moe_diffusion.classes import Classes
    from moe_diffusion.models.autoencoder import Autoencoder
    from moe_diffusion.models.stack import Model

NUM = 64  # images, if no flag says how many


class OpenRun(NamedTuple):
    """A run to draw images of.

    Attributes:
      config, model, variables, note: see `load_workdir`.
      known: the classes that were trained.
      autoencoder: decodes what the model makes; None if it makes images.
    """

    config: ConfigDict
    model: Model
    variables: dict[str, Any]
    note: dict[str, Any]
    known: Classes
    autoencoder: Autoencoder | None


def add_flags(parser: Parser) -> None:
    """Adds what says which run, what to draw and how; `check_flags` and `open_run` read it."""
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a trained run")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num", type=int, help=f"how many images ({NUM})")
    count.add_argument("--num-per-class", type=int, metavar="N", help="how many of each class")
    add("--labels", default="", help="classes by number or name, like 3,7 or cat,dog (all)")
    add("--class-names", help="text file with the name of every class, one a line")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--sampler", help="of a flow: heun, euler, dopri5, sde or sde_heun; of ddpm: ddpm or ddim")
    add("--steps", type=int, help="steps of the sampler")
    add("--ema", help="decay of the average to use, or none (the run's first)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=int, default=64, help="images at a time, which share experts (%(default)s)")
    add("--vae", help="autoencoder that makes images of latents (the config's data.autoencoder)")
    add("--json", action="store_true", help="print one JSON object as last line")


def check_flags(args: argparse.Namespace) -> None:
    """Raises a UserError about a number that cannot be."""
    counts = (args.num, args.num_per_class, args.batch)
    if any(count is not None and count < 1 for count in counts):
        raise UserError("--num, --num-per-class and --batch must be at least 1")
    check_seed("--seed", args.seed)


def open_run(args: argparse.Namespace, overrides: Sequence[str]) -> OpenRun:
    """Loads the run that the flags name; tells if its data had fewer classes than its model."""
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.sampling.labels import classes_of
    from moe_diffusion.sampling.load import load_workdir

    given = {"cfg": args.cfg, "sampler": args.sampler, "steps": args.steps}
    keys = [f"sampling.{key}={value}" for key, value in given.items() if value is not None]
    config, model, variables, note = load_workdir(
        args.workdir, (*overrides, *keys), step=args.step, ema=args.ema
    )
    known = classes_of(args.workdir, model, args.class_names)
    autoencoder = autoencoders.for_config(config, args.vae)
    return OpenRun(config, model, variables, note, known, autoencoder)


def conditions(run: OpenRun, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The condition of every image, {field: [N, ...]}; tells the names of the chosen classes."""
    from moe_diffusion.classes import LABEL
    from moe_diffusion.sampling.conditions import conditions_of_run, spread
    from moe_diffusion.sampling.labels import described, num_labels, parse_labels

    labels = parse_labels(args.labels, run.model, run.known) if args.labels else None
    num = NUM if args.num is None else args.num
    if args.num_per_class is not None:
        every = num_labels(run.model, "--num-per-class", run.known) if labels is None else None
        num = args.num_per_class * (every or len(labels))
    cond = conditions_of_run(run.config, run.model, num, run.known)
    if labels is None:
        return cond
    if run.known.names:
        print(f"classes: {described(labels, run.known)}")
    return cond | {LABEL: labels[spread(num, len(labels))]}
