"""The run directory, and who may write into it.

In: steps, states, curves.
Out: checkpoints that are whole or absent (door: `checkpoint`), paths, the lease, rollbacks, curves
    and event files that go on after a restart; files replaced whole (door: `atomic`).
May import: nothing of ours.
"""
