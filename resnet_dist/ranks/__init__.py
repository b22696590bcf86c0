"""Speaking to the other ranks, and to none when asked to stop."""
