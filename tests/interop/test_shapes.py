"""What is left to be said where a state dict comes without hyperparameters."""

from __future__ import annotations

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion import interop, models
from moe_diffusion.interop import describe
from moe_diffusion.interop.families import FAMILIES

DIT = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 4, "num_heads": 4}
DIT |= {"num_classes": 3, "mlp_ratio": 2.0}
DSMOE = {"num_experts": 4, "moe_intermediate_size": 6, "num_experts_per_tok": 3, "n_group": 2}
DSMOE |= {"topk_group": 2, "routed_scaling_factor": 2.5}
CHOICE = {"num_experts": 3, "capacity": 2}
PROMOE = {"num_routed_experts": 3, "moe_intermediate_size": 6, "top_k": 1, "interleave": True}
PROMOE |= {"shared_expert_intermediate_size": 5, "router_weight_mode": "identity"}
JIT = {**DIT, "bottleneck_dim": 5, "in_context_len": 3, "in_context_start": 1}
JITMOE = {**DSMOE, "interleave": True, "use_shared_expert": True}
ROUTED = [f"MoE_config.{k}" for k in ("num_experts_per_tok", "n_group", "topk_group")]
ROUTED.append("MoE_config.routed_scaling_factor")

# family, hyperparameters, and which of them shapes do not tell
CASES = {
    "dit": ("dit", DIT | {"learn_sigma": False, "in_channels": 3}, ["num_heads"]),
    "a usual dit": ("sit", DIT | {"hidden_size": 384, "num_heads": 6, "mlp_ratio": 0.1}, []),
    "gated": ("dit", DIT | {"use_swiglu": True}, ["num_heads"]),
    "dsmoe": (
        "dsmoe",
        DIT | {"MoE_config": DSMOE | {"use_shared_expert": True, "interleave": False}},
        ["num_heads", *ROUTED],
    ),
    "dsmoe with rope": (
        "dsmoe",
        DIT
        | {"rope_type": "2d", "norm_type": "rmsnorm", "enable_gqa": True}
        | {"MoE_config": DSMOE | {"interleave": False, "skip_first2": True}},
        ["rope_type", "input_size", "num_heads", *ROUTED],
    ),
    "tcdit": (
        "tcdit",
        DIT | {"MoE_config": CHOICE | {"n_shared_experts": 2}},
        ["num_heads", "MoE_config.capacity"],
    ),
    "ecdit": (
        "ecdit",
        DIT | {"use_swiglu": True, "MoE_config": CHOICE | {"interleave": False}},
        ["num_heads", "MoE_config.capacity"],
    ),
    "diffmoe": (
        "diffmoe",
        DIT | {"MoE_config": CHOICE | {"n_shared_experts": 1, "interleave": False}},
        ["num_heads", "MoE_config.capacity"],
    ),
    "dit_moe": (
        "dit_moe",
        DIT | {"num_experts": 3, "num_experts_per_tok": 2, "rf": False},
        ["num_heads", "num_experts_per_tok", "rf"],
    ),
    "dit_moe with q/k norm": (
        "dit_moe",
        DIT | {"num_experts": 3, "num_experts_per_tok": 1, "rf": True, "use_flash_attn": True},
        ["num_experts_per_tok", "rf"],
    ),
    "promoe_tc": (
        "promoe_tc",
        DIT | {"MoE_config": PROMOE},
        ["num_heads", "MoE_config.top_k", "MoE_config.router_weight_mode"],
    ),
    "promoe_ec": (
        "promoe_ec",
        DIT
        | {"qk_norm": True}
        | {"MoE_config": PROMOE | {"use_uncond_expert": False, "use_shared_expert": False}},
        ["MoE_config.top_k", "MoE_config.router_weight_mode"],
    ),
    "jit": (
        "jit",
        {"net": JIT, "denoiser": {"noise_scale": 2.0}},
        ["net.in_context_start", "denoiser.noise_scale"],
    ),
    "jit without class tokens": (
        "jit",
        {"net": JIT | {"in_context_len": 0, "in_context_start": 0, "mlp_ratio": 4.0}},
        ["denoiser.noise_scale"],
    ),
    "jitmoe": (
        "jitmoe",
        {"net": JIT | {"moe_config": JITMOE}},
        ["net.in_context_start", "net.moe_config.n_group", "net.moe_config.topk_group"]
        + ["net.moe_config.num_experts_per_tok", "net.moe_config.routed_scaling_factor"]
        + ["denoiser.noise_scale"],
    ),
}


def shapes_of(family, hparams):
    model = models.build(interop.model_config_from_torch(family, hparams))
    zeros = flatten_dict(models.abstract_variables(model), sep="/")
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in zeros.items()}
    state = interop.export_state_dict(unflatten_dict(zeros, sep="/"), model, family)
    return {key: tensor.shape for key, tensor in state.items()}


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_what_is_asked_for_are_the_model(case):
    family, hparams, asked = CASES[case]
    shapes = {f"module.{key}": shape for key, shape in shapes_of(family, hparams).items()}
    told = describe.from_shapes(FAMILIES[family], {k: np.empty(s) for k, s in shapes.items()})
    assert sorted(describe.untold(FAMILIES[family], told)) == sorted(asked)
    flat = flatten_dict(hparams, sep=".")
    given = unflatten_dict({name: flat.get(name, 1.0) for name in asked}, sep=".")
    described = describe.merge(told, given)
    assert {f"module.{key}": shape for key, shape in shapes_of(family, described).items()} == shapes
    got, expected = (interop.config_from_torch(family, h) for h in (described, hparams))
    # What the widths are is told; not the exact ratio that was rounded to them.
    got.model.mlp_ratio = expected.model.mlp_ratio
    assert got.model == expected.model and got.diffusion == expected.diffusion


def test_of_another_family_everything_is_asked_for():
    shapes = shapes_of("jit", CASES["jit"][1])
    told = FAMILIES["dsmoe"].from_shapes(shapes)
    assert "hidden_size" in describe.untold(FAMILIES["dsmoe"], told)
