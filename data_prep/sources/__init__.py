"""Where images come from; a new source format goes here.

In: a folder, archives, tables.
Out: groups of samples with labels, and readers of their bytes (door: `folders.open_source`).
May import: nothing of ours.
"""
