"""Can this machine, and can this cluster, train?

In: nothing, or a partition.
Out: findings, each with its remedy.
May import: job, slurm, submission, supervise, resnet_dist.config, resnet_dist.data.shards,
    resnet_dist.run.
"""
