"""Every Triton kernel the networks ask for, compiled ahead of time for GPUs that are not here.

    python -m resnet_dist.bench.compiled [bf16:90 fp32:80 ...]

In: networks that run on the meta device, which knows shapes alone; each launch is written down as
Triton would compile it. Out: for every specialisation and architecture what its machine code needs:
registers, stack, shared memory, instructions, widths of loads and stores.

The compiler and the tool that reads its code (ptxas, cuobjdump) come with Triton's wheel. Triton
keeps what it has compiled (TRITON_CACHE_DIR), so only what changed is compiled again.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from resnet_dist.kernels import dispatch as kernels
from resnet_dist.models.build import build_model

ARCHITECTURES = (80, 90, 100)  # A100; H100, H200; B200
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Name, side, classes: bottlenecks and basic blocks, projections and option A, and pre-activation.
NETWORKS = (("resnet50", 224, 1000), ("resnet18", 224, 1000), ("resnet20", 32, 10),
            ("preresnet110", 32, 10))
_NOP = 0x918  # the low 12 bits of the instruction


class CompilationFailed(RuntimeError):
    """A kernel that Triton or ptxas refuses; the message begins with file and line."""


@dataclass(frozen=True)
class Specialisation:
    """One kernel as Triton compiles it: types, constants, which numbers are multiples of 16."""

    kernel: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def variant(self) -> str:
        """The constants that the kernel names in capitals; "odd" where no vector fits."""
        names = self.kernel.arg_names
        flags = [f"{names[at]}={int(value)}" for (at, *_), value in sorted(self.constants.items())
                 if names[at].isupper()]
        odd = "channels" in names and not self.attributes.get((names.index("channels"),))
        return " ".join([*flags, *(["odd"] if odd else [])])


@dataclass(frozen=True)
class Row:
    """What one specialisation's machine code needs. Loads and stores: bits -> how many."""

    kernel: str
    variant: str
    dtype: str
    architecture: int
    registers: int  # of a thread
    allowed: int  # what `limits.at_most` says beside the kernel
    stack: int  # bytes of a thread: what did not fit into its registers
    shared: int  # bytes of a program
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.registers <= self.allowed


# -- What is asked for -----------------------------------------------------------------------------

class _Elsewhere:
    """Triton's driver, as far as a launch asks it before compiling: some GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURES[0], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def asked_for(works: Sequence[Callable[[], object]]) -> list[Specialisation]:
    """What `works`, run on the meta device, would make Triton compile; each once.

    Raises: CompilationFailed in a process where Triton interprets its kernels.
    """
    if triton.knobs.runtime.interpret:
        raise CompilationFailed("TRITON_INTERPRET is set: kernels are interpreted, not compiled; "
                                "unset it")
    found: dict[tuple[str, str, str], Specialisation] = {}

    def note(**launch: Any) -> bool:
        how, kernel = launch["compile"], launch["fn"].jit_function
        options = {name: how[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        found.setdefault((kernel.__module__, kernel.__name__, how["key"]), Specialisation(
            kernel, how["signature"], how["constants"], how["configs"][0], options))
        return True  # neither compile nor launch

    active, hook = driver._active, triton.knobs.runtime.jit_cache_hook
    driver._active, triton.knobs.runtime.jit_cache_hook = _Elsewhere(), note
    try:
        with kernels.as_on_a_gpu():
            for work in works:
                work()
    finally:
        driver._active, triton.knobs.runtime.jit_cache_hook = active, hook
    return list(found.values())


def network(name: str, side: int, num_classes: int, dtype: torch.dtype, *, batch: int = 64,
            bn_batch: int = 32, **options: Any) -> None:
    """Forward and backward on the meta device, from pixels on."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, bn_batch=bn_batch, **options)
        images = torch.empty((batch, side, side, 3), dtype=torch.uint8)
        scale, shift = torch.empty((2, 1, 3, 1, 1)).unbind(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)  # as autocast would, for one call
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model(kernels.normalize(images, scale, shift, dtype)).float().sum().backward()


def odd_channels(dtype: torch.dtype) -> None:
    """Channels that no vector fits: no recipe's, but perhaps a user's."""
    with torch.device("meta"):
        x, residual = (torch.empty((4, 70, 9, 7), dtype=dtype, requires_grad=True)
                       for _ in range(2))
        weight, bias = (torch.empty(70, requires_grad=True) for _ in range(2))
    for relu in (False, True):
        for added in (None, residual):
            kernels.ghost_batch_norm(x, weight, bias, 2, 1e-5, added, relu)[0].sum().backward()
    kernels.max_pool(x, 3, 2, 1).sum().backward()
    kernels.average_pool(x).sum().backward()


def mean_picture(dtype: torch.dtype) -> None:
    """CIFAR's recipes subtract one, pixel by pixel."""
    with torch.device("meta"):
        images = torch.empty((4, 32, 32, 3), dtype=torch.uint8)
        scale, shift = torch.empty((1, 3, 1, 1)), torch.empty((1, 3, 32, 32))
    kernels.normalize(images, scale, shift, dtype)


def works_of(dtype: str) -> list[Callable[[], object]]:
    """Everything the table is made of, in one dtype."""
    kind = DTYPES[dtype]
    return [*(partial(network, *each, kind) for each in NETWORKS), partial(odd_channels, kind),
            partial(mean_picture, kind)]


# -- Compiling and reading -------------------------------------------------------------------------

def table(pairs: Sequence[tuple[str, int]]) -> list[Row]:
    """What all specialisations need, for each (dtype, architecture); on all cores.

    Raises: CompilationFailed, one line after the other that does not compile.
    """
    wanted = {dtype: asked_for(works_of(dtype)) for dtype in dict(pairs)}
    jobs = [(each, dtype, architecture) for dtype, architecture in pairs for each in wanted[dtype]]
    context = multiprocessing.get_context("fork")  # a kernel cannot be pickled
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, _inherit, (jobs,)) as pool:
        found = list(pool.map(_compile_job, range(len(jobs))))
    refused = {str(each).partition(": ")[0]: str(each)  # of each line, one
               for each in reversed(found) if isinstance(each, CompilationFailed)}
    if refused:
        raise CompilationFailed("\n\n".join(refused.values()))
    return [each for each in found if isinstance(each, Row)]


_jobs: list[tuple[Specialisation, str, int]] = []


def _inherit(jobs: list[tuple[Specialisation, str, int]]) -> None:
    _jobs[:] = jobs


def _compile_job(number: int) -> Row | CompilationFailed:
    try:
        return compile_one(*_jobs[number])
    except CompilationFailed as error:
        return error


def compile_one(wanted: Specialisation, dtype: str, architecture: int) -> Row:
    """Compiles, or takes it from Triton's cache, and reads the code. Raises: CompilationFailed."""
    source = ASTSource(wanted.kernel, wanted.signature, wanted.constants, wanted.attributes)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Triton prints what ptxas refused
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32),
                                      options=dict(wanted.options))
    except Exception as error:
        raise CompilationFailed(
            f"{_place(wanted.kernel, error)}: {wanted.name} [{wanted.variant}] in {dtype} does not "
            f"compile for sm_{architecture}: {str(error).strip()}") from None
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    used = {name: int(value)
            for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", _resource_usage(cubin))}
    return Row(
        kernel=wanted.name, variant=wanted.variant, dtype=dtype, architecture=architecture,
        registers=used["REG"], allowed=getattr(wanted.kernel, "registers", 0), stack=used["STACK"],
        shared=used["SHARED"], instructions=_instructions(cubin),
        loads=_widths(ptx, "ld"), stores=_widths(ptx, "st"))


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                              check=True, capture_output=True, text=True).stdout


def _instructions(cubin: bytes) -> int:
    """16 bytes each since sm_70, in the ELF section .text.KERNEL; not counted: NOPs, which fill it.

    A disassembler says the same, but takes longer than the compiler.
    """
    table, = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + size * at) for at in range(count)]
    for name, _, _, _, start, length in headers:
        at = headers[names][4] + name
        if cubin[at : cubin.index(0, at)].startswith(b".text."):
            words = struct.unpack_from(f"<{length // 8}Q", cubin, start)[::2]
            return sum(word & 0xFFF != _NOP for word in words)
    raise ValueError("a cubin without code")


def _widths(ptx: str, what: str) -> dict[int, int]:
    """Bits a thread moves with one instruction -> instructions that touch global memory."""
    found = Counter(int(vector or 1) * int(bits) for vector, bits in re.findall(
        rf"\b{what}\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx))
    return dict(sorted(found.items(), reverse=True))


def _place(kernel: Any, error: BaseException) -> str:
    """FILE:LINE of what the compiler refused; Triton counts lines from the kernel's `def`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    definition = next(at for at, line in enumerate(lines) if line.startswith("def "))
    line = getattr(getattr(error, "node", None), "lineno", 1)
    return f"{kernel.fn.__code__.co_filename}:{first + definition + line - 1}"


def main(arguments: Sequence[str]) -> None:
    """Prints the rows as JSON; DTYPE:ARCHITECTURE for some of them."""
    pairs = [(dtype, int(architecture))
             for dtype, _, architecture in (argument.partition(":") for argument in arguments)]
    try:
        rows = table(pairs or [(dtype, number) for dtype in DTYPES for number in ARCHITECTURES])
    except CompilationFailed as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps({"triton": triton.__version__, "rows": [
        {**asdict(row), "fits": row.fits} for row in rows]}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
