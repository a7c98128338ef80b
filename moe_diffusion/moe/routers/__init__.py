"""The routers of the papers, a class in a file each, and how a config names one.

A router from elsewhere is named by its place, "package.module:Class".
"""

from __future__ import annotations

from moe_diffusion.checks import require
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routers.diffmoe import DiffMoE
from moe_diffusion.moe.routers.expert_choice import ExpertChoice
from moe_diffusion.moe.routers.expert_race import ExpertRace
from moe_diffusion.moe.routers.promoe import ProMoEExpertChoice, ProMoETokenChoice
from moe_diffusion.moe.routers.token_choice import TokenChoice
from moe_diffusion.plugins import find_object

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
    require(
        all(name.partition(":")),
        f"{named} is unknown; choose {' | '.join((*ROUTERS, DENSE))}, or name a class of your own "
        "like my_package.my_module:MyRouter",
    )
    router = find_object(name, named)
    require(
        isinstance(router, type) and issubclass(router, Router),
        f"{named} is no router: derive it from moe_diffusion.moe.router.Router",
    )
    return router
