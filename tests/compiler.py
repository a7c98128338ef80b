"""Whether this machine can have the C++ kernels: where a compiler is, they must work."""

import pytest

from moe_diffusion.kernels.cpu import library

COMPILER = next(library.compilers(), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
