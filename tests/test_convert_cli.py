"""`python -m moe_diffusion.convert`: there and back, what it reads, and what it refuses.

That every golden keeps every bit is tested in tests/golden, through the same functions.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from moe_diffusion import config as configs
from moe_diffusion import convert, interop, models, sample
from moe_diffusion.errors import UserError
from moe_diffusion.interop import describe, files, tensors, transfer
from moe_diffusion.training import warm_start
from moe_diffusion.training.checkpoint import Checkpointer, StoredWeights
from moe_diffusion.training.run import prepare_run
from moe_diffusion.training.state import TrainState
from tests import cli

GOLDEN = cli.ROOT / "tests" / "goldens" / "dsmoe_rope2d"
OTHER = cli.ROOT / "tests" / "goldens" / "tcdit_shared"


@pytest.fixture(autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def golden(tmp_path):
    """A copy of a case's weights and hyperparameters, to be damaged."""
    folder = tmp_path / "golden"
    folder.mkdir()
    for name in ("weights.safetensors", "config.json"):
        shutil.copy(GOLDEN / name, folder)
    return folder


def run(*args):
    convert.main([str(arg) for arg in args])


def refused(capfd, folder, *args, family="dsmoe"):
    """The one error of an import from `folder`, which must leave nothing behind."""
    before = cli.contents(folder.parent)
    args = ["--family", family, "--input", folder, "--output", folder.parent / "out", *args]
    message = cli.refused(capfd, convert.main, args)
    assert cli.contents(folder.parent) == before
    return message


def test_from_a_golden_to_images_and_back(tmp_path, capfd):
    run("--family", "dsmoe", "--input", GOLDEN / "weights.safetensors", "--output",
        tmp_path / "in", "--hparams", GOLDEN / "config.json", "--json")  # fmt: skip
    out = capfd.readouterr().out.splitlines()
    done = json.loads(out[-1])
    stored = load_file(GOLDEN / "weights.safetensors")
    assert done["tensors"] == len(stored) and done["hparams"] == str(GOLDEN / "config.json")
    what = f"{tmp_path / 'in'} (float32, hyperparameters of"
    assert (
        out[-2].startswith(f"{len(stored)} tensors, 0.4 MB: {what}") and done["dtype"] == "float32"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert configs.load_json(tmp_path / "in" / "config.json").ema.decays == ()

    draw = ["--workdir", tmp_path / "in", "--num", 2, "--steps", 1, "--cfg", 1]
    draw += ["--out", tmp_path / "grid.png", "--npz", tmp_path / "x.npz"]
    sample.main([str(arg) for arg in draw])
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, 4) and arrays["arr_0"].std() > 0.1
    Image.open(tmp_path / "grid.png").verify()

    back = tmp_path / "back.safetensors"
    run("--export", "--family", "dsmoe", "--input", tmp_path / "in", "--output", back)
    back = load_file(back)
    assert set(back) == set(stored)
    for key, tensor in stored.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize(
    ("file", "flag", "stored"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float16", "bfloat16", "bfloat16"),
        ("float64", "file", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtype(tmp_path, golden, file, flag, stored):
    """What is stored, what the config says of it, and that the same bits are exported."""
    path = golden / "weights.safetensors"
    bias = "e_score_correction_bias"  # the router's state is no parameter
    state = {key: x if key.endswith(bias) else x.astype(file) for key, x in load_file(path).items()}
    files.write_state_dict(state, path)
    run("--family", "dsmoe", "--input", path, "--output", tmp_path / "in",
        *(["--dtype", flag] if flag else []))  # fmt: skip
    assert configs.load_json(tmp_path / "in" / "config.json").model.param_dtype == stored
    with StoredWeights(tmp_path / "in") as weights:
        dtypes = {
            (name.partition("/")[0], leaf.dtype.name) for name, leaf in weights.shapes.items()
        }
    assert dtypes == {("params", stored), ("router_state", "float32")}

    back = tmp_path / "back.safetensors"
    run("--export", "--family", "dsmoe", "--input", tmp_path / "in", "--output", back)
    back = load_file(back)
    for key, tensor in state.items():
        expected = tensor if key.endswith(bias) else tensor.astype(stored)
        assert back[key].dtype == expected.dtype
        assert back[key].tobytes() == expected.tobytes(), key


def test_weights_in_bfloat16_draw_and_train(tmp_path, golden):
    run("--family", "dsmoe", "--input", golden, "--output", tmp_path / "in", "--dtype", "bfloat16")
    draw = ["--workdir", tmp_path / "in", "--num", 2, "--steps", 1, "--cfg", 1]
    draw += ["--out", tmp_path / "grid.png", "--npz", tmp_path / "x.npz"]
    sample.main([str(arg) for arg in draw])
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.isfinite(arrays["arr_0"]).all() and arrays["arr_0"].std() > 0.1

    config = configs.load_json(tmp_path / "in" / "config.json")
    config.init_from, config.model.param_dtype = str(tmp_path / "in"), "float32"
    model = models.build(config.model)
    warm_start.check(config, model)  # no other model, since only the precision differs
    tree = warm_start.read(prepare_run(config, model))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


def test_it_begins_a_model_of_other_classes_and_channels(tmp_path, golden):
    """Of 10 classes, the first 4 and "no class" (row 10) stay; the file has the same rows."""
    run("--family", "dsmoe", "--input", golden, "--output", tmp_path / "in")
    changes = ["model.num_classes=4", "model.image_size=16", "model.channels=3", "init.reset=auto"]
    changes += [f"init_from={tmp_path / 'in'}"]
    config = configs.load_json(tmp_path / "in" / "config.json", changes)
    model = models.build(config.model)
    warm_start.check(config, model)
    params = warm_start.read(prepare_run(config, model))["params"]
    table = load_file(golden / "weights.safetensors")["y_embedder.embedding_table.weight"]
    found = params["label_embed"]["embedding"]
    np.testing.assert_array_equal(found, table[[0, 1, 2, 3, 10]])
    assert params["patch_embed"]["kernel"].shape[0] == config.model.patch_size**2 * 3
    assert not np.any(params["final"]["linear"]["kernel"])  # a new last layer is zero


def test_the_state_dict_may_be_changed_on_the_way(tmp_path, golden):
    key = "final_layer.linear.weight"
    plain = load_file(golden / "weights.safetensors")[key]
    transfer.import_folder(
        "dsmoe",
        golden,
        tmp_path / "in",
        change=lambda state: tensors.adjusted(state, {key: lambda w: w + 1}),
    )
    transfer.export_file("dsmoe", tmp_path / "in", tmp_path / "back.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "back.safetensors")[key], plain + 1)


@pytest.fixture
def trained(tmp_path):
    """A workdir with live weights and two averages, without the time that training takes."""
    config = configs.default()
    config.model.update(image_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    config.model.router.name = "dense"
    config.ema.decays = (0.5, 0.9)
    rng = np.random.default_rng(0)
    shapes = models.abstract_variables(models.build(config.model))["params"]

    def draw():
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), shapes)

    emas = {decay: {"params": draw(), "router_state": {}} for decay in ("0.5", "0.9")}
    state = TrainState(jnp.asarray(2), draw(), {}, emas, {"m": jnp.zeros(1)})
    saver = Checkpointer(tmp_path / "run", config.checkpoint)
    saver.save(2, state, {})
    saver.close()
    configs.save_json(config, tmp_path / "run" / "config.json")
    return tmp_path / "run", state


def test_an_average_of_a_run_is_exported(tmp_path, capfd, trained):
    workdir, state = trained
    export = ["--export", "--family", "sit", "--input", workdir, "--output"]
    for ema, params in (
        (None, state.emas["0.5"]["params"]),
        ("0.9", state.emas["0.9"]["params"]),
        ("none", state.params),
    ):
        path = tmp_path / f"{ema}.safetensors"
        run(*export, path, *(["--ema", ema] if ema else []))
        kernel = np.asarray(params["final"]["linear"]["kernel"])
        np.testing.assert_array_equal(load_file(path)["final_layer.linear.weight"], kernel.T)
    for args, message in (
        (["y.safetensors", "--ema", "0.7"], "keeps no average of decay 0.7; it keeps: 0.5, 0.9"),
        (["y.pt"], "y.pt: weights are written as .safetensors"),
        (["y.safetensors", "--config", "x"], "--config does not go with --export"),
        (["y.safetensors", "--dtype", "float32"], "--dtype does not go with --export"),
        (["y.safetensors", "--family", "jit"], "family 'jit' has no name for params/"),
        (["y.safetensors", "--input", tmp_path], "is not a workdir (it has no config.json)"),
    ):
        assert message in cli.refused(capfd, convert.main, [*export, tmp_path / args[0], *args[1:]])
        assert not (tmp_path / args[0]).exists()
    config = configs.load_json(workdir / "config.json")
    config.model.hidden_size = 16
    configs.save_json(config, workdir / "config.json")
    args = [*export, tmp_path / "y.safetensors"]
    assert "is of another model than" in cli.refused(capfd, convert.main, args)


def test_hyperparameters_are_found(tmp_path, golden, monkeypatch):
    """Beside the weights, above the folder `checkpoints`, of a named config, or of the shapes."""
    hparams = describe.read_hparams(golden / "config.json")
    weights = golden / "weights.safetensors"

    def origin(path=weights, **options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return transfer.import_folder("dsmoe", path, tmp_path / "out", **options)["hparams"]

    assert origin() == str(golden / "config.json")
    # The form of the authors' yaml files, with what the shapes tell left out.
    for key in ("depth", "hidden_size", "num_classes", "learn_sigma"):
        del hparams[key]
    del hparams["MoE_config"]["moe_intermediate_size"], hparams["MoE_config"]["use_shared_expert"]
    text = yaml.safe_dump({"basic": {"rf": True}, "model": {"params": hparams}})
    (golden / "config_x.yaml").write_text(text)
    (golden / "config.json").unlink()
    assert origin() == str(golden / "config_x.yaml")
    (golden / "checkpoints").mkdir()
    moved = weights.rename(golden / "checkpoints" / "w.safetensors")
    assert origin(moved) == str(golden / "config_x.yaml")
    assert configs.load_json(tmp_path / "out" / "config.json").diffusion.path == "flow"
    spec = tmp_path / "named.py"
    spec.write_text(
        "from moe_diffusion import config\n"
        f"def get_config(arg=None): return config.load_json({str(tmp_path / 'kept.json')!r})\n"
    )
    shutil.copy(tmp_path / "out" / "config.json", tmp_path / "kept.json")
    (golden / "config_x.yaml").unlink()
    assert origin(moved, config=str(spec)) == str(spec)


def test_the_index_of_shards_is_no_hyperparameter_file(tmp_path, golden, capfd):
    """Beside it: nothing; a file with its name; the authors' config_*.yaml among other files."""
    config = json.loads((golden / "config.json").read_text())
    (golden / "config.json").unlink()
    state, index = load_file(golden / "weights.safetensors"), "m.safetensors.index.json"
    (golden / "weights.safetensors").unlink()
    keys, shards = list(state), ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
    for shard, names in zip(shards, (keys[::2], keys[1::2]), strict=True):
        files.write_state_dict({key: state[key] for key in names}, golden / shard)
    table = {key: shards[i % 2] for i, key in enumerate(keys)}
    (golden / index).write_text(json.dumps({"weight_map": table}))
    message = refused(capfd, golden / index)
    assert "there is no .yaml file beside" in message and "write rope_type" in message
    message = refused(capfd, golden / index, "--hparams", golden / index)
    assert "is an index of shards, no hyperparameter file: pass another" in message

    def origin(path):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = transfer.import_folder("dsmoe", path, tmp_path / "out")
        assert done["tensors"] == len(state)
        return done["hparams"]

    (golden / "environment.yaml").write_text("name: x")
    (golden / "config_L.yaml").write_text(yaml.safe_dump({"model": {"params": config["model"]}}))
    assert origin(golden / index) == origin(golden) == str(golden / "config_L.yaml")
    (golden / index).unlink()
    assert origin(golden) == str(golden / "config_L.yaml")
    (golden / "m.json").write_text(json.dumps(config))
    (golden / index).write_text(json.dumps({"weight_map": table}))
    assert origin(golden / index) == str(golden / "m.json")


def test_prefixes_of_wrappers(tmp_path, golden):
    """Lightning's model. around DDP's module.; ema_model. beside it is taken."""
    state = load_file(golden / "weights.safetensors")
    wrapped = {f"model.module.{key}": np.zeros_like(value) for key, value in state.items()}
    for prefix in ("model.", "ema_model.module."):
        wrapped |= {f"{prefix}{key}": value for key, value in state.items()}
        if prefix == "model.":
            files.write_state_dict(wrapped, golden / "weights.safetensors")
            with pytest.raises(UserError, match="are the same tensor under two prefixes"):
                transfer.import_folder("dsmoe", golden, tmp_path / "in")
            wrapped = {key: x for key, x in wrapped.items() if key.startswith("model.module.")}
    files.write_state_dict(wrapped, golden / "weights.safetensors")
    assert transfer.import_folder("dsmoe", golden, tmp_path / "in")["weights"] == "ema_model"
    transfer.export_file("dsmoe", tmp_path / "in", tmp_path / "back.safetensors")
    key = "final_layer.linear.weight"
    np.testing.assert_array_equal(load_file(tmp_path / "back.safetensors")[key], state[key])


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"num_heads": 4}, "it was, as it seems, trained without label dropout"),
        ({"num_heads": 4, "class_dropout_prob": 0.0}, "it was trained without label dropout"),
        ({"num_heads": 4, "num_classes": 10}, "it was trained without label dropout"),
        ({"num_heads": 4, "num_classes": 9}, None),  # whoever says so
    ],
)
def test_a_class_table_without_the_null_label(hparams, message, tmp_path, capfd):
    """The golden SiT of 10 classes, without the last of its 11 rows."""
    folder = tmp_path / "sit"
    state = load_file(GOLDEN.parent / "sit" / "weights.safetensors")
    key = "y_embedder.embedding_table.weight"
    assert len(state[key]) == 11
    files.write_state_dict(state | {key: state[key][:-1]}, folder / "w.safetensors")
    (folder / "w.yaml").write_text(yaml.safe_dump(hparams))
    if message is None:
        transfer.import_folder("sit", folder, tmp_path / "out")
        return
    said = refused(capfd, folder, family="sit")
    assert message in said and "has 10 rows for 10 classes" in said
    assert "cannot be guided (cfg 1 alone means something)" in said
    assert "append one of zeros" in said


def test_whole_numbers_are_no_weights(golden, capfd):
    state = load_file(golden / "weights.safetensors")
    key = "final_layer.linear.bias"
    files.write_state_dict(state | {key: state[key].view(np.int32)}, golden / "weights.safetensors")
    assert f"1 no floating numbers: {key} (int32)" in refused(capfd, golden)


def test_a_message_does_not_echo_a_whole_file(golden, capfd):
    for values in ({"x" * 89_000: 1}, {"depth": "y" * 89_000}, {"depth": [["z"] * 999] * 99}):
        (golden / "config.json").write_text(json.dumps(values))
        assert len(refused(capfd, golden)) < 3100


def test_a_dit_tells_itself(tmp_path):
    """A bare state dict of DiT: its shapes, and the number of heads that its width has."""
    hparams = {"input_size": 4, "hidden_size": 384, "depth": 1, "num_heads": 6, "mlp_ratio": 0.1}
    model = models.build(interop.model_config_from_torch("dit", hparams))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), models.abstract_variables(model))
    interop.save_torch(model, variables, tmp_path / "DiT.safetensors", "dit")
    transfer.import_folder("dit", tmp_path, tmp_path / "out")
    config = configs.load_json(tmp_path / "out" / "config.json")
    assert (config.model.num_heads, config.model.depth, config.model.image_size) == (6, 1, 4)
    assert (config.diffusion.path, config.sampling.sampler) == ("ddpm", "ddpm")
    assert int(config.model.mlp_ratio * 384) == 38


def test_training_arguments_tell(tmp_path):
    from_args = transfer.families.family("sit").from_args
    args = {"model": "SiT-B/4", "image_size": 512, "num_classes": 10, "epochs": 3}
    expected = {"input_size": 64, "patch_size": 4, "depth": 12, "hidden_size": 768}
    assert from_args(args) == {**expected, "num_heads": 12, "num_classes": 10}
    assert from_args({"config": "config/000_DSMoE_B.yaml"}) is None
    args = {"model": "DiT-S/2", "image_size": 256, "num_experts": 8, "rf": True, "epochs": 3}
    assert from_args(args) is None  # of a DiT-MoE
    described = transfer.families.family("dit_moe").from_args(args)
    config = transfer.families.config_from_torch("dit_moe", described)
    assert (config.model.hidden_size, config.model.moe.num_experts) == (384, 8)
    if importlib.util.find_spec("torch") is None:
        return
    import argparse

    import torch

    state = {
        key: torch.from_numpy(value)
        for key, value in load_file(GOLDEN / "weights.safetensors").items()
    }
    ema = {f"module.{key}": tensor + 0 for key, tensor in state.items()}
    everything = {"model": {}, "ema": ema, "args": argparse.Namespace(config="x.yaml")}
    torch.save(everything, tmp_path / "0700000.pt")
    hparams = str(GOLDEN / "config.json")
    done = transfer.import_folder("dsmoe", tmp_path, tmp_path / "out", hparams=hparams)
    assert done["weights"] == "ema" and done["tensors"] == len(state)


def test_no_hyperparameters(capfd, golden):
    (golden / "config.json").unlink()
    message = refused(capfd, golden)
    assert "there is no .yaml file beside" in message and "pass --hparams file.yaml" in message
    # Shapes tell the rest; with rope there is no position table to tell the size of the image.
    asked = "input_size, num_heads, MoE_config.num_experts_per_tok, MoE_config.n_group, "
    asked += "MoE_config.topk_group, MoE_config.routed_scaling_factor into"
    assert f"of family dsmoe: write rope_type, {asked}" in message
    for name in ("a.yaml", "b.yaml"):
        (golden / name).write_text("{}")
    assert "holds a.yaml, b.yaml: choose one with --hparams" in refused(capfd, golden)
    message = refused(capfd, golden, "--hparams", golden / "c.yaml")
    assert "no hyperparameter file at" in message
    for text, said in (("{", "is no valid yaml file"), ("3", "holds 3, not a table")):
        (golden / "a.yaml").write_text(text)
        assert said in refused(capfd, golden, "--hparams", golden / "a.yaml")


def test_another_width(capfd, golden):
    config = json.loads((golden / "config.json").read_text())
    config["model"]["hidden_size"] = config["model"]["MoE_config"]["hidden_size"] = 64
    (golden / "config.json").write_text(json.dumps(config))
    message = refused(capfd, golden)
    shapes = re.findall(r"(blocks\.0\.\S+) \(file (\(.*?\)), model (\(.*?\))\), ", message)
    assert ("blocks.0.adaLN_modulation.1.weight", "(192, 32)", "(384, 64)") in shapes
    assert "more); by its hyperparameters hidden_size is 64, but 32 in the file" in message


def test_missing_and_unexpected_keys(capfd, golden):
    state = load_file(golden / "weights.safetensors")
    bias = state.pop("final_layer.linear.bias")
    files.write_state_dict(state | {"extra": bias}, golden / "weights.safetensors")
    message = refused(capfd, golden)
    assert "1 missing: final_layer.linear.bias; 1 unexpected: extra" in message
    assert "its names are those of" not in message


def test_another_family(capfd, golden):
    """With its own hyperparameters, which dsmoe does not know, and with those of a dsmoe."""
    shutil.copy(OTHER / "weights.safetensors", golden)
    hint = "; its names are those of family tcdit, not of dsmoe"
    message = refused(capfd, golden)
    assert "missing: " in message and "unexpected: " in message and message.endswith(hint)
    shutil.copy(OTHER / "config.json", golden)
    message = refused(capfd, golden)
    assert "unknown hyperparameter 'n_shared_experts' in MoE_config" in message
    assert f"{hint}: " in message and "missing: blocks.{i}.attn.k_proj.bias, " in message
    assert re.search(r"unexpected: blocks.1.mlp.experts.0.down_proj.weight, .* more\)$", message)
    assert "unknown family 'vit'; choose one of dit, " in refused(capfd, golden, family="vit")


def test_damaged_and_absent_files(capfd, golden):
    path = golden / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "is damaged or no safetensors file" in refused(capfd, golden)
    path.unlink()
    assert "should hold one weight file; it holds none" in refused(capfd, golden)
    assert "no weight file at" in refused(capfd, path)


def test_an_unsafe_pickle(capfd, golden):
    if importlib.util.find_spec("torch") is None:
        (golden / "w.pt").write_bytes(b"")
        assert "needs PyTorch" in refused(capfd, golden / "w.pt")
        return
    import torch

    torch.save({"ema": {"b": torch.ones(1)}, "code": shutil.rmtree}, golden / "w.pt")
    assert "holds a shutil.rmtree, and only weights" in refused(capfd, golden / "w.pt")


def test_bad_flags(capfd, golden):
    hparams = golden / "config.json"
    message = refused(capfd, golden, "--config", "configs/digits.py", "--hparams", hparams)
    assert "--hparams and --config both say what the model is" in message
    assert refused(capfd, golden, "--ema", "0.9") == "--ema needs --export"
    assert "holds one state dict; leave out weights" in refused(capfd, golden, "--weights", "ema")
    args = ["--family", "dsmoe", "--input", golden, "--output", golden]
    assert "exists: name another output" in cli.refused(capfd, convert.main, args)
    message = cli.refused(capfd, convert.main, [*args[:-1], "gs://bucket/out"])
    assert message.startswith("--output gs://bucket/out is remote, and convert needs a local path")
    with pytest.raises(UserError, match="^gs://bucket/out is remote: convert into a local folder"):
        transfer.import_folder("dsmoe", golden, "gs://bucket/out")


def test_a_failed_write_leaves_nothing(golden, monkeypatch):
    def fail(folder, leaves, done):
        (folder / "checkpoints").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(transfer, "write_weights", fail)
    before = cli.contents(golden.parent)
    with pytest.raises(UserError, match="could not be written: disk full"):
        transfer.import_folder("dsmoe", golden, golden.parent / "out")
    assert cli.contents(golden.parent) == before


def test_likely_families():
    """By their names alone."""
    for name, expected in (
        ("dsmoe_gqa", ["dsmoe"]),
        ("sit", ["dit", "sit"]),
        ("tcdit_shared", ["tcdit"]),
        ("ecdit_shared", ["ecdit"]),
        ("diffmoe_shared", ["diffmoe"]),
        ("dit_moe", ["dit_moe"]),
        ("promoe_ec", ["promoe_tc", "promoe_ec"]),
        ("jit_dense", ["jit"]),
        ("jit_moe", ["jitmoe"]),
    ):
        state = files.read_state_dict(GOLDEN.parent / name / "weights.safetensors")
        assert describe.likely_families(state) == expected, name
        assert describe.likely_families(f"module.{key}" for key in state) == expected, name
    assert describe.likely_families(["encoder.conv.weight", "t_embedder.mlp.0.bias"]) == []


def test_help_shows_examples(capfd):
    with pytest.raises(SystemExit) as stopped:
        convert.main(["--help"])
    assert stopped.value.code == 0
    text = capfd.readouterr().out
    assert "python -m moe_diffusion.convert --export --family dsmoe" in text
