"""Flags of `evaluate` about prompts. Nothing here imports jax before they are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe_diffusion.cli import Parser
from moe_diffusion.errors import UserError
from moe_diffusion.sampling.flags import BENCHMARKS, LAYOUTS

if TYPE_CHECKING:
    from moe_diffusion.evaluation.prompt_scores import Prompts

_NEED_PROMPTS = ("benchmark", "images_per_prompt", "text_encoders", "guidance", "clip")
_NEED_PROMPTS += ("save_images", "layout")
_ADDED = ("prompts", *_NEED_PROMPTS)


def add_flags(parser: Parser) -> None:
    """Adds what says which prompts are drawn, and who scores them; `prompts_of` reads it."""
    add = parser.add_argument
    add("--prompts", metavar="FILE", help="draw these, one a line, instead of labels")
    add("--benchmark", help=f"whose file of prompts it is: {', '.join(BENCHMARKS)}")
    add("--images-per-prompt", type=int, metavar="N", help="the benchmark's, or 1")
    add("--text-encoders", metavar="FOLDER", help="see `sample`")
    add("--guidance", type=float, help="see `sample`")
    add("--clip", metavar="FOLDER", help="a whole CLIP, for the CLIP score")
    add("--save-images", metavar="FOLDER", help="for the images, absent, empty, or begun by an "
        "earlier call")  # fmt: skip
    add("--layout", help=f"of that folder: {', '.join(LAYOUTS)} (the benchmark's, or flat)")


def set_none(parser: Parser) -> None:
    """For commands that share flags with `evaluate` and draw no prompts."""
    parser.set_defaults(**dict.fromkeys(_ADDED))


def prompts_of(args: argparse.Namespace) -> Prompts | None:
    """What the flags ask for; None without --prompts.

    Raises:
      UserError: flags do not go together, or the file or the CLIP is missing or damaged.
    """
    if not args.prompts:
        for flag in _NEED_PROMPTS:
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} needs --prompts, a file of them")
        return None
    if args.samples:
        raise UserError("--prompts and --samples do not go together: prompts are drawn by a run")
    if args.labels:
        raise UserError("--prompts and --labels both say what to draw: give one of them")
    each = args.images_per_prompt
    if each is not None and (args.num or each < 1):
        raise UserError("--images-per-prompt must be at least 1, and --num says it, too: give one")
    if args.layout and not args.save_images:
        raise UserError("--layout is of --save-images: name a folder")
    from moe_diffusion.evaluation.prompt_scores import Prompts
    from moe_diffusion.evaluation.runs import Asked
    from moe_diffusion.interop import clip
    from moe_diffusion.sampling.prompt_files import open_prompts

    file = open_prompts(args.prompts, args.benchmark)
    asked = Asked(file, args.text_encoders, args.guidance)
    found = Prompts(asked, each or 0, None, args.save_images, args.layout)
    num = found.num(args.num or 0)
    if num < len(file.items):
        raise UserError(f"--num {num} are fewer than the {len(file.items)} prompts: draw more")
    return found._replace(clip=clip.load(args.clip) if args.clip else None)
