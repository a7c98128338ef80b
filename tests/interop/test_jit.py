"""Names and hyperparameters of JiT and JiTMoE."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_diffusion import interop
from moe_diffusion.errors import UserError
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models import abstract_variables, build

NET = {"input_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 2}
NET |= {"num_classes": 3, "bottleneck_dim": 5, "in_context_len": 2, "in_context_start": 1}
MOE = {"num_experts": 4, "moe_intermediate_size": 6, "n_group": 2, "topk_group": 1}
MOE |= {"num_experts_per_tok": 2, "routed_scaling_factor": 2.5, "interleave": True}
MOE |= {"use_shared_expert": True}
HPARAMS = {"jit": {"net": NET}, "jitmoe": {"net": NET | {"moe_config": MOE}}}


def random_variables(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_variables(model)
    )


def test_defaults_are_the_authors():
    config = interop.config_from_torch("jit", {"net": {}})
    model, sampling = config.model, config.sampling
    assert (model.hidden_size, model.depth, model.num_heads) == (1024, 24, 16)
    assert (model.jit.bottleneck, model.jit.in_context_tokens) == (128, 32)
    assert model.jit.in_context_start == 8
    assert (model.image_size, model.channels, model.patch_size) == (256, 3, 16)
    assert (model.router.name, model.jit.dropout) == ("dense", 0.0)
    assert (config.diffusion.prediction, config.diffusion.t_eps) == ("data", 0.05)
    assert (sampling.sampler, sampling.steps, sampling.final_euler) == ("heun", 50, True)


def test_jitmoe():
    model = interop.model_config_from_torch("jitmoe", HPARAMS["jitmoe"])
    router, moe = model.router, model.moe
    assert (router.scores, router.top_k, router.scale) == ("sigmoid", 2, 2.5)
    assert (
        router.selection_bias
        and router.normalize
        and (router.n_group, router.topk_group)
        == (
            2,
            1,
        )
    )
    assert (moe.num_experts, moe.hidden_size, moe.mlp, moe.bias) == (4, 6, "swiglu", True)
    assert (moe.shared_hidden_size, moe.shared_bias) == (6, True) and not moe.residual_input
    assert moe.dropout == 0
    for rate in (0.0, 0.3):
        net = {"net": NET | {"moe_config": MOE | {"proj_drop": rate}}}
        model = interop.model_config_from_torch("jitmoe", net)
        assert (model.moe.dropout, model.jit.dropout) == (rate, 0)
    alone = {"net": NET | {"moe_config": MOE | {"use_shared_expert": False}}}
    moe = interop.model_config_from_torch("jitmoe", alone).moe
    assert moe.shared_hidden_size == 0 and moe.residual_input


def test_arguments_of_the_training_script():
    """`args` of a checkpoint; what is not about the network or sampling makes no difference."""
    args = {"model": "JiT-H/32", "img_size": 512, "noise_scale": 2.0, "proj_dropout": 0.2}
    args |= {"cfg": 2.2, "interval_min": 0.1, "P_mean": -0.6, "label_drop_prob": 0.2}
    others = {"epochs": 600, "blr": 5e-5, "data_path": "/imagenet", "gpu": 3, "new_flag": None}
    config = interop.config_from_torch("jit", args | others)
    model, diffusion, sampling = config.model, config.diffusion, config.sampling
    assert (model.hidden_size, model.depth, model.patch_size) == (1280, 32, 32)
    assert (model.jit.bottleneck, model.jit.in_context_start) == (256, 10)
    assert model.image_size == 512
    assert (model.jit.dropout, diffusion.noise_scale, diffusion.cond_dropout) == (0.2, 2.0, 0.2)
    assert (diffusion.time_sampling, diffusion.time_mean) == ("logit_normal", -0.6)
    assert (sampling.cfg, sampling.cfg_interval) == (2.2, (0.1, 1.0))
    assert interop.config_from_torch("jit", FAMILIES["jit"].from_args(args | others)) == config
    assert FAMILIES["jit"].from_args({"model": "DiT-XL/2"}) is None
    assert FAMILIES["jit"].from_args({"lr": 0.1}) is None


@pytest.mark.parametrize(
    ("family", "hparams", "message"),
    [
        ("jit", {"model": "JiT-S/16"}, "unknown model 'JiT-S/16'; known are "),
        ("jitmoe", {"model": "JiT-B/32-E16"}, "unknown model"),
        ("jitmoe", {"model": "JiT-B/16"}, "of the family jit, not jitmoe"),
        ("jit", {"model": "JiT-B/16-E16"}, "of the family jitmoe, not jit"),
        ("jit", HPARAMS["jitmoe"], "of the family jitmoe, not jit"),
        ("jitmoe", {"net": {"moe_config": MOE | {"interleave": False}}}, "of the family jit, not"),
        ("jit", {"net": {"deph": 3}}, "unknown hyperparameter 'deph' in net; the nearest is 'dep"),
        ("jit", {"net": {}, "denoiser": {"p_mean": 0}}, "'p_mean' in denoiser; .* 'P_mean'"),
        ("jitmoe", {"net": {"moe_config": {"num_experts": 4}}}, "moe_config lacks .*n_group"),
        ("jit", {"net": {"attn_drop": 0.1}}, "attn_drop .* is not supported"),
        ("jit", {"net": {"depth": "24"}}, "net.depth is '24', not an integer"),
        ("jit", {"img_size": 256}, "unknown hyperparameter 'img_size'"),
        ("jit", {"net": NET | {"in_context_start": 3}}, "model.jit.in_context_start = 3 is"),
    ],
)
def test_bad_hyperparameters(family, hparams, message):
    with pytest.raises(UserError, match=message):
        interop.config_from_torch(family, hparams)


@pytest.mark.parametrize("family", HPARAMS)
def test_export_then_import_keeps_every_bit(family):
    model = build(interop.model_config_from_torch(family, HPARAMS[family]))
    variables = {"router_state": {}} | random_variables(model)
    assert interop.family_of(model) == family
    state = interop.export_state_dict(variables, model)
    assert all(key.startswith("net.") for key in state)
    back = interop.import_state_dict(state, model, family)
    jax.tree.map(np.testing.assert_array_equal, variables, back)


def test_layouts_by_hand():
    model = build(interop.model_config_from_torch("jitmoe", HPARAMS["jitmoe"]))
    variables = random_variables(model)
    params, state = variables["params"], interop.export_state_dict(variables, model)
    # Blocks are dense | MoE, dense: the class tokens come in at block 1.
    dense, experts = params["layers_0"]["block_0"]["mlp"], params["layers_1"]["block_0"]["moe"]
    w12 = state["net.blocks.0.mlp.w12.weight"]  # width int(int(16 * 4) * 2 / 3)
    assert w12.shape == (84, 16)
    np.testing.assert_array_equal(w12[:42], dense["gate"]["kernel"][0].T)  # goes through silu
    np.testing.assert_array_equal(w12[42:], dense["up"]["kernel"][0].T)
    bias = state["net.blocks.1.mlp.experts.blocks.3.w12.bias"]
    np.testing.assert_array_equal(bias[:6], experts["experts"]["gate_bias"][0, 3])
    np.testing.assert_array_equal(bias[6:], experts["experts"]["up_bias"][0, 3])
    expand = params["patch_embed"]["expand"]["kernel"]
    assert state["net.x_embedder.proj2.weight"].shape == (16, 5, 1, 1)
    np.testing.assert_array_equal(state["net.x_embedder.proj2.weight"][..., 0, 0], expand.T)
    assert state["net.in_context_posemb"].shape == (1, 2, 16)
    assert "net.x_embedder.proj1.bias" not in state


def test_a_packed_tensor_is_listed_once():
    model = build(interop.model_config_from_torch("jit", HPARAMS["jit"]))
    state = interop.export_state_dict(random_variables(model), model)
    state["net.blocks.0.mlp.w12.weight"] = np.zeros((80, 16))
    del state["net.blocks.1.mlp.w12.weight"]
    with pytest.raises(UserError) as caught:
        interop.import_state_dict(state, model, "jit")
    assert "1 missing: net.blocks.1.mlp.w12.weight" in str(caught.value)
    assert "1 misshaped: net.blocks.0.mlp.w12.weight (file (80, 16), model (84, 16))" in str(
        caught.value
    )
