"""A model as a module of flax.nnx: the same outputs, gradients and routing losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moe_diffusion
from tests.sampling.tiny_run import make_run

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
ARGS = X, jnp.array([0.2, 0.7]), {"label": jnp.array([3, 10])}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    variables = make_run(folder, "model.router.selection_bias=true")
    config = moe_diffusion.load(folder).config
    return moe_diffusion.build(config.model, losses=["balance"]), variables


def loss_of(output):
    return jnp.mean((output - X) ** 2)


def test_outputs_and_gradients(parts):
    model, variables = parts
    module = moe_diffusion.to_nnx(model, variables)
    found = nnx.jit(lambda module: module(*ARGS, False))(module)
    expected = jax.jit(lambda variables: model.apply(variables, *ARGS, False))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    def of_params(params):
        return loss_of(model.apply({**variables, "params": params}, *ARGS, True))

    value, expected = jax.jit(jax.value_and_grad(of_params))(variables["params"])
    gradient = nnx.value_and_grad(lambda module: loss_of(module(*ARGS, True)))
    found, gradients = nnx.jit(gradient)(module)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    # Those of what is trained, and of nothing else: no gradient of the router's bias.
    pure = nnx.to_pure_dict(gradients)
    assert jax.tree.structure(pure) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pure, expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(pure)) > 1e-3


def test_what_is_sown(parts):
    model, variables = parts
    module = moe_diffusion.to_nnx(model, variables)
    nnx.jit(lambda module: module(*ARGS, True, mutable=["losses"]))(module)
    apply = jax.jit(lambda v: model.apply(v, *ARGS, True, mutable=["losses"]))
    _, sown = apply(variables)
    expected = sown["losses"]["layers_0"]["block_0"]["moe"]["balance"]
    found = module.layers_0["block_0"]["moe"]["balance"]
    np.testing.assert_allclose(found[...], expected, rtol=1e-6)
    assert expected.ndim == 1 and (expected > 0.5).all()


@pytest.mark.slow
def test_an_nnx_optimizer_trains_it(parts):
    """Five steps of gradient descent lower the loss; the weights that were given stay."""
    model, variables = parts
    module = moe_diffusion.to_nnx(model, variables)
    before = jax.tree.map(jnp.copy, variables)
    optimizer = nnx.Optimizer(module, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: loss_of(m(*ARGS, True)))(module)
        optimizer.update(module, gradients)
        return value

    values = [float(step(module, optimizer)) for _ in range(5)]
    assert values[-1] < values[0] and np.isfinite(values).all()
    jax.tree.map(np.testing.assert_array_equal, variables, before)
