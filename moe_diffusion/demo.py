"""The project in ten minutes: trains a MoE diffusion transformer on real digits and draws some.

  python -m moe_diffusion.demo --workdir runs/digits

It trains (or resumes) configs/digits.py, draws 1,000 digits, and judges them with a classifier that
saw the training images only: does a drawn 7 look like a 7, and is it more than a copy? At the end
it prints the path of the picture and one JSON line. --config and --config.<key>=<value> work as in
train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion import train
from moe_diffusion.cli import Parser, exits_on_user_error

SAMPLES, BATCH, COLUMNS = 1000, 250, 12


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    parser = Parser("demo", __doc__)
    parser.add_argument("--config", default="configs/digits.py", help="default: %(default)s")
    parser.add_argument("--workdir", default="runs/digits", help="default: %(default)s")
    args, overrides = parser.parse_with_overrides(argv)
    import numpy as np

    from moe_diffusion.diffusion.samplers import make_sampler
    from moe_diffusion.evaluation.digits import DigitsJudge
    from moe_diffusion.figures.images import image_grid, save_ornament
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory
    from moe_diffusion.sampling.conditions import default_conditions
    from moe_diffusion.sampling.generate import generate, pool_of
    from moe_diffusion.sampling.load import load_workdir

    keep_freed_memory()
    trained = train.run(args.config, args.workdir, overrides)
    if trained["step"] < trained["num_steps"]:  # stopped by a signal
        return
    train_seconds = time.perf_counter() - started

    config, model, variables, note = load_workdir(args.workdir)
    cond = default_conditions(model, SAMPLES)
    labels = cond["label"]
    pool = pool_of(config, BATCH)
    images = generate(
        make_sampler(model, config, pool=pool),
        variables,
        cond,
        model.input_shape,
        seed=config.seed,
        batch_size=BATCH,
        pool=pool,
        progress=True,
    )
    score = DigitsJudge().score(images, labels)

    shown = np.concatenate([np.flatnonzero(labels == c)[:COLUMNS] for c in np.unique(labels)])
    title = f"{config.name}, step {note['step']}, cfg {config.sampling.cfg:g}"
    picture = save_ornament(
        lambda: image_grid(images[shown], labels[shown], columns=COLUMNS, title=title),
        Path(args.workdir) / "digits.png",
    )
    if picture:
        print(f"{len(shown)} of {SAMPLES} drawn digits: {picture.absolute()}")
    seconds = time.perf_counter() - started
    places = {"picture": picture and str(picture), "workdir": args.workdir}
    times = {"train_seconds": round(train_seconds, 1), "seconds": round(seconds, 1)}
    print(json.dumps({name: round(value, 4) for name, value in score.items()} | times | places))


if __name__ == "__main__":
    main()
