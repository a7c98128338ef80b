"""Encodes images into a folder of latents to train from; run the same command again to continue.

  python -m moe_diffusion.prepare --source folder:/data/imagenet/train --size 256 \\
      --vae sd-vae-ft-ema/ --out data/imagenet256_latents
  python -m moe_diffusion.prepare --source tfds:imagenet2012:5.1.0 --size 256 \\
      --vae ae.safetensors --kind flux --out data/imagenet256_flux
  python -m moe_diffusion.prepare --captions folder:pictures/ --text-encoders FLUX.1-dev/ \\
      --size 512 --vae FLUX.1-dev/ --out data/pictures_flux
  python -m moe_diffusion.prepare --captions "webdataset:cc12m/{00000..01242}.tar" --size 256 \\
      --text-encoders FLUX.1-dev/ --text-length 128 --text-mask --no-pooled --skip-broken \\
      --vae sd-vae-ft-ema/ --out data/cc12m_256
  python -m moe_diffusion.prepare --source folder:/data/art --sizes 256x256,192x320,320x192 \\
      --vae sd-vae-ft-ema/ --out data/art_latents
  python -m moe_diffusion.prepare --verify --out data/imagenet256_flux

On several hosts, start it on each, as for train; --out must be a folder that all of them see. Then
train with --config.data.source=latents:<out>. After --no-flip, add --config.data.augment=none.
"""

from __future__ import annotations

import json
import math
import os
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_diffusion.checks import check_seed
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, check_writable

if TYPE_CHECKING:
    from moe_diffusion.preparing import encode


TEXT_LENGTH = 512  # tokens of FLUX.1 [dev]
OF_CAPTIONS = ("text_encoders", "guidance", "caption_key", "captions_per_image", "text_mask")
OF_CAPTIONS += ("no_pooled", "min_size")


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
    from moe_diffusion.preparing import buckets, encode

    check_seed("--seed", args.seed)
    for name, least in (("shard_size", 1), ("workers", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    _check_source(args)
    autoencoder = autoencoders.load(args.vae, args.kind)
    network = autoencoder.network
    if args.sizes:
        sizes = buckets.parse_sizes(args.sizes, network.factor, args.patch_size)
    else:
        sizes = [_parse_size(args.size, network.factor, args.vae)]
    pixels = (*sizes[0], network.channels)
    told: dict[str, Any] = {"source": args.source, "split": args.split}
    if args.captions:
        source, of_captions = open_captions(args, pixels)
        told |= of_captions
    else:
        source = open_images(args.source, pixels, split=args.split, skip_broken=args.skip_broken)
    if tuple(source.image_shape) != pixels:
        raise UserError(
            f"--source {args.source} has images of shape {tuple(source.image_shape)}, --size and "
            f"--vae need {pixels}"
        )
    views = buckets.views(source, sizes, told["source"]) if len(sizes) > 1 else ()
    shapes = [[*(side // network.factor for side in s), network.latent_channels] for s in sizes]
    settings = {
        **told,
        "records": len(source),
        "fields": describe_fields(source.cond_spec),
        "shape": shapes[0],
        **({"buckets": shapes} if views else {}),
        "moments": not args.samples,
        # A mirrored picture may not be what its caption says.
        "flip": not args.captions if args.flip is None else args.flip,
        "seed": args.seed,
        "scale": network.scale,
        "shift": network.shift,
        "autoencoder": {"name": autoencoder.name, "fingerprint": autoencoder.fingerprint},
        "shard_size": args.shard_size,
        "class_names": getattr(source, "class_names", None),
    }
    batches = [images_at_once(math.prod(size)) * jax.local_device_count() for size in sizes]
    of_texts = getattr(source, "complete", None), getattr(source, "make_null", None)
    out = Path(args.out)
    batch = batches if views else batches[0]
    options = (settings, args.workers, *of_texts, views)
    return encode.Job(source, autoencoder.moments, batch, out, *options)


def open_captions(args: Any, pixels: tuple[int, int, int]) -> tuple[Any, dict[str, Any]]:
    """The source of images with captions that the flags name, and what the manifest says of it."""
    from moe_diffusion.interop.prompts import PromptEncoders
    from moe_diffusion.preparing.captions import Captioned, open_pairs

    pairs = open_pairs(args.captions, args.caption_key, args.split, args.skip_broken)
    how = {"mask": args.text_mask, "pooled": not args.no_pooled}
    encoders = PromptEncoders(args.text_encoders, args.text_length, **how)
    options = {
        "per_image": 1 if args.captions_per_image is None else args.captions_per_image,
        "guidance": args.guidance,
    }
    options |= {"min_size": args.min_size or 0, "skip_broken": args.skip_broken}
    source = Captioned(pairs, pixels, encoders, **options)
    told = {"source": f"captions:{args.captions}", "guidance": args.guidance}
    told |= {"text": encoders.describe()} | source.settings()
    # What is not given is not told, as in the folders that earlier versions began.
    given = {"caption_key": args.caption_key, "min_size": args.min_size}
    return source, told | {key: value for key, value in given.items() if value}


def _check_source(args: Any) -> None:
    """Raises a UserError unless the flags name one source, with encoders for its captions."""
    if bool(args.source) == bool(args.captions):
        raise UserError("give one of --source and --captions: what shall be encoded")
    if args.captions and not args.text_encoders:
        raise UserError("--captions needs --text-encoders: the folder of a FLUX.1 pipeline")
    for flag in () if args.captions else OF_CAPTIONS:
        if getattr(args, flag) not in (None, False):
            raise UserError(f"--{flag.replace('_', '-')} goes with --captions only")
    if args.min_size is not None and args.min_size < 1:
        raise UserError(f"--min-size {args.min_size} is no size: give pixels, like 256")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise UserError(f"--guidance {args.guidance} is no number that a model can take")


def _parse_size(text: str, factor: int, vae: str) -> tuple[int, int]:
    """ "256" -> (256, 256) and "256x384" -> (256, 384), multiples of the pixels per latent."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--size {text} is no size in pixels: give 256, or height x width: 256x384")
    height, width = int(sides[0]), int(sides[-1])
    if height % factor or width % factor:
        raise UserError(f"--size {text} is no multiple of {factor}, the pixels per latent of {vae}")
    return height, width


def run(job: encode.Job) -> dict[str, Any]:
    """Encodes what is still missing and returns the manifest; all processes must call this."""
    import jax
    from jax.experimental import multihost_utils

    from moe_diffusion import locks
    from moe_diffusion.data.latents import read_manifest
    from moe_diffusion.parallel import distributed
    from moe_diffusion.preparing import encode
    from moe_diffusion.signals import ended_by_sigterm

    main = distributed.is_main_process()
    check_writable(job.folder)
    with ended_by_sigterm(), locks.held(job.folder, "prepare"):
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
    add("--source", help="folder:<path>, tfds:<name>, digits or synthetic")
    add("--captions", metavar="KIND:PATH", help="in place of --source: images with captions, "
        "folder:DIR, webdataset:TARS, journeydb:DIR or tfds:NAME; see docs/data.md")  # fmt: skip
    add("--caption-key", metavar="KEY", help="where captions stand: keys of a .json or .jsonl, "
        "like prompt,Task2.Caption; or the feature of a tfds set (caption)")  # fmt: skip
    add("--captions-per-image", type=int, metavar="N", help="captions of an image that are stored, "
        "of which training draws one (1)")  # fmt: skip
    add("--min-size", type=int, metavar="PIXELS", help="images with a shorter side below it are "
        "broken; leave them out with --skip-broken")  # fmt: skip
    add("--text-encoders", help="with --captions: a folder with tokenizer, text_encoder, "
        "tokenizer_2 and text_encoder_2, as FLUX.1 has them")  # fmt: skip
    add("--text-length", type=int, default=TEXT_LENGTH, help="tokens of a caption that are stored, "
        "padding included; FLUX.1 [schnell] has 256 (%(default)s)")  # fmt: skip
    add("--text-mask", action="store_true", help="mask the padding, and store which tokens are "
        "real as text_mask: for models with cross-attention")  # fmt: skip
    add("--no-pooled", action="store_true", help="leave out the field pooled and its encoder, CLIP")
    add("--guidance", type=float, help="with --captions: value of a field guidance in all records")
    add("--split", default="train", help="of a tfds set (%(default)s)")
    add("--size", help="of the images, in pixels: 256, or height x width: 256x384")
    add("--sizes", help="in place of --size: several, 256x256,192x320,320x192; an image gets that "
        "of the nearest aspect ratio, and a training batch has images of one size")  # fmt: skip
    add("--patch-size", type=int, default=2, help="with --sizes: latents per patch along a side of "
        "the models that shall train on them (%(default)s)")  # fmt: skip
    add("--vae", help="the autoencoder: a weight file or a folder of diffusers")
    add("--kind", default="auto", help="sd or flux, for weights without config.json (%(default)s)")
    add("--out", required=True, help="folder of the latents")
    flip = "encode the mirrored images, too, for data.augment=flip (the default without captions)"
    add("--flip", action=BooleanOptionalAction, default=None, help=flip)
    add("--samples", action="store_true", help="store one sample an image, in half the space")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--shard-size", type=int, default=8192, help="records in a file (%(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="threads that read (%(default)s)")
    add("--skip-broken", action="store_true", help="leave out files that are no images, and broken "
        "captions, and count them")  # fmt: skip
    add("--verify", action="store_true", help="only compare the files of --out with their digests")
    add("--json", action="store_true", help="print one JSON object as last line")
    args = parser.parse_args(argv)
    if args.size and args.sizes and not args.verify:
        parser.error("give one of --size and --sizes")
    given = {"--size": args.size or args.sizes, "--vae": args.vae}
    absent = [name for name, value in given.items() if not value]
    if absent and not args.verify:
        parser.error(f"the following arguments are required: {', '.join(absent)}")
    from moe_diffusion import classes
    from moe_diffusion.parallel import distributed
    from moe_diffusion.preparing.verify import verify

    distributed.initialize()
    job = None if args.verify else make_job(args)
    table = classes.table(classes.of_source(job.source)) if job else ""
    if table and distributed.is_main_process():
        print(table, flush=True)
    manifest = run(job) if job else verify(args.out)
    if distributed.is_main_process():
        for reason, count in (manifest.get("skipped_by_reason") or {}).items():
            print(f"left out: {count:,} for {reason}")
        print(f"{manifest['count']:,} latents in {len(manifest['shards'])} files: {args.out}")
        if args.json:
            kept = ("count", "shape", "moments", "flip", "scale", "shift", "autoencoder")
            kept += ("buckets", "bucket_counts", "skipped_by_reason")
            kept = {key: manifest[key] for key in kept if key in manifest}
            print(json.dumps({"out": args.out} | kept))


if __name__ == "__main__":
    main()
