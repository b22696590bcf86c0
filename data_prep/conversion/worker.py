"""A worker process: `python -m data_prep.conversion.worker DST`.

Shards come in by line, news go out by line. A shard is written to disk while it, and then the next
one, is encoded; a worker holds up to two. It ends when its input ends, so it cannot outlive the
process that started it for longer than that, and it writes nothing but shards and records, both
atomically.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.conversion.plan import ShardId, load_plan
from data_prep.conversion.write import Encoded, encode_shard, encoding_of, save_shard
from data_prep.sources.folders import open_reader
from data_prep.sources.found import SourceError

NEWS_EVERY_S = 0.2


def main(dst: str) -> int:
    plan = load_plan(Path(dst))
    if plan is None:
        print(f"{dst}: has no plan", file=sys.stderr)  # noqa: T201
        return 2
    reader = open_reader(plan.reader, plan.options["max_image_bytes"])
    encoding = encoding_of(plan)
    images, said = 0, 0.0

    def tell(**news: Any) -> None:
        os.write(1, json.dumps(news).encode() + b"\n")

    def tick(name: str) -> None:
        nonlocal images, said
        if time.monotonic() - said >= NEWS_EVERY_S:
            tell(images=images, at=name)
            images, said = 0, time.monotonic()
        images += 1

    def save(made: Encoded) -> None:
        save_shard(plan, made)
        tell(finished=True)

    with ThreadPoolExecutor(1) as disk:
        saving: Future[None] | None = None
        for line in chain(sys.stdin, [""]):
            try:
                made = None
                if line:
                    split, index = line.split()
                    made = encode_shard(plan, ShardId(split, int(index)), reader, encoding, tick)
                    tell(images=images, ready=True)
                    images = 0
                if saving is not None:
                    saving.result()
                if made is not None:
                    saving = disk.submit(save, made)
            except (SourceError, OSError, MemoryError) as error:
                tell(error=f"{type(error).__name__}: {error}")
                return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code = main(sys.argv[1])
    except BrokenPipeError:  # the parent is gone
        code = 1
    os._exit(code)
