"""What a run was made of, kept in its directory."""
