"""The files in configs/: all of them load, and DSMoE's have the published numbers."""

from __future__ import annotations

import pytest

from moe_diffusion import config as configs

DIGITS = [
    f"configs/digits.py:router={router},size={size}"
    for router in ("token_choice", "expert_choice", "diffmoe", "expert_race", "deepseek", "dense")
    for size in ("tiny", "small")
]
DSMOE = [f"configs/dsmoe_{size}.py:experts={experts}" for size in "sbl" for experts in (16, 48)]
DSMOE += ["configs/dsmoe_3b.py"]
JIT = [f"configs/jit_{size}{patch}.py" for size in "blhg" for patch in (16, 32)]
JIT += [f"configs/jitmoe_{size}16.py" for size in "blh"]
ABLATIONS = [
    f"configs/dsmoe_{size}.py:{change}"
    for size in "sb"
    for change in ("positions=sincos", "positions=rope1d", "shared=false", "interleave=false")
]
ABLATIONS += ["configs/dsmoe_s.py:gqa=true", "configs/dsmoe_l.py:experts=16,gqa,shared=false"]
DENSE = [
    f"configs/dit_{size}.py:objective={objective}"
    for size in ("s", "b", "l", "xl", "xxl", "xxxl")
    for objective in ("ddpm", "flow")
]
DENSE += [f"configs/sit_{size}.py" for size in ("s", "b", "l", "xl")]
CHOICE = [
    f"configs/{router}_{size}.py:experts={experts},objective={objective}"
    for router, sizes in (("diffmoe", "s b l xl"), ("tcdit", "s b l"), ("ecdit", "s b l"))
    for size in sizes.split()
    for experts in (2, 4, 8, 16)
    for objective in ("flow", "ddpm")
]
PROMOE = [
    f"configs/promoe_{size}.py:routing={routing},objective={objective}"
    for size in ("s", "b", "l", "xl")
    for routing in ("token_choice", "expert_choice")
    for objective in ("flow", "ddpm")
]
DIT_MOE = [
    f"configs/dit_moe_{size}.py:experts={experts},objective={objective}"
    for size in ("s", "b", "xl", "g")
    for experts in (8, 16)
    for objective in ("flow", "ddpm")
]
SPECS = DIGITS + DSMOE + JIT + ABLATIONS + DENSE + CHOICE + PROMOE + DIT_MOE


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_file_loads(spec):
    config = configs.load(spec)
    configs.validate(config)
    assert config.is_locked
    configs.validate_devices(config, 8)


def every_stem() -> set[str]:
    """Names of the config files."""
    stems = {path.stem for path in (configs.ROOT / "configs").glob("*.py")}
    stems -= {stem for stem in stems if stem.startswith("eval_")}  # protocols, no configs
    return stems - {"__init__", "families"}


def test_every_config_file_is_listed_above():
    assert {spec.split("/")[1].split(".")[0] for spec in SPECS} == every_stem()


def test_config_names_are_distinct():
    names = [configs.load(spec).name for spec in SPECS]
    assert len(set(names)) == len(names)


def test_dsmoe_training_settings():
    config = configs.load("configs/dsmoe_l.py:experts=48")
    assert config.name == "dsmoe_l_e48"
    assert (config.optim.learning_rate, config.optim.b1, config.optim.b2) == (1e-4, 0.9, 0.999)
    assert (config.optim.schedule, config.optim.weight_decay) == ("constant", 0.0)
    assert (config.ema.decays, config.ema.warmup) == ((0.9999,), False)
    assert (config.data.batch_size, config.train.num_steps) == (512, 700_000)
    assert config.model.router.bias_update_rate == 0.0 and config.model.router.selection_bias
    assert not config.loss_weights


def test_jit_training_settings():
    """2511.13720, Table 9, and the commands of the authors."""
    config = configs.load("configs/jit_h32.py")
    model, sampling = config.model, config.sampling
    assert (model.depth, model.hidden_size, model.num_heads) == (32, 1280, 16)
    assert model.jit.to_dict() == dict(
        bottleneck=256, in_context_tokens=32, in_context_start=10, dropout=0.2
    )
    assert (model.image_size, model.patch_size) == (512, 32)
    diffusion = config.diffusion
    assert (diffusion.prediction, diffusion.noise_scale, diffusion.t_eps) == ("data", 2.0, 0.05)
    assert (diffusion.time_mean, diffusion.time_std, diffusion.cond_dropout) == (-0.8, 0.8, 0.1)
    assert (config.optim.learning_rate, config.optim.b1, config.optim.b2) == (2e-4, 0.9, 0.95)
    assert (config.optim.warmup_steps, config.train.num_steps) == (5 * 1251, 600 * 1251)
    assert (config.data.batch_size, config.data.augment) == (1024, "flip")
    assert (config.ema.decays, config.ema.router_state) == ((0.9999, 0.9996), "live")
    assert (sampling.steps, sampling.cfg, sampling.cfg_interval) == (50, 2.2, (0.1, 1.0))
    assert sampling.final_euler
    small = configs.load("configs/jitmoe_b16.py").model
    assert (small.depth, small.moe.num_experts, small.moe.hidden_size) == (10, 16, 1536)
    assert (small.router.top_k, small.router.n_group, small.router.scale) == (2, 2, 2.5)


def test_promoe_training_settings():
    """004_ProMoE_L.yaml and config.py of the authors."""
    config = configs.load("configs/promoe_l.py")
    assert (config.data.batch_size, config.optim.learning_rate) == (256, 1e-4)
    assert (config.optim.clip_norm, config.optim.weight_decay) == (0.5, 0.0)
    assert (config.ema.decays, config.train.num_steps) == ((0.9999,), 500_000)
    assert config.loss_weights.to_dict() == {"contrast": 1.0}
    model = config.model
    assert (model.moe.num_experts, model.moe.hidden_size, model.router.top_k) == (13, 2048, 1)
    assert (model.time_scale, model.dit.reverse_time) == (1000.0, True)
    diffusion = config.diffusion
    assert (diffusion.time_sampling, diffusion.time_mean, diffusion.time_std) == (
        *("logit_normal", 0.0, 1.0),
    )
    assert (config.sampling.sampler, config.sampling.steps) == ("euler", 250)


def test_published_objectives_of_dit_moe():
    path = {"s": "ddpm", "b": "ddpm", "xl": "flow", "g": "flow"}
    for size in path:
        config = configs.load(f"configs/dit_moe_{size}.py")
        assert config.diffusion.path == path[size]
        assert config.model.dit.reverse_time == config.model.qk_norm == (path[size] == "flow")
        assert config.loss_weights.to_dict() == {"balance": 0.01}


def test_ablations_of_dsmoe():
    plain = configs.load("configs/dsmoe_b.py").model
    assert not plain.moe.residual_input and plain.moe.interleave and plain.num_kv_heads == 0
    changes = "gqa=true,interleave=false,positions=sincos,shared=false"
    changed = configs.load(f"configs/dsmoe_b.py:{changes}")
    assert changed.name == f"dsmoe_b_e16_{changes}".replace(",", "_")
    model = changed.model
    assert model.positions == "sincos" and model.num_kv_heads == 6
    assert model.moe.shared_hidden_size == 0 and model.moe.residual_input
    assert not model.moe.interleave


def test_objectives():
    ddpm, flow = (configs.load(f"configs/diffmoe_s.py:objective={o}") for o in ("ddpm", "flow"))
    assert (ddpm.diffusion.path, flow.diffusion.path) == ("ddpm", "flow")
    assert (ddpm.sampling.sampler, ddpm.sampling.cfg_channels) == ("ddpm", 3)
    assert ddpm.model == flow.model and ddpm.optim == flow.optim


def test_digits_defaults_to_the_tiny_token_choice():
    plain = configs.load("configs/digits.py")
    assert plain == configs.load("configs/digits.py:router=token_choice,size=tiny")
    assert plain.loss_weights.to_dict() == {"balance": 0.01}
