"""Draws a logged metric of several runs over their steps in one picture, and its end enlarged.

  python -m moe_diffusion.curves runs/groups_5x3/mob runs/groups_3x4/mob --out loss.png
  python -m moe_diffusion.curves runs/a runs/b --labels small,large --metric eval/fd_digits

A workdir has its metrics in metrics.jsonl. A second panel shows the second half of the steps, or
those from --after on. Curves of more than 40 values are running means.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.writing import check_outputs

_FILE = "metrics.jsonl"


def read_curves(workdirs: Sequence[str], labels: Sequence[str], metric: str):
    """Label -> {step: value} of every run.

    Raises:
      UserError: a run has no such metric, or no metrics.
    """
    from etils import epath

    from moe_diffusion.figures.curves import read_metrics

    found = {}
    for workdir, label in zip(workdirs, labels, strict=True):
        columns = read_metrics(epath.Path(workdir) / _FILE)
        if metric not in columns:
            near = difflib.get_close_matches(metric, columns, n=5, cutoff=0.3) or sorted(columns)
            raise UserError(f"{workdir} has no metric {metric!r}: choose {', '.join(near)}")
        found[label] = columns[metric]
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("curves", __doc__, remote=("workdirs",))
    add = parser.add_argument
    add("workdirs", nargs="+", help="folders of runs")
    add("--labels", help="names of the runs, like small,large (their folders)")
    add("--metric", default="loss", help="what is drawn (%(default)s)")
    add("--after", type=int, help="first step of the second panel (half of all)")
    add("--out", default="curves.png", help="the picture (%(default)s)")
    add("--json", action="store_true", help="print one JSON object as last line")
    args = parser.parse_args(argv)
    labels = args.labels.split(",") if args.labels else args.workdirs
    if len(labels) != len(args.workdirs) or len(set(labels)) < len(labels):
        raise UserError(
            f"{len(args.workdirs)} runs need as many different names, and there are "
            f"{len(set(labels))}: give each run once, and as many --labels"
        )
    logs = [Path(workdir) / _FILE for workdir in args.workdirs]
    check_outputs({"--out": (args.out, ".png")}, logs)
    from moe_diffusion.figures.curves import comparison_picture
    from moe_diffusion.figures.images import save_png

    curves = read_curves(args.workdirs, labels, args.metric)
    last = max(max(values) for values in curves.values())
    after = last // 2 if args.after is None else args.after
    if after >= last:
        raise UserError(f"--after {after} leaves nothing: the last step is {last}")
    save_png(comparison_picture(curves, args.metric, "", after), args.out)
    print(f"{args.metric} of {len(curves)} runs: {args.out}")
    if args.json:
        ends = {label: values[max(values)] for label, values in curves.items()}
        print(json.dumps({"out": args.out, "metric": args.metric, "last": ends}))


if __name__ == "__main__":
    main()
