"""Every config file, made narrow and shallow, trains a step; DSMoE-L does so as it is."""

from __future__ import annotations

import functools
import json
import time

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.data.sources import open_source
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.models import build
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training.optim import make_optimizer, make_schedule
from moe_diffusion.training.state import TrainState, create_state
from moe_diffusion.training.step import make_train_step
from tests import cli

ROUTERS = ("token_choice", "expert_choice", "diffmoe", "deepseek", "dense")
SPECS = [f"configs/digits.py:router={router}" for router in ROUTERS]
SPECS += [f"configs/dsmoe_{size}.py:experts={e}" for size in "sbl" for e in (16, 48)]
SPECS += ["configs/dsmoe_3b.py"]
SPECS += [f"configs/promoe_{size}.py" for size in ("s", "b", "l", "xl")]
SPECS += ["configs/promoe_l.py:routing=expert_choice"]
SPECS += [f"configs/dit_moe_{size}.py" for size in ("s", "b", "xl", "g")]
SPECS += [f"configs/jit_{size}{patch}.py" for size in "blhg" for patch in (16, 32)]
SPECS += [f"configs/jitmoe_{size}16.py" for size in "blh"]
SPECS += [f"configs/dit_{size}.py:objective=ddpm" for size in ("s", "b", "l", "xl", "xxl", "xxxl")]
SPECS += [f"configs/diffmoe_{size}.py:experts={e}" for size in ("s", "b", "l") for e in (8, 16)]
SPECS += ["configs/diffmoe_xl.py", "configs/diffmoe_l.py:experts=2"]
SPECS += [f"configs/ecdit_{size}.py" for size in "sbl"]
# These differ little from the others; each takes a compilation of its own.
SLOW = [f"configs/tcdit_{size}.py" for size in "sbl"]
SLOW += [f"configs/dit_{size}.py:objective=flow" for size in ("s", "b", "l", "xl", "xxl", "xxxl")]
SLOW += [f"configs/sit_{size}.py" for size in ("s", "b", "l", "xl")]
SLOW += ["configs/diffmoe_l.py:objective=ddpm", "configs/tcdit_l.py:objective=ddpm"]
SLOW += ["configs/dsmoe_s.py:positions=sincos,shared=false"]
SLOW += ["configs/dsmoe_s.py:positions=rope1d,interleave=false,gqa=true"]
SPECS += [pytest.param(spec, marks=pytest.mark.slow) for spec in SLOW]
BATCH = 2


@pytest.fixture(autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small(spec: str) -> configs.ConfigDict:
    """Only sizes change: experts, groups, router, losses, positions and schedule stay."""
    sizes = {
        "model.image_size": 8,
        "model.patch_size": 4,
        "model.depth": 2,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.moe.hidden_size": 8,
        "model.bottleneck": 4,
        "model.in_context_tokens": 2,
        "model.in_context_start": 1,
        "model.dropout": 0,  # its blocks, the middle half, are none of two
        "data.batch_size": BATCH,
        "data.source": "synthetic",
        # No part of a step on one device, and different from size to size:
        "name": "small",
        "parallel.preset": "dp",
        "checkpoint.keep_every": 0,
        "diffusion.noise_scale": 1.0,
    }
    if configs.load(spec).model.moe.shared_hidden_size:
        sizes["model.moe.shared_hidden_size"] = 8
    if configs.load(spec).model.router.name in ("expert_choice", "diffmoe"):
        sizes["model.moe.num_experts"] = 4  # as many as an image has tokens
    if configs.load(spec).model.num_kv_heads:
        sizes["model.num_kv_heads"] = 1
    config = configs.load(spec, [f"{key}={value}" for key, value in sizes.items()])
    config.sampling.update(configs.default().sampling)  # no part of a step either
    return config


@functools.cache
def first_step(config_json: str) -> tuple[TrainState, dict[str, float]]:
    """On one device. Some models of DSMoE differ in size alone and are the same when small."""
    config = configs.default()
    config.update(json.loads(config_json))
    model = build(config.model, losses=sorted(config.loss_weights))
    optimizer = make_optimizer(config.optim)
    train_step = make_train_step(
        make_loss(model, config),
        optimizer,
        make_schedule(config.optim, config.train.num_steps),
        config,
        model.update_router_state,
    )
    batch = open_source(config.data, config.model).take(np.arange(BATCH))
    with jax.set_mesh(make_mesh(config.parallel, jax.devices()[:1])):
        state = create_state(model, optimizer, config, jax.sharding.get_mesh(), config.seed)
        state, metrics = train_step(state, batch, jax.random.key(config.seed))
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_takes_a_step(spec):
    config = small(spec)
    state, metrics = first_step(config.to_json())
    metrics = dict(metrics)
    assert metrics.pop("finite") == 1 and np.isfinite(list(metrics.values())).all()
    assert metrics["loss"] > 0.1 and metrics["grad_norm"] > 0.01
    assert metrics.keys() >= set(config.loss_weights)
    assert ("load_max" in metrics) == (config.model.router.name != "dense")
    assert int(state.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_dsmoe_l_as_it_is_takes_its_first_step_soon(tmp_path):
    """Compilation included; takes 23 GB of memory."""
    args = ["--config", "configs/dsmoe_l.py", "--workdir", tmp_path / "run"]
    changes = ("data.source=synthetic", "data.batch_size=2", "train.log_every=1")
    args += [f"--config.{change}" for change in (*changes, "compile_cache=off")]
    start = time.perf_counter()
    with cli.started("train", *args, optimize=True) as process:
        output = cli.read_until(process, "step 1/")
        seconds = time.perf_counter() - start
    assert "total                1,166.944 M   456.796 M" in output
    assert "step 1/700000: loss 1." in output
    assert seconds < 90, f"{seconds:.0f} s from the command to the first step"
