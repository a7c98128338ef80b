"""Keys and values of a config that had another name, in config files, config.json and overrides.

This table is all that is left of the old names. A new key must stand in the section of the old one
or below it, because a config file may rename through a section: `config.model.dropout = 0.1`.
"""

from __future__ import annotations

from typing import Any

KEYS = {
    "model.family": "model.architecture",
    "model.bottleneck": "model.jit.bottleneck",
    "model.in_context_tokens": "model.jit.in_context_tokens",
    "model.in_context_start": "model.jit.in_context_start",
    "model.dropout": "model.jit.dropout",
    "model.reverse_time": "model.dit.reverse_time",
    "model.router.scope": "model.router.group",
    "diffusion.label_dropout": "diffusion.cond_dropout",
    "loss_weights.capacity": "loss_weights.capacity_predictor",
}

# Today's key -> old value -> today's value.
VALUES = {
    "model.moe.backend": {"capacity": "slots"},
    "model.moe.transport": {"a2a_capacity": "a2a_slots"},
}


def new_key(key: str) -> str:
    """The name that a key has today."""
    return KEYS.get(key, key)


def new_value(key: str, value: Any) -> Any:
    """The name that a value has today; `key` is today's name of its key."""
    return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
