"""What a run is: recipe, overrides and cluster profile become one checked `Config`."""
