"""Measures what the dispatch of tokens, sparse blocks, a whole training step and a sampler cost.

  python -m moe_diffusion.bench dispatch --shape 384,768,16,2 --tokens 4096 --json
  python -m moe_diffusion.bench dispatch --routing zipf --compare
  python -m moe_diffusion.bench sparsity --tokens 512 --out sparsity.json
  python -m moe_diffusion.bench train --config configs/dsmoe_s.py --config.data.batch_size=8
  python -m moe_diffusion.bench sample --config configs/dsmoe_s.py --config.data.batch_size=4
  python -m moe_diffusion.bench saving --config configs/dsmoe_s.py --config.data.batch_size=8
  python -m moe_diffusion.bench suite --out docs/benchmarks/cpu.json

dispatch measures rho, the time of an MoE layer (route, gather, experts, combine) divided by the
time of a dense MLP over as many rows (tokens * K). Both are SwiGLU. They run in turn, forward and
forward + backward, and the medians count. Without --shape it measures all shapes that the project
reports. sparsity measures Dense2MoE's parts in turn with those of FLUX.1: experts with an MLP, a
block with experts with one without, one of five blocks with all. train and sample measure a real
training step and a real sampler on generated images; saving measures a real run, whose checkpoints
may slow down the steps that are made meanwhile.
suite measures all of this, sized for this device.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.writing import check_outputs

# The names in `benchmarks.dispatch.ROUTINGS`, `benchmarks.sparsity.CASES`, `moe.dispatch.BACKENDS`.
KINDS = ("dispatch", "sparsity", "train", "sample", "saving", "suite")
ROUTINGS = ("uniform", "zipf")
CASES = ("ffn", "double", "single", "double-group", "single-group")
BACKENDS = ("cpu", "tpu", "slots", "gpu", "blocked", "reference", "ragged_dot")


def parse(argv: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    parser = Parser("bench", __doc__)
    parser.add_argument("what", choices=KINDS)
    add = parser.add_argument
    add("--shape", action="append", help="dispatch: D,H,E,K; may be given again (all)")
    add("--tokens", type=int, help="dispatch: T (4096); sparsity: text and image (512)")
    add("--case", action="append", choices=CASES, help="sparsity; may be given again (all)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--routing", default="uniform", choices=ROUTINGS, help="dispatch (%(default)s)")
    add("--backend", choices=BACKENDS, help="dispatch: instead of the platform's")
    add("--compare", action="store_true", help="dispatch: other kernels beside ours")
    add("--config", default="configs/dsmoe_s.py", help="train, sample, saving: which (%(default)s)")
    add("--repeats", type=int, default=11, help="runs of which the median counts (%(default)s)")
    add("--minutes", type=float, default=math.inf, help="start nothing after so long (no limit)")
    add("--out", help="file to write the results to, as JSON")
    add("--json", action="store_true", help="print one JSON object as last line")
    return parser.parse_with_overrides(argv)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parse(argv)
    from moe_diffusion.benchmarks import report
    from moe_diffusion.benchmarks.dispatch import SHAPES, bench_dispatch, parse_shape
    from moe_diffusion.benchmarks.saving import bench_saving
    from moe_diffusion.benchmarks.sparsity import bench_sparsity
    from moe_diffusion.benchmarks.steps import bench_sample, bench_train
    from moe_diffusion.benchmarks.timing import environment, gemm_flops
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory

    check_outputs({"--out": (args.out, ".json")})
    keep_freed_memory()
    usual = {"sparsity": 512}.get(args.what, 4096)
    tokens = usual if args.tokens is None else args.tokens
    if args.what == "suite":
        measurements = report.suite(args.repeats)
    elif args.what == "dispatch":
        shapes = [parse_shape(text) for text in args.shape or ()] or SHAPES
        measure = partial(
            bench_dispatch,
            tokens=tokens,
            dtype=args.dtype,
            backend=args.backend,
            routing=args.routing,
            repeats=args.repeats,
            compare=args.compare,
        )
        measurements = report.measured("dispatch", shapes, measure)
    elif args.what == "sparsity":
        options = {"tokens": tokens, "dtype": args.dtype, "repeats": args.repeats}
        measure = partial(bench_sparsity, **options)
        measurements = report.measured("sparsity", args.case or CASES, measure)
    elif args.what == "saving":
        measure = partial(bench_saving, overrides=overrides)
        measurements = report.measured("saving", [args.config], measure)
    else:
        measure = {"train": bench_train, "sample": bench_sample}[args.what]
        measure = partial(measure, overrides=overrides, repeats=args.repeats)
        measurements = report.measured(args.what, [args.config], measure)
    found = environment() | {"gemm_gflops": gemm_flops() / 1e9}
    results, end = [], time.monotonic() + 60 * args.minutes
    for result in measurements:
        results.append(result)
        if args.out:  # after each, so that a later failure loses nothing
            report.write(args.out, found, results)
        if time.monotonic() > end:
            print(f"--minutes {args.minutes:g} are over: nothing more is started")
            break
    print(report.table(results))
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    if args.json:
        print(
            json.dumps(results[-1] | found if len(results) == 1 else {"results": results} | found)
        )
    if failed := sum("error" in result for result in results):
        raise UserError(f"{failed} of {len(results)} measurements failed: see the column `error`")


if __name__ == "__main__":
    main()
