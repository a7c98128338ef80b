from __future__ import annotations

import importlib.util
import re

import jax
import pytest

from moe_diffusion import chips
from moe_diffusion.errors import UserError
from moe_diffusion.gpus import memory_bytes, target_config
from moe_diffusion.planning import topologies


@pytest.mark.parametrize(
    "name,kind,shape",
    [
        ("v4:4x4x4", "v4", (4, 4, 4)),
        ("v5e:16x16", "v5e", (16, 16)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
        ("v6e:1x1", "v6e", (1, 1)),
        ("tpu7x:4x4x4", "tpu7x", (4, 4, 4)),
        ("h200:8", "h200", (8,)),
    ],
)
def test_names(name, kind, shape):
    assert chips.parse(name, "--topology", "local") == (kind, shape)


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:", "v5e:axb", "v5e-256", "V5E:2x2", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UserError, match="is unknown") as caught:
        topologies.describe(name)
    assert all(kind in str(caught.value) for kind in (*topologies.CHIPS, "local"))


@pytest.mark.parametrize(
    "name,example", [("v5e:4x4x4", "16x16"), ("v4:4x4", "4x4x4"), ("h100:2x4", "8")]
)
def test_a_shape_of_another_kind(name, example):
    with pytest.raises(UserError, match=f"as in .*{example}"):
        topologies.describe(name)


@pytest.mark.parametrize(
    "name,command", [("v5e:2x2", f"pip install 'jax[tpu]=={jax.__version__}'")]
    + [("h100:8", f"pip install jax-cuda12-plugin=={jax.__version__}")],
)  # fmt: skip
def test_a_missing_compiler_is_named_with_the_command(monkeypatch, name, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape(command)):
        topologies.describe(name)


def test_gpus_beyond_a_host_are_whole_hosts():
    with pytest.raises(UserError, match="whole hosts"):
        topologies.describe("h100:12")


def test_local_is_what_is_here():
    local = topologies.describe("local")
    assert (local.num_chips, local.platform, local.chip) == (8, "cpu", None)
    assert local.hbm_bytes_per_chip is None


def test_every_chip_has_examples_of_its_own_shape():
    for kind, chip in topologies.CHIPS.items():
        for example in chip.examples.split():
            assert chips.parse(example, "--topology", "local")[0] == kind


def test_gpu_descriptions_differ_in_memory():
    texts = {kind: target_config(kind) for kind in ("a100", "h100", "h200")}
    for kind, text in texts.items():
        assert text.count("{") == text.count("}") == 3
        assert f"device_memory_size: {memory_bytes(kind)}" in text
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("Radeon", None),
    ],
)
def test_chips_are_known_by_the_names_of_their_devices(name, kind):
    assert topologies.chip_of(name) == topologies.CHIPS.get(kind)


def test_slices_are_of_tpu_chips():
    for name, slices in (("h100:8", 2), ("local", 2), ("v5e:2x2", 0)):
        with pytest.raises(UserError, match=f"--slices {slices}"):
            topologies.describe(name, slices)
