"""Dense2MoE in half an hour: turns a tiny dense FLUX into experts, and compares with pruning.

  python -m moe_diffusion.demo --config configs/digits_flux.py --workdir runs/digits_flux
  python -m moe_diffusion.distill_demo --teacher runs/digits_flux --workdir runs/dense2moe

It makes students of the teacher at the ratios of FLUX.1-MoE-L, M and S, and dense ones of as many
activated parameters by leaving out hidden units or blocks. Each draws digits for the same prompts
from the same noise. A table tells how many are right, how far they are from the teacher's, and what
they cost; a picture shows them row by row. The last line is JSON. Run it again to resume.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_diffusion import distill
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.demo import asked

IMAGES, COLUMNS = 500, 10
SCORE = "prompt_accuracy"
_SHARED_ONLY = ("distill.experts.steps=0", "distill.groups.steps=0")
# Folder -> config and changes of a distillation.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "moe": ("digits_flux_moe:level=s", ()),
    "random": ("digits_flux_moe:level=l", ("distill.importance=random", *_SHARED_ONLY)),
    "mlp_l": ("digits_flux_pruned:how=mlp,match=l", ()),
    "depth_l": ("digits_flux_pruned:how=depth,match=l", ()),
    "mlp_m": ("digits_flux_pruned:how=mlp,match=m", ()),
    "depth_m": ("digits_flux_pruned:how=depth,match=m", ()),
}
# Name -> folder of a stage.
ROWS = {
    "L: experts": "moe/experts",
    "MLPs pruned, as L": "mlp_l/shared",
    "depth pruned, as L": "depth_l/shared",
    "M: + double groups": "moe/groups1",
    "MLPs pruned, as M": "mlp_m/shared",
    "depth pruned, as M": "depth_m/shared",
    "S: + single groups": "moe/groups2",
    "shared only, Taylor": "moe/shared",
    "shared only, random": "random/shared",
}


def run(teacher: str, workdir: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The demonstration with one seed: {"rows", "seconds", "picture"}."""
    import numpy as np

    from moe_diffusion.dense2moe.comparison import compare, table
    from moe_diffusion.evaluation.digits import DigitsJudge
    from moe_diffusion.figures.images import image_grid, save_ornament
    from moe_diffusion.sampling.load import load_config

    started, folder = time.perf_counter(), Path(workdir)
    scores = folder / "moe" / "importance.npz"
    for name, (spec, changes) in RUNS.items():
        own = folder / name / scores.name
        if scores.exists() and not own.exists():  # of the same teacher and the same batches
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scores, own)
        said = (*changes, f"distill.teacher={teacher}", f"seed={seed}", *overrides)
        distill.run(spec, str(folder / name), said)
    judge, config = DigitsJudge(), load_config(teacher)
    wanted: dict[str, np.ndarray] = {}

    def conditions(model: Any) -> dict[str, np.ndarray]:
        cond, digits, texts = asked(config, model, IMAGES)
        order = np.random.default_rng(seed).permutation(len(digits))  # all digits in each batch
        wanted.update(digits=digits[order], texts=texts[order])
        return {field: values[order] for field, values in cond.items()}

    def judged(images: np.ndarray) -> dict[str, float]:
        return {SCORE: judge.score(images, wanted["digits"])["class_accuracy"]}

    workdirs = {"teacher": teacher} | {name: str(folder / place) for name, place in ROWS.items()}
    rows, images = compare(workdirs, conditions, judged, seed=seed)
    print(table(rows, SCORE))
    shown = [int(np.flatnonzero(wanted["digits"] == d)[0]) for d in range(COLUMNS)]
    grid = np.concatenate([drawn[shown] for drawn in images.values()])
    captions = np.repeat([*images], COLUMNS)
    heads = [str(digit) for digit in range(COLUMNS)]
    picture = save_ornament(
        lambda: image_grid(
            grid, captions, COLUMNS, title="the same noise through each", heads=heads
        ),
        folder / "rows.png",
    )
    return {
        "rows": [row.told() for row in rows],
        "seconds": round(time.perf_counter() - started, 1),
        "picture": picture and str(picture),
    }


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("distill_demo", __doc__)
    add = parser.add_argument
    add(
        "--teacher", default="runs/digits_flux", help="workdir of digits_flux; default: %(default)s"
    )
    add("--workdir", default="runs/dense2moe", help="default: %(default)s")
    add("--seeds", type=int, default=1, help="how many times, with seeds 0, 1, ...; default: 1")
    args, overrides = parser.parse_with_overrides(argv)
    from moe_diffusion.kernels.cpu.heap import keep_freed_memory

    keep_freed_memory()
    results = []
    for seed in range(args.seeds):
        folder = Path(args.workdir) / f"seed{seed}" if args.seeds > 1 else args.workdir
        results.append(run(args.teacher, str(folder), seed, overrides))
    last = results[0] if args.seeds == 1 else {"seeds": results, **summary(results)}
    print(json.dumps(last))


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean rows over seeds; prints a table of them."""
    from moe_diffusion.dense2moe.comparison import mean_rows, mean_table

    rows = mean_rows([result["rows"] for result in results])
    print(mean_table(rows, SCORE))
    seconds = sum(result["seconds"] for result in results)
    return {"rows": rows, "seconds": round(seconds, 1), "picture": results[0]["picture"]}


if __name__ == "__main__":
    main()
