"""Pixels to the network's input in one pass, in Triton: uint8 in, normalised 16- or 32-bit out.

Four channels come out where three went in: 8 bytes a bf16 pixel, which tensor cores load in whole
vectors. The fourth is zero. Nothing here is differentiable: pixels have no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_dist.kernels.gpu.limits import OPTIONS, at_most

PIXELS = 1024


@at_most(registers=96)
@triton.jit
def _kernel(images, scale, shift, flip, colour, out, pixels, width, PADDED: tl.constexpr,
            PER_PIXEL: tl.constexpr, FLIP: tl.constexpr, COLOUR: tl.constexpr,
            PIXELS: tl.constexpr):
    image = tl.program_id(1)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, PADDED)
    inside = (p < pixels)[:, None] & (c < 3)[None, :]
    base = image.to(tl.int64) * pixels
    source = p
    if FLIP:
        mirrored = p + width - 1 - 2 * (p % width)
        source = tl.where(tl.load(flip + image) != 0, mirrored, p)
    value = tl.load(images + (base + source)[:, None] * 3 + c[None, :], mask=inside, other=0)
    value = value.to(tl.float32)
    if COLOUR:
        value += tl.load(colour + image * 3 + c, mask=c < 3, other=0.0)[None, :]
    if PER_PIXEL:
        at = p[:, None] * 3 + c[None, :]
        value = (value * tl.load(scale + at, mask=inside, other=0.0)
                 + tl.load(shift + at, mask=inside, other=0.0))
    else:
        value = (value * tl.load(scale + c, mask=c < 3, other=0.0)[None, :]
                 + tl.load(shift + c, mask=c < 3, other=0.0)[None, :])
    value = tl.where(inside, value, 0.0).to(out.dtype.element_ty)
    tl.store(out + (base + p)[:, None] * PADDED + c[None, :], value, mask=(p < pixels)[:, None])


def normalize(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype,
              flip: Tensor | None = None, colour: Tensor | None = None) -> Tensor:
    """`reference.normalize`, on the device; channels_last."""
    count, height, width, _ = images.shape
    out = torch.empty((count, 4, height, width), dtype=dtype, device=images.device,
                      memory_format=torch.channels_last)
    per_pixel = scale.numel() > 3 or shift.numel() > 3
    if per_pixel:
        whole = (1, 3, height, width)
        scale, shift = (t.expand(whole).permute(0, 2, 3, 1) for t in (scale, shift))
    pixels = height * width
    _kernel[(triton.cdiv(pixels, PIXELS), count)](
        images.contiguous(), scale.contiguous(), shift.contiguous(),
        flip if flip is None else flip.to(torch.uint8), colour, out, pixels, width, PADDED=4,
        PER_PIXEL=per_pixel, FLIP=flip is not None, COLOUR=colour is not None, PIXELS=PIXELS,
        **OPTIONS)
    return out
