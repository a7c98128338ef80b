"""Disturbs trainings, starts them again, and compares the end with an undisturbed run, bit by bit.

  python -m tests.campaign.disturbed --runs 50 --seed 0 --out disturbed.json
  python -m tests.campaign.disturbed --runs 4 --kinds "full disk,second run" --out disturbed.json

Every run trains configs/digits.py, at a size of seconds, with the real command line. It is
disturbed once, and the same command is started again until it ends. Parameters, moments, averages,
router state, the place in the data and the logged losses must then have the bits of an undisturbed
run. A refusal must be one line that names the file, and following its advice must help. A kind that
this machine does not allow is left out, and the table says so. The same command again goes on where
a campaign was stopped, and makes those runs again that had a fault.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  the environment of children; before anything imports jax

import jax  # isort: skip
import numpy as np  # isort: skip
import orbax.checkpoint as ocp  # isort: skip

from docs import pages  # isort: skip
from moe_diffusion.writing import save_text  # isort: skip
from tests import cli  # isort: skip
from tests.campaign.disturbances import KINDS  # isort: skip
from tests.campaign.started import NUM_STEPS, Case, Fault, LeftOut  # isort: skip

EXACT, NAMED = "bit-exact", "named, then bit-exact"
FAULT, LEFT_OUT = "fault", "left out"
RESULTS = (EXACT, NAMED, FAULT, LEFT_OUT)
End = dict[str, Any]
Kinds = Mapping[str, Callable[[Any], None]]


def end_of(workdir: Path) -> End:
    """All that a finished run has: name -> array, state of the data, or line of the metrics."""
    state, data = cli.read_checkpoint(workdir, NUM_STEPS)
    lines = {f"metrics of step {line['step']}": line for line in cli.metrics(workdir)}
    return {**state, "data": data, **lines}


def differences(end: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names of what is missing, new, or not the same in every bit."""

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, np.ndarray):
            return type(a) is type(b) and a == b
        return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())

    names = sorted(end.keys() | expected.keys())
    both = end.keys() & expected.keys()
    return [name for name in names if name not in both or not same(end[name], expected[name])]


def undisturbed(folder: Path, make: type[Case] = Case) -> End:
    """The end of a run that nothing disturbs; make: of the runs that are compared with it."""
    with make(folder, "undisturbed") as case:
        case.finish()
        return end_of(case.workdir)


def disturb(
    folder: Path,
    kind: str,
    turn: int,
    seed: int,
    expected: End,
    kinds: Kinds = KINDS,
    make: type[Case] = Case,
) -> dict[str, Any]:
    """One disturbed run; returns what became of it.

    Args:
      folder: a new one, for this run.
      kind: one of `kinds`.
      turn: the number of this run among those of its kind.
      expected: the `undisturbed` end.
      kinds: name -> what disturbs a case of `make` and brings it to its end.

    Returns:
      {"kind", "turn", "result": one of `RESULTS`, "fault": text, "notes": what was done,
      "refusals": lines, "starts": commands, "seconds"}.
    """
    began, fault = time.monotonic(), ""
    with make(folder, kind, turn, seed) as case:
        try:
            kinds[kind](case)
            case.check_gone()
            if case.reference is not None:
                expected = end_of(case.reference)
            lost = {f"metrics of step {step}" for step in case.lost}
            whole = {name: value for name, value in expected.items() if name not in lost}
            if wrong := differences(end_of(case.workdir), whole):
                raise Fault(f"{len(wrong)} things differ, such as {', '.join(wrong[:3])}")
            left = [path.name for path in case.workdir.rglob("*orbax-checkpoint-tmp*")]
            left += [path.name for path in case.workdir.glob("in_use.lock")]
            if left:
                raise Fault(f"left in the workdir: {', '.join(left)}")
            result = NAMED if case.refusals else EXACT
        except (Fault, OSError, ValueError) as error:  # a file is missing, or cannot be read
            result, fault = FAULT, str(error)
        except LeftOut as reason:
            result, fault = LEFT_OUT, str(reason)
    return {
        "kind": kind, "turn": turn, "result": result, "fault": fault, "notes": case.notes,
        "refusals": case.refusals, "starts": case.starts,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def campaign(
    runs: int, seed: int, kinds: Kinds, make: type[Case], folder: Path, before: Mapping[int, Any]
) -> Iterator[dict[str, Any]]:
    """Disturbs `runs` runs, whose kinds take turns.

    before: number -> what became of it; those that are no fault are not made again.
    """
    left = [n for n in range(runs) if before.get(n, {"result": FAULT})["result"] == FAULT]
    expected = undisturbed(folder / "undisturbed", make) if left else {}
    for number in left:
        turn, kind = divmod(number, len(kinds))
        place, name = folder / str(number), list(kinds)[kind]
        yield {"number": number} | disturb(place, name, turn, seed, expected, kinds, make)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each kind, how many of its runs ended how, and all together."""
    counts: dict[str, Counter] = {}
    for run in found:
        counts.setdefault(run["kind"], Counter())[run["result"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    rows = [["disturbance", "runs", *RESULTS], ["---"] + ["---:"] * 5]
    rows += [
        [kind, str(sum(c.values())), *(str(c[result]) for result in RESULTS)]
        for kind, c in counts.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def named(versions: Mapping[str, str]) -> str:
    """Like "python 3.11.7, jax 0.10.2"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(), "jax": jax.__version__, "orbax": ocp.__version__,
        "numpy": np.__version__,
    }  # fmt: skip


def main(
    name: str = "disturbed",
    doc: str = __doc__,
    runs: int = 50,
    known: Kinds = KINDS,
    make: type[Case] = Case,
) -> None:
    """The command line of a campaign; the arguments are those of another than this file's."""
    parser = argparse.ArgumentParser(
        f"python -m tests.campaign.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=runs, help="how many runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument(
        "--kinds", default=",".join(known), help="names, with commas; all: %(default)s"
    )
    parser.add_argument("--out", required=True, metavar="FILE.json", help="what became of each run")
    parser.add_argument("--page", metavar="FILE.md", help="a page whose table is written anew")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in known]:
        parser.error(f"unknown kinds {unknown}; known: {', '.join(known)}")
    out, folder = Path(args.out), Path(tempfile.mkdtemp(prefix=f"{name}-"))
    about = {"seed": args.seed, "kinds": kinds, "versions": versions()}
    earlier = json.loads(out.read_text()) if out.exists() else about | {"runs": []}
    if any(earlier[key] != about[key] for key in about):
        parser.error(f"{out} is of another campaign: name another file")
    found = {run["number"]: run for run in earlier["runs"]}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a case puts away what it made
    chosen = {kind: known[kind] for kind in kinds}
    for run in campaign(args.runs, args.seed, chosen, make, folder, found):
        found[run["number"]] = run
        out.write_text(json.dumps(about | {"runs": [found[n] for n in sorted(found)]}, indent=1))
        text = run["fault"] or "; ".join(run["refusals"])
        print(f"{run['number'] + 1}/{args.runs} {run['kind']}: {run['result']} "
              f"({run['seconds']} s; {', '.join(run['notes'])}) {text}", flush=True)  # fmt: skip
        if run["result"] != FAULT:
            shutil.rmtree(folder / str(run["number"]))
    rows = table([found[n] for n in sorted(found)])
    minutes = round(sum(run["seconds"] for run in found.values()) / 60)
    told = f"Seed {args.seed}; {named(about['versions'])}; {minutes} minutes on two cores with "
    told += "other work."
    print(rows, told, out, sep="\n")
    if args.page:
        page, begin = Path(args.page), f"<!-- begin: written by tests.campaign.{name} -->"
        save_text(pages.renewed(page.read_text(), begin, f"{rows}\n\n{told}"), page)
    if any(run["result"] == FAULT for run in found.values()):
        sys.exit(f"the folders of the faults are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
