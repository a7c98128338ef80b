"""The two layouts of FLUX.1 against each other, at full size by shapes, and through a folder."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_diffusion import config as configs
from moe_diffusion import interop
from moe_diffusion.errors import UserError
from moe_diffusion.interop import describe, keymap, tensors, transfer
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models import abstract_variables, build

# transformer/config.json of black-forest-labs/FLUX.1-dev and -schnell.
CONFIG_JSON = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
TINY = {"in_channels": 16, "vec_in_dim": 5, "context_in_dim": 6, "hidden_size": 8, "num_heads": 2}
TINY |= {"depth": 2, "depth_single_blocks": 1, "axes_dim": (2, 2, 0), "guidance_embed": True}
TINY |= {"hidden_size": 16, "axes_dim": (2, 4, 2)}
WIDTH = TINY["hidden_size"]


@pytest.fixture(scope="module")
def states():
    """One model, its variables, and the state dict in either layout."""
    model = build(interop.model_config_from_torch("flux", TINY))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32), abstract_variables(model)
    )
    return model, variables, *(interop.export_state_dict(variables, model, f) for f in LAYOUTS)


LAYOUTS = ("flux", "flux_diffusers")


def test_the_layouts_hold_the_same_numbers(states):
    """How diffusers' scripts/convert_flux_to_diffusers.py cuts and names the authors' tensors."""
    _, _, native, diffusers = states
    found = {}

    def thirds(key):
        return np.split(native[key], 3)

    for kind in ("weight", "bias"):
        for number in range(TINY["depth"]):
            ours, theirs = f"double_blocks.{number}", f"transformer_blocks.{number}"
            for stream, heads in (("img", "to_{}"), ("txt", "add_{}_proj")):
                parts = thirds(f"{ours}.{stream}_attn.qkv.{kind}")
                for part, letter in zip(parts, "qkv", strict=True):
                    found[f"{theirs}.attn.{heads.format(letter)}.{kind}"] = part
            for a, b in (
                *(("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear")),
                *(("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out")),
                *(("img_mlp.0", "ff.net.0.proj"), ("img_mlp.2", "ff.net.2")),
                *(("txt_mlp.0", "ff_context.net.0.proj"), ("txt_mlp.2", "ff_context.net.2")),
            ):
                found[f"{theirs}.{b}.{kind}"] = native[f"{ours}.{a}.{kind}"]
        ours, theirs = "single_blocks.0", "single_transformer_blocks.0"
        parts = np.split(native[f"{ours}.linear1.{kind}"], [WIDTH, 2 * WIDTH, 3 * WIDTH])
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        for part, name in zip(parts, names, strict=True):
            found[f"{theirs}.{name}.{kind}"] = part
        found[f"{theirs}.proj_out.{kind}"] = native[f"{ours}.linear2.{kind}"]
        found[f"{theirs}.norm.linear.{kind}"] = native[f"{ours}.modulation.lin.{kind}"]
        shift, scale = np.split(native[f"final_layer.adaLN_modulation.1.{kind}"], 2)
        found[f"norm_out.linear.{kind}"] = np.concatenate([scale, shift])
        for a, b in (
            *(("img_in", "x_embedder"), ("txt_in", "context_embedder")),
            ("final_layer.linear", "proj_out"),
        ):
            found[f"{b}.{kind}"] = native[f"{a}.{kind}"]
        for a, b in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
            for n, place in ((1, "in"), (2, "out")):
                key = f"time_text_embed.{b}_embedder.linear_{n}.{kind}"
                found[key] = native[f"{a}_in.{place}_layer.{kind}"]
    for number in range(TINY["depth"]):
        for stream, name in (("img", "norm_{}"), ("txt", "norm_added_{}")):
            for word in ("query", "key"):
                key = f"transformer_blocks.{number}.attn.{name.format(word[0])}.weight"
                norm = f"double_blocks.{number}.{stream}_attn.norm.{word}_norm.scale"
                found[key] = native[norm]
    for word in ("query", "key"):
        key = f"single_transformer_blocks.0.attn.norm_{word[0]}.weight"
        found[key] = native[f"single_blocks.0.norm.{word}_norm.scale"]
    assert found.keys() == diffusers.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(diffusers[key], tensor, err_msg=key)


def test_a_token_is_channels_rows_columns(states):
    """Theirs is (C, row, column), ours (row, column, C), of 4 channels and 2 x 2 pixels."""
    _, variables, native, _ = states
    ours = variables["params"]["patch_embed"]["kernel"].reshape(2, 2, 4, WIDTH)
    final = variables["params"]["final"]["linear"]
    kernel, bias = final["kernel"].reshape(WIDTH, 2, 2, 4), final["bias"].reshape(2, 2, 4)
    for channel, row, column in ((0, 0, 0), (3, 0, 1), (1, 1, 0), (2, 1, 1)):
        n = 4 * channel + 2 * row + column
        np.testing.assert_array_equal(native["img_in.weight"][:, n], ours[row, column, channel])
        weight = native["final_layer.linear.weight"][n]
        np.testing.assert_array_equal(weight, kernel[:, row, column, channel])
        assert native["final_layer.linear.bias"][n] == bias[row, column, channel]


@pytest.mark.parametrize("family", LAYOUTS)
def test_there_and_back(states, family):
    model, variables, *both = states
    back = interop.import_state_dict(both[LAYOUTS.index(family)], model, family)
    jax.tree.map(np.testing.assert_array_equal, back["params"], variables["params"])
    assert interop.family_of(model) == "flux"


def full_size(family, name):
    """Name -> shape of every tensor of a published model; nothing is allocated."""
    model = build(configs.load(f"configs/flux_{name}.py").model)
    leaves = keymap.abstract_variables(model)
    groups = keymap.entries_by_leaf(FAMILIES[family], model, leaves).values()
    return keymap.torch_specs((entry for group in groups for entry in group), leaves)


@pytest.mark.parametrize(("family", "number"), [("flux", 780), ("flux_diffusers", 1160)])
def test_full_size_by_shapes(family, number):
    """19 x 24 + 38 x 8 + 20 tensors natively, 19 x 32 + 38 x 14 + 20 in diffusers' layout.

    The shapes tell all hyperparameters of the published models, and those make the config file.
    """
    specs = full_size(family, "dev")
    assert len(specs) == number
    assert sum(int(np.prod(s.shape)) for s in specs.values()) == 11_901_408_320
    shapes = {key: spec.shape for key, spec in specs.items()}
    told = FAMILIES[family].from_shapes(shapes)
    assert describe.untold(FAMILIES[family], told) == []
    config = interop.config_from_torch(family, told)
    published = configs.load("configs/flux_dev.py")
    published.model.update(dtype=config.model.dtype, remat=config.model.remat)
    assert config.model == published.model and config.sampling == published.sampling
    assert describe.likely_families(specs) == [family]


def test_config_json_is_the_config_file():
    for name, guidance in (("dev", True), ("schnell", False)):
        values = {**CONFIG_JSON, "guidance_embeds": guidance}
        told = FAMILIES["flux_diffusers"].from_shapes(
            {k: s.shape for k, s in full_size("flux_diffusers", name).items()}
        )
        assert describe.contradictions(told, values) == []
        config = interop.config_from_torch("flux_diffusers", describe.merge(told, values))
        published = configs.load(f"configs/flux_{name}.py")
        published.model.update(dtype=config.model.dtype, remat=config.model.remat)
        assert config.model == published.model and config.sampling == published.sampling
        shifted = {"dev": ("resolution", 28), "schnell": ("none", 4)}[name]
        assert (config.sampling.time_shift, config.sampling.steps) == shifted


def test_a_sharded_pipeline(states, tmp_path):
    """A folder of diffusers with two shards; out again, natively and as it was."""
    _, _, native, diffusers = states
    folder = tmp_path / "FLUX.1-tiny" / "transformer"
    folder.mkdir(parents=True)
    tiny = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "in_channels": 16}
    tiny |= {"num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5}
    tiny |= {"axes_dims_rope": [2, 4, 2]}
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON | tiny))
    keys, place = sorted(diffusers), {}
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: np.ascontiguousarray(diffusers[key]) for key in part}, folder / name)
        place |= dict.fromkeys(part, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    transfer.import_folder("flux_diffusers", folder.parent, tmp_path / "run")
    for family, expected in (("flux", native), ("flux_diffusers", diffusers)):
        out = tmp_path / f"{family}.safetensors"
        transfer.export_file(family, tmp_path / "run", out)
        back = load_file(out)
        assert back.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    (folder / name).unlink()
    with pytest.raises(UserError, match="names shards that are not beside it: .*00002-of-00002"):
        transfer.import_folder("flux_diffusers", folder.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("flux", {"in_channels": 32, "out_channels": 16}, "an image condition; this is not supp"),
        ("flux", {"in_channels": 18}, "in_channels 18 is no multiple of 4"),
        ("flux", {"theta": 500}, r"theta 500 \(10000 is the one"),
        ("flux", {"qkv_bias": False}, "qkv_bias false; this is not supported"),
        ("flux", {"depht": 3}, "unknown hyperparameter 'depht' in FluxParams; .* 'depth'"),
        ("flux", {"axes_dim": (2, 2, 2)}, "rope_axes = .* whose sum"),
        ("flux_diffusers", {"patch_size": 2}, "patch_size 2 .* is not supported"),
        ("flux_diffusers", {"num_layer": 2}, "unknown hyperparameter 'num_layer' in config.json"),
    ],
)
def test_bad_hyperparameters(family, changes, message):
    known = TINY if family == "flux" else {**CONFIG_JSON, "axes_dims_rope": (16, 56, 56)}
    with pytest.raises(UserError, match=message):
        interop.config_from_torch(family, {**known, **changes})


def test_shapes_do_not_show_how_a_narrow_head_is_shared(states):
    """Only the published heads of 128 channels are known; else the user is asked."""
    _, _, *both = states
    for family, state, name in zip(LAYOUTS, both, ("axes_dim", "axes_dims_rope"), strict=True):
        told = describe.from_shapes(FAMILIES[family], tensors.lazy(state))
        assert describe.untold(FAMILIES[family], told) == [name]
