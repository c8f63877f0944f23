"""Training: the DeepSpeed engine, checkpoints, the run's log and report."""
