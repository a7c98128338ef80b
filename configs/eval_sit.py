"""How SiT was measured: 50,000 samples, 250 evaluations, guidance 1.0 and 1.5.

    python -m moe_diffusion.evaluate --protocol sit:sampler=sde --workdir RUN --vae FILE \
        --inception FILE --reference VIRTUAL_imagenet256_labeled.npz

Argument: sampler=ode (125 Heun steps) | sde (250 Euler-Maruyama steps with w(t) = sigma(t)).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.evaluation import adm_suite, forward_with_cfg
from moe_diffusion.config import parse_arg

_SAMPLERS = {
    "ode": {"sampler": "heun", "steps": 125},
    "sde": {"sampler": "sde", "steps": 250, "sde_diffusion": "sigma", "sde_norm": 1.0},
}


def get_protocol(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, choices={"sampler": tuple(_SAMPLERS)}, sampler="ode")
    protocol = adm_suite()
    protocol.source = "arXiv 2401.08740, section 3 and appendix; SiT/sample_ddp.py"
    protocol.sampling = {**_SAMPLERS[arg.sampler], **forward_with_cfg()}
    protocol.cfg = (1.0, 1.5)
    protocol.autoencoder = "sd-vae-ft-ema"
    return protocol
