"""Images of a run for prompts in a folder as scorers read it: `sample --save-images`."""

from __future__ import annotations

import json
from argparse import Namespace

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_diffusion import locks
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.sampling import bound, notes
from moe_diffusion.sampling.flags import OpenRun
from moe_diffusion.sampling.generate import generate_batches, pool_of
from moe_diffusion.sampling.layouts import Folder, check, check_folder, layout_of
from moe_diffusion.sampling.load import weights_digest
from moe_diffusion.sampling.prompt_files import PromptFile, open_prompts


def check_flags(args: Namespace) -> None:
    """Raises a UserError unless the prompts can be laid out as --layout says."""
    if args.layout and not args.save_images:
        raise UserError("--layout is of --save-images: name a folder")
    if not args.save_images:
        return
    if not args.prompts:
        raise UserError("--save-images lays out images of a file of prompts: name it as --prompts")
    for flag in ("images", "npz", "stats", "trajectory", "top_k", "teacher"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise UserError(f"--save-images and --{name} do not go together: call twice")
    check_folder(args.save_images)
    file = open_prompts(args.prompts, args.benchmark)
    check(layout_of(file, args.layout), file, number_of(args, file))


def number_of(args: Namespace, file: PromptFile) -> int:
    """How many images the flags of `sample` ask for."""
    return args.num or (args.num_per_prompt or file.images) * len(file.items)


def draw(run: OpenRun, args: Namespace) -> None:
    """Draws the images that are not there yet, and prints where they are.

    Raises:
      UserError: the folder has others, or was begun with other settings.
    """
    config, model, variables, note, _, autoencoder, prompted, mesh = run
    file, num = open_prompts(args.prompts, args.benchmark), len(prompted.texts)
    name = layout_of(file, args.layout)
    batch_size = min(run.batch(args.batch), num)
    pool = pool_of(config, batch_size)
    height, width, _ = model.input_shape
    factor = autoencoder.network.factor if autoencoder else 1
    pixels = height * factor, width * factor
    fields = notes.settings_text(config, note, args.seed, pixels, prompted.cond)
    settings = {**fields, "pool": pool, "prompts": file.describe(), "num_samples": num}
    settings |= {"sampling": config.sampling.to_dict(), "model": config.model.to_dict()}
    settings["weights"] = weights_digest(args.workdir, note["step"])
    settings |= {"checkpoint": str(args.workdir), "autoencoder": autoencoder and autoencoder.name}
    settings = json.loads(json.dumps(settings, default=str))
    observer, first = bound.BoundObserver(model, config), 0
    with locks.held(args.save_images, "images of prompts"):
        folder = None
        if is_main_process():
            folder = Folder(args.save_images, name, file, num, settings)
            folder.begin()
            first = folder.first_missing()
            first -= first % max(pool, 1)
        if jax.process_count() > 1:
            first = int(multihost_utils.broadcast_one_to_all(np.int32(first)))
        batches = generate_batches(
            make_sampler(observer, config, pool=pool),
            variables,
            prompted.cond,
            model.input_shape,
            seed=args.seed,
            batch_size=batch_size,
            pool=pool,
            start=first,
            progress=is_main_process(),
            mesh=mesh,
        )
        drawn = first
        for batch in batches:
            images = autoencoder.decode(batch) if autoencoder else batch
            if folder:
                folder.write(images, drawn, fields)
            drawn += len(batch)
        if folder:
            folder.finish()
    if not is_main_process():
        return
    bound.report(config, observer.dropped())
    print(f"{num} images, {num - first} of them drawn now: {args.save_images}")
    if args.json:
        told = {"num": num, "drawn": num - first, "save_images": args.save_images, "layout": name}
        print(json.dumps({**told, "prompts": file.describe(), **note, **config.sampling.to_dict()}))
