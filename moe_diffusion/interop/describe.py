"""Finds out what model a weight file holds: its hyperparameters and its family.

Hyperparameters come from a file that the user names, else from one beside the weights, else from
the training arguments in the weight file itself. The shapes of the tensors fill in what these leave
out. For DiT and SiT the shapes alone are enough; the other families have hyperparameters that no
shape shows.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moe_diffusion.errors import UserError
from moe_diffusion.interop import files, keymap, tensors
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.interop.rows import Family

_PLAIN = (".yaml", ".yml")


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
    source = Path(given) if given else _beside(path)
    if source is not None:
        return merge(told, read_hparams(source)), str(source)
    from_args = family.from_args(weights.args) if weights.args else None
    if from_args is not None:
        return merge(told, from_args), f"the training arguments in {path.name}"
    lacking = untold(family, told)
    if not lacking:
        return told, f"the shapes in {path.name}, and the family's usual number of heads"
    raise UserError(
        f"there is no .yaml file beside {path}, and shapes do not tell all hyperparameters of "
        f"family {family.name}: write {', '.join(lacking)} into a file and pass --hparams "
        "file.yaml, or pass --config configs/x.py"
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
    if not path.is_file():
        raise UserError(f"no hyperparameter file at {path}")
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no valid {path.suffix.lstrip('.')} file: {reason}") from None
    basic = content.get("basic") if isinstance(content, Mapping) else None
    told = {"rf": basic["rf"]} if isinstance(basic, Mapping) and "rf" in basic else {}
    while isinstance(content, Mapping):
        inner = [content[k] for k in ("model", "params") if isinstance(content.get(k), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no hyperparameters: a table of names and values is needed")
    return {**told, **content}


def _beside(weights: Path) -> Path | None:
    """The hyperparameter file beside the weights or above their folder `checkpoints`, or None.

    A file with the weights' name comes first; otherwise it must be the only one in its folder.
    """
    for suffix in (*_PLAIN, ".json"):
        if weights.with_suffix(suffix).is_file():
            return weights.with_suffix(suffix)
    folders = [weights if weights.is_dir() else weights.parent]
    if weights.absolute().parent.name == "checkpoints":
        folders.append(weights.absolute().parent.parent)
    for folder in folders:
        found = sorted(
            path for path in folder.iterdir() if path.suffix in _PLAIN or path.name == "config.json"
        )
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{folder} holds {names}: choose one with --hparams")
        if found:
            return found[0]
    return None


def from_shapes(family: Family, state: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that the shapes of a state dict show."""
    return family.from_shapes(
        {keymap.bare(k): v.shape for k, v in tensors.lazy(state).specs.items()}
    )


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
            texts.append(f"{key} is {given[key]}, but {told[key]} in the file")
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
    return re.sub(r"(?<=\.)(\d+|\{[ie]\})(?=\.|$)", "#", keymap.bare(key))
