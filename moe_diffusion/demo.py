"""The project in ten minutes: trains a MoE diffusion transformer on real digits and draws some.

  python -m moe_diffusion.demo --workdir runs/digits
  python -m moe_diffusion.demo --config configs/digits_flux.py --workdir runs/digits_flux

It trains (or resumes) configs/digits.py, draws 1,000 digits, and judges them with a classifier that
saw the training images only: does a drawn 7 look like a 7, and is it more than a copy? At the end
it prints the path of the picture and one JSON line. --config and --config.<key>=<value> work as in
train. A model that reads prompts is asked in those that it was not trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_diffusion import train
from moe_diffusion.cli import Parser, exits_on_user_error

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from moe_diffusion.models.stack import Model

SAMPLES, BATCH = 1000, 250
ROWS, COLUMNS = 20, 12  # of the picture, at most
PROMPTS = 100  # of as many samples each


def asked(
    config: ConfigDict, model: Model, num: int = SAMPLES
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What is drawn: the condition of `num` images, the digit and the caption of each."""
    import numpy as np

    from moe_diffusion.digit_prompts import held_out_prompts
    from moe_diffusion.sampling.conditions import default_conditions
    from moe_diffusion.sampling.prompts import prompt_encoder
    from moe_diffusion.vocabulary import TOKENS

    if TOKENS not in model.cond_spec():
        cond = default_conditions(model, num)
        return cond, cond["label"], cond["label"]
    texts, digits = zip(*held_out_prompts(PROMPTS), strict=True)
    texts, digits = (np.repeat(values, num // PROMPTS) for values in (texts, digits))
    return prompt_encoder(config, model)(texts.tolist()), digits, texts


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
    from moe_diffusion.sampling.generate import generate, pool_of
    from moe_diffusion.sampling.load import load_workdir

    keep_freed_memory()
    trained = train.run(args.config, args.workdir, overrides)
    if trained["step"] < trained["num_steps"]:  # stopped by a signal
        return
    train_seconds = time.perf_counter() - started

    config, model, variables, note = load_workdir(args.workdir)
    cond, labels, captions = asked(config, model)
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
    if captions is not labels:
        score = {"prompt_accuracy": score.pop("class_accuracy"), **score}

    rows = [np.flatnonzero(captions == c)[:COLUMNS] for c in dict.fromkeys(captions.tolist())]
    rows = rows[:: -(-len(rows) // ROWS)]
    shown = np.concatenate(rows)
    title = f"{config.name}, step {note['step']}, cfg {config.sampling.cfg:g}"
    picture = save_ornament(
        lambda: image_grid(images[shown], captions[shown], columns=len(rows[0]), title=title),
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
