"""Models with groups of blocks are those without, of which each sample passes its own blocks."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import abstract_weights
from moe_diffusion.synthetic import Synthetic
from moe_diffusion.training.loop import train
from moe_diffusion.training.run import prepare_run
from tests.models.grouped import (
    assert_near,
    config_of,
    model_of,
    prepared,
    value_and_gradients,
)

CASES = {
    "dit, two of three": ("dit", ("1-3", "4-6"), 2, {}),
    "dit, runs": ("dit", ("1-6",), 3, {"model__mob__select": "run"}),
    "flux, one of two": ("flux", ("1-2", "3-4", "5-9"), 1, {}),
}
SAMPLES = 4


def chosen_blocks(model, config, params, inputs):
    """For each sample the numbers of the blocks that it passes."""
    _, sown = jax.jit(
        lambda p, *a: model.apply({"params": p}, *a, True, mutable=["intermediates"])
    )(params, *inputs)
    blocks = model.blocks()
    found = [[] for _ in range(SAMPLES)]
    picks = flatten_dict(sown["intermediates"], sep="/")
    for number, block in enumerate(blocks):
        if len(block.index) == 1:
            passes = [True] * SAMPLES
        else:
            repeat, member = block.index
            path = block.path.removesuffix("/members")
            passes = (picks[f"{path}/blocks"][0][repeat] == member).any(-1)
        for sample in range(SAMPLES):
            if passes[sample]:
                found[sample].append(number)
    return found


def places(model, smaller, numbers, leaves):
    """(path, index) of every leaf in `model`, and in a model without groups that has its blocks
    `numbers` alone."""
    for path in leaves:
        if not path.startswith("layers_"):
            yield (path, ()), (path, ())
    for block, number in zip(smaller.blocks(), numbers, strict=True):
        its = model.blocks()[number]
        assert block.kind == its.kind
        for path in leaves:
            if path.startswith(f"{its.path}/"):
                name = block.path + path.removeprefix(its.path)
                yield (path, its.index), (name, block.index)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_sample_passes_its_blocks_and_no_others(case):
    """Outputs, losses of the experts and gradients, against a loop over samples by hand."""
    name, groups, active, changes = CASES[case]
    config = config_of(name, groups, model__mob__active=active, **changes)
    model = model_of(config)
    params, inputs = prepared(model, SAMPLES)
    chosen = chosen_blocks(model, config, params, inputs)
    assert len({*map(tuple, chosen)}) > 1
    config.loss_weights.block_balance = 0.0  # is the router's alone
    # Without training the routers have no gradient; a straight-through one goes to the input, too.
    run = value_and_gradients(model, config, train=False)
    (_, (out, losses)), gradients = run(params, *inputs)

    doubles = model.depth if name == "flux" else 0
    depths = {"model__depth": sum(n < doubles for n in chosen[0]) if doubles else len(chosen[0])}
    if doubles:
        depths["model__flux__single_depth"] = len(chosen[0]) - depths["model__depth"]
    smaller = model_of(config_of(name, **depths))
    shapes = flatten_dict(abstract_weights(smaller)[0]["params"], sep="/")
    leaves = flatten_dict(jax.device_get(params), sep="/")
    run, weight = value_and_gradients(smaller, config, train=False), config.loss_weights.balance
    # All experts are in groups, where their loss is the mean over the samples.
    config.loss_weights.balance = weight / SAMPLES
    outputs, balances = [], []
    expected = {path: np.zeros_like(leaf) for path, leaf in leaves.items()}
    for sample, numbers in enumerate(chosen):
        own = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
        for (path, index), (name, place) in places(model, smaller, numbers, leaves):
            if "block_router" not in path:
                own[name][place] = leaves[path][index]
        its = jax.tree.map(lambda x, s=sample: x[s:][:1], inputs)
        (_, (result, found)), gradient = run(unflatten_dict(own, sep="/"), *its)
        outputs.append(result)
        balances.append(found["balance"])
        gradient = flatten_dict(gradient, sep="/")
        for (path, index), (name, place) in places(model, smaller, numbers, leaves):
            if "block_router" not in path:
                expected[path][index] += gradient[name][place]
    assert_near(out, np.concatenate(outputs))
    assert_near(losses["balance"], np.mean(balances))
    found = flatten_dict(gradients, sep="/")
    assert not any(np.any(found[path]) for path in found if "block_router" in path)
    assert_near(found, expected)


@pytest.mark.slow
def test_what_is_computed_again_changes_no_gradient():
    results = {}
    for remat in ("none", "cheap", "dots", "full"):
        small = {"model__depth": 4, "model__moe__skip_first": 0}
        config = config_of("dit", ("0-1", "2-3"), model__remat=remat, **small)
        model = model_of(config)
        params, inputs = prepared(model, 2)
        results[remat] = value_and_gradients(model, config)(params, *inputs)
    for remat in ("cheap", "dots", "full"):
        assert_near(results[remat], results["none"])


def test_a_router_with_a_memory_is_refused():
    config = config_of("dit", ("1-2",), model__router__selection_bias=True)
    message = r"^model\.mob\.groups has blocks with a router that keeps a state, "
    with pytest.raises(UserError, match=message):
        abstract_weights(model_of(config))


@pytest.mark.slow
def test_a_dit_with_groups_trains(tmp_path):
    """Through the loop: all weights move, the compressed modulation and the routers among them."""
    keys = {"train__num_steps": 4, "data__batch_size": 16, "optim__warmup_steps": 1}
    keys |= {"train__log_every": 1, "train__sample_every": 0, "train__eval_samples": 0}
    keys |= {"ema__decays": "()", "model__depth": 4, "model__moe__skip_first": 0}
    config = config_of("dit", ("0-1", "2-3"), **keys)
    model, run = model_of(config), prepare_run(config)
    source = Synthetic(model.input_shape, model.cond_spec())
    with contextlib.closing(make_iterator(source, config.data, seed=config.seed)) as batches:
        state = train(config, model, run.loss_fn, lambda: batches, tmp_path / "run")
    assert int(state.step) == 4
    before = flatten_dict(run.initial(config.seed), sep="/")
    after = flatten_dict(jax.device_get(state.params), sep="/")
    assert any("block_router" in path for path in after)
    same = [path for path, leaf in after.items() if np.array_equal(leaf, before[f"params/{path}"])]
    assert same == []
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert all(name in last for name in ("block_balance", "block_load_max", '"balance"'))
