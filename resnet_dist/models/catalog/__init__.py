"""Architectures by name, option and size. No torch.

In: a name.
Out: what there is to know of it without building it.
May import: nothing of ours.
"""
