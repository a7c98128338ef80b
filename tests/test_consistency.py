"""Lists that stand in two places, because config and validation import nothing else."""

from moe_diffusion.data.pipeline import AUGMENTATIONS
from moe_diffusion.diffusion import sde
from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.attention import IMPLEMENTATIONS
from moe_diffusion.models.blocks import ROPES
from moe_diffusion.models.dit import REMAT
from moe_diffusion.moe.dispatch import BACKENDS
from moe_diffusion.moe.layer import SCOPES
from moe_diffusion.moe.routers import INITIALIZERS, ROUTERS
from moe_diffusion.moe.transport import TRANSPORTS
from moe_diffusion.parallel.rules import PRESETS
from moe_diffusion.ranges import CHOICES, LOSSES


def test_choices_are_those_of_the_code():
    assert CHOICES["model.mlp"] == CHOICES["model.moe.mlp"] == mlp.KINDS
    assert CHOICES["model.positions"] == ("sincos", *ROPES)
    assert set(CHOICES["model.remat"]) == {"none", *REMAT}
    assert CHOICES["model.attention"] == ("auto", *IMPLEMENTATIONS)
    assert set(CHOICES["model.moe.backend"]) == {"auto", *BACKENDS}
    assert set(CHOICES["model.moe.transport"]) == {"auto", *TRANSPORTS}
    assert set(CHOICES["parallel.preset"]) == set(PRESETS)
    assert set(CHOICES["model.router.name"]) == {"dense", *ROUTERS}
    assert set(CHOICES["model.router.kernel_init"]) == set(INITIALIZERS)
    assert CHOICES["model.router.scope"] == SCOPES
    assert CHOICES["data.augment"] == AUGMENTATIONS
    assert CHOICES["sampling.sde_diffusion"] == tuple(sde.DIFFUSIONS)


def test_losses_are_those_of_the_routers():
    assert LOSSES == {"dense": ()} | {name: kind.provides for name, kind in ROUTERS.items()}
