"""Shows how a model uses its experts while it draws images: a folder of numbers and pictures.

  python -m moe_diffusion.routing --workdir runs/digits --num 200 --out routing/
  python -m moe_diffusion.routing --workdir runs/dsmoe_s --vae sd-vae-ft-mse/ --num 5000 --json
  python -m moe_diffusion.routing --workdir runs/diffmoe_l --vae sd-vae-ft-mse/ --num 1000 \\
      --batch 1000 --cfg 1.0 --blocks 1,7,13,19 --out routing/

It works for every router. routing.json has the numbers. The pictures show experts per token, the
load of every expert by layer, time and class, and the expert of every token of some images. If
classes use different numbers of experts, there are also images of those that use most and fewest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.sampling import flags


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing", __doc__, remote=("workdir",))
    flags.add_flags(parser)
    add = parser.add_argument
    add("--blocks", default="", help="blocks to look into, like 1,7 (four of those with experts)")
    add("--out", default="routing", help="folder for the numbers and pictures (%(default)s)")
    args, overrides = parser.parse_with_overrides(argv)
    flags.check_flags(args)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder")
    check_writable(args.out)
    from moe_diffusion.evaluation import routing_report as report
    from moe_diffusion.evaluation.routing_stats import RoutingObserver
    from moe_diffusion.sampling.conditions import captions

    run = flags.open_run(args, overrides)
    config, model, variables, note, known, autoencoder, _, mesh = run
    observer = RoutingObserver(model, report.MAPS)
    blocks = report.chosen_blocks(args.blocks, observer.blocks)
    cond = report.shuffled(flags.conditions(run, args), args.seed)
    num = len(next(iter(cond.values())))
    stats, images, cond = report.draw(
        config,
        observer,
        variables,
        cond,
        seed=args.seed,
        batch_size=run.batch(args.batch),
        decode=autoencoder.decode if autoencoder else None,
        mesh=mesh,
    )
    print(f"experts per token: {stats['c_infer_avg']:.4f}")
    texts = captions(model, cond, known)
    files, missing = report.write_report(args.out, stats, blocks, images, cond, texts, known)
    for name in files:
        print(Path(args.out) / name)
    for name, reason in missing.items():
        print(f"{name}: not written, {reason}")
    if args.json:
        numbers = {"c_infer_avg": stats["c_infer_avg"], "dropped": stats["dropped"]}
        written = {"out": args.out, "files": files, "not_written": missing}
        print(json.dumps({"num": num, **note, **numbers, **written}))


if __name__ == "__main__":
    main()
