"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

from tests import cli

PROGRAM = """
import resource, sys
from moe_diffusion.training.allocator import keep_freed_memory
import jax, jax.numpy as jnp
if sys.argv[1] == "keep":
    assert keep_freed_memory()
f = jax.jit(lambda x: (x.reshape(-1, 100) @ jnp.ones((100, 100))).max(0).sum())
x = jnp.zeros(10_000_000)
for _ in range(5):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x).block_until_ready()
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
    assert page_faults("keep") < page_faults("default") / 5
