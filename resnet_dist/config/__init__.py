"""What a run is: one tree of settings, the only place where a default stands.

In: a recipe, `key=value` overrides, a cluster's profile.
Out: a checked `Config` (door: `load.load_config`), or a `ConfigError` in a user's words. No torch.
May import: models.catalog.
"""
