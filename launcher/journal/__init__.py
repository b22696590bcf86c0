"""What a run has said: its events and its heartbeats."""
