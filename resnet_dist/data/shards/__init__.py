"""What lies on disk, read with nothing trusted.

In: a data set directory.
Out: its manifest, a reader of samples whose hashes are checked, a copy on the node's own
    disk.
May import: config, run.
"""
