"""Damaged inputs by the thousand: each is refused in one line, or is proved to be harmless.

`judge` reads a damaged file; it returns what the file is taken for, or raises a UserError. Any
other exception fails. What is taken must be what the whole file holds, but for values that a file
may freely choose: `harmless` says whether it is.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import yaml

from moe_diffusion import config as configs
from moe_diffusion import models
from moe_diffusion.data.latents import Latents
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.features import open_features
from moe_diffusion.interop import autoencoder, describe, families, files, keymap
from tests import cli
from tests.campaign.mutations import RAN, mutations, whole
from tests.preparing import latents_folder

GOLDENS = cli.ROOT / "tests" / "goldens"
SECONDS = 10  # that one input may take


def run(given, kind, seed, count, path, judge, harmless):
    """Counts what became of the inputs: {"refused": ..., "harmless": ...}."""
    counts = Counter()
    path.write_bytes(whole(given, kind))
    assert harmless("nothing", judge(path))
    for name, data in mutations(given, kind, seed, count):
        path.write_bytes(data)
        start = time.process_time()  # other programs may share the cores
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                taken = judge(path)
        except UserError as error:
            message = str(error)
            assert message and len(message) <= 3100 and message.isprintable(), name
            counts["refused"] += 1
        else:
            assert harmless(name, taken), f"{name} was taken"
            counts["harmless"] += 1
        assert time.process_time() - start < SECONDS, name
    assert not os.path.exists(RAN), "code of an input ran"
    print(dict(counts))
    return counts


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_configs(count, tmp_path):
    config = configs.load("configs/digits.py")
    configs.save_json(config, tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())

    def harmless(name, taken):
        configs.validate(taken)
        return models.abstract_variables(models.build(taken.model))["params"]

    counts = run(values, "json", 0, count, tmp_path / "config.json", configs.load_json, harmless)
    assert counts["refused"] > 0.7 * count


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_manifests(count, tmp_path):
    source = latents_folder.write(
        tmp_path / "x", latents_folder.Prompts(latents_folder.COUNT), flip=True
    )
    path = tmp_path / "x" / "manifest.json"
    manifest, indices = json.loads(path.read_text()), np.array([0, 9, 20])
    expected = source.take(indices)
    free = (".scale", ".shift", ".num_values", ".name", ".source", ".split", ".seed", ".records")

    def judge(path):
        taken = Latents(str(path.parent))
        return taken.manifest, taken.take(indices)

    def harmless(name, taken):
        manifest, batch = taken
        same = list(batch) == list(expected) and all(
            np.array_equal(batch[key], expected[key]) for key in expected
        )
        finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in batch.values())
        return same or (finite and (name.endswith(free) or name.split()[0] in FLIPS))

    counts = run(manifest, "json", 1, count, path, judge, harmless)
    assert counts["refused"] > 0.5 * count


# One byte more or less can make another number of a number, which nothing in the file contradicts.
FLIPS = ("flip", "flips", "insert", "remove", "repeat")


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["sit", "dsmoe", "diffmoe", "promoe_tc", "jitmoe"])
def test_hyperparameters(family, count, tmp_path):
    names = {"diffmoe": "diffmoe_shared", "dsmoe": "dsmoe_gqa", "jitmoe": "jit_moe"}
    text = (GOLDENS / names.get(family, family) / "config.json").read_text()
    hparams = {"model": {"params": json.loads(text)["model"]}}
    if family in ("dsmoe", "diffmoe"):
        hparams["basic"] = {"rf": True}

    def judge(path):
        return families.config_from_torch(family, describe.read_hparams(path))

    def harmless(name, taken):
        return models.build(taken.model).input_shape

    counts = Counter()
    for kind in ("json", "yaml"):
        path = tmp_path / f"h.{kind}"
        counts += run(hparams, kind, 2, count, path, judge, harmless)
    assert counts["refused"] > 0.4 * 2 * count


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_weights(count, tmp_path):
    case = GOLDENS / "sit"
    shutil.copy(case / "weights.safetensors", tmp_path)
    hparams = describe.read_hparams(case / "config.json")
    chosen = families.family("sit")
    model = models.build(families.model_config_from_torch("sit", hparams))
    data = (case / "weights.safetensors").read_bytes()

    def judge(path):
        state = files.read_state_dict(path)
        describe.from_shapes(chosen, state)
        return keymap.import_tree(state, chosen, model)

    def harmless(name, taken):
        return set(taken) == {"params", "router_state"}

    path = tmp_path / "weights.safetensors"
    counts = run(data, "safetensors", 3, count, path, judge, harmless)
    assert counts["refused"] > 0.8 * count


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_features_and_images(count, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 4)).astype(np.float32)
    arrays = {
        "arr_0": rng.integers(0, 256, (4, 5, 5, 3), np.uint8),
        "features": rows,
        "mu": rows.mean(0),
        "sigma": np.cov(rows, rowvar=False),
        "count": np.array(6),
    }

    def judge(path):
        features = open_features(str(path))
        images = [] if features.images is None else list(features.images.batches(3, 4))
        return features, images

    def harmless(name, taken):
        features, images = taken
        parts = [*images, features.pool and features.pool.covariance, features.vectors]
        return all(np.isfinite(x).all() for x in parts if x is not None)

    counts = run(arrays, "npz", 4, count, tmp_path / "f.npz", judge, harmless)
    assert counts["refused"] > 0.4 * count


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_autoencoders(count, tmp_path):
    values = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [32, 64],
        "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "act_fn": "silu",
        "scaling_factor": 0.18, "shift_factor": None, "latents_mean": None, "latents_std": None,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    }  # fmt: skip

    def judge(path):
        return autoencoder.network_from_config(autoencoder.read_table(path), "config.json")

    counts = run(
        values, "json", 5, count, tmp_path / "config.json", judge, lambda name, taken: taken.factor
    )
    assert counts["refused"] > 0.5 * count


def test_the_same_seed_gives_the_same_mutations():
    value = {"a": [1, 2.5, "x"], "b": {"c": None}}
    for kind in ("json", "yaml"):
        once, again = (list(mutations(value, kind, 7, 50)) for _ in range(2))
        assert once == again and len({data for _, data in once}) > 30
        assert once != list(mutations(value, kind, 8, 50))
    assert any(b"NaN" in data for _, data in mutations(value, "json", 0, 200))
    texts = [data for _, data in mutations(value, "yaml", 0, 300)]
    assert any(b"os.system" in data for data in texts)
    arrays = {"x": np.ones((2, 3), np.float32)}
    found = list(mutations(arrays, "npz", 0, 100))
    assert found == list(mutations(arrays, "npz", 0, 100))
    assert json.loads(whole(value, "json")) == yaml.safe_load(whole(value, "yaml")) == value
