"""Finds the fastest tiles of the expert kernels on this device and writes them down.

  python -m moe_diffusion.tune                    all shapes that the project is measured by
  python -m moe_diffusion.tune --shape 1024,448,48,5 --tokens 16384 --table tiles.json

It measures each shape forward + backward with every candidate in turn. The kernels look up their
tiles in this table, by kind of device and shape (moe_diffusion/kernels/tuning.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.writing import check_outputs


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("tune", __doc__)
    add = parser.add_argument
    add("--shape", action="append", help="D,H,E,K; may be given again (all)")
    add("--tokens", type=int, default=16384, help="T (%(default)s)")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--repeats", type=int, default=7, help="runs of which the median counts (%(default)s)")
    add("--table", help="file to add to (the one that the kernels read)")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    if overrides:
        raise UserError("tune takes no --config keys: it measures kernels, not a config")
    import jax

    from moe_diffusion.benchmarks.dispatch import SHAPES, parse_shape
    from moe_diffusion.benchmarks.tiles import best_tiles, merge
    from moe_diffusion.kernels.tuning import table_path

    if jax.default_backend() == "cpu":
        raise UserError("tune measures the kernels for TPU and GPU: run it on such a device")
    path = Path(args.table) if args.table else table_path()
    check_outputs({"--table": (path, ".json")})
    shapes = [parse_shape(text) for text in args.shape or ()] or SHAPES
    found = {}
    options = {"tokens": args.tokens, "dtype": args.dtype, "repeats": args.repeats}
    for key, sizes in best_tiles(shapes, **options):
        found[key] = sizes
        # The table is written after each shape, because a later candidate may crash the process.
        merge(path, jax.devices()[0].device_kind, {key: sizes})
        print(f"{key:<40}{sizes}")
    print(f"written to {path}")
    if args.json:
        print(json.dumps({"table": str(path), "tiles": found}))


if __name__ == "__main__":
    main()
