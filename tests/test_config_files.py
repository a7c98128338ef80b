"""The files in configs/: all of them load, and DSMoE's have the published numbers."""

from __future__ import annotations

import re

import jax
import pytest

from moe_diffusion import config as configs
from moe_diffusion import shipped
from moe_diffusion.dense2moe import convert
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import parameter_counts

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
    f"{spec}{',' if ':' in spec else ':'}ablation={ablation}"
    for spec in DSMOE
    for ablation in ("gqa", "no_interleave", "ape", "rope1d", "s0a6" if "48" in spec else "s0a3")
]
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
PREDICTOR = [f"configs/ecdit_{size}.py:predictor=true" for size in "sbl"]
FLUX = [
    *(f"configs/flux_{name}.py" for name in ("dev", "schnell", "tiny")),
    "configs/hyper_flux.py",
    "configs/digits_flux.py",
    *(f"configs/{name}.py" for name in ("flux_lite", "flux_mini")),
]
FLUX += [f"configs/flux_moe_{size}.py" for size in ("l", "m", "s", "xs")]
FLUX += [f"configs/hyper_flux_moe_{size}.py" for size in ("l", "xs")]
FLUX += [
    f"configs/flux_moe_ablation.py:variant={variant}"
    for table in (
        ("pruned1.5", "pruned2", "moe1.5"),
        ("depth9_38", "depth9_26", "mob9_38", "mob9_26"),
        ("1s12e2a", "0.5s14e4a", "random_split", "joint"),
        ("groups4x3", "groups2x6", "groups1x12"),
    )
    for variant in table
]
DENSE2MOE = [
    *(f"configs/dit_xl_moe.py:objective={objective}" for objective in ("ddpm", "flow")),
    "configs/sit_xl_moe.py",
    "configs/sit_xl_moe.py:skip_first=3,adaln_rank=96,groups=4-6+7-9,active=2",
    *(f"configs/digits_moe.py:size={size}" for size in ("tiny", "small")),
    *(f"configs/digits_flux_moe.py:level={level}" for level in "lms"),
    *(
        f"configs/digits_flux_pruned.py:how={how},match={match}"
        for how in ("mlp", "depth")
        for match in "lm"
    ),
]
T2I = [
    *(
        f"configs/{name}.py:stage={stage}"
        for name in ("dit_t2i", "diffmoe_t2i")
        for stage in ("pretrain", "sft")
    ),
    *(
        f"configs/digits_t2i.py:router={router},seed=1"
        for router in ("dense", "token_choice", "expert_choice", "diffmoe")
    ),
]
SPECS = DIGITS + DSMOE + JIT + ABLATIONS + DENSE + CHOICE + PROMOE + DIT_MOE + PREDICTOR + FLUX
SPECS += DENSE2MOE + T2I


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_file_loads(spec):
    config = configs.load(spec)
    configs.validate(config)
    assert config.is_locked
    configs.validate_devices(config, jax.devices())


def every_stem() -> set[str]:
    """Names of the config files."""
    stems = {path.stem for path in shipped.FOLDER.glob("*.py")}
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


def test_ratios_of_dense2moe():
    """2510.09094, section 4.1, at width 1152: 1 + 12 * 0.25 of 4, of which 1 + 2 * 0.25 work.

    Of DiT-XL/2's 674.83M every block drops 10 of 12 experts of 288 hidden units, with two matrices
    and two biases each, and has 11 more output biases and a gate than an MLP of the same width:
    the output bias of the MLP is that of the shared expert.
    """
    model = configs.load("configs/dit_xl_moe.py").model
    moe, width = model.moe, model.hidden_size
    assert (width, moe.shared_hidden_size, moe.num_experts, moe.hidden_size) == (
        1152,
        1152,
        12,
        288,
    )
    assert moe.shared_hidden_size + 12 * moe.hidden_size == width * model.mlp_ratio
    router = model.router
    assert (router.top_k, router.scores, router.normalize) == (2, "softmax", True)
    assert router.balance_gates and model.moe.skip_first == 0 and not model.moe.interleave
    dense = parameter_counts(build(configs.load("configs/dit_xl.py").model))["total"].total
    total = parameter_counts(build(model))["total"]
    assert total.total - dense == 28 * (12 * 1152 + 12 * 1152)
    assert total.total - total.activated == 28 * 10 * (2 * 1152 * 288 + 288 + 1152)


def test_a_student_is_made_of_its_teacher():
    """The configs of DiT, SiT and digits differ in experts, adaLN and groups alone."""
    for student, teacher in (
        ("dit_xl_moe", "dit_xl"),
        ("dit_xl_moe:objective=flow", "dit_xl:objective=flow"),
        ("sit_xl_moe:skip_first=3,adaln_rank=96,groups=4-6+7-9,active=2", "sit_xl"),
        ("digits_moe:size=small,groups=3-5", "digits:router=dense,size=small"),
    ):
        config = configs.load(student)
        convert.check(config, configs.load(teacher))
        stages = [config.distill[name].steps for name in ("shared", "experts", "groups")]
        assert (stages[2] > 0) == ("groups" in student) and all(stages[:2])
        assert config.train.num_steps == sum(stages)


def test_published_objectives_of_dit_moe():
    path = {"s": "ddpm", "b": "ddpm", "xl": "flow", "g": "flow"}
    for size in path:
        config = configs.load(f"configs/dit_moe_{size}.py")
        assert config.diffusion.path == path[size]
        assert config.model.dit.reverse_time == config.model.qk_norm == (path[size] == "flow")
        assert config.loss_weights.to_dict() == {"balance": 0.01}


# 2512.01252, Table 5 and section 4.3: what differs from the published model.
DIFFERENCES = {
    "s0a3": [
        "model.moe.residual_input: False -> True",
        "model.moe.shared_hidden_size: 1536 -> 0",
        "model.router.top_k: 2 -> 3",
    ],
    "gqa": ["model.num_kv_heads: 0 -> 6"],
    "no_interleave": ["model.moe.interleave: True -> False"],
    "ape": ["model.positions: rope2d -> sincos"],
    "rope1d": ["model.positions: rope2d -> rope1d"],
}


@pytest.mark.parametrize("ablation", DIFFERENCES)
def test_ablations_of_dsmoe(ablation):
    plain, other = (
        configs.load(f"configs/dsmoe_b.py:ablation={name}") for name in ("none", ablation)
    )
    assert (plain.name, other.name) == ("dsmoe_b_e16", f"dsmoe_b_e16_{ablation}")
    assert configs.compare(plain, other) == [
        *DIFFERENCES[ablation],
        f"name: dsmoe_b_e16 -> dsmoe_b_e16_{ablation}",
    ]


@pytest.mark.parametrize(
    ("spec", "experts"),
    [("s.py", 3), ("s.py:experts=48", 6), ("b.py", 3), ("l.py:experts=48", 6), ("3b.py", 3)],
)
def test_without_a_shared_expert_as_many_parameters_are_activated(spec, experts):
    """S1A2 -> S0A3 and S1A5 -> S0A6: a routed expert, as large, takes the shared one's place.

    In total one expert a MoE layer is missing: 3 D H parameters, as SwiGLU has three matrices.
    """
    name = f"configs/dsmoe_{spec}"
    other = f"{name}{',' if ':' in name else ':'}ablation=s0a{experts}"
    model = configs.load(name).model
    before, after = (parameter_counts(build(configs.load(s).model))["total"] for s in (name, other))
    assert configs.load(other).model.router.top_k == experts
    assert after.activated == before.activated
    one = 3 * model.hidden_size * model.moe.hidden_size
    assert before.total - after.total == model.depth // 2 * one


def test_dsmoe_without_interleave_has_the_papers_parameters():
    """2512.01252, section 4.3: 158M in total, where the plain model has 92M; an M is 2^20 there.

    By hand: five dense MLPs, D = 384, of 8 D^2 + 5 D become MoE layers of 17 experts of 3 D H,
    H = 768, and a router of 16 D; 3 of the 17 are activated. So 33.3M activated become
    33.3M + 5 (3 * 884,736 + 6,144 - 1,181,568) / 2^20 = 40.4M. The paper says 44M, which the count
    that gives its 33M does not give.
    """
    plain, other = (
        parameter_counts(build(configs.load(f"configs/dsmoe_s.py:ablation={name}").model))["total"]
        for name in ("none", "no_interleave")
    )
    assert [round(n / 2**20) for n in (plain.activated, plain.total)] == [33, 92]
    assert [round(n / 2**20) for n in (other.activated, other.total)] == [40, 158]
    dense, expert, router = 8 * 384**2 + 5 * 384, 3 * 384 * 768, 16 * 384
    assert other.total - plain.total == 5 * (17 * expert + router - dense)
    assert other.activated - plain.activated == 5 * (3 * expert + router - dense)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("shared=false", "shared=false is no argument any more: say ablation=s0a3"),
        ("experts=48,gqa", "gqa is no argument any more: say ablation=gqa"),
        ("positions=sincos", "positions=sincos is no argument any more: say ablation=ape"),
        ("interleave=false", "interleave=false is no argument any more: say ablation=no_inter"),
        ("experts=48,ablation=s0a3", "with experts=48, ablation=s0a3 is s0a6"),
        ("ablation=s0a4", "ablation=s0a4 is not possible; choose none | s0a3"),
    ],
)
def test_arguments_that_dsmoe_does_not_have(arg, message):
    with pytest.raises(UserError, match=re.escape(f"configs/dsmoe_s.py:{arg}: {message}")):
        configs.load(f"configs/dsmoe_s.py:{arg}")


def test_every_model_of_images_is_trained_on_flipped_images():
    """DiffMoE B.1 and DSMoE appendix A: "the only data augmentation". DiT, SiT, ProMoE and DiT-MoE
    flip in their train.py. A mirrored digit is none, and a prompt may tell left from right.
    """
    for spec in SPECS:
        config = configs.load(spec)
        prompts = config.model.architecture in ("flux", "dit_t2i")
        wanted = "none" if "digits" in spec or prompts else "flip"
        assert config.data.augment == wanted, spec


@pytest.mark.parametrize("size", "sbl")
def test_ecdit_with_a_predictor(size):
    """2503.14487, Table 8: EC-DiT, whose inference follows a predictor trained in each image."""
    plain, other = (
        configs.load(f"configs/ecdit_{size}.py:predictor={text}") for text in ("false", "true")
    )
    assert other.name == f"ecdit_{size}_e16_predictor_flow"
    router = other.model.router
    assert (router.name, router.group, router.capacity) == ("diffmoe", "sample", 1.0)
    assert (router.max_capacity, router.threshold) == (0.0, "dynamic")
    assert other.loss_weights.to_dict() == {"capacity_predictor": 1.0}
    assert router.kernel_init == plain.model.router.kernel_init
    differing = configs.compare(plain, other)
    assert all(line.startswith(("model.router", "loss_weights", "name")) for line in differing)
    # Each MoE layer has a predictor: D x D, a bias, D x 16, a bias.
    width, layers = plain.model.hidden_size, plain.model.depth // 2
    before, after = (parameter_counts(build(c.model))["total"].total for c in (plain, other))
    assert after - before == layers * (width * width + width + 16 * width + 16)


def test_diffmoe_has_no_bound_at_inference():
    for spec in CHOICE:
        router = configs.load(spec).model.router
        assert router.name != "diffmoe" or (router.group, router.max_capacity) == ("shard", 0.0)


def test_objectives():
    ddpm, flow = (configs.load(f"configs/diffmoe_s.py:objective={o}") for o in ("ddpm", "flow"))
    assert (ddpm.diffusion.path, flow.diffusion.path) == ("ddpm", "flow")
    assert (ddpm.sampling.sampler, ddpm.sampling.cfg_channels) == ("ddpm", 3)
    assert ddpm.model == flow.model and ddpm.optim == flow.optim


def test_digits_defaults_to_the_tiny_token_choice():
    plain = configs.load("configs/digits.py")
    assert plain == configs.load("configs/digits.py:router=token_choice,size=tiny")
    assert plain.loss_weights.to_dict() == {"balance": 0.01}
