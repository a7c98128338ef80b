"""Writes one HTML page about a run, or several side by side; it needs no network to be viewed.

  python -m moe_diffusion.report --workdir runs/digits --out report.html
  python -m moe_diffusion.report --workdir runs/digits --workdir runs/diffmoe --labels tc,diffmoe
  python -m moe_diffusion.report --workdir runs/digits_moe --no-maps --out distillation.html

The page has the config and what differs between the runs, the parameters, curves of everything in
metrics.jsonl, results of `evaluate`, sample grids with a slider over the steps, and which expert
every token of some images uses, with sliders over layers and times. For these it draws a few images
with the newest checkpoint, which --no-maps leaves out. The stages of a distillation are its runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.writing import check_outputs, save_text


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("report", __doc__, remote=("workdir",))
    add = parser.add_argument
    add(
        "--workdir",
        action="append",
        required=True,
        metavar="DIR",
        help="folder of a run or of a distillation; may be given several times",
    )
    add("--out", default="report.html", help="the page (%(default)s)")
    add("--labels", default="", help="names of the workdirs, like small,large (their folders)")
    add("--title", default="", help="of the page (the names of the runs)")
    add("--no-maps", action="store_true", help="leave out the expert maps, which draw images")
    add("--json", action="store_true", help="print one JSON object as last line")
    args = parser.parse_args(argv)
    check_outputs({"--out": (args.out, ".html")})
    from moe_diffusion.reporting.page import page
    from moe_diffusion.reporting.runs import open_runs

    labels = [label.strip() for label in args.labels.split(",")] if args.labels else []
    runs = open_runs(args.workdir, labels)
    text = page(runs, maps=not args.no_maps, title=args.title)
    save_text(text, args.out)
    size = os.path.getsize(args.out)
    for run in runs:
        for note in run.notes:
            print(f"{run.label}: {note}")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}, {size / 1e6:.2f} MB: {Path(args.out)}")
    if args.json:
        names = [run.label for run in runs]
        print(json.dumps({"out": args.out, "bytes": size, "runs": names}))


if __name__ == "__main__":
    main()
