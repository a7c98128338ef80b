"""Lists that stand in two places, because the config imports only models and routers."""

from moe_diffusion.config.ranges import CHOICES
from moe_diffusion.data.pipeline import AUGMENTATIONS
from moe_diffusion.diffusion import sde
from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.attention import IMPLEMENTATIONS
from moe_diffusion.models.blocks import ROPES
from moe_diffusion.models.recompute import REMAT
from moe_diffusion.moe.dispatch import BACKENDS
from moe_diffusion.moe.layer import GROUPS
from moe_diffusion.moe.routers import ROUTERS
from moe_diffusion.moe.transport import TRANSPORTS
from moe_diffusion.parallel.rules import PRESETS


def test_choices_are_those_of_the_code():
    assert CHOICES["model.mlp"] == CHOICES["model.moe.mlp"] == mlp.KINDS
    assert CHOICES["model.positions"] == ("sincos", *ROPES)
    assert set(CHOICES["model.remat"]) == {"none", *REMAT}
    assert CHOICES["model.attention"] == ("auto", *IMPLEMENTATIONS)
    assert set(CHOICES["model.moe.backend"]) == {"auto", *BACKENDS}
    assert set(CHOICES["model.moe.transport"]) == {"auto", *TRANSPORTS}
    assert set(CHOICES["parallel.preset"]) == set(PRESETS)
    assert CHOICES["model.router.group"] == GROUPS
    assert CHOICES["data.augment"] == AUGMENTATIONS
    assert CHOICES["sampling.sde_diffusion"] == tuple(sde.DIFFUSIONS)


def test_a_field_that_routers_share_is_of_one_kind():
    """A config file may set it before it names the router."""
    kinds = {}
    for router in ROUTERS.values():
        for field, default in router.fields().items():
            assert kinds.setdefault(field, type(default)) is type(default), field
