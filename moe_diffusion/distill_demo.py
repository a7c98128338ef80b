"""Dense2MoE in half an hour: a tiny dense model becomes experts, beside pruning or from scratch.

  python -m moe_diffusion.distill_demo --teacher runs/digits_flux --workdir runs/dense2moe
  python -m moe_diffusion.distill_demo --what dit --teacher runs/digits_dense --workdir runs/dit_moe

`demo --config configs/digits_flux.py --workdir runs/digits_flux` trains the first teacher,
`demo --config configs/digits.py:router=dense --workdir runs/digits_dense` the second. Of the tiny
FLUX it makes students at the ratios of FLUX.1-MoE-L, M and S, and dense ones of as many
activated parameters by leaving out hidden units or blocks. Of the DiT it makes one with experts,
and trains the same one from scratch for as long. Each draws digits for the same conditions from the
same noise. A table tells how many are right, how far they are from the teacher's, and what they
cost; a picture shows them row by row. The last line is JSON. Run it again to resume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion import distill, train
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.demo import asked


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("distill_demo", __doc__)
    add = parser.add_argument
    add("--what", choices=("flux", "dit"), default="flux", help="the teacher (%(default)s)")
    add("--teacher", default="runs/digits_flux", help="its workdir; default: %(default)s")
    add("--workdir", default="runs/dense2moe", help="default: %(default)s")
    add("--seeds", type=int, default=1, help="how many times, with seeds 0, 1, ...; default: 1")
    add("--students", metavar="NAMES", help="those that are made: moe,random; default: all")
    add("--images", type=int, default=300, help="that each draws, in hundreds; default: 300")
    args, overrides = parser.parse_with_overrides(argv)
    from moe_diffusion.checks import require
    from moe_diffusion.dense2moe.comparison import mean_rows, mean_table
    from moe_diffusion.dense2moe.demonstration import ALL, demonstrate
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory

    keep_freed_memory()
    require(args.images >= 100, f"--images {args.images}: at least 100, ten of each digit")
    results, what = [], ALL[args.what]
    if args.students:
        what = what.only(args.students.split(","))
    for seed in range(args.seeds):
        folder = Path(args.workdir) / f"seed{seed}" if args.seeds > 1 else Path(args.workdir)
        how = (overrides, distill.run, train.run, asked, args.images)
        results.append(demonstrate(what, args.teacher, str(folder), seed, *how))
    last = results[0]
    if args.seeds > 1:
        rows = mean_rows([result["rows"] for result in results])
        print(mean_table(rows, (what.score, "distance")))
        seconds = round(sum(result["seconds"] for result in results), 1)
        last = {"rows": rows, "seconds": seconds, "picture": last["picture"], "seeds": results}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
