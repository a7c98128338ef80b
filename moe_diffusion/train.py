"""Trains a model; run the same command again to resume.

  python -m moe_diffusion.train --config configs/digits.py --workdir runs/digits
  python -m moe_diffusion.train --config configs/digits.py:router=diffmoe --workdir runs/diffmoe \\
      --config.optim.learning_rate=5e-4 --config.train.num_steps=2000
  python -m moe_diffusion.train --config configs/digits.py --workdir runs/digits \\
      --config.optim.learning_rate=1e-4 --allow-change optim.learning_rate

The workdir then holds config.json, data.json (the classes of the data), parameters.txt,
metrics.jsonl, loss.png, TensorBoard events, checkpoints/ and samples/. summary.json says how fast
it was, and heartbeat.json where it stands. The last lines say where what lies. Any key of the
config can be set as --config.<key>=<value>. The shared keys are listed in
moe_diffusion/config/defaults.py, those of model.<architecture> in models/<architecture>.py, and
those of model.router in moe/routers/<router>.py.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_diffusion import xla_flags
from moe_diffusion.cli import Parser, exits_on_user_error

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from moe_diffusion.classes import Classes
    from moe_diffusion.models.stack import Model


@dataclasses.dataclass
class Job:
    """What training needs besides a loss: a config, its model, and data that fits both."""

    config: ConfigDict
    model: Model
    source: Any
    known: Classes
    decode: Callable | None  # latents -> pictures
    flops: float | None = None  # of an image in training, on average

    def open_iterator(self) -> Any:
        """This process's part of the training batches."""
        import jax

        from moe_diffusion.data.pipeline import make_iterator

        part = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return make_iterator(self.source, self.config.data, seed=self.config.seed, **part)

    def hooks(self, config: ConfigDict, model: Model, workdir: str) -> list[Callable]:
        """What draws and judges images in the run of a config in a workdir."""
        from moe_diffusion.evaluation.periodic import EvaluationHook
        from moe_diffusion.sampling.hooks import SampleHook

        hooks: list[Callable] = [SampleHook(config, model, workdir, self.source, self.decode)]
        if config.train.eval_samples and config.train.sample_every:
            hooks.append(EvaluationHook(config, model, self.source))
        return hooks


def open_job(spec: str, workdir: str, overrides: Sequence[str]) -> Job:
    """Opens model and data of the config `spec` (see `config.load`) and tells what they are."""
    import jax

    from moe_diffusion import classes, remote
    from moe_diffusion import config as configs
    from moe_diffusion.data.sources import open_source
    from moe_diffusion.empty_prompt import told
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.interop import prompts
    from moe_diffusion.models import build
    from moe_diffusion.models.accounting import forward_flops, parameter_counts, table
    from moe_diffusion.parallel import distributed
    from moe_diffusion.planning import buckets
    from moe_diffusion.planning.kernels import dispatch_line
    from moe_diffusion.sampling.labels import untrained

    config = configs.load(spec, overrides)
    remote.check(workdir, "the workdir")
    remote.check(config.init_from, "init_from =")
    model = build(config.model, losses=sorted(config.loss_weights))
    source = open_source(config.data, model.input_shape, model.cond_spec())
    known = classes.of_source(source, config.data.source)
    classes.check_same(classes.of_run(workdir), known, workdir)
    model = told(model, known.empty)
    autoencoder = autoencoders.for_config(config)
    prompts.check_for_config(config)
    flops = buckets.mean_flops(config, model, source)
    if distributed.is_main_process():
        print(f"{config.name}: {len(source):,} images, {jax.device_count()} x "
              f"{jax.devices()[0].device_kind}, preset {config.parallel.preset}")  # fmt: skip
        tables = classes.table(known), untrained(model, known), buckets.table(config, source)
        print(*filter(None, tables), sep="\n")
        print(table(parameter_counts(model), forward_flops(model)))
        print(dispatch_line(model, config.model, jax.default_backend()), flush=True)
    return Job(config, model, source, known, autoencoder.decode if autoencoder else None, flops)


def run(
    spec: str, workdir: str, overrides: Sequence[str] = (), allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains the config `spec` (see `config.load`) in `workdir`.

    allow_change: keys that may differ from those of the run that is resumed.

    Returns:
      {"step": steps done, "num_steps": steps wanted, "workdir"}.
    """
    from moe_diffusion.diffusion.objectives import make_loss
    from moe_diffusion.parallel import distributed
    from moe_diffusion.training.loop import train

    job = open_job(spec, workdir, overrides)
    config, model = job.config, job.model
    options = {"hooks": job.hooks(config, model, workdir), "known": job.known}
    options |= {"allow_change": allow_change, "flops": job.flops}
    state = train(config, model, make_loss(model, config), job.open_iterator, workdir, **options)
    if distributed.is_main_process():
        print(where_everything_lies(workdir, loss_curves(workdir)), flush=True)
    return {"step": int(state.step), "num_steps": config.train.num_steps, "workdir": workdir}


def loss_curves(workdir: str) -> Any:
    """Draws loss.png of a run; returns its path, or None without metrics."""
    from etils import epath

    from moe_diffusion.figures.curves import read_metrics, training_picture
    from moe_diffusion.figures.images import save_ornament

    metrics = epath.Path(workdir) / "metrics.jsonl"
    if not (metrics.exists() and metrics.stat().length):
        return None
    return save_ornament(
        lambda: training_picture(read_metrics(metrics)), metrics.parent / "loss.png"
    )


def where_everything_lies(workdir: str, curves: Any) -> str:
    """Lines of text: the files of a run, its speed, and the command that draws images with it.

    curves: path of the picture of the loss, if there is one.
    """
    from etils import epath

    from moe_diffusion import heartbeat
    from moe_diffusion.training.checkpoint import saved_steps

    folder, steps = epath.Path(workdir), saved_steps(workdir)
    samples = sorted((folder / "samples").glob("*.png"))
    lines = [("run", workdir)]
    if steps:
        numbers = ", ".join(f"{step:,}" for step in steps[-3:])
        more = "... " if len(steps) > 3 else ""
        lines.append(("checkpoints", f"{folder / 'checkpoints'} (steps {more}{numbers})"))
    if samples:
        lines.append(("samples", f"{samples[-1]} ({len(samples)} pictures)"))
    if curves:
        lines.append(("curves", curves))
    lines += heartbeat.told(heartbeat.read_summary(workdir) or {})
    if steps:
        command = f"python -m moe_diffusion.sample --workdir {shlex.quote(workdir)} --out grid.png"
        lines.append(("draw images", command))
    return "\n".join(f"{name:<13}{text}" for name, text in lines)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("train", __doc__, remote=("workdir",))
    run_command(parser, run, argv)


def run_command(
    parser: Parser, run: Callable[..., dict[str, Any]], argv: Sequence[str] | None
) -> None:
    """Adds the flags of a command that trains, parses them, and calls `run` with them."""
    add = partial(parser.add_argument, required=True)
    add(
        "--config",
        metavar="NAME",
        help="a config file or its name, with arguments: digits:router=dense; list shows all",
    )
    add("--workdir", metavar="DIR", help="folder of the run; made if missing, resumed if not")
    parser.add_argument(
        "--allow-change",
        metavar="KEYS",
        default="",
        help="keys that may change as a run is resumed: data.source,optim.learning_rate",
    )
    parser.add_argument(
        "--on-damage",
        choices=("stop", "previous"),
        default="stop",
        help="where the newest checkpoint is damaged: end with its name (%(default)s), or set it "
        "aside and go on from the one before",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    xla_flags.apply()
    from moe_diffusion import fallback
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory
    from moe_diffusion.parallel import distributed
    from moe_diffusion.signals import RUN_AGAIN

    keep_freed_memory()
    distributed.initialize()
    allow_change = [key.strip() for key in args.allow_change.split(",") if key.strip()]
    if args.on_damage == "previous":
        tell = partial(print, flush=True) if distributed.is_main_process() else str
        fallback.set_aside(args.workdir, tell)
    result = run(args.config, args.workdir, overrides, allow_change)
    if args.json and distributed.is_main_process():
        print(json.dumps(result), flush=True)
    if result["step"] < result["num_steps"]:
        sys.exit(RUN_AGAIN)


if __name__ == "__main__":
    main()
