"""What lies on disk: manifest, shards, and their checked reading."""
