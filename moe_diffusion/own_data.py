"""Data of the user's own: `data.source=my_package.my_module:MyData`.

The place names a class, a function that returns a source, or a source. data/sources.py says what a
source is. A class or a function is called with those of `image_shape`, `cond_spec` (what the model
takes) and `split` that it has parameters for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_diffusion import plugins
from moe_diffusion.checks import require
from moe_diffusion.conditions import IMAGE, Field, check_fields, fields_of

BUILT_IN = (
    "digits, synthetic, folder:<path>, tfds:<name>, latents:<path>, digits_prompts, digit_pairs"
)
_WANTED = ("image_shape", "cond_spec", "__len__", "__getitem__")


def find_source(place: str, **options: Any) -> Any:
    """The source of a place, whose first record is what it promises.

    Args:
      options: image_shape, cond_spec and split, of which a class or a function takes what it wants.

    Raises:
      UserError: there is no such module or name, or it is no source.
    """
    name = f"data.source={place!r}"
    require(
        plugins.is_place(place),
        f"{name} is unknown; known are: {BUILT_IN}, my_package.my_module:MyData",
    )
    asked_by = f"{name} (which is none of {BUILT_IN})"
    source = plugins.make(plugins.find_object(place, asked_by), options, asked_by)
    lacking = [attribute for attribute in _WANTED if not hasattr(source, attribute)]
    require(
        not lacking,
        f"{name} has no {' and no '.join(lacking)}: see the top of moe_diffusion/data/sources.py",
    )
    spec = source.cond_spec
    require(
        isinstance(spec, dict) and all(isinstance(field, Field) for field in spec.values()),
        f"cond_spec of {name} is {spec!r}: it must be a dict of fields, like "
        "{'label': moe_diffusion.conditions.Field((), 'int32', 10)}",
    )
    require(len(source) > 0, f"{name} has no records: choose other data")
    record = source[0]
    require(
        isinstance(record, dict) and IMAGE in record,
        f"record 0 of {name} is {type(record).__name__}: return a dict with {IMAGE!r}",
    )
    batch = {key: np.asarray(value)[None] for key, value in record.items()}
    image = batch[IMAGE]
    has, takes = f"{image.dtype}{list(image.shape[1:])}", f"float32{list(source.image_shape)}"
    require(has == takes, f"record 0 of {name} has the image as {has}: return {takes} in [-1, 1]")
    check_fields(fields_of(batch), spec, f"record 0 of {name}")
    return source
