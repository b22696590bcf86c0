"""What a run has said: `jobs.jsonl` and its ranks' heartbeats.

In: an event.
Out: events, even after a torn write (door: `events.record`).
May import: resnet_dist.run.
"""
