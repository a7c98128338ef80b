"""ProMoE's routers: who goes where, with what weight; the contrastive loss; dispatch and meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.moe.layer import Experts, MoE
from moe_diffusion.moe.routers import ProMoEExpertChoice, ProMoETokenChoice
from moe_diffusion.moe.routers.promoe import contrast_loss
from moe_diffusion.parallel.mesh import make_mesh
from tests.moe.oracle import dense_gates

G, T, D, E = 8, 12, 6, 5  # four experts with prototypes and the null expert
ROUTERS = {
    "top 1": ProMoETokenChoice(E, top_k=1, scores="identity"),
    "top 2": ProMoETokenChoice(E, scores="identity"),
    "expert choice": ProMoEExpertChoice(E, scores="identity", capacity=1.5),
    "no null expert": ProMoETokenChoice(E, top_k=1, scores="identity", null_expert=False),
    "no null expert, by expert": ProMoEExpertChoice(E, scores="identity", null_expert=False),
}
NULL = np.arange(G) % 3 == 1  # three of the eight samples


def tokens():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(G, T, D)), jnp.float32)


def is_null():
    return jnp.repeat(jnp.asarray(NULL)[:, None], T, axis=1)


def applied(router, x, null, **options):
    """routing, aux, kernel."""
    router = router.clone(**options)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(D, router.num_routed)), jnp.float32)
    routing, aux = jax.jit(router.apply)({"params": {"kernel": kernel}}, x, null)
    return routing, aux, np.asarray(kernel)


def gates(router, **options):
    routing, _, kernel = applied(router, tokens(), is_null(), **options)
    return np.asarray(dense_gates(routing, T, E)), cosines(kernel)


def cosines(kernel):
    x = np.asarray(tokens())
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ (kernel / np.linalg.norm(kernel, axis=0))


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_without_label_have_an_expert_of_their_own(name):
    weights, _ = gates(ROUTERS[name])
    if ROUTERS[name].null_expert:
        np.testing.assert_array_equal(weights[..., -1], np.repeat(NULL[:, None], T, axis=1))
        np.testing.assert_array_equal(weights[NULL, :, :-1], 0)
    else:
        assert (weights[NULL] != 0).any() and (weights[~NULL, :, -1] != 0).any()


@pytest.mark.parametrize("scores", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_take_the_nearest_prototypes(scores, top_k):
    weights, cosine = gates(ROUTERS["top 1"], scores=scores, top_k=top_k)
    exp = np.exp(cosine)
    gate = {
        "identity": cosine,
        "sigmoid": exp / (1 + exp),
        "softmax": exp / exp.sum(-1, keepdims=True),
    }[scores]
    rank = np.argsort(np.argsort(-cosine, axis=-1), axis=-1)
    expected = np.where(rank < top_k, gate, 0)
    np.testing.assert_allclose(weights[~NULL, :, :-1], expected[~NULL], atol=1e-6)


@pytest.mark.parametrize("scores", ["identity", "sigmoid", "softmax"])
def test_experts_take_the_nearest_tokens_of_a_sample(scores):
    weights, cosine = gates(ROUTERS["expert choice"], scores=scores)
    exp = np.exp(cosine)
    gate = {
        "identity": cosine,
        "sigmoid": exp / (1 + exp),
        "softmax": exp / exp.sum(1, keepdims=True),  # over the tokens
    }[scores]
    slots = int(T / (E - 1) * 1.5)
    rank = np.argsort(np.argsort(-cosine, axis=1), axis=1)
    expected = np.where(rank < slots, gate, 0)
    np.testing.assert_allclose(weights[~NULL, :, :-1], expected[~NULL], atol=1e-6)


@pytest.mark.parametrize(("tokens_", "slots"), [(12, 3), (3, 1), (1, 1)])
def test_an_expert_always_takes_a_token(tokens_, slots):
    routing, _, _ = applied(ProMoEExpertChoice(E, scores="identity"), tokens()[:, :tokens_], None)
    load = np.bincount(np.asarray(routing.expert).ravel(), minlength=E + 1)
    np.testing.assert_array_equal(load[:-1], [G * slots] * 4 + [0])


@pytest.mark.parametrize("scores", ["identity", "sigmoid", "softmax"])
def test_in_a_mixed_group_experts_choose_among_labelled_tokens(scores):
    x, null = tokens().reshape(1, G * T, D), is_null().reshape(1, G * T)
    routing, _, _ = applied(ROUTERS["expert choice"], x, null, scores=scores)
    weights = np.asarray(dense_gates(routing, G * T, E))[0]
    np.testing.assert_array_equal(weights[:, -1], null[0])
    assert (weights[null[0], :-1] == 0).all()
    assert ((weights[:, :-1] != 0).sum(0) == int(G * T / (E - 1) * 1.5)).all()


def contrast_by_loops(kernel, groups, temperature):
    """Cross-entropies of the authors' loops; groups: one list of tokens per expert, in each."""
    values = []
    unit = kernel / np.linalg.norm(kernel, axis=0)
    for taken in groups:
        valid = [e for e, rows in enumerate(taken) if len(rows)]
        means = np.stack([taken[e].mean(0) for e in valid])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        logits = unit[:, valid].T @ means.T / temperature
        values += list(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    return np.mean(values)


@pytest.mark.parametrize("name", ["top 1", "top 2", "expert choice"])
def test_contrast_is_that_of_the_loops(name):
    """Token choice: means over the batch, and an idle expert is left out. Else sample by sample."""
    x = tokens()[:1, :3] if name == "top 1" else tokens()
    null = is_null()[: len(x), : x.shape[1]]
    options = {"losses": ("contrast",), "contrast_temperature": 0.3}
    routing, aux, kernel = applied(ROUTERS[name], x, null, **options)
    taken = np.asarray(dense_gates(routing, x.shape[1], E))[..., :-1] != 0
    batches = [(np.asarray(x), taken)]
    if name == "expert choice":
        batches = list(zip(np.asarray(x)[~NULL], taken[~NULL], strict=True))
    groups = [[x[taken[..., e]] for e in range(E - 1)] for x, taken in batches]
    if name == "top 1":
        assert any(len(rows) == 0 for rows in groups[0])
    np.testing.assert_allclose(
        aux.losses["contrast"], contrast_by_loops(kernel, groups, 0.3), rtol=1e-5
    )


def test_contrast_by_hand():
    """Two orthogonal prototypes on their own tokens: log(1 + exp(-1 / temperature))."""
    x, taken = jnp.eye(2)[None], jnp.eye(2)[None]
    for pooled in (True, False):
        own = contrast_loss(3 * jnp.eye(2), x, taken, 0.5, pooled)
        other = contrast_loss(3 * jnp.eye(2), x, taken[:, ::-1], 0.5, pooled)
        np.testing.assert_allclose([own, other], [np.log1p(np.exp(-2)), np.log1p(np.exp(2))], 1e-6)


@pytest.mark.parametrize("name", ["top 2", "expert choice"])
def test_a_batch_without_labels_has_no_contrast_and_no_nan(name):
    router = ROUTERS[name].clone(losses=("contrast",), scores="softmax")
    everything = jnp.ones((G, T), bool)
    kernel = tokens()[0, : E - 1].T

    def loss(kernel, x):
        routing, aux = router.apply({"params": {"kernel": kernel}}, x, everything)
        return aux.losses["contrast"] + routing.weight.sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(kernel, tokens())
    assert value == G * T
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def layer(name, backend=None):
    kinds = {"shard": ProMoETokenChoice, "sample": ProMoEExpertChoice}
    (group,) = (group for group, kind in kinds.items() if isinstance(ROUTERS[name], kind))
    fields = {"scores": "identity"} | ({"top_k": 1} if group == "shard" else {})
    return MoE(
        make_router=partial(kinds[group], E, losses=("contrast",), **fields),
        make_experts=partial(Experts, E, 7, kind="gelu", use_bias=True),
        group=group,
        backend=backend,
        capacity_factor=float(E),  # so that `slots` drops nothing
    )


def params_of(name):
    shapes = jax.eval_shape(
        partial(layer(name).init, train=True), jax.random.key(0), tokens(), jnp.asarray(NULL)
    )
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )


def outcome(name, backend=None):
    """Output, contrastive loss and the gradients of their sum with a weight on every output."""
    moe, x = layer(name, backend), tokens()
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=x.shape), jnp.float32)

    def loss(params, x):
        y, sown = moe.apply({"params": params}, x, jnp.asarray(NULL), True, mutable=["losses"])
        contrast = sown["losses"]["contrast"]
        return (y * cotangent).sum() + contrast, (y, contrast)

    run = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return run(params_of(name), x)


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("name", ["top 1", "expert choice"])
def test_backends_and_devices_agree(name):
    expected = outcome(name, "reference")
    for backend in ("blocked", "slots"):
        assert_same(outcome(name, backend), expected)
    mesh = make_mesh(ConfigDict({"preset": "dp"}), jax.devices()[:G])
    with jax.set_mesh(mesh):
        assert_same(outcome(name), expected)
