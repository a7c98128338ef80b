"""How exact the float32 products of an evaluation are: of the model, the decoder and Inception.

jax's default is TF32 on GPUs from Ampere on (10 bits of mantissa), and one bfloat16 pass on TPUs
(7 bits). The authors' samplers allow TF32 (`torch.backends.cuda.matmul.allow_tf32`), so a protocol
must not be less exact than that. Products of bfloat16 arrays are not touched.
"""

from __future__ import annotations

import contextlib

import jax
from jax.lax import Precision

from moe_diffusion.evaluation.choices import MATMULS

_ON_TPU = {Precision.DEFAULT: "1 bf16 pass", Precision.HIGH: "3 bf16 passes"}


def matmul_precision(name: str) -> contextlib.AbstractContextManager:
    """Programs that are traced inside multiply float32 arrays as exactly as one of MATMULS says.

    On a CPU all products are exact. Nothing changes there, so that no program is compiled twice.
    """
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(MATMULS[name])


def matmul_used() -> str:
    """What float32 products are computed in here and now: float32, tf32, or bfloat16 passes."""
    wanted = Precision(jax.config.jax_default_matmul_precision or "default")
    return _used(jax.local_devices()[0], wanted)


def _used(device: jax.Device, wanted: Precision) -> str:
    if device.platform == "cpu" or wanted == Precision.HIGHEST:
        return "float32"
    if device.platform == "tpu":
        return _ON_TPU[wanted]
    return "tf32" if float(getattr(device, "compute_capability", 0)) >= 8 else "float32"
