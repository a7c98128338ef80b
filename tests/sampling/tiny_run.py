"""A run of random weights that draws in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config as configs
from moe_diffusion.classes import Classes
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.training.checkpoint import Checkpointer
from moe_diffusion.training.state import TrainState

STEP = 5


def make_run(folder: Path, *changes: str, class_names: list[str] | None = None) -> dict[str, Any]:
    """Writes a workdir of digits with a checkpoint of step 5 and an average that is half as large.

    Returns:
      The live variables.
    """
    config = configs.load(
        "configs/digits.py:router=token_choice",
        [
            *("model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=4"),
            *("model.moe.num_experts=2", "model.moe.hidden_size=8", "model.moe.interleave=false"),
            *("model.router.top_k=1", "sampling.steps=2", "ema.decays=0.9", *changes),
        ],
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype),
        {"router_state": {}} | abstract_variables(build(config.model)),
    )
    average = jax.tree.map(lambda x: x / 2, variables)
    state = TrainState(
        jnp.int32(STEP), variables["params"], variables["router_state"], {"0.9": average}, {}
    )
    checkpoints = Checkpointer(folder, config.checkpoint)
    checkpoints.save(STEP, state, {})
    checkpoints.close()
    configs.save_json(config, folder / "config.json")
    if class_names:
        Classes({"label": len(class_names)}, class_names).save(folder)
    return variables
