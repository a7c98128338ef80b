"""Loading a run straight onto a mesh: each device reads its part, and the images are the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.stack import abstract_variables
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.sampling.conditions import default_conditions
from moe_diffusion.sampling.generate import generate
from moe_diffusion.sampling.load import load_workdir
from moe_diffusion.training.checkpoint import Checkpointer, StoredWeights
from moe_diffusion.training.state import TrainState

EXPERTS = "params/layers_0/block_0/moe/experts/up"
KERNEL = "params/patch_embed/kernel"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of step 5 with random weights and an average that is half as large."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.load(
        "configs/digits.py:router=token_choice",
        [
            *("model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.patch_size=4"),
            *("model.moe.num_experts=8", "model.moe.hidden_size=8", "model.moe.interleave=false"),
            *("model.router.selection_bias=true", "sampling.steps=2", "ema.decays=0.9"),
        ],
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype),
        abstract_variables(build(config.model)),
    )
    average = jax.tree.map(lambda x: x / 2, variables)
    state = TrainState(
        step=jnp.int32(5), params=variables["params"], router_state=variables["router_state"],
        emas={"0.9": average}, opt_state={},
    )  # fmt: skip
    checkpoints = Checkpointer(folder, config.checkpoint)
    checkpoints.save(5, state, {})
    checkpoints.close()
    configs.save_json(config, folder / "config.json")
    return folder


def draw(config, model, variables, mesh=None):
    return generate(
        make_sampler(model, config), variables, default_conditions(model, 8), model.input_shape,
        seed=0, batch_size=8, mesh=mesh,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(workdir):
    """The run on one device, and its images."""
    loaded = load_workdir(workdir)
    return loaded, draw(*loaded[:3])


def test_by_default_one_device_holds_everything(workdir, alone):
    (_, model, variables, note), _ = alone
    assert note == {"step": 5, "ema": "0.9"} and model.preset is None
    only = SingleDeviceSharding(jax.local_devices()[0])
    assert all(leaf.sharding == only for leaf in jax.tree.leaves(variables))
    live = load_workdir(workdir, ema="none")[2]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 2), variables, live)


@pytest.mark.parametrize(
    "preset, parts",  # of the experts' weights and of an ordinary matrix [16, 32]
    [("fsdp", ((2, 8, 4, 8), (16, 4))), ("fsdp_ep", ((2, 1, 32, 8), (16, 4)))],
)
def test_each_device_reads_its_part(preset, parts, workdir, alone):
    mesh = make_mesh(ConfigDict({"preset": preset, "expert": 0}))
    config, model, variables, note = load_workdir(workdir, mesh=mesh, preset=preset)
    (_, _, whole, wanted), images = alone
    assert note == wanted and model.preset == preset
    leaves, expected = flatten_dict(variables, sep="/"), flatten_dict(whole, sep="/")
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
        assert leaf.sharding.mesh == mesh and len(leaf.addressable_shards) == 8, name
        np.testing.assert_array_equal(leaf, expected[name])
    for name, shape in zip((EXPERTS, KERNEL), parts, strict=True):
        assert {shard.data.shape for shard in leaves[name].addressable_shards} == {shape}
        assert 8 * leaves[name].addressable_shards[0].data.size == leaves[name].size
    drawn = draw(config, model, variables, mesh)
    np.testing.assert_allclose(drawn, images, rtol=0, atol=1e-4)
    assert np.std(images) > 0.5


def test_the_run_s_own_preset_is_the_default(workdir):
    mesh = make_mesh(ConfigDict({"preset": "fsdp"}))
    _, model, variables, _ = load_workdir(workdir, ("parallel.preset=fsdp",), mesh=mesh)
    assert model.preset == "fsdp"
    assert variables["params"]["patch_embed"]["kernel"].addressable_shards[0].data.shape == (16, 4)
    replicated = load_workdir(workdir, mesh=mesh)[2]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(replicated))


def test_nothing_is_read_of_another_model(workdir, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(StoredWeights, "read", read)
    with pytest.raises(UserError, match=r"of another model than .*arrays differ: params/final"):
        load_workdir(workdir, ("model.hidden_size=64",))
