"""What lies on disk, read with nothing trusted.

In: a data set directory.
Out: its manifest (no torch), a reader of samples whose hashes are checked, a copy on the node's own
    disk.
May import: config, data.decode, run.
"""
