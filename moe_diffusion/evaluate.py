"""Measures a trained run, or images and features in files, against a reference.

  python -m moe_diffusion.evaluate --workdir runs/digits
  python -m moe_diffusion.evaluate --workdir runs/dsmoe_l --protocol dsmoe --vae sd-vae-ft-mse/ \\
      --inception pt_inception-2015-12-05-6726825d.pth --reference VIRTUAL_imagenet256_labeled.npz
  python -m moe_diffusion.evaluate --samples samples.npz --inception FILE --reference ref.npz
  python -m moe_diffusion.evaluate --workdir runs/digits --cfg 1.0,1.5,2.0 --ema 0.999,none \\
      --plot sweep.png
  python -m moe_diffusion.evaluate --workdir runs/flux_dev --prompts evaluation_metadata.jsonl \\
      --benchmark geneval --clip clip-vit-large-patch14/ --vae FLUX.1-dev/ --save-images geneval/

The images to judge come from the run in --workdir, or from --samples: an .npz of images or
features, a folder of pictures, or a data source (folder:<path>, tfds:<name>). --reference is any of
these, or an .npz of statistics. Runs on digits need neither --reference nor --inception; they give
fd_digits, which is not an FID. --prompts draws what a file says instead of labels, and --clip
scores it; the same call again goes on where one was stopped. Every result says what it was made
with. The results of a run are added to its evaluations.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_diffusion import shipped
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import choices, prompt_flags
from moe_diffusion.ornaments import ornament
from moe_diffusion.writing import check_outputs

if TYPE_CHECKING:
    from moe_diffusion.evaluation.evaluator import Request


def add_flags(parser: Parser) -> None:
    """Adds what says how images are drawn and judged; `settle` reads it."""
    add = parser.add_argument
    add("--reference", help="images, features or statistics to compare with")
    add("--inception", help="weights of the FID Inception")
    add("--protocol", help=f"a published one: {', '.join(shipped.protocols())}")
    add("--num", type=int, help="images to judge (the protocol's; 50,000, of digits 1,000)")
    add("--size", type=int, default=0, help="side in pixels, of images of folder: and tfds:")
    add("--vae", help="the autoencoder of a run on latents (its data.autoencoder)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--ema", help="decay of the average, or none; several for a sweep: 0.9996,0.9999")
    add("--cfg", help="guidance scale; several for a sweep: 1.0,1.25,1.5")
    add("--sampler", help="sampling.sampler of the config")
    add("--steps", type=int, help="steps of the sampler")
    add("--labels", choices=choices.LABELS, help="classes in order, or drawn (balanced)")
    add("--batch", type=int, help="images sampled together (64)")
    add("--seed", type=int, help="of noise and random labels (0)")
    add("--resize", choices=choices.RESIZES, help="before Inception, as who does it (tensorflow)")
    add("--quantize", choices=choices.QUANTIZATIONS, help="samples to 0..255 (round)")
    add("--score", choices=choices.SCORES, help="whose Inception Score (torch-fidelity: shuffled)")
    add("--matmul", choices=choices.MATMULS, help="float32 products, at least so exact (tf32)")
    add("--json", action="store_true", help="print one JSON object as last line")
    parser.set_defaults(workdir=None, samples=None, save_features=None, plot=None)
    prompt_flags.set_none(parser)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("evaluate", __doc__, remote=("workdir",))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workdir", help="folder of a trained run")
    what.add_argument("--samples", help="images or features to judge, instead of a run")
    add_flags(parser)
    prompt_flags.add_flags(parser)
    add = parser.add_argument
    add("--save-features", help=".npz for the judged images' features and statistics")
    add("--plot", help="picture of a sweep (sweep.png in the workdir)")
    return parser.parse_with_overrides(argv)


def settle(args: argparse.Namespace, overrides: list[str]) -> Request:
    """The request: the command line overrides the protocol, which overrides the defaults."""
    if not (args.workdir or args.samples):
        raise UserError("nothing to judge: give --workdir or --samples")
    from moe_diffusion.evaluation import evaluator, protocol

    published = protocol.load(args.protocol) if args.protocol else None
    settings = copy.deepcopy(published or protocol.default())
    given = {"num_samples": args.num, "batch_size": args.batch}
    given |= {key: getattr(args, key) for key in ("labels", "seed", "resize", "quantize")}
    given |= {"score": args.score, "matmul": args.matmul}
    settings.update({key: value for key, value in given.items() if value is not None})
    for key in ("sampler", "steps"):
        if getattr(args, key) is not None:
            settings.sampling[key] = getattr(args, key)
    if args.cfg:
        settings.cfg = _numbers("--cfg", args.cfg)
    prompts = prompt_flags.prompts_of(args)
    if prompts:
        settings.num_samples = prompts.num(args.num or 0)
    protocol.validate(settings)
    read = [args.samples, args.reference, args.inception, args.vae, args.prompts, args.clip]
    read += [path.partition(":")[2] for path in read if path and path.startswith("folder:")]
    outputs = {"--save-features": (args.save_features, ".npz"), "--plot": (args.plot, ".png")}
    check_outputs(outputs, read)
    emas = args.ema.split(",") if args.ema else [None]
    return evaluator.Request(
        settings=settings,
        published=published,
        overrides=tuple(overrides),
        emas=tuple(emas),
        num=settings.num_samples if prompts else args.num or 0,
        prompts=prompts,
        **{key: getattr(args, key) for key in ("workdir", "samples", "reference", "inception")},
        **{key: getattr(args, key) for key in ("size", "vae", "step", "save_features")},
    )


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r} is not a list of numbers like 1.0,1.5") from None


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parse(argv)
    from moe_diffusion.evaluation import evaluator, protocol, sweep
    from moe_diffusion.figures.curves import sweep_picture
    from moe_diffusion.figures.images import own_name, save_png
    from moe_diffusion.parallel import distributed
    from moe_diffusion.parallel.distributed import is_main_process

    distributed.initialize()
    request, results = settle(args, overrides), []
    is_sweep = max(len(request.settings.cfg), 1) * len(request.emas) > 1 and not request.samples
    warned: set[str] = set()
    for result in evaluator.evaluate(request):
        results.append(result)
        if is_main_process():
            for warning in result["warnings"]:
                if warning not in warned:
                    print(f"warning: {warning}", file=sys.stderr)
            warned |= set(result["warnings"])
            show = sweep.row(result, first=len(results) == 1) if is_sweep else None
            print(show or protocol.describe(result), flush=True)
    last = results[0] if len(results) == 1 else {"results": results}
    if len(results) > 1 and is_main_process():
        print(sweep.conditions(results))
        place = args.plot or own_name(Path(args.workdir) / "sweep.png")
        picture = None
        with ornament(f"the picture {place}"):
            picture = save_png(sweep_picture(results), place)
            print(f"the curve: {picture}")
        last["plot"] = picture and str(picture)
    if args.json and is_main_process():
        print(json.dumps(last))


if __name__ == "__main__":
    main()
