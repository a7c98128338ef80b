"""Trains a model; run the same command again to resume.

  python -m moe_diffusion.train --config configs/digits.py --workdir runs/digits
  python -m moe_diffusion.train --config configs/digits.py:router=diffmoe --workdir runs/diffmoe \\
      --config.optim.learning_rate=5e-4 --config.train.num_steps=2000

The workdir then holds config.json, parameters.txt, metrics.jsonl, loss.png, TensorBoard events,
checkpoints/ and samples/. Any key of the config can be set as --config.<key>=<value>. The shared
keys are listed in moe_diffusion/config/defaults.py, those of model.<architecture> in
models/<architecture>.py, and those of model.router in moe/routers/<router>.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from moe_diffusion.cli import Parser, exits_on_user_error


def run(spec: str, workdir: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains the config `spec` (see `config.load`) in `workdir`.

    Returns:
      {"step": steps done, "num_steps": steps wanted, "workdir"}.
    """
    import jax
    from etils import epath

    from moe_diffusion import config as configs
    from moe_diffusion import remote
    from moe_diffusion.data.pipeline import make_iterator
    from moe_diffusion.data.sources import open_source
    from moe_diffusion.diffusion.objectives import make_loss
    from moe_diffusion.evaluation.periodic import EvaluationHook
    from moe_diffusion.figures.curves import loss_curve
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.models import build
    from moe_diffusion.models.accounting import forward_flops, parameter_counts, table
    from moe_diffusion.parallel import distributed
    from moe_diffusion.planning.kernels import dispatch_line
    from moe_diffusion.sampling.hooks import SampleHook
    from moe_diffusion.training.loop import train

    config = configs.load(spec, overrides)
    remote.check(workdir, "the workdir")
    remote.check(config.init_from, "init_from =")
    model = build(config.model, losses=sorted(config.loss_weights))
    source = open_source(config.data, model.input_shape, model.cond_spec())
    autoencoder = autoencoders.for_config(config)
    if distributed.is_main_process():
        print(f"{config.name}: {len(source):,} images, {jax.device_count()} x "
              f"{jax.devices()[0].device_kind}, preset {config.parallel.preset}")  # fmt: skip
        print(table(parameter_counts(model), forward_flops(model)))
        print(dispatch_line(model, config.model, jax.default_backend()), flush=True)
    with contextlib.ExitStack() as stack:

        def open_iterator():
            index, count = jax.process_index(), jax.process_count()
            iterator = make_iterator(
                source, config.data, seed=config.seed, process_index=index, process_count=count
            )
            return stack.enter_context(contextlib.closing(iterator))

        decode = autoencoder.decode if autoencoder else None
        hooks = [SampleHook(config, model, workdir, source, decode)]
        if config.train.eval_samples and config.train.sample_every:
            hooks.append(EvaluationHook(config, model, source))
        loss_fn = make_loss(model, config)
        state = train(config, model, loss_fn, open_iterator, workdir, hooks=hooks)
    metrics = epath.Path(workdir) / "metrics.jsonl"
    if distributed.is_main_process() and metrics.exists() and metrics.stat().length:
        loss_curve(metrics, metrics.parent / "loss.png")
    return {"step": int(state.step), "num_steps": config.train.num_steps, "workdir": workdir}


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("train", __doc__, remote=("workdir",))
    add = partial(parser.add_argument, required=True)
    add(
        "--config",
        metavar="NAME",
        help="a config file or its name, with arguments: digits:router=dense; list shows all",
    )
    add("--workdir", metavar="DIR", help="folder of the run; made if missing, resumed if not")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory
    from moe_diffusion.parallel import distributed

    keep_freed_memory()
    distributed.initialize()
    result = run(args.config, args.workdir, overrides)
    if args.json and distributed.is_main_process():
        print(json.dumps(result))


if __name__ == "__main__":
    main()
