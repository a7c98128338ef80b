"""A whole training step and a whole sampler, on generated images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config as configs
from moe_diffusion.benchmarks.timing import medians, peak_flops
from moe_diffusion.conditions import IMAGE, cond_of
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.models.accounting import BACKWARD, forward_flops
from moe_diffusion.synthetic import Synthetic
from moe_diffusion.training.run import prepare_run
from moe_diffusion.training.step import Frozen


def bench_train(spec: str, overrides: Sequence[str], repeats: int) -> dict[str, Any]:
    """The real step of a config on one device: gradients, AdamW, averages.

    mfu: analytic FLOPs of the activated parameters and of attention, three times a forward pass,
    per second, as a share of `timing.peak_flops`.
    """
    config = configs.load(spec, ["data.source=synthetic", *overrides])
    run = prepare_run(config, devices=jax.devices()[:1])
    batch, step = _batch(config, run.model), run.step()
    with run.on_mesh():
        state, untrained = run.create(config.seed)
        holder, frozen = [state], Frozen(untrained)

        def call():
            holder[0], metrics = step(holder[0], batch, jax.random.key(0), frozen)
            return metrics

        seconds = medians({"step": call}, repeats)["step"]
    flops = (1 + BACKWARD) * forward_flops(run.model, config.data.batch_size)["total"]
    return _report(config, run.model, seconds, flops)


def bench_sample(spec: str, overrides: Sequence[str], repeats: int) -> dict[str, Any]:
    """One batch of the config's sampler with untrained weights; the time counts all its steps."""
    config = configs.load(spec, ["data.source=synthetic", *overrides])
    run = prepare_run(config, devices=jax.devices()[:1])
    batch, sampler = _batch(config, run.model), make_sampler(run.model, config)
    with run.on_mesh():
        variables = jax.tree.map(lambda x: jnp.full(x.shape, 0.02, x.dtype), run.variables)
        keys = jax.random.split(jax.random.key(0), config.data.batch_size)
        image, cond = batch[IMAGE], cond_of(batch)
        call = {"sample": lambda: sampler(variables, image, cond, keys)}
        seconds = medians(call, repeats)["sample"]
    sampling = config.sampling
    return _report(config, run.model, seconds, flops=None) | {
        "sampler": sampling.sampler, "steps": sampling.steps, "cfg": sampling.cfg,
    }  # fmt: skip


def _batch(config, model) -> dict[str, np.ndarray]:
    source = Synthetic(model.input_shape, model.cond_spec())
    return source.take(np.arange(config.data.batch_size))


def _report(config, model, seconds: float, flops: float | None) -> dict[str, Any]:
    report = {
        "config": config.name,
        "batch": config.data.batch_size,
        "dtype": str(jnp.dtype(model.dtype)),
        "seconds": seconds,
        "images_per_sec": config.data.batch_size / seconds,
    }
    if flops is not None:
        report["gflops"] = flops / 1e9
        report["mfu"] = flops / seconds / peak_flops(report["dtype"])
    return report
