"""FFCV's file types, imported so that the import changes nothing else.

`import ffcv` sets torch's intra-op threads to 1 (its Compiler does so when its module runs); a
loader must not slow down the model, so the number is put back.
"""

from __future__ import annotations

import numpy as np
import torch

_threads = torch.get_num_threads()

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

__all__ = ["ALLOC_TABLE_TYPE", "CURRENT_VERSION", "FIELDS", "HANDLERS", "METADATA_TYPE",
           "FieldDescType", "HeaderType"]

# Field name -> FFCV's type number, in the order of the file.
FIELDS = (("image", 2), ("label", 1), ("digest", 1))
HANDLERS = {"image": RGBImageField(), "label": IntField(), "digest": IntField()}
METADATA_TYPE: np.dtype = get_metadata_type(list(HANDLERS.values()))
