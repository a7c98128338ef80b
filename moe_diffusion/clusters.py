"""Connects the processes that a launcher has started, and says whom it waits for."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from typing import Any

import jax

from moe_diffusion.checks import require
from moe_diffusion.errors import UserError, explained
from moe_diffusion.xla_flags import on_tpu_vm

WAIT = 300  # seconds in which all processes must come
LOST = 60  # seconds without a sign of life, after which a process is lost and the others end
_NOTICE = {"heartbeat_timeout_seconds": LOST, "shutdown_timeout_seconds": LOST}
# What an error says that comes of the end of another process, on CPU, GPU and TPU.
_OF_OTHERS = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|peer|heartbeat|coordination|barrier|preempted",
    re.IGNORECASE,
)
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Connects the processes of a cluster; does nothing on a single host. Call before any jax use.

    It recognises a cluster by what the launcher sets:
    - `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (by hand, any cluster);
    - Slurm (a step of `srun` with several tasks), Open MPI (`mpirun` with several ranks);
    - TPU: several worker host names, several slices, or the chips of a TPU VM.

    Raises:
      UserError: the variables contradict each other or are those of another launcher, or not all
        processes come within `WAIT` seconds.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    slurm = _number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if "SLURM_STEP_NODELIST" in env else 1
    if "JAX_NUM_PROCESSES" in env or env.get("JAX_PROCESS_ID", "0") != "0":
        for name in _BY_HAND:
            require(name in env, f"{name} is not set: set all of {', '.join(_BY_HAND)}, or none")
        number, address = _number("JAX_NUM_PROCESSES"), env["JAX_COORDINATOR_ADDRESS"]
        _connect(f"{number} processes at {address}", address, number, _number("JAX_PROCESS_ID"))
    elif slurm > 1:
        # The step's own count: jax takes SLURM_NTASKS, which inside of salloc is the allocation's.
        nodes = env["SLURM_STEP_NODELIST"]
        _connect(f"{slurm} processes of this Slurm step on {nodes}", num_processes=slurm)
    elif _number("OMPI_COMM_WORLD_SIZE") > 1:
        _connect(f"{env['OMPI_COMM_WORLD_SIZE']} processes of mpirun")
    elif "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        _connect(f"the hosts of the TPU: {hosts or env['MEGASCALE_COORDINATOR_ADDRESS']}")
    elif _number("WORLD_SIZE") > 1:
        raise UserError(
            f"WORLD_SIZE={env['WORLD_SIZE']} says that a launcher like torchrun started several "
            "processes, each of which would train alone: start one process per host and set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or unset WORLD_SIZE"
        )
    elif on_tpu_vm():
        with contextlib.suppress(ValueError):  # a lone TPU host, as in a notebook: no coordinator
            jax.distributed.initialize(initialization_timeout=WAIT, **_NOTICE)


def end_if_lost(error: BaseException | None) -> None:
    """Ends this process with one line and code 1 if an error comes of the loss of another process.

    Nothing is put away after that: jax would wait for the lost one, and abort with a core dump.
    """
    if not jax.distributed.is_initialized():
        return
    while error is not None:
        text = str(error).strip() or "?"
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _OF_OTHERS.search(text):
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} ends, since "
                f"another is lost ({text.splitlines()[0][:200]}): start all of them again; the "
                "run goes on from its newest checkpoint",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(1)
        error = error.__context__


def _connect(whom: str, *address: Any, **cluster: Any) -> None:
    print(f"waiting for {whom}, at most {WAIT} s", flush=True)
    remedy = "start all of them, let each reach the first, or unset what names the cluster"

    def give_up() -> None:
        print(f"error: {whom} did not all come within {WAIT} s: {remedy}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(WAIT, give_up)  # jax itself would abort with a core dump
    timer.daemon = True
    timer.start()
    try:
        with explained(f"cannot connect {whom}", remedy, (RuntimeError, ValueError)):
            jax.distributed.initialize(
                *address, initialization_timeout=2 * WAIT, **cluster, **_NOTICE
            )
    finally:
        timer.cancel()


def _number(*names: str) -> int:
    """The first of these environment variables that is set; 1 if none is."""
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return 1
    require(os.environ[name].isdecimal(), f"{name}={os.environ[name]} is no number: correct it")
    return int(os.environ[name])
