"""Every config file lowers a training step as it is and takes one when made narrow and shallow."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.data.sources import open_source
from moe_diffusion.planning.compile import lower_train
from moe_diffusion.training.run import prepare_run
from tests import cli
from tests.test_config_files import every_stem

# Each line is one program when small: its specs differ in size alone.
QUICK = [
    ["digits.py:router=token_choice"],
    ["dsmoe_l.py:experts=48"],
    [f"promoe_{size}.py" for size in ("l", "s", "b", "xl")],
    ["dit_moe_xl.py"],
    [f"jitmoe_{size}16.py" for size in "bl"],
    [f"dit_{size}.py:objective=ddpm" for size in ("l", "s", "b", "xl", "xxl", "xxxl")],
    [f"diffmoe_{size}.py:experts={e}" for size in "lsb" for e in (8, 16)]
    + ["diffmoe_xl.py", "diffmoe_l.py:experts=2"],
    [f"ecdit_{size}.py" for size in "lsb"],
    ["flux_dev.py", "hyper_flux.py", "flux_lite.py", "flux_mini.py"],
]
# Their blocks, routers and objectives are those of the above in other combinations.
OTHER = [
    *([f"digits.py:router={name}"] for name in ("expert_choice", "diffmoe", "expert_race")),
    *([f"digits.py:router={name}"] for name in ("deepseek", "dense")),
    *([f"dsmoe_{size}.py:experts={e}" for size in "sb"] for e in (16, 48)),
    ["dsmoe_l.py:experts=16", "dsmoe_3b.py"],
    *(
        [f"dsmoe_s.py:ablation={name}"]
        for name in ("s0a3", "gqa", "no_interleave", "ape", "rope1d")
    ),
    ["promoe_l.py:routing=expert_choice"],
    [f"dit_moe_{size}.py" for size in "sb"],
    ["dit_moe_g.py"],
    [f"jit_{size}{patch}.py" for size in "blhg" for patch in (16, 32)],
    ["jitmoe_h16.py"],
    [f"dit_{size}.py:objective=flow" for size in ("s", "b", "l", "xl", "xxl", "xxxl")]
    + [f"sit_{size}.py" for size in ("s", "b", "l", "xl")],
    ["diffmoe_l.py:objective=ddpm"],
    [f"tcdit_{size}.py" for size in "sbl"],
    ["tcdit_l.py:objective=ddpm"],
    [f"ecdit_{size}.py:predictor=true" for size in "sbl"],
    ["flux_schnell.py"],
    ["flux_moe_l.py", "hyper_flux_moe_l.py"],
    ["flux_moe_s.py", "flux_moe_m.py", "flux_moe_xs.py", "hyper_flux_moe_xs.py"],
    ["flux_moe_ablation.py:variant=pruned2"],
    ["flux_moe_ablation.py:variant=groups1x12"],
    ["flux_tiny.py"],
    ["digits_flux.py"],
    ["dit_t2i.py"],
    ["diffmoe_t2i.py"],
    *([f"digits_t2i.py:router={name}"] for name in ("diffmoe", "dense", "token_choice")),
    ["digits_t2i.py:router=expert_choice"],
    ["dit_xl_moe.py"],
    ["dit_xl_moe.py:objective=flow", "sit_xl_moe.py"],
    ["digits_moe.py"],
    ["digits_flux_moe.py:level=s"],
    ["digits_flux_pruned.py"],
    ["digits_flux_pruned.py:how=depth"],
    ["digits_moe.py:groups=0-1,adaln_rank=4"],
]
FIRST = [specs[0] for specs in QUICK]
# HyperFLUX-MoE is FLUX.1-MoE with another teacher: its steps are lowered once.
OTHER_SPECS = [
    s for specs in QUICK + OTHER for s in specs if s not in FIRST and "hyper_flux_moe" not in s
]
BATCH = 2


def exhaustive(values):
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


def small(spec: str) -> configs.ConfigDict:
    """Only sizes change: experts, groups, router, losses, positions and schedule stay."""
    sizes = {
        "model.image_size": 8,
        "model.patch_size": 4,
        "model.depth": 2,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.moe.hidden_size": 8,
        "model.jit.bottleneck": 4,
        "model.jit.in_context_tokens": 2,
        "model.jit.in_context_start": 1,
        "model.jit.dropout": 0,  # its blocks, the middle half, are none of two
        "model.flux.single_depth": 2,
        "model.flux.rope_axes": (2, 4, 2),
        "model.flux.text_tokens": 3,
        "model.flux.text_width": 4,
        "model.flux.pooled_width": 4,
        "model.dit_t2i.text_tokens": 3,
        "model.dit_t2i.text_width": 4,
        "model.dit_t2i.text_dtype": "float32",
        "data.batch_size": BATCH,
        "data.source": "synthetic",
        # No part of a step on one device, and different from size to size:
        "name": "small",
        "parallel.preset": "dp",
        "checkpoint.keep_every": 0,
        "diffusion.noise_scale": 1.0,
    }
    model = configs.load(f"configs/{spec}").model
    if model.moe.shared_hidden_size:
        sizes["model.moe.shared_hidden_size"] = 8
    if model.router.name in ("expert_choice", "diffmoe"):
        sizes["model.moe.num_experts"] = 4  # as many as an image has tokens
    if model.dit_t2i.pooled_width:
        sizes["model.dit_t2i.pooled_width"] = 4
    if model.num_kv_heads:
        sizes["model.num_kv_heads"] = 1
    if model.architecture == "flux":
        sizes["model.patch_size"] = model.patch_size  # it has no other
    if tuple(model.mob.groups) != ("none",):  # a group has blocks of one kind
        groups = ("0-1", "2-3") if model.architecture == "flux" else ("0-1",)
        sizes |= {"model.mob.groups": groups, "model.moe.skip_first": 0}
        sizes["model.mob.active"] = min(2, model.mob.active)
    elif model.architecture == "flux":
        sizes["model.moe.skip_first"] = min(2, model.moe.skip_first)
    if model.adaln_rank:
        sizes["model.adaln_rank"] = 4
    config = configs.load(f"configs/{spec}", [f"{key}={value}" for key, value in sizes.items()])
    for section in ("sampling", "distill"):  # no part of a step either
        config[section].update(configs.load("digits")[section])
    return config


def test_every_config_file_is_listed_above():
    assert {spec.split(".")[0] for specs in QUICK + OTHER for spec in specs} == every_stem()


@pytest.mark.parametrize("specs", QUICK + exhaustive(OTHER), ids=lambda specs: specs[0])
def test_takes_a_step(specs):
    """On one device."""
    config = small(specs[0])
    assert all(small(spec) == config for spec in specs[1:])
    run = prepare_run(config, devices=jax.devices()[:1])
    source = open_source(config.data, run.model.input_shape, run.model.cond_spec())
    batch = source.take(np.arange(BATCH))
    with run.on_mesh():
        state, _ = run.create(config.seed)
        state, metrics = run.step()(state, batch, jax.random.key(config.seed))
    metrics = dict(jax.device_get(metrics))
    assert metrics.pop("finite") == 1
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert metrics["loss"] > 0.1 and metrics["grad_norm"] > 0.01
    assert metrics.keys() >= set(config.loss_weights)
    assert ("load_max" in metrics) == bool(run.model.routers() and config.model.moe.num_experts)
    assert int(state.step) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("spec", FIRST + exhaustive(OTHER_SPECS))
def test_lowers_a_step_as_it_is(spec):
    """At full size, without its memory: shapes in are shapes out."""
    config = configs.load(f"configs/{spec}", [f"data.batch_size={BATCH}"])
    lowered = lower_train(config, jax.devices()[:1])
    before, (after, metrics) = lowered.args_info[0][0], lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert metrics["loss"].shape == () and metrics.keys() >= set(config.loss_weights)


@pytest.mark.alone
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
