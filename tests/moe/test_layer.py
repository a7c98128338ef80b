"""The MoE layer by hand: Eq. 2, 3 and the balance loss of Dense2MoE (2510.09094, section 3)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion.models.blocks import MLP
from moe_diffusion.moe.layer import Experts, MoE
from moe_diffusion.moe.routers import TokenChoice

# Three tokens, the rows of an identity matrix: the gate's kernel is the table of logits, and row t
# of a matrix is what it makes of token t. Softmax over the experts gives the alpha_t of Eq. 3.
ALPHA = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25 + 1e-4, 0.5 - 1e-4]])
EXPERTS = np.array(
    [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [100.0, 200.0, 300.0]]
)  # expert e, token t
SHARED = np.array([7.0, 8.0, 9.0])


def layer(top_k, experts=3, **options):
    router = partial(TokenChoice, experts, normalize=True, top_k=top_k, **options)
    shared = partial(MLP, hidden_size=3, use_bias=False, kind="gelu")
    return MoE(router, partial(Experts, experts, 3), shared)


def applied(module, mutable=()):
    """The layer on the three tokens, [3]: expert e makes the value EXPERTS[e, t] of token t.

    Experts are SwiGLU, up(x) * silu(gate(x)), and all their gates are of a value whose silu is 1.
    The shared expert has GELU, on values where that is the identity.
    """
    one = 1.2784645  # silu(one) = 1
    up = jnp.asarray(EXPERTS[:, :, None] * np.array([1.0, 0, 0]))
    params = {
        "router": {"kernel": jnp.asarray(np.log(ALPHA))},
        "experts": {
            "up": up,
            "gate": jnp.full((3, 3, 3), one),
            "down": jnp.broadcast_to(jnp.eye(3), (3, 3, 3)),
        },
        "shared": {
            "up": {"kernel": jnp.asarray(SHARED[:, None] * np.array([1.0, 0, 0]))},
            "down": {"kernel": jnp.eye(3)},
        },
    }
    apply = jax.jit(partial(module.apply, mutable=list(mutable)), static_argnums=3)
    y, sown = apply({"params": params}, jnp.eye(3)[None], jnp.zeros(1, bool), True)
    assert not np.any(y[0, :, 1:])
    return y[0, :, 0], sown


def weights(module):
    """The shapes of the layer's weights."""
    inputs = jnp.ones((1, 2, 3)), jnp.zeros(1, bool), True
    return nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))["params"]


def test_the_best_two_share_the_gate():
    """g = alpha over the sum of the chosen: 5/8, 3/8; 2/3, 1/3; and about 2/3, 1/3."""
    y, _ = applied(layer(2))
    last = ALPHA[2, 1:] / ALPHA[2, 1:].sum()
    expected = [
        7 + 5 / 8 * 1 + 3 / 8 * 10,
        8 + 2 / 3 * 20 + 1 / 3 * 200,
        9 + last[0] * 30 + last[1] * 300,
    ]
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_all_experts_are_a_plain_softmax():
    y, _ = applied(layer(3))
    np.testing.assert_allclose(y, SHARED + (ALPHA * EXPERTS.T).sum(1), rtol=1e-5)


def test_one_expert_keeps_its_probability():
    """Or has the gate 1, as Eq. 3 says."""
    y, _ = applied(layer(1))
    expected = SHARED + [0.5 * 1, 0.6 * 20, ALPHA[2, 2] * 300]
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    y, _ = applied(layer(1, normalize_one=True))
    np.testing.assert_allclose(y, SHARED + [1, 20, 300], rtol=1e-5)


def test_no_expert_is_the_shared_one_alone():
    """top_k = 0: the weights of the others are there all the same, and of no effect."""
    y, sown = applied(layer(0), ("losses", "metrics"))
    np.testing.assert_allclose(y, SHARED, rtol=1e-6)
    assert not sown.get("losses") and not sown.get("metrics")
    with_two, with_none = (weights(layer(k)) for k in (2, 0))
    assert with_two == with_none


def test_a_layer_without_experts_has_no_weights_of_any():
    assert set(weights(layer(0, experts=0))) == {"shared"}


# --- balance -------------------------------------------------------------------------------------


def test_the_balance_of_gates_by_hand():
    """n / (T k) sum_t I(t, i) is the share of the assignments, n times; g is Eq. 3's gate.

    Chosen: 0 and 1; 1 and 2; 2 and 1. Experts 0, 1, 2 have 1, 3, 2 of six assignments. Their gates:
    5/8; 3/8 + 2/3 + 1/3; 1/3 + 2/3, over three tokens (the last token's but for 1e-4):
    3 * (1/6 * 5/24 + 1/2 * 11/24 + 1/3 * 1/3) = 9/8.
    """
    _, sown = applied(layer(2, losses=("balance",), balance_gates=True), ("losses",))
    np.testing.assert_allclose(sown["losses"]["balance"], 9 / 8, rtol=1e-4)


def test_the_balance_of_scores_by_hand():
    """GShard's form has the softmax of all experts in the gates' place."""
    _, sown = applied(layer(2, losses=("balance",)), ("losses",))
    expected = 3 * (np.array([1, 3, 2]) / 6 * ALPHA.mean(0)).sum()
    np.testing.assert_allclose(sown["losses"]["balance"], expected, rtol=1e-5)


@pytest.mark.parametrize("gates", [False, True])
def test_the_gradient_of_the_balance_goes_through_the_gates_alone(gates):
    """Shares of the load are constants: the gradient is that of 3 * sum_i f_i mean(g_i)."""
    router = TokenChoice(3, losses=("balance",), normalize=True, top_k=2, balance_gates=gates)
    load = np.array([1, 3, 2]) / 6
    chosen = jnp.asarray([[1, 1, 0], [0, 1, 1], [0, 1, 1]])

    def ours(kernel):
        x = jnp.eye(3)[None]
        return router.apply({"params": {"kernel": kernel}}, x, None, True)[1].losses["balance"]

    def by_hand(kernel):
        g = jax.nn.softmax(kernel)
        g = g * chosen / (g * chosen).sum(1, keepdims=True) if gates else g
        return 3 * (load * g.mean(0)).sum()

    kernel = jnp.asarray(np.log(ALPHA), jnp.float32)
    found, expected = jax.jit(lambda k: (jax.grad(ours)(k), jax.grad(by_hand)(k)))(kernel)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-2
