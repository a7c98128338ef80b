"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

from tests import cli

PROGRAM = """
import resource, sys
from moe_diffusion.kernels.cpu.heap import keep_freed_memory
import jax, jax.numpy as jnp
if sys.argv[1] == "keep":
    assert keep_freed_memory()
# Not a product and a sum alone, which XLA:CPU computes without storing the product.
f = jax.jit(lambda x, w: jax.nn.softmax(x @ w, axis=0).max())
x, w = jnp.zeros((100_000, 100)), jnp.zeros((100, 100))
for _ in range(5):
    f(x, w).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x, w).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice):
    """Pages that ten steps with 40 MB of temporaries fault in."""
    command = [sys.executable, "-c", PROGRAM, choice]
    environment = cli.environment(1, optimize=True)
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_repeated_steps_fault_no_pages_in():
    default = page_faults("default")
    assert default > 10 * 5_000  # or the program has no temporaries; they fill 10,000 pages of 4 KB
    assert page_faults("keep") < default / 5
