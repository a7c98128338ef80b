"""Draws docs/families.png: digits from a small model of every family, a family a row.

  python -m docs.draw_families --workdir runs/families --out docs/families.png

It trains each of FAMILIES on handwritten digits, or goes on where it stopped, and draws one digit a
column, all of the same noise. That takes a quarter of an hour on two cores. The FLUX is that of
`make flux-demo`: --flux names its workdir.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion.cli import Parser, exits_on_user_error

_QUICK = ("optim.learning_rate=3e-3", "optim.warmup_steps=50", "data.batch_size=64")
_DIGITS = (*_QUICK, "data.source=digits", "data.augment=none", "data.autoencoder=")
_DIGITS += ("model.image_size=8", "model.channels=1", "model.patch_size=2", "model.num_classes=10")
_DIGITS += ("model.hidden_size=96", "model.num_heads=4", "model.depth=6", "model.dtype=float32")
_DIGITS += ("optim.schedule=cosine", "ema.decays=0.99,", "sampling.steps=25", "sampling.cfg=2.0")
_JIT = (*_DIGITS, "model.jit.bottleneck=4", "model.jit.in_context_tokens=4")
_JIT += ("model.jit.in_context_start=2",)
# Name of a row -> config, and changes that make it small.
FAMILIES = {
    "DiT": ("digits:router=dense", _QUICK),
    "TC-DiT": ("digits:router=token_choice", _QUICK),
    "EC-DiT": ("digits:router=expert_choice", _QUICK),
    "DiffMoE": ("digits:router=diffmoe", _QUICK),
    "Race-DiT": ("digits:router=expert_race", _QUICK),
    "DSMoE": ("dsmoe_s", (*_DIGITS, "model.moe.hidden_size=96", "model.moe.shared_hidden_size=96")),
    "ProMoE": ("promoe_s", (*_DIGITS, "model.moe.hidden_size=192")),
    "JiT": ("jit_b16", _JIT),
    "JiTMoE": (
        "jitmoe_b16",
        (*_JIT, "model.moe.hidden_size=96", "model.moe.shared_hidden_size=96"),
    ),
}
PROMPTS = [f"a handwritten {digit}" for digit in range(10)]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("draw_families", __doc__)
    parser.prog = "python -m docs.draw_families"
    add = parser.add_argument
    add("--workdir", default="runs/families", help="folder of the runs (%(default)s)")
    add("--flux", default="runs/digits_flux", help="run of make flux-demo (%(default)s)")
    add("--steps", type=int, default=600, help="of training (%(default)s)")
    add("--out", default="families.png", help="the picture (%(default)s)")
    args, overrides = parser.parse_with_overrides(argv)
    import numpy as np

    import moe_diffusion
    from moe_diffusion import train
    from moe_diffusion.figures.images import image_grid, save_png

    rows = {}
    for name, (spec, changes) in FAMILIES.items():
        folder = str(Path(args.workdir) / name)
        changes = [*changes, f"train.num_steps={args.steps}", "train.sample_every=0", *overrides]
        with contextlib.redirect_stdout(io.StringIO()):
            train.run(spec, folder, changes)
        rows[name] = moe_diffusion.load(folder)(range(10), seed=1)
        print(name, flush=True)
    if Path(args.flux).exists():
        rows["FLUX"] = moe_diffusion.load(args.flux)(prompts=PROMPTS, seed=1)
    captions = [name for name in rows for _ in range(10)]
    heads = [str(digit) for digit in range(10)]
    save_png(image_grid(np.concatenate([*rows.values()]), captions, 10, 6, heads=heads), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
