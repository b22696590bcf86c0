"""`resnet-dist bench convert`: our conversion and FFCV's own writer, side by side in one run.

Both get the same images, the same size limit and the same number of processes, and both end in
JPEG shards. FFCV is used as its documentation shows: an indexable data set of decoded images, here
read from files by Pillow, into `DatasetWriter` with an `RGBImageField`. Runs alternate, so that a
machine whose speed drifts cannot favour one. Each run is a process of its own; its memory is the
largest sum over its processes, sampled; its CPU time counts all of them and, unlike the wall
clock, hardly depends on what else the machine does. Both clocks start when the first process has
imported its modules, which takes FFCV seconds. What starts after that, like workers, counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from data_prep.conversion.pool import PROJECT, ConvertError
from data_prep.sources.folders import open_reader, open_source

CASES = ("mixed", "encode")
SAMPLE_S = 0.1
LIMIT_S = 1800.0  # FFCV's writer waits for ever once a worker of it has died


def bench_convert(source: str, scratch: Path, *, images: int = 5000, workers: int = 2,
                  longer_side: int = 500, quality: int = 90, repeats: int = 3,
                  cases: tuple[str, ...] = CASES,
                  progress: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Rows {case, system, images, workers, seconds, images_per_s, cpu_ms_an_image, peak_mb, bytes,
    run}.

    `source` is converted after being repeated to at least `images` images below `scratch`. Case
    "mixed" is the source as it is; in "encode" every image is larger than the limit, so each must
    be decoded, resized and encoded (the limit is 256 there, and JPEGs are not kept).
    """
    scratch.mkdir(parents=True, exist_ok=True)
    tree = scratch / "images"
    count = _repeat(source, tree, images)
    rows = []
    for case in cases:
        side = longer_side if case == "mixed" else min(longer_side, 256)
        for number in range(repeats):
            for system in ("resnet-dist", "ffcv") if number % 2 == 0 else ("ffcv", "resnet-dist"):
                row = _measure(system, case, tree, scratch, side, quality, workers, count)
                rows.append(row | {"run": number})
                progress(f"{case} {system} run {number}: {row['images_per_s']:.0f} images/s, "
                         f"{row['peak_mb']:.0f} MB")
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median images/s and CPU time of every case and system, and how many times FFCV's speed."""
    table = []
    for case in dict.fromkeys(row["case"] for row in rows):
        medians, cpu = {}, {}
        for system in ("ffcv", "resnet-dist"):
            found = [row for row in rows if (row["case"], row["system"]) == (case, system)]
            speeds = sorted(row["images_per_s"] for row in found)
            medians[system] = speeds[len(speeds) // 2]
            cpu[system] = sorted(row["cpu_ms_an_image"] for row in found)[len(found) // 2]
            table.append({"case": case, "system": system, "images_per_s": medians[system],
                          "slowest": speeds[0], "fastest": speeds[-1],
                          "peak_mb": max(row["peak_mb"] for row in found),
                          "ratio": medians[system] / medians["ffcv"],
                          "cpu_ms_an_image": cpu[system],
                          "cpu_ratio": cpu["ffcv"] / cpu[system]})
    return table


def _repeat(source: str, tree: Path, images: int) -> int:
    """`source` as a class-folder tree of files with at least `images` images; how many."""
    if tree.exists():
        return sum(1 for _ in tree.rglob("*.*") if _.is_file())
    opened = open_source(source)
    found = list(opened.scan())
    reader = open_reader(opened.reader, 1 << 30)
    if opened.pixels:
        raise ConvertError(f"{source}: holds pixels, and the benchmark is about image files")
    count = 0
    for copy in range(-(-images // len(found))):
        for number, image in enumerate(found):
            data = reader.read(image.name, image.container, image.offset, image.size)
            assert isinstance(data, bytes)
            folder = tree / "train" / f"class_{number % 100:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{copy:03d}_{number:05d}.jpg").write_bytes(data)
            count += 1
    return count


def _measure(system: str, case: str, tree: Path, scratch: Path, side: int, quality: int,
             workers: int, count: int) -> dict[str, Any]:
    out = scratch / "out"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    task = {"system": system, "tree": str(tree), "out": str(out), "side": side,
            "quality": quality, "workers": workers, "keep": case == "mixed"}
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "data_prep.bench", json.dumps(task)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    peak = _Peak(process.pid)
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise ConvertError(f"{system} did not end within {LIMIT_S:.0f} s") from None
    finally:
        peak.end()
    if process.returncode:
        raise ConvertError(f"{system} failed: {errors.strip()[-2000:]}")
    clock = json.loads(output.strip().splitlines()[-1])
    seconds = float(clock["seconds"])
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if (
        out.is_dir()) else out.stat().st_size
    return {"case": case, "system": system, "images": count, "workers": workers,
            "seconds": seconds, "images_per_s": count / seconds, "peak_mb": peak.bytes / 1e6,
            "cpu_ms_an_image": 1e3 * clock["cpu_s"] / count, "bytes": size}


class _Peak:
    """Largest memory of a process and its children: proportional set size, where shared pages
    count once."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            try:
                root = psutil.Process(self._pid)
                total = 0
                for process in [root, *root.children(recursive=True)]:
                    total += process.memory_full_info().pss
                self.bytes = max(self.bytes, total)
            except psutil.Error:
                continue

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


class _Files:
    """What a user of FFCV's writer would pass: (image, label) by index, decoded by Pillow."""

    def __init__(self, tree: Path) -> None:
        self.files = sorted(tree.rglob("*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        file = self.files[index]
        return Image.open(file).convert("RGB"), self.classes.index(file.parent.name)


def _run_ours(task: dict[str, Any]) -> tuple[float, float]:
    from data_prep.convert import ConvertConfig, convert

    start, cpu = time.perf_counter(), _cpu_s()
    convert(task["tree"], Path(task["out"]), ConvertConfig(
        workers=task["workers"], longer_side=task["side"], quality=task["quality"],
        keep=task["keep"], encoding="jpeg", max_rejected=0))
    return time.perf_counter() - start, cpu


def _run_ffcv(task: dict[str, Any]) -> tuple[float, float]:
    import cv2
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    cv2.setNumThreads(1)
    start, cpu = time.perf_counter(), _cpu_s()
    writer = DatasetWriter(task["out"], {
        "image": RGBImageField(write_mode="jpg", max_resolution=task["side"],
                               jpeg_quality=task["quality"]),
        "label": IntField()}, num_workers=task["workers"])
    writer.from_indexed_dataset(_Files(Path(task["tree"])), chunksize=100)
    return time.perf_counter() - start, cpu


def _cpu_s() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main(text: str) -> None:
    task = json.loads(text)
    run = _run_ours if task["system"] == "resnet-dist" else _run_ffcv
    seconds, before = run(task)
    for child in multiprocessing.active_children():  # of FFCV's writer, which does not wait
        child.join()
    cpu_s = _cpu_s() - before
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu_s": cpu_s}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
