"""Key maps that cut tensors up: a toy family with the ways of FLUX.1 and of diffusers.

The toy has two kinds of blocks. A double block has q, k and v as three of PyTorch's tensors in one
of our leaves. A single block has `linear1` and `linear2`, which join two of our leaves each, along
either axis; the blocks of either kind are numbered on their own.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from moe_diffusion.errors import UserError
from moe_diffusion.interop import files, keymap, rows, tensors
from moe_diffusion.interop.dit import linear
from moe_diffusion.interop.rows import FLAT, HEADS_IN, HEADS_OUT, LINEAR, Row, Slice
from moe_diffusion.interop.streamed import write_weights
from moe_diffusion.models.stack import Block
from moe_diffusion.training.checkpoint import StoredWeights

WIDTH, HEADS, HEAD_DIM, HIDDEN = 6, 2, 3, 10
BLOCKS = (
    Block("layers_0/block_0", (0,), "double", 1.0, 0),
    Block("layers_0/block_1", (0,), "single", 1.0, 1),
    Block("layers_0/block_0", (1,), "double", 1.0, 2),
    Block("layers_0/block_1", (1,), "single", 1.0, 3),
    Block("last", (), "single", 1.0, 4),  # a layer of its own, without an axis of layers
)
MODEL = SimpleNamespace(num_heads=HEADS, blocks=lambda: BLOCKS)
DOUBLE, SINGLE = "double_blocks.{i}", "single_blocks.{i}"
ATTENTION = "params/{block}/attn"


def fused(name, ours, layout, axis, bias=True):
    weight = Row(f"{SINGLE}.{name}.weight", f"{ours}/kernel", layout, along=axis, kind="single")
    if not bias:
        return (weight,)
    return weight, Row(f"{SINGLE}.{name}.bias", f"{ours}/bias", FLAT, along=0, kind="single")


TOY = rows.Family(
    "toy",
    (
        # Our second axis is q, k, v; its parts are named by a number and by the model.
        *(
            row
            for number, name in enumerate(("to_q", "to_k", "to_v"))
            for row in (
                Row(f"{DOUBLE}.{name}.weight", f"{ATTENTION}/qkv/kernel", HEADS_OUT,
                    part=Slice(1, number, 1), kind="double"),
                Row(f"{DOUBLE}.{name}.bias", f"{ATTENTION}/qkv/bias", FLAT,
                    part=Slice(0, number, 1), kind="double"),
            )
        ),
        *linear(f"{DOUBLE}.to_out", f"{ATTENTION}/proj", HEADS_IN, kind="double"),
        *fused("linear1", f"{ATTENTION}/qkv", HEADS_OUT, 0),
        *fused("linear1", "params/{block}/mlp/up", LINEAR, 0),
        *fused("linear2", f"{ATTENTION}/proj", HEADS_IN, 1, bias=False),
        *fused("linear2", "params/{block}/mlp/down", LINEAR, 1, bias=False),
        # Cut on either side: theirs begins with what is last here, and joins two leaves.
        Row("head.weight", "params/a", LINEAR, part=Slice(1, 3, lambda m: m.num_heads), along=0),
        Row("head.weight", "params/a", LINEAR, part=Slice(1, 0, 3), along=0),
        Row("head.weight", "params/b", LINEAR, along=0),
    ),
    subfolder="transformer",
)  # fmt: skip


def leaves(dtype=np.float32):
    rng = np.random.default_rng(0)
    inside = {
        "attn/qkv/kernel": (WIDTH, 3, HEADS, HEAD_DIM),
        "attn/qkv/bias": (3, HEADS, HEAD_DIM),
        "attn/proj/kernel": (HEADS, HEAD_DIM, WIDTH),
    }
    mlp = {"mlp/up/kernel": (WIDTH, HIDDEN), "mlp/up/bias": (HIDDEN,)}
    mlp |= {"mlp/down/kernel": (HIDDEN, WIDTH)}
    shapes = {
        **{f"layers_0/block_0/{k}": (2, *s) for k, s in inside.items()},
        "layers_0/block_0/attn/proj/bias": (2, WIDTH),
        **{f"layers_0/block_1/{k}": (2, *s) for k, s in (inside | mlp).items()},
        **{f"last/{k}": s for k, s in (inside | mlp).items()},
        **{"a": (4, 5), "b": (4, 1)},
    }
    return {f"params/{k}": rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


def exported(dtype=np.float32):
    return keymap.export_tree(unflatten_dict(leaves(dtype), sep="/"), TOY, MODEL)


def flat(tree):
    return keymap.flatten_dict(tree, sep="/")


def test_names_and_shapes():
    state = exported()
    shapes = {key: tensor.shape for key, tensor in state.items()}
    assert shapes == {
        **{f"double_blocks.{i}.to_{x}.weight": (6, 6) for i in (0, 1) for x in ("q", "k", "v")},
        **{f"double_blocks.{i}.to_{x}.bias": (6,) for i in (0, 1) for x in ("q", "k", "v")},
        **{f"double_blocks.{i}.to_out.weight": (6, 6) for i in (0, 1)},
        **{f"double_blocks.{i}.to_out.bias": (6,) for i in (0, 1)},
        **{f"single_blocks.{i}.linear1.weight": (3 * 6 + 10, 6) for i in (0, 1, 2)},
        **{f"single_blocks.{i}.linear1.bias": (3 * 6 + 10,) for i in (0, 1, 2)},
        **{f"single_blocks.{i}.linear2.weight": (6, 6 + 10) for i in (0, 1, 2)},
        "head.weight": (6, 4),
    }


def test_where_things_lie():
    state, ours = exported(), leaves()
    qkv = ours["params/layers_0/block_0/attn/qkv/kernel"]  # [layers, D, 3, heads, head_dim]
    np.testing.assert_array_equal(
        state["double_blocks.1.to_k.weight"], qkv[1, :, 1].reshape(WIDTH, -1).T
    )
    up = ours["params/last/mlp/up/kernel"]
    np.testing.assert_array_equal(state["single_blocks.2.linear1.weight"][18:], up.T)
    down = ours["params/layers_0/block_1/mlp/down/kernel"]
    np.testing.assert_array_equal(state["single_blocks.1.linear2.weight"][:, 6:], down[1].T)
    a, b = ours["params/a"], ours["params/b"]
    expected = np.concatenate([a[:, 3:], a[:, :3], b], axis=1).T
    np.testing.assert_array_equal(state["head.weight"], expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_keeps_every_bit(dtype):
    ours = leaves(dtype)
    back = flat(keymap.import_tree(exported(dtype), TOY, MODEL, ours))
    assert back.keys() - {"router_state"} == ours.keys()
    for path, leaf in ours.items():
        assert back[path].dtype == dtype
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


@pytest.fixture
def pipeline(tmp_path):
    """A folder as diffusers has it: a network in two shards, and another network."""
    state = exported(ml_dtypes.bfloat16)
    folder, table = tmp_path / "pipeline" / "transformer", {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2])):
        name = f"w-{number}.safetensors"
        files.write_state_dict({key: state[key] for key in keys}, folder / name)
        table |= dict.fromkeys(keys, name)
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    files.write_state_dict({"x": np.zeros(1)}, tmp_path / "pipeline" / "vae" / "w.safetensors")
    return tmp_path / "pipeline"


def stored_in(folder):
    with StoredWeights(folder) as stored:
        return stored.read(dict.fromkeys(stored.shapes))


def test_streaming_from_a_pipeline(pipeline, tmp_path):
    state = files.open_weights(files.find(pipeline, TOY.subfolder)).state
    ours = leaves(ml_dtypes.bfloat16)
    # Shapes of f32, as a model has them that knows nothing of the file.
    found = keymap.import_leaves(state, TOY, MODEL, leaves(), dtype="file")
    write_weights(tmp_path / "out", found)
    stored = stored_in(tmp_path / "out")
    assert stored.keys() == ours.keys()
    for path, leaf in ours.items():
        assert stored[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[path], leaf, err_msg=path)


def test_a_lora_is_added_on_the_way(pipeline, tmp_path):
    whole = files.read_state_dict(pipeline)
    assert "vae/x" in whole and len(whole) == len(exported()) + 1
    state = files.read_state_dict(pipeline / "transformer")
    rng = np.random.default_rng(1)
    down, up = rng.normal(size=(2, WIDTH)), rng.normal(size=(28, 2))
    changes = {
        f"single_blocks.{i}.linear1.weight": lambda w: w.astype(np.float32) + up @ down
        for i in (0, 2)
    }
    changed = tensors.adjusted(state, changes)
    assert changed.specs == state.specs
    write_weights(
        tmp_path / "out", keymap.import_leaves(changed, TOY, MODEL, leaves(), dtype="float32")
    )
    stored, before = stored_in(tmp_path / "out"), leaves(ml_dtypes.bfloat16)
    added = (up @ down)[18:].T.astype(np.float32)
    expected = before["params/last/mlp/up/kernel"].astype(np.float32) + added
    # The sum has the tensor's precision.
    np.testing.assert_allclose(stored["params/last/mlp/up/kernel"], expected, rtol=2**-8)
    path = "params/layers_0/block_1/mlp/up/kernel"
    assert not np.array_equal(stored[path][0], before[path][0])
    np.testing.assert_array_equal(stored[path][1], before[path][1])

    with pytest.raises(UserError, match="1 tensors to change are not there: linear9"):
        tensors.adjusted(state, {"linear9": np.negative})
    with pytest.raises(UserError, match=r"head.weight is \(6, 4\), but .* is \(4, 6\)"):
        tensors.adjusted(state, {"head.weight": np.transpose})["head.weight"]


def test_errors():
    state = exported()
    state["single_blocks.1.linear2.weight"] = np.zeros((6, 15))
    state["double_blocks.2.to_q.bias"] = state.pop("double_blocks.1.to_q.bias")
    with pytest.raises(UserError) as caught:
        keymap.import_tree(state, TOY, MODEL, leaves())
    for part in (
        "1 missing: double_blocks.1.to_q.bias",
        "1 unexpected: double_blocks.2.to_q.bias",
        "1 misshaped: single_blocks.1.linear2.weight (file (6, 15), model (6, 16))",
    ):
        assert part in str(caught.value)


def test_a_leaf_of_which_a_part_has_no_name():
    lacking = TOY._replace(rows=tuple(row for row in TOY.rows if "to_k" not in row.torch))
    with pytest.raises(UserError, match="no name for params/layers_0/block_0/attn/qkv/bias, "):
        keymap.import_tree(exported(), lacking, MODEL, leaves())


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_one_tensor_need_an_axis(number):
    fused = [row for row in TOY.rows if row.torch.endswith("linear1.weight")]
    fused[number] = fused[number]._replace(along=None)
    with pytest.raises(ValueError, match="several rows are single_blocks.0.linear1.weight: all"):
        list(keymap.entries(TOY._replace(rows=tuple(fused)), MODEL, leaves()))


def test_joined_names_must_differ():
    states = {"": {"vae/x": np.zeros(1)}, "vae/": {"x": np.zeros(1)}}
    with pytest.raises(UserError, match="two files hold a tensor vae/x"):
        tensors.joined(states)


def test_mixed_precision_takes_what_holds_all():
    ours = leaves()
    state = {key: tensor.astype(np.float16) for key, tensor in exported().items()}
    state["head.weight"] = state["head.weight"].astype(ml_dtypes.bfloat16)
    found = keymap.import_leaves(state, TOY, MODEL, ours, dtype="file")
    assert {leaf.dtype.name for leaf in found.values()} == {"float32"}
    assert keymap.widest([np.dtype(np.float64), np.dtype(np.int32)]) == "float32"
    assert keymap.widest([np.dtype(np.float16)]) == "float16"
    assert keymap.widest([]) == "float32"

    mixed = leaves()
    mixed["params/b"] = mixed["params/b"].astype(ml_dtypes.bfloat16)
    exported_mixed = keymap.export_tree(unflatten_dict(mixed, sep="/"), TOY, MODEL)
    assert exported_mixed["head.weight"].dtype == np.float32


def test_export_writes_parts_into_a_file(tmp_path):
    """As `transfer.export_file` does: every part where it lies in its tensor."""
    ours = leaves(ml_dtypes.bfloat16)
    found = list(keymap.entries(TOY, MODEL, ours))
    specs = keymap.torch_specs(found, ours)
    with files.safetensors_writer(tmp_path / "w.safetensors", specs) as write:
        for entry in found:
            leaf = ours[entry.path][(*entry.index, *entry.part)]
            write(entry.key, entry.layout.to_torch(leaf, MODEL), entry.axis, entry.start)
    expected = exported(ml_dtypes.bfloat16)
    written = load_file(tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, written, expected)
