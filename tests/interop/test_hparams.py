from __future__ import annotations

import pytest

from moe_diffusion import interop
from moe_diffusion.errors import UserError

DSMOE = {
    "hidden_size": 64,
    "num_heads": 8,
    "MoE_config": {"num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3},
}
CHOICE = {"hidden_size": 64, "mlp_ratio": 2, "MoE_config": {"num_experts": 8, "capacity": 2}}


def build(family, base, moe=None, **changes):
    hparams = {**base, **changes}
    if moe:
        hparams["MoE_config"] = {**base["MoE_config"], **moe}
    return interop.model_config_from_torch(family, hparams)


def test_defaults_are_the_authors():
    model = interop.model_config_from_torch("dit", {})
    assert (model.hidden_size, model.depth, model.num_heads) == (1152, 28, 16)  # DiT-XL
    assert (model.image_size, model.num_classes, model.learn_sigma) == (32, 1000, True)
    assert model.router.name == "dense" and model.mlp == "gelu" and model.mlp_bias


def test_dsmoe():
    model = build("dsmoe", DSMOE, {"routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2})
    router, moe = model.router, model.moe
    assert (router.name, router.scores, router.top_k) == ("token_choice", "sigmoid", 3)
    assert router.normalize and router.selection_bias and router.scale == 2.5
    assert (router.n_group, router.topk_group, router.kernel_init) == (4, 2, "kaiming_normal")
    assert (moe.num_experts, moe.hidden_size, moe.mlp, moe.bias) == (8, 24, "swiglu", False)
    assert moe.residual_input and moe.shared_hidden_size == 0  # without use_shared_expert
    assert (model.mlp, model.positions, model.num_kv_heads) == ("silu", "sincos", 0)


def test_dsmoe_options():
    shared = build("dsmoe", DSMOE, {"use_shared_expert": True}, enable_gqa=True, rope_type="2d")
    assert shared.moe.shared_hidden_size == 24 and not shared.moe.residual_input
    assert shared.num_kv_heads == 4 and shared.positions == "rope2d"
    assert not build("dsmoe", DSMOE, {"num_experts_per_tok": 1}).router.normalize
    for skip, first in ((False, 0), (True, 2), (0, 0), (1, 1), (5, 5)):
        assert build("dsmoe", DSMOE, {"skip_first2": skip}).moe.skip_first == first


def test_dsmoe_keys_without_effect():
    """Of the authors' older yaml files; their code does not read them."""
    older = {"use_type": "all", "group_bins": 8, "local_top_p": 4}
    assert build("dsmoe", DSMOE, older, use_kda=False) == build("dsmoe", DSMOE)


def test_token_choice():
    model = build("tcdit", CHOICE, {"n_shared_experts": 2})
    router, moe = model.router, model.moe
    assert (router.name, router.scores, router.top_k) == ("token_choice", "softmax", 2)
    assert not router.normalize and not router.selection_bias
    assert (moe.hidden_size, moe.mlp, moe.bias) == (128, "gelu", True)
    assert (moe.shared_hidden_size, moe.shared_mlp, moe.shared_bias) == (128, "swiglu", False)
    assert build("tcdit", CHOICE, {"n_shared_experts": None}).moe.shared_hidden_size == 0


def test_expert_choice():
    model = build("ecdit", CHOICE, use_swiglu=True)
    assert (model.router.name, model.router.group) == ("expert_choice", "sample")
    assert model.router.capacity == 2.0 and model.router.kernel_init == "normal_0.006"
    assert (model.mlp, model.mlp_bias, model.moe.mlp, model.moe.bias) == ("swiglu", False) * 2


def test_diffmoe():
    model = build("diffmoe", CHOICE, {"n_shared_experts": 1}, use_swiglu=True)
    moe = model.moe
    assert (model.router.name, model.router.group) == ("diffmoe", "batch")
    assert model.router.max_capacity == 0  # forward_eval takes every token above the threshold
    # The shared expert is a GELU MLP of width 8 * hidden, whatever the others are.
    assert (moe.shared_hidden_size, moe.shared_mlp, moe.shared_bias) == (512, "gelu", True)


def test_a_gated_dit():
    """models_DiT.py of DiffMoE and DSMoE has an option that DiT's own code has not."""
    model = build("dit", {"use_swiglu": True})
    assert (model.mlp, model.mlp_bias, model.router.name) == ("swiglu", False, "dense")


def test_flow_or_ddpm():
    for family, hparams, path, sampler in (
        ("dit", {}, "ddpm", "ddpm"),
        ("dit", {"rf": True}, "flow", "heun"),
        ("dit", {"learn_sigma": False}, "flow", "heun"),
        ("sit", {}, "flow", "heun"),
        ("diffmoe", CHOICE, "flow", "heun"),
        ("diffmoe", {**CHOICE, "rf": False}, "ddpm", "ddpm"),
    ):
        config = interop.config_from_torch(family, hparams)
        assert (config.diffusion.path, config.sampling.sampler) == (path, sampler), family


DIT_MOE = {"hidden_size": 64, "num_heads": 4}
PROMOE = {
    "num_routed_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "interleave": True,
}


@pytest.mark.parametrize(
    "family, hparams, channels, joint",
    [
        # p_sample_loop with forward_with_cfg: one pass, three channels.
        ("dit", {}, 3, True),
        ("dsmoe", {**DSMOE, "rf": False}, 3, True),
        ("ecdit", {**CHOICE, "rf": False}, 3, True),
        ("diffmoe", {**CHOICE, "rf": False}, 3, True),
        ("dit_moe", {**DIT_MOE, "rf": False}, 3, True),
        ("sit", {}, 3, True),  # sample_ddp.py passes the same function to its ODE and SDE
        # RectifiedFlow.sample, sample.py of ProMoE, Denoiser of JiT: two passes, all channels.
        ("dit", {"rf": True}, 0, False),
        ("dsmoe", DSMOE, 0, False),
        ("tcdit", CHOICE, 0, False),
        ("diffmoe", CHOICE, 0, False),
        ("dit_moe", DIT_MOE, 0, False),
        ("promoe_tc", {"MoE_config": PROMOE}, 0, False),
        ("jit", {"model": "JiT-B/16"}, 0, False),
    ],
)
def test_guidance_is_that_of_the_authors_sampler(family, hparams, channels, joint):
    sampling = interop.config_from_torch(family, hparams).sampling
    assert (sampling.cfg_channels, sampling.joint) == (channels, joint)


@pytest.mark.parametrize(
    "family, base, moe, changes, message",
    [
        ("jittery", DSMOE, {}, {}, "unknown family 'jittery'; choose one of dit, sit, dsmoe"),
        ("dit", {}, {}, {"hiden_size": 8}, "'hiden_size' in model; the nearest is 'hidden_size'"),
        ("dsmoe", DSMOE, {"n_groups": 8}, {}, "'n_groups' in MoE_config; the nearest is 'n_group'"),
        ("dsmoe", DSMOE, {}, {"MoE_config": {"num_experts": 8}}, "lacks.*num_experts_per_tok"),
        ("dsmoe", DSMOE, {}, {"use_sinks": True}, "use_sinks"),
        ("dsmoe", DSMOE, {}, {"use_kda": True, "kda_kwargs": {"mode": "chunk"}}, "use_kda .Kimi"),
        ("dsmoe", DSMOE, {}, {"rope_type": "3d"}, "rope_type is '3d'"),
        ("dsmoe", DSMOE, {"hidden_size": 32}, {}, "MoE_config.hidden_size is 32"),
        ("tcdit", CHOICE, {}, {"head_dim": 5}, "head_dim 5"),
        ("dit", {}, {}, {"depth": "12"}, "model.depth is '12', not an integer"),
        ("dit", {}, {}, {"depth": None}, "model.depth is None, not an integer: correct"),
        ("dit", {}, {}, {"depth": True}, "model.depth is True, not an integer"),
        ("dit", {}, {}, {"depth": 10**9}, "model.depth = 1000000000 is beyond 4,096: lower it"),
        ("dit", {}, {}, {"hidden_size": [1] * 99}, "hidden_size is .1, 1, .*, not an integer"),
        ("dit", {}, {}, {"mlp_ratio": float("nan")}, "model.mlp_ratio is nan, not a number"),
        ("dit", {}, {}, {"mlp_ratio": 10**400}, "model.mlp_ratio is .*, not a number"),
        ("ecdit", CHOICE, {}, {"mlp_ratio": 1e308}, "of ecdit are impossible .*infinity"),
        ("dit", {}, {}, {"num_heads": 0}, "of dit are impossible .*zero"),
        ("dit", {}, {}, {"input_size": 10_000}, "make 25,000,000 tokens of model.hidden_size"),
        ("dsmoe", DSMOE, {"num_experts": 16384}, {}, "make more than 262,144 experts"),
        ("dsmoe", DSMOE, {"n_group": "2"}, {}, "MoE_config.n_group is '2', not an integer"),
        ("dsmoe", DSMOE, {"skip_first2": "no"}, {}, "skip_first2 is 'no', not true or false or an"),
        ("dsmoe", DSMOE, {}, {"MoE_config": [1]}, "MoE_config is .1., not a table or null"),
        ("dit", {}, {}, {"x" * 90_000: 1}, "unknown hyperparameter 'x{1,90}...x+'"),
        ("dit", {}, {}, {"num_heads": 5}, "model.num_heads = 5 does not divide"),
        ("dsmoe", DSMOE, {}, {"norm_type": "batchnorm"}, "model.norm = 'batchnorm' is unknown"),
    ],
)
def test_errors(family, base, moe, changes, message):
    with pytest.raises(UserError, match=message):
        build(family, base, moe, **changes)
