"""Images from any condition and of any shape, batch by batch, and the hooks that draw them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.periodic import EvaluationHook
from moe_diffusion.figures.images import image_grid
from moe_diffusion.models import build
from moe_diffusion.models.stack import abstract_variables
from moe_diffusion.sampling.conditions import captions, default_conditions
from moe_diffusion.sampling.generate import generate, generate_batches
from moe_diffusion.sampling.hooks import SampleHook
from moe_diffusion.training.state import TrainState
from tests.sampling.prompted import SHAPE, Prompted, Prompts

WEIGHTS = {"params": {"scale": jnp.float32(0.01)}}


def make_config():
    config = configs.default()
    config.sampling.sampler, config.sampling.steps, config.sampling.cfg = "euler", 2, 2.0
    config.train.samples, config.train.eval_samples, config.ema.decays = 4, 32, ()
    config.data.source = "synthetic"
    return config


def draw(num=5, batch_size=4, scale=0.01, **options):
    sampler = make_sampler(Prompted(), make_config())
    cond = default_conditions(Prompted(), num, Prompts())
    variables = {"params": {"scale": jnp.float32(scale)}}
    options = {"seed": 7, "batch_size": batch_size} | options
    return generate(sampler, variables, cond, SHAPE, **options), cond


def test_a_prompt_is_guided_as_computed_by_hand():
    """From the same noise, the strength adds itself and guidance 2 doubles the text."""
    images, cond = draw()
    noise, _ = draw(scale=0.0)
    assert images.shape == (5, *SHAPE) and images.dtype == np.float32
    added = images - (noise - cond["strength"][:, None, None, None])
    expected = 2 * 0.01 * cond["text"][:, 0, 0] + cond["strength"]
    expected = expected[:, None, None, None] * np.ones(SHAPE)
    np.testing.assert_allclose(added, expected, atol=1e-5)


def test_images_depend_on_neither_batch_nor_number():
    images, _ = draw()
    np.testing.assert_allclose(draw(batch_size=2)[0], images, atol=1e-6)
    np.testing.assert_allclose(draw(num=1, scale=0.0)[0], draw(scale=0.0)[0][:1], atol=1e-6)
    assert np.abs(draw(seed=8)[0] - images).max() > 0.5


def test_a_mesh_draws_the_same():
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "expert"))
    np.testing.assert_allclose(draw(batch_size=8, mesh=mesh)[0], draw()[0], atol=1e-6)


def test_batches_come_one_by_one_and_must_be_finite():
    def sampler(variables, z, cond, keys):
        assert z.shape == (4, 1, 2, 1) and keys.shape == (4,)
        return z * cond["gain"][:, None, None, None]

    cond = {"gain": np.array([1, 1, 1, 1, 1, np.inf], np.float32)}
    drawn = generate_batches(sampler, {}, cond, (1, 2, 1), seed=0, batch_size=4)
    assert next(drawn).shape == (4, 1, 2, 1)
    with pytest.raises(UserError, match="not finite"):
        next(drawn)


def test_a_transformer_on_wide_images():
    config = configs.load("configs/digits.py", ["model.depth=2", "model.hidden_size=16"])
    config.sampling.steps, config.model.num_heads = 1, 2
    model = build(config.model).clone(input_shape=(8, 12, 1))
    shapes = abstract_variables(model)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    cond = default_conditions(model, 4)
    images = generate(
        make_sampler(model, config), variables, cond, model.input_shape, seed=0, batch_size=4
    )
    assert images.shape == (4, 8, 12, 1)
    grid = image_grid(images, columns=2, scale=5)
    assert grid.size == (2 * 60 + 3 + 24, 2 * 40 + 3 + 24)
    tile = np.asarray(grid.convert("L"))[12 : 12 + 40, 12 : 12 + 60][::5, ::5]
    np.testing.assert_array_equal(tile, np.rint((np.clip(images[0, ..., 0], -1, 1) + 1) * 127.5))
    assert image_grid(images, captions(model, cond)).width > image_grid(images).width - 1


def test_hooks_draw_prompts_of_the_source(tmp_path):
    config = make_config()
    state = TrainState(step=3, params=WEIGHTS["params"], router_state={}, emas={}, opt_state={})
    outputs = SampleHook(config, Prompted(), tmp_path, Prompts())(3, state)
    picture = Image.open(tmp_path / "samples" / "00000003.png")
    np.testing.assert_array_equal(np.asarray(picture), outputs["samples"])
    assert picture.size == image_grid(np.zeros((4, *SHAPE)), list("0123"), title="step 3").size
    assert picture.width == 2 * 64 + 3 + 24  # tiles of 32 x 64

    judged = EvaluationHook(config, Prompted(), Prompts())(3, state)
    assert "eval/fd_pooled" in judged and np.isfinite(list(judged.values())).all()
