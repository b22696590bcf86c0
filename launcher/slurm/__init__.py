"""Speaking to SLURM; what a cluster wants to be told goes here.

In: a configuration, job ids.
Out: sbatch's options, states of jobs, what partitions allow.
May import: frozen, resnet_dist.config, resnet_dist.run.
"""
