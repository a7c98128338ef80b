"""Dry runs of the launchers, whose whole text is kept in goldens/ and shown in docs/pods.md.

`python -m tests.launch.dry_runs` writes both anew.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
from pathlib import Path

from tests import cli

GOLDENS = Path(__file__).with_name("goldens")
PAGE = cli.ROOT / "docs" / "pods.md"

# Name of a golden text -> the command. Those of the page have the name of their launcher.
COMMANDS = {
    "tpu_vm": "launch.tpu_vm --accelerator v5e-16 --zone us-west4-a --spot "
    "--install git+https://example.org/moe_diffusion@v0.1.0 "
    "--config dsmoe_b --workdir gs://bucket/dsmoe_b --dry_run",
    "tpu_vm_slices": "launch.tpu_vm --accelerator v5p:4x4x4 --slices 2 --zone us-east5-a "
    "--project lab --reserved --keep --install git+https://example.org/moe_diffusion@v0.1.0 "
    "--env LIBTPU_INIT_ARGS=--xla_enable_async_all_gather=false --env NOTE=a'b "
    "--config tests/absent.py:x=1 --config.seed=3 --workdir s3://bucket/x --name run-3 --dry_run",
    "slurm": "launch.slurm --config dsmoe_l --workdir /shared/runs/dsmoe_l --accelerator h100:32 "
    "--python /shared/env/bin/python --time 24:00:00 --sbatch=--partition=gpu --dry_run",
    "slurm_tasks_per_gpu": "launch.slurm --command distill --config flux_moe_l "
    "--config.distill.teacher=/shared/flux_dev --workdir /shared/runs/l --accelerator h200:4 "
    "--tasks-per gpu --python /shared/env/bin/python --no-xla-flags --max-restarts 0 --dry_run",
    "slurm_cpu": "launch.slurm --command prepare --accelerator cpu --nodes 2 --workdir latents "
    "--python python3 --dry_run -- --source folder:/data --size 256 --vae sd-vae-ft-ema",
    "xpk": "launch.xpk --cluster pod --zone us-central2-b --accelerator v5e-256 --slices 2 "
    "--image gcr.io/lab/moe-diffusion:1 --config dsmoe_3b --workdir gs://bucket/dsmoe_3b --dry_run",
    "xpk_gpu": "launch.xpk --cluster pod --accelerator h100:16 --storage disk --spot "
    "--image gcr.io/lab/moe-diffusion:1 --command evaluate --workdir /disk/run --dry_run "
    "-- --num 50000 --cfg 1.5",
    "gke": "launch.gke --accelerator v5e:16x16 --slices 2 --image gcr.io/lab/moe-diffusion:1 "
    "--config dsmoe_3b --workdir gs://bucket/dsmoe_3b --dry_run",
    "gke_gpu": "launch.gke --accelerator h100:16 --image lab/moe:1 --namespace lab --spot "
    "--config dsmoe_l --workdir gs://bucket/dsmoe_l --dry_run",
    "gke_cpu": "launch.gke --accelerator cpu --image lab/moe:1 --no-xla-flags "
    "--command sample --workdir gs://bucket/run --dry_run -- --num 64 --out grid.png",
    "xm_launch": "launch.xm_launch --xm ~/xm/bin/python --python .venv/bin/python "
    "--config digits --sweep --workdir runs/routers --accelerator cpu --dry_run",
    "xm_launch_vertex": "launch.xm_launch --xm ~/xm/bin/python --executor vertex "
    "--accelerator a100:8 --image gcr.io/lab/moe-diffusion:1 --config dsmoe_b "
    "--workdir gs://bucket/dsmoe_b --dry_run",
}
ON_PAGE = [name for name in COMMANDS if "_" not in name or name in ("tpu_vm", "xm_launch")]


def printed(name: str) -> str:
    """What a dry run prints, warnings last; places of this machine are replaced."""
    module, *words = shlex.split(COMMANDS[name].replace("a'b", '"a\'b"'))
    output, warnings = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(warnings):
        try:
            importlib.import_module(module).main(words)
        except SystemExit as ended:
            assert not ended.code, warnings.getvalue()
    text = output.getvalue() + warnings.getvalue()
    return text.replace(str(Path.home()), "~").replace(f"{cli.ROOT}/", "")


def on_page(name: str) -> str:
    """The command and its output as docs/pods.md shows them."""
    text = (GOLDENS / f"{name}.txt").read_text().rstrip("\n")
    return f"```\n$ python -m {COMMANDS[name]}\n{text}\n```"


def mark(name: str) -> str:
    return f"<!-- dry run: {name} -->"


def main() -> None:
    page = PAGE.read_text()
    for name in COMMANDS:
        (GOLDENS / f"{name}.txt").write_text(printed(name))
    for name in ON_PAGE:
        before, found, rest = page.partition(mark(name))
        assert found, name
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark(name)}\n{on_page(name)}\n{end}{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
