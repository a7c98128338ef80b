"""Finds out what model a weight file holds: its hyperparameters and its family.

Hyperparameters come from a file that the user names, else from the header of an export of ours,
else from a file beside the weights, else from the training arguments in the weight file itself. The
shapes of the tensors fill in what these leave out. For DiT and SiT the shapes alone are enough; the
other families have hyperparameters that no shape shows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_diffusion.errors import UserError, explained, shown
from moe_diffusion.interop import files, keymap, tensors
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.interop.places import INDEX
from moe_diffusion.interop.rows import Family
from moe_diffusion.reading import read_table, table_of

_PLAIN = (".yaml", ".yml")
_HPARAMS = "hyperparameter file"
_USUAL_CLASSES = (10, 100, 1000)  # CIFAR-10 and digits, CIFAR-100, ImageNet


def hyperparameters(
    family: Family,
    path: Path,
    weights: files.Weights,
    given: str | Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Finds the authors' hyperparameters of a weight file.

    Args:
      path: of the weight file.
      given: the hyperparameters, or the path of a `.yaml` or `.json` file with them; None looks for
        them.

    Returns:
      The hyperparameters, and a text that says where they come from.

    Raises:
      UserError: there is no such file, it is not readable, or hyperparameters are missing.
    """
    told = from_shapes(family, weights.state)
    if isinstance(given, Mapping):
        return merge(told, given), "the arguments"
    if not given and family.hparams and weights.hparams is not None:
        own = table_of(weights.hparams)
        if own is None:
            raise UserError(
                f"the hyperparameters in the header of {path} are no table in JSON: pass --hparams "
                "file.json"
            )
        return merge(told, own), f"the header of {path.name}"
    source = Path(given) if given else _beside(path)
    if source is not None:
        given = read_hparams(source)
        _check_null_label(told, given, path)
        return merge(told, given), str(source)
    from_args = family.from_args(weights.args) if weights.args else None
    if from_args is not None:
        _check_null_label(told, from_args, path)
        return merge(told, from_args), f"the training arguments in {path.name}"
    _check_null_label(told, {}, path)
    lacking = untold(family, told)
    if not lacking:
        return told, f"the shapes in {path.name}, and the family's usual number of heads"
    raise UserError(
        f"there is no .yaml file beside {path}, and shapes do not tell all hyperparameters of "
        f"family {family.name}: write {', '.join(lacking)} into a file and pass --hparams "
        "file.yaml, or pass --config configs/x.py"
    )


def _check_null_label(told: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Refuses a file whose class table has no row for "no label".

    The authors' LabelEmbedder makes that row only if labels are dropped in training. Rows alone do
    not tell 10 classes without it from 9 classes with it.
    """
    told, given = (table.get("net", table) for table in (told, given))
    if "num_classes" not in told or not isinstance(given, Mapping):
        return
    rows = told["num_classes"] + 1
    stated = given.get("num_classes")
    never = given.get("class_dropout_prob") == 0 and stated in (None, rows)
    if stated == rows or never or (stated is None and rows in _USUAL_CLASSES):
        sure = "was" if stated == rows or never else "was, as it seems,"
        otherwise = "" if sure == "was" else f" (if it has {rows - 1} classes, pass num_classes)"
        raise UserError(
            f"the class table of {path} has {rows} rows for {rows} classes: it {sure} trained "
            "without label dropout, so it has no null label and cannot be guided (cfg 1 alone "
            "means something). Models here need the row of the null label: append one of zeros to "
            f"y_embedder.embedding_table.weight, and sample with --cfg 1{otherwise}"
        )


def untold(family: Family, told: Mapping[str, Any]) -> list[str]:
    """Names ("section.key") of the hyperparameters that the family needs and `told` lacks."""

    def has(name: str) -> bool:
        *sections, key = name.split(".")
        return key in functools.reduce(lambda inner, name: inner.get(name, {}), sections, told)

    return [name for name in family.asked if not has(name)]


def read_hparams(path: Path) -> dict[str, Any]:
    """Reads hyperparameters from the section `model` or `params` of a file, or from all of it.

    The innermost of these sections counts. The value `basic.rf` is added, where the files of
    DiffMoE and DSMoE say whether the model is a flow.

    Raises:
      UserError: there is no such file, it is not valid, or it holds no table.
    """
    content = read_table(path, "write the names and values of hyperparameters", _HPARAMS)
    if isinstance(content.get("weight_map"), Mapping):
        raise UserError(f"{path} is an index of shards, no {_HPARAMS}: pass another to --hparams")
    basic = content.get("basic")
    told = {"rf": basic["rf"]} if isinstance(basic, Mapping) and "rf" in basic else {}
    while True:
        inner = [content[k] for k in ("model", "params") if isinstance(content.get(k), Mapping)]
        if not inner:
            return {**told, **content}
        content = inner[0]


def _beside(weights: Path) -> Path | None:
    """The hyperparameter file beside the weights or above their folder `checkpoints`, or None.

    A file with the weights' name comes first. Otherwise it must be the only one in its folder:
    the only config*.yaml, else the only .yaml or config.json.
    """
    bare = weights.with_name(weights.name.removesuffix(INDEX))
    stem = bare if bare != weights or weights.is_dir() else weights.with_suffix("")
    for suffix in (*_PLAIN, ".json"):
        named = stem.with_name(stem.name + suffix)
        if named.is_file():
            return named
    folders = [weights if weights.is_dir() else weights.parent]
    if weights.absolute().parent.name == "checkpoints":
        folders.append(weights.absolute().parent.parent)
    for folder in folders:
        found = sorted(
            path for path in folder.iterdir() if path.suffix in _PLAIN or path.name == "config.json"
        )
        configs = [path for path in found if path.name.startswith("config")]
        found = configs if len(configs) == 1 else found
        if len(found) > 1:
            names = tensors.listed([path.name for path in found])
            raise UserError(f"{folder} holds {names}: choose one with --hparams")
        if found:
            return found[0]
    return None


def from_shapes(family: Family, state: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that the shapes of a state dict show.

    Raises:
      UserError: the shapes are those of no such model.
    """
    shapes = {keymap.bare(k): v.shape for k, v in tensors.lazy(state).specs.items()}
    kinds = (ArithmeticError, LookupError, ValueError)
    with explained(f"the shapes fit no model of family {family.name}", "name its family", kinds):
        return family.from_shapes(shapes)


def merge(told: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, completed by `told`, section by section."""
    merged = {**told, **given}
    for key in told.keys() & given.keys():
        if isinstance(told[key], Mapping) and isinstance(given[key], Mapping):
            merged[key] = merge(told[key], given[key])
    return merged


def contradictions(told: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where `given` contradicts the file (`told`): "hidden_size is 64, but 32 in the file"."""
    texts = []
    for key in [key for key in told if key in given]:
        if isinstance(told[key], Mapping) and isinstance(given[key], Mapping):
            texts += contradictions(told[key], given[key])
        elif told[key] != given[key]:
            texts.append(f"{key} is {shown(given[key])}, but {told[key]} in the file")
    return texts


def likely_families(keys: Iterable[str]) -> list[str]:
    """The families whose names fit a state dict best; several if they share all names."""
    found = {_template(key) for key in keys}
    scores = {}
    for name, family in FAMILIES.items():
        known = set(_templates(family))
        both = found & known
        scores[name] = (len(both) / max(len(found), 1), len(both) / len(found | known))
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best and score[0] > 0.5]


def strange_keys(family: Family, keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """The family's rows that match no key (some rows are alternatives), and keys without a row."""
    known = _templates(family)
    found = {_template(key): key for key in keys}
    return (
        sorted(known[template] for template in known.keys() - found.keys()),
        sorted(key for key in keys if _template(key) not in known),
    )


def _templates(family: Family) -> dict[str, str]:
    return {_template(row.torch): row.torch for row in (*family.rows, *family.constants)}


def _template(key: str) -> str:
    """A key with "#" in place of the numbers of its block and its expert."""
    return re.sub(r"(?<=\.)(\d+|\{[ieg]\})(?=\.|$)", "#", keymap.bare(key))
