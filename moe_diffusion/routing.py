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


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing", __doc__, remote=("workdir",))
    add = parser.add_argument
    add("--workdir", required=True, help="folder of a trained run")
    add("--num", type=int, default=64, help="how many images (%(default)s)")
    add("--labels", default="", help="classes, like 3,7 (all)")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--sampler", help="of a flow: heun, euler, dopri5, sde or sde_heun; of ddpm: ddpm or ddim")
    add("--steps", type=int, help="steps of the sampler")
    add("--ema", help="decay of the average to use, or none (the run's first)")
    add("--step", type=int, help="checkpoint to use (the newest)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--batch", type=int, default=64, help="images at a time (%(default)s)")
    add("--vae", help="autoencoder that makes images of latents (the config's data.autoencoder)")
    add("--blocks", default="", help="blocks to look into, like 1,7 (four of those with experts)")
    add("--out", default="routing", help="folder for the numbers and pictures (%(default)s)")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    from moe_diffusion.evaluation import routing_report as report
    from moe_diffusion.evaluation.routing_stats import RoutingObserver
    from moe_diffusion.interop import autoencoder as autoencoders
    from moe_diffusion.sampling.conditions import captions, conditions_of_run
    from moe_diffusion.sampling.labels import LABEL, chosen_labels
    from moe_diffusion.sampling.load import load_workdir

    if args.num < 1 or args.batch < 1:
        raise UserError("--num and --batch must be at least 1")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder")
    check_writable(args.out)
    given = {"cfg": args.cfg, "sampler": args.sampler, "steps": args.steps}
    overrides += [f"sampling.{key}={value}" for key, value in given.items() if value is not None]

    config, model, variables, note = load_workdir(
        args.workdir, tuple(overrides), step=args.step, ema=args.ema
    )
    observer = RoutingObserver(model, report.MAPS)
    blocks = report.chosen_blocks(args.blocks, observer.blocks)
    chosen = {LABEL: chosen_labels(args.labels, args.num, model)} if args.labels else {}
    cond = report.shuffled(conditions_of_run(config, model, args.num) | chosen, args.seed)
    autoencoder = autoencoders.for_config(config, args.vae)
    stats, images, cond = report.draw(
        config,
        observer,
        variables,
        cond,
        seed=args.seed,
        batch_size=args.batch,
        decode=autoencoder.decode if autoencoder else None,
    )
    print(f"experts per token: {stats['c_infer_avg']:.4f}")
    texts = captions(model, cond)
    files, missing = report.write_report(args.out, stats, blocks, images, cond, texts)
    for name in files:
        print(Path(args.out) / name)
    for name, reason in missing.items():
        print(f"{name}: not written, {reason}")
    if args.json:
        numbers = {"c_infer_avg": stats["c_infer_avg"], "dropped": stats["dropped"]}
        written = {"out": args.out, "files": files, "not_written": missing}
        print(json.dumps({"num": args.num, **note, **numbers, **written}))


if __name__ == "__main__":
    main()
