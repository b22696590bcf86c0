"""What a person sees of a run while it trains.

In: figures, batches, networks.
Out: `metrics.jsonl`, TensorBoard, traces (door: `metrics.Metrics`).
May import: config, data, data.shards, engine, evaluate, models, models.analysis, run.
"""
