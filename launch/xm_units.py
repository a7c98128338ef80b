"""Runs what launch/xm_launch.py describes, in the environment that has xmanager.

`python launch/xm_units.py experiment.json`. It imports nothing of this project, since xmanager's
environment does not have it. The exit code is 1 if a local job fails.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from absl import flags
from xmanager import xm, xm_local


def executor_of(told: dict[str, Any]) -> Any:
    """The executor of xmanager, with what a job requires."""
    if told["executor"] == "local":
        return xm_local.Local()
    kind = {"vertex": xm_local.Vertex, "kubernetes": xm_local.Kubernetes}[told["executor"]]
    return kind(requirements=xm.JobRequirements(**told["requirements"]))


async def run(told: dict[str, Any]) -> int:
    """Adds every unit; of local ones `at_once` run at a time. Returns the number that failed."""
    executor = executor_of(told)
    local = told["executor"] == "local"
    failed = []
    async with xm_local.create_experiment(told["title"]) as experiment:
        package = xm.binary if local else xm.container
        (executable,) = experiment.package([package(type(executor).Spec(), told["program"])])
        places = asyncio.Semaphore(told["at_once"] if local else len(told["units"]))

        async def run_one(unit: dict[str, Any]) -> None:
            async with places:
                job = xm.Job(executable, executor, args=unit["args"], env_vars=unit["env"])
                added = await experiment.add(job)
                print(f"unit {added.work_unit_id}: {unit['label']}", flush=True)
                if local:
                    try:
                        await added.wait_until_complete()
                    except xm.ExperimentUnitError:
                        failed.append(unit["label"])

        await asyncio.gather(*map(run_one, told["units"]))
        if failed:  # before xmanager raises about them itself
            print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr, flush=True)
    return len(failed)


def main() -> None:
    flags.FLAGS(sys.argv[:1])  # xmanager reads flags of its own; they keep their defaults
    with open(sys.argv[1]) as file:
        told = json.load(file)
    try:
        failures = asyncio.run(run(told))
    except RuntimeError as error:
        failures = 1
        print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
