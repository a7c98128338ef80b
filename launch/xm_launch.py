"""Starts a job, or the sweep of a config, as an experiment of xmanager.

  python -m launch.xm_launch --xm ~/xm/bin/python --config digits --sweep --workdir runs/routers \\
      --accelerator cpu --dry_run
  python -m launch.xm_launch --xm ~/xm/bin/python --executor vertex --accelerator a100:8 \\
      --image gcr.io/lab/moe-diffusion:1 --config dsmoe_b --workdir gs://bucket/dsmoe_b

xmanager needs other versions of packages than the library, so it has an environment of its own:
`python3.11 -m venv ~/xm && ~/xm/bin/pip install -r launch/xmanager.txt`. The local executor starts
plain processes and needs no Docker. A sweep is what `sweep()` of the config file yields.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import job as jobs
from launch.job import PACKAGE, Job
from moe_diffusion.checks import require
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.writing import save_text

UNITS = Path(__file__).with_name("xm_units.py")


def experiment(job: Job, units: Sequence[tuple[str, Job]], args: Any) -> dict[str, Any]:
    """What xm_units.py is told: {"title", "executor", "at_once", "program", "units", ...}.

    The program is a container's image, or the Python that has the library.
    """
    local, chips = args.executor == "local", job.accelerator
    listed = []
    for label, unit in units:
        words = ["-m", f"{PACKAGE}.{unit.command}", *unit.words[1:]] if local else unit.words
        listed.append({"label": label, "args": words, "env": _environment(unit)})
    return {
        "title": job.name,
        "executor": args.executor,
        "at_once": args.at_once,
        "program": args.python if local else job.image,
        "requirements": {} if local or chips.platform == "cpu" else {chips.kind: chips.chips},
        "units": listed,
    }


def _environment(job: Job) -> dict[str, str]:
    platform = {"JAX_PLATFORMS": "cpu"} if job.accelerator.platform == "cpu" else {}
    return {**job.environment, **platform}


def _check(args: Any, job: Job) -> None:
    """Raises a UserError unless this executor can run the job."""
    chips = job.accelerator
    require(job.hosts == 1, f"{job.hosts} machines: xmanager's executors run a job on one")
    if args.executor == "local":
        return
    jobs.require_remote(job, "a container loses its files", "")
    require(bool(job.image), f"--executor {args.executor} needs --image, of launch/Dockerfile")
    # Version 0.8.5 names machines and labels of A100 alone.
    require(
        chips.kind in ("a100", "cpu"),
        f"--accelerator {chips}: --executor {args.executor} knows a100 and cpu; use launch.gke",
    )


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = jobs.make_parser("xm_launch", __doc__)
    add = parser.add_argument
    add("--xm", required=True, metavar="PATH", help="the Python that has xmanager")
    add("--executor", choices=("local", "vertex", "kubernetes"), default="local",
        help="where the jobs run (%(default)s)")  # fmt: skip
    add("--sweep", action="store_true", help="one job for each dict of the config's sweep()")
    add("--at-once", type=int, default=1, metavar="N", help="local jobs at a time (%(default)s)")
    add("--python", default=sys.executable, metavar="PATH", help="of local jobs: has the library")
    add("--image", default="", help="of the other executors: that of launch/Dockerfile")
    args, job = jobs.parse(parser, argv)
    require(args.at_once >= 1, f"--at-once {args.at_once} must be at least 1")
    _check(args, job)
    if args.sweep:
        from launch import sweeps

        require(bool(job.config), "--sweep needs --config, whose file has sweep()")
        units = sweeps.jobs_of(job)
    else:
        units = [(job.name, job)]
    told = experiment(job, units, args)
    python = os.path.expanduser(args.xm)
    command = [python, os.fspath(UNITS)]
    if args.dry_run:
        print(f"# experiment.json\n{json.dumps(told, indent=2)}\n# end of experiment.json")
        jobs.run([*command, "experiment.json"], dry_run=True)
        return
    require(
        Path(python).is_file(),
        f"--xm {args.xm} is not there: python3.11 -m venv ~/xm && ~/xm/bin/pip install "
        "-r launch/xmanager.txt, then --xm ~/xm/bin/python",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = save_text(json.dumps(told), Path(folder) / "experiment.json")
        sys.exit(jobs.run([*command, str(path)]))


if __name__ == "__main__":
    main()
