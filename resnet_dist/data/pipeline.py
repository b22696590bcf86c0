"""FFCV's graph and compiler around the native decoder.

The image decoder is an FFCV `Operation`: FFCV's `Graph` writes the stage that calls it and FFCV's
`Compiler` compiles it without the GIL. Random draws do not happen in there. The plans of a batch
travel in as `storage_state`, keyed by position in the batch.

FFCV's own threads (numba's prange) are not used: numba's pool is not re-entrant and an exception
in it cannot name its sample. Each worker thread of the loader runs the compiled stage on a few
images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from resnet_dist.data.decode import decoder
from resnet_dist.data.shards.ffcv_types import HANDLERS, METADATA_TYPE

# isort: split
from ffcv.fields.basics import IntDecoder
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.graph import Graph
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.pipeline.state import State


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
                  np.empty(0, METADATA_TYPE), None)
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
