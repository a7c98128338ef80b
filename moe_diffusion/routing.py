"""Shows how a model uses its experts and blocks while it draws: a folder of numbers and pictures.

  python -m moe_diffusion.routing --workdir runs/digits --num 200 --out routing/
  python -m moe_diffusion.routing --workdir runs/dsmoe_s --vae sd-vae-ft-mse/ --num 5000 --json
  python -m moe_diffusion.routing --workdir runs/diffmoe_l --vae sd-vae-ft-mse/ --num 1000 \\
      --batch 1000 --cfg 1.0 --blocks 1,7,13,19 --out routing/
  python -m moe_diffusion.routing --workdir runs/flux_moe_l --prompts mjhq.jsonl \\
      --vae FLUX.1-dev/ --text-encoders FLUX.1-dev/ --blocks "4 image,23" --out routing/

It works for every router, with labels and with prompts, and tells of the blocks of a dense model.
routing.json has the numbers. The pictures show experts per token, the load of every expert by
layer, time and class, how often every expert is chosen by image, time and token, the expert of
every token of some images, how much every block changes its input, and which blocks of a group are
passed. If classes use different numbers of experts, there are also images of those that use most
and fewest. Lines of a file .jsonl, {"prompt": ..., "category": ...}, say which prompts are alike.
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
    add("--blocks", default="", help="blocks to look into, like 1,7 or, of a block with two "
        "streams, '3 image,3 text' (four of those with experts)")  # fmt: skip
    add("--out", default="routing", help="folder for the numbers and pictures (%(default)s)")
    args, overrides = parser.parse_with_overrides(argv)
    flags.check_flags(args)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder")
    check_writable(args.out)
    from moe_diffusion.evaluation import observed
    from moe_diffusion.evaluation import routing_report as report
    from moe_diffusion.evaluation.categories import categories
    from moe_diffusion.evaluation.routing_stats import RoutingObserver
    from moe_diffusion.sampling.conditions import captions
    from moe_diffusion.sampling.lazy import reordered
    from moe_diffusion.sampling.prompt_files import categories_of, open_prompts
    from moe_diffusion.sampling.prompts import takes_prompts

    given = categories_of(open_prompts(args.prompts, args.benchmark)) if args.prompts else {}
    run = flags.open_run(args, overrides)
    config, model, variables, note, known, autoencoder, prompted, mesh = run
    blocks = report.chosen_blocks(args.blocks, observed.expert_layers(model))
    observer = RoutingObserver(model, report.MAPS, blocks, dense=True)
    cond = flags.conditions(run, args)
    order = report.shuffled(len(next(iter(cond.values()))), args.seed)
    cond = reordered(cond, order)
    texts = captions(model, cond, known)
    if prompted:
        texts = [prompted.texts[i] for i in order]
    asked = texts if takes_prompts(model) else None
    sorts = categories(model, cond, asked, given, known)
    stats, images, kept = report.draw(
        config,
        observer,
        variables,
        cond,
        sorts,
        seed=args.seed,
        batch_size=run.batch(args.batch),
        decode=autoencoder.decode if autoencoder else None,
        mesh=mesh,
    )
    if stats["blocks"]:
        print(f"experts per token: {stats['c_infer_avg']:.4f}")
    if unheard := observed.unheard(model):
        print(f"experts of blocks in groups are not watched: {', '.join(map(str, unheard))}")
    chosen = kept.nonzero()[0]
    texts = texts and [texts[i] for i in chosen]
    files, missing = report.write_report(
        args.out, stats, images, sorts and sorts.take(chosen), texts
    )
    for name in files:
        print(Path(args.out) / name)
    for name, reason in missing.items():
        print(f"{name}: not written, {reason}")
    if args.json:
        numbers = {name: stats.get(name) for name in ("c_infer_avg", "dropped")}
        written = {"out": args.out, "files": files, "not_written": missing}
        print(json.dumps({"num": len(order), **note, **numbers, **written}))


if __name__ == "__main__":
    main()
