"""Speaking to SLURM."""
