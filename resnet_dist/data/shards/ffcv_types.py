"""FFCV's file types, imported so that the import changes nothing else.

`import ffcv` sets torch's intra-op threads to 1 (its Compiler does so when its module runs); a
loader must not slow down the model, so the number is put back. It also compiles a typed dictionary
of two entries, for 3 s in every process; a plain one serves as well, because only Python reads it.
"""

from __future__ import annotations

import numba.typed
import numpy as np
import torch

_threads, _typed = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict

# isort: split
from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.types import (  # noqa: E402
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)

torch.set_num_threads(_threads)
numba.typed.Dict = _typed

__all__ = ["ALLOC_TABLE_TYPE", "CURRENT_VERSION", "FIELDS", "HANDLERS", "METADATA_TYPE",
           "FieldDescType", "HeaderType"]

# Field name -> FFCV's type number, in the order of the file.
FIELDS = (("image", 2), ("label", 1), ("digest", 1))
HANDLERS = {"image": RGBImageField(), "label": IntField(), "digest": IntField()}
METADATA_TYPE: np.dtype = get_metadata_type(list(HANDLERS.values()))
