"""What a network is made of and how signals travel through it."""
