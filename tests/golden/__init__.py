"""Parity with the authors' code, on the fixtures of tests/goldens or MOE_DIFFUSION_GOLDENS."""
