"""What `distill_demo` compares: students of a tiny teacher, and how they are judged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_diffusion.checks import require
from moe_diffusion.data.sources import Digits
from moe_diffusion.dense2moe.comparison import compare, table
from moe_diffusion.dense2moe.importance import FILE
from moe_diffusion.evaluation.compare import compare as compare_features
from moe_diffusion.evaluation.digits import DigitsFeatures, DigitsJudge
from moe_diffusion.evaluation.features import FeatureSet
from moe_diffusion.evaluation.metrics import gaussian_of
from moe_diffusion.figures.images import image_grid, save_ornament
from moe_diffusion.sampling.load import load_config
from moe_diffusion.training.checkpoint import saved_steps

IMAGES, COLUMNS = 300, 10  # of a model; in the picture
_SHARED_ONLY = ("distill.experts.steps=0", "distill.groups.steps=0")
Run = Callable[[str, str, Sequence[str]], Any]  # (config, workdir, changes)


@dataclass(frozen=True)
class Demonstration:
    """Students of one teacher.

    Attributes:
      runs: folder -> config, and changes to it, of a distillation.
      scratch: folder -> the same of a training from scratch.
      rows: name -> folder of a stage.
      score: the name of the share of images that are right.
    """

    runs: dict[str, tuple[str, tuple[str, ...]]]
    scratch: dict[str, tuple[str, tuple[str, ...]]]
    rows: dict[str, str]
    score: str

    def only(self, students: Sequence[str]) -> Demonstration:
        """Without all others; raises a UserError if there is no student of a name."""
        known = self.runs | self.scratch
        unknown = sorted({*students} - {*known})
        require(not unknown, f"no student is called {unknown}: there are {', '.join(known)}")
        rows = {name: at for name, at in self.rows.items() if at.split("/")[0] in students}
        runs, scratch = (
            {name: how for name, how in those.items() if name in students}
            for those in (self.runs, self.scratch)
        )
        return Demonstration(runs, scratch, rows, self.score)


FLUX = Demonstration(
    runs={
        "moe": ("digits_flux_moe:level=s", ()),
        "random": ("digits_flux_moe:level=l", ("distill.importance=random", *_SHARED_ONLY)),
        "mlp_l": ("digits_flux_pruned:how=mlp,match=l", ()),
        "depth_l": ("digits_flux_pruned:how=depth,match=l", ()),
        "mlp_m": ("digits_flux_pruned:how=mlp,match=m", ()),
        "depth_m": ("digits_flux_pruned:how=depth,match=m", ()),
    },
    scratch={},
    rows={
        "L: experts": "moe/experts",
        "MLPs pruned, as L": "mlp_l/shared",
        "depth pruned, as L": "depth_l/shared",
        "M: and double groups": "moe/groups1",
        "MLPs pruned, as M": "mlp_m/shared",
        "depth pruned, as M": "depth_m/shared",
        "S: and single groups": "moe/groups2",
        "shared only, Taylor": "moe/shared",
        "shared only, random": "random/shared",
    },
    score="prompt_accuracy",
)
DIT = Demonstration(
    runs={"moe": ("digits_moe", ())},
    scratch={"scratch": ("digits_moe", ())},
    rows={
        "shared experts alone": "moe/shared",
        "experts": "moe/experts",
        "experts from scratch": "scratch",
    },
    score="class_accuracy",
)
ALL = {"flux": FLUX, "dit": DIT}


def demonstrate(
    what: Demonstration,
    teacher: str,
    workdir: str,
    seed: int,
    changes: Sequence[str],
    distil: Run,
    train: Run,
    asked: Callable[..., tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]],
    num: int = IMAGES,
) -> dict[str, Any]:
    """Makes the students and compares them with their teacher.

    Args:
      changes: to the config of every run.
      distil, train: of the commands of these names.
      asked: (config, model, number of images) -> condition, digits and captions.
      num: of images that each model draws.

    Returns:
      {"rows", "seconds", "picture"}; rows are those of `comparison.Row`.
    """
    started, folder = time.perf_counter(), Path(workdir)
    scores = folder / "moe" / FILE
    for name, (spec, own_changes) in what.runs.items():
        own = folder / name / FILE
        if scores.exists() and not own.exists():  # of the same teacher and the same batches
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scores, own)
        said = (*own_changes, f"distill.teacher={teacher}", f"seed={seed}", *changes)
        distil(spec, str(folder / name), said)
    for name, (spec, own_changes) in what.scratch.items():
        train(spec, str(folder / name), (*own_changes, f"seed={seed}", *changes))
    config, judge, wanted = load_config(teacher), DigitsJudge(), {}

    def conditions(model: Any) -> dict[str, np.ndarray]:
        cond, digits, _ = asked(config, model, num)
        order = np.random.default_rng(seed).permutation(len(digits))  # all digits in each batch
        wanted["digits"] = digits[order]
        return {field: values[order] for field, values in cond.items()}

    def judged(images: np.ndarray) -> dict[str, float]:
        right = judge.score(images, wanted["digits"])["class_accuracy"]
        return {what.score: right, "fd_digits": fd_digits(images)}

    places = {name: str(folder / at) for name, at in what.rows.items()}
    # Stages of 0 steps are left out.
    workdirs = {"teacher": teacher} | {n: at for n, at in places.items() if saved_steps(at)}
    rows, images = compare(workdirs, conditions, judged, seed=seed)
    print(table(rows, (what.score, "fd_digits")))
    shown = [int(np.flatnonzero(wanted["digits"] == digit)[0]) for digit in range(COLUMNS)]
    grid = np.concatenate([drawn[shown] for drawn in images.values()])
    heads, captions = [str(digit) for digit in range(COLUMNS)], np.repeat([*images], COLUMNS)
    title = "the same noise through each"
    picture = save_ornament(
        lambda: image_grid(grid, captions, COLUMNS, title=title, heads=heads), folder / "rows.png"
    )
    return {
        "rows": [row.told() for row in rows],
        "seconds": round(time.perf_counter() - started, 1),
        "picture": picture and str(picture),
    }


def fd_digits(images: np.ndarray) -> float:
    """Frechet distance of `DigitsFeatures` to the training digits; it is not an FID."""
    features = DigitsFeatures()

    def measured(name: str, images: np.ndarray) -> FeatureSet:
        vectors = features(images)["pool"]
        return FeatureSet(name, gaussian_of(vectors), vectors=vectors)

    pair = measured("samples", images), measured("training data", Digits("train").images)
    return compare_features(*pair, features)[0]["fd_digits"]
