"""Triton's kernels, one file an operation.

In: CUDA tensors.
Out: CUDA tensors, on the current stream.
May import: nothing of ours.
"""
