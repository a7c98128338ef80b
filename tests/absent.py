"""Programs for devices that are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_diffusion.planning.topologies import describe


def compile_for(topology: str, function: Callable, *shapes: Any) -> jax.stages.Compiled:
    """`function` of arguments with these shapes, for the first device of a topology like "h100:1".

    The mesh names the device, which kernels ask for while they are traced and lowered.
    """
    device = describe(topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*args).compile()
