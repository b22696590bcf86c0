"""Shards are believed only as far as they have been checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resnet_dist.data.shards.beton import ALLOCATION, FIELD, FIELDS, HEADER, METADATA_START, SAMPLE
from resnet_dist.data.shards.reader import DataError, ShardReader
from tests.unit.data.samples import jpeg_sample, raw_sample, write_dataset

SAMPLES = [(raw_sample if i % 3 == 0 else jpeg_sample)(i, i % 10, 40 + i, 50) for i in range(11)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("reader") / "d",
                         {"train": [SAMPLES[:4], SAMPLES[4:5], SAMPLES[5:]]})


def test_shards_read_as_one_array_of_samples(dataset):
    with ShardReader(dataset, "train") as reader:
        assert reader.num_samples == 11
        for i, (stored, mode, height, width, label) in enumerate(SAMPLES):
            assert reader.read(i).tobytes() == stored
            image = reader.metadata["f0"][i]
            assert (image["mode"], image["height"], image["width"]) == (mode, height, width)
            assert reader.labels[i] == label
        assert reader.locate(4) == (dataset / "train" / "shard-00001.beton", 0)
        assert reader.locate(10) == (dataset / "train" / "shard-00002.beton", 5)


def test_the_same_bytes_come_out_of_stock_ffcv(dataset):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    with ShardReader(dataset, "train") as reader:
        expected = reader.labels[5:].tolist()
    loader = Loader(str(dataset / "train" / "shard-00002.beton"), batch_size=3, num_workers=1,
                    order=OrderOption.SEQUENTIAL, os_cache=True,
                    pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1), ToTensor()],
                               "label": [IntDecoder(), ToTensor()],
                               "digest": [IntDecoder(), ToTensor()]})
    labels = [int(label) for batch in loader for label in batch[1][:, 0]]
    assert labels == expected


def corrupted(dataset: Path, tmp_path: Path, change) -> Path:
    """A copy whose first shard went through `change(bytearray)`; its manifest knows the length."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    file = copy / "train" / "shard-00000.beton"
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] = len(data)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    return copy


def put(dtype: np.dtype, at: int, **values: object):
    def change(data: bytearray) -> None:
        where = at if at >= 0 else len(data) + at
        row = np.frombuffer(bytes(data[where:where + dtype.itemsize]), dtype).copy()
        for name, value in values.items():
            target = row
            *path, last = name.split("__")
            for part in path:
                target = target[part]
            target[last] = value
        data[where:where + dtype.itemsize] = row.tobytes()
    return change


HUGE = 2**64 - 1
LIES = {
    "version": (put(HEADER, 0, version=3), "format version 3"),
    "fields": (put(HEADER, 0, num_fields=2), "2 fields"),
    "page size": (put(HEADER, 0, page_size=12345), "page size"),
    "samples": (put(HEADER, 0, num_samples=5), "5 samples"),
    "samples beyond memory": (put(HEADER, 0, num_samples=HUGE), "samples"),
    "table inside the header": (put(HEADER, 0, alloc_table_ptr=8), "allocation table"),
    "table beyond the file": (put(HEADER, 0, alloc_table_ptr=HUGE), "allocation table"),
    "field type": (put(FIELD, HEADER.itemsize, type_id=5), "type 5"),
    "image mode": (put(SAMPLE, METADATA_START, f0__mode=7), "sample 0 has an unknown image mode"),
    "no pixels": (put(SAMPLE, METADATA_START, f0__width=0), "sample 0 has no pixels"),
    "raw size": (put(SAMPLE, METADATA_START, f0__height=41), "sample 0 is raw but not"),
    "pointer": (put(SAMPLE, METADATA_START, f0__data_ptr=HUGE - 3), "sample 0 points elsewhere"),
    "label": (put(SAMPLE, METADATA_START, f1=10), "sample 0 has a label outside 0..9"),
    "negative label": (put(SAMPLE, METADATA_START, f1=-1), "sample 0 has a label outside"),
    "allocation outside": (put(ALLOCATION, -24, ptr=HUGE), "points outside the data"),
    "allocation overflows": (put(ALLOCATION, -24, size=HUGE), "points outside the data"),
    "allocation in the header": (put(ALLOCATION, -24, ptr=4), "points outside the data"),
    "unknown sample": (put(ALLOCATION, -24, sample_id=9), "points outside the data"),
    "sample twice": (put(ALLOCATION, -24, sample_id=0), "has no allocation"),
    "cut": (lambda data: data.__delitem__(slice(-30, None)), "allocation table"),
    "cut in the header": (lambda data: data.__delitem__(slice(100, None)),
                          "ends inside its header"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_lies_is_refused_by_name(dataset, tmp_path, lie):
    change, reason = LIES[lie]
    with pytest.raises(DataError, match=reason) as refused:
        ShardReader(corrupted(dataset, tmp_path, change), "train")
    assert "shard-00000.beton" in str(refused.value)


def test_a_changed_label_is_noticed(dataset, tmp_path):
    with pytest.raises(DataError, match="labels or metadata are not those that were written"):
        ShardReader(corrupted(dataset, tmp_path, put(SAMPLE, METADATA_START, f1=3)), "train")


def test_overlapping_allocations_are_refused(dataset, tmp_path):
    def change(data: bytearray) -> None:
        table = np.frombuffer(bytes(data[-4 * 24:]), ALLOCATION).copy()
        table["size"][0] += 8
        data[-4 * 24:] = table.tobytes()
    with pytest.raises(DataError, match="overlap"):
        ShardReader(corrupted(dataset, tmp_path, change), "train")


def test_a_shard_of_another_length_is_refused(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    with open(copy / "train" / "shard-00001.beton", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"shard-00001.beton: is .* bytes, dataset.json says"):
        ShardReader(copy, "train")
    (copy / "train" / "shard-00001.beton").unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        ShardReader(copy, "train")


LARGE = """
import json, sys, time, numpy as np
from pathlib import Path
from resnet_dist.data.shards.reader import ShardReader
import resnet_dist.data.loader

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) / 1024

before = resident()
took = []
for _ in range(3):  # the fastest of three: the machine may be busy, the reader may not be slow
    start = time.monotonic()
    reader = ShardReader(Path(sys.argv[1]), "train")
    took.append(time.monotonic() - start)
    if len(took) < 3:
        reader.close()
        del reader
from resnet_dist.data.order import permutation
permutation(0, 0, reader.num_samples), permutation(0, 1, reader.num_samples)
print(json.dumps([reader.num_samples, min(took), resident() - before]))
"""


def write_large(root: Path, samples: int, shards: int) -> None:
    """Sparse shards whose structure is real and whose images are zeros."""
    (root / "train").mkdir(parents=True)
    records, page = [], 1 << 21
    per_shard = [len(part) for part in np.array_split(np.arange(samples), shards)]
    for index, count in enumerate(per_shard):
        stored = 110_000
        first = -(-(METADATA_START + count * SAMPLE.itemsize) // page) * page
        per_page = page // stored
        number = np.arange(count)
        pointers = first + number // per_page * page + number % per_page * stored
        table_at = int(pointers[-1]) + stored
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"], header["page_size"] = 2, 3, page
        header["num_samples"], header["alloc_table_ptr"] = count, table_at
        fields = np.zeros(3, FIELD)
        for field, (name, type_id) in zip(fields, FIELDS, strict=True):
            field["type_id"] = type_id
            field["name"][:len(name)] = np.frombuffer(name.encode(), np.uint8)
        metadata = np.zeros(count, SAMPLE)
        metadata["f0"]["width"], metadata["f0"]["height"] = 500, 375
        metadata["f0"]["data_ptr"], metadata["f1"] = pointers, number % 1000
        table = np.zeros(count, ALLOCATION)
        table["sample_id"], table["ptr"], table["size"] = number, pointers, stored
        file = root / "train" / f"shard-{index:05d}.beton"
        with open(file, "wb") as stream:
            for part in (header, fields, metadata):
                stream.write(part.tobytes())
            stream.seek(table_at)
            stream.write(table.tobytes())
        records.append({"file": f"train/{file.name}", "samples": count,
                        "bytes": file.stat().st_size, "sha256": "0" * 64})
    (root / "dataset.json").write_text(json.dumps({
        "format_version": 1, "name": "large", "classes": [str(i) for i in range(1000)],
        "splits": {"train": {"samples": samples, "shards": records}}, "encoding": {},
        "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": None, "pixel_mean_sha256": None,
        "source": {}}))


def test_imagenet_in_a_thousand_shards_opens_in_two_seconds_and_150_megabytes(tmp_path):
    write_large(tmp_path / "d", 1_281_167, 1000)
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path / "d")], capture_output=True,
                          text=True, timeout=120, check=True)
    samples, seconds, megabytes = json.loads(done.stdout)
    assert samples == 1_281_167
    assert seconds < 2
    assert megabytes < 150


FUZZ = """
import sys, json, numpy as np
from pathlib import Path
from resnet_dist.config.schema import AugmentConfig
from resnet_dist.data.loader import TrainLoader, DataError
from resnet_dist.data.decode import decoder
root, seed, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(seed)
file = root / "train" / "shard-00000.beton"
clean = file.read_bytes()
manifest = json.loads((root / "dataset.json").read_text())
augment = AugmentConfig(name="resize", size=32, flip=False)

def images():
    with TrainLoader(root, "train", augment, seed=0, batch_size=6, threads=1, prefetch=1) as loader:
        batch = next(iter(loader))
        return batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()

expected = images()
table = int(np.frombuffer(clean[:24], decoder.np.uint64)[2])
regions = [(0, 24), (24, 3200), (3200, 3340), (1 << 21, (1 << 21) + 60_000),
           (len(clean) - 6 * 24, len(clean))]
refused = same = 0
for case in range(cases):
    data = bytearray(clean)
    low, high = regions[case % len(regions)]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(low, min(high, len(data))))
        kind = int(rng.integers(0, 4))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at] = int(rng.integers(0, 256))
        elif kind == 2:
            data[at:at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()[:len(data[at:at + 8])]
        elif case % 7 == 0:
            del data[max(at, 1):]  # an empty shard cannot even be in a manifest
            break
    file.write_bytes(data)
    manifest["splits"]["train"]["shards"][0]["bytes"] = len(data)
    (root / "dataset.json").write_text(json.dumps(manifest))
    try:
        found = images()
    except DataError as error:
        assert "shard-00000.beton" in str(error), error
        refused += 1
        continue
    assert found == expected, f"case {case} of seed {seed}: wrong pixels without an error"
    same += 1
print(refused, same)
"""


def fuzz(tmp_path: Path, seed: int, cases: int) -> tuple[int, int]:
    samples = [(raw_sample if i == 0 else jpeg_sample)(i, i, 40 + i, 50) for i in range(6)]
    root = write_dataset(tmp_path / "d", {"train": [samples]})
    done = subprocess.run([sys.executable, "-c", FUZZ, str(root), str(seed), str(cases)],
                          capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, same = map(int, done.stdout.split())
    return refused, same


def test_fuzzed_shards_are_refused_or_read_exactly(tmp_path):
    refused, same = fuzz(tmp_path, 0, 80)
    assert refused > 30
    assert same > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_thousand_fuzzed_shards_are_refused_or_read_exactly(tmp_path):
    refused, same = fuzz(tmp_path, 1, 5000)
    assert refused > 1000
    assert same > 100
