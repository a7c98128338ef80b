"""FLUX.1: positions, condition, blocks and their replaceable parts, precision, bad configs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion import config as configs
from moe_diffusion.conditions import drop
from moe_diffusion.errors import UserError
from moe_diffusion.models import build, flux_blocks
from moe_diffusion.models.stack import abstract_inputs, abstract_weights

TINY = {"hidden_size": 16, "depth": 1, "image_width": 4, "flux.single_depth": 2}
TINY |= {"flux.rope_axes": (2, 4, 2), "flux.text_tokens": 3, "flux.text_width": 5}


def tiny(**changes):
    keys = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    overrides = [f"model.{key}={value}" for key, value in keys.items()]
    return build(configs.load("configs/flux_tiny.py", overrides).model)


def filled(model, seed=0):
    """Inputs and weights without a zero, so that every part counts."""
    rng = np.random.default_rng(seed)
    x, t, cond = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract_inputs(model, 2)
    )
    weights = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), abstract_weights(model)[0]
    )
    return weights, x, jax.nn.sigmoid(t), cond


@pytest.fixture(scope="module")
def example():
    """The model, its inputs, its output and what its blocks return."""
    model = tiny()
    weights, *inputs = filled(model)
    run = jax.jit(lambda w, x, t, cond: model.apply(w, x, t, cond, False, (0, 2)))
    return model, run, (weights, *inputs), run(weights, *inputs)


def test_angles_by_hand():
    """Two text tokens, then a grid of one row and two columns. Head of 8: axes (2, 4, 2).

    The frequencies of the 4 channels that turn with the row are 1 and 10000^(-2/4) = 0.01; column 1
    turns the last pair by 1 and nothing else.
    """
    angles = flux_blocks.rope_angles((1, 2), 4, (2, 4, 2))
    np.testing.assert_allclose(angles, [[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]])
    angles = flux_blocks.rope_angles((3, 1), 3, (2, 4, 2))
    np.testing.assert_allclose(angles[2], [0, 2, 0.02, 0], rtol=1e-6)


def test_shapes_and_features(example):
    """A wide image; features of a double block are both streams, of a single one the joined."""
    model, _, inputs, (output, features) = example
    assert model.input_shape == (8, 4, 4) and model.grid == (4, 2)
    assert output.shape == (2, 8, 4, 4) and output.dtype == jnp.float32
    image, text = features[0]
    assert (image.shape, text.shape) == ((2, 8, 16), (2, 3, 16))
    assert features[2].shape == (2, 11, 16)
    assert [block.kind for block in model.blocks()] == ["double", "single", "single"]


def test_what_the_output_depends_on(example):
    """On every field. All tokens of a text have one position, so their order does not matter."""
    _, run, (weights, x, t, cond), (output, _) = example
    for name in cond:
        other = run(weights, x, t, {**cond, name: cond[name] + 1})[0]
        assert np.abs(other - output).max() > 1e-3, name
    assert np.abs(run(weights, x, t / 2, cond)[0] - output).max() > 1e-3
    turned = {**cond, "text": cond["text"][:, ::-1]}
    np.testing.assert_allclose(run(weights, x, t, turned)[0], output, atol=2e-4)
    # The image's tokens do have positions.
    assert np.abs(run(weights, x[:, ::-1], t, cond)[0][:, ::-1] - output).max() > 1e-3


def test_condition():
    spec = tiny().cond_spec()
    assert {name: (f.shape, f.dtype) for name, f in spec.items()} == {
        "text": ((3, 5), "float32"),
        "pooled": ((12,), "float32"),
        "guidance": ((), "float32"),
    }
    schnell = tiny(flux__guidance=False, flux__text_dtype="bfloat16")
    assert list(schnell.cond_spec()) == ["text", "pooled"]
    assert schnell.cond_spec()["text"].dtype == "bfloat16"
    assert "guidance_embed" not in abstract_weights(schnell)[0]["params"]


def test_no_condition_keeps_the_guidance_scale():
    model = tiny()
    cond = {"text": jnp.ones((2, 3, 5)), "pooled": jnp.ones((2, 12)), "guidance": jnp.full(2, 3.5)}
    dropped = drop(model, cond, jnp.array([True, False]))
    for name in ("text", "pooled"):
        assert not dropped[name][0].any() and dropped[name][1].all()
    np.testing.assert_array_equal(dropped["guidance"], [3.5, 3.5])


class Halves(nn.Module):
    """Stands in for an MLP: half of its input."""

    scale: float = 0.5

    @nn.compact
    def __call__(self, x, is_null, train):
        assert is_null.shape == x.shape[:1] and not train
        return self.scale * x


def test_every_mlp_can_be_replaced():
    """All three places get their MLP from one factory, and have no MLP's weights afterwards."""
    names = {"image_mlp", "text_mlp", "mlp"}

    def places(model):
        paths = flatten_dict(abstract_weights(model)[0]["params"])
        return {part for path in paths for part in path} & names

    made = []

    def make(name, down_bias):
        made.append((name, down_bias))
        return Halves(name=name)

    model = tiny()
    assert places(model) == names
    assert places(model.clone(make_mlp=make)) == set()
    assert {*made} == {("image_mlp", True), ("text_mlp", True), ("mlp", False)}


def test_every_axis_of_a_weight_has_a_name():
    variables, axes = abstract_weights(tiny())
    params = flatten_dict(variables["params"], sep="/")
    axes = flatten_dict(axes, sep="/")
    for path, leaf in params.items():
        names = axes[path]
        assert len(names) == leaf.ndim, path
        assert (names[0] == "layers") == path.startswith("layers_"), path
        assert leaf.ndim == 1 or path.endswith(("bias", "scale")) or {*names} & {"embed"}, path
    heads = axes["layers_0/block_0/image_attn/qkv/kernel"]
    assert tuple(heads) == ("layers", "embed", None, "heads", None)
    assert tuple(axes["layers_1/block_0/mlp/up/kernel"]) == ("layers", "embed", "mlp")


def test_precision():
    """bf16 blocks on an f32 stream are near f32; the parameters keep their own dtype."""
    model = tiny()
    weights, *inputs = filled(model)
    exact = jax.jit(partial(model.apply, train=False))(weights, *inputs)
    low = tiny(dtype="bfloat16", residual_dtype="float32", param_dtype="bfloat16")
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
    run = jax.jit(lambda w, *inputs: low.apply(w, *inputs, False, (0, 2)))
    output, features = run(small, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(features)} == {jnp.dtype("float32")}
    assert output.dtype == jnp.float32
    error = np.sqrt(np.mean((output - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.05
    leaves = jax.tree.leaves(abstract_weights(low)[0]["params"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flux.rope_axes": (2, 2, 2)}, r"rope_axes = \(2, 2, 2\) must be .* sum is .* = 8"),
        ({"flux.rope_axes": (3, 3, 2)}, "three positive even numbers"),
        ({"flux.rope_axes": (4, 4)}, "three positive even numbers"),
        ({"flux.text_tokens": 0}, "model.flux.text_tokens = 0 must be positive"),
        ({"flux.text_dtype": "int8"}, "text_dtype = 'int8' is unknown; choose float32"),
        ({"patch_size": 1}, "model.patch_size = 1, .* set model.patch_size=2"),
        ({"learn_sigma": True}, "set model.learn_sigma=False"),
        ({"norm": "rmsnorm"}, "set model.norm=layernorm"),
        ({"num_kv_heads": 1}, "set model.num_kv_heads=0"),
        ({"image_size": 9}, "patch_size = 2 does not divide model.image_size = 9"),
    ],
)
def test_bad_configs(changes, message):
    overrides = [f"model.{key}={value}" for key, value in (TINY | changes).items()]
    with pytest.raises(UserError, match=message):
        configs.validate(configs.load("configs/flux_tiny.py", overrides))
