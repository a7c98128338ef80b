"""Which accelerators a program can be compiled for, what they can do, and their devices.

A topology is written `<kind>:<shape>`: `v5e:4x4` and `v5p:4x4x4` are slices of TPU chips, `h100:8`
is a host of eight GPUs (`h100:64` eight such hosts), and `local` is what this process sees. Only
`local` needs the hardware: the devices of the others describe chips, and nothing can run on them.
Several slices of TPU chips (multislice) reach one another over the data center's network, DCN.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from moe_diffusion import chips
from moe_diffusion.checks import require
from moe_diffusion.chips import CHIPS, GPUS_PER_HOST, Chip, chip_of
from moe_diffusion.errors import UserError, first_line
from moe_diffusion.gpus import target_config


@dataclass(frozen=True)
class Topology:
    """A named set of chips; `chip` is None if the local devices are of an unknown kind.

    `name` and `shape` are those of one slice.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]
    devices: tuple[Any, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def num_chips(self) -> int:
        return len(self.devices) // self.devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        return len(self.devices) // self.slices

    @property
    def devices_per_chip(self) -> int:
        return self.chip.devices if self.chip else 1

    @property
    def hbm_bytes_per_chip(self) -> int | None:
        """Bytes that a program can use on one chip; None without a fixed limit, as on a CPU."""
        if self.name != "local":
            return self.chip.hbm_bytes * self.devices_per_chip
        limit = (self.devices[0].memory_stats() or {}).get("bytes_limit")
        return limit and limit * self.devices_per_chip


def describe(name: str, slices: int = 1) -> Topology:
    """The topology of a name, or several slices of it.

    Raises:
      UserError: the name is unknown, there is no such slice, or its compiler is missing.
    """
    kind, shape = ("", ()) if name == "local" else chips.parse(name, "--topology", "local")
    platform = CHIPS[kind].platform if kind else None
    require(slices >= 1, f"--slices {slices}: at least 1")
    require(
        slices == 1 or platform == "tpu", f"--slices {slices}: {name} has no slices of TPU chips"
    )
    if name == "local":
        devices = tuple(jax.devices())
        return Topology(name, chip_of(devices[0].device_kind), (len(devices),), devices)
    chip = CHIPS[kind]
    if chip.platform == "tpu":
        devices = tuple(_tpu_devices(name, kind, shape, slices))
    else:
        devices = tuple(_gpu_devices(name, kind, shape))
    if len(devices) != slices * math.prod(shape) * chip.devices:
        raise UserError(f"--topology {name}: the compiler made {len(devices)} devices of it")
    return Topology(name, chip, shape, devices, slices)


def _tpu_devices(name: str, kind: str, shape: tuple[int, ...], slices: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs the TPU compiler: pip install 'jax[tpu]=={jax.__version__}' "
            "(a TPU is not needed)"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU VM's metadata
    # libtpu warns without these two variables, although it uses only the topology's name.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as jax has it on a v4
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {name} is no slice of {kind}: {first_line(error)}") from error


def _gpu_devices(name: str, kind: str, shape: tuple[int, ...]) -> list[Any]:
    (gpus,) = shape
    hosts = -(-gpus // GPUS_PER_HOST)
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise UserError(
            f"--topology {name} needs the CUDA compiler: pip install jax-cuda12-plugin=="
            f"{jax.__version__} jax-cuda12-pjrt=={jax.__version__} (a GPU is not needed)"
        )
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(kind),
            topology=f"1x{hosts}x{gpus // hosts}",
        ).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology {name}: {first_line(error)}") from error
