"""How important the hidden units and the blocks of a dense model are.

A hidden unit j of an MLP owns a column of the first matrix (of both, if it is gated), their biases,
and a row of the last matrix. Its score is Eq. 6 of 2510.09094 added up over all of these weights,
and over batches of the diffusion loss L:

    I_j = sum_batches sum_{w of unit j} | dL/dw w |

A block's score is the mean squared difference of its input and output, as in FLUX.1-Lite: a block
with a low one is nearly the identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion import digests
from moe_diffusion.buckets import sized
from moe_diffusion.conditions import cond_of
from moe_diffusion.data.pipeline import BatchIterator
from moe_diffusion.dense2moe.losses import difference
from moe_diffusion.diffusion.objectives import draw, make_loss, objective
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.archives import open_archive
from moe_diffusion.models.stack import Model
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.progress import Progress
from moe_diffusion.remote import is_remote
from moe_diffusion.training.checkpoint import saved_steps
from moe_diffusion.training.loop import to_device
from moe_diffusion.training.state import merge, split
from moe_diffusion.writing import save_arrays

Tree = Any
FILE = "importance.npz"
_DENSE = ("layers_*mlp/*",)  # paths of the weights of dense MLPs
_EVERY = 16  # batches between two savings


@dataclass
class Importance:
    """Scores of a model.

    Attributes:
      units: path of a dense MLP, like "layers_0/block_0/image_mlp" -> f64[layers, H].
      changes: f64[blocks], see `changes`, summed over batches.
      loss: the mean diffusion loss of the batches.
      batches: how many are in the sums.
      teacher: `fingerprint` of the model.
    """

    teacher: str
    units: dict[str, np.ndarray] = field(default_factory=dict)
    changes: np.ndarray | None = None
    loss: float = 0.0
    batches: int = 0

    def add(self, units: Mapping[str, np.ndarray], changes: np.ndarray, loss: float) -> None:
        """Adds the scores of one batch."""
        before = self.units or dict.fromkeys(units, 0.0)
        self.units = {path: before[path] + np.asarray(x, np.float64) for path, x in units.items()}
        changes = np.asarray(changes, np.float64)
        self.changes = changes if self.changes is None else self.changes + changes
        self.loss = (self.loss * self.batches + float(loss)) / (self.batches + 1)
        self.batches += 1

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scores as .npz, whole or not at all."""
        arrays = {f"units/{path}": scores for path, scores in self.units.items()}
        arrays |= {"changes": self.changes, "loss": self.loss, "batches": self.batches}
        save_arrays(path, {**arrays, "teacher": np.frombuffer(self.teacher.encode(), np.uint8)})


def load(path: str | os.PathLike, teacher: str) -> Importance:
    """Reads what `Importance.save` wrote.

    Raises:
      UserError: the file is damaged, or has the scores of another model than `teacher`.
    """
    with _local(path) as file, open_archive(file) as archive:
        found = archive.numbers("teacher", np.uint8).tobytes().decode()
        names = [name for name in archive.headers if name.startswith("units/")]
        units = {n.removeprefix("units/"): archive.numbers(n, np.float64) for n in names}
        changes, loss = (archive.numbers(name, np.float64) for name in ("changes", "loss"))
        batches = int(archive.numbers("batches", np.int64))
    if found != teacher:
        raise UserError(
            f"{path} has the scores of another model than distill.teacher: delete it, or name the "
            "teacher that it was made with"
        )
    return Importance(found, units, changes, float(loss), batches)


@contextlib.contextmanager
def _local(path: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """The file itself, or for a while a copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / FILE
        copy.write_bytes(epath.Path(path).read_bytes())
        yield copy


def fingerprint(config: ConfigDict, workdir: str | os.PathLike) -> str:
    """A text that tells one teacher from another: its config, and the digests of its weights."""
    folder = epath.Path(workdir)
    steps = saved_steps(workdir)
    places = [folder / "checkpoints" / str(step) / "state" for step in steps[-1:]]
    files = [place / digests.NAME for place in (*places, folder / "untrained")]
    texts = [file.read_text() for file in files if file.exists()]
    texts += [json.dumps(config.model.to_dict(), sort_keys=True)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def measure(
    config: ConfigDict,
    teacher: Model,
    params: Tree,
    iterator: BatchIterator,
    found: Importance,
    path: str | os.PathLike,
) -> Importance:
    """Adds up scores over `config.distill.importance_batches` batches; saves and resumes.

    Args:
      config: of the run: data, diffusion and seed; no losses of routers. Batch n draws from
        fold_in(key(seed), n).
      params: of the teacher, on the mesh that is set.
      iterator: of the training data, at any batch.
      found: the scores so far.
      path: where they are saved, every few batches.
    """
    total, key = config.distill.importance_batches, jax.random.key(config.seed)
    step = jax.jit(partial(scores, teacher, config))
    iterator.set_state({"next_index": found.batches})
    place = partial(to_device, mesh=jax.sharding.get_mesh(), accumulate=1)
    with contextlib.closing(Progress(found.batches, total, config.data.batch_size)) as progress:
        progress.write(f"importance of hidden units, {total} batches")
        for number in range(found.batches, total):
            batch = place(next(iterator))
            found.add(*jax.device_get(step(params, batch, jax.random.fold_in(key, number))))
            progress.update(number + 1)
            last = number + 1 == total
            if (last or found.batches % _EVERY == 0) and is_main_process():
                found.save(path)
    return found


def scores(
    teacher: Model, config: ConfigDict, params: Tree, batch: Tree, rng: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The scores of one batch.

    Returns:
      {path of an MLP: f32[layers, H]}, f32[blocks] and the loss; see `Importance`.
    """
    loss_fn = make_loss(teacher, config)
    dense, rest = split(params, _DENSE)

    def loss_of(dense: Tree) -> jax.Array:
        return loss_fn(merge(dense, rest), {}, batch, rng)[0]

    loss, grads = jax.value_and_grad(loss_of)(dense)
    units = unit_scores(flatten_dict(dense, sep="/"), flatten_dict(grads, sep="/"))
    draws = draw(rng, batch["image"].shape, config.diffusion)
    asked = objective(batch["image"], draws, config.diffusion)
    teacher = sized(teacher, asked.x_t.shape[1:])
    return units, changes(teacher, params, asked.x_t, asked.t, cond_of(batch)), loss


def unit_scores(
    weights: Mapping[str, jax.Array], grads: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Path of an MLP -> sum of |dL/dw w| over the weights of each unit (Eq. 6), f32[layers, H].

    Args:
      weights, grads: path -> array with a leading axis of layers, like "layers_0/block_0/mlp/up/
        kernel" [layers, D, H]. The last bias belongs to no unit.
    """
    units: dict[str, jax.Array] = {}
    for path, grad in grads.items():
        mlp, layer, name = path.rsplit("/", 2)
        if (layer, name) == ("down", "bias"):
            continue
        product = jnp.abs(grad.astype(jnp.float32) * weights[path])
        if name == "kernel":  # [layers, H, D] of the last matrix, [layers, D, H] of the others
            product = product.sum(-1 if layer == "down" else 1)
        units[mlp] = units[mlp] + product if mlp in units else product
    return units


def changes(
    model: Model, params: Tree, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array]
) -> jax.Array:
    """Mean squared difference of input and output of every block, f32[blocks] (Figure 3).

    Of the first block it is -1, since a model's `capture` does not show its input.
    """
    blocks = range(len(model.blocks()))
    _, features = model.apply({"params": params}, x, t, cond, False, capture=tuple(blocks))
    tokens = [_tokens(features[number]) for number in blocks]
    found = [difference(*pair) for pair in zip(tokens, tokens[1:], strict=False)]
    return jnp.stack([jnp.float32(-1), *found])


def _tokens(feature: Tree) -> jax.Array:
    """The tokens of a feature in one sequence, those of a text first."""
    return jnp.concatenate(feature[::-1], axis=1) if isinstance(feature, tuple) else feature
