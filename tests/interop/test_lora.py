"""LoRA files: W + scale * alpha / rank * B A by hand, all styles of keys, what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_diffusion import convert, interop, models
from moe_diffusion.errors import UserError
from moe_diffusion.interop import lora
from moe_diffusion.training.checkpoint import StoredWeights
from tests import cli
from tests.interop import test_keymap

SIT = cli.ROOT / "tests" / "goldens" / "sit"

# W is 3 x 2, the rank is 2. B A = [[1, 2], [0, 10], [3, 16]].
W = np.array([[1, 1], [2, 2], [3, 3]], np.float32)
A = np.array([[1, 2], [0, 5]], np.float32)
B = np.array([[1, 0], [0, 2], [3, 2]], np.float32)
PRODUCT = np.array([[1, 2], [0, 10], [3, 16]], np.float32)
STYLES = {
    "peft": ("base_model.model.x.to_q.lora_A.weight", "base_model.model.x.to_q.lora_B.weight"),
    "named adapter": ("x.to_q.lora_A.fast.weight", "x.to_q.lora_B.fast.weight"),
    "diffusers": ("transformer.x.to_q.lora_A.weight", "transformer.x.to_q.lora_B.weight"),
    "native": ("diffusion_model.x.to_q.lora_A.weight", "diffusion_model.x.to_q.lora_B.weight"),
    "old diffusers": ("x.to_q.lora.down.weight", "x.to_q.lora.up.weight"),
    "processors": ("x.processor.to_q_lora.down.weight", "x.processor.to_q_lora.up.weight"),
    "kohya": ("lora_unet_x_to_q.lora_down.weight", "lora_unet_x_to_q.lora_up.weight"),
}


def write(path, tensors, **options):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, **options)
    return path


def merged(tmp_path, tensors, scale=1.0, weights=None, **options):
    path = write(tmp_path / "lora.safetensors", tensors, **options)
    weights = {"x.to_q.weight": W, "x.norm.weight": W[0]} if weights is None else weights
    return lora.merge(weights, path, scale)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_keys(tmp_path, style):
    down, up = STYLES[style]
    found = merged(tmp_path, {down: A, up: B}, 0.5)
    np.testing.assert_array_equal(found["x.to_q.weight"], W + 0.5 * PRODUCT)
    assert found["x.norm.weight"] is not None and (W == [[1, 1], [2, 2], [3, 3]]).all()


def test_alpha_is_divided_by_the_rank(tmp_path):
    """alpha 8 at rank 2 is a factor of 4, times a scale of 0.125: half of the product."""
    down, up = STYLES["kohya"]
    tensors = {down: A, up: B, "lora_unet_x_to_q.alpha": np.float32(8)}
    np.testing.assert_array_equal(
        merged(tmp_path, tensors, 0.125)["x.to_q.weight"], W + PRODUCT / 2
    )
    bf16 = {"x.to_q.weight": W.astype(jnp.bfloat16)}
    found = merged(tmp_path, tensors, 0.125, bf16)["x.to_q.weight"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found), W + PRODUCT / 2)  # all of them fit


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    "told,factor",
    [
        ({"lora_alpha": 8, "r": 2}, 4),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 6}}, 3),
        ({"lora_alpha": 8, "alpha_pattern": {"q": 6}}, 4),  # another module's name
    ],
)
def test_alpha_that_stands_elsewhere(tmp_path, told, factor, beside):
    """PEFT's adapter_config.json beside the file, or the metadata of diffusers in it."""
    options = {}
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    else:
        text = json.dumps({f"transformer.{key}": value for key, value in told.items()})
        options = {"metadata": {"lora_adapter_metadata": text}}
    found = merged(tmp_path, dict(zip(STYLES["peft"], (A, B), strict=True)), **options)
    np.testing.assert_allclose(found["x.to_q.weight"], W + factor * PRODUCT, rtol=1e-6)


def test_convolutions_and_biases(tmp_path):
    """The patches [3, 2, 1, 1] of a convolution are the rows of W; B's bias is scaled like B."""
    tensors = {
        "x.proj.lora_A.weight": A[..., None, None],
        "x.proj.lora_B.weight": B[..., None, None],
        "x.proj.lora_B.bias": np.array([1, 2, 3], np.float32),
    }
    weights = {"x.proj.weight": W[..., None, None], "x.proj.bias": np.ones(3, np.float32)}
    found = merged(tmp_path, tensors, 2.0, weights)
    np.testing.assert_array_equal(found["x.proj.weight"][..., 0, 0], W + 2 * PRODUCT)
    np.testing.assert_array_equal(found["x.proj.bias"], [3, 5, 7])
    del weights["x.proj.bias"]
    with pytest.raises(UserError, match="changes the bias of x.proj, which has none"):
        merged(tmp_path, tensors, 2.0, weights)


# --- FLUX.1, whose modules have two names ---------------------------------------------------------

D, HIDDEN = 2, 5  # width of the model and of its MLP


def pair(name, rows, inputs=D, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.integers(-3, 4, (1, inputs)), rng.integers(-3, 4, (rows, 1))
    return {f"{name}.lora_{k}.weight": np.float32(v) for k, v in zip("AB", parts, strict=True)}


def product(tensors, name):
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


NATIVE = {
    "double_blocks.1.img_attn.qkv.weight": np.zeros((3 * D, D), np.float32),
    "single_blocks.0.linear1.weight": np.zeros((3 * D + HIDDEN, D), np.float32),
    "single_blocks.0.linear2.weight": np.zeros((D, D + HIDDEN), np.float32),
    "final_layer.adaLN_modulation.1.weight": np.zeros((2 * D, D), np.float32),
}


def test_names_of_diffusers_on_native_weights(tmp_path):
    """q, k, v are rows 0-1, 2-3, 4-5; the MLP's are 6-10; scale, shift become shift, scale."""
    block = "transformer.single_transformer_blocks.0"
    tensors = pair("transformer.transformer_blocks.1.attn.to_k", D, seed=1)
    tensors |= pair(f"{block}.attn.to_v", D, seed=2) | pair(f"{block}.proj_mlp", HIDDEN, seed=3)
    tensors |= pair("transformer.norm_out.linear", 2 * D, seed=4)
    tensors |= pair(f"{block}.proj_out", D, D + HIDDEN, seed=5)
    found = merged(tmp_path, tensors, weights=NATIVE)
    qkv = np.zeros((3 * D, D))
    qkv[2:4] = product(tensors, "transformer.transformer_blocks.1.attn.to_k")
    np.testing.assert_array_equal(found["double_blocks.1.img_attn.qkv.weight"], qkv)
    linear1 = np.zeros((3 * D + HIDDEN, D))
    linear1[4:6] = product(tensors, f"{block}.attn.to_v")
    linear1[6:] = product(tensors, f"{block}.proj_mlp")
    np.testing.assert_array_equal(found["single_blocks.0.linear1.weight"], linear1)
    swapped = product(tensors, "transformer.norm_out.linear")[[2, 3, 0, 1]]
    np.testing.assert_array_equal(found["final_layer.adaLN_modulation.1.weight"], swapped)
    linear2 = product(tensors, f"{block}.proj_out")
    np.testing.assert_array_equal(found["single_blocks.0.linear2.weight"], linear2)


def test_native_names_on_weights_of_diffusers(tmp_path):
    """The other way round, in kohya's style: the rows are dealt out."""
    block = "single_transformer_blocks.0"
    rows = {"attn.to_q": D, "attn.to_k": D, "attn.to_v": D, "proj_mlp": HIDDEN}
    weights = {f"{block}.{k}.weight": np.zeros((n, D), np.float32) for k, n in rows.items()}
    weights["norm_out.linear.weight"] = np.zeros((2 * D, D), np.float32)
    a, b = pair("x", 3 * D + HIDDEN).values()
    c, d = pair("x", 2 * D, seed=1).values()
    names = ("lora_unet_single_blocks_0_linear1", "lora_unet_final_layer_adaLN_modulation_1")
    tensors = {f"{names[0]}.lora_down.weight": a, f"{names[0]}.lora_up.weight": b}
    tensors |= {f"{names[1]}.lora_down.weight": c, f"{names[1]}.lora_up.weight": d}
    found = merged(tmp_path, tensors, weights=weights)
    parts = np.split(b @ a, [D, 2 * D, 3 * D])
    for name, part in zip(rows, parts, strict=True):
        np.testing.assert_array_equal(found[f"{block}.{name}.weight"], part, err_msg=name)
    np.testing.assert_array_equal(found["norm_out.linear.weight"], (d @ c)[[2, 3, 0, 1]])
    tensors[f"{names[0]}.lora_up.weight"] = b[:-1]
    with pytest.raises(UserError, match=r"linear1 has A \(1, 2\) and B \(10, 1\), which is no ch"):
        merged(tmp_path, tensors, weights=weights)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("base,other", [("flux", "flux_diffusers"), ("flux_diffusers", "flux")])
def test_the_same_weights_in_both_names(tmp_path, guidance, base, other):
    """One network in both names. A is the identity and B minus the weights in one of them, so the
    merged weights in the other are all zero, the biases as they were."""
    hparams = test_keymap.FLUX | {"guidance_embed": guidance}
    model = models.build(interop.model_config_from_torch("flux", hparams))
    variables = test_keymap.random_variables(model)
    weights, source = (
        dict(interop.export_state_dict(variables, model, family)) for family in (base, other)
    )
    tensors = {}
    for key, value in source.items():
        if value.ndim == 2:
            module = key.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = np.eye(value.shape[1], dtype=np.float32)
            tensors[f"{module}.lora_B.weight"] = -value
    found = merged(tmp_path, tensors, weights=weights)
    for key, value in weights.items():
        wanted = np.zeros_like(value) if value.ndim == 2 else value
        np.testing.assert_allclose(found[key], wanted, atol=1e-6, err_msg=key)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors,message",
    [
        (
            pair("y.to_q", 3),
            "changes no tensor of these weights: y.to_q; the weights have x.to_q: ",
        ),
        (
            pair("x.to_q", 3) | pair("y", 3),
            "changes 1 modules not in these weights: y; the weights",
        ),
        (
            pair("x.to_q", 4),
            r"x.to_q has A \(1, 2\) and B \(4, 1\), which is no change of x.to_q.we",
        ),
        (pair("x.to_q", 3, 1), r"which is no change of x.to_q.weight \(3, 2\)"),
        ({"x.to_q.lora_A.weight": A}, "lacks A or B of x.to_q"),
        (pair("x.to_q", 3) | {"x.to_q.dora_scale": B}, "holds more than a plain LoRA: x.to_q.dora"),
        ({"x.to_q.hada_w1_a": A}, "holds more than a plain LoRA: x.to_q.hada_w1_a"),
        (pair("text_encoder.x", 3), "holds no LoRA of a diffusion model"),
        ({}, "holds no LoRA of a diffusion model"),
    ],
)
def test_what_is_no_lora_of_these_weights(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        merged(tmp_path, tensors)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="no weight file at"):
        lora.merge({}, tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="--lora-scale nan is no number"):
        merged(tmp_path, pair("x.to_q", 3), np.nan)
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(UserError, match="is a DoRA"):
        merged(tmp_path, pair("x.to_q", 3))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(
        UserError, match="adapter_config.json is not valid JSON .*copy the LoRA again"
    ):
        merged(tmp_path, pair("x.to_q", 3))


def test_text_encoders_are_left_out(tmp_path, capfd):
    tensors = pair("x.to_q", 3) | pair("text_encoder.x", 3)
    found = merged(tmp_path, tensors)
    np.testing.assert_array_equal(found["x.to_q.weight"], W + product(tensors, "x.to_q"))
    assert "2 tensors for text encoders are left out" in capfd.readouterr().err


def test_convert_merges(tmp_path, capfd):
    """A SiT in a folder: one projection and its neighbour, which no LoRA changes."""
    stored = load_file(SIT / "weights.safetensors")
    key = "blocks.2.attn.proj"
    tensors = pair(f"transformer.{key}", 40, 40) | {f"transformer.{key}.alpha": np.float32(3)}
    path = write(tmp_path / "lora.safetensors", tensors)
    args = ["--family", "sit", "--input", SIT / "weights.safetensors", "--hparams"]
    args = [str(arg) for arg in (*args, SIT / "config.json", "--output", tmp_path / "out")]
    with_lora = [*args, "--lora", str(path), "--lora-scale", "0.125"]
    convert.main(with_lora)
    with StoredWeights(tmp_path / "out", ema=None) as weights:
        leaf = "params/layers_0/block_0/attn/proj/kernel"
        kernel = weights.read({leaf: None})[leaf]
    wanted = stored[f"{key}.weight"] + 0.375 * product(tensors, f"transformer.{key}")
    np.testing.assert_allclose(kernel[2].reshape(40, 40).T, wanted, rtol=1e-6)
    np.testing.assert_array_equal(kernel[1].reshape(40, 40).T, stored["blocks.1.attn.proj.weight"])

    args[-1] = str(tmp_path / "other")
    write(path, pair("unet.down_blocks.0.attn.to_q", 40, 40))
    for given, message in (
        (["--lora", str(path)], "changes no tensor of these weights: down_blocks.0.attn.to_q"),
        (["--lora-scale", "0.5"], "--lora-scale needs --lora"),
        (["--lora", str(tmp_path / "absent.safetensors")], "no weight file at"),
        (["--lora", str(path), "--export"], "--hparams does not go with --export"),
    ):
        assert message in cli.refused(capfd, convert.main, [*args, *given])
    assert not (tmp_path / "other").exists()
