"""The empty prompt: what a model is told in place of a text that it shall not know.

A model that reads texts is trained, in a share of all samples, and guided with the embedding of the
prompt "". Text encoders do not give zeros for it. Prepared data brings it (`Latents.null`), and a
run keeps it in its workdir as `empty_prompt.json`, because sampling needs the same:

{"text": {"dtype": "bfloat16", "shape": [256, 4096], "base64": "..."}, ..., "digest": "..."}

Where none is known, zeros take its place.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from moe_diffusion import digests
from moe_diffusion.conditions import Field, check_fields
from moe_diffusion.errors import UserError, explained
from moe_diffusion.manifest import DTYPES
from moe_diffusion.reading import Key, check_keys, read_table
from moe_diffusion.writing import save_text

FILE = "empty_prompt.json"
GUIDANCE = "guidance"  # the field of models that were distilled with a guidance scale
_FIELD = {
    "dtype": Key((str,)),
    "shape": Key((list,), most=8, items=Key((int,), least=0, most=1 << 24)),
    "base64": Key((str,)),
}


class EmptyPrompt:
    """The fields of one sample's condition for the prompt "", as a value that can be compared.

    Attributes:
      fields: name -> array of one sample.
    """

    def __init__(self, fields: Mapping[str, np.ndarray]):
        self.fields = {name: np.asarray(value) for name, value in fields.items()}
        described = [(n, str(v.dtype), v.shape, v.tobytes()) for n, v in self.fields.items()]
        self._digest = hashlib.sha256(repr(sorted(described)).encode()).hexdigest()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, EmptyPrompt) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def save(self, workdir: str | os.PathLike) -> None:
        """Writes the workdir's file."""
        values: dict[str, Any] = {
            name: {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "base64": base64.b64encode(array.tobytes()).decode(),
            }
            for name, array in self.fields.items()
        }
        save_text(json.dumps(digests.seal(values)) + "\n", epath.Path(workdir) / FILE)


def of_source(source: Any) -> EmptyPrompt | None:
    """That of a data source, which may have `null` = {field: array of one sample}."""
    fields = getattr(source, "null", None)
    return EmptyPrompt(fields) if fields else None


def of_run(workdir: str | os.PathLike) -> EmptyPrompt | None:
    """That of a workdir; None if it has none. Raises a UserError if the file is damaged."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    remedy = "restore it from a copy of the workdir"
    values = read_table(path, remedy)
    if not digests.is_sealed(values):
        raise UserError(f"{path} is damaged (it is not what training wrote): {remedy}")
    fields = {}
    for name, field in values.items():
        if name != "digest":
            where = f"{path}: {name}"
            check_keys(field if isinstance(field, dict) else {}, _FIELD, where, remedy)
            with explained(where, remedy, (ValueError, TypeError, binascii.Error)):
                if field["dtype"] not in DTYPES:
                    raise ValueError(f"dtype {field['dtype']!r} is none of numbers")
                data = base64.b64decode(field["base64"], validate=True)
                array = np.frombuffer(data, jnp.dtype(field["dtype"]))
                fields[name] = array.reshape(field["shape"])
    return EmptyPrompt(fields)


def told(model: Any, empty: EmptyPrompt | None) -> Any:
    """The model that knows the empty prompt, if it reads texts; any other model as it is.

    Raises:
      UserError: the empty prompt has other fields than the model's condition.
    """
    if empty is None or not hasattr(model, "empty"):
        return model
    wanted = {n: field for n, field in model.cond_spec().items() if n != GUIDANCE}
    found = {n: Field(v.shape, str(v.dtype)) for n, v in empty.fields.items()}
    check_fields(found, wanted, "the empty prompt of the data")
    return model.clone(empty=empty)


def null(cond: Mapping[str, jax.Array], empty: EmptyPrompt | None) -> dict[str, jax.Array]:
    """The condition {field: [B, ...]} of the empty prompt; a guidance scale stays what it is."""

    def put(name: str, value: jax.Array) -> jax.Array:
        if name == GUIDANCE:
            return value
        if empty is None or name not in empty.fields:
            return jnp.zeros_like(value)
        return jnp.broadcast_to(jnp.asarray(empty.fields[name], value.dtype), value.shape)

    return {name: put(name, value) for name, value in cond.items()}
