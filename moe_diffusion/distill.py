"""Turns a dense model into a Mixture of Experts and of Blocks (Dense2MoE); run again to resume.

  python -m moe_diffusion.distill --config configs/flux_moe_l.py --workdir runs/flux_moe_l \\
      --config.distill.teacher=runs/flux_dev
  python -m moe_diffusion.distill --config configs/digits_flux_moe.py --workdir runs/digits_moe \\
      --config.distill.teacher=runs/digits_flux --config.distill.shared.steps=200

It measures how important the teacher's hidden units are, deals them to experts, and trains the
stages of the config's section `distill` one after the other: shared experts, all experts, groups of
blocks. Each stage is a run of its own in the workdir, which `sample` and `evaluate` read.
docs/dense2moe.md walks from the files of FLUX.1 [dev] to FLUX.1-MoE-L.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.train import open_job, run_command


def run(
    spec: str, workdir: str, overrides: Sequence[str] = (), allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Distils the model of the config `spec` (see `config.load`) in `workdir`.

    allow_change: keys that may differ from those of the distillation that is resumed.

    Returns:
      {"workdir", "stage": folder of the last stage, "step", "num_steps" of that stage}.
    """
    import jax

    from moe_diffusion.dense2moe import stages
    from moe_diffusion.parallel import distributed
    from moe_diffusion.sampling.load import load_config
    from moe_diffusion.signals import ended_by_sigterm
    from moe_diffusion.train import loss_curves, where_everything_lies
    from moe_diffusion.training.checkpoint import saved_steps

    job = open_job(spec, workdir, overrides)
    main, known = distributed.is_main_process(), job.known
    tell = partial(print, flush=True) if main else lambda line: None
    options = {"hooks": job.hooks, "known": known, "allow_change": allow_change, "tell": tell}
    alone = jax.process_count() == 1  # of several, jax listens to the signal itself
    with ended_by_sigterm() if alone else contextlib.nullcontext():
        last = stages.distill(job.config, workdir, job.open_iterator, **options)
    if main:
        print(where_everything_lies(last, loss_curves(last)), flush=True)
    steps = {"step": saved_steps(last)[-1], "num_steps": load_config(last).train.num_steps}
    return {"workdir": workdir, "stage": last, **steps}


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    run_command(Parser("distill", __doc__, remote=("workdir",)), run, argv)


if __name__ == "__main__":
    main()
