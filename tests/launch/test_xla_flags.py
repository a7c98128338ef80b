"""The flags of XLA and libtpu: which hardware has which, and that the user's own stay."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from moe_diffusion import xla_flags
from moe_diffusion.chips import CHIPS
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
def test_a_cpu_trains_with_the_flags_of_all_accelerators(monkeypatch, tmp_path):
    """jaxlib reads the flags of all platforms, and ends the process at unknown ones."""
    flags = xla_flags.for_hardware("cuda", devices=8) | xla_flags.for_hardware("tpu", slices=2)
    assert set(flags) == {"XLA_FLAGS", "LIBTPU_INIT_ARGS"}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags["LIBTPU_INIT_ARGS"])
    usual = os.environ["XLA_FLAGS"]
    words = [*cli.digits(train__num_steps=1), "--workdir", tmp_path]
    monkeypatch.setenv("XLA_FLAGS", f"{usual} --xla_gpu_there_is_no_such_flag=true")
    ran = cli.run("train", *words)
    assert ran.returncode == 1 and "xla_gpu_there_is_no_such_flag" in ran.stderr
    monkeypatch.setenv("XLA_FLAGS", f"{usual} {flags['XLA_FLAGS']}")
    cli.succeed("train", *words)
    assert cli.saved_steps(tmp_path) == [1]


# A sum over the chips of every kind of TPU, of one slice and of two.
COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moe_diffusion.chips import CHIPS
from moe_diffusion.planning.topologies import describe
for kind, chip in CHIPS.items():
    if chip.platform == "tpu":
        for slices in (1, 2):
            topology = describe(chip.examples.split()[0], slices)
            mesh = Mesh(np.array(topology.devices), ("data",))
            put = lambda *axes: NamedSharding(mesh, P(*axes))
            x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=put("data"))
            sums = jax.jit(lambda x: (x.T @ x).sum(0), out_shardings=put())
            assert "all-reduce" in sums.lower(x).compile().as_text()
            print(kind, slices, len(topology.devices), flush=True)
"""


@pytest.mark.tpu_aot
def test_libtpu_compiles_with_the_flags_of_tpus():
    """For every kind, with those of one and of several slices; an unknown one ends the process."""

    def ended(flags: str) -> subprocess.CompletedProcess:
        env = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the tests before may have loaded it, too
        words = [sys.executable, "-c", COMPILE]
        return subprocess.run(words, env=env, capture_output=True, text=True, cwd=cli.ROOT)

    kinds = [kind for kind, chip in CHIPS.items() if chip.platform == "tpu"]
    for slices in (1, 2):
        ran = ended(xla_flags.for_hardware("tpu", slices=slices)["LIBTPU_INIT_ARGS"])
        assert ran.returncode == 0, ran.stderr
        compiled = [line.split()[:2] for line in ran.stdout.splitlines()]
        assert compiled == [[kind, number] for kind in kinds for number in "12"]
    ran = ended("--xla_tpu_there_is_no_such_flag=true")
    assert ran.returncode != 0 and "xla_tpu_there_is_no_such_flag" in ran.stderr
