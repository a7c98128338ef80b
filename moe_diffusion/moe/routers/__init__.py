"""The routers of the papers, a class in a file each, and how a config names one.

A router from elsewhere is named by its place, "package.module:Class".
"""

from __future__ import annotations

import importlib
import os
import sys

from moe_diffusion.checks import require
from moe_diffusion.errors import UserError, first_line
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routers.diffmoe import DiffMoE
from moe_diffusion.moe.routers.expert_choice import ExpertChoice
from moe_diffusion.moe.routers.expert_race import ExpertRace
from moe_diffusion.moe.routers.promoe import ProMoEExpertChoice, ProMoETokenChoice
from moe_diffusion.moe.routers.token_choice import TokenChoice

DENSE = "dense"  # the name that a config has in the place of a router's: no experts

ROUTERS: dict[str, type[Router]] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "diffmoe": DiffMoE,
    "promoe_tc": ProMoETokenChoice,
    "promoe_ec": ProMoEExpertChoice,
    "expert_race": ExpertRace,
}


def find(name: str) -> type[Router] | None:
    """The router of that name; None for "dense", which is none.

    Args:
      name: a key of ROUTERS, "dense", or "package.module:Class". The module may lie in the current
        folder.

    Raises:
      UserError: no such router, or its module cannot be imported.
    """
    if name == DENSE or name in ROUTERS:
        return ROUTERS.get(name)
    named = f"model.router.name = {name!r}"
    module_name, _, class_name = name.partition(":")
    require(
        bool(module_name and class_name),
        f"{named} is unknown; choose {' | '.join((*ROUTERS, DENSE))}, or name a class of your own "
        "like my_package.my_module:MyRouter",
    )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{named}: module {module_name} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}): mend it, or start in the folder that it lies in"
        ) from error
    if not hasattr(module, class_name):
        where = module.__file__
        raise UserError(f"{named}: {where} has no {class_name}: name a class of that file")
    router = getattr(module, class_name)
    require(
        isinstance(router, type) and issubclass(router, Router),
        f"{named} is no router: derive it from moe_diffusion.moe.router.Router",
    )
    return router
