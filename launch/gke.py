"""Starts a job on any GKE cluster that has JobSet, with kubectl.

  python -m launch.gke --accelerator v5e:16x16 --slices 2 --image gcr.io/lab/moe-diffusion:1 \\
      --config dsmoe_3b --workdir gs://bucket/dsmoe_3b --dry_run > job.yaml
  python -m launch.gke --accelerator h100:8 --image gcr.io/lab/moe-diffusion:1 --namespace lab \\
      --config dsmoe_l --workdir gs://bucket/dsmoe_l

It fills launch/gke_jobset.yaml in and applies it. A job whose state is saved starts again without
using up --max-restarts; a mistake of the user ends it. docs/pods.md has the rest.
"""

from __future__ import annotations

import json
import shlex
import string
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import job as jobs
from launch.accelerators import GPUS, TPUS
from launch.job import RUN_AGAIN, USER_ERROR, Job
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.writing import save_text

TEMPLATE = Path(__file__).with_name("gke_jobset.yaml")
GRACE = 120  # seconds for the last save
_COORDINATOR_PORT = 8476
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(job: Job, spot: bool = False) -> str:
    """The JobSet of a job, as YAML. spot: on nodes that may be taken away."""
    chips = job.accelerator
    per_host = chips.chips // job.nodes
    resources: dict[str, Any] = {}
    selector: dict[str, str] = {}
    ports: list[Any] = []
    if chips.platform == "tpu":
        selector["cloud.google.com/gke-tpu-accelerator"] = TPUS[chips.kind].gke
        selector["cloud.google.com/gke-tpu-topology"] = chips.topology
        resources["limits"] = {"google.com/tpu": per_host}
        ports = [{"containerPort": 8471}, {"containerPort": 8080}]  # of libtpu and of slices
    elif chips.platform == "cuda":
        selector["cloud.google.com/gke-accelerator"] = GPUS[chips.kind]
        resources["limits"] = {"nvidia.com/gpu": per_host}
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    # A slice is a node pool, and slices of one job must not share one.
    annotations = {_EXCLUSIVE: "cloud.google.com/gke-nodepool"} if chips.platform == "tpu" else {}
    values = {
        "name": job.name,
        "annotations": _block(annotations, 4),
        "max_restarts": job.max_restarts,
        "run_again": RUN_AGAIN,
        "user_error": USER_ERROR,
        "slices": job.slices,
        "hosts": job.nodes,
        "grace": GRACE,
        "selector": _block(selector, 16),
        "image": json.dumps(job.image),
        "args": _list(job.words, 20),
        "environment": _list(_environment(job), 20),
        "ports": _list(ports, 20),
        "resources": json.dumps(resources),
    }
    text = TEMPLATE.read_text().partition("apiVersion:")
    return string.Template(text[1] + text[2]).substitute(values)


def _environment(job: Job) -> list[dict[str, Any]]:
    """The variables of the job. On TPUs, GKE says which hosts belong together; elsewhere we do."""
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    if job.accelerator.platform == "cpu":
        variables.append({"name": "JAX_PLATFORMS", "value": "cpu"})
    if job.accelerator.platform != "tpu" and job.nodes > 1:
        address = f"{job.name}-slice-0-0.{job.name}:{_COORDINATOR_PORT}"
        index = {"fieldRef": {"fieldPath": _INDEX}}
        variables += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
            {"name": "JAX_NUM_PROCESSES", "value": str(job.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
    return variables


def _block(values: Mapping[str, str], indent: int) -> str:
    """A mapping in YAML, one line for each entry."""
    lines = [f"\n{' ' * indent}{name}: {json.dumps(value)}" for name, value in values.items()]
    return "".join(lines) or " {}"


def _list(values: Sequence[Any], indent: int) -> str:
    """A list in YAML, one line for each entry."""
    return "".join(f"\n{' ' * indent}- {json.dumps(value)}" for value in values) or " []"


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = jobs.make_parser("gke", __doc__)
    add = parser.add_argument
    add("--image", required=True, help="container image of launch/Dockerfile, in a registry")
    add("--namespace", default="", help="of Kubernetes (that of kubectl)")
    add("--spot", action="store_true", help="on spot nodes")
    add("--kubectl", default="kubectl", metavar="PATH", help="the program (%(default)s)")
    args, job = jobs.parse(parser, argv)
    jobs.require_remote(job, "a container loses its files", "")
    jobs.tell_of_own_config(job)
    text = manifest(job, args.spot)
    namespace = [f"--namespace={args.namespace}"] if args.namespace else []
    if args.dry_run:
        command = shlex.join([args.kubectl, "apply", *namespace, "--filename"])
        print(f"# {command} of this:\n{text}", end="")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = save_text(text, Path(folder) / f"{job.name}.yaml")
        sys.exit(jobs.run([args.kubectl, "apply", *namespace, "--filename", str(path)]))


if __name__ == "__main__":
    main()
