"""Routing statistics seen while sampling, and DiffMoE's constant thresholds."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import capacity_search
from moe_diffusion.evaluation.routing_stats import (
    RoutingObserver,
    observe,
    per_sample,
    save_stats,
)
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.dit import DiT

LABELS = {"label": np.array([0, 1, 1], np.int32)}
HALF = np.full(3, 0.5, np.float32)


def make(router: str, *overrides: str):
    """Config, model and random variables of three blocks, one and two of them MoE, width 16."""
    config = configs.load(
        f"configs/digits.py:router={router}",
        [
            *("model.depth=3", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=4"),
            *("model.moe.num_experts=4", "model.moe.hidden_size=8", "model.moe.interleave=false"),
            *("model.moe.skip_first=1", "sampling.steps=2", "sampling.joint=true", *overrides),
        ],
    )
    model = build(config.model)
    rng = np.random.default_rng(0)

    def random(leaf):  # also what starts at zero, so that all images differ
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)

    shapes = abstract_variables(model)
    thresholds = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("router_state", {})
    )
    variables = {"params": jax.tree.map(random, shapes["params"]), "router_state": thresholds}
    return config, model, variables


@pytest.fixture(scope="module")
def diffmoe():
    """Thresholds 0, no bound: all tokens meet all four experts."""
    config, model, variables = make("diffmoe", "model.router.max_capacity=0")
    return config, model, variables, jax.jit(lambda *args: observe(model, *args, False))


def noise(batch: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, 8, 8, 1))


def test_counts_are_those_of_the_routing(diffmoe):
    """Against the routers' records, added up token by token."""
    _, model, variables, observed = diffmoe
    args = (capacity_search.with_threshold(variables, 0.5), noise(), HALF, LABELS)

    @jax.jit
    def recorded(*args):
        return model.apply(
            *args,
            False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "router",
        )

    plain, sown = recorded(*args)
    output, counts, dropped = observed(*args)
    np.testing.assert_allclose(output, plain, atol=1e-6)
    assert counts.shape == (2, 3) and dropped == 0

    layers = sown["intermediates"]["layers_1"]["block_0"]["moe"]["router"]["__call__"][0][0]
    expected = np.zeros((2, 3))
    for layer in range(2):
        for token, expert in zip(layers.token[layer, 0], layers.expert[layer, 0], strict=True):
            if expert < 4:
                expected[layer, token // 4] += 1 / 4  # four patches an image
    np.testing.assert_allclose(counts, expected, rtol=1e-6)
    assert len(np.unique(expected)) > 2  # images do get different shares


def test_slots_by_sample_worked_by_hand():
    """Two samples of two tokens, in one group and in a group each; two slots are unused."""
    token = np.array([[0, 3, 1, 2, 2, 0]])
    used = np.array([[True, True, True, True, False, False]])
    pooled = per_sample(used, token, np.zeros((1, 4, 5)), batch=2)
    np.testing.assert_array_equal(pooled, [1, 1])  # tokens 0, 1 and 3, 2
    token, used = np.array([[0, 1, 0], [1, 1, 1]]), np.array([[True] * 3, [True, False, False]])
    alone = per_sample(used, token, np.zeros((2, 2, 5)), batch=2)
    np.testing.assert_array_equal(alone, [1.5, 0.5])


def test_token_choice_spends_top_k_everywhere():
    config, model, variables = make("token_choice")
    observer = RoutingObserver(model)
    images = make_sampler(observer, config)(variables, noise(), LABELS)
    assert images.shape == (3, 8, 8, 1)
    stats = observer.stats()
    assert stats["c_infer_avg"] == 2 and stats["dropped"] == 0
    assert stats["blocks"] == [1, 2] and stats["times"] == [0, 0.5, 1]
    assert stats["per_layer"] == [2, 2] and stats["per_time"] == [2, 2, 2]
    assert stats["per_layer_and_time"] == [[2, 2, 2], [2, 2, 2]]
    assert stats["per_class"] == {"0": 2, "1": 2, "null": 2}


def test_diffmoe_averages_agree(diffmoe):
    config, model, variables, _ = diffmoe
    variables = capacity_search.with_threshold(variables, 0.5)
    observer = RoutingObserver(model)
    make_sampler(observer, config)(variables, noise(), LABELS)
    stats = observer.stats()
    grid = np.array(stats["per_layer_and_time"])
    assert grid.shape == (2, 3) and 0 < grid.min() < grid.max() < 4
    np.testing.assert_allclose(stats["per_time"], grid.mean(0))
    # Heun evaluates the time in the middle twice, the ends once.
    np.testing.assert_allclose(stats["per_layer"], grid @ [0.25, 0.5, 0.25])
    assert stats["c_infer_avg"] == pytest.approx(np.mean(stats["per_layer"]))
    classes = stats["per_class"]
    assert classes["0"] != classes["1"] != classes["null"]
    conditional = (classes["0"] + 2 * classes["1"]) / 3  # as many evaluations as without label
    assert stats["c_infer_avg"] == pytest.approx((conditional + classes["null"]) / 2)

    observer.reset()
    with pytest.raises(UserError, match="nothing has been sampled"):
        observer.stats()


class Coloured(DiT):
    """A DiT whose condition has another name than "label"."""

    def __call__(self, x, t, cond, train, capture=()):
        return super().__call__(x, t, {"label": cond["colour"]}, train)

    @nn.nowrap
    def cond_spec(self):
        return {"colour": super().cond_spec()["label"]}

    @nn.nowrap
    def null(self, cond):
        return {"colour": super().null({"label": cond["colour"]})["label"]}


def test_a_model_without_labels_has_no_classes(tmp_path):
    config, model, variables = make("token_choice")
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    coloured = Coloured(**fields | {"parent": None})
    observer = RoutingObserver(coloured)
    make_sampler(observer, config)(variables, noise(), {"colour": LABELS["label"]})
    stats = observer.stats()
    assert "per_class" not in stats and stats["per_layer"] == [2, 2]
    _, picture = save_stats(stats, tmp_path / "stats.json")
    with Image.open(picture) as image:
        assert image.width > 400


def test_a_dense_model_has_no_routing():
    with pytest.raises(UserError, match="dense"):
        RoutingObserver(build(configs.load("configs/digits.py:router=dense").model))


def test_json_and_picture(tmp_path):
    stats = {
        "c_infer_avg": 1.5,
        "blocks": [1, 3],
        "times": [0.0, 0.5, 1.0],
        "per_layer_and_time": [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]],
        "per_class": {str(label): 1 + label / 100 for label in range(40)} | {"null": 1.5},
    }
    file, picture = save_stats(stats, tmp_path / "new" / "stats.json")
    assert json.loads(file.read_text()) == stats
    pixels = np.asarray(Image.open(picture))
    assert picture.name == "stats.png" and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert sorted(path.name for path in file.parent.iterdir()) == ["stats.json", "stats.png"]


# --- thresholds ----------------------------------------------------------------------------------


def test_a_constant_of_the_config_is_that_of_the_search(diffmoe):
    config, model, variables, observed = diffmoe
    constant = ConfigDict(config)
    constant.model.router.threshold = "0.45"
    model = build(constant.model)
    by_config = jax.jit(lambda *args: observe(model, *args, False))(
        variables, noise(), HALF, LABELS
    )
    by_search = observed(capacity_search.with_threshold(variables, 0.45), noise(), HALF, LABELS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_config, by_search)
    dynamic, counts, _ = observed(
        capacity_search.with_threshold(variables, "dynamic"), noise(), HALF, LABELS
    )
    assert np.all(counts == 4) and np.abs(dynamic - by_config[0]).max() > 0.01


def test_search(diffmoe):
    config, _, variables, _ = diffmoe
    config = ConfigDict(config)
    config.sampling.sampler, config.sampling.cfg = "euler", 1.0
    seen = []
    rows = capacity_search.search(
        config,
        variables,
        ["dynamic", 0.3, 0.6, 0.999],
        LABELS,
        batch_size=3,
        metric=lambda images, labels: {"brightness": float(images.mean())},
        report=seen.append,
    )
    assert seen == rows and [row["threshold"] for row in rows] == ["dynamic", 0.3, 0.6, 0.999]
    capacity = [row["c_infer_avg"] for row in rows]
    assert capacity[0] == 4 and capacity == sorted(capacity, reverse=True)
    assert len(set(capacity)) == 4 and capacity[-1] < 0.2
    experts = 2 * 4 * (16 * 8 + 8 + 8 * 16 + 16)  # layers, experts, an MLP with bias
    assert rows[0]["activated_params"] - rows[2]["activated_params"] == pytest.approx(
        experts * (4 - capacity[2]) / 4, abs=1
    )
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]
    assert len({row["brightness"] for row in rows}) == 4


def test_search_needs_diffmoe():
    config = configs.load("configs/digits.py:router=token_choice")
    with pytest.raises(UserError, match="thresholds are DiffMoE's"):
        capacity_search.search(config, {}, [0.5], LABELS)


def test_a_bound_drops():
    _, model, variables = make("diffmoe", "model.router.max_capacity=1")
    _, counts, dropped = jax.jit(lambda *args: observe(model, *args, False))(
        variables, noise(), HALF, LABELS
    )
    # Four experts are wanted, two are allowed; which images get them, the gate says.
    assert counts.mean() == 2 and dropped == 0.5


def test_thresholds_that_are_none():
    for text in ("often", "1.5", "-0.1", "nan"):
        with pytest.raises(UserError, match=r"model\.router\.threshold"):
            configs.load(
                "configs/digits.py:router=diffmoe", [f"--config.model.router.threshold={text}"]
            )
