"""Routers on tables small enough to work out by hand.

The tokens are the rows of an identity matrix, so the gate's kernel is the table of logits itself:
row = token, column = expert. Tables are written as scores and turned into logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.moe.router import balance, router_z
from moe_diffusion.moe.routers import DiffMoE, ExpertChoice, TokenChoice
from moe_diffusion.moe.routers.diffmoe import predictor_loss
from moe_diffusion.moe.routing import expert_load
from tests.moe.oracle import dense_gates


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


def route(router, table, state=None, train=True, x=None):
    """Routing and Aux of one group whose logits are `table` [T, E]."""
    table = jnp.asarray(table, jnp.float32)
    params = {"kernel": table}
    if isinstance(router, DiffMoE):
        params["predictor"] = state.pop("predictor")
    variables = {"params": params} | ({"router_state": state} if state else {})
    x = jnp.eye(len(table))[None] if x is None else x
    return router.apply(variables, x, None, train)


# Three tokens, four experts; each row sums to 1, so softmax(log(table)) is the table.
SOFTMAX = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.45, 0.05, 0.25 - 1e-3]])


def test_token_choice_softmax_top2_keeps_the_probabilities():
    # TC-DiT: weight = softmax score of the chosen, not renormalised.
    routing, _ = route(TokenChoice(4, top_k=2), np.log(SOFTMAX))
    assert routing.slots_per_token == 2
    np.testing.assert_array_equal(routing.token[0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(routing.expert[0], [0, 1, 3, 2, 1, 0])
    last = SOFTMAX[2] / SOFTMAX[2].sum()
    np.testing.assert_allclose(routing.weight[0], [0.4, 0.3, 0.4, 0.3, last[1], last[0]], rtol=1e-6)


def test_token_choice_renormalises_and_scales():
    # DeepSeek-V3 Eq. 12-16: sigmoid scores, the chosen sum to 1, times the scaling factor.
    scores = [[0.9, 0.6, 0.3, 0.1], [0.2, 0.8, 0.7, 0.4]]
    router = TokenChoice(4, top_k=2, scores="sigmoid", normalize=True, scale=2.5)
    routing, _ = route(router, logit(scores))
    np.testing.assert_array_equal(routing.expert[0], [0, 1, 1, 2])
    expected = [2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5, 2.5 * 0.8 / 1.5, 2.5 * 0.7 / 1.5]
    np.testing.assert_allclose(routing.weight[0], expected, rtol=1e-5)


def test_top1_is_not_renormalised():
    # DSMoE code: norm_topk_prob acts for top_k > 1 only; otherwise every gate would be 1.
    router = TokenChoice(4, top_k=1, scores="sigmoid", normalize=True, scale=2.0)
    routing, _ = route(router, logit([[0.9, 0.6, 0.3, 0.1]]))
    np.testing.assert_allclose(routing.weight[0], [1.8], rtol=1e-5)


def test_selection_bias_changes_the_choice_but_not_the_weight():
    router = TokenChoice(4, top_k=2, scores="sigmoid", selection_bias=True)
    bias = jnp.array([0.0, -0.5, 0.0, 0.3])
    routing, _ = route(router, logit([[0.9, 0.6, 0.3, 0.1]]), {"bias": bias})
    # biased: .9, .1, .3, .4 -> experts 0 and 3, weighed by .9 and .1
    np.testing.assert_array_equal(routing.expert[0], [0, 3])
    np.testing.assert_allclose(routing.weight[0], [0.9, 0.1], rtol=1e-5)


def test_groups_count_their_two_best_experts():
    # Groups {0,1,2} and {3,4,5}: 0.9 + 0.1 = 1.0 loses against 0.6 + 0.5 = 1.1.
    scores = [[0.9, 0.1, 0.05, 0.6, 0.5, 0.4]]
    router = TokenChoice(6, top_k=2, scores="sigmoid", n_group=2, topk_group=1)
    routing, _ = route(router, logit(scores))
    np.testing.assert_array_equal(routing.expert[0], [3, 4])
    everything = TokenChoice(6, top_k=2, scores="sigmoid", n_group=2, topk_group=2)
    np.testing.assert_array_equal(route(everything, logit(scores))[0].expert[0], [0, 3])


def test_rejected_groups_score_zero_not_minus_infinity():
    # As in DSMoE's code: a masked expert (0.0) beats an allowed one whose biased score is negative.
    router = TokenChoice(4, top_k=2, scores="sigmoid", n_group=2, topk_group=1, selection_bias=True)
    bias = jnp.array([0.0, -0.9, 0.0, 0.0])
    routing, _ = route(router, logit([[0.9, 0.1, 0.02, 0.01]]), {"bias": bias})
    # group scores: .9 - .8 = .1 against .03; masked: .9, -.8, 0, 0 -> experts 0 and 2
    np.testing.assert_array_equal(routing.expert[0], [0, 2])
    np.testing.assert_allclose(routing.weight[0], [0.9, 0.02], rtol=1e-5)


def test_top_k_may_change_when_applied():
    router = TokenChoice(4, top_k=2)
    table = np.log(SOFTMAX)
    routing, _ = route(router.clone(top_k=3), table)
    assert routing.expert.shape == (1, 9)
    np.testing.assert_array_equal(routing.expert[0, :3], [0, 1, 2])


def test_bias_moves_towards_equal_load():
    # 2408.15664 Algorithm 1: loads 4, 2, 0, 2 have mean 2.
    router = TokenChoice(4, selection_bias=True, bias_update_rate=0.01)
    state = {"bias": jnp.array([0.1, 0.0, 0.0, -0.1])}
    stats = {"bias": jnp.array([4.0, 2.0, 0.0, 2.0])}
    new = router.next_state(state, stats)["bias"]
    np.testing.assert_allclose(new, [0.09, 0.0, 0.01, -0.1], atol=1e-7)
    frozen = TokenChoice(4, selection_bias=True)
    np.testing.assert_array_equal(frozen.next_state(state, {})["bias"], state["bias"])


def test_bias_balances_a_skewed_router():
    # Every token prefers expert 0; with the rule at work all four end up with a share.
    rng = np.random.default_rng(0)
    table = rng.normal(size=(64, 4)) * 0.5 + np.array([2.0, 0.0, 0.0, 0.0])
    router = TokenChoice(4, top_k=1, scores="sigmoid", selection_bias=True, bias_update_rate=0.01)
    state = {"bias": jnp.zeros(4)}
    first = expert_load(route(router, table, dict(state))[0], 4)
    for _ in range(100):
        _, aux = route(router, table, dict(state))
        state = router.next_state(state, aux.stats)
    last = expert_load(route(router, table, dict(state))[0], 4)
    assert first.max() > 60 and last.max() < 24 and last.min() > 8


def test_balance_loss_by_hand():
    # E * sum f P: f = (2, 2, 1, 1) / 6 from the choices above, P the column means.
    routing, aux = route(TokenChoice(4, top_k=2, losses=("balance",)), np.log(SOFTMAX))
    table = SOFTMAX / SOFTMAX.sum(1, keepdims=True)
    np.testing.assert_array_equal(expert_load(routing, 4), [2, 2, 1, 1])
    expected = 4 * (np.array([2, 2, 1, 1]) / 6 * table.mean(0)).sum()
    np.testing.assert_allclose(aux.losses["balance"], expected, rtol=1e-6)
    uniform = balance(jnp.full((1, 3, 4), 0.25), jnp.full(4, 1.5))
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)


def test_router_z_by_hand():
    value = router_z(jnp.log(jnp.array([[[1.0, 1.0], [2.0, 6.0]]])))
    np.testing.assert_allclose(value, (np.log(2) ** 2 + np.log(8) ** 2) / 2, rtol=1e-6)


def test_router_returns_only_the_losses_asked_for():
    assert route(TokenChoice(4), np.log(SOFTMAX))[1].losses == {}
    _, aux = route(TokenChoice(4, losses=("router_z",)), np.log(SOFTMAX))
    assert list(aux.losses) == ["router_z"]


# Four tokens, two experts.
POOL = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])


def test_expert_choice_takes_the_best_tokens():
    # C = 4 / 2 * 1 = 2: expert 0 takes tokens 0 and 3, expert 1 takes 2 and 1; nobody takes twice.
    routing, _ = route(ExpertChoice(2, capacity=1.0), np.log(POOL))
    assert routing.slots_per_expert == 2
    gates = dense_gates(routing, 4, 2)[0]
    np.testing.assert_allclose(gates, [[0.9, 0], [0, 0.4], [0, 0.7], [0.8, 0]], rtol=1e-6)


def test_expert_choice_groups_are_independent():
    router = ExpertChoice(2, capacity=1.0)
    kernel = jnp.asarray(np.log(POOL), jnp.float32)
    x = jnp.eye(4).reshape(2, 2, 4)  # two groups of two tokens
    routing, _ = router.apply({"params": {"kernel": kernel}}, x, None, True)
    gates = dense_gates(routing, 2, 2)
    np.testing.assert_allclose(gates, [[[0.9, 0], [0, 0.4]], [[0, 0.7], [0.8, 0]]], rtol=1e-6)


def predictor(table):
    """Parameters whose prediction for token i is table[i]: linear in the identity, large inside."""
    table = np.asarray(table, np.float64)
    size, experts = table.shape
    # silu(20) = 20 and silu(0) = 0 up to 4e-8
    return {
        "dense_0": {"kernel": 20 * jnp.eye(size), "bias": jnp.zeros(size)},
        "dense_1": {"kernel": jnp.asarray(table / 20, jnp.float32), "bias": jnp.zeros(experts)},
    }


# What the predictor says, as probabilities.
PREDICTED = np.array([[0.7, 0.2], [0.4, 0.6], [0.1, 0.9], [0.8, 0.3]])


def test_diffmoe_training_pools_the_batch_and_learns_the_choice():
    # Algorithm 1: C = 4 / 2 * 1 = 2; the target is 1 where the expert took the token.
    router = DiffMoE(2, capacity=1.0, losses=("capacity_predictor",))
    state = {"threshold": jnp.array([0.5, 0.5]), "predictor": predictor(logit(PREDICTED))}
    routing, aux = route(router, np.log(POOL), state)
    gates = dense_gates(routing, 4, 2)[0]
    np.testing.assert_allclose(gates, [[0.9, 0], [0, 0.4], [0, 0.7], [0.8, 0]], rtol=1e-6)
    taken = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    bce = -(taken * np.log(PREDICTED) + (1 - taken) * np.log(1 - PREDICTED)).mean()
    np.testing.assert_allclose(aux.losses["capacity_predictor"], bce, rtol=1e-4)
    # Second largest prediction of each expert: 0.7 and 0.6.
    np.testing.assert_allclose(aux.stats["threshold"], [0.7, 0.6], rtol=1e-4)


def test_diffmoe_thresholds_are_an_average():
    router = DiffMoE(2, threshold_decay=0.95)
    state = {"threshold": jnp.array([0.5, 0.5])}
    new = router.next_state(state, {"threshold": jnp.array([0.7, 0.6])})
    expected = [0.95 * 0.5 + 0.05 * 0.7, 0.95 * 0.5 + 0.05 * 0.6]
    np.testing.assert_allclose(new["threshold"], expected, rtol=1e-6)


@pytest.mark.parametrize(("max_capacity", "dropped"), [(0.0, 0.0), (2.0, 0.0), (1.0, 1 / 4)])
def test_diffmoe_inference_counts_by_threshold_and_chooses_by_gate(max_capacity, dropped):
    # Algorithm 2 and the authors' code. Above 0.35: three tokens of expert 0, above 0.65: one of 1.
    # Expert 0's three best by gate are 0, 3 and 1; expert 1's best is 2.
    router = DiffMoE(2, capacity=1.0, max_capacity=max_capacity)
    state = {"threshold": jnp.array([0.35, 0.65]), "predictor": predictor(logit(PREDICTED))}
    routing, aux = route(router, np.log(POOL), state, train=False)
    gates = np.asarray(dense_gates(routing, 4, 2)[0])
    expected = np.array([[0.9, 0], [0.6, 0], [0, 0.7], [0.8, 0]])
    if dropped:  # C = 2 slots at most: the third best of expert 0 goes without
        expected[1, 0] = 0.0
    np.testing.assert_allclose(gates, expected, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["dropped"], dropped, atol=1e-6)
    np.testing.assert_allclose(aux.metrics["experts_per_token"], 4 / 4, rtol=1e-6)


# Three tokens, three experts; columns are what an expert chooses from.
SQUARE = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        # C = int(3 / 3 * 1) = 1: the largest of every column.
        (1.0, [[0.5, 0, 0], [0, 0.6, 0], [0, 0, 0.4]]),
        # C = 2: the two largest of every column. Nobody asks the predictor, who wants nothing.
        (2.0, [[0.5, 0.3, 0], [0, 0.6, 0.3], [0.4, 0, 0.4]]),
    ],
)
def test_diffmoe_without_predictor_takes_a_fixed_number(capacity, expected):
    router = DiffMoE(3, capacity=capacity, threshold="off")
    state = {"threshold": jnp.ones(3), "predictor": predictor(np.full((3, 3), -9.0))}
    routing, aux = route(router, np.log(SQUARE), dict(state), train=False)
    assert routing.slots_per_expert == int(capacity) and "dropped" not in aux.metrics
    np.testing.assert_allclose(dense_gates(routing, 3, 3)[0], expected, rtol=1e-6)
    trained, _ = route(router, np.log(SQUARE), dict(state), train=True)
    jax.tree.map(np.testing.assert_array_equal, routing, trained)


def test_capacity_095_without_predictor():
    """Figure 6's C = 0.95 of 40 tokens and 4 experts: int(40 / 4 * 0.95) = 9 tokens an expert."""
    router = DiffMoE(4, capacity=0.95, threshold="off")
    x = jax.random.normal(jax.random.key(0), (1, 40, 6))
    variables = router.init(jax.random.key(1), x, None, True)
    routing, _ = router.apply(variables, x, None, False)
    np.testing.assert_array_equal(expert_load(routing, 4), [9, 9, 9, 9])
    for small in (router, ExpertChoice(4, capacity=0.95)):  # the shapes of weights need no pool
        small.init(jax.random.key(1), x[:, :4], None, False)
    with pytest.raises(UserError, match="capacity = 0.95 gives each of .* = 4 less than one of th"):
        router.apply(variables, x[:, :4], None, False)


def test_a_predictor_for_choice_within_an_image():
    """DiffMoE with group = sample, Table 8's local dynamic routing: two images of two tokens.

    C = 1. Training: expert 0 predicts 0.7 and 0.4 in image 0, 0.1 and 0.8 in image 1, so the
    threshold moves to the mean of 0.7 and 0.8; expert 1 likewise to that of 0.6 and 0.9.
    """
    router, x = DiffMoE(2, capacity=1.0), jnp.eye(4).reshape(2, 2, 4)
    state = {"threshold": jnp.array([0.35, 0.65])}
    args = router, np.log(POOL), state | {"predictor": predictor(logit(PREDICTED))}
    _, aux = route(*args[:2], dict(args[2]), x=x)
    np.testing.assert_allclose(aux.stats["threshold"], [0.75, 0.75], rtol=1e-4)
    moved = router.next_state(state, aux.stats)["threshold"]
    np.testing.assert_allclose(moved, [0.95 * 0.35 + 0.0375, 0.95 * 0.65 + 0.0375], rtol=1e-4)

    # Above 0.35 of expert 0: both tokens of image 0, one of image 1; above 0.65 of expert 1: only
    # one of image 1. By gate that is token 1 of image 1 for expert 0, and token 0 for expert 1.
    routing, _ = route(*args[:2], dict(args[2]), train=False, x=x)
    gates = dense_gates(routing, 2, 2)
    np.testing.assert_allclose(gates, [[[0.9, 0], [0.6, 0]], [[0, 0.7], [0.8, 0]]], rtol=1e-6)

    off, _ = route(router.clone(threshold="off"), *args[1:2], dict(args[2]), train=False, x=x)
    static, _ = ExpertChoice(2).apply(
        {"params": {"kernel": jnp.asarray(np.log(POOL), jnp.float32)}}, x
    )
    jax.tree.map(np.testing.assert_array_equal, off, static)


def test_diffmoe_predictor_does_not_touch_the_tokens():
    router = DiffMoE(2, capacity=1.0, losses=("capacity_predictor",))
    x = jax.random.normal(jax.random.key(0), (1, 8, 4))
    variables = router.init(jax.random.key(1), x, None, True)

    def loss(x):
        return router.apply(variables, x, None, True)[1].losses["capacity_predictor"]

    np.testing.assert_array_equal(jax.grad(loss)(x), jnp.zeros_like(x))


def test_gradient_reaches_the_gate_through_the_weights():
    router = TokenChoice(4, top_k=2)
    x = jax.random.normal(jax.random.key(0), (1, 8, 6))
    params = router.init(jax.random.key(1), x, None, True)["params"]
    grad = jax.grad(lambda p: router.apply({"params": p}, x)[0].weight.sum())(params)
    assert jnp.abs(jax.tree.leaves(grad)[0]).max() > 1e-3


def test_the_loss_of_the_predictor_is_a_mean_binary_cross_entropy():
    value = predictor_loss(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3)))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
