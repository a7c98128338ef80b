from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training.run import prepare_run
from tests.training import toy

WHOLE = P(None, None)


def make(preset, num_devices=8, **overrides):
    config = toy.make_config(parallel__preset=preset, **overrides)
    run = prepare_run(config, toy.Toy(), toy.loss_fn, jax.devices()[:num_devices])
    return run, run.create(0)[0]


@pytest.mark.parametrize(
    "preset,of_params,of_moments",
    [
        ("dp", WHOLE, WHOLE),
        ("zero1", WHOLE, P("data", None)),
        ("fsdp", P("fsdp", None), P("fsdp", None)),
    ],
)
def test_shardings_of_each_preset(preset, of_params, of_moments):
    _, state = make(preset)
    adam = state.opt_state[0]
    assert state.params["up"]["kernel"].sharding.spec == of_params
    for moments in (adam.mu, adam.nu, state.emas["0.9"]["params"], state.emas["0.5"]["params"]):
        assert moments["up"]["kernel"].sharding.spec == of_moments
        assert moments["odd"].sharding.spec == WHOLE  # 12 rows do not split over 8 devices
    for replicated in (state.step, adam.count, state.router_state["bias"]):
        assert replicated.sharding.is_fully_replicated
    kernel = adam.mu["up"]["kernel"]
    part = kernel.addressable_shards[0].data.size
    assert part == kernel.size // (1 if of_moments == WHOLE else 8)


@pytest.mark.parametrize("kind", [tuple, P])
def test_an_axis_is_used_once(kind):
    mesh, table = make_mesh(toy.make_config().parallel), rules.PRESETS["zero1"].update
    names = ("embed", "embed")
    axes = {"kernel": kind(*names) if kind is P else names}
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 16), np.float32)}
    assert rules.shardings_of(mesh, table, shapes, axes)["kernel"].spec == P("data", None)


@pytest.mark.parametrize(
    "width,expected", [(1024, ("fsdp", "data")), (1152, "fsdp"), (1000, None), (2**7, "fsdp")]
)
def test_a_dimension_is_split_over_as_many_axes_as_divide_it(width, expected):
    """16 x 16 chips. 1152, the width of DiT-XL, is 2**7 * 9; 1000 = 8 * 125."""
    mesh, table = AbstractMesh((16, 16), ("data", "fsdp")), rules.PRESETS["fsdp"].params
    assert rules.spec_of((3, width), ("layers", "embed"), table, mesh) == P(None, expected)


def test_initial_values_do_not_depend_on_the_mesh():
    reference = make("dp", 1)[-1]
    for preset in rules.PRESETS:
        toy.assert_trees_equal(make(preset)[-1], reference)


def run(preset, num_devices, accumulate):
    # A large eps, else elements without gradient follow the sign of rounding errors.
    prepared, state = make(preset, num_devices, optim__accumulate=accumulate, optim__eps=1e-3)
    mesh, step = prepared.mesh, prepared.step()
    before, losses = jax.tree.map(lambda x: x.sharding, state), []
    with prepared.on_mesh():
        for number in range(4):
            batch = toy.make_batch(number, 32)
            if accumulate > 1:
                batch = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            batch = jax.device_put(batch, rules.batch_sharding(mesh, accumulate > 1))
            state, metrics = step(state, batch, jax.random.key(0))
            losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return losses, jax.device_get(state)


@pytest.mark.parametrize("preset", rules.PRESETS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_same_numbers_on_1_and_on_8_devices(preset, accumulate):
    losses, state = run(preset, 8, accumulate)
    expected_losses, expected = run("dp", 1, accumulate)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    toy.assert_trees_close(state, expected, 1e-5)
