"""The run directory: its paths, its checkpoints, and who may write it."""
