"""What becomes of one image.

In: its bytes.
Out: what a shard stores, or the reason why not (door: `images.encode`; loops in `native/`).
May import: sources, resnet_dist.data.shards.
"""
