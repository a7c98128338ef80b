"""Starts jobs on clusters: one description of a job (job.py), and one launcher for each cluster.

Launchers stand above the command lines. They need Python and this repository, neither jax nor an
accelerator. docs/pods.md says which is for what.
"""
