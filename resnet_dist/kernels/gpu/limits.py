"""How every kernel is launched, and how many registers it may take, said beside the kernel.

Whether the compiler keeps to it is tested for every kernel, without a GPU (`bench.compiled`).
"""

from collections.abc import Callable
from typing import Any

# Multiply and add are one instruction wherever the compiler likes. That is Triton's default up to
# 3.9 and not from 3.10 on; where two kernels must compute the same bits, they say tl.fma.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def at_most(registers: int) -> Callable[[Any], Any]:
    """A kernel whose threads take so many registers or fewer, on every GPU, and spill none."""
    def mark(kernel: Any) -> Any:
        kernel.registers = registers
        return kernel

    return mark
