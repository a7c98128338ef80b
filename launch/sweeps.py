"""Sweeps: the `sweep()` of a config file, and the jobs that it makes of one.

`sweep()` yields dicts. An entry is a key of the config with its value, and the entry "arg" is the
text for `get_config`, which stands after the colon in `digits.py:router=diffmoe`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from launch.job import Job
from moe_diffusion import shipped
from moe_diffusion.checks import require
from moe_diffusion.errors import explained, shown

ARG = "arg"


def jobs_of(job: Job) -> list[tuple[str, Job]]:
    """The job of every dict that `sweep()` yields, each with a label and a workdir of its own.

    The environment must have the library, because a config file imports it.

    Raises:
      UserError: the file has no `sweep`, it fails, or one of its configs cannot be.
    """
    from moe_diffusion import config as configs

    named: dict[str, Job] = {}
    for values in _yielded(job.config):
        file, _, arg = job.config.partition(":")
        arg = str(values.get(ARG, arg))
        keys = {key: _text(value) for key, value in values.items() if key != ARG}
        label = label_of(values)
        require(label not in named, f"{file}: two of sweep() are called {label}: make them differ")
        overrides = (*job.overrides, *(f"--config.{key}={text}" for key, text in keys.items()))
        spec = f"{file}:{arg}" if arg else file
        configs.load(spec, overrides)  # a misspelt key is found before anything is started
        workdir = f"{job.workdir.rstrip('/')}/{label}"
        named[label] = dataclasses.replace(job, config=spec, overrides=overrides, workdir=workdir)
    require(bool(named), f"{job.config}: sweep() yields nothing")
    return list(named.items())


def label_of(values: dict[str, Any]) -> str:
    """A short name: {"arg": "router=dense", "optim.b1": 0.9} -> "router-dense-b1-0.9"."""
    parts = [str(v) if k == ARG else f"{k.split('.')[-1]}={_text(v)}" for k, v in values.items()]
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")


def _text(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _yielded(config: str) -> Iterator[dict[str, Any]]:
    """The dicts of the config file's `sweep()`."""
    path = shipped.find(config.partition(":")[0])
    with explained(f"{path} cannot be imported", "correct it"):
        sweep = getattr(shipped.run_file(path), "sweep", None)
    require(callable(sweep), f"{path} has no function sweep(): add one, or leave out --sweep")
    with explained(f"{path}: sweep() failed", "correct it"):
        yielded = list(sweep())
    for values in yielded:
        require(
            isinstance(values, dict) and bool(values) and all(isinstance(k, str) for k in values),
            f"{path}: sweep() yields {shown(values)}, which is no dict of keys",
        )
        yield values
