"""From a recipe to jobs in the queue, checked before anything is made.

In: recipe, overrides, options.
Out: queued jobs (door: `campaign.submit_order`), stopped and resumed ones (`control`).
May import: frozen, job, journal, slurm, supervise, watch, data_prep.convert, data_prep.slurm,
    resnet_dist.config, resnet_dist.data.shards, resnet_dist.models.catalog, resnet_dist.run.
"""
