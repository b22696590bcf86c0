"""The networks of the papers, readable beside them.

In: a name and options.
Out: an initialised `nn.Module` from images to logits (door: `build.build_model`), weights read from
    other programs' files.
May import: kernels, models.catalog.
"""
