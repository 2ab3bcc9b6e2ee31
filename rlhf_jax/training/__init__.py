"""What all stages share: mesh, state, step, optimizer, loop, checkpoints, metrics."""
