"""Several processes that train as one."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os

import jax


def initialize() -> None:
    """Connects the processes of a cluster; does nothing on a single host. Call before any jax use.

    It recognises a cluster by what the launcher sets:
    - `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (by hand, any cluster);
    - Slurm (`srun` with several tasks), Open MPI (`mpirun` with several ranks);
    - TPU: several worker host names, several slices, or the chips of a TPU VM.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_NUM_PROCESSES" in env:
        number, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], number, index)
    elif _has_several_tasks():
        jax.distributed.initialize()
    elif _is_tpu_vm():
        with contextlib.suppress(ValueError):  # a lone TPU host, as in a notebook: no coordinator
            jax.distributed.initialize()


def is_main_process() -> bool:
    """True on the one process that writes files and prints."""
    return jax.process_index() == 0


def _has_several_tasks() -> bool:
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    return (
        ("SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1)
        or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
    )


def _is_tpu_vm() -> bool:
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(wanted and chips and importlib.util.find_spec("libtpu"))
