"""FFCV's graph and compiler around the native decoder.

The image decoder is an FFCV `Operation`: FFCV's `Graph` writes the stage that calls it and FFCV's
`Compiler` compiles it without the GIL. Random draws do not happen in there. The plans of a batch
travel in as `storage_state`, keyed by position in the batch.

FFCV's own threads (numba's prange) are not used: numba's pool is not re-entrant and an exception
in it cannot name its sample. Each worker thread of the loader runs the compiled stage on a few
images.

`import ffcv` sets torch's intra-op threads to 1 (its Compiler does so when its module runs); a
loader must not slow down the model, so the number is put back. It also compiles a typed dictionary
of two entries, for 3 s in every process; a plain one serves as well, because only Python reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numba.typed
import numpy as np
import torch

from resnet_dist.data.decode import decoder
from resnet_dist.data.shards.beton import SAMPLE

_threads, _typed = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict

# isort: split
from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.fields.basics import IntDecoder  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.graph import Graph  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

torch.set_num_threads(_threads)
numba.typed.Dict = _typed

HANDLERS = {"image": RGBImageField(), "label": IntField(), "digest": IntField()}  # as in the file


class PlannedDecoder(Operation):
    """Decodes an RGBImageField as the plans in `storage_state` say, each to `destination`'s size.

    storage_state: (files int32 [n], sizes uint32 [n], digests int64 [n], plans PLAN as uint8 [m,
    bytes], padding image uint8 [S, S, 3], status int32 [m], check int). The first image that fails
    leaves its status and ends the stage.
    """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (1, 1, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(
            shape, dtype)

    def generate_code(self) -> Callable:
        decode_one = decoder.decode

        def decode(batch_indices, destination, metadata, storage_state):  # type: ignore[no-untyped-def]
            files, sizes, digests, plans, padding, status, check = storage_state
            for i in range(len(batch_indices)):
                sample = batch_indices[i]
                image = metadata[sample]
                status[i] = decode_one(
                    0, files[sample], image["data_ptr"], sizes[sample], digests[sample], check,
                    image["mode"], image["height"], image["width"], plans[i].ctypes.data,
                    padding.ctypes.data, destination[i].ctypes.data, destination.shape[1],
                    destination.shape[2])
                if status[i] != 0:
                    break
            return destination

        return decode


@cache
def compiled_stage() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """stage(ids, metadata, storage_state, images out, labels out); compiled once a process."""
    decoders = {"image": PlannedDecoder(), "label": IntDecoder()}
    graph = Graph({name: PipelineSpec(name, decoder) for name, decoder in decoders.items()},
                  HANDLERS, {name: i for i, name in enumerate(HANDLERS)},
                  np.empty(0, SAMPLE), None)
    _, code = graph.collect_requirements()
    stages, outputs = graph.codegen_all(code)
    (stage, defined), *rest = stages
    assert not any(names for _, names in rest)
    assert set(outputs) == set(defined)
    node_of = {node.field_name: node.id for node in graph.root_nodes}
    position = {node: defined.index(node) for node in outputs}

    def run(ids: np.ndarray, metadata: np.ndarray, storage_state: tuple[Any, ...],
            images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        memory: dict[str, Any] = {f"memory_{node_of['image']}": images,
                                  f"memory_{node_of['label']}": labels}
        shared = {f"shared_memory_{node}": None for node in node_of.values()}
        results = stage(ids, metadata, storage_state, **memory, **shared)
        return (results[position[node_of["image"]]], results[position[node_of["label"]]])

    assert Compiler.is_enabled
    return run
