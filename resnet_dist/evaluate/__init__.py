"""What a network is worth."""
