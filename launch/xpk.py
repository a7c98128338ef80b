"""Starts a workload on a GKE cluster that xpk has made.

  python -m launch.xpk --cluster pod --zone us-central2-b --accelerator v5e-256 --slices 2 \\
      --image gcr.io/lab/moe-diffusion:1 --config dsmoe_3b --workdir gs://bucket/dsmoe_3b --dry_run

xpk needs other versions of packages than the library, so it has an environment of its own:
`python3.11 -m venv ~/xpk && ~/xpk/bin/pip install -r launch/xpk.txt`, and then
`--xpk ~/xpk/bin/xpk`. It also needs gcloud and kubectl. The image is that of launch/Dockerfile.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from launch import job as jobs
from launch.job import RUN_AGAIN, Job
from moe_diffusion.checks import require
from moe_diffusion.cli import exits_on_user_error

GRACE = 120  # seconds for the last save
# xpk ends a workload at every code but 42, 127 to 255, and these.
_CODES = (1, RUN_AGAIN)
# xpk's names of hosts of eight GPUs.
_GPUS = {"h100": "h100-80gb-8", "h200": "h200-141gb-8"}


def device(job: Job) -> list[str]:
    """The flags of xpk that say what the job runs on.

    Raises:
      UserError: xpk does not offer it.
    """
    chips = job.accelerator
    if chips.platform == "tpu":
        # Slices of the same size have several shapes where a shape has three sides.
        name = chips.cloud_type if len(chips.shape) == 2 else f"{chips.kind}-{chips.topology}"
        return [f"--tpu-type={name}", f"--num-slices={job.slices}"]
    whole = chips.kind in _GPUS and chips.chips == 8 * job.nodes
    require(whole, f"--accelerator {chips}: xpk takes TPUs and whole hosts of h100 or h200")
    return [f"--device-type={_GPUS[chips.kind]}", f"--num-nodes={job.nodes}"]


def command(job: Job, xpk: str, cluster: str, options: Sequence[str]) -> list[str]:
    """The command line of xpk. options: further ones, like --zone and --spot."""
    return [
        xpk,
        "workload",
        "create",
        f"--workload={job.name}",
        f"--cluster={cluster}",
        *device(job),
        f"--docker-image={job.image}",
        f"--max-restarts={job.max_restarts}",
        f"--restart-on-exit-codes={','.join(map(str, _CODES))}",
        f"--termination-grace-period-seconds={GRACE}",
        *(f"--env={name}={value}" for name, value in job.environment.items()),
        *options,
        f"--command={shlex.join(['moe-diffusion', *job.words])}",
    ]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = jobs.make_parser("xpk", __doc__)
    add = parser.add_argument
    add("--cluster", required=True, help="of GKE, made by `xpk cluster create`")
    add("--image", required=True, help="container image of launch/Dockerfile, in a registry")
    add(
        "--xpk", default="xpk", metavar="PATH", help="the program, in its environment (%(default)s)"
    )
    add("--project", default="", help="of Google Cloud (that of gcloud)")
    add("--zone", default="", help="of the cluster (that of gcloud)")
    add("--storage", action="append", default=[], metavar="NAME",
        help="of `xpk storage`, mounted where it says; repeatable")  # fmt: skip
    add("--spot", action="store_true", help="spot capacity")
    add("--reservation", default="", metavar="NAME", help="reserved capacity")
    args, job = jobs.parse(parser, argv)
    require(not (args.spot and args.reservation), "--spot and --reservation exclude each other")
    if not args.storage:
        jobs.require_remote(job, "a container loses its files", ", or mount a --storage")
    options = [f"--{name}={getattr(args, name)}" for name in ("project", "zone")
               if getattr(args, name)]  # fmt: skip
    options += [f"--storage={name}" for name in args.storage]
    options += ["--spot"] if args.spot else []
    options += [f"--reservation={args.reservation}"] if args.reservation else []
    jobs.tell_of_own_config(job)
    program = os.path.expanduser(args.xpk)
    words = command(job, program, args.cluster, options)
    if not args.dry_run:
        require(
            shutil.which(program) is not None,
            f"--xpk {args.xpk} is not there: python3.11 -m venv ~/xpk && ~/xpk/bin/pip "
            "install -r launch/xpk.txt, then --xpk ~/xpk/bin/xpk",
        )
    sys.exit(jobs.run(words, args.dry_run))


if __name__ == "__main__":
    main()
