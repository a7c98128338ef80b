from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_diffusion.planning.memory import Memory, batch_sizes, largest_batch, sharded_bytes


def test_aliased_outputs_take_no_room():
    analysis = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=50,
        generated_code_size_in_bytes=7,
    )
    memory = Memory.of(analysis)
    assert memory.total == 167
    assert memory.times(2)["temporaries"] == 100


def test_sharded_bytes_are_those_of_one_device():
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    tree = {"split": struct((16, 3), jnp.bfloat16, "data"), "whole": struct((5,), jnp.float32)}
    assert sharded_bytes(tree) == 2 * 3 * 2 + 5 * 4


def test_batch_sizes():
    first = list(itertools.islice(batch_sizes(), 9))
    assert first == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize("limit", [50, 100, 131, 160, 400, 1000, 4567, 100_000])
@pytest.mark.parametrize("bend", [0.0, 0.01])
@pytest.mark.parametrize("says_how_much", [True, False])
def test_the_largest_batch_is_found_with_few_compilations(limit, bend, says_how_much):
    tried = []

    def needed(batch):
        tried.append(batch)
        size = 100 + 30 * batch + bend * batch**2
        return size if size <= limit or says_how_much else None

    def fits(batch):
        return 100 + 30 * batch + bend * batch**2 <= limit

    sizes = itertools.takewhile(lambda batch: batch < 10_000, batch_sizes())
    assert largest_batch(needed, limit) == max(filter(fits, sizes), default=0)
    assert len(tried) == len(set(tried)) and len(tried) <= (8 if says_how_much else 12)
