"""What a result says that it was made with."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import jax
import pytest
from jax.lax import Precision

from moe_diffusion import __version__
from moe_diffusion import config as configs
from moe_diffusion.evaluation import precision
from moe_diffusion.evaluation.record import made_with
from tests.preparing import latents_folder


def test_a_record_of_a_run():
    config = configs.load("configs/digits.py:router=diffmoe", ["model.router.max_capacity=2"])
    record = made_with(config, devices=1)
    assert json.loads(json.dumps(record)) == record
    assert list(record) == ["dtype", "router", "training_data", "matmul", "devices", "software"]
    assert record["router"] == {
        "name": "diffmoe", "group": config.model.router.group, "threshold": "dynamic",
        "max_capacity": 2.0,
    }  # fmt: skip
    assert (record["dtype"], record["matmul"]) == ("float32", "float32")
    assert record["devices"] == {"count": 1, "kind": "cpu"}
    software = record["software"]
    assert software.pop("moe_diffusion").startswith(__version__)
    assert software.pop("python") == platform.python_version()
    assert software == {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}


def test_routers_have_only_what_they_have():
    for router in ("dense", "token_choice"):
        config = configs.load(f"configs/digits.py:router={router}", ["model.dtype=bfloat16"])
        record = made_with(config)
        group = {} if router == "dense" else {"group": config.model.router.group}
        assert record["router"] == {"name": router} | group
        assert record["dtype"] == "bfloat16"
        assert record["devices"]["count"] == jax.device_count()


def test_a_record_of_a_file_is_of_the_machine_alone():
    assert list(made_with()) == ["matmul", "devices", "software"]


def mirrored(*overrides):
    config = configs.load("configs/digits.py", overrides)
    return made_with(config)["training_data"]


def test_flips_are_those_that_training_saw(tmp_path):
    assert mirrored() == {"augment": "none", "mirrored": "no"}
    assert mirrored("data.augment=flip") == {"augment": "flip", "mirrored": "yes"}
    folder = (f"data.source=latents:{tmp_path}", "data.augment=flip")
    assert mirrored(*folder)["mirrored"] == "unknown"
    for flip, answer in ((False, "no"), (True, "yes")):
        shutil.rmtree(tmp_path)
        latents_folder.write(tmp_path, latents_folder.Images(latents_folder.COUNT), flip=flip)
        assert mirrored(*folder)["mirrored"] == answer
        assert mirrored(folder[0], "data.augment=none")["mirrored"] == "no"


H200 = SimpleNamespace(platform="gpu", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", compute_capability="7.0")
TPU, CPU = SimpleNamespace(platform="tpu"), SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("device", "of_fast", "of_tf32", "of_float32"),
    [
        (H200, "tf32", "tf32", "float32"),
        (V100, "float32", "float32", "float32"),
        (TPU, "1 bf16 pass", "3 bf16 passes", "float32"),
        (CPU, "float32", "float32", "float32"),
    ],
)
def test_what_float32_products_are_computed_in(device, of_fast, of_tf32, of_float32, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: device.platform)
    found = []
    for name in ("fast", "tf32", "float32"):
        with precision.matmul_precision(name):
            found.append(precision.matmul_used())
    assert found == [of_fast, of_tf32, of_float32]
    assert jax.config.jax_default_matmul_precision is None


def test_the_precision_reaches_the_program(monkeypatch):
    """A product of float32 arrays that is traced inside asks for more than jax's default."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def asked(name):
        with precision.matmul_precision(name):
            product = jax.jit(lambda x: x @ x).trace(jax.ShapeDtypeStruct((2, 2), "float32"))
        (equation,) = product.jaxpr.eqns
        return equation.params["precision"]

    both = [asked(name) for name in ("fast", "tf32", "float32")]
    assert both == [None, (Precision.HIGH,) * 2, (Precision.HIGHEST,) * 2]
