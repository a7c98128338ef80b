"""FLUX with experts, with and without groups of blocks: on every mesh the numbers of one device."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from moe_diffusion.models.stack import abstract_weights
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from tests.models.grouped import assert_near, config_of, model_of, prepared, value_and_gradients

SIZES = {"model__depth": 2, "model__flux__single_depth": 2, "model__moe__skip_first": 0}
GROUPS = {"groups": ("0-1", "2-3"), "no groups": ()}


@functools.cache
def on_one_device(kind, batch):
    config = config_of("flux", GROUPS[kind], **SIZES)
    model = model_of(config)
    params, inputs = prepared(model, batch)
    return jax.device_get(value_and_gradients(model, config)(params, *inputs))


def on_a_mesh(kind, batch, preset, **parallel):
    """Loss, outputs and gradients on eight devices."""
    config = config_of("flux", GROUPS[kind], **SIZES, parallel__preset=preset, **parallel)
    model, mesh = model_of(config), make_mesh(config.parallel)
    params, inputs = prepared(model, batch)
    axes, table = abstract_weights(model)[1], rules.PRESETS[preset]
    places = rules.shardings_of(mesh, table.params, params, axes)
    if batch % 8 == 0:
        inputs = jax.device_put(inputs, rules.batch_sharding(mesh))
    of_update = rules.shardings_of(mesh, table.update, params, axes)
    function = value_and_gradients(model, config)
    with jax.set_mesh(mesh), rules.use_preset(preset):
        run = jax.jit(function, out_shardings=(None, of_update))
        result = run(jax.device_put(params, places), *inputs)
    return jax.device_get(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "preset", "parallel"),
    [
        ("groups", "fsdp_ep", {"parallel__expert": 4}),
        ("groups", "fsdp", {}),
        ("groups", "tp", {"parallel__tensor": 2}),
        ("no groups", "fsdp_ep", {"parallel__expert": 4}),
    ],
)
def test_losses_outputs_and_gradients_are_those_of_one_device(kind, preset, parallel):
    (loss, aux), gradients = on_a_mesh(kind, 8, preset, **parallel)
    (expected, expected_aux), of_one = on_one_device(kind, 8)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_near(aux, expected_aux)
    assert_near(gradients, of_one)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_goes_through_groups_all_the_same():
    """The compiler splits the work; what is traced for one sample must not ask for eight parts."""
    (loss, aux), gradients = on_a_mesh("groups", 3, "fsdp")
    (expected, expected_aux), of_one = on_one_device("groups", 3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_near(aux, expected_aux)
    assert_near(gradients, of_one)
