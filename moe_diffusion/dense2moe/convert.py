"""A dense model's weights become those of the same model with experts (2510.09094, section 3.2).

Each MLP is cut along its hidden units. The most important ones make the shared expert, the rest is
dealt to the normal experts in turn, so that each has as many important ones as the others. The
output bias goes to the shared expert alone. A compressed modulation is the best approximation of
the whole one (truncated SVD). Routers begin as those of a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import lax
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.checks import require
from moe_diffusion.config.defaults import COMPUTATION
from moe_diffusion.config.sizes import SIZES
from moe_diffusion.dense2moe.blocks import Weights, join, numbers, split, stream
from moe_diffusion.errors import UserError
from moe_diffusion.kernels import mlp
from moe_diffusion.models import build
from moe_diffusion.models.stack import Model, abstract_variables

Tree = Any

# May differ between a teacher and what is made of it. What is computed how may differ, too.
_FREE = ("model.moe.", "model.router.", "model.mob.", "model.adaln_", "model.param_dtype")
_FEWER = ("model.depth", "model.flux.single_depth")  # where blocks are left out


def check(config: ConfigDict, teacher: ConfigDict) -> None:
    """Raises a UserError for a student that cannot be made of a teacher.

    Args:
      config, teacher: of the student and of the teacher.
    """
    free = (*_FREE, *COMPUTATION, *SIZES)
    if tuple(config.distill.blocks) != ("all",):
        free += _FEWER
    changes = [
        f"{key}: {there} there, {here} here"
        for key, there, here in configs.differences(teacher, config)
        if key.startswith("model.") and not key.startswith(free) and None not in (there, here)
    ]
    require(
        not changes,
        f"distill.teacher = {config.distill.teacher} is another model: {'; '.join(changes)}: name "
        "a teacher of the student's architecture and size",
    )
    require(
        teacher.model.router.name == "dense",
        f"distill.teacher = {config.distill.teacher} has experts itself (model.router.name = "
        f"{teacher.model.router.name}): name a dense model",
    )
    dense, student = build(teacher.model), build(config.model)
    if config.model.router.name != "dense":
        _check_ratios(config.model, dense)
    taken_blocks(config, dense, student, changes=None)


def _check_ratios(model: ConfigDict, teacher: Model) -> None:
    """r = r_s + n r_n (section 3.1), in hidden units; without normal experts, r >= r_s."""
    leaves = flatten_dict(abstract_variables(teacher)["params"], sep="/")
    whole = next(
        x.shape[-2]
        for path, x in leaves.items()
        if path.startswith("layers_") and path.endswith("mlp/down/kernel")
    )
    moe, kind = model.moe, model.mlp
    for key, other in (("mlp", moe.mlp), ("shared_mlp", moe.shared_mlp)):
        require(
            other == kind or (key == "mlp" and not moe.num_experts),
            f"model.moe.{key} = {other} is cut out of MLPs of model.mlp = {kind}: set it to {kind}",
        )
    made = moe.shared_hidden_size + moe.num_experts * moe.hidden_size
    require(
        made == whole if moe.num_experts else made <= whole,
        f"model.moe.shared_hidden_size + num_experts * hidden_size = {moe.shared_hidden_size} + "
        f"{moe.num_experts} * {moe.hidden_size} = {made}, but the teacher's MLPs have {whole} "
        "hidden units: make them equal (r = r_s + n r_n)",
    )
    for key in ("bias", "shared_bias") if moe.num_experts else ("shared_bias",):
        require(
            bool(model.mlp_bias) == bool(moe[key]),
            f"model.moe.{key} = {moe[key]}, but model.mlp_bias = {model.mlp_bias}: make them equal",
        )


# --- which blocks --------------------------------------------------------------------------------


def taken_blocks(
    config: ConfigDict, teacher: Model, student: Model, changes: Sequence[float] | None
) -> tuple[int, ...]:
    """For each block of the student, the number of the teacher's block that it is made of.

    `distill.blocks` names them or how they are chosen. Of each kind as many are chosen as the
    student has: `lite`, those that change their input most (FLUX.1-Lite); `even`, evenly spaced
    ones that begin with the first (BK-SDM).

    Args:
      changes: of `importance.Importance`; None only checks.

    Raises:
      UserError: there are other blocks than the student needs, or of other kinds.
    """
    kinds = [stream(block) for block in teacher.blocks()]
    wanted = [stream(block) for block in student.blocks()]
    chosen = tuple(config.distill.blocks)
    if chosen in (("lite",), ("even",)):
        taken: list[int] = []
        for kind in dict.fromkeys(kinds):
            have, need = [i for i, k in enumerate(kinds) if k == kind], wanted.count(kind)
            _enough(kind, len(have), need)
            if chosen == ("even",) or changes is None:
                taken += [have[i * len(have) // need] for i in range(need)]
            else:
                score = [np.inf if changes[i] < 0 else changes[i] for i in have]
                best = np.argsort(score, kind="stable")[::-1][:need]
                taken += sorted(have[i] for i in best)
        return tuple(taken)
    try:
        taken = list(range(len(kinds)) if chosen == ("all",) else numbers(chosen))
    except ValueError as error:
        raise UserError(
            f"distill.blocks = {','.join(chosen)} is unknown: name all | lite | even, or ranges "
            "like 0-3,15-56"
        ) from error
    found = [kinds[i] if 0 <= i < len(kinds) else "none" for i in taken]
    require(
        found == wanted and taken == sorted({*taken}),
        f"distill.blocks = {','.join(chosen)} are {len(found)} of the teacher's {len(kinds)} "
        f"blocks ({_counted(found)}), and the student has {len(wanted)} ({_counted(wanted)}): name "
        "as many of each kind, in order",
    )
    return tuple(taken)


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _enough(kind: str, have: int, need: int) -> None:
    require(
        0 < need <= have,
        f"the student has {need} blocks of kind {kind}, the teacher {have}: make it shallower",
    )


# --- experts -------------------------------------------------------------------------------------


def order_of(scores: np.ndarray | None, size: int, seed: int) -> np.ndarray:
    """Hidden units i64[H] from the most to the least important; at random without scores."""
    if scores is None:
        return np.random.default_rng(seed).permutation(size)
    return np.argsort(-scores, kind="stable")


def deal(order: np.ndarray, shared: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The units of the shared expert [shared] and of the normal ones [experts, (H - shared) / n].

    The first of `order` go to the shared expert, the others to the normal ones in turn. In each the
    units keep the order that they had in the MLP.
    """
    rest = order[shared:]
    dealt = [np.sort(rest[e::experts]) for e in range(experts)]
    return np.sort(order[:shared]), np.stack(dealt) if dealt else np.zeros((0, 0), int)


def to_experts(
    weights: Weights, kind: str, shared: np.ndarray, dealt: np.ndarray
) -> dict[str, jax.Array]:
    """The weights of a MoE layer made of those of an MLP, but the router's.

    Args:
      weights: like "up/kernel" [D, H], "up/bias" [H], "down/kernel" [H, D], "down/bias" [D].
      kind: of the MLP.
      shared, dealt: of `deal`.
    """
    made: dict[str, jax.Array] = {}
    down = weights["down/kernel"]
    made["shared/down/kernel"] = down[shared]
    if "down/bias" in weights:  # kept once
        made["shared/down/bias"] = weights["down/bias"]
    if len(dealt):
        made["experts/down"] = down[dealt]
        made["experts/down_bias"] = jnp.zeros((len(dealt), down.shape[1]), down.dtype)
    for name in mlp.inputs(kind):
        kernel, bias = weights[f"{name}/kernel"], weights.get(f"{name}/bias")
        made[f"shared/{name}/kernel"] = kernel[:, shared]
        if len(dealt):
            made[f"experts/{name}"] = jnp.moveaxis(kernel[:, dealt], 1, 0)
        if bias is not None:
            made[f"shared/{name}/bias"] = bias[shared]
            made[f"experts/{name}_bias"] = bias[dealt]
    return made


# --- modulation ----------------------------------------------------------------------------------


def principal(kernels: Sequence[jax.Array], rank: int) -> jax.Array:
    """The `rank` first left singular vectors f32[D, rank] of kernels [D, n] side by side."""

    def square(kernel: jax.Array) -> jax.Array:
        kernel = kernel.astype(jnp.float32)
        return jnp.matmul(kernel, kernel.T, precision=lax.Precision.HIGHEST)

    _, vectors = jnp.linalg.eigh(sum(map(square, kernels)))  # from the smallest
    return vectors[:, ::-1][:, :rank]


def compressed(weights: Weights, down: jax.Array) -> dict[str, jax.Array]:
    """A modulation W [D, n] as down [D, rank] and up = down^T W [rank, n].

    With `down` of `principal` this is the truncated SVD of W: the best approximation of that rank.
    """
    kernel = weights["kernel"].astype(jnp.float32)
    up = jnp.matmul(down.T, kernel, precision=lax.Precision.HIGHEST)
    return {"down/kernel": down, "up/kernel": up}


# --- whole models --------------------------------------------------------------------------------


def make_student(
    config: ConfigDict,
    teacher: Model,
    student: Model,
    params: Tree,
    initial: Tree,
    units: Callable[[int, str, int], np.ndarray],
    taken: Sequence[int],
) -> Tree:
    """The params of a student made of the teacher's.

    Args:
      config: of the student.
      initial: params of a new student; what the teacher does not have comes from there.
      units: (block of the teacher, name of its MLP, H) -> i64[H], units from the most important on.
      taken: of `taken_blocks`.
    """
    blocks, rest = split(teacher, params)
    new_blocks, new_rest = split(student, initial)
    rank, moe = config.model.adaln_rank, config.model.moe
    svd = rank and config.distill.adaln_init == "svd"
    if svd and config.model.adaln_shared:
        every = [w for number in taken for k, w in blocks[number].items() if _is_kernel(k)]
        rest["adaLN_down/kernel"] = principal(every, rank)
    made: list[Weights] = []
    for block, number, new in zip(student.blocks(), taken, new_blocks, strict=True):
        own = blocks[number]
        kept = {name: own[name] for name in own if name in new}
        if str(block.kind).endswith("moe"):
            for name in dict.fromkeys(_mlp_of(path) for path in own if _mlp_of(path)):
                weights = _below(own, name)
                order = units(number, name, weights["down/kernel"].shape[0])
                parts = deal(order, moe.shared_hidden_size, moe.num_experts)
                layer = to_experts(weights, config.model.mlp, *parts)
                expert = f"{name.removesuffix('mlp')}moe"
                kept |= {f"{expert}/{leaf}": value for leaf, value in layer.items()}
        for name in (path.rpartition("/")[0] for path in own if rank and _is_kernel(path)):
            weights = _below(own, name)
            parts = {"up/bias": weights["bias"]}
            if svd:
                down = rest.get("adaLN_down/kernel")
                down = principal([weights["kernel"]], rank) if down is None else down
                parts |= compressed(weights, down)
            kept |= {f"{name}/{leaf}": value for leaf, value in parts.items()}
        made.append({path: kept.get(path, value) for path, value in new.items()})
    joined = join(student, made, {path: rest.get(path, x) for path, x in new_rest.items()})
    return jax.tree.map(lambda x, like: x.astype(like.dtype), joined, initial)


def regroup(before: Model, after: Model, params: Tree, initial: Tree) -> Tree:
    """The params of the same blocks in other groups; the routers of new groups are `initial`."""
    blocks, rest = split(before, params)
    new_blocks, _ = split(after, initial)
    pairs = zip(blocks, new_blocks, strict=True)
    return join(after, [_kept(old, new) for old, new in pairs], rest)


def _kept(old: Weights, new: Weights) -> Weights:
    """`new`, with the arrays of `old` where they have its name and shape."""
    return {n: old[n] if n in old and old[n].shape == x.shape else x for n, x in new.items()}


def _below(weights: Weights, name: str) -> Weights:
    """The weights of a layer of a block, by their path inside it."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}


def _mlp_of(path: str) -> str:
    """The name of the MLP that a path inside a block belongs to, like "image_mlp"; "" if none."""
    name = path.partition("/")[0]
    return name if name.endswith("mlp") else ""


def _is_kernel(path: str) -> bool:
    """Whether a path inside a block is that of a whole modulation."""
    return path.endswith("adaLN/kernel")
