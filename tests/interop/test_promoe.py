"""Hyperparameters and names of ProMoE and DiT-MoE, as their authors have them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import interop, models
from moe_diffusion.errors import UserError
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models.blocks import Norm

# 004_ProMoE_XL.yaml, without the keys of its training script.
MOE = {
    "num_routed_experts": 12,
    "moe_intermediate_size": 2304,
    "shared_expert_intermediate_size": 2304,
    "load_balance_loss_coef": 0,
    "norm_topk_prob": False,
    "seq_aux": False,
    "use_shared_expert": True,
    "interleave": True,
    "init_MoeMLP": False,
    "top_k": 1,
    "router_weight_mode": "identity",
    "routing_contrastive_lam": 1,
    "use_top_k_for_routing_contrastive": True,
    "routing_contrastive_temperature": 0.07,
}
YAML = {"model_name": "ProMoE_TC_XL", "DiT_XL_config": {"qk_norm": False, "MoE_config": MOE}}
ARGS = {"data_path": "/data", "model": "DiT-S/2", "image_size": 256, "num_experts": 16, "rf": False}


def same_network(ours, theirs):
    """Everything of a network but the precision to compute in."""
    ours, theirs = ours.model.to_dict(), theirs.model.to_dict()
    return {**ours, "dtype": ""} == {**theirs, "dtype": ""}


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_the_authors_yaml_is_our_config(routing):
    family = {"token_choice": "promoe_tc", "expert_choice": "promoe_ec"}[routing]
    hparams = YAML | {"model_name": YAML["model_name"].replace("TC", family[-2:].upper())}
    theirs = interop.config_from_torch(family, hparams)
    ours = configs.load(f"configs/promoe_xl.py:routing={routing}")
    assert same_network(ours, theirs)
    assert ours.loss_weights == theirs.loss_weights
    assert ours.diffusion == theirs.diffusion and ours.sampling == theirs.sampling


@pytest.mark.parametrize(
    ("config", "args", "more"),
    [
        ("configs/dit_moe_s.py:experts=16", ARGS, {}),
        ("configs/dit_moe_xl.py:qk_norm=false", {"model": "DiT-XL/2", "rf": True}, {}),
        (
            "configs/dit_moe_g.py",
            {"model": "DiT-G/2", "num_experts": 16},
            {"use_flash_attn": True},  # of their shapes
        ),
    ],
)
def test_the_authors_arguments_are_our_config(config, args, more):
    hparams = FAMILIES["dit_moe"].from_args({"model": "DiT-S/2", "num_experts": 8, **args}) | more
    ours, theirs = configs.load(config), interop.config_from_torch("dit_moe", hparams)
    assert same_network(ours, theirs)
    assert ours.loss_weights == theirs.loss_weights and ours.loss_weights.balance == 0.01
    assert ours.diffusion == theirs.diffusion and ours.sampling == theirs.sampling


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("promoe_tc", {"qk_norm": True}, "qk_norm"),
        ("promoe_ec", {"head_dim": 7}, "head_dim 7"),
        ("promoe_tc", {"MoE_config": MOE | {"load_balance_loss_coef": 0.01}}, "load_balance"),
        (
            "promoe_tc",
            {"MoE_config": MOE | {"top_k": 2, "use_top_k_for_routing_contrastive": False}},
            "use_top_k_for_routing_contrastive",
        ),
        ("promoe_tc", {"MoE_config": MOE | {"topk": 2}}, "'topk'.* nearest is 'top_k'"),
        ("promoe_ec", {"MoE_config": MOE | {"top_k": 13}}, "model.router.capacity = 13"),
        ("promoe_tc", {"MoE_config": MOE | {"router_weight_mode": "x"}}, "router.scores = 'x'"),
    ],
)
def test_what_promoe_cannot_be(family, changes, message):
    with pytest.raises(UserError, match=message):
        interop.config_from_torch(family, {"MoE_config": MOE} | changes)


def test_a_yaml_of_the_other_routing_is_an_error():
    with pytest.raises(UserError, match="model_name is ProMoE_TC_XL: choose the family"):
        interop.config_from_torch("promoe_ec", YAML)


@pytest.mark.parametrize(
    "args", [{"model": "DiT-Q/2", "num_experts": 8}, {"model": "DiT-S/2"}, {"num_experts": 8}]
)
def test_other_arguments_tell_nothing_of_a_dit_moe(args):
    assert FAMILIES["dit_moe"].from_args(args) is None


@pytest.mark.parametrize("family", ["promoe_tc", "promoe_ec", "dit_moe"])
def test_shapes_tell_the_experts(family):
    moe = MOE | {"num_routed_experts": 3, "moe_intermediate_size": 6}
    moe |= {"shared_expert_intermediate_size": 5}
    hparams = {"hidden_size": 16, "depth": 2, "num_heads": 2, "input_size": 4, "mlp_ratio": 2}
    more = (
        {"num_experts": 3, "use_flash_attn": True} if family == "dit_moe" else {"MoE_config": moe}
    )
    model = models.build(interop.model_config_from_torch(family, hparams | more))
    params = _zeros(models.abstract_variables(model)["params"])
    state = interop.export_state_dict({"params": params}, model, family)
    told = FAMILIES[family].from_shapes({key: value.shape for key, value in state.items()})
    widths = told.pop("MoE_config", {})
    assert widths == {key: moe[key] for key in widths} and len(widths) == 3 * (family != "dit_moe")
    expected = hparams | {"learn_sigma": True, "num_classes": 1000, "in_channels": 4}
    expected |= {"patch_size": 2} | (more if family == "dit_moe" else {"use_swiglu": False})
    del expected["num_heads"]  # no shape tells it
    assert told == expected


def test_names_of_dit_moe_with_flash_attention():
    hparams = {"hidden_size": 16, "depth": 1, "num_heads": 2, "input_size": 4}
    names = {}
    for flash in (False, True):
        config = interop.model_config_from_torch("dit_moe", hparams | {"use_flash_attn": flash})
        model = models.build(config)
        variables = models.abstract_variables(model)
        state = interop.export_state_dict(
            {"params": _zeros(variables["params"])}, model, interop.family_of(model)
        )
        names[flash] = {k.removeprefix("blocks.0.attn."): v.shape for k, v in state.items()}
    assert names[False].keys() - names[True].keys() == {
        *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"),
    }
    only = names[True].keys() - names[False].keys()
    assert {name: names[True][name] for name in only} == {
        **{"Wqkv.weight": (48, 16), "Wqkv.bias": (48,)},
        **{"out_proj.weight": (16, 16), "out_proj.bias": (16,)},
        **{f"{q}_norm.{leaf}": (8,) for q in "qk" for leaf in ("weight", "bias")},
    }


def test_layernorm_with_scale_and_bias():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 8)).astype(np.float32)
    scale, bias = np.arange(8) + 1.0, np.arange(8) - 3.0
    got = Norm("layernorm_affine").apply(
        {"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, x
    )
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def _zeros(tree):
    return {k: _zeros(v) if isinstance(v, dict) else np.zeros(v.shape) for k, v in tree.items()}
