"""Encodes images into a folder of latents to train from; run the same command again to continue.

  python -m moe_diffusion.prepare --source folder:/data/imagenet/train --size 256 \\
      --vae sd-vae-ft-ema/ --out data/imagenet256_latents
  python -m moe_diffusion.prepare --source tfds:imagenet2012:5.1.0 --size 256 \\
      --vae ae.safetensors --kind flux --out data/imagenet256_flux

On several hosts, start it on each, as for train; --out must be a folder that all of them see. Then
train with --config.data.source=latents:<out>. After --no-flip, add --config.data.augment=none.
"""

from __future__ import annotations

import json
import os
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError

if TYPE_CHECKING:
    from moe_diffusion.preparing import encode


def make_job(args: Any) -> encode.Job:
    """Opens the source and the autoencoder that the flags name.

    Raises:
      UserError: a flag is wrong, or something cannot be read or does not fit the rest.
    """
    import jax

    from moe_diffusion.data.latents import describe_fields
    from moe_diffusion.data.sources import open_images
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.models.autoencoder import images_at_once
    from moe_diffusion.preparing import encode

    height, width = _parse_size(args.size)
    for name, least in (("shard_size", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    autoencoder = autoencoders.load(args.vae, args.kind)
    network = autoencoder.network
    if height % network.factor or width % network.factor:
        raise UserError(
            f"--size {args.size} is no multiple of {network.factor}, the pixels per latent of "
            f"{args.vae}"
        )
    pixels = (height, width, network.channels)
    source = open_images(args.source, pixels, split=args.split, skip_broken=args.skip_broken)
    if tuple(source.image_shape) != pixels:
        raise UserError(
            f"--source {args.source} has images of shape {tuple(source.image_shape)}, --size and "
            f"--vae need {pixels}"
        )
    settings = {
        "source": args.source,
        "split": args.split,
        "records": len(source),
        "fields": describe_fields(source.cond_spec),
        "shape": [height // network.factor, width // network.factor, network.latent_channels],
        "moments": not args.samples,
        "flip": args.flip,
        "seed": args.seed,
        "scale": network.scale,
        "shift": network.shift,
        "autoencoder": {"name": autoencoder.name, "fingerprint": autoencoder.fingerprint},
        "shard_size": args.shard_size,
        "class_names": getattr(source, "class_names", None),
    }
    batch = images_at_once(height * width) * jax.local_device_count()
    return encode.Job(source, autoencoder.moments, batch, Path(args.out), settings, args.workers)


def _parse_size(text: str) -> tuple[int, int]:
    """ "256" -> (256, 256) and "256x384" -> (256, 384)."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--size {text} is no size in pixels: give 256, or height x width: 256x384")
    return int(sides[0]), int(sides[-1])


def run(job: encode.Job) -> dict[str, Any]:
    """Encodes what is still missing and returns the manifest; all processes must call this."""
    import jax
    from jax.experimental import multihost_utils

    from moe_diffusion.data.latents import read_manifest
    from moe_diffusion.parallel import distributed
    from moe_diffusion.preparing import encode

    main = distributed.is_main_process()
    unfinished = encode.begin(job) if main else True
    if multihost_utils.broadcast_one_to_all(unfinished):
        encode.write_shards(job, jax.process_index(), jax.process_count())
        multihost_utils.sync_global_devices("latents are written")
        if main:
            encode.finish(job)
        multihost_utils.sync_global_devices("the manifest is written")
    return read_manifest(job.folder)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("prepare", __doc__)
    add = parser.add_argument
    add("--source", required=True, help="folder:<path>, tfds:<name>, digits or synthetic")
    add("--split", default="train", help="of a tfds source (%(default)s)")
    add("--size", required=True, help="of the images, in pixels: 256, or height x width: 256x384")
    add("--vae", required=True, help="the autoencoder: a weight file or a folder of diffusers")
    add("--kind", default="auto", help="sd or flux, for weights without config.json (%(default)s)")
    add("--out", required=True, help="folder of the latents")
    flip = "encode the mirrored images, too, for data.augment=flip (the default)"
    add("--flip", action=BooleanOptionalAction, default=True, help=flip)
    add("--samples", action="store_true", help="store one sample an image, in half the space")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--shard-size", type=int, default=8192, help="records in a file (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="threads that read (%(default)s)")
    add("--skip-broken", action="store_true", help="leave out files that are no images")
    add("--json", action="store_true", help="print one JSON object as last line")
    args = parser.parse_args(argv)
    from moe_diffusion.parallel import distributed

    distributed.initialize()
    manifest = run(make_job(args))
    if distributed.is_main_process():
        print(f"{manifest['count']:,} latents in {len(manifest['shards'])} files: {args.out}")
        if args.json:
            kept = ("count", "shape", "moments", "flip", "scale", "shift", "autoencoder")
            print(json.dumps({"out": args.out} | {key: manifest[key] for key in kept}))


if __name__ == "__main__":
    main()
