"""How an evaluation looks at images: the centre, its mirror image, ten crops, or several scales.

In: a data set and a rank's place. Out: `Group` after `Group` of the rank's contiguous slice, in
order, each sample once, with all its views. The centre crop comes from the loader that training
uses; the other protocols need the whole resized picture, which is decoded here once a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_dist.build import data_path
from resnet_dist.config.schema import Config, EvalConfig
from resnet_dist.data.decode import decoder
from resnet_dist.data.loader import EvalLoader
from resnet_dist.data.shards.beton import digest
from resnet_dist.data.shards.reader import DataError, ShardReader
from resnet_dist.ranks.distributed import World

# Positions in the group, int64 [m], and uint8 [m, h, w, 3]; a position at most once.
Shown = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Group:
    """Some consecutive samples with all their views, all views of one tensor of one size."""

    sample_ids: Tensor  # int64 [n]
    labels: Tensor  # int64 [n]
    images: Iterable[Shown]


class Views:
    """One pass over this rank's slice; a context manager, closed once.

    num_samples: samples of the split, over all ranks.
    """

    def __init__(self, num_samples: int, groups: Iterator[Group], close: Callable[[], None]):
        self.num_samples = num_samples
        self._groups, self._close = groups, close

    def __iter__(self) -> Iterator[Group]:
        return self._groups

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def eval_loader(config: Config, world: World) -> Views:
    """This rank's contiguous slice of the evaluation split, once, as `eval.protocol` shows it."""
    return open_views(data_path(config), config.eval, world,
                      threads=config.data.threads or world.cores,
                      verify=config.data.verify)


def open_views(dataset: Path, options: EvalConfig, world: World, *, threads: int | None,
               verify: str) -> Views:
    """Views of `options.split` by `options.protocol`. Raises: DataError, here or when iterated.

    1crop: shorter side to `resize`, the `size` square in the middle. flip: that and its mirror
    image. 10crop: the corners and the centre of the resized picture, and their mirror images
    (Krizhevsky et al. 2012, sec. 4.1). multiscale: the whole picture with its shorter side at each
    of `scales` (He et al. 2015, sec. 3.4); a network that ends in global average pooling is
    fully convolutional as it is.
    """
    if options.protocol in ("1crop", "flip"):
        loader = EvalLoader(dataset, options.split, resize=options.resize, size=options.size,
                            batch_size=options.batch_size, rank=world.rank, world=world.size,
                            threads=threads, verify=verify)
        return Views(loader.num_samples, _centres(loader, mirrored=options.protocol == "flip"),
                     loader.close)
    pictures = _Pictures(dataset, options, world, threads=threads, check=verify == "page")
    groups = pictures.ten_crops() if options.protocol == "10crop" else pictures.scales()
    return Views(pictures.reader.num_samples, groups, pictures.close)


def _centres(loader: EvalLoader, *, mirrored: bool) -> Iterator[Group]:
    for batch in loader:
        every = torch.arange(len(batch.labels))
        shown = [(every, batch.images)]
        if mirrored:
            shown.append((every, batch.images.flip(2)))
        yield Group(torch.from_numpy(batch.sample_ids), batch.labels, shown)


class _Pictures:
    """Whole resized pictures of a rank's slice, decoded by threads one group ahead."""

    def __init__(self, dataset: Path, options: EvalConfig, world: World, *, threads: int | None,
                 check: bool) -> None:
        self._options, self._check = options, check
        self.reader = ShardReader(dataset, options.split)
        n = self.reader.num_samples
        first, last = world.rank * n // world.size, (world.rank + 1) * n // world.size
        starts = range(first, last, options.batch_size)
        self._slices = [np.arange(start, min(start + options.batch_size, last)) for start in starts]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="eval")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.reader.close()

    def ten_crops(self) -> Iterator[Group]:
        """Five crops of the picture, and each of them mirrored."""
        size = self._options.size
        for ids, (pictures,) in self._ahead((self._options.resize,)):
            crops = [torch.from_numpy(np.stack(crop)) for crop in
                     zip(*(_five(picture, size) for picture in pictures), strict=True)]
            every = torch.arange(len(ids))
            yield self._group(ids, [(every, view) for crop in crops
                                    for view in (crop, crop.flip(2))])

    def scales(self) -> Iterator[Group]:
        """Pictures of one size go together, as many as hold the pixels of a usual batch."""
        pixels = self._options.batch_size * self._options.size**2
        for ids, by_scale in self._ahead(self._options.scales):
            shown = []
            for pictures in by_scale:
                alike: dict[tuple[int, ...], list[int]] = {}
                for position, picture in enumerate(pictures):
                    alike.setdefault(picture.shape, []).append(position)
                for (height, width, _), members in alike.items():
                    most = max(1, pixels // (height * width))
                    for start in range(0, len(members), most):
                        part = members[start:start + most]
                        shown.append((torch.tensor(part), torch.from_numpy(
                            np.stack([pictures[position] for position in part]))))
            yield self._group(ids, shown)

    def _group(self, ids: np.ndarray, shown: list[Shown]) -> Group:
        return Group(torch.from_numpy(ids), torch.from_numpy(self.reader.labels[ids].astype("i8")),
                     shown)

    def _ahead(self, sides: tuple[int | None, ...]
               ) -> Iterator[tuple[np.ndarray, list[list[np.ndarray]]]]:
        """(ids, pictures by side); the next group decodes while this one is used."""
        def begin(ids: np.ndarray) -> list[list[Future[np.ndarray]]]:
            return [[self._pool.submit(self._picture, int(sample), side) for sample in ids]
                    for side in sides]

        coming = begin(self._slices[0]) if self._slices else []
        for number, ids in enumerate(self._slices):
            ready = [[future.result() for future in futures] for futures in coming]
            if number + 1 < len(self._slices):
                coming = begin(self._slices[number + 1])
            yield ids, ready

    def _picture(self, sample: int, side: int | None) -> np.ndarray:
        """uint8 [h, w, 3] with its shorter side at `side`; None: as it is."""
        tall, wide = _resized(self.reader, sample, side)
        if self._options.protocol == "10crop" and min(tall, wide) < self._options.size:
            height, width = _resized(self.reader, sample, None)
            raise DataError(f"eval.size = {self._options.size}: exceeds "
                            f"{self.reader.describe(sample)}, {height} x {width} pixels; set "
                            "eval.resize or a smaller eval.size")
        return picture(self.reader, sample, side, check=self._check)


def picture(reader: ShardReader, sample: int, side: int | None, *, check: bool) -> np.ndarray:
    """One sample, uint8 [h, w, 3], with its shorter side at `side` pixels; None: as it is.

    check: compare its bytes with the recorded digest. Raises: DataError, naming the sample.
    """
    image, stored = reader.metadata["f0"][sample], reader.read(sample).tobytes()
    mode, height, width = (int(image[key]) for key in ("mode", "height", "width"))
    size = _resized(reader, sample, side)
    if check and digest(stored) != reader.metadata["f2"][sample]:
        raise DataError(f"{reader.describe(sample)}: its bytes are not the recorded ones; run "
                        f"`resnet-dist verify {reader.dataset} --deep`, then copy or convert "
                        "that shard again")
    plan = np.zeros(1, decoder.PLAN)
    plan["height"], plan["width"] = height, width
    plan["copy"] = size == (height, width)
    try:
        return decoder.decode_one(stored, mode, height, width, plan, size)
    except ValueError as error:
        raise DataError(f"{reader.describe(sample)}: {error}") from None


def _resized(reader: ShardReader, sample: int, side: int | None) -> tuple[int, int]:
    """Height and width of a sample whose shorter side is `side`."""
    image = reader.metadata["f0"][sample]
    height, width = int(image["height"]), int(image["width"])
    shorter = min(height, width)
    return (height, width) if side is None else (side * height // shorter, side * width // shorter)


def _five(picture: np.ndarray, size: int) -> list[np.ndarray]:
    """Corners and centre: uint8 [size, size, 3] each; the centre where 1crop has it."""
    bottom, right = picture.shape[0] - size, picture.shape[1] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right),
               (int(np.rint(bottom / 2)), int(np.rint(right / 2)))]
    return [picture[top:top + size, left:left + size] for top, left in corners]
