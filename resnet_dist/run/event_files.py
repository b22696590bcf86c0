"""TensorBoard's event files, cut back to a step: what a killed run had drawn beyond its checkpoint.

TensorBoard itself hides redone steps only once the resumed run has reached them again, and never
takes back what the resumed run does not draw a second time. So whoever resumes a run cuts its
files, as it cuts metrics.jsonl.
"""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from resnet_dist.run.atomic import write_atomically

# A record: length uint64, its checksum uint32, the event, its checksum uint32; little endian.
# Source: TensorFlow's record_writer.h. TensorBoard's own reader takes both checksums in Python, at
# 5 MB/s: a resumed run would wait a minute for the pictures of a long one.
_HEADER, _TRAILER = 12, 4
_STAMP = re.compile(r"(events\.out\.tfevents\.)(\d+)")


def drop_after(folder: Path, step: int) -> None:
    """Remove every event past `step`, and torn ends, from the event files directly in `folder`.

    A file that holds none is left alone; another is replaced atomically. The writer that made them
    must be gone.
    """
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        kept = bytes(_kept(data, step))
        if len(kept) < len(data):
            write_atomically(path, kept)


def put_before_now(folder: Path) -> None:
    """Let the files of earlier attempts sort before one that is opened now.

    TensorBoard reads files in the order of their names, which begin with the second they were made
    in, and takes a step that comes too early for a restart: a file of the same second, or of a node
    whose clock was ahead, would make it forget the newer one.
    """
    now = int(time.time())
    for index, path in enumerate(sorted(folder.glob("events.*"))):
        made = _STAMP.match(path.name)
        if made and int(made[2]) >= now:
            path.rename(folder / f"{made[1]}{now - 1:010d}.~{index:04d}")  # "~": after any host


def _kept(data: bytes, step: int) -> bytearray:
    kept, start = bytearray(), 0
    while start + _HEADER + _TRAILER <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + _HEADER + length + _TRAILER
        if end > len(data):
            break
        if _step_of(data[start + _HEADER:end - _TRAILER]) <= step:
            kept += data[start:end]
        start = end
    return kept


def _step_of(event: bytes) -> int:
    """0 for a damaged one: it stays where it is."""
    try:
        return Event.FromString(event).step
    except DecodeError:
        return 0
