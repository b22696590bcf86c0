"""One optimizer step; a new engine or optimizer goes here.

In: a network, batches.
Out: updated weights and what was lost on the way (door: `ddp.make_engine`).
May import: config, data.augmentation, kernels, models, ranks, run.
"""
