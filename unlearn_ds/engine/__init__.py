"""The calls to DeepSpeed, and what stands around an update: configuration, precision, checks, checkpoints, metrics, profile."""
