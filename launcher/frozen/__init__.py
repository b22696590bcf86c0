"""What a run was made of, kept in its directory.

In: a configuration.
Out: the run directory with settings, provenance and code (door: `freeze.create_run`), and whether
    all that still holds.
May import: journal, resnet_dist.config, resnet_dist.data.shards, resnet_dist.run.
"""
