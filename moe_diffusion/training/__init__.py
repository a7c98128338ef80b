"""A run: state, optimizer, step, loop, checkpoints, metrics."""
