"""Expert Race on matrices small enough to work out by hand, its loss, threshold, and training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_diffusion import train
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.routers import ExpertRace
from moe_diffusion.moe.routers.expert_race import similarity
from moe_diffusion.parallel.mesh import make_mesh
from tests import cli
from tests.moe.oracle import dense_gates

# Three tokens, two experts. Descending: 0.9, 0.8, 0.7, 0.3, -0.1, -0.5.
LOGITS = np.array([[0.9, 0.7], [-0.1, 0.8], [0.3, -0.5]])


def route(router, logits=LOGITS, threshold=0.0, train=True):
    """Routing and Aux; the tokens of all groups are rows of an identity, the kernel the logits."""
    logits = jnp.asarray(logits, jnp.float32)
    groups = logits.reshape(-1, *logits.shape[-2:])
    x = jnp.eye(groups.shape[0] * groups.shape[1]).reshape(groups.shape[0], groups.shape[1], -1)
    params = {"kernel": groups.reshape(-1, groups.shape[-1])}
    state = {"threshold": jnp.float32(threshold)}
    return router.apply({"params": params, "router_state": state}, x, None, train)


def gates_of(routing, tokens=3, experts=2):
    return np.asarray(dense_gates(routing, tokens, experts))


def test_the_best_pairs_of_the_group_win():
    # K T = 3 of 6 pairs: token 0 gets both experts, token 1 one, token 2 none.
    routing, aux = route(ExpertRace(2, capacity=1.0))
    assert routing.slots_per_expert is None and routing.slots_per_token is None
    np.testing.assert_array_equal(routing.token[0], [0, 1, 0])
    np.testing.assert_array_equal(routing.expert[0], [0, 1, 1])
    np.testing.assert_allclose(gates_of(routing)[0], [[0.9, 0.7], [0, 0.8], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(aux.stats["threshold"], 0.7, rtol=1e-6)
    assert aux.losses == {} and aux.metrics == {}


@pytest.mark.parametrize(("capacity", "pairs"), [(0.5, 1), (1.0, 3), (1.5, 4), (2.0, 6)])
def test_exactly_k_times_t_pairs(capacity, pairs):
    routing, aux = route(ExpertRace(2, capacity=capacity))
    taken = np.sort(LOGITS.ravel())[::-1][:pairs]
    np.testing.assert_allclose(routing.weight[0], taken, rtol=1e-6)
    np.testing.assert_allclose(aux.stats["threshold"], taken[-1], rtol=1e-6)
    assert ExpertRace(2, capacity=capacity).experts_per_token == capacity


@pytest.mark.parametrize("scores", ["identity", "sigmoid", "softmax"])
def test_gates(scores):
    # Softmax tells what is best for a token alone: its winners are one expert of every token.
    exp = np.exp(LOGITS)
    gates = {
        "identity": LOGITS,
        "sigmoid": exp / (1 + exp),
        "softmax": exp / exp.sum(1, keepdims=True),
    }[scores]
    won = np.array([[1, 0], [0, 1], [1, 0]] if scores == "softmax" else [[1, 1], [0, 1], [0, 0]])
    routing, _ = route(ExpertRace(2, scores=scores))
    np.testing.assert_allclose(gates_of(routing)[0], gates * won, rtol=1e-6)


def test_groups_race_on_their_own():
    # Two groups: each takes its 3 best; the threshold is the mean of 0.7 and 0.07.
    routing, aux = route(ExpertRace(2), np.stack([LOGITS, LOGITS / 10]))
    expected = np.array([[0.9, 0.7], [0, 0.8], [0, 0]])
    np.testing.assert_allclose(gates_of(routing), [expected, expected / 10], rtol=1e-6)
    np.testing.assert_allclose(aux.stats["threshold"], 0.385, rtol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "max_capacity", "wanted", "served"),
    [
        (0.75, 4.0, 2, 2),  # fewer than in training
        (0.8, 4.0, 1, 1),  # a gate equal to the threshold does not exceed it
        (0.2, 4.0, 4, 4),  # more than in training
        (0.2, 1.0, 4, 3),  # as many candidates as in training
        (-9.0, 1.5, 6, 4),
        (-9.0, 0.0, 6, 6),  # no bound
        (9.0, 4.0, 0, 0),  # nothing passes
    ],
)
def test_inference_compares_with_the_threshold(threshold, max_capacity, wanted, served):
    router = ExpertRace(2, max_capacity=max_capacity)
    routing, aux = route(router, threshold=threshold, train=False)
    best = np.sort(LOGITS.ravel())[::-1][:served]
    expected = np.where(np.isin(LOGITS, best), LOGITS, 0)
    np.testing.assert_allclose(gates_of(routing)[0], expected, rtol=1e-6)
    assert routing.expert.shape[1] == {4.0: 6, 1.0: 3, 1.5: 4, 0.0: 6}[max_capacity]
    assert (routing.expert < 2).sum() == (routing.weight != 0).sum() == served
    np.testing.assert_allclose(aux.metrics["experts_per_token"], wanted / 3, rtol=1e-6)
    np.testing.assert_allclose(
        aux.metrics["dropped"], (wanted - served) / max(wanted, 1), rtol=1e-6
    )
    assert aux.stats == {} and aux.losses == {}


def test_the_threshold_is_a_moving_average():
    router = ExpertRace(2, threshold_decay=0.9)
    state = {"threshold": jnp.array([0.5, 0.0])}  # two layers, stacked
    new = router.next_state(state, {"threshold": jnp.array([0.7, 0.6])})
    np.testing.assert_allclose(new["threshold"], [0.52, 0.06], rtol=1e-6)
    np.testing.assert_array_equal(router.next_state(state, {})["threshold"], state["threshold"])


def test_similarity_by_hand():
    # Eq. 9-11 with M = [[1, 1], [0, 1], [0, 0]]: M' = [[1, 1], [1, 2]].
    taken = np.array([[1, 1], [0, 1], [0, 0]])
    exp = np.exp(LOGITS)
    scores = exp / exp.sum(1, keepdims=True)
    alike = scores.T @ scores
    weight = np.array([[2 * 1 / 3, 2 * 1 / 2], [2 * 1 / 2, 2 * 2 / 3]])
    expected = (weight * alike).sum() / 3
    value = similarity(jnp.asarray(LOGITS)[None], jnp.asarray(taken, jnp.float32)[None])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    _, aux = route(ExpertRace(2, losses=("similarity", "router_z")))
    np.testing.assert_allclose(aux.losses["similarity"], expected, rtol=1e-6)
    assert set(aux.losses) == {"similarity", "router_z"} == {*ExpertRace.provides}


def test_similarity_of_uniform_and_of_collapsed_routing():
    """1 where all are alike; E where one expert has everything and no token meets two."""
    uniform = similarity(jnp.zeros((2, 6, 3)), jnp.ones((2, 6, 3)))
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)
    one = jnp.zeros((1, 6, 3)).at[..., 0].set(1.0)
    np.testing.assert_allclose(similarity(100 * one, one), 3.0, rtol=1e-6)
    # The gradient pushes the logit of the expert that has everything down.
    grad = jax.grad(lambda logits: similarity(logits, one))(0.1 * one)
    assert (grad[..., 0] > 0).all() and np.isfinite(grad).all()


def test_gradient_reaches_the_gate_through_the_weights():
    x = jax.random.normal(jax.random.key(0), (1, 8, 6))
    variables = ExpertRace(4).init(jax.random.key(1), x, None, True)
    assert variables["router_state"]["threshold"].shape == ()
    grad = jax.grad(
        lambda params: ExpertRace(4).apply({**variables, "params": params}, x)[0].weight.sum()
    )(variables["params"])
    assert jnp.abs(jax.tree.leaves(grad)[0]).max() > 1e-3


@pytest.mark.parametrize("groups", [1, 8])
def test_devices_agree(groups):
    """One race over a batch that eight devices share, and one race for each of them."""
    tokens = 32 // groups
    logits = np.random.default_rng(0).normal(size=(groups, tokens, 4))
    expected, _ = route(ExpertRace(4, capacity=1.5), logits)
    rng = np.random.default_rng(1)
    shapes = {"up": (4, 32, 3), "down": (4, 3, 32)}
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    x = jnp.eye(32).reshape(groups, tokens, 32)
    y, _ = dispatch(x, expected, params, kind="silu", backend="reference")

    @jax.jit
    def run(x):
        routing, _ = route(ExpertRace(4, capacity=1.5), logits)
        return routing, dispatch(x, routing, params, kind="silu")[0]

    with jax.set_mesh(make_mesh(ConfigDict({"preset": "dp"}), jax.devices()[:8])):
        routing, got = run(x)
    np.testing.assert_array_equal(gates_of(routing, tokens, 4), gates_of(expected, tokens, 4))
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_it_learns_from_the_command_line(tmp_path):
    """The loss falls, and the thresholds move."""
    args = cli.digits("expert_race", train__num_steps=50, optim__learning_rate=0.01)
    workdir = tmp_path / "run"
    train.main([*args, "--workdir", str(workdir), "--config.checkpoint.every=50"])
    lines = cli.metrics(workdir)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert all(line["similarity"] > 0 for line in lines)
    state, _ = cli.read_checkpoint(workdir, 50)
    thresholds = [value for name, value in state.items() if name.endswith("router/threshold")]
    assert thresholds and all((value != 0).all() for value in thresholds)
