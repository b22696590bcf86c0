"""From bytes to pixels.

In: an encoded image and its plan.
Out: uint8 HWC, by the C++ in `native/` (door: `decoder`).
May import: nothing of ours.
"""
