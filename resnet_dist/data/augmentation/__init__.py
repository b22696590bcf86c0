"""What an image looks like when the network sees it; a new augmentation goes here.

In: (seed, epoch, sample id) and sizes.
Out: plans for the decoder (door: `plans.train_plans`), mixed batches, what is subtracted and
    divided.
May import: config, data.decode, data.shards, run.
"""
