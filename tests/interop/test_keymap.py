from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_diffusion import interop, models
from moe_diffusion.errors import UserError
from moe_diffusion.interop import keymap
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.interop.tensors import Lazy, Spec

HPARAMS = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "depth": 3, "num_classes": 3}
PROMOE = {
    "num_routed_experts": 3,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 5,
    "interleave": True,
}
MOE = {
    "dsmoe": {"num_experts": 4, "moe_intermediate_size": 6, "num_experts_per_tok": 2},
    "tcdit": {"num_experts": 3, "capacity": 2},
    "ecdit": {"num_experts": 3, "capacity": 1},
    "diffmoe": {"num_experts": 3, "capacity": 1, "n_shared_experts": 1},
    "promoe_tc": PROMOE,
    "promoe_ec": PROMOE,
}
JIT = {
    **{key: value for key, value in HPARAMS.items() if key != "input_size"},
    **{"input_size": 8, "patch_size": 4, "bottleneck_dim": 4},
    **{"in_context_len": 2, "in_context_start": 1},
}
JIT_MOE = {
    **{"num_experts": 4, "moe_intermediate_size": 6, "n_group": 2, "topk_group": 2},
    **{"num_experts_per_tok": 2, "routed_scaling_factor": 2.5},
    **{"interleave": True, "use_shared_expert": True},
}


FLUX = {
    **{"in_channels": 16, "vec_in_dim": 5, "context_in_dim": 6, "hidden_size": 16, "num_heads": 2},
    **{"depth": 2, "depth_single_blocks": 1, "axes_dim": (2, 4, 2), "guidance_embed": True},
}


def build(family, **changes):
    hparams = {**HPARAMS, **changes}
    if family.startswith("flux"):  # one network, in two layouts
        return models.build(interop.model_config_from_torch("flux", FLUX))
    if family in ("jit", "jitmoe"):
        hparams = {"net": {**JIT, "moe_config": JIT_MOE if family == "jitmoe" else None}}
    if family in MOE:
        hparams["MoE_config"] = MOE[family] | hparams.get("MoE_config", {})
    return models.build(interop.model_config_from_torch(family, hparams))


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)
    return keymap.unflatten_dict(
        {
            path: rng.normal(size=leaf.shape).astype(leaf.dtype)
            for path, leaf in keymap.abstract_variables(model).items()
        },
        sep="/",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_keeps_every_bit(family):
    model = build(family)
    variables = random_variables(model)
    back = interop.import_state_dict(
        interop.export_state_dict(variables, model, family), model, family
    )
    variables.setdefault("router_state", {})
    jax.tree.map(np.testing.assert_array_equal, variables, back)


def test_family_of():
    for family in ("dit", "dit_moe", *MOE):
        assert interop.family_of(build(family)) == family


def test_layouts_by_hand():
    model = build("tcdit")
    variables = random_variables(model)
    state = interop.export_state_dict(variables, model)
    params = variables["params"]
    conv = params["patch_embed"]["kernel"].reshape(2, 2, 4, 16)  # row, column, channel, width
    np.testing.assert_array_equal(state["x_embedder.proj.weight"][5, 3, 0, 1], conv[0, 1, 3, 5])
    # Blocks are dense, MoE, dense: a scanned pair does not fit, block 2 is a segment of its own.
    (g, r), (h, s) = ((block.path, *block.index) for block in model.blocks()[1:])
    qkv = params[h.split("/")[0]][h.split("/")[1]]["attn"]["qkv"]["kernel"][s]  # [D, 3, heads, hd]
    np.testing.assert_array_equal(
        state["blocks.2.attn.qkv.weight"][16 + 8 + 5],
        qkv[:, 1, 1, 5],  # key, head 1, channel 5
    )
    moe = params[g.split("/")[0]][g.split("/")[1]]["moe"]
    np.testing.assert_array_equal(
        state["blocks.1.mlp.experts.2.fc1.weight"], moe["experts"]["up"][r, 2].T
    )
    np.testing.assert_array_equal(state["blocks.1.mlp.gate.weight"], moe["router"]["kernel"][r].T)


def test_one_error_lists_all_bad_keys():
    model = build("dsmoe")
    state = interop.export_state_dict(random_variables(model), model)
    del state["blocks.1.mlp.gate.weight"], state["final_layer.linear.bias"]
    state["blocks.9.extra"] = np.zeros(1)
    state["t_embedder.mlp.0.weight"] = np.zeros((16, 128))
    state["pos_embed"] = state["pos_embed"] + 0.1
    with pytest.raises(UserError) as caught:
        interop.import_state_dict(state, model, "dsmoe")
    for part in (
        "2 missing: blocks.1.mlp.gate.weight, final_layer.linear.bias",
        "1 unexpected: blocks.9.extra",
        "1 misshaped: t_embedder.mlp.0.weight (file (16, 128), model (16, 256))",
        "1 not the fixed value of this model: pos_embed",
    ):
        assert part in str(caught.value)


def test_an_error_lists_ten_keys_and_counts_the_rest():
    model = build("dit")
    with pytest.raises(UserError, match=r"missing: (\S+, ){10}\.\.\. \(\d+ more\)$"):
        interop.import_state_dict({}, model, "dit")


def test_wrong_family():
    dsmoe, dit = build("dsmoe"), build("dit")
    variables = random_variables(dsmoe)
    with pytest.raises(UserError, match="'tcdit' has no name for router_state/"):
        interop.export_state_dict(variables, dsmoe, "tcdit")
    with pytest.raises(UserError, match="unknown family 'vit'; choose one of dit, "):
        interop.export_state_dict(variables, dsmoe, "vit")
    with pytest.raises(UserError, match="missing: .*unexpected: "):
        interop.import_state_dict(interop.export_state_dict(variables, dsmoe), dit, "dit")


def test_incomplete_variables():
    model = build("diffmoe")
    with pytest.raises(UserError, match="lack blocks.1.mlp.expert_threshold"):
        interop.export_state_dict({"params": random_variables(model)["params"]}, model)


def test_wrappers_make_no_difference():
    model = build("jitmoe")
    variables = random_variables(model)
    state = interop.export_state_dict(variables, model, "jitmoe")
    assert all(key.startswith("net.") for key in state)
    for prefix in ("", "module.net.", "_orig_mod.module.net."):
        renamed = {key.replace("net.", prefix, 1): value for key, value in state.items()}
        back = interop.import_state_dict(renamed, model, "jitmoe")
        jax.tree.map(np.testing.assert_array_equal, variables, back)
    twice = {**state, "final_layer.linear.bias": state["net.final_layer.linear.bias"]}
    with pytest.raises(UserError, match="bias and final_layer.linear.bias are the same tensor"):
        interop.import_state_dict(twice, model, "jitmoe")


def test_nothing_is_read_before_all_fits():
    def read(key):
        raise AssertionError(f"{key} was read")

    model = build("dsmoe")
    state = interop.export_state_dict(random_variables(model), model)
    specs = {key: Spec(x.shape, x.dtype) for key, x in state.items() if key != "pos_embed"}
    specs["final_layer.linear.bias"] = Spec((5,), np.dtype(np.float32))
    lazy = Lazy(specs, read)
    with pytest.raises(UserError, match=r"1 missing: pos_embed; 1 misshaped: final_layer.*\(5,\)"):
        interop.import_state_dict(lazy, model, "dsmoe")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype):
    model = build("dit")
    state = interop.export_state_dict(random_variables(model), model)
    half = {key: value.astype(dtype) for key, value in state.items()}
    kernel = interop.import_state_dict(half, model, "dit")["params"]["final"]["linear"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, half["final_layer.linear.weight"].T)


def test_files_round_trip(tmp_path):
    hparams = {**HPARAMS, "MoE_config": MOE["diffmoe"]}
    model = build("diffmoe")
    variables = random_variables(model)
    interop.save_torch(model, variables, tmp_path / "w.safetensors")
    loaded_model, loaded = interop.load_torch(tmp_path / "w.safetensors", "diffmoe", hparams)
    assert loaded_model.blocks() == model.blocks()
    jax.tree.map(np.testing.assert_array_equal, variables, loaded)
