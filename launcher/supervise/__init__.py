"""Keeping a job's ranks alive, on all its nodes.

In: a run directory, a place in the job.
Out: one outcome: finished, stopped, requeue or failed with its cause (door:
    `supervisor.supervise`).
May import: journal, slurm, resnet_dist.config, resnet_dist.run.
"""
