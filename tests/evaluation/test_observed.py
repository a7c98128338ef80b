"""What is heard inside a model: layers and their names, changes, chosen blocks, tokens."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion import routing
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import observed
from moe_diffusion.evaluation.averages import Averages
from moe_diffusion.evaluation.categories import Categories, categories
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.stack import Group, Model, Stack
from tests.sampling.tiny_run import FLUX, FLUX_MOE, make_run


def flux(*changes: str) -> Model:
    return build(configs.load(FLUX, [*FLUX_MOE, *changes]).model)


GROUPS = ("model.mob.groups=('2-4',)", "model.flux.single_depth=4")


def test_the_layers_of_a_model_with_two_streams():
    model = flux()
    names = [layer.name for layer in observed.expert_layers(model)]
    assert names == ["1 image", "1 text", 2, 3, 4] and observed.unheard(model) == []
    seeing = [layer.name for layer in observed.expert_layers(model) if layer.sees_image]
    assert seeing == ["1 image", 2, 3, 4]
    places = [(layer.path, layer.repeat) for layer in observed.layers(model)]
    stacked = "layers_2/block_0"
    assert places[2:] == [(stacked, 0), (stacked, 1), (stacked, 2)]


def test_experts_in_groups_are_left_out():
    model = flux(*GROUPS)
    assert [layer.name for layer in observed.expert_layers(model)] == ["1 image", "1 text", 5]
    assert observed.unheard(model) == [2, 3, 4]
    layers = observed.layers(model)
    assert [layer.name for layer in layers] == [0, 1, "2-4", 5]
    assert [layer.name for layer in layers if layer.is_group] == ["2-4"]
    assert layers[2].blocks == (2, 3, 4) and "members" not in layers[2].path


def test_without_experts_only_blocks_can_be_watched():
    for changes in (["model.router.name=dense"], ["model.router.top_k=0"]):
        with pytest.raises(UserError, match="dense"):
            RoutingObserver(flux(*changes))
        assert RoutingObserver(flux(*changes), dense=True).blocks == []


def test_a_change_worked_by_hand():
    """One stream: (1 + 4 + 0 + 9) / 4. Two: (that sum + 16 + 0) / 6, both streams together."""
    before = np.zeros((1, 2, 2), np.float32)
    after = np.array([[[1, -2], [0, 3]]], np.float32)
    assert observed.mean_square_change(before, after).tolist() == [14 / 4]
    text = np.zeros((1, 1, 2), np.float32)
    streams = observed.mean_square_change((before, text), (after, text + [4, 0]))
    assert streams.tolist() == [5.0]


class Double(nn.Module):
    """x -> 2 x, and which of three blocks a sample passes: 2 if its first value is positive."""

    chooses: bool

    @nn.compact
    def __call__(self, x):
        if self.chooses:
            self.sow("intermediates", "blocks", jnp.where(x[:, 0, :1] > 0, 2, 0))
        return 2 * x


class Grouped(Model):
    """A block, and a group of three blocks of which a sample passes one."""

    input_shape = (1, 2, 1)

    @property
    def stack(self):
        kinds = ("one", Group("one", 3, 1))
        return Stack(kinds, lambda kind: lambda name: Double(isinstance(kind, Group), name=name))

    @nn.compact
    def __call__(self, x, t, cond, train):
        return self.stack(x.reshape(len(x), 2, 1))[0].reshape(x.shape)

    def cond_spec(self):
        return {}

    def null(self, cond):
        return cond


def test_chosen_blocks_worked_by_hand():
    """Images 1 1, 2 0 and -1 1 pass blocks 2, 2 and 0 of the group, which are 3, 3 and 1."""
    images = jnp.array([[1, 1], [2, 0], [-1, 1]], jnp.float32).reshape(3, 1, 2, 1)
    observer = RoutingObserver(Grouped(), dense=True)
    sorts = Categories("prompt", ("a", "b"), np.array([0, 1, 1]), ())
    observer.watch(lambda *_: images, 3, sorts)
    for t in (0.0, 1.0):
        observer.apply({}, images if t else -images, jnp.full(3, t), {}, False)
    stats = observer.stats()
    assert stats["layers"] == [0, "1-3"] and stats["blocks"] == []
    group = stats["groups"]["1-3"]
    assert group["blocks"] == (1, 2, 3)
    np.testing.assert_allclose(group["share_by_time"], [[2 / 3, 0, 1 / 3], [1 / 3, 0, 2 / 3]])
    np.testing.assert_allclose(group["share"], [1 / 2, 0, 1 / 2])
    np.testing.assert_allclose(group["share_by_class"]["a"], [1 / 2, 0, 1 / 2])
    # A layer that doubles v changes it by v^2: means (1 + 1) / 2, (4 + 0) / 2, (1 + 1) / 2; the
    # group sees them doubled.
    np.testing.assert_allclose(stats["block_mse"], [4 / 3, 16 / 3], rtol=1e-6)
    np.testing.assert_allclose(stats["block_mse_by_class"]["b"], [1.5, 6], rtol=1e-6)


def test_means_leave_out_what_has_no_condition():
    means = Averages(classes=3)
    means.add(0.0, 0, np.array([0, 1]), {"x": np.array([[1.0], [3.0]])})
    means.add(0.0, 1, np.array([2]), {"x": np.array([[100.0]])})
    means.add(0.5, 0, np.array([0]), {"x": np.array([[5.0]])})
    whole, by_time, by_class = means.means("x")
    assert whole.tolist() == [3] and by_time.tolist() == [[2], [5]]
    assert by_class.tolist() == [[3], [3], [100]]


def test_what_images_are_counted_under():
    digits, other = flux(), Grouped()
    texts = ["a small 7", "one handwritten two", "the digit 7"]
    found = categories(digits, {}, texts, {})
    assert found.kind == "prompt" and found.names == ("2", "7") and found.of.tolist() == [1, 0, 1]
    given = categories(other, {}, ["x", "null", "y", "x"], {"x": "people", "y": "art"})
    assert given.names == ("'null'", "art", "people") and given.of.tolist() == [2, 0, 1, 2]
    alone = categories(other, {}, ["b", "a", "b"], {})
    assert alone.names == ("b", "a") and alone.take(np.array([1, 2])).of.tolist() == [1, 0]
    assert categories(other, {}, None, {}) is None


@pytest.mark.slow
def test_changes_and_tokens_of_flux_are_those_of_its_features():
    """Against the features that the model returns after every block, and the shares of tokens."""
    model = flux()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype),
        abstract_variables(model),
    )
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.full(2, 0.5)
    cond = {"tokens": jnp.asarray(rng.integers(1, 20, (2, 12)), jnp.int32)}
    chosen = ("1 text", 3)
    output, seen = jax.jit(lambda *args: observed.observe(model, *args, False, True, chosen))(
        variables, x, t, cond
    )
    plain, features = jax.jit(lambda *args: model.apply(*args, False, capture=(0, 1, 2, 3, 4)))(
        variables, x, t, cond
    )
    np.testing.assert_allclose(output, plain, atol=1e-5)
    for number in (1, 3, 4):
        change = observed.mean_square_change(features[number - 1], features[number])
        np.testing.assert_allclose(seen["block_mse"][number], change, rtol=1e-4)
    text, single = seen["token_experts"]
    assert text.shape == (2, 12, 4) and single.shape == (2, 12 + 16, 4)
    assert np.all(text.sum(-1) == 2) and np.all(single.sum(-1) == 2)
    np.testing.assert_allclose(seen["expert_counts"][1], text.mean(1), rtol=1e-6)
    np.testing.assert_allclose(seen["expert_counts"][3], single.mean(1), rtol=1e-6)
    assert seen["strongest_expert"].shape == (4, 2, 4, 4)
    strongest = jax.nn.one_hot(seen["strongest_expert"][2], 4).reshape(2, 16, 4)
    assert np.all(single[:, 12:][strongest > 0])


@pytest.mark.slow
def test_the_folder_of_a_flux_with_groups(tmp_path, capsys):
    make_run(tmp_path / "run", *GROUPS, base=FLUX, small=FLUX_MOE)
    lines = [
        {"prompt": p, "category": c} for p, c in (("a 7", "odd"), ("a 9", "odd"), ("8", "even"))
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ["--workdir", tmp_path / "run", "--prompts", tmp_path / "prompts.jsonl", "--batch", 2]
    args += ["--num-per-prompt", 2, "--blocks", "1,5", "--out", tmp_path / "out", "--json"]
    routing.main(list(map(str, args)))
    printed = capsys.readouterr().out.splitlines()
    assert "experts of blocks in groups are not watched: 2, 3, 4" in printed
    result = json.loads(printed[-1])
    assert set(result["not_written"]) == {"hardest.png", "easiest.png"}
    assert {"selection.png", "tokens.png", "blocks.png", "groups.png"} <= set(result["files"])
    stats = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert stats["looked_into"] == ["1 image", "1 text", 5]
    assert sorted(stats["class_of_image"]) == ["even"] * 2 + ["odd"] * 4
    assert [np.shape(used) for used in stats["selection_by_token"]] == [(16, 4), (12, 4), (28, 4)]
    for kind in ("selection_by_image", "selection_by_token"):
        for used in stats[kind]:
            np.testing.assert_allclose(np.sum(used, -1), 2, rtol=1e-4)
    shares = stats["groups"]["2-4"]["share_by_class"]
    np.testing.assert_allclose(np.sum([shares["odd"], shares["even"]], -1), 1, rtol=1e-4)
