"""What of one model's weights begins another; see also tests/training/test_warm_start.py."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.fitting import CONCERNED, fit, put_rows, same_rows


def shapes(**arrays):
    """Path -> something with a shape; __ stands for /."""
    return {name.replace("__", "/"): SimpleNamespace(shape=shape) for name, shape in arrays.items()}


WANTED = shapes(
    params__label_embed__embedding=(4, 8),
    params__patch_embed__kernel=(16, 8),
    params__final__linear__kernel=(8, 16),
    params__final__adaLN__kernel=(8, 16),
    params__layers_0__block_0__moe__router__kernel=(2, 8, 4),
    router_state__layers_0__block_0__moe__router__bias=(2, 4),
)
TABLE = "params/label_embed/embedding"


def test_rows_by_position():
    """3 classes and 2: rows 0 and 1 stay, and row 3, "no class", becomes row 2; and back."""
    there, here = same_rows(4, 3, (), ())
    assert (there.tolist(), here.tolist()) == ([0, 1, 3], [0, 1, 2])
    there, here = same_rows(3, 4, ("cat", "dog"), ())
    assert (there.tolist(), here.tolist()) == ([0, 1, 2], [0, 1, 3])


def test_rows_by_name():
    """Of owl, cat, elk the first two are known as 2 and 0; the model's last has no name."""
    there, here = same_rows(4, 5, ("cat", "dog", "owl"), ("owl", "cat", "elk"))
    assert (there.tolist(), here.tolist()) == ([2, 0, 3], [0, 1, 4])
    there, here = same_rows(4, 3, ("cat", "dog", "owl"), ("elk", "bee"))
    assert (there.tolist(), here.tolist()) == ([3], [2])


def test_rows_are_put():
    table = put_rows(jnp.zeros((3, 2), jnp.bfloat16), np.array([2, 0]), np.array([[1, 2], [3, 4]]))
    assert table.dtype == jnp.bfloat16
    np.testing.assert_array_equal(table, [[3, 4], [0, 0], [1, 2]])


def test_without_a_word_all_must_fit():
    misfits = {TABLE: ((6, 8), (4, 8))}
    found = fit(WANTED, misfits, [("model.num_classes", 5, 3)], ("none",))
    assert found.misfits == misfits and not found.excused and len(found.kept) == 5
    with pytest.raises(UserError) as error:
        found.check([("model.num_classes", 5, 3)], ("model.dtype",), "init_from = x")
    assert str(error.value) == (
        "init_from = x is another model: model.num_classes: 5 there, 3 here; "
        f"{TABLE}: (6, 8) there, (4, 8) here: use its model, another folder, or name in init.reset "
        "what begins anew (auto: what other classes, channels or patches concern)"
    )


def test_auto_goes_by_what_differs():
    changes = [("model.num_classes", 5, 3), ("model.image_size", 32, 64), ("model.dtype", "a", "b")]
    found = fit(WANTED, {TABLE: ((6, 8), (4, 8))}, changes, ("auto",))
    assert found.new == [] and found.misfits == {} and len(found.kept) == 5
    assert found.rows[TABLE][0].tolist() == [0, 1, 2, 5]
    found.check(changes, ("model.dtype",), "")
    assert found.told()[-1] == f"init_from: 4 rows kept: {TABLE}"
    assert found.told()[0] == "init_from: kept: params/final/adaLN/kernel"


def test_auto_sees_another_meaning_of_the_same_shape():
    """2 x 2 patches of 4 channels and 4 x 4 patches of one channel are 16 numbers."""
    changes = [("model.channels", 4, 1), ("model.patch_size", 2, 4)]
    found = fit(WANTED, {}, changes, ("auto",))
    assert found.new == ["params/final/linear/kernel", "params/patch_embed/kernel"]
    found.check(changes, (), "")
    with pytest.raises(UserError, match="model.channels: 4 there, 1 here; model.patch_size: 2 th"):
        fit(WANTED, {}, changes, ("none",)).check(changes, (), "")
    with pytest.raises(UserError, match="model.channels: 4 there"):  # the last layer is kept
        fit(WANTED, {}, changes, ("patch_embed",)).check(changes, (), "")


def test_auto_does_not_know_every_architecture():
    """Where no array has the name of a part, a difference in the key is refused."""
    wanted = shapes(params__img_in__kernel=(16, 8))
    changes = [("model.channels", 4, 1), ("model.patch_size", 2, 4)]
    with pytest.raises(UserError, match="model.channels: 4 there, 1 here; model.patch_size: 2 th"):
        fit(wanted, {}, changes, ("auto",)).check(changes, (), "")


def test_auto_never_replaces_what_makes_the_model():
    router = "params/layers_0/block_0/moe/router/kernel"
    changes = [("model.depth", 3, 2)]
    found = fit(WANTED, {router: ((3, 8, 4), (2, 8, 4))}, changes, ("auto",))
    with pytest.raises(UserError, match=r"model.depth: 3 there, 2 here; .*\(3, 8, 4\) there"):
        found.check(changes, (), "")


def test_patterns_name_arrays_and_all_below():
    found = fit(WANTED, {"params/old/scale": ((3,), "absent")}, [], ("layers_0/*/moe", "old"))
    assert found.new == [
        "params/layers_0/block_0/moe/router/kernel",
        "router_state/layers_0/block_0/moe/router/bias",
    ]
    assert found.unused == ["params/old/scale"] and found.misfits == {}
    assert found.told()[-1] == "init_from: unused: params/old/scale"
    both = fit(WANTED, {}, [("model.num_classes", 3, 3)], ("auto", "final/adaLN"))
    assert both.new == ["params/final/adaLN/kernel"] and list(both.rows) == [TABLE]
    assert fit(WANTED, {}, [], ("label_embed",)).new == [TABLE]
    with pytest.raises(UserError, match="init.reset = 'embed' matches no parameter: the model has"):
        fit(WANTED, {}, [], ("embed",))


@pytest.mark.parametrize("spec", ["configs/dsmoe_s.py", "configs/jitmoe_b16.py"])
def test_the_table_names_what_models_have(spec):
    """Every place of `CONCERNED` is in the architectures that have the key."""
    config = configs.load(spec, ["model.depth=6"])
    paths = flatten_dict(abstract_variables(build(config.model))["params"], sep="/")
    own = f"model.{config.model.architecture}."
    for key, parts in CONCERNED.items():
        if key.count(".") == 1 or key.startswith(own):
            for part in parts:
                assert any(p == part or p.startswith(f"{part}/") for p in paths), (key, part)


@pytest.mark.parametrize("specs", [
    ("configs/flux_tiny.py", "configs/digits_flux.py"),
    ("configs/dit_t2i.py", "configs/digits_t2i.py:router=dense"),
])  # fmt: skip
def test_the_table_names_what_models_of_texts_have(specs):
    """One of them reads words itself."""
    found = [configs.load(spec).model for spec in specs]
    trees = [flatten_dict(abstract_variables(build(model))["params"], sep="/") for model in found]
    own = f"model.{found[0].architecture}."
    keys = {key: parts for key, parts in CONCERNED.items() if key.startswith(own)}
    assert len(keys) >= 3
    for key, parts in keys.items():
        for part in parts:
            assert any(p.startswith(f"{part}/") for tree in trees for p in tree), (key, part)
