"""The file format: what FFCV's own loader reads.

In: stored samples.
Out: `.beton` files, the same bytes whatever wrote them.
May import: resnet_dist.data.shards, resnet_dist.run.
"""
