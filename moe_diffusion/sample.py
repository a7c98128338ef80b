"""Draws images from a trained run: a labelled grid, and on request single files and an array.

  python -m moe_diffusion.sample --workdir runs/digits --num 64 --cfg 2.0 --sampler heun \\
      --steps 50 --out grid.png
  python -m moe_diffusion.sample --workdir runs/dsmoe_s --vae sd-vae-ft-ema/ --out grid.png
  python -m moe_diffusion.sample --workdir runs/digits --labels 3,7 --num 32 --out grid.png \\
      --images singles/ --npz samples.npz --config.model.router.top_k=1
  python -m moe_diffusion.sample --workdir runs/digits --num-per-class 5 --trajectory film.gif
  python -m moe_diffusion.sample --workdir runs/student --top-k 0,1,2,4 --teacher runs/teacher
  python -m moe_diffusion.sample --workdir runs/flux_dev --text-encoders FLUX.1-dev/ \\
      --vae FLUX.1-dev/ --prompt "a red fox in the snow" --size 1024 --steps 28 --guidance 3.5
  python -m moe_diffusion.sample --workdir runs/flux_dev --text-encoders FLUX.1-dev/ \\
      --vae FLUX.1-dev/ --prompts evaluation_metadata.jsonl --benchmark geneval \\
      --save-images geneval/

Guidance, sampler and steps are those of the config unless they are given. Any key of the config can
be set as --config.<key>=<value>.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, explained
from moe_diffusion.sampling import flags
from moe_diffusion.writing import check_empty, check_outputs, save_arrays, save_each

if TYPE_CHECKING:
    import numpy as np

_OTHERS = "what is not named here is written"


def save_npz(path: str, images: np.ndarray, cond: Mapping[str, np.ndarray]) -> None:
    """Writes the images as "arr_0", as in ADM's sample files, and the conditions.

    Labels are stored as "labels", other fields of the condition under their own names.
    """
    from moe_diffusion.classes import LABEL

    fields = {"labels" if name == LABEL else name: values for name, values in cond.items()}
    save_arrays(path, {"arr_0": images, **fields})


def save_grid(
    images: np.ndarray,
    texts: Sequence[str] | None,
    title: str,
    path: str,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Writes the picture of all images, or of as many as a picture can hold, evenly spread.

    fields: what the file carries, see `save_png`.
    """
    from moe_diffusion.figures.images import few_enough, image_grid, save_png

    shown = few_enough(len(images), images.shape[1:])
    if len(shown) < len(images):
        title += f", {len(shown):,} of {len(images):,}"
    with explained(f"cannot draw {path}", _OTHERS):
        grid = image_grid(images[shown], texts and [texts[i] for i in shown], title=title)
    save_png(grid, path, fields)


def check_columns(args: argparse.Namespace) -> None:
    """Raises a UserError for outputs that a picture of columns does not have."""
    if args.teacher and args.top_k is None:
        raise UserError("--teacher is a column beside those of --top-k: give --top-k, too")
    if args.teacher or "," in (args.top_k or ""):
        for flag in ("images", "npz", "stats", "trajectory"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag} is for one value of --top-k: columns are drawn into --out alone"
                )


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for flags and places that cannot be."""
    flags.check_flags(args)
    check_columns(args)
    check_places(args)


def connect(args: argparse.Namespace) -> None:
    """Connects the processes; raises a UserError for what one does alone, if there are several.

    Before that, for prompts that --save-images cannot lay out.
    """
    import jax

    from moe_diffusion.parallel import distributed
    from moe_diffusion.sampling import saved

    saved.check_flags(args)
    distributed.initialize()
    alone = [flag for flag in ("stats", "trajectory", "teacher") if getattr(args, flag)]
    alone += ["top-k"] * ("," in (args.top_k or ""))
    if alone and jax.process_count() > 1:
        raise UserError(
            f"--{alone[0]} is drawn by one process, and {jax.process_count()} were started: start "
            "one, or leave it out"
        )


def check_places(args: argparse.Namespace) -> None:
    """Raises a UserError for an output that would be lost, mixed with others or replace others."""
    film = args.trajectory and Path(args.trajectory).suffix.lower()
    beside = args.stats and Path(args.stats).with_suffix(".png")
    outputs = {
        "--npz": (args.npz, ".npz"),
        "--stats": (args.stats, ".json"),
        "the picture beside --stats": (beside, ".png"),
        "--trajectory": (args.trajectory, film if film == ".gif" else ".png"),
        "--out": (args.out, ".png"),
    }
    run = Path(args.workdir)
    read = [run / "config.json", run / "checkpoints", args.vae, args.prompts, args.text_encoders]
    read.append(args.teacher and Path(args.teacher) / "config.json")
    check_outputs(outputs, read)
    if args.images:
        check_empty("--images", args.images)
        folder = Path(args.images).resolve()
        for flag, (path, _) in outputs.items():
            if path and folder in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UserError(f"{flag} lies in the folder of --images: choose another place")


def tell_columns(
    args: argparse.Namespace, num: int, values: Sequence[int], note: Mapping[str, object]
) -> None:
    """Prints what `save_columns` drew."""
    print(f"{num} images in each column: {args.out}")
    if args.json:
        print(json.dumps({"num": num, "out": args.out, "top_k": values, **note}))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("sample", __doc__, remote=("workdir",))
    flags.add_flags(parser)
    add = parser.add_argument
    add("--out", default="grid.png", help="picture of all images (%(default)s)")
    add("--images", help="folder for one PNG per image; it must be empty")
    add("--save-images", metavar="FOLDER", help="instead of --out: images of --prompts as scorers "
        "read them; a second call goes on where the first one stopped")  # fmt: skip
    add("--layout", help=f"of --save-images: {', '.join(flags.LAYOUTS)} (the benchmark's, or flat)")
    add("--npz", help="file for the images as an array in [-1, 1]")
    add("--stats", help="JSON file for how experts were used, and a picture (.png) beside it")
    add("--trajectory", help="film of the first images as they come to be: .gif, or .png, a strip")
    add(
        "--top-k",
        metavar="K",
        help="experts that each token chooses, in place of the run's; 0 is "
        "none, the shared expert alone; several, like 0,1,2,4, are columns of one picture",
    )
    add("--teacher", help="with --top-k: workdir of a run that draws a first column")  # fmt: skip
    return parser.parse_with_overrides(argv)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parse(argv)
    check(args)
    from moe_diffusion.diffusion.samplers import make_sampler
    from moe_diffusion.evaluation.routing_stats import RoutingObserver, save_stats
    from moe_diffusion.figures.images import save_pngs
    from moe_diffusion.parallel import distributed
    from moe_diffusion.sampling import bound, notes, saved, top_k
    from moe_diffusion.sampling.conditions import captions
    from moe_diffusion.sampling.film import COLUMNS, FRAMES, draw_film, save_film
    from moe_diffusion.sampling.generate import generate, pool_of
    from moe_diffusion.sampling.load import load_config

    connect(args)
    values = top_k.parse(args.top_k)
    if values:
        top_k.check(load_config(args.workdir, tuple(overrides)), values)
        overrides.append(f"{top_k.KEY}={values[0]}")
    run = flags.open_run(args, overrides)
    if args.save_images:
        return saved.draw(run, args)
    if len(values) > 1 or args.teacher:
        return tell_columns(args, top_k.save_columns(run, args, values), values, run.note)
    config, model, variables, note, known, autoencoder, prompted, mesh = run
    cond = flags.conditions(run, args)
    num = len(next(iter(cond.values())))
    observer = RoutingObserver(model) if args.stats else bound.BoundObserver(model, config)
    batch_size = min(run.batch(args.batch), num)
    pool = pool_of(config, batch_size)
    sampler = make_sampler(observer, config, pool=pool)
    images = generate(
        observer.watch(sampler, num) if args.stats else sampler,
        variables,
        cond,
        model.input_shape,
        seed=args.seed,
        batch_size=batch_size,
        pool=pool,
        progress=distributed.is_main_process(),
        mesh=mesh,
    )
    decode = autoencoder.decode if autoencoder else None
    images = decode(images) if decode else images
    if not distributed.is_main_process():
        return None  # the first process writes what all have drawn
    fields = notes.settings_text(config, note, args.seed, images.shape[1:3], cond)
    title = notes.title_of(config, fields, *[notes.TOP_K] * len(values))
    texts, saves = prompted.texts if prompted else captions(model, cond, known), []
    kind = "prompt" if prompted else "label"
    if args.npz:
        kept = notes.stored_fields(cond, texts) if prompted else cond
        saves.append(partial(save_npz, args.npz, images, kept))
    if args.stats:
        stats = observer.stats()
        print(f"experts per token: {stats['c_infer_avg']:.4f} ({args.stats})")
        saves.append(partial(save_stats, stats, args.stats))
    if args.images:
        each = notes.image_texts(fields, texts, kind, num)
        saves.append(partial(save_pngs, images, args.images, each))
    dropped = bound.report(config, stats["dropped"] if args.stats else observer.dropped())

    def film() -> None:
        how = {"seed": args.seed, "pool": pool, "decode": decode, "mesh": mesh}
        how["states"] = FRAMES if args.trajectory.lower().endswith(".gif") else COLUMNS
        with explained(f"cannot draw {args.trajectory}", _OTHERS):
            states, steps = draw_film(model, config, variables, cond, **how)
            save_film(states, steps, texts, title, args.trajectory)

    if texts:
        fields = {kind: "\n".join(dict.fromkeys(texts)), **fields}
    saves.append(partial(save_grid, images, texts, title, args.out, fields))
    if args.trajectory:
        saves.append(film)
    save_each(*saves)
    print(f"{num} images: {args.out}")
    if args.json:
        depends = config.sampling.to_dict() | {"pool": pool, "dropped": dropped}
        asked = {"prompts": prompted.prompts} if prompted else {}
        asked |= {"top_k": values} if values else {}
        print(json.dumps({"num": num, "out": args.out, **asked, **note, **depends}))


if __name__ == "__main__":
    main()
