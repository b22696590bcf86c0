"""From a data set directory to the exact batch of a step. Determinism lives here.

In: a data set, (seed, step), a rank's place.
Out: batch after batch, the same at any world (door: `loader.TrainLoader`; the order: `order`).
May import: config, data.augmentation, data.decode, data.shards, run.
"""
