"""The flags of XLA and libtpu: which hardware has which, and that the user's own stay."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from moe_diffusion import xla_flags
from moe_diffusion.errors import UserError
from tests import cli


@pytest.fixture
def machine(monkeypatch):
    """A machine without accelerators; returns a function that adds device files and packages."""
    files: set[str] = set()
    packages: set[str] = set()
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        xla_flags.glob,
        "glob",
        lambda p: [f for f in files if f.startswith(p.partition("[")[0].rstrip("*"))],
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)

    def add(*names: str) -> None:
        files.update(name for name in names if name.startswith("/"))
        packages.update(name for name in names if not name.startswith("/"))

    return add


def test_a_cpu_has_no_flags(machine):
    before = dict(os.environ)
    assert xla_flags.apply() == {} and dict(os.environ) == before
    assert not any(flag.platform == "cpu" for flag in xla_flags.FLAGS)
    assert xla_flags.for_hardware("cpu", devices=8, slices=2) == {}


def test_a_tpu_vm_gets_those_of_tpus(machine, monkeypatch):
    machine("/dev/accel0", "libtpu")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false --mine=1")
    (flags,) = xla_flags.apply().values()
    assert os.environ["LIBTPU_INIT_ARGS"] == flags
    words = flags.split()
    assert words[:2] == ["--xla_enable_async_all_gather=false", "--mine=1"]
    assert "--xla_enable_async_all_gather=true" not in words
    assert "--xla_tpu_enable_async_collective_fusion=true" in words
    assert not any("data_parallel" in word for word in words)
    assert "XLA_FLAGS" not in os.environ
    assert xla_flags.apply()["LIBTPU_INIT_ARGS"] == flags  # again changes nothing
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    assert (
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true"
        in xla_flags.apply()["LIBTPU_INIT_ARGS"]
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert xla_flags.apply() == {}


def test_several_gpus_overlap_collectives(machine, monkeypatch):
    machine("/dev/nvidia0", "jax_cuda12_plugin")
    assert xla_flags.apply() == {}  # one has no collectives
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert xla_flags.apply() == {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"}
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    machine("/dev/nvidia1")
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert xla_flags.apply() == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    both = {"XLA_FLAGS": "--a=1 --xla_gpu_enable_latency_hiding_scheduler=true"}
    assert xla_flags.apply() == both


def test_the_switch(machine, monkeypatch, capsys):
    machine("/dev/vfio/0", "libtpu")
    monkeypatch.setenv(xla_flags.SWITCH, "off")
    assert xla_flags.apply() == {}
    monkeypatch.setenv(xla_flags.SWITCH, "on")
    assert xla_flags.apply() and capsys.readouterr().out == ""
    monkeypatch.setenv(xla_flags.SWITCH, "show")
    assert capsys.readouterr().out == "" and xla_flags.apply()
    assert capsys.readouterr().out.startswith("LIBTPU_INIT_ARGS=--xla_tpu_")
    monkeypatch.setenv(xla_flags.SWITCH, "yes")
    with pytest.raises(UserError, match="MOE_DIFFUSION_XLA_FLAGS=yes is unknown: choose on, off"):
        xla_flags.apply()


@pytest.mark.slow
def test_jaxlib_accepts_the_flags_of_gpus():
    """jaxlib reads the flags of all platforms, and ends the process at unknown ones."""

    def ends_with(flags: str) -> int:
        code = "import jax; jax.devices()"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode

    assert ends_with(xla_flags.for_hardware("cuda", devices=8)["XLA_FLAGS"]) == 0
    assert ends_with("--xla_gpu_there_is_no_such_flag=true") != 0


@pytest.mark.tpu_aot
def test_libtpu_compiles_with_the_flags_of_tpus():
    """A sum over four chips, with the flags of one and of several slices."""
    code = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices), ("data",))
x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
jax.jit(lambda x: (x.T @ x).sum(0), out_shardings=NamedSharding(mesh, P())).lower(x).compile()
"""
    environment = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    environment |= {"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}

    def ends_with(flags: str) -> int:
        env = os.environ | environment | {"LIBTPU_INIT_ARGS": flags}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, cwd=cli.ROOT
        )
        return ran.returncode

    assert ends_with(xla_flags.for_hardware("tpu", slices=2)["LIBTPU_INIT_ARGS"]) == 0
    assert ends_with("--xla_tpu_there_is_no_such_flag=true") != 0
