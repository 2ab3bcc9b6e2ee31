"""Training, for all stages: mesh, state, step, optimizer, loop, checkpoints, metrics."""
