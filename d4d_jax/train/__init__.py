"""Training: state, step, sharding, checkpoints, metric writers and the loop."""
