"""Loaders side by side on the same images: ours, stock FFCV, and a folder of files through Pillow.

In: a data set whose first training shard holds JPEGs. Out: a dictionary of rates and picture
errors, and on request a contact sheet. Every loader runs in a process of its own, which stays alive
and warm; rounds alternate, so that a busy machine is busy for all of them.

    python -m resnet_dist.bench.loader DATASET [--size 224] [--threads 2] [--rounds 5]
        [--sheet FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.bench.rounds import Competitor, Numbers, alternate, serve
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.decode import decoder
from resnet_dist.data.shards.manifest import Split, dump_manifest, load_manifest
from resnet_dist.data.shards.reader import DataError, ShardReader

BATCH = 128
_ROUND_LIMIT_S = 300  # stock FFCV hangs for ever where one of its workers fails
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

# name -> what its batches are when the loop gets them
LOADERS = {
    "ours": "uint8 NHWC; the device normalises",
    "ours_fp32": "normalised fp32 on the CPU",
    "ffcv_uint8": "stock FFCV 1.0.2, uint8; the device normalises",
    "ffcv": "stock FFCV 1.0.2 with its NormalizeImage, fp32",
    "folder": "files, Pillow, worker processes, normalised fp32",
}
PEERS = ("ffcv_uint8", "ffcv", "folder")


def bench_loader(dataset: Path | str, *, size: int = 224, threads: int = 2, rounds: int = 5,
                 images: int = 1536, sheet: Path | None = None,
                 progress: Callable[[str], None] = lambda line: None) -> dict[str, object]:
    """Rates in images/s of every loader in `LOADERS`, medians of `rounds` alternations.

    Returns: {"size", "threads", "images", "rounds", "rates": {name: [images/s a round]},
    "median": {name: images/s}, "cpu_ms": {name: CPU milliseconds an image}, which other work on the
    machine hardly changes ("folder" without its worker processes), "speedup": ours over each of
    `PEERS`, delivering what a step takes, "speedup_fp32": the same where ours, too, normalises on
    the CPU, "error": mean absolute difference in
    grey levels to a float64 area resize, for ours and FFCV over 200 crops}.

    Raises: DataError where the data set does not fit, RuntimeError where a loader failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        root = Path(scratch)
        one_shard(Path(dataset), root)
        options = ["--size", str(size), "--threads", str(threads), "--images", str(images)]
        found = alternate({name: partial(
            Competitor, name, ["resnet_dist.bench.loader", scratch, "--run", name, *options],
            os.environ, limit_s=_ROUND_LIMIT_S) for name in LOADERS}, rounds, progress)
        errors = picture_errors(root, size)
        if sheet is not None:
            contact_sheet(root, sheet, size)
    rates = {name: numbers["images_per_s"] for name, numbers in found.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "size": size, "threads": threads, "images": images, "rounds": rounds, "rates": rates,
        "median": median, "error": errors,
        "cpu_ms": {name: statistics.median(numbers["cpu_ms_an_image"])
                   for name, numbers in found.items()},
        "speedup": {name: median["ours"] / median[name] for name in PEERS},
        "speedup_fp32": {name: median["ours_fp32"] / median[name] for name in PEERS
                         if name != "ffcv_uint8"},
    }


def one_shard(dataset: Path, root: Path) -> None:
    """A data set of `dataset`'s first training shard in `root`, and its JPEGs as files there."""
    manifest = load_manifest(dataset)
    split = manifest.splits.get("train")
    if split is None or not split.shards:
        raise DataError(f"dataset = {dataset}: has no split 'train'; convert it again")
    shard = split.shards[0]
    (root / "train").mkdir()
    (root / shard.file).symlink_to((dataset / shard.file).resolve())
    (root / "dataset.json").write_text(dump_manifest(dataclasses.replace(
        manifest, splits={"train": Split(samples=shard.samples, shards=(shard,))})))
    with ShardReader(root, "train") as reader:
        if (reader.metadata["f0"]["mode"] != decoder.JPEG).any():
            raise DataError(f"dataset = {dataset}: its first shard holds raw images; the "
                            "comparison needs JPEGs, convert with encoding JPEG")
        for sample, label in enumerate(reader.labels.tolist()):
            folder = root / "files" / f"{label:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{sample:06d}.jpg").write_bytes(reader.read(sample).tobytes())


def _serve(name: str, root: Path, size: int, threads: int, images: int) -> None:
    """Child: rates of `images` images a round; the first two batches are not counted."""
    kinds: dict[str, Callable[..., Iterator[Iterator[int]]]] = {
        "ours": _ours, "ours_fp32": partial(_ours, fp32=True), "ffcv": _ffcv,
        "ffcv_uint8": _stock, "folder": _folder}
    batches = kinds[name](root, size, threads, images + 2 * BATCH)

    def work() -> Numbers:
        start, cpu, counted = 0.0, 0.0, 0
        for number, count in enumerate(next(batches)):
            if number == 1:
                start, cpu = time.monotonic(), time.process_time()
            elif number > 1:
                counted += count
        return {"images_per_s": counted / (time.monotonic() - start),
                "cpu_ms_an_image": 1e3 * (time.process_time() - cpu) / counted}

    serve(work)


def _augment(size: int) -> AugmentConfig:
    return AugmentConfig(name="random_resized_crop", size=size)


def _ours(root: Path, size: int, threads: int, images: int,
          fp32: bool = False) -> Iterator[Iterator[int]]:
    import torch

    from resnet_dist.data.loader import TrainLoader
    torch.set_num_threads(1)
    # A row at a time: broadcasting over three channels alone defeats torch's vector code.
    scale = torch.tensor(1 / (255 * _STD), dtype=torch.float32).repeat(size)
    shift = torch.tensor(-_MEAN / _STD, dtype=torch.float32).repeat(size)
    with TrainLoader(root, "train", _augment(size), seed=0, batch_size=BATCH,
                     threads=threads) as loader:
        stream = iter(loader)

        def batch() -> int:
            images = next(stream).images
            if fp32:
                rows = images.view(len(images), size, size * 3).float().mul_(scale).add_(shift)
                images = rows.view(len(images), size, size, 3)  # NHWC, as channels_last wants
            return len(images)

        while True:
            yield (batch() for _ in range(images // BATCH))


def _ffcv(root: Path, size: int, threads: int, images: int) -> Iterator[Iterator[int]]:
    from ffcv.transforms import NormalizeImage
    return _stock(root, size, threads, images,
                  [NormalizeImage(_MEAN * 255, _STD * 255, np.dtype("float32"))])


def _stock(root: Path, size: int, threads: int, images: int,
           last: Sequence[object] = ()) -> Iterator[Iterator[int]]:
    """FFCV's ImageNet pipeline: its crop, its flip, its threads, in random order."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    manifest = load_manifest(root)
    (shard,) = manifest.splits["train"].shards
    turns = -(-images // shard.samples)
    loader = Loader(
        str(root / shard.file), batch_size=BATCH, num_workers=threads, os_cache=True,
        order=OrderOption.RANDOM, drop_last=True,
        indices=np.tile(np.arange(shard.samples), turns)[:images],
        pipelines={"image": [RandomResizedCropRGBImageDecoder((size, size)),
                             RandomHorizontalFlip(), *last, ToTensor(), ToTorchImage()],
                   "label": [IntDecoder(), ToTensor()], "digest": [IntDecoder(), ToTensor()]})
    while True:
        yield (len(batch[0]) for batch in loader)


def _folder(root: Path, size: int, threads: int, images: int) -> Iterator[Iterator[int]]:
    """What torchvision's ImageFolder, RandomResizedCrop, flip, ToTensor and Normalize do."""
    import torch
    torch.set_num_threads(1)
    files: Any = _Files(sorted((root / "files").rglob("*.jpg")), size)
    turns = -(-images // len(files))
    sampler = [i for _ in range(turns) for i in torch.randperm(len(files)).tolist()][:images]
    loader: Any = torch.utils.data.DataLoader(files, BATCH, sampler=sampler, num_workers=threads,
                                         persistent_workers=True, drop_last=True)
    while True:
        yield (len(batch) for batch in loader)


class _Files:
    """Map-style data set of JPEG files: normalised fp32 [3, size, size]."""

    def __init__(self, files: list[Path], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        import torch
        from ffcv.fields.rgb_image import get_random_crop  # the same distribution
        from PIL import Image
        image = Image.open(self.files[index]).convert("RGB")
        top, left, tall, wide = get_random_crop(image.height, image.width, np.array([0.08, 1.0]),
                                                np.array([0.75, 4 / 3]))
        image = image.crop((left, top, left + wide, top + tall)).resize(
            (self.size, self.size), Image.Resampling.BILINEAR)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean = torch.tensor(_MEAN, dtype=torch.float32)[:, None, None]
        return pixels.sub_(mean).div_(torch.tensor(_STD, dtype=torch.float32)[:, None, None])


def picture_errors(root: Path, size: int, crops: int = 200) -> dict[str, float]:
    """Mean absolute difference, in grey levels, to a float64 area resize of the decoded crop."""
    from ffcv.libffcv import imdecode, resize_crop
    from PIL import Image

    from resnet_dist.data.augmentation.plans import train_plans
    errors: dict[str, list[float]] = {"ours": [], "ffcv": []}
    with ShardReader(root, "train") as reader:
        images = reader.metadata["f0"]
        ids = np.arange(crops) % reader.num_samples
        augment = dataclasses.replace(_augment(size), flip=False)
        plans = train_plans(augment, 0, np.arange(crops) // reader.num_samples, ids,
                            images["height"][ids], images["width"][ids], size)
        for sample, plan in zip(ids.tolist(), plans, strict=True):
            stored = reader.read(sample)
            height, width = int(images["height"][sample]), int(images["width"][sample])
            top, left, tall, wide = (int(plan[key]) for key in ("top", "left", "height", "width"))
            whole = np.asarray(Image.open(io.BytesIO(stored.tobytes())).convert("RGB"))
            exact = np.einsum("ih,hwc,jw->ijc", _coverage(tall, size),
                              whole[top:top + tall, left:left + wide].astype(np.float64),
                              _coverage(wide, size), optimize=True)
            ours = decoder.decode_one(stored.tobytes(), decoder.JPEG, height, width, plan,
                                     (size, size))
            decoded, theirs = np.empty_like(whole), np.empty_like(ours)
            imdecode(stored, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
            resize_crop(decoded, top, top + tall, left, left + wide, theirs)
            errors["ours"].append(float(np.abs(ours - exact).mean()))
            errors["ffcv"].append(float(np.abs(theirs - exact).mean()))
    return {name: statistics.mean(values) for name, values in errors.items()}


def _coverage(extent: int, out: int) -> np.ndarray:
    """float64 [out, extent]: the share of each source pixel in each output pixel."""
    edges = np.linspace(0, extent, out + 1)
    pixels = np.arange(extent)
    low = np.maximum(edges[:-1, None], pixels)
    high = np.minimum(edges[1:, None], pixels + 1)
    return np.maximum(high - low, 0) * out / extent


def contact_sheet(root: Path, file: Path, size: int, rows: int = 6, columns: int = 10) -> None:
    """A PNG: each row is one image, its centre crop first, then as training sees it each epoch.

    The rows take turns through the augmentations: random crops, the paper's scale crops with PCA
    colour, jitter, RandAugment, erasing.
    """
    from PIL import Image

    from resnet_dist.data.augmentation.plans import center_crop, train_plans
    kinds = [AugmentConfig(name="random_resized_crop", size=size),
             AugmentConfig(name="scale_crop", size=size, pca=0.1,
                           min_side=max(256, size), max_side=max(480, size)),
             AugmentConfig(name="random_resized_crop", size=size, brightness=0.4, contrast=0.4,
                           saturation=0.4),
             AugmentConfig(name="random_resized_crop", size=size, rand_ops=2),
             AugmentConfig(name="random_resized_crop", size=size, erase=0.8)]
    pad = np.broadcast_to(np.rint(_MEAN * 255).astype(np.uint8), (size, size, 3))
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + 4)), "white")
    with ShardReader(root, "train") as reader:
        images = reader.metadata["f0"]
        for row in range(rows):
            sample = row * max(1, reader.num_samples // rows) % reader.num_samples
            epochs = np.arange(columns - 1)
            ids = np.full(columns - 1, sample)
            heights, widths = images["height"][ids], images["width"][ids]
            plans = np.concatenate([
                center_crop(heights[:1], widths[:1], max(size * 8 // 7, size), size),
                train_plans(kinds[row % len(kinds)], 0, epochs, ids, heights, widths, size)])
            for column, plan in enumerate(plans):
                pixels = decoder.decode_one(reader.read(sample).tobytes(),
                                           int(images["mode"][sample]), int(heights[0]),
                                           int(widths[0]), plan, (size, size), pad)
                sheet.paste(Image.fromarray(pixels), (column * (size + 4), row * (size + 4)))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loaders side by side on the same images.")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--run", choices=list(LOADERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        _serve(args.run, args.dataset, args.size, args.threads, args.images)
        return
    result = bench_loader(args.dataset, size=args.size, threads=args.threads, rounds=args.rounds,
                          images=args.images, sheet=args.sheet,
                          progress=lambda line: print(line, file=sys.stderr))  # noqa: T201
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
