"""The config of a run: a `ConfigDict`, loaded, saved, compared and checked.

To find what a key does, look into `defaults`: it explains the shared keys and names the files of
the others. `schema` makes a config from settings, `draft` is what config files write to, `renamed`
has the old names, `loading` reads and writes files, `changes` says what may change when a run is
resumed, and `ranges` and `validation` say which values and combinations are possible.
"""

from moe_diffusion.config.changes import (
    Change,
    allowed_changes,
    compare,
    consequences,
    differences,
    record_changes,
)
from moe_diffusion.config.draft import default
from moe_diffusion.config.loading import load, load_json, parse_arg, save_json, show
from moe_diffusion.config.schema import settle
from moe_diffusion.config.validation import validate, validate_devices

__all__ = [
    "Change",
    "allowed_changes",
    "compare",
    "consequences",
    "default",
    "differences",
    "load",
    "load_json",
    "parse_arg",
    "record_changes",
    "save_json",
    "settle",
    "show",
    "validate",
    "validate_devices",
]
