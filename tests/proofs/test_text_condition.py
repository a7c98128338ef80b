"""A model with a text-like condition, unknown to the package, does all that others do.

It trains, resumes, samples with guidance, and is counted and planned, on images that are not
square.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moe_diffusion import config as configs
from moe_diffusion import models
from moe_diffusion.conditions import check_fields, cond_of, drop, fields_of
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.data.sources import open_source
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.models.accounting import forward_flops, parameter_counts, table
from moe_diffusion.models.stack import abstract_inputs, abstract_variables
from moe_diffusion.planning import report
from moe_diffusion.planning.compile import lower_train
from moe_diffusion.planning.topologies import describe
from moe_diffusion.synthetic import Synthetic
from moe_diffusion.training import loop
from tests.preparing import latents_folder
from tests.training import toy

CONFIG = """
from moe_diffusion import config as configs


def get_config(arg=None):
    config = configs.default()
    config.model.architecture = "texty"
    config.model.image_size, config.model.image_width, config.model.channels = 4, 6, 2
    config.model.patch_size, config.model.hidden_size, config.model.depth = 2, 16, 6
    config.model.num_heads = 1
    config.model.moe.num_experts, config.model.moe.hidden_size = 8, 16
    config.model.router.selection_bias = True
    config.model.router.bias_update_rate = 0.01
    config.loss_weights = {"balance": 0.01}
    config.data.source, config.data.batch_size = "synthetic", 16
    config.optim.learning_rate = 1e-2
    config.ema.decays = (0.9,)
    config.train.num_steps, config.train.log_every = 5, 1
    config.train.sample_every = 1
    config.checkpoint.every = 2
    config.sampling.sampler, config.sampling.steps, config.sampling.cfg = "euler", 3, 3.0
    return config
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A config file of the model, which is one line in the registry."""
    monkeypatch.setitem(models.ARCHITECTURES, "texty", "tests.proofs.texty")
    path = tmp_path / "texty_config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def load(spec):
    """(config, model), by what is changed in the file."""

    def load(*overrides):
        config = configs.load(spec, overrides)
        return config, models.build(config.model, losses=sorted(config.loss_weights))

    return load


def batches(config, model):
    source = open_source(config.data, model.input_shape, model.cond_spec())
    return make_iterator(source, config.data, seed=config.seed)


def train(config, model, workdir, **options):
    loss_fn = make_loss(model, config)
    return loop.train(config, model, loss_fn, lambda: batches(config, model), workdir, **options)


def some_batch(model, number=4):
    source = Synthetic(model.input_shape, model.cond_spec())
    return jax.tree.map(jnp.asarray, source.take(np.arange(number)))


def some_variables(model):
    """Values of which none is zero, so that every path through the model counts."""
    leaves, tree = jax.tree.flatten(abstract_variables(model))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draw)


def test_its_config_has_a_section_and_checks_of_its_own(load, tmp_path):
    config, model = load("model.texty.text_length=7")
    assert model.cond_spec()["text"].shape == (7, 3) and model.input_shape == (4, 6, 2)
    configs.save_json(config, tmp_path / "config.json")
    assert configs.load_json(tmp_path / "config.json") == config
    with pytest.raises(UserError, match=r"model\.texty\.text_length = 0 must be positive"):
        load("model.texty.text_length=0")
    with pytest.raises(UserError, match="nearest is model.texty.text_width"):
        load("model.texty.width=4")


def test_trains_and_resumes_bitwise(load, tmp_path):
    config, model = load("parallel.preset=fsdp")
    expected = train(config, model, tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "stopped")
    for step in ("4", "5"):
        shutil.rmtree(tmp_path / "stopped/checkpoints" / step)
    assert [p.name for p in (tmp_path / "stopped/checkpoints").iterdir()] == ["2"]
    resumed = []
    state = train(config, model, tmp_path / "stopped", hooks=[lambda n, _: resumed.append(n)])
    toy.assert_trees_equal(state, expected)
    assert resumed == [3, 4, 5]
    # Each of the two routers keeps what it is about, and both have moved.
    routers = model.routers()
    assert {type(r).__name__ for r in routers.values()} == {"TokenChoice", "ExpertRace"}
    kept = flatten_dict(expected.router_state, sep="/")
    names = {"TokenChoice": "bias", "ExpertRace": "threshold"}
    wanted = {f"{path}/{names[type(router).__name__]}" for path, router in routers.items()}
    assert set(kept) == wanted and all(np.abs(x).max() > 0 for x in kept.values())


def check(model, batch):
    """As the loop does before the first step."""
    check_fields(fields_of(batch), model.cond_spec(), "the data")


def test_data_that_lack_a_field_are_refused(load):
    config, model = load("data.source=digits")
    with pytest.raises(UserError, match="lacks the field 'guidance'.*has the field 'label'"):
        open_source(config.data, (8, 8, 1), model.cond_spec())
    batch = some_batch(model)
    check(model, batch)
    with pytest.raises(UserError, match="the data lacks the field 'guidance'"):
        check(model, {k: v for k, v in batch.items() if k != "guidance"})
    with pytest.raises(
        UserError, match=r"has the field 'text' as float32\[4, 3\], the model takes"
    ):
        check(model, {**batch, "text": batch["text"][:, 1:]})


def test_prepared_latents_have_its_fields(load, tmp_path):
    class Words(latents_folder.Prompts):
        cond_spec = load()[1].cond_spec()

        def cond(self, index):
            fields = super().cond(index)
            return {k: np.asarray(fields[k], f.dtype) for k, f in self.cond_spec.items()}

    prepared = latents_folder.write(tmp_path / "latents", Words(20))
    assert prepared.image_shape == (4, 6, 2)
    config, model = load(f"data.source=latents:{tmp_path}/latents")
    batch = next(batches(config, model))
    check(model, batch)
    assert batch["image"].shape == (16, 4, 6, 2) and np.abs(batch["text"]).max() > 0


def test_a_dropped_condition_is_the_null_of_the_model(load):
    kept, model = load("diffusion.cond_dropout=0")
    dropping, _ = load("diffusion.cond_dropout=1")
    batch, variables = some_batch(model), some_variables(model)
    args = variables["params"], variables["router_state"]

    def loss_of(config):
        loss = jax.jit(make_loss(model, config))
        return lambda batch: float(loss(*args, batch, jax.random.key(0))[0])

    of_kept, of_dropping = loss_of(kept), loss_of(dropping)
    nulled = {**batch, **model.null(cond_of(batch))}
    assert of_dropping(batch) == of_kept(nulled) != of_kept(batch)
    # What `null` keeps is kept where the condition is dropped.
    louder = {**batch, "guidance": batch["guidance"] + 3}
    assert of_dropping(louder) != of_dropping(batch)
    some = drop(model, cond_of(batch), jnp.array([True, False, True, False]))
    assert not some["text_mask"][::2].any() and some["text_mask"][1::2].any()
    np.testing.assert_array_equal(some["text"][1::2], batch["text"][1::2])


def test_samples_with_guidance(load):
    config, model = load()
    batch, variables = some_batch(model), some_variables(model)
    z, cond = jax.random.normal(jax.random.key(2), (4, 4, 6, 2)), cond_of(batch)
    apart = make_sampler(model, config)(variables, z, cond)
    together = make_sampler(model, load("sampling.joint=true")[0])(variables, z, cond)

    @jax.jit
    def slope(x, t, scale):
        times = jnp.full(4, t)
        both = [model.apply(variables, x, times, c, False) for c in (cond, model.null(cond))]
        return both[1] + scale * (both[0] - both[1])

    def expected(scale):
        x = z
        for i in range(3):
            x += slope(x, i / 3, scale) / 3
        return x

    np.testing.assert_allclose(apart, expected(3.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(expected(1.0) - apart).max() > 1e-2


def test_features_of_layers_are_those_on_the_way(load):
    _, model = load()
    variables, batch = some_variables(model), some_batch(model)
    args = batch["image"], jnp.full(4, 0.5), cond_of(batch)
    apply = jax.jit(model.apply, static_argnames=("train", "capture"))
    output, features = apply(variables, *args, train=False, capture=(1, 4))
    np.testing.assert_allclose(output, apply(variables, *args, train=False), rtol=1e-5, atol=1e-5)
    assert set(features) == {1, 4} and features[4]["image"].shape == (4, 6, 16)
    assert np.abs(features[1]["words"] - features[4]["words"]).max() > 0


def test_unknown_parts_count_as_other(load):
    _, model = load()
    counts, flops = parameter_counts(model), forward_flops(model)
    leaves = jax.tree.leaves(abstract_variables(model)["params"])
    assert counts["total"].total == sum(x.size for x in leaves)
    words = 3 * 16 + 16 + 6 * (16 * 16 + 16)  # words_embed, and "words" of six layers
    assert counts["other"].total == words + (256 * 16 + 16) + (16 * 16 + 16)  # guidance_embed
    assert counts["routed experts"].activated < counts["routed experts"].total
    assert flops["attention"] > 0 and flops["routed experts"] > 0
    assert "other" in table(counts, flops)


def test_the_step_is_lowered_with_experts_on_eight_devices(load):
    config, _ = load("parallel.preset=fsdp_ep")
    lowered = lower_train(config, jax.devices())
    shapes = jax.tree.map(lambda x: x.shape, lowered.args_info)
    batch = shapes[0][1]
    assert batch["text"] == (16, 5, 3) and batch["guidance"] == (16,)
    assert batch["image"] == (16, 4, 6, 2) and batch["text_mask"] == (16, 5)


def test_is_planned(load, monkeypatch):
    config, _ = load()
    monkeypatch.setattr(report, "ORDER", ("dp", "fsdp"))
    quiet = [].append
    plan = report.make_plan(config, "train", describe("local"), quiet)
    report.compare_presets(plan, config, quiet)
    assert plan.fits and plan.outcomes["fsdp"].needed < plan.outcomes["dp"].needed
    assert plan.flops > 0 and "dispatch: " in report.table(plan)
    sampled = report.make_plan(config, "sample", describe("local"), quiet)
    assert sampled.fits and sampled.flops > 0


def test_abstract_inputs_are_those_of_the_synthetic_source(load):
    _, model = load()
    image, t, cond = abstract_inputs(model, 4)
    batch = some_batch(model)
    found = SimpleNamespace(**{k: (v.shape, v.dtype) for k, v in batch.items()})
    assert found.image == (image.shape, image.dtype) and t.shape == (4,)
    assert {k: (v.shape, v.dtype) for k, v in cond.items()} == {
        k: v for k, v in vars(found).items() if k != "image"
    }
