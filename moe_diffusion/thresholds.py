"""Searches constant thresholds for DiffMoE: experts per token, and quality, for each of them.

  python -m moe_diffusion.thresholds --workdir runs/diffmoe --gammas 0.1,0.2,0.3,0.4,0.5
  python -m moe_diffusion.thresholds --workdir runs/diffmoe --gammas 0.2,0.3 --num 256 \\
      --out thresholds.png --json --config.model.router.max_capacity=0

The first row is that of the learned (dynamic) thresholds. The samples of all rows start from the
same noise. Runs on digits also report the share of samples that a classifier takes for their own
label. To use a constant threshold afterwards, give any command --config.model.router.threshold=0.3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.evaluation.capacity_search import metric_for, search
from moe_diffusion.evaluation.record import made_with
from moe_diffusion.figures.curves import threshold_picture
from moe_diffusion.figures.images import save_png
from moe_diffusion.sampling.conditions import conditions_of_run
from moe_diffusion.sampling.load import load_workdir

_COLUMNS = {
    "threshold": "{}",
    "c_infer_avg": "{:.4f}",
    "dropped": "{:.4f}",
    "activated_params": "{:,}",
    "gflops": "{:.4g}",
    "class_accuracy": "{:.4f}",
}


def parse_gammas(text: str) -> list[float]:
    """Thresholds of a text like "0.1,0.2". Raises UserError unless all of them are in [0, 1)."""
    try:
        gammas = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--gammas {text!r} is not a list of numbers like 0.1,0.2") from None
    bad = [gamma for gamma in gammas if not 0 <= gamma < 1]
    if bad:
        raise UserError(f"--gammas: {bad[0]:g} is no probability; take numbers from 0 to below 1")
    return gammas


def line(row: dict) -> str:
    """One row of the table, in the order of its columns."""
    return "".join(
        f"{form.format(row[name]):>18}" for name, form in _COLUMNS.items() if name in row
    )


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("thresholds", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a trained DiffMoE run")
    add("--gammas", required=True, help="constant thresholds, like 0.1,0.2,0.3")
    add("--num", type=int, default=64, help="images for each threshold (%(default)s)")
    add("--batch", type=int, default=64, help="images at a time; they share experts (%(default)s)")
    add("--ema", help="decay of the average to use, or none (the run's first)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--out", help="picture of the curves")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    gammas = parse_gammas(args.gammas)
    if args.num < 1 or args.batch < 1:
        raise UserError("--num and --batch must be at least 1")
    if args.out:
        check_writable(Path(args.out).parent)
    config, model, variables, note = load_workdir(
        args.workdir, tuple(overrides), step=args.step, ema=args.ema
    )
    shown = [name for name in _COLUMNS if name != "class_accuracy"]
    metric = metric_for(config)
    print("".join(f"{name:>18}" for name in (_COLUMNS if metric else shown)))
    rows = search(
        config,
        variables,
        ["dynamic", *gammas],
        conditions_of_run(config, model, args.num),
        seed=args.seed,
        batch_size=min(args.batch, args.num),
        metric=metric,
        report=lambda row: print(line(row), flush=True),
    )
    target = config.model.router.capacity
    nearest = min(rows[1:], key=lambda row: abs(row["c_infer_avg"] - target))
    print(f"nearest to the C = {target:g} of training: threshold {nearest['threshold']:g}")
    if args.out:
        save_png(threshold_picture(rows, target), args.out)
        print(f"curves: {args.out}")
    if args.json:
        record = note | made_with(config, devices=1)
        summary = {"target": target, "nearest": nearest["threshold"], "rows": rows}
        print(json.dumps(record | summary))


if __name__ == "__main__":
    main()
