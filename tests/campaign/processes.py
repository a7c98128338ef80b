"""Trains configs/digits.py as several processes and as one, and compares the loss of every step.

  python -m tests.campaign.processes --out processes.json --page docs/reliability.md

Every run is the real command line. Its devices are CPU devices of its processes, which speak over
loopback (gloo). It must give the losses of a run of one process. Of those there are three, on 1, 2
and 4 devices: rounding, which depends on the number of devices, may decide between two experts that
a token likes equally, and then all later losses differ. The same command again goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  the environment of children; before anything imports jax

from tests import cli  # isort: skip
from docs import pages  # isort: skip
from moe_diffusion.writing import save_text  # isort: skip
from tests.campaign.disturbed import named, versions  # isort: skip

STEPS = 50
PRESETS, ROUTERS = ("dp", "fsdp", "fsdp_ep"), ("token_choice", "diffmoe")
CLOSE = 1e-5


def train(workdir: Path, args: Sequence[str], processes: int, devices: int) -> dict[int, float]:
    """Losses by step of `STEPS` steps; devices: of each process."""
    flags = {"train.num_steps": STEPS, "train.log_every": 1, "train.sample_every": 0}
    flags |= {"optim.schedule": "constant"}
    flags |= {"train.eval_samples": 0, "checkpoint.every": STEPS}
    given = [f"--config.{key}={value}" for key, value in flags.items()]
    command = ["train", *args, *given, "--workdir", workdir]
    sizes = {"processes": processes, "devices": devices}
    outputs = cli.together(*command, **sizes, timeout=1800)
    if any("step" in output for output in outputs[1:]):
        raise AssertionError(f"more than the first process speaks: {outputs[1:]}")
    return {line["step"]: line["loss"] for line in cli.metrics(workdir)}


def cases() -> list[tuple[str, str, int, int]]:
    """(preset, router, processes, devices of each); one device alone comes first."""
    found = [
        (preset, router, processes, 1)
        for processes in (2, 4)
        for preset in PRESETS
        for router in ROUTERS
    ]
    alone = [("dp", router, 1, devices) for router in ROUTERS for devices in (1, 2, 4)]
    found += [("dp", "token_choice", *size) for size in ((2, 2), (2, 4), (4, 2), (4, 4))]
    return alone + found


def nearest(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Largest difference of a run's losses from those of one process, and the devices of that."""
    found = []
    for other in rows:
        if other["router"] == row["router"] and other["processes"] == 1:
            pairs = zip(row["losses"], other["losses"], strict=True)
            found.append((max(abs(a - b) for a, b in pairs), other["devices"]))
    return min(found)


def table(rows: Sequence[dict[str, Any]], about: str) -> str:
    """Markdown."""
    lines = ["| preset | router | processes x devices of each | largest difference | from 1 x |"]
    lines.append("|---|---|---|---:|---:|")
    for row in rows:
        if row["processes"] > 1:
            (found, devices), size = nearest(row, rows), f"{row['processes']} x {row['devices']}"
            names = f"`{row['preset']}` | `{row['router']}`"
            lines.append(f"| {names} | {size} | {found:.1e} | {devices} |")
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.campaign.processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="FILE.json", help="losses of each run")
    parser.add_argument("--page", metavar="FILE.md", help="page whose table is written anew")
    args = parser.parse_args()
    out = Path(args.out)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for preset, router, processes, devices in cases():
        case = {"preset": preset, "router": router, "processes": processes, "devices": devices}
        if any(case.items() <= row.items() for row in rows):
            continue
        began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="processes-"))
        config = ["--config", f"configs/digits.py:router={router}"]
        config += [f"--config.parallel.preset={preset}"]
        losses = [*train(folder / "run", config, processes, devices).values()]
        shutil.rmtree(folder)
        assert len(losses) == STEPS
        rows.append(case | {"losses": losses})
        out.write_text(json.dumps({"versions": versions(), "rows": rows}) + "\n")
        print(f"{case}: {nearest(rows[-1], rows)} ({time.monotonic() - began:.0f} s)", flush=True)
    if args.page:
        page, begin = Path(args.page), "<!-- begin: written by tests.campaign.processes -->"
        text = table(rows, f"{STEPS} steps of 128 images; {named(versions())}.")
        save_text(pages.renewed(page.read_text(), begin, text), page)
    if far := [row for row in rows if nearest(row, rows)[0] > CLOSE]:
        raise SystemExit(f"{len(far)} runs differ by more than {CLOSE} from all of one process")


if __name__ == "__main__":
    main()
