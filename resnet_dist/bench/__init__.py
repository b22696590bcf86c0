"""Measurements side by side with the usual choice, each in processes of its own.

In: sizes and rounds.
Out: tables and JSON, printed by `resnet-dist bench`.
May import: config, data, data.augmentation, data.decode, data.shards, engine, kernels, models,
    ranks, run.
"""
