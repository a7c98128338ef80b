"""Searches constant thresholds for DiffMoE: experts per token, and quality, for each of them.

  python -m moe_diffusion.thresholds --workdir runs/diffmoe --gammas 0.1,0.2,0.3,0.4,0.5
  python -m moe_diffusion.thresholds --workdir runs/diffmoe_l --gammas 0.9,0.5,0.4,0.1,1e-3 \\
      --protocol diffmoe_flow --vae sd-vae-ft-mse/ --inception pt_inception.pth \\
      --reference VIRTUAL_imagenet256_labeled.npz --out thresholds.png

The first row is that of the learned (dynamic) thresholds. The samples of all rows start from the
same noise. With --inception and --reference every row has the metrics of `evaluate`, whose flags
work here, too; runs on digits have theirs without files. To use a constant threshold afterwards,
give any command --config.model.router.threshold=0.3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moe_diffusion import evaluate
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.ornaments import ornament
from moe_diffusion.writing import check_outputs

NUM = 256  # images for each threshold, if neither the user nor a protocol says
_FORMATS = ("{}", "{:.4f}", "{:.4f}", "{:,}", "{:.4g}")  # of `capacity_search.COLUMNS`


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


def print_row(row: dict[str, Any]) -> None:
    """Prints a row of the table, and before the first one its head."""
    from moe_diffusion.evaluation.capacity_search import COLUMNS
    from moe_diffusion.parallel.distributed import is_main_process

    if not is_main_process():
        return
    if row["threshold"] == "dynamic":
        print("".join(f"{name:>18}" for name in (*COLUMNS, *row["metrics"])))
    cells = [form.format(row[name]) for name, form in zip(COLUMNS, _FORMATS, strict=True)]
    cells += [f"{value:.4f}" for value in row["metrics"].values()]
    print("".join(f"{cell:>18}" for cell in cells), flush=True)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("thresholds", __doc__, remote=("workdir",))
    add = parser.add_argument
    evaluate.add_flags(parser)
    add("--workdir", required=True, help="folder of a trained DiffMoE run")
    add("--gammas", required=True, help="constant thresholds, like 0.1,0.2,0.3")
    add("--out", help="picture of the curves")
    args, overrides = parser.parse_with_overrides(argv)
    gammas = parse_gammas(args.gammas)
    from etils import epath

    from moe_diffusion import config as configs
    from moe_diffusion.evaluation.capacity_search import search
    from moe_diffusion.figures.curves import threshold_picture
    from moe_diffusion.figures.images import save_png
    from moe_diffusion.parallel import distributed
    from moe_diffusion.parallel.distributed import is_main_process

    check_outputs({"--out": (args.out, ".png")}, [args.reference, args.inception, args.vae])
    if args.num is None and not args.protocol:
        args.num = NUM
    distributed.initialize()
    rows = search(evaluate.settle(args, overrides), ["dynamic", *gammas], print_row)
    target = configs.load_json(epath.Path(args.workdir) / "config.json").model.router.capacity
    nearest = min(rows[1:], key=lambda row: abs(row["c_infer_avg"] - target))["threshold"]
    if not is_main_process():
        return
    if args.out:
        with ornament(f"the picture {args.out}"):
            save_png(threshold_picture(rows, target), args.out)
            print(f"curves: {args.out}")
    print(f"nearest to the C = {target:g} of training: threshold {nearest:g}")
    if args.json:
        print(json.dumps({"target": target, "nearest": nearest, "rows": rows}))


if __name__ == "__main__":
    main()
