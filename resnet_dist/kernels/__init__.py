"""The loops that the compiler does not make fast enough.

In: tensors.
Out: the tensors that `reference` gives, by C++ on CPUs and by Triton on GPUs (door: `dispatch`).
May import: kernels.gpu.
"""
