"""What a network is worth.

In: checkpoints, a split.
Out: accuracy, reports, exported weights (door: `report.evaluate_checkpoint`).
May import: build, config, data, data.decode, data.shards, engine, models, models.analysis, ranks,
    run.
"""
