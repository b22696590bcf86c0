"""What an image looks like when the network sees it."""
