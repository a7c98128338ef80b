"""A teacher in bfloat16 teaches a student with experts, of which one part stays as it is.

The teacher is handed to `train` as what is frozen, and the loss compares features of both.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion import models
from moe_diffusion.conditions import cond_of
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.diffusion import paths
from moe_diffusion.diffusion.objectives import draw, with_router_losses
from moe_diffusion.models.stack import Model, abstract_inputs, abstract_variables
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.synthetic import Synthetic
from moe_diffusion.training import loop
from moe_diffusion.training.checkpoint import StoredWeights
from moe_diffusion.training.run import on_every_device, prepare_run
from moe_diffusion.training.step import Frozen, large_constants
from tests import cli
from tests.training import toy

FLOW = configs.default().diffusion
LEAST = 2048  # bytes of a large constant; the largest weights have more, tables of positions less
BOTH = {"model__depth": 2, "model__hidden_size": 32, "optim__trainable": "*"}
STUDENT = BOTH | {
    "model__moe__interleave": "true",
    "optim__trainable": "layers_*,final/*,time_embed/*",
    "optim__learning_rate": 1e-2,
    "train__num_steps": 4,
    "checkpoint__every": 2,
}


def load(router: str, **changes):
    _, spec, *overrides = cli.digits(router, **changes)
    return configs.load(spec, overrides)


def build_teacher(preset: str | None = None) -> Model:
    wide = {"model__mlp_ratio": 64.0}  # so that its bytes would be seen in a checkpoint
    config = load("dense", **BOTH, **wide, model__param_dtype="bfloat16")
    return models.build(config.model).clone(preset=preset)


def some_weights(model: Model):
    """Random values in the dtypes of a model, also where it begins with zeros."""
    leaves, tree = jax.tree.flatten(abstract_variables(model)["params"])
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [
        0.1 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def lay_out(params, model: Model, mesh, preset: str):
    """The weights on a mesh as a preset says."""
    init = partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), *abstract_inputs(model, 1))
    axes = jax.tree.map(tuple, nn.get_partition_spec(variables["params"]))
    table = rules.PRESETS[preset].params
    return jax.device_put(params, rules.shardings_of(mesh, table, params, axes))


def distillation_loss(student: Model, teacher: Model, weights: dict, closed_over=None):
    """||student - teacher||^2 + 1/2 ||features - features||^2 + losses of the routers.

    The features are those after layer 1 of both.
    closed_over: takes the place of what is frozen, which is a mistake.
    """

    def loss_fn(params, router_state, batch, key, frozen):
        image, cond, draws = batch["image"], cond_of(batch), draw(key, batch["image"].shape, FLOW)
        x_t = paths.interpolate(image, draws.noise, draws.t)
        frozen = frozen if closed_over is None else closed_over
        wanted, target = teacher.apply({"params": frozen}, x_t, draws.t, cond, False, capture=(1,))
        (output, features), collections = student.apply(
            {"params": params, "router_state": router_state},
            *(x_t, draws.t, cond, True),
            capture=(0, 1),
            mutable=["losses", "metrics", "router_stats"],
        )
        assert set(features) == {0, 1}
        mse = jnp.mean(jnp.square(output - wanted))
        distance = 0.5 * jnp.mean(jnp.square(features[1] - target[1]))
        return with_router_losses({"mse": mse, "features": distance}, collections, weights)

    return loss_fn


class Lesson(NamedTuple):
    """All that a run needs."""

    config: ConfigDict
    student: Model
    weights: Any  # of the teacher
    loss_fn: Callable

    def train(self, workdir, **options):
        return loop.train(
            self.config,
            self.student,
            self.loss_fn,
            self.batches,
            workdir,
            frozen=self.weights,
            **options,
        )

    def batches(self):
        source = Synthetic(self.student.input_shape, self.student.cond_spec())
        return make_iterator(source, self.config.data, seed=0)


def lesson(preset: str = "dp", teachers: str | None = None, closed: bool = False) -> Lesson:
    """teachers: the preset of the teacher; None lets it be whole everywhere."""
    config = load("token_choice", **STUDENT, parallel__preset=preset)
    student = models.build(config.model, losses=sorted(config.loss_weights))
    teacher = build_teacher(teachers or "dp")
    weights = some_weights(teacher)
    if teachers:
        weights = lay_out(weights, teacher, make_mesh(config.parallel), teachers)
    loss_weights = dict(config.loss_weights)
    loss_fn = distillation_loss(student, teacher, loss_weights, weights if closed else None)
    return Lesson(config, student, weights, loss_fn)


def train_on_one(workdir):
    """The last state of a run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare_run", partial(prepare_run, devices=jax.devices()[:1]))
        state = lesson().train(workdir)
    assert len(state.step.sharding.device_set) == 1
    return state


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """(workdir, last state) of such a run."""
    jax.config.update("jax_disable_most_optimizations", True)
    workdir = tmp_path_factory.mktemp("one") / "run"
    return workdir, jax.device_get(train_on_one(workdir))


@pytest.mark.parametrize("preset,teachers", [("dp", "fsdp"), ("fsdp", "dp")])
def test_eight_devices_have_the_numbers_of_one(on_one, tmp_path, preset, teachers):
    given = lesson(preset, teachers)
    before = jax.device_get(given.weights)
    split = {x.sharding.is_fully_replicated for x in jax.tree.leaves(given.weights)}
    assert (False in split) == (teachers == "fsdp")
    state = given.train(tmp_path / "run")
    kernel = state.params["layers_0"]["block_0"]["attn"]["qkv"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.sharding.is_fully_replicated == (preset == "dp")
    toy.assert_trees_close(jax.device_get(state), on_one[1], 1e-5)
    # The teacher was only read: neither donated nor changed.
    toy.assert_trees_equal(jax.device_get(given.weights), before)


def test_the_student_learns_and_its_untrained_part_stays(on_one):
    workdir, state = on_one
    given = lesson()
    run = prepare_run(given.config, given.student, given.loss_fn, jax.devices()[:1])
    start, untrained = jax.device_get(run.create(given.config.seed))
    assert {path[0] for path in flatten_dict(untrained)} == {"patch_embed", "label_embed"}
    assert not state.params.keys() & untrained.keys()
    for before, after in zip(
        jax.tree.leaves(start.params), jax.tree.leaves(state.params), strict=True
    ):
        assert np.abs(after - before).max() > 0
    with StoredWeights(workdir) as stored:
        kept = stored.read_tree(dict.fromkeys(stored.shapes, None))["params"]
    toy.assert_trees_equal({name: kept[name] for name in untrained}, untrained)
    assert kept.keys() == state.params.keys() | untrained.keys()


def test_checkpoints_hold_the_trained_and_nothing_else(on_one):
    workdir, state = on_one
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    teacher = sum(x.nbytes for x in jax.tree.leaves(lesson().weights))
    for step in ("2", "4"):
        folder = workdir / "checkpoints" / step
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["data", "state"]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = dict(checkpointer.metadata(folder / "state").item_metadata.tree)
        saved = {
            jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(x.shape), x.dtype)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert len(saved) == len(jax.tree.leaves(state))
        assert not any("patch_embed" in name or "label_embed" in name for name in saved)
        assert {str(dtype) for _, dtype in saved.values()} <= {"float32", "int32"}
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert size < sum(x.nbytes for x in jax.tree.leaves(state)) + teacher / 2
    assert sorted(p.name for p in workdir.iterdir() if p.is_dir()) == ["checkpoints", "untrained"]


def test_resumes_bitwise(on_one, tmp_path):
    workdir = shutil.copytree(on_one[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/4")
    state = train_on_one(workdir)
    toy.assert_trees_equal(jax.device_get(state), on_one[1])


def lower(given: Lesson):
    run = prepare_run(given.config, given.student, given.loss_fn, jax.devices()[:1])
    frozen = on_every_device(run.mesh, given.weights)
    with run.on_mesh():
        state, untrained = run.create(0)
        batch = run.batch(given.config.data.batch_size)
        traced = run.step().trace(state, batch, jax.random.key(0), Frozen(untrained, frozen))
    return traced, traced.lower().as_text()


def constants_in(text: str) -> list[tuple[int, ...]]:
    """Shapes of the large constants in a program's text, but for those of one repeated value."""
    shapes = []
    for value, shape in re.findall(r"dense(?:_resource)?<(.*?)> : tensor<([\dx]+)x\w+>", text):
        sizes = tuple(int(size) for size in shape.split("x"))
        if value.startswith(("[", '"', "_")) and 2 * np.prod(sizes) >= LEAST:
            shapes.append(sizes)
    return shapes


def test_the_step_holds_no_weights_as_constants():
    traced, text = lower(lesson())
    assert large_constants(traced, LEAST) == [] and constants_in(text) == []


def test_a_loss_that_closes_over_the_teacher_is_found():
    given = lesson(closed=True)
    traced, text = lower(given)
    large = sorted(x.shape for x in jax.tree.leaves(given.weights) if x.nbytes >= LEAST)
    assert len(large) > 5
    assert sorted(shape for _, shape in large_constants(traced, LEAST)) == large
    assert sorted(constants_in(text)) == large


WEIGHTS = jnp.linspace(0.0, 1.0, 32 * 32).reshape(32, 32)


def again(x):
    return jax.checkpoint(lambda x: jax.jit(lambda x: jnp.sin(x @ WEIGHTS))(x))(x)


HIDDEN = {
    "in a branch": lambda x: jax.lax.cond(x.sum() > 0, jax.jit(lambda x: x @ WEIGHTS), jnp.sin, x),
    "in what is computed again": again,
    "in a scan": lambda x: jax.lax.scan(lambda x, _: (again(x), None), x, length=2)[0],
    "in a gradient": jax.grad(lambda x: again(x).sum()),
}


@pytest.mark.parametrize("where", HIDDEN)
def test_constants_are_found(where):
    traced = jax.jit(HIDDEN[where]).trace(jnp.ones((4, 32)))
    assert [shape for _, shape in large_constants(traced, LEAST)] == [(32, 32)]
    assert large_constants(traced, 2 * WEIGHTS.nbytes) == []
