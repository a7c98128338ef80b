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


DIGITS = "configs/digits.py:router=token_choice"
SMALL = ("model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=4")
SMALL += ("model.moe.num_experts=2", "model.moe.hidden_size=8", "model.moe.interleave=false")
SMALL += ("model.router.top_k=1", "sampling.steps=2", "ema.decays=0.9")

FLUX = "configs/digits_flux.py"
# Two double and three single blocks that read prompts; all but the first have four experts, of
# which a token meets two, beside a shared one, as Dense2MoE converts them (2510.09094).
FLUX_MOE = ("model.depth=2", "model.flux.single_depth=3", "model.hidden_size=16")
FLUX_MOE += ("model.num_heads=2", "model.flux.rope_axes=(4,2,2)", "model.flux.text_width=16")
FLUX_MOE += ("model.flux.pooled_width=8", "model.router.name=token_choice", "model.router.top_k=2")
FLUX_MOE += ("model.moe.num_experts=4", "model.moe.hidden_size=8", "model.moe.interleave=false")
FLUX_MOE += ("model.moe.skip_first=1", "model.moe.shared_hidden_size=32")
FLUX_MOE += tuple(f"model.moe.{key}=gelu" for key in ("mlp", "shared_mlp"))
FLUX_MOE += tuple(f"model.moe.{key}=true" for key in ("bias", "shared_bias"))
FLUX_MOE += ("model.router.normalize=true", "sampling.steps=2", "sampling.cfg=1", "ema.decays=0.9")


def make_run(
    folder: Path,
    *changes: str,
    class_names: list[str] | None = None,
    base: str = DIGITS,
    small: tuple[str, ...] = SMALL,
) -> dict[str, Any]:
    """Writes a workdir of digits with a checkpoint of step 5 and an average that is half as large.

    Args:
      base, small: a config, and what makes it small.

    Returns:
      The live variables.
    """
    config = configs.load(base, [*small, *changes])
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
