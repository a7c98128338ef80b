"""The real command lines, as processes or in this one, with a model that trains in seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_diffusion.metric_lines import of_machine

ROOT = Path(__file__).resolve().parents[1]
HANGS_AFTER = 1200  # seconds; the longest process takes half of it on slow cores


def digits(router: str = "token_choice", **changes: Any) -> list[str]:
    """Arguments for `train`: an MoE block of width 16 on digits; data__batch_size=8 changes a key.

    Tests that change only train and checkpoint share a compiled step. Few steps change the weights
    visibly; Adam's default eps would make full steps of the rounding of gradients near zero.
    """
    values = {
        "model__depth": 1,
        "model__moe__interleave": "false",
        "model__hidden_size": 16,
        "model__num_heads": 2,
        "model__patch_size": 4,
        "model__moe__num_experts": 4,
        "model__moe__hidden_size": 16,
        "data__batch_size": 16,
        "optim__learning_rate": 0.1,
        "optim__schedule": "constant",
        "optim__warmup_steps": 2,
        "optim__eps": 1e-3,
        "ema__decays": "0.5,0.9",
        "ema__warmup": "false",
        "train__num_steps": 3,
        "train__log_every": 1,
        "train__sample_every": 0,
        "train__eval_samples": 0,
        "checkpoint__every": 1,
    } | changes
    keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]
    return ["--config", f"configs/digits.py:router={router}", *keys]


def environment(devices: int, optimize: bool = False) -> dict[str, str]:
    """Of a child. Compilation is most of the time of a small run, hence no optimization."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = count if optimize else f"{os.environ['XLA_FLAGS']} {count}"  # the last one counts
    quickly = str(int(not optimize))
    return os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": quickly}


def run(
    module: str,
    *args: str | Path,
    devices: int = 1,
    optimize: bool = False,
    timeout: float = HANGS_AFTER,
) -> subprocess.CompletedProcess:
    """`python -m moe_diffusion.<module> args` to its end, whatever that is."""
    return subprocess.run(
        [sys.executable, "-m", f"moe_diffusion.{module}", *map(str, args)],
        cwd=ROOT,
        env=environment(devices, optimize),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeed(module: str, *args: str | Path, **options: Any) -> str:
    """`run`, which must succeed; returns what it printed."""
    result = run(module, *args, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextlib.contextmanager
def started(module: str, *args: str | Path, optimize: bool = False) -> Iterator[subprocess.Popen]:
    """A running command; stdout and stderr together are its stdout. It does not outlive the block.

    Yields a Popen whose `stdout` can be read line by line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"moe_diffusion.{module}", *map(str, args)],
        cwd=ROOT,
        env=environment(1, optimize),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(HANGS_AFTER, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen, text: str) -> str:
    """Reads the output up to the line that starts with `text`; returns all that was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return "".join(lines)
    raise AssertionError(f"no line starts with {text!r}:\n{''.join(lines)}")


def refused(capfd: pytest.CaptureFixture, main: Callable, args: Sequence[str | Path]) -> str:
    """The message of a command line that must exit with status 2 and one line on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, args)))
    return the_one_error(stopped.value.code, capfd.readouterr().err)


def the_one_error(status: int, stderr: str) -> str:
    assert status == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr.removeprefix("error: ").rstrip("\n")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes (None: a folder)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not of_machine(k)} for line in lines]


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints; what is being written has another name."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_checkpoint(workdir: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by path and the data iterator's state, read past this project's code."""
    folder = workdir / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        structure = reader.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        state = reader.restore(folder / "state", restore_args=as_numpy)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        data = reader.restore(folder / "data")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}, data


def cluster(processes: int) -> list[dict[str, str]]:
    """What each of several processes finds in its environment, so that they train as one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    all_have = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [all_have | {"JAX_PROCESS_ID": str(number)} for number in range(processes)]


def together(
    module: str,
    *args: str | Path,
    processes: int,
    devices: int = 1,
    optimize: bool = True,
    timeout: float = HANGS_AFTER,
) -> list[str]:
    """Starts a command as several processes that train as one; returns what each printed.

    devices: of each process.
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-m", f"moe_diffusion.{module}", *map(str, args)],
            cwd=ROOT,
            env=environment(devices, optimize) | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in cluster(processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()  # or it is complained of in a later test
            process.stdout.close()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
    return outputs
