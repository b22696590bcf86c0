"""From bytes to pixels: the native decoder and what it is told."""
