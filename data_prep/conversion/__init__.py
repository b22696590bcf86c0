"""From a plan to a data set, by many workers that may die.

In: a plan.
Out: shards with their records, then `dataset.json`, written last (door: `finish.finish`).
May import: encode, options, shards, sources, resnet_dist.data.shards, resnet_dist.run.
"""
