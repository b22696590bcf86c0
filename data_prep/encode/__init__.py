"""What becomes of one image."""
