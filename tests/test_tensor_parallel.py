"""Devices that share one sample compute what one device computes, and each a part of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.models import build
from moe_diffusion.models.stack import abstract_inputs, abstract_weights
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.sampling.generate import generate

# Eight heads of eight channels; 64 tokens of an image and 8 of a text.
FLUX = {"num_heads": 8, "flux.rope_axes": (2, 4, 2), "flux.single_depth": 2, "image_size": 16}
KEYS = {
    "flux": ("configs/flux_tiny.py", FLUX),
    "flux_3_heads": ("configs/flux_tiny.py", FLUX | {"num_heads": 3, "hidden_size": 48,
                                                     "flux.rope_axes": (4, 8, 4)}),
    "dit": ("configs/digits.py:router=dense", {"depth": 2, "hidden_size": 64, "num_heads": 8}),
    "text": ("configs/dit_t2i.py", {"depth": 2, "hidden_size": 64, "num_heads": 8, "image_size": 8,
                                    "dit_t2i.text_tokens": 8, "dit_t2i.text_width": 8,
                                    "dit_t2i.text_dtype": "float32", "remat": "none"}),
    "moe": ("configs/digits.py:router=token_choice", {"depth": 2, "hidden_size": 64,
                                                      "num_heads": 8}),
}  # fmt: skip


def model_of(name):
    path, keys = KEYS[name]
    keys = keys | {"dtype": "float32"}
    return build(configs.load(path, [f"model.{key}={value}" for key, value in keys.items()]).model)


def prepared(name, batch):
    """The model, weights without a zero and inputs."""
    model, rng = model_of(name), np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 10, leaf.shape), leaf.dtype)
        return jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

    x, t, cond = jax.tree.map(fill, abstract_inputs(model, batch))
    return model, jax.tree.map(fill, abstract_weights(model)[0]), x, jax.nn.sigmoid(t), cond


def program(model):
    """(variables, x, t, cond) -> (output, gradients of the parameters)."""

    def run(variables, x, t, cond):
        def loss(params):
            out = model.apply({**variables, "params": params}, x, t, cond, False)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return out, gradients

    return jax.jit(run)


def shared(name, batch, tensor, function=program):
    """(the function, its arguments on a mesh, the mesh) with the preset tp."""
    model, variables, *inputs = prepared(name, batch)
    parallel = configs.load(KEYS[name][0], ["parallel.preset=tp", f"parallel.tensor={tensor}"])
    mesh = make_mesh(parallel.parallel)
    axes = abstract_weights(model)[1]
    places = rules.shardings_of(mesh, rules.PRESETS["tp"].params, variables, axes)
    inputs = jax.device_put(inputs, rules.batch_sharding(mesh))
    return function(model.clone(preset="tp")), (jax.device_put(variables, places), *inputs), mesh


@pytest.mark.parametrize(
    ("name", "batch", "tensor"),
    [
        ("flux", 1, 8),
        ("moe", 1, 8),
        pytest.param("text", 1, 8, marks=pytest.mark.slow),
        pytest.param("flux", 4, 2, marks=pytest.mark.slow),
        pytest.param("flux_3_heads", 1, 8, marks=pytest.mark.slow),
        pytest.param("dit", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_one_device(name, batch, tensor):
    model, *args = prepared(name, batch)
    expected = program(model)(*args)
    run, args, mesh = shared(name, batch, tensor)
    with jax.set_mesh(mesh):
        got = run(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b).max()))


def forward(model):
    return jax.jit(lambda variables, *inputs: model.apply(variables, *inputs, False))


@pytest.mark.parametrize(("name", "parts"), [("flux", 7), ("flux_3_heads", 3)])
def test_each_device_computes_a_part(name, parts):
    """Of eight devices each does an eighth; only vectors of a sample, or heads that eight do not
    divide, are computed by all."""
    model, *args = prepared(name, 1)
    alone = forward(model).lower(*args).compile().cost_analysis()["flops"]
    run, args, mesh = shared(name, 1, 8, forward)
    with jax.set_mesh(mesh):
        flops = run.lower(*args).compile().cost_analysis()["flops"]
    assert alone / flops > parts


def test_a_sampler_draws_one_image_on_eight_devices():
    """It fills no batch up, and the image is that of one device."""
    model, variables, _, _, cond = prepared("flux", 1)
    config = configs.load(KEYS["flux"][0], ["sampling.steps=2", "sampling.time_shift=none"])
    cond, drawn = jax.device_get(cond), []

    def draw(model, variables, mesh=None):
        sampler = make_sampler(model, config)

        def watched(variables, z, *rest):
            drawn.append(z.shape[0])
            return sampler(variables, z, *rest)

        shape = model.input_shape
        return generate(watched, variables, cond, shape, seed=0, batch_size=1, mesh=mesh)

    alone = draw(model, variables)
    model, (variables, *_), mesh = shared("flux", 1, 8, lambda model: model)
    np.testing.assert_allclose(draw(model, variables, mesh), alone, rtol=1e-5, atol=1e-5)
    assert drawn == [1, 1]
