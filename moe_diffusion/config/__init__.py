"""The config of a run: a `ConfigDict`, loaded, saved, compared and checked.

What a key does is found in two steps: `defaults` has the shared keys with their meaning and names
the files of the others. `schema` makes a config of settings, `draft` is what config files write to,
`renamed` has the old names, `loading` reads and writes files, and `ranges` and `validation` say
what is possible.
"""

from moe_diffusion.config.draft import default
from moe_diffusion.config.loading import ROOT, compare, load, load_json, parse_arg, save_json
from moe_diffusion.config.schema import settle
from moe_diffusion.config.validation import validate, validate_devices

__all__ = [
    "ROOT",
    "compare",
    "default",
    "load",
    "load_json",
    "parse_arg",
    "save_json",
    "settle",
    "validate",
    "validate_devices",
]
