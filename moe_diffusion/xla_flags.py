"""Flags of XLA and libtpu: one table with the reason for each, and how they come into force.

`train` and `distill` set them before jax starts, and the launchers write them into the environment
of a job. A flag that the user has set in the same variable stays as it is. An unknown flag ends a
process, so the table holds only flags that jaxlib and libtpu accept, and few of them.

`MOE_DIFFUSION_XLA_FLAGS=off` leaves all of them out, and `=show` prints what was set. Nothing here
imports jax. A CPU has no flags, so its results do not depend on this file.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from moe_diffusion.checks import require

SWITCH = "MOE_DIFFUSION_XLA_FLAGS"
_CHOICES = ("", "on", "off", "show")


@dataclass(frozen=True)
class Flag:
    """A flag of a compiler.

    Attributes:
      name: as in `--<name>=<value>`.
      platform: "tpu" or "cuda".
      when: the number of devices or slices from which on there is something to gain.
      reason: what it changes.
    """

    name: str
    value: str
    platform: str
    when: str
    reason: str

    @property
    def variable(self) -> str:
        """The environment variable that the compiler reads."""
        return {"tpu": "LIBTPU_INIT_ARGS", "cuda": "XLA_FLAGS"}[self.platform]

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


_ALWAYS, _DEVICES, _SLICES = "always", "several GPUs", "several slices"
# Documented at docs.jax.dev (GPU performance tips), docs.nvidia.com/jax-toolbox (environment
# variables), and beside the flags of AI-Hypercomputer/maxtext (benchmarks).
FLAGS = (
    Flag("xla_tpu_enable_async_collective_fusion", "true", "tpu", _ALWAYS,
         "runs a collective inside of the computation that it does not depend on"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "tpu", _ALWAYS,
         "the same for the weights that `fsdp` gathers before a layer"),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "tpu", _ALWAYS,
         "spreads one collective over several computations, where one is too short for it"),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "tpu", _ALWAYS,
         "lets the core compute while the links between chips are busy"),
    Flag("xla_enable_async_all_gather", "true", "tpu", _ALWAYS,
         "splits gathering into a start and an end, between which there is room for work"),
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "tpu", _SLICES,
         "hides the sum of gradients over the slow network between slices"),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "tpu", _SLICES,
         "the same where the gradients are of different sizes"),
    Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "cuda", _DEVICES,
         "moves collectives away from what waits for them, so that they overlap with kernels"),
)  # fmt: skip


def for_hardware(platform: str, *, devices: int = 1, slices: int = 1) -> dict[str, str]:
    """The variables with the flags of this hardware; empty where there is nothing to set.

    Args:
      platform: "tpu", "cuda" or "cpu".
      devices: GPUs of the whole run; more than one have collectives to hide.
      slices: TPU slices of the run.
    """
    met = {_ALWAYS: True, _DEVICES: devices > 1, _SLICES: slices > 1}
    flags: dict[str, list[str]] = {}
    for flag in FLAGS:
        if flag.platform == platform and met[flag.when]:
            flags.setdefault(flag.variable, []).append(str(flag))
    return {variable: " ".join(texts) for variable, texts in flags.items()}


def merged(wanted: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """The variables of `wanted` with what the user gave, whose flags come first and stay."""
    result = {}
    for variable, text in wanted.items():
        own = given.get(variable, "").split()
        names = {word.partition("=")[0] for word in own}
        added = [word for word in text.split() if word.partition("=")[0] not in names]
        result[variable] = " ".join([*own, *added])
    return result


def apply() -> dict[str, str]:
    """Sets the flags for this machine in the environment. Call it before jax starts a backend.

    Returns:
      The variables that were set, with their new values.

    Raises:
      UserError: `MOE_DIFFUSION_XLA_FLAGS` has an unknown value.
    """
    switch = os.environ.get(SWITCH, "")
    require(switch in _CHOICES, f"{SWITCH}={switch} is unknown: choose on, off or show")
    platform, devices = _hardware()
    slices = _number("MEGASCALE_NUM_SLICES")
    wanted = {} if switch == "off" else for_hardware(platform, devices=devices, slices=slices)
    variables = merged(wanted, os.environ)
    os.environ.update(variables)
    if switch == "show":
        print(*(f"{name}={value}" for name, value in variables.items()), sep="\n", flush=True)
    return variables


def on_tpu_vm() -> bool:
    """Whether this machine has TPU chips that jax will use."""
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(wanted and chips and importlib.util.find_spec("libtpu"))


def table() -> str:
    """The flags as a table in Markdown."""
    lines = ["| platform | when | variable | flag | what for |", "|---|---|---|---|---|"]
    lines += [f"| {f.platform} | {f.when} | `{f.variable}` | `{f}` | {f.reason} |" for f in FLAGS]
    return "\n".join(lines)


def _hardware() -> tuple[str, int]:
    """("tpu", "cuda" or "cpu", number of GPUs of the whole run as far as it can be seen)."""
    if on_tpu_vm():
        return "tpu", 1
    allowed = os.environ.get("JAX_PLATFORMS", "cuda")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if "cuda" in allowed or "gpu" in allowed:
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
        if gpus and any(map(importlib.util.find_spec, plugins)):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = gpus if visible is None else len(visible.split(","))
            tasks = max(map(_number, ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")))
            return "cuda", gpus * tasks
    return "cpu", 1


def _number(variable: str) -> int:
    """A count that a launcher has set; 1 if it has not, or if it is no number."""
    text = os.environ.get(variable, "1")
    return int(text) if text.isdecimal() else 1
