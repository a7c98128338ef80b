"""Gathering and weighing of sown losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.diffusion import sown
from moe_diffusion.errors import UserError

SOWN = {
    "layers_0": {
        "block_1": {"moe": {"balance": jnp.array([1.0, 2.0]), "z": jnp.array([3.0, 5.0])}}
    },
    "layers_1": {"block_0": {"moe": {"balance": jnp.array([4.0])}}},
}


def test_losses_add_up_over_layers():
    assert {k: float(v) for k, v in sown.sum_by_name(SOWN).items()} == {"balance": 7.0, "z": 8.0}


def test_metrics_are_averaged_over_layers():
    mean = sown.mean_by_name(SOWN)
    np.testing.assert_allclose(mean["balance"], 7 / 3, rtol=1e-6)


def test_weigh():
    named = sown.sum_by_name(SOWN)
    np.testing.assert_allclose(sown.weigh(named, {"balance": 0.5, "z": 2.0}), 19.5)
    assert sown.weigh({}, {}) == 0


@pytest.mark.parametrize("weights", [{"balance": 1.0}, {"balance": 1.0, "z": 1.0, "typo": 1.0}])
def test_a_name_without_partner_is_an_error(weights):
    with pytest.raises(UserError, match="loss_weights names"):
        sown.weigh(sown.sum_by_name(SOWN), weights)
