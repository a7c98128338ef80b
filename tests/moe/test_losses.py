"""Gathering and weighing of sown losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.moe import losses

SOWN = {
    "layers_0": {
        "block_1": {"moe": {"balance": jnp.array([1.0, 2.0]), "z": jnp.array([3.0, 5.0])}}
    },
    "layers_1": {"block_0": {"moe": {"balance": jnp.array([4.0])}}},
}


def test_losses_add_up_over_layers():
    assert {k: float(v) for k, v in losses.sum_by_name(SOWN).items()} == {"balance": 7.0, "z": 8.0}


def test_metrics_are_averaged_over_layers():
    mean = losses.mean_by_name(SOWN)
    np.testing.assert_allclose(mean["balance"], 7 / 3, rtol=1e-6)


def test_weigh():
    named = losses.sum_by_name(SOWN)
    np.testing.assert_allclose(losses.weigh(named, {"balance": 0.5, "z": 2.0}), 19.5)
    assert losses.weigh({}, {}) == 0


@pytest.mark.parametrize("weights", [{"balance": 1.0}, {"balance": 1.0, "z": 1.0, "typo": 1.0}])
def test_a_name_without_partner_is_an_error(weights):
    with pytest.raises(UserError, match="loss_weights names"):
        losses.weigh(losses.sum_by_name(SOWN), weights)


def test_capacity_is_a_mean_binary_cross_entropy():
    value = losses.capacity(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
