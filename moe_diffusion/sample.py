"""Draws images from a trained run: a labelled grid, and on request single files and an array.

  python -m moe_diffusion.sample --workdir runs/digits --num 64 --cfg 2.0 --sampler heun \\
      --steps 50 --out grid.png
  python -m moe_diffusion.sample --workdir runs/dsmoe_s --vae sd-vae-ft-ema/ --out grid.png
  python -m moe_diffusion.sample --workdir runs/digits --labels 3,7 --num 32 --out grid.png \\
      --images singles/ --npz samples.npz --config.model.router.top_k=1

Guidance, sampler and steps are those of the config unless they are given. Any key of the config can
be set as --config.<key>=<value>.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, check_writable

if TYPE_CHECKING:
    import numpy as np


def save_npz(path: str, images: np.ndarray, cond: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz, whole or not at all: arr_0 f32[N, H, W, C] in [-1, 1], and the conditions.

    Labels are stored as "labels", other fields of the condition under their own names.
    """
    import numpy as np

    from moe_diffusion.sampling.labels import LABEL

    part = Path(path).with_name(f".{Path(path).name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    fields = {"labels" if name == LABEL else name: values for name, values in cond.items()}
    with part.open("wb") as file:
        np.savez(file, arr_0=images, **fields)
    os.replace(part, path)


def parse(argv: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    parser = Parser("sample", __doc__, remote=("workdir",))
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a trained run")
    add("--num", type=int, default=64, help="how many images (%(default)s)")
    add("--labels", default="", help="classes, like 3,7 (all)")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--sampler", help="of a flow: heun, euler, dopri5, sde or sde_heun; of ddpm: ddpm or ddim")
    add("--steps", type=int, help="steps of the sampler")
    add("--ema", help="decay of the average to use, or none (the run's first)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=int, default=64, help="images at a time, which share experts (%(default)s)")
    add("--vae", help="autoencoder that makes images of latents (the config's data.autoencoder)")
    add("--out", default="grid.png", help="picture of all images (%(default)s)")
    add("--images", help="folder for one PNG per image")
    add("--npz", help="file for the images as an array in [-1, 1]")
    add("--stats", help="JSON file for how experts were used, and a picture (.png) beside it")
    add("--json", action="store_true", help="print one JSON object as last line")
    return parser.parse_with_overrides(argv)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parse(argv)
    from moe_diffusion.diffusion.samplers import make_sampler
    from moe_diffusion.evaluation.routing_stats import RoutingObserver, save_stats
    from moe_diffusion.figures.images import image_grid, save_png, save_pngs
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.sampling import bound
    from moe_diffusion.sampling.conditions import captions, conditions_of_run
    from moe_diffusion.sampling.generate import generate, pool_of
    from moe_diffusion.sampling.labels import LABEL, chosen_labels
    from moe_diffusion.sampling.load import load_workdir

    if args.num < 1 or args.batch < 1:
        raise UserError("--num and --batch must be at least 1")
    for path in filter(None, (args.out, args.npz, args.stats)):
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder: name a file in it")
        check_writable(Path(path).parent)
    if args.images:
        check_writable(args.images)
    given = {"cfg": args.cfg, "sampler": args.sampler, "steps": args.steps}
    overrides += [f"sampling.{key}={value}" for key, value in given.items() if value is not None]

    config, model, variables, note = load_workdir(
        args.workdir, tuple(overrides), step=args.step, ema=args.ema
    )
    chosen = {LABEL: chosen_labels(args.labels, args.num, model)} if args.labels else {}
    cond = conditions_of_run(config, model, args.num) | chosen
    autoencoder = autoencoders.for_config(config, args.vae)
    observer = RoutingObserver(model) if args.stats else bound.BoundObserver(model, config)
    sampling, batch_size = config.sampling, min(args.batch, args.num)
    pool = pool_of(config, batch_size)
    sampler = make_sampler(observer, config, pool=pool)
    images = generate(
        observer.watch(sampler, args.num) if args.stats else sampler,
        variables,
        cond,
        model.input_shape,
        seed=args.seed,
        batch_size=batch_size,
        pool=pool,
        progress=True,
    )
    if autoencoder:
        images = autoencoder.decode(images)
    title = f"{config.name}, step {note['step']}, ema {note['ema']}, cfg {sampling.cfg:g}, "
    title += f"{sampling.sampler} {sampling.steps}"
    save_png(image_grid(images, captions(model, cond), title=title), args.out)
    if args.images:
        save_pngs(images, args.images)
    if args.npz:
        save_npz(args.npz, images, cond)
    if args.stats:
        stats = observer.stats()
        save_stats(stats, args.stats)
        print(f"experts per token: {stats['c_infer_avg']:.4f} ({args.stats})")
    dropped = bound.report(config, stats["dropped"] if args.stats else observer.dropped())
    print(f"{args.num} images: {args.out}")
    if args.json:
        depends = sampling.to_dict() | {"pool": pool, "dropped": dropped}
        print(json.dumps({"num": args.num, "out": args.out, **note, **depends}))


if __name__ == "__main__":
    main()
