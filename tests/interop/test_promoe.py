"""Hyperparameters and names of ProMoE and DiT-MoE, as their authors have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import interop, models
from moe_diffusion.errors import UserError
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models.blocks import Attention, Norm, sincos_table

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
        ("promoe_tc", {"use_swiglu": True}, "use_swiglu of ProMoE, which renames"),
        (
            "promoe_tc",
            {"MoE_config": MOE | {"init_MoeMLP": True}},
            "init_MoeMLP .* to false",
        ),
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
    with pytest.raises(UserError, match="model_name is 'ProMoE_TC_XL': choose the family"):
        interop.config_from_torch("promoe_ec", YAML)


def test_a_yaml_of_a_baseline_is_an_error():
    baseline = {"model_name": "DiT_B", "DiT_config": {"depth": 12}}
    with pytest.raises(UserError, match="model_name is 'DiT_B': no ProMoE"):
        interop.config_from_torch("promoe_tc", baseline)


@pytest.mark.parametrize(
    "args", [{"model": "DiT-Q/2", "num_experts": 8}, {"model": "DiT-S/2"}, {"num_experts": 8}]
)
def test_other_arguments_tell_nothing_of_a_dit_moe(args):
    assert FAMILIES["dit_moe"].from_args(args) is None


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


def state_by_hand(qk_norm):
    """A state dict of ProMoE as its modules define it: 2 blocks, the second with experts."""
    width, heads, hidden, classes, patch = 8, 2, 16, 3, 2
    experts, expert_width = 3, 6

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = {"pos_embed": (1, 4, width), "y_embedder.embedding_table.weight": (classes + 1, width)}
    shapes |= {"x_embedder.proj.weight": (width, 4, patch, patch), "x_embedder.proj.bias": (width,)}
    shapes |= linear("t_embedder.mlp.0", 256, width) | linear("t_embedder.mlp.2", width, width)
    for block in ("blocks.0", "blocks.1"):
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width)
        if qk_norm:
            for norm in (f"{block}.attn.q_norm", f"{block}.attn.k_norm"):
                shapes |= {f"{norm}.weight": (width // heads,), f"{norm}.bias": (width // heads,)}
        shapes |= linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.adaLN_modulation.1", width, 6 * width)
    shapes |= linear("blocks.0.mlp.fc1", width, hidden) | linear("blocks.0.mlp.fc2", hidden, width)
    shapes["blocks.1.mlp.cluster_centers"] = (experts, width)
    names = [f"experts.{i}" for i in range(experts + 1)] + ["shared_expert"]
    for name in (f"blocks.1.mlp.{name}" for name in names):
        shapes |= linear(f"{name}.up_proj", width, expert_width)
        shapes |= linear(f"{name}.down_proj", expert_width, width)
    shapes |= linear("final_layer.linear", width, patch * patch * 8)
    shapes |= linear("final_layer.adaLN_modulation.1", width, 2 * width)
    rng = np.random.default_rng(0)
    state = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return state | {"pos_embed": sincos_table((2, 2), width)[None]}


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("family", ["promoe_tc", "promoe_ec"])
def test_q_and_k_norm(family, qk_norm):
    state = state_by_hand(qk_norm)
    told = FAMILIES[family].from_shapes({key: value.shape for key, value in state.items()})
    moe = {"top_k": 1, "router_weight_mode": "identity", **told.pop("MoE_config")}
    config = interop.config_from_torch(family, told | {"num_heads": 2, "MoE_config": moe})
    assert (config.model.qk_norm, config.model.num_heads) == (qk_norm, 2)
    model = models.build(config.model)
    variables = interop.import_state_dict(state, model, family)
    back = interop.export_state_dict(variables, model)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)

    # Small queries and keys, so that the 1e-5 of torch.nn.LayerNorm can be told from 1e-6.
    x = np.random.default_rng(1).normal(0, 1e-3, (2, 4, 8)).astype(np.float32)
    layer = jax.tree.map(lambda leaf: leaf[0], variables["params"]["layers_0"]["block_0"]["attn"])
    layer["qkv"]["bias"] = np.zeros_like(layer["qkv"]["bias"])
    norm = {"qk_norm": model.qk_norm, "qk_norm_kind": model.qk_norm_kind}
    attention = Attention(2, 2, positions="sincos", grid=(2, 2), dtype="float32", **norm,
                          qk_norm_eps=model.qk_norm_eps)  # fmt: skip
    got = attention.apply({"params": layer}, x)
    np.testing.assert_allclose(got, attention_by_hand(state, x, qk_norm), rtol=1e-4, atol=1e-6)


def attention_by_hand(state, x, qk_norm):
    """ProMoE's Attention of block 0 with two heads, in numpy; its qkv without bias."""
    own = {key.removeprefix("blocks.0.attn."): np.float64(value) for key, value in state.items()}
    qkv = (x @ own["qkv.weight"].T).reshape(2, 4, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    q, k, v = qkv
    if qk_norm:

        def norm(x, name):
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
            return x * own[f"{name}.weight"] + own[f"{name}.bias"]

        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    weights = np.exp(q @ k.swapaxes(-1, -2) / 2)
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.swapaxes(1, 2).reshape(2, 4, 8) @ own["proj.weight"].T + own["proj.bias"]


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
