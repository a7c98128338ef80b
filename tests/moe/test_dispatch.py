"""Every backend against `reference`, on easy and hard routings; and which of them is chosen."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_diffusion.kernels
from moe_diffusion.errors import UserError
from moe_diffusion.kernels.cpu import library
from moe_diffusion.moe.dispatch import BACKENDS, choose_backend, dispatch
from moe_diffusion.moe.routing import Routing, by_expert, by_token
from moe_diffusion.parallel.mesh import make_mesh
from tests.compiler import COMPILER, needs_compiler

D, H, E, K, T, G = 12, 20, 4, 2, 32, 2


def params(kind, bias, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)

    tree = {"up": normal(E, D, H), "down": normal(E, H, D)}
    if kind == "swiglu":
        tree["gate"] = normal(E, D, H)
    if bias:
        tree |= {"up_bias": normal(E, H), "down_bias": normal(E, D)}
        if kind == "swiglu":
            tree["gate_bias"] = normal(E, H)
    return tree


def token_choice(name):
    """Routings of tokens that choose, G groups."""
    rng = np.random.default_rng(1)
    uniform = np.argsort(rng.normal(size=(G, T, E)), axis=-1)[..., :K]
    expert = {
        "uniform": uniform,
        "skewed": np.where(rng.random((G, T, 1)) < 0.8, np.array([2, 1]), uniform),
        "all to one": np.broadcast_to(np.array([3, 0]), (G, T, K)),
        "empty expert": np.argsort(rng.normal(size=(G, T, E - 1)), axis=-1)[..., :K],
    }[name]
    return by_token(jnp.asarray(expert), jnp.asarray(rng.random((G, T, K)), jnp.float32))


def expert_choice(unused=False):
    rng = np.random.default_rng(2)
    slots = T // E * K
    token = np.argsort(rng.normal(size=(G, E, T)), axis=-1)[..., :slots]
    weight = jnp.asarray(rng.random((G, E, slots)), jnp.float32)
    used = jnp.asarray(rng.random((G, E, slots)) < 0.6) if unused else None
    return by_expert(jnp.asarray(token), weight, used)


ROUTINGS = {
    **{name: token_choice(name) for name in ("uniform", "skewed", "all to one", "empty expert")},
    "expert choice": expert_choice(),
    "unused slots": expert_choice(unused=True),
}


def values_and_gradients(routing, tree, kind, **options):
    x = jax.random.normal(jax.random.key(5), (G, T, D))
    out = jax.random.normal(jax.random.key(6), (G, T, D))

    def f(x, weight, tree):
        return dispatch(x, routing.replace(weight=weight), tree, kind=kind, **options)[0]

    def both(x, weight, tree):
        y, pull = jax.vjp(f, x, weight, tree)
        return y, pull(out)

    quick = {"xla_backend_optimization_level": 0}  # these programs run once
    return jax.jit(both, compiler_options=quick)(x, routing.weight, tree)


def masked(result, routing):
    """An unused slot's weight counts for nothing; its gradient neither."""
    y, (d_x, d_weight, d_params) = result
    return y, d_x, jnp.where(routing.expert < E, d_weight, 0), d_params


def cases():
    """(backend, routing, kind, bias); some of the interpreted kernels' are slow to compile."""
    every = [(name, "swiglu", False) for name in ROUTINGS]
    every += [("skewed", "gelu", True), ("unused slots", "gelu", True)]
    every += [("skewed", "silu", False), ("uniform", "swiglu", True)]
    quick = {
        "tpu": [("skewed", "gelu", True), ("empty expert", "swiglu", False)]
        + [("unused slots", "swiglu", False)],
        "gpu": [("skewed", "gelu", True), ("empty expert", "swiglu", False)],
        "ragged_dot": [("skewed", "gelu", True)],
    }
    for backend in sorted(set(BACKENDS) - {"reference"}):
        for case in every:
            marks = [] if case in quick.get(backend, every) else [pytest.mark.slow]
            marks += [needs_compiler] if backend == "cpu" else []
            yield pytest.param(backend, *case, marks=marks)


@functools.cache
def expected(routing, kind, bias):
    result = values_and_gradients(ROUTINGS[routing], params(kind, bias), kind, backend="reference")
    return masked(result, ROUTINGS[routing])


@pytest.mark.parametrize(("backend", "routing", "kind", "bias"), list(cases()))
def test_backends_equal_reference(backend, routing, kind, bias):
    """The Pallas kernels are interpreted here; tests/kernels compiles them."""
    options = {"capacity_factor": E} if backend == "slots" else {}
    tree = params(kind, bias)
    got = values_and_gradients(ROUTINGS[routing], tree, kind, backend=backend, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
        masked(got, ROUTINGS[routing]),
        expected(routing, kind, bias),
    )


def test_dispatch_by_hand():
    # Experts that only scale: silu(30 x) = 30 x for x = 1, so expert e multiplies by e + 1.
    tree = {
        "up": jnp.full((2, 1, 1), 30.0),
        "down": jnp.array([1.0, 2.0]).reshape(2, 1, 1) / 30.0,
    }
    routing = Routing(
        token=jnp.array([[0, 1, 0, 2]]),
        expert=jnp.array([[0, 1, 1, 2]]),  # the last is unused
        weight=jnp.array([[0.5, 0.25, 1.0, 9.0]]),
    )
    for backend in sorted(set(BACKENDS) - {"slots"} - (set() if COMPILER else {"cpu"})):
        y, dropped = dispatch(jnp.ones((1, 3, 1)), routing, tree, kind="silu", backend=backend)
        assert dropped is None
        np.testing.assert_allclose(y[0, :, 0], [0.5 * 1 + 1.0 * 2, 0.25 * 2, 0.0], rtol=1e-5)


def test_slots_drop_what_comes_last():
    # Six tokens, all to expert 0 of two, C = ceil(factor * 6 / 2) = 3 or 6.
    routing = by_token(jnp.zeros((1, 6, 1), jnp.int32), jnp.ones((1, 6, 1)))
    tree = {"up": jnp.full((2, 1, 1), 30.0), "down": jnp.ones((2, 1, 1)) / 30.0}
    for factor, served, share in ((1.0, [1, 1, 1, 0, 0, 0], 0.5), (2.0, [1] * 6, 0.0)):
        y, dropped = dispatch(jnp.ones((1, 6, 1)), routing, tree, kind="silu", backend="slots",
                              capacity_factor=factor)  # fmt: skip
        np.testing.assert_allclose(y[0, :, 0], served, rtol=1e-5)
        np.testing.assert_allclose(dropped, share)


def test_fixed_slots_drop_nothing():
    x, tree = jnp.ones((G, T, D)), params("silu", False)
    for backend in (None, "slots"):
        assert dispatch(x, ROUTINGS["expert choice"], tree, kind="silu", backend=backend)[1] is None


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("routing", ["uniform", "expert choice"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "gpu"])
def test_what_is_chosen(platform, dtype, dropout, routing, compiler, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: compiler)
    if platform == "tpu" and not dropout:
        expected = "tpu"
    elif platform == "cpu" and not dropout and dtype == "float32" and compiler:
        expected = "cpu"
    elif routing == "expert choice":
        expected = "slots"
    else:
        expected = "blocked" if platform == "cpu" or dropout else "gpu"
    name, why = choose_backend(platform, ROUTINGS[routing], dtype, dropout)
    assert name == expected and BACKENDS[name].what in why
    named, why = choose_backend(platform, ROUTINGS[routing], dtype, dropout, name=name)
    assert named == name and "named by model.moe.backend" in why


def test_why_names_what_was_passed_over(monkeypatch):
    why = functools.partial(choose_backend, "cpu", ROUTINGS["uniform"], "bfloat16", False)
    assert "not cpu, which computes in float32, not bfloat16; not slots, which drops" in why()[1]
    monkeypatch.setattr(library, "available", lambda: False)
    _, why = choose_backend("cpu", ROUTINGS["expert choice"], "float32", False)
    assert "not cpu, which needs a C++ compiler" in why and "slots" not in why.split(";", 1)[1]


@pytest.mark.parametrize(
    ("platform", "dropout", "name", "message"),
    [
        ("cpu", False, "magic", "magic is unknown: choose auto or one of cpu, tpu, slots, gpu, bl"),
        (
            "tpu",
            True,
            "tpu",
            "tpu has no dropout inside experts: choose auto or slots, blocked, re",
        ),
        (
            "cuda",
            False,
            "cpu",
            "cpu does not run on a GPU: choose auto or slots, gpu, blocked, ref",
        ),
        ("cuda", False, "tpu", "tpu does not run on a GPU: choose auto or slots, gpu, blocked"),
        ("tpu", False, "gpu", "gpu does not run on a TPU: choose auto or tpu, slots, blocked"),
    ],
)
def test_a_named_backend_that_does_not_suit(platform, dropout, name, message):
    with pytest.raises(UserError, match=f"model.moe.backend = {message}"):
        choose_backend(platform, ROUTINGS["uniform"], "float32", dropout, name)


def test_every_backend_has_its_source():
    folder = Path(moe_diffusion.kernels.__file__).parent
    sources = [backend.source for backend in BACKENDS.values()]
    assert len(set(sources)) == len(sources) and all((folder / s).exists() for s in sources)


def test_bfloat16_stays_close():
    tree = params("swiglu", False)
    x = jax.random.normal(jax.random.key(5), (G, T, D))
    full, _ = dispatch(x, ROUTINGS["skewed"], tree, kind="swiglu", backend="reference")
    for backend in ("blocked", "slots"):
        half, _ = dispatch(
            x.astype(jnp.bfloat16),
            ROUTINGS["skewed"],
            tree,
            kind="swiglu",
            backend=backend,
            capacity_factor=E,
        )
        assert half.dtype == jnp.bfloat16
        scale = jnp.abs(full).max()
        assert jnp.abs(half.astype(jnp.float32) - full).max() < 0.03 * scale


@pytest.mark.parametrize("name", ["skewed", "expert choice"])
def test_groups_split_over_devices_give_the_same(name):
    from ml_collections import ConfigDict

    routing, tree = ROUTINGS[name], params("gelu", True)
    expected = values_and_gradients(routing, tree, "gelu")
    mesh = make_mesh(ConfigDict({"preset": "dp"}), jax.devices()[:G])
    with jax.set_mesh(mesh):
        got = values_and_gradients(routing, tree, "gelu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("name", ["uniform", "expert choice"])
def test_gradients_scatter_nothing_and_keep_no_copy_of_the_weights(name):
    # No scatter-add anywhere, and no array of [E, rows, width], which a dense gradient would make.
    routing, tree = ROUTINGS[name], params("swiglu", False)

    def loss(x, weight, tree):
        return dispatch(x, routing.replace(weight=weight), tree, kind="swiglu")[0].sum()

    x = jnp.ones((G, T, D))
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, routing.weight, tree).as_text()
    assert "scatter" not in text
    if name == "uniform":
        rows = G * T * K
        assert f"{E}x{rows}x" not in text
