"""What `status`, `logs`, `compare` and `tensorboard` show.

In: run directories.
Out: tables, lines, JSON (door: `status.statuses`).
May import: frozen, journal, slurm, supervise, resnet_dist.config, resnet_dist.run.
"""
