"""From a plan to shards, by many workers."""
