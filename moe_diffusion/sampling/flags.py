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
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from moe_diffusion.classes import Classes
    from moe_diffusion.models.autoencoder import Autoencoder
    from moe_diffusion.models.stack import Model
    from moe_diffusion.sampling.prompts import Prompted

BENCHMARKS = ("geneval", "dpg", "t2i_compbench", "mjhq", "imagereward", "mps", "parti")
LAYOUTS = ("flat", "geneval", "dpg", "t2i_compbench", "mjhq", "imagereward", "mps")
PRESETS = ("dp", "fsdp", "tp")  # of parallel/rules.py, those that samplers can use
NUM = 64  # images, if no flag says how many
BATCH = 64  # images at a time, if no flag says it
_INPUTS = 4 * 128**2  # of a batch for prompts, positions of the input: 4 images of 1024 x 1024


class OpenRun(NamedTuple):
    """A run to draw images of.

    Attributes:
      config, model, variables, note: see `load_workdir`.
      known: the classes that were trained.
      autoencoder: decodes what the model makes; None if it makes images.
      prompted: what is drawn for the prompts; None if none are given.
      mesh: the devices that share the work, of --preset; None for one device.
    """

    config: ConfigDict
    model: Model
    variables: dict[str, Any]
    note: dict[str, Any]
    known: Classes
    autoencoder: Autoencoder | None
    prompted: Prompted | None
    mesh: Mesh | None

    def batch(self, asked: int | None) -> int:
        """Images that are drawn together; `asked` is what --batch says."""
        if asked or not self.prompted:
            return asked or BATCH
        height, width, _ = self.model.input_shape
        return max(1, min(BATCH, _INPUTS // (height * width)))


def add_flags(parser: Parser) -> None:
    """Adds what says which run, what to draw and how; `check_flags` and `open_run` read it."""
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a trained run")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num", type=int, help=f"how many images ({NUM}; with prompts one each, or "
        "as many as their benchmark has)")  # fmt: skip
    count.add_argument("--num-per-class", type=int, metavar="N", help="how many of each class")
    count.add_argument("--num-per-prompt", type=int, metavar="N", help="how many for each prompt")
    add("--labels", default="", help="classes by number or name, like 3,7 or cat,dog (all)")
    add("--class-names", help="text file with the name of every class, one a line")
    add("--prompt", action="append", help="text that says what to draw; may be given several times")
    add("--prompts", metavar="FILE", help="text file with prompts, one a line")
    add("--benchmark", help=f"whose file of prompts it is: {', '.join(BENCHMARKS)}")
    add("--text-encoders", metavar="FOLDER", help="FLUX.1 pipeline whose CLIP, T5 and tokenizers "
        "read the prompts (the config's data.text_encoders)")  # fmt: skip
    add("--guidance", type=float, help="scale for models distilled with one, like FLUX.1 [dev] "
        "(3.5 with prompts)")  # fmt: skip
    add("--size", help="pixels of the images: 1024, or 768x1024, the height first (the config's)")
    add("--cfg", type=float, help="guidance scale, by a second pass; 1 is none")
    add("--sampler", help="of a flow: heun, euler, dopri5, sde or sde_heun; of ddpm: ddpm or ddim")
    add("--steps", type=int, help="steps of the sampler")
    add("--ema", help="decay of the average to use, or none (the run's first)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=int, help=f"images at a time, which share experts ({BATCH}; with prompts "
        "as many as four of 1024 x 1024 pixels come to)")  # fmt: skip
    add("--preset", choices=PRESETS, help="share the work among all devices: dp by images, tp each "
        "image, fsdp by images and the weights, too (one device draws; of several processes all, "
        "as with dp)")  # fmt: skip
    add("--vae", help="autoencoder that makes images of latents (the config's data.autoencoder)")
    add("--json", action="store_true", help="print one JSON object as last line")


def check_flags(args: argparse.Namespace) -> None:
    """Raises a UserError about a number that cannot be, or flags that exclude each other."""
    counts = (args.num, args.num_per_class, args.num_per_prompt, args.batch)
    if any(count is not None and count < 1 for count in counts):
        raise UserError("--num, --num-per-class, --num-per-prompt and --batch must be at least 1")
    check_seed("--seed", args.seed)
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts both say what to draw: give one of them")
    prompts = "--prompt" if args.prompt else "--prompts" if args.prompts else None
    for flag in ("labels", "num_per_class", "class_names"):
        if prompts and getattr(args, flag):
            raise UserError(f"{prompts} and --{flag.replace('_', '-')} do not go together")
    if args.benchmark and not args.prompts:
        raise UserError("--benchmark says what --prompts is: name a file of prompts")
    for flag in ("num_per_prompt", "text_encoders"):
        if not prompts and getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} needs --prompt or --prompts")


def open_run(args: argparse.Namespace, overrides: Sequence[str]) -> OpenRun:
    """Loads the run that the flags name; tells if its data had fewer classes than its model.

    Prompts are encoded before the weights are read, so that text encoders and model need not fit
    the device together.
    """
    import jax

    from moe_diffusion.classes import of_run
    from moe_diffusion.config.sizes import size_changes
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.parallel.mesh import make_mesh
    from moe_diffusion.sampling import prompts
    from moe_diffusion.sampling.labels import classes_of
    from moe_diffusion.sampling.load import load_config, load_workdir
    from moe_diffusion.sampling.prompt_files import open_prompts

    given = {"cfg": args.cfg, "sampler": args.sampler, "steps": args.steps}
    keys = [f"sampling.{key}={value}" for key, value in given.items() if value is not None]
    keys = [*overrides, *keys]
    file = open_prompts(args.prompts, args.benchmark) if args.prompts else None
    texts = file.prompts if file else args.prompt
    texts = texts and prompts.check_prompts(texts)
    config = load_config(args.workdir, tuple(keys))
    autoencoder = autoencoders.for_config(config, args.vae)
    if args.size:
        factor = autoencoder and autoencoder.network.factor
        keys += size_changes(config, args.size, factor, "--size")
    found = []

    def encode(config: ConfigDict, model: Model) -> None:
        if texts:
            each = args.num_per_prompt or (file.images if file and not args.num else None)
            num = each and each * len(texts)
            known = of_run(args.workdir)
            encoder = prompts.prompt_encoder(config, model, args.text_encoders, known)
            how = {"num": num or args.num, "guidance": args.guidance, "asked_by": "--guidance"}
            found.append(prompts.condition(encoder, model, texts, **how))

    mesh, preset = None, args.preset or ("dp" if jax.process_count() > 1 else None)
    if preset and jax.device_count() > 1:
        parallel = config.parallel.copy_and_resolve_references()
        parallel.preset = preset
        mesh = make_mesh(parallel)
    options = {"step": args.step, "ema": args.ema, "mesh": mesh, "preset": preset}
    config, model, variables, note = load_workdir(
        args.workdir, tuple(keys), **options, before=encode
    )
    known = classes_of(args.workdir, model, args.class_names)
    prompted = next(iter(found), None)
    return OpenRun(config, model, variables, note, known, autoencoder, prompted, mesh)


def conditions(run: OpenRun, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The condition of every image, {field: [N, ...]}; tells the names of the chosen classes."""
    from moe_diffusion.classes import LABEL
    from moe_diffusion.parallel.distributed import is_main_process
    from moe_diffusion.sampling.conditions import conditions_of_run, spread
    from moe_diffusion.sampling.labels import described, num_labels, parse_labels
    from moe_diffusion.sampling.prompts import guidance_of, takes_prompts

    if run.prompted:
        return run.prompted.cond
    labels = parse_labels(args.labels, run.model, run.known) if args.labels else None
    num = NUM if args.num is None else args.num
    if args.num_per_class is not None:
        every = num_labels(run.model, "--num-per-class", run.known) if labels is None else None
        num = args.num_per_class * (every or len(labels))
    told = {}
    if args.guidance is not None:
        told = guidance_of(run.model, args.guidance, num, "--guidance")
    try:
        cond = conditions_of_run(run.config, run.model, num, run.known) | told
    except UserError as error:
        if takes_prompts(run.model):
            raise UserError(f"{error}; or say what to draw with --prompt") from None
        raise
    if labels is None:
        return cond
    if run.known.names and is_main_process():
        print(f"classes: {described(labels, run.known)}")
    return cond | {LABEL: labels[spread(num, len(labels))]}
