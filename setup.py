"""Puts configs/ into the package, as moe_diffusion/configs; setup.cfg says everything else."""

from setuptools import find_namespace_packages, find_packages, setup

configs = find_namespace_packages(include=["configs*"])
setup(
    packages=find_packages(include=["moe_diffusion*"]) + [f"moe_diffusion.{c}" for c in configs],
    package_dir={f"moe_diffusion.{c}": c.replace(".", "/") for c in configs},
)
