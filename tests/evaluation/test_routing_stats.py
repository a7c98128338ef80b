"""Routing statistics seen while sampling, and DiffMoE's constant thresholds."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion.conditions import Field
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.categories import Categories
from moe_diffusion.evaluation.observed import expert_counts, observe, token_maps
from moe_diffusion.evaluation.routing_stats import RoutingObserver, save_stats
from moe_diffusion.evaluation.runs import RunImages, with_threshold
from moe_diffusion.figures.routing import experts_picture
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.dit import DiT
from moe_diffusion.models.stack import Model, Stack
from moe_diffusion.moe.router import Aux, Router
from moe_diffusion.moe.routing import Routing, by_token

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
    args = (with_threshold(variables, 0.5), noise(), HALF, LABELS)

    @jax.jit
    def recorded(*args):
        return model.apply(
            *args,
            False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "router",
        )

    plain, sown = recorded(*args)
    output, seen = observed(*args)
    np.testing.assert_allclose(output, plain, atol=1e-6)
    assert seen["expert_counts"].shape == (2, 3, 4) and not seen["dropped"].any()

    layers = sown["intermediates"]["layers_1"]["block_0"]["moe"]["router"]["__call__"][0][0]
    expected = np.zeros((2, 3, 4))
    for layer in range(2):
        for token, expert in zip(layers.token[layer, 0], layers.expert[layer, 0], strict=True):
            if expert < 4:
                expected[layer, token // 4, expert] += 1 / 4  # four patches an image
    np.testing.assert_allclose(seen["expert_counts"], expected, rtol=1e-6)
    assert len(np.unique(expected)) > 2  # images do get different shares


NONE = 2  # marks an unused slot of two experts


def test_counts_by_sample_worked_by_hand():
    """Two samples of two tokens, in one group and in a group each."""
    token = np.array([[0, 3, 1, 2, 3, 0]])
    expert = np.array([[0, 0, 0, 1, 1, NONE]])
    pooled = expert_counts(Routing(token, expert, None), 4, 2, batch=2)
    # Sample 0: both tokens use expert 0. Sample 1: token 3 uses both, token 2 uses expert 1.
    np.testing.assert_array_equal(pooled, [[1, 0], [0.5, 1]])
    token, expert = np.array([[0, 1, 0], [1, 1, 1]]), np.array([[0, 0, 1], [1, NONE, NONE]])
    alone = expert_counts(Routing(token, expert, None), 2, 2, batch=2)
    np.testing.assert_array_equal(alone, [[1, 0.5], [0, 0.5]])


def test_maps_of_a_routing_made_by_hand():
    """Two samples of five tokens in one pool; the first is no patch of the 2 x 2 image."""
    token = np.array([[0, 1, 1, 2, 4, 5, 6, 8, 8, 9]])
    expert = np.array([[1, 0, 1, 1, 0, 0, NONE, 0, 1, 1]])
    weight = np.array([[0.9, 0.2, 0.3, 0.1, 0.5, 0.9, 0.0, -0.1, -0.2, 0.4]], np.float32)
    strongest, used = token_maps(Routing(token, expert, weight), 10, 2, (2, 2, 2))
    # Sample 0, tokens 1, 2, 3, 4: of two experts the heavier, 1; 1; none; 0.
    np.testing.assert_array_equal(strongest[0], [[1, 1], [-1, 0]])
    np.testing.assert_array_equal(used[0], [[2, 1], [0, 1]])
    # Sample 1, tokens 6, 7, 8, 9: an unused slot; none; two with weights below 0; 1.
    np.testing.assert_array_equal(strongest[1], [[-1, -1], [0, 1]])
    np.testing.assert_array_equal(used[1], [[0, 0], [2, 1]])


def test_maps_leave_out_the_class_tokens_of_jit():
    """Against the routers' records; block 1 sees three class tokens before four patches."""
    sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "image_size": 8}
    sizes |= {"patch_size": 4, "num_classes": 10, "moe.num_experts": 4, "moe.hidden_size": 8}
    sizes |= {"moe.shared_hidden_size": 8, "moe.interleave": "false", "moe.skip_first": 0}
    sizes |= {"jit.bottleneck": 4, "jit.in_context_tokens": 3, "jit.in_context_start": 1}
    sizes |= {"router.n_group": 1, "router.topk_group": 1, "dtype": "float32"}
    model = build(
        configs.load(
            "configs/jitmoe_b16.py", [f"model.{key}={value}" for key, value in sizes.items()]
        ).model
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype),
        abstract_variables(model),
    )
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    records = []

    def listen(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, Router) and context.method_name == "__call__":
            jax.debug.callback(
                lambda *lists: records.append(lists),
                result[0].expert,
                result[0].weight,
                ordered=True,
            )
        return result

    with nn.intercept_methods(listen):
        seen = jax.jit(lambda *args: observe(model, *args, LABELS, False, maps=True)[1])(
            variables, images, HALF
        )
    jax.effects_barrier()
    tokens = [4, 7]
    assert [expert.size // 3 // 2 for expert, _ in records] == tokens
    for layer, (expert, weight) in enumerate(records):
        expert, weight = (a.reshape(3, tokens[layer], 2)[:, -4:] for a in (expert, weight))
        best = np.take_along_axis(expert, weight.argmax(-1)[..., None], -1).reshape(3, 2, 2)
        np.testing.assert_array_equal(seen["strongest_expert"][layer], best)
        assert np.all(seen["experts_used"][layer] == 2)


class SignRouter(Router):
    """A token v uses expert 0 if v < 0, expert 1 if v > 0, and both if |v| = 3; weight |v|."""

    capacity: float = 1.0

    def __call__(self, x, is_null=None, train=False):
        value = x[..., 0]
        wanted = jnp.stack([(value < 0) | (abs(value) == 3), (value > 0) | (value == -3)], -1)
        expert = jnp.where(wanted, jnp.arange(2), 2)
        return by_token(expert, jnp.repeat(abs(value)[..., None], 2, -1)), Aux({}, {}, {})


class SignLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        SignRouter(2, name="router")(x)
        return -x


class SignModel(Model):
    """Two layers whose router sees the three pixels and the time, and then their negatives."""

    input_shape = (1, 3, 1)
    grid = (1, 3)

    @property
    def stack(self):
        return Stack(("moe", "moe"), lambda kind: SignLayer)

    @nn.compact
    def __call__(self, x, t, cond, train):
        carry = x.reshape(len(x), 3, 1) + t[:, None, None]
        return self.stack(carry)[0].reshape(x.shape)

    def cond_spec(self):
        return {"label": Field((), "int32", 2)}

    def null(self, cond):
        return {"label": jnp.full_like(cond["label"], 2)}

    def routers(self):
        return {"layers_0/block_0/router": SignRouter(2)}


# Pixels of classes 0 and 1, and which experts they use at times 0 and 1:
#   time 0, layer 0    1 1 3 -> {1} {1} {0, 1}      -1 1 0 -> {0} {1} {}
#   time 0, layer 1    their negatives: 0 for 1     {1} {0} {}
#   time 1, layer 0    2 2 4 -> {1} {1} {1}          0 2 1 -> {} {1} {1}
#   time 1, layer 1    {0} {0} {0}                   {} {0} {0}
PIXELS = np.array([[1, 1, 3], [-1, 1, 0]], np.float32).reshape(2, 1, 3, 1)
ALONE = [[[1 / 3, 1], [1, 1 / 3]], [[0, 1], [1, 0]]]  # class 0: [times][layers][experts]
OTHER = [[[1 / 3, 1 / 3], [1 / 3, 1 / 3]], [[0, 2 / 3], [2 / 3, 0]]]  # class 1


def sign_sampler(observer, times=(0.0, 1.0), doubled=None):
    """Evaluates the model at these times and returns x; doubled(x, null) joins two halves."""

    @jax.jit
    def sampler(variables, x, labels):
        joined, asked = x, labels
        if doubled:
            joined, asked = doubled(x, x), doubled(labels, jnp.full_like(labels, 2))
        for t in times:
            observer.apply(variables, joined, jnp.full(len(joined), t), {"label": asked}, False)
        return x

    return sampler


def test_averages_worked_by_hand():
    observer = RoutingObserver(SignModel(), maps=2)
    sampler = sign_sampler(observer)
    sampler({}, PIXELS, np.array([0, 1]))
    stats = observer.stats()
    each = np.array([ALONE, OTHER])  # [classes][times][layers][experts]
    by_time = each.mean(0).swapaxes(0, 1)
    assert stats["blocks"] == [0, 1] and stats["num_experts"] == 2 and stats["evaluations"] == 4
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(stats["selection_by_time"], by_time)
    close(stats["capacity_by_time"], 2 * by_time)
    # Layer 0: expert 0 has (1/3 + 1/3 + 0 + 0) / 4, expert 1 (1 + 1/3 + 1 + 2/3) / 4.
    close(stats["selection"], [[1 / 6, 3 / 4], [3 / 4, 1 / 6]])
    close(stats["per_layer"], [11 / 12, 11 / 12])
    close(stats["share"], [[2 / 11, 9 / 11], [9 / 11, 2 / 11]])
    close(stats["max_over_mean"], [18 / 11, 18 / 11])
    close(stats["per_time"], [(4 / 3 + 2 / 3) / 2, (1 + 2 / 3) / 2])
    close(stats["c_infer_avg"], 11 / 12)
    close(stats["per_class"]["0"], (4 / 3 + 1) / 2)
    close(stats["per_class"]["1"], 2 / 3)
    close(stats["selection_by_class"]["0"], [[1 / 6, 1], [1, 1 / 6]])
    close(stats["selection_by_class"]["1"], [[1 / 6, 1 / 2], [1 / 2, 1 / 6]])
    assert stats["experts_in_use_by_class"] == {"0": [2, 2], "1": [2, 2]}
    assert "conditional" not in stats and "null" not in stats["per_class"]

    tokens = stats["tokens"]
    assert tokens["times"] == [0, 1]
    # [images][layers][times][row]; pixel 3 has two experts of equal weight: the first counts.
    assert np.array(tokens["strongest"])[:, :, :, 0].tolist() == [
        [[[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]],
        [[[0, 1, -1], [-1, 1, 1]], [[1, 0, -1], [-1, 0, 0]]],
    ]
    assert np.array(tokens["used"])[0, :, :, 0].tolist() == [[[1, 1, 2], [1, 1, 1]]] * 2


def test_images_and_tokens_worked_by_hand():
    """What is seen of layer 1 by image and by token, and how much both layers change their input.

    Of prompts, categories take the place of labels. Layer 1 sees the negatives: time 0 {0} {0}
    {0, 1} and {1} {0} {}; time 1 {0} {0} {0} and {} {0} {0}. Each layer turns v into -v, a change
    of 4 v^2: at time 0 the images' means are 4 (1 + 1 + 9) / 3 and 4 (1 + 1 + 0) / 3, at time 1
    4 (4 + 4 + 16) / 3 and 4 (0 + 4 + 1) / 3.
    """
    observer = RoutingObserver(SignModel(), looked_into=[1])
    sorts = Categories("prompt", ("animals", "food", "people"), np.array([2, 0]), ())
    sampler = observer.watch(sign_sampler(observer), 2, sorts)
    sampler({}, PIXELS, np.array([0, 1]))
    stats = observer.stats()
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    assert stats["looked_into"] == [1] and stats["class_of_image"] == ["people", "animals"]
    close(stats["selection_by_image"], [[[1, 1 / 6], [1 / 2, 1 / 6]]])
    close(stats["selection_by_token"], [[[2 / 4, 1 / 4], [4 / 4, 0], [3 / 4, 1 / 4]]])
    assert list(stats["selection_by_class"]) == ["animals", "people"]
    close(stats["selection_by_class"]["people"], [[1 / 6, 1], [1, 1 / 6]])

    assert stats["layers"] == [0, 1] and "groups" not in stats
    changes = 4 / 3 * np.array([[11, 2], [24, 5]])  # [times][images]
    close(stats["block_mse"], [changes.mean()] * 2)
    close(stats["block_mse_by_time"], changes.mean(1)[:, None] * [1, 1])
    close(stats["block_mse_by_class"]["people"], [changes[:, 0].mean()] * 2)
    close(stats["block_mse_by_class"]["animals"], [changes[:, 1].mean()] * 2)


def test_repetitions_that_fill_a_batch_do_not_count():
    """Three images in batches of two: the second batch has class 0 and a repetition of class 1."""
    observer = RoutingObserver(SignModel())
    sampler = observer.watch(sign_sampler(observer), 3)
    for _ in range(2):
        sampler({}, PIXELS, np.array([0, 1]))
    stats = observer.stats()
    assert stats["evaluations"] == 6
    by_time = (2 * np.array(ALONE) + OTHER).swapaxes(0, 1) / 3
    np.testing.assert_allclose(stats["selection_by_time"], by_time, rtol=1e-6)
    observer.reset()
    sampler({}, PIXELS, np.array([0, 1]))
    assert observer.stats()["evaluations"] == 4  # `reset` begins anew


@pytest.mark.parametrize(
    "doubled",
    [
        lambda given, null: jnp.concatenate([given, null]),
        lambda given, null: jnp.stack([given, null], 1).reshape(-1, *given.shape[1:]),
    ],
)
def test_conditional_and_unconditional_evaluations_are_kept_apart(doubled):
    """Both halves in one batch, one after the other or in turn; of the second image only one."""
    observer = RoutingObserver(SignModel(), maps=1)
    observer.watch(sign_sampler(observer, doubled=doubled), 1)({}, PIXELS, np.array([0, 1]))
    stats = observer.stats()
    assert stats["evaluations"] == 4 and set(stats["per_class"]) == {"0", "null"}
    for table in (stats, stats["conditional"], stats["unconditional"]):
        expected = np.array(ALONE).swapaxes(0, 1)
        np.testing.assert_allclose(table["selection_by_time"], expected, rtol=1e-6)
    assert stats["conditional"]["evaluations"] == stats["unconditional"]["evaluations"] == 2
    assert np.array(stats["tokens"]["used"])[0, 0, :, 0].tolist() == [[1, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize(
    "router", ["deepseek", "expert_choice", "expert_race", "promoe_tc", "promoe_ec"]
)
def test_every_router_is_observed(router):
    """Frequencies are at most 1, and with the maps they count the same."""
    named = router.startswith("promoe")
    overrides = [f"model.router.name={router}", "loss_weights={}"] if named else []
    overrides += ["model.router.n_group=1", "model.router.topk_group=1"] * (router == "deepseek")
    _, model, variables = make("token_choice" if named else router, *overrides)
    labels = {"label": np.array([0, 10, 1], np.int32)}
    seen = jax.jit(lambda *args: observe(model, *args, False, True))(
        variables, noise(), HALF, labels
    )[1]
    counts, used = np.asarray(seen["expert_counts"]), np.asarray(seen["experts_used"])
    assert counts.shape == (2, 3, 4) and used.shape == (2, 3, 2, 2)
    assert counts.max() <= 1 and counts.sum() > 0
    np.testing.assert_allclose(counts.sum(-1), used.mean((2, 3)), rtol=1e-6)
    assert (seen["strongest_expert"] >= 0).tolist() == (used > 0).tolist()
    if named:  # "no label" has the last expert for itself
        np.testing.assert_array_equal(counts[:, 1], [[0, 0, 0, 1]] * 2)


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
    assert "tokens" not in stats


def test_diffmoe_averages_agree(diffmoe):
    config, model, variables, _ = diffmoe
    variables = with_threshold(variables, 0.5)
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
    assert stats["conditional"]["c_infer_avg"] == pytest.approx(conditional)
    assert stats["unconditional"]["c_infer_avg"] == pytest.approx(classes["null"])
    for table in (stats, stats["conditional"], stats["unconditional"]):
        np.testing.assert_allclose(np.sum(table["selection"], -1), table["per_layer"])
        by_time = np.array(table["selection_by_time"])
        np.testing.assert_allclose(by_time.sum(-1), table["per_layer_and_time"])
        np.testing.assert_allclose(np.mean(table["capacity_by_time"], -1), by_time.sum(-1))
        np.testing.assert_allclose(np.sum(table["share"], -1), 1)

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
    with Image.open(picture) as image:  # two experts a token everywhere: the load of each expert
        assert np.array_equal(image, experts_picture(stats))


def test_a_dense_model_has_no_routing():
    with pytest.raises(UserError, match="dense"):
        RoutingObserver(build(configs.load("configs/digits.py:router=dense").model))


def test_json_and_picture(tmp_path):
    stats = {
        "c_infer_avg": 1.5,
        "blocks": [1, 3],
        "times": [0.0, 0.5, 1.0],
        "per_layer_and_time": [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]],
        "per_class": {str(label): round(1 + label / 100, 2) for label in range(40)} | {"null": 1.5},
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
    by_search = observed(with_threshold(variables, 0.45), noise(), HALF, LABELS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_config, by_search)
    dynamic, seen = observed(with_threshold(variables, "dynamic"), noise(), HALF, LABELS)
    assert np.all(seen["expert_counts"] == 1) and np.abs(dynamic - by_config[0]).max() > 0.01


def test_thresholds_need_diffmoe():
    run = object.__new__(RunImages)  # without a workdir
    run.config = configs.load("configs/digits.py:router=token_choice")
    with pytest.raises(UserError, match="thresholds are DiffMoE's"):
        run.with_threshold(0.5)


def test_a_bound_drops():
    _, model, variables = make("diffmoe", "model.router.max_capacity=1")
    _, seen = jax.jit(lambda *args: observe(model, *args, False))(variables, noise(), HALF, LABELS)
    # Four experts are wanted, two are allowed; which images get them, the gate says.
    assert seen["expert_counts"].sum(-1).mean() == 2 and np.all(seen["dropped"] == 0.5)


def test_thresholds_that_are_none():
    for text in ("often", "1.5", "-0.1", "nan"):
        with pytest.raises(UserError, match=r"model\.router\.threshold"):
            configs.load(
                "configs/digits.py:router=diffmoe", [f"--config.model.router.threshold={text}"]
            )
