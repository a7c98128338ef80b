"""A config that is still being written. Config files start from one, `default()`."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from moe_diffusion.config.renamed import new_key, new_value
from moe_diffusion.config.schema import ROUTER, fields_of_others, router_fields, shared
from moe_diffusion.errors import UserError


class Draft(ConfigDict):
    """A section of a config that also knows the old names of its keys (see `renamed`)."""

    _place = ""  # the dotted name of the section with a dot behind it

    @classmethod
    def of(cls, table: dict[str, Any], place: str = "") -> Draft:
        """A draft of a nested table; the section model.router is a `RouterDraft`."""
        draft = cls()
        object.__setattr__(draft, "_place", place)
        for key, value in table.items():
            if isinstance(value, dict):
                kind = RouterDraft if place + key == ROUTER else Draft
                value = kind.of(value, f"{place}{key}.")
            draft[key] = value
        return draft

    def _today(self, key: Any) -> Any:
        return new_key(self._place + key).removeprefix(self._place)

    def __getitem__(self, key):
        return super().__getitem__(self._today(key))

    def __setitem__(self, key, value):
        *sections, leaf = self._today(key).split(".")
        if sections:
            self[".".join(sections)][leaf] = value
            return
        old = self._fields.get(leaf)
        if isinstance(old, Draft) and isinstance(value, dict | ConfigDict):  # a whole section
            table = value.to_dict() if isinstance(value, ConfigDict) else value
            value = type(old).of(table, old._place)
            if old.is_locked:
                value.lock()
        super().__setitem__(leaf, new_value(self._place + leaf, value))

    def copy_and_resolve_references(self, visit_map=None):
        copied = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copied, "_place", self._place)
        return copied

    def __setstate__(self, state):
        object.__setattr__(self, "_place", state["_place"])
        super().__setstate__(state)


class RouterDraft(Draft):
    """The section model.router of a draft. It takes the fields of any router.

    It takes any key, because the router may be named later; `settle` checks the keys. A field that
    was not set reads as the default of the named router, or else of a built-in one.
    """

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except KeyError:
            default = self._defaults().get(self._place + key)
            if default is None:
                raise
            return default

    def __setitem__(self, key, value):
        locked = self._locked
        object.__setattr__(self, "_locked", False)
        try:
            super().__setitem__(key, value)
        finally:
            object.__setattr__(self, "_locked", locked)

    def _defaults(self) -> dict[str, Any]:
        try:
            return fields_of_others() | router_fields(self._fields.get("name", ""))
        except UserError:  # no such router; `settle` says so when the config file has ended
            return fields_of_others()


def default() -> ConfigDict:
    """A new config with every key at its default: type-safe, and locked except for `loss_weights`.

    The section model.router takes the fields of any router, before or after its name is set.
    """
    draft = Draft.of(shared()).lock()
    draft.loss_weights.unlock()
    return draft


def is_draft(config: ConfigDict) -> bool:
    """Whether keys of the config may still have old names, or belong to other routers."""
    return isinstance(config, Draft)
