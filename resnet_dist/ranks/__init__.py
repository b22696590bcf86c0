"""Speaking to the other ranks, and to none when asked to stop.

In: the environment that a launcher made.
Out: a `World` (door: `distributed.init_world`), sums along one fixed tree, agreement on when to
    stop, a probe of the links.
May import: config.
"""
