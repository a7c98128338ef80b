"""Reproduces a table or a figure of the papers: trains, samples and judges what it needs.

  python -m moe_diffusion.reproduce --list
  python -m moe_diffusion.reproduce dsmoe_table5 --inception pt_inception.pth \\
      --reference VIRTUAL_imagenet256_labeled.npz --vaes vaes/ --dry_run
  python -m moe_diffusion.reproduce diffmoe_table4 --run runs/diffmoe_l ...

The same command again goes on where it was stopped. --dry_run prints the commands instead, so that
they can be run elsewhere, into the same folders. --tiny shrinks models, data and evaluations to see
a command work within minutes. Keys of the config (--config.<key>=<value>) hold for every command.
docs/reproduce.md lists all tables and figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError, check_writable

_GIVEN = ("run", "vaes", "inception", "reference", "prompts", "tiny")  # flags that are `Options`


def show_all() -> None:
    """Prints the name and the title of every item."""
    from moe_diffusion.reproduction.items import papers

    for items in papers().values():
        for item in items:
            missing = f" (not yet: {item.missing})" if item.missing else ""
            print(f"{item.name:<20} {item.title}{missing}")


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("reproduce", __doc__)
    add = parser.add_argument
    add("name", nargs="?", help="of a table or figure, like dsmoe_table5")
    add("--list", action="store_true", help="show the names of all")
    add("--out", help="folder of the results (runs/<name>)")
    add("--runs", default="runs", help="folder of what is trained (%(default)s)")
    add("--run", default="", help="a trained run, for items that need one")
    add("--vaes", default="", help="folder with sd-vae-ft-mse and sd-vae-ft-ema")
    add("--inception", default="", help="weights of the FID Inception")
    add("--reference", default="", help="images, features or statistics to compare with")
    add(
        "--prompts",
        default="",
        help="file of prompts, for items whose images are drawn for some (those of the run's data)",
    )
    add("--tiny", action="store_true", help="everything small, to try the command")
    add("--dry_run", action="store_true", help="print the commands only")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    if args.list:
        return show_all()
    if not args.name:
        raise UserError("name a table or figure, like dsmoe_table5; --list shows all")
    from moe_diffusion.parallel import distributed
    from moe_diffusion.parallel.distributed import is_main_process
    from moe_diffusion.reproduction.commands import Options, check, judging, training
    from moe_diffusion.reproduction.items import find
    from moe_diffusion.reproduction.run import make

    item = find(args.name)
    out = Path(args.out or Path(args.runs) / args.name)
    given = {key: getattr(args, key) for key in _GIVEN}
    options = Options(out=out, runs=Path(args.runs), overrides=tuple(overrides), **given)
    check(item, options)
    if args.dry_run:
        for step in training(item, options) + judging(item, options):
            print(step)
        return None
    check_writable(out)
    distributed.initialize()
    made = make(item, options)
    if is_main_process():
        print("\n".join(f"written: {path}" for path in made["files"]))
        if args.json:
            print(json.dumps(made))


if __name__ == "__main__":
    main()
