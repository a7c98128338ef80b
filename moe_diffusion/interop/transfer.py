"""Turns a PyTorch file into a folder that our command lines take, and back, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from tqdm import tqdm

from moe_diffusion import config as configs
from moe_diffusion import locks, models
from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.interop import describe, families, files, keymap
from moe_diffusion.interop.prompts import is_pipeline
from moe_diffusion.interop.rows import Family
from moe_diffusion.interop.streamed import write_weights
from moe_diffusion.interop.tensors import Pieces, Spec, State, lazy, listed
from moe_diffusion.training.checkpoint import StoredWeights, first_average

DTYPES = ("file", "float32", "bfloat16", "float16")  # `import_folder` can store these


def import_folder(
    family: str,
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    weights: str | None = None,
    hparams: str | None = None,
    config: str | None = None,
    dtype: str | None = None,
    change: Callable[[State], State] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Reads a PyTorch file into `folder`: config.json and checkpoints/0, with no averages.

    Args:
      source: see `files.open_weights`. If a folder has the family's subfolder, that is taken.
      weights: which state dict to take, if the file holds several.
      hparams: file with the authors' hyperparameters; see `describe.hyperparameters`.
      config: config file ("configs/dsmoe_l.py:experts=16") to use instead of hyperparameters.
      dtype: of all floating parameters, one of `DTYPES`; it becomes `model.param_dtype`. None and
        "file" take the narrowest that loses nothing of the file; see `keymap.import_leaves`.
      change: the file's state dict -> the one to import, for example with `tensors.adjusted`.

    Returns:
      {"family", "input", "output", "weights", "hparams" (where they come from), "dtype", "tensors",
      "bytes"}

    Raises:
      UserError: an argument or a file is wrong, which is known before anything is written; or
        writing fails, which leaves nothing behind.
    """
    if "://" in os.fspath(folder):
        raise UserError(f"{folder} is remote: convert into a local folder and copy it there")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: name another output, or delete it")
    check_writable(folder.parent)
    how = {"weights": weights, "hparams": hparams, "config": config, "dtype": dtype}
    path, opened, origin, model_config, leaves = open_import(family, source, **how, change=change)
    total = sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in leaves.values())
    _check_room(folder, total)

    partial_folder = folder.with_name(f".{folder.name}.partial")
    with locks.held(partial_folder, "convert"):
        shutil.rmtree(partial_folder / "checkpoints", ignore_errors=True)  # of a killed run
        try:
            with tqdm(
                total=total, unit="B", unit_scale=True, desc="import", disable=not progress
            ) as t:
                write_weights(partial_folder, leaves, t.update)
            configs.save_json(model_config, partial_folder / "config.json")
            os.replace(partial_folder, folder)
            (folder / locks.NAME).unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # tensorstore raises ValueErrors
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder} could not be written: {reason}") from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    return {
        "family": family,
        "input": str(path),
        "output": str(folder),
        "weights": opened.entry,
        "hparams": origin,
        "dtype": model_config.model.param_dtype,
        "tensors": len(opened.state),
        "bytes": total,
    }


class Import(NamedTuple):
    """A weight file that is known to fit a model; no tensor has been read.

    Attributes:
      path: of the file.
      opened: what lies in it.
      origin: a text that says where the hyperparameters come from.
      config: of the model, without averages.
      leaves: path of every variable -> how to read it.
    """

    path: Path
    opened: files.Weights
    origin: str
    config: ConfigDict
    leaves: dict[str, Pieces]


def open_import(
    family: str,
    source: str | os.PathLike,
    *,
    weights: str | None = None,
    hparams: str | Mapping[str, Any] | None = None,
    config: str | None = None,
    dtype: str | None = None,
    change: Callable[[State], State] | None = None,
) -> Import:
    """Finds out which model a PyTorch file holds; see `import_folder` for arguments and errors.

    hparams: may be a mapping, too.
    """
    chosen = families.family(family)
    path = files.find(source, chosen.subfolder)
    if hparams and config:
        raise UserError("--hparams and --config both say what the model is: give one of them")
    opened = files.open_weights(path, weights)
    if change:
        opened = opened._replace(state=lazy(change(opened.state)))
    described, origin, model_config = _describe(chosen, path, opened, hparams, config)
    model = models.build(model_config.model)
    leaves = _leaves(opened.state, chosen, model, described, dtype or DTYPES[0])
    model_config.model.param_dtype = next(
        x.dtype.name for path, x in leaves.items() if path.startswith("params/")
    )
    if model_config.model.param_dtype == "bfloat16" and not config:
        model_config.model.dtype = "auto"  # what is published in bf16 also runs in it
    around = Path(source) if Path(source).is_dir() else path.parent
    if model_config.model.architecture == "flux" and is_pipeline(around):
        model_config.data.text_encoders = os.path.abspath(around)
    model_config.ema.decays = ()  # there is one set of weights, the one to sample from
    return Import(path, opened, origin, model_config, leaves)


def export_file(
    family: str,
    workdir: str | os.PathLike,
    path: str | os.PathLike,
    *,
    ema: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a checkpoint's weights as a `.safetensors` file under the authors' names.

    Args:
      workdir: of a run, or a folder of `import_folder`.
      ema: decay of the average as text, or "none"; None takes the first that the run keeps.

    Returns:
      {"family", "input", "output", "step", "ema", "tensors", "bytes"}

    Raises:
      UserError: there is no such checkpoint, or the family has no names or hyperparameters for
        this model.
    """
    chosen, described = families.family(family), Path(workdir) / "config.json"
    if not described.is_file():
        raise UserError(f"{workdir} is not a workdir (it has no config.json)")
    config = configs.load_json(described)
    if ema is None:
        ema = first_average(config) or "none"
    hparams = families.torch_from_config(family, config)
    model = models.build(config.model)
    check_writable(Path(path).parent)
    with StoredWeights(workdir, ema=None if ema == "none" else ema) as stored:
        wanted = keymap.abstract_variables(model)
        misfits = stored.misfits(wanted)
        if misfits:
            raise UserError(
                f"the checkpoint is of another model than {described} describes; {len(misfits)} "
                f"arrays differ: {listed(list(misfits))}"
            )
        found = keymap.entries_by_leaf(chosen, model, wanted)
        flat = [entry for group in found.values() for entry in group]
        specs = keymap.torch_specs(flat, stored.shapes)
        fixed = keymap.constants(chosen, model)
        specs |= {key: Spec(value.shape, value.dtype) for key, value in fixed.items()}
        with (
            files.safetensors_writer(path, specs, hparams) as write,
            tqdm(total=len(flat), unit="tensor", desc="export", disable=not progress) as bar,
        ):
            for key, value in fixed.items():
                write(key, value)
            for leaf, group in found.items():
                for entry, array in _slices(stored, leaf, group):
                    tensor = entry.layout.to_torch(array[entry.part], model)
                    write(entry.key, tensor, entry.axis, entry.start)
                    bar.update()
    return {
        "family": family,
        "input": str(workdir),
        "output": str(path),
        "step": stored.step,
        "ema": ema,
        "tensors": len(specs),
        "bytes": Path(path).stat().st_size,
    }


def _slices(
    stored: StoredWeights, leaf: str, entries: list[keymap.Entry]
) -> Iterator[tuple[keymap.Entry, np.ndarray]]:
    """Yields each entry with leaf[entry.index]; reads a stacked leaf some layers at a time."""
    if entries[0].index == ():
        array = stored.read({leaf: None})[leaf]
        yield from ((entry, array) for entry in entries)
        return
    for start, block in stored.read_blocks(leaf):
        for entry in entries:
            layer, *rest = entry.index
            if start <= layer < start + len(block):
                yield entry, block[(layer - start, *rest)]


def _describe(
    family: Family,
    path: Path,
    opened: files.Weights,
    hparams: str | Mapping | None,
    config: str | None,
) -> tuple[dict[str, Any], str, ConfigDict]:
    """(hyperparameters, text that says where they come from, config of the model)."""
    if config:
        return {}, config, configs.load(config)
    try:
        described, origin = describe.hyperparameters(family, path, opened, hparams)
        model_config = families.config_from_torch(family.name, described)
    except UserError as error:
        hint = _other_family(family, opened.state)
        if hint:
            missing, unexpected = describe.strange_keys(family, opened.state)
            hint += (
                f": {len(missing)} missing: {listed(missing)}; {len(unexpected)} "
                f"unexpected: {listed(unexpected)}"
            )
        raise UserError(f"{error}{hint}") from error
    model_config.name = family.name
    return described, origin, model_config


def _leaves(
    state: State, family: Family, model: nn.Module, described: Mapping[str, Any], dtype: str
) -> dict[str, Pieces]:
    try:
        return keymap.import_leaves(state, family, model, dtype=dtype)
    except UserError as error:
        told = describe.contradictions(describe.from_shapes(family, state), described)
        hint = f"; by its hyperparameters {', '.join(told)}" if told else ""
        raise UserError(f"{error}{hint}{_other_family(family, state)}") from error


def _other_family(family: Family, state: State) -> str:
    """A hint to add to an error if the file's names fit another family better, else ""."""
    likely = describe.likely_families(state)
    if family.name in likely:
        return ""
    if not likely:
        return "; its names are of no family that is known here"
    return f"; its names are those of family {' or '.join(likely)}, not of {family.name}"


def _check_room(folder: Path, needed: int) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.01:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room"
        )
