"""Compiles a run for accelerators that you do not have, and says whether it fits and what it costs.

  python -m moe_diffusion.plan --config configs/dsmoe_l.py --topology v5e:16x16
  python -m moe_diffusion.plan --config configs/dsmoe_l.py --topology v6e:4x4 --search-batch --json
  python -m moe_diffusion.plan --config configs/dsmoe_b.py --topology h100:8 --what sample \\
      --config.data.batch_size=64

  python -m moe_diffusion.plan --config configs/flux_moe_l.py --topology v5p:4x4x4 \\
      --what distill --stage experts

It compiles the real training step or sampler, as on the chips, for each sharding preset in turn.
Topologies: slices of TPU v4, v5e, v5p, v6e and tpu7x, GPUs a100, h100 or h200, or `local`, the
devices of this machine. Any key of the config can be set as --config.<key>=<value>.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from moe_diffusion.chips import known
from moe_diffusion.cli import Parser, exits_on_user_error


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("plan", __doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="config file, as for train")
    add("--topology", required=True, metavar="CHIPS", help=f"{known()}, or local")
    add("--slices", type=int, default=1, help="of TPU chips, joined by a network (%(default)s)")
    add("--what", choices=("train", "distill", "sample"), default="train",
        help="the training step, that of a stage of distill, or drawing data.batch_size images "
        "(%(default)s)")  # fmt: skip
    add("--stage", default="experts", help="of distill: shared, experts, groups1 (%(default)s)")
    add("--search-batch", action="store_true", help="find the largest batch on a chip that fits")
    add("--own-preset", action="store_true", help="leave the config's preset uncompared")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    import jax

    from moe_diffusion import config as configs
    from moe_diffusion.dense2moe.stage_configs import stage_named
    from moe_diffusion.planning.report import compare_presets, make_plan, search_batch, table
    from moe_diffusion.planning.topologies import describe

    config = configs.load(args.config, overrides)
    if args.what == "distill":
        config = stage_named(config, args.stage)
    if args.topology != "local":
        jax.config.update("jax_platforms", "cpu")  # compiling uses no accelerator of this machine
    topology = describe(args.topology, args.slices)

    def say(text: str) -> None:
        print(f"{text} ...", file=sys.stderr, flush=True)

    plan = make_plan(config, args.what, topology, say)
    if not args.own_preset:
        compare_presets(plan, config, say)
    if args.search_batch:
        search_batch(plan, config, say)
    print(table(plan))
    if args.json:
        print(json.dumps(plan.to_json()))


if __name__ == "__main__":
    main()
