"""Triton kernels, one file per fused operation; imported only where a GPU runs them."""
