"""Small datasets for the tests, packed as `build` packs them, of pictures that no test can confuse."""

import io
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as train.py, before torch loads

import torch
from PIL import Image

from imagefeed.dataset.files import hash_file
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split
from imagefeed.dataset.records import INDEX_DTYPE, NO_LABEL, Record, ShardWriter, shard_name
from imagefeed.dataset.storage import Url
from imagefeed.preprocess.image import decode_planes
from imagefeed.preprocess.statistics import PixelSums
from tests.dataset.store_server import StoreServer

CLASSES = ("ant", "bee", "cat")

# A shell without job control has what it runs in the background ignore Ctrl-C, and programs started by the tests inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, longest first: begun last, one of them would keep a process busy while the others are done.
SLOW = """training/test_loop training/test_export training/test_resume pipeline/test_loader test_package test_gpu
    training/test_cli training/test_torchrun pipeline/tuner/test_tune training/test_measuring preprocess/test_build
    preprocess/test_verify preprocess/test_ray test_benchmarks test_gpu_bench preprocess/test_stale""".split()


def pytest_collection_modifyitems(items):
    files = [str(Path(__file__).parent / f"{name}.py") for name in SLOW]
    items.sort(key=lambda item: files.index(str(item.path)) if str(item.path) in files else len(files))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def picture(seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    """A (height, width, 3) picture of soft blots, another one for each seed."""
    blots = np.random.RandomState(seed).randint(0, 256, (12, 12, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def pack(
    root: Path,
    splits: dict[str, list[bytes]],
    shards: int = 2,
    fit: str = "crop",
    size: int = 256,
    unlabeled: str = "",
    classes: tuple[str, ...] = CLASSES,
) -> Manifest:
    """Packs JPEGs into a dataset; record n of a split is its JPEG n, with label n modulo the classes, or none in split
    `unlabeled`."""
    root.mkdir()
    sums = PixelSums(size)
    packed = {}
    for split, jpegs in splits.items():
        written, rows = [], []
        for number, ids in enumerate(np.array_split(np.arange(len(jpegs)), shards)):
            with ShardWriter(root / shard_name(split, number, shards), number) as writer:
                for n in ids:
                    planes = decode_planes(jpegs[n], size, crop=False)
                    label = int(n) % len(classes) if split != unlabeled else NO_LABEL
                    class_name = classes[label] if label != NO_LABEL else ""
                    writer.append(Record(jpegs[n], label, class_name, f"{n}.jpg", *planes.y.shape))
                    if split == next((name for name in ("train", "training") if name in splits), next(iter(splits))):
                        sums.add(planes)
            written.append(Shard(writer.path.name, len(ids), writer.bytes_written, writer.sha256))
            rows += writer.rows
        index = np.array(rows, INDEX_DTYPE)
        np.save(root / f"{split}.index.npy", index)
        counts = np.bincount(index["label"][index["label"] != NO_LABEL], minlength=len(classes))
        packed[split] = Split(tuple(written), tuple(counts.tolist()))
    np.savez(root / STATISTICS, **sums.statistics())
    files = {path.name: hash_file(path) for path in sorted(root.iterdir()) if path.suffix != ".tfrecord"}
    Manifest(root, classes, packed, {"size": size, "fit": fit, "quality": 90}, {}, files=files).save()
    return Manifest.load(root)


def replace_index(manifest: Manifest, split: str, index: np.ndarray) -> None:
    """Writes another index as if build had written it, so that its hash is right."""
    np.save(manifest.index_path(split), index)
    manifest.files[manifest.index_path(split).name] = hash_file(manifest.index_path(split))
    manifest.save()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Manifest:
    """50 train and 23 val records of 256x256 in two shards each; not to be changed."""
    splits = {"train": range(50), "val": range(100, 123)}
    jpegs = {split: [jpeg(picture(seed)) for seed in seeds] for split, seeds in splits.items()}
    return pack(tmp_path_factory.mktemp("tiny") / "data", jpegs)


@pytest.fixture
def tiny_copy(tiny, tmp_path) -> Manifest:
    """The same, to be changed."""
    return Manifest.load(shutil.copytree(tiny.root, tmp_path / "data"))


@pytest.fixture
def store_server(tmp_path, monkeypatch) -> Iterator[StoreServer]:
    """A store of our own on this machine, to which s3:// URLs lead, with limits of seconds."""
    (tmp_path / "store").mkdir()
    with StoreServer(tmp_path / "store") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("IMAGEFEED_STORE_TIMEOUT", "5")
        monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", "10")
        yield server


@pytest.fixture
def bucket(store_server) -> str:
    """The name of a bucket in it: a folder of another name in each test, because a process opens a bucket once."""
    name = f"b{secrets.token_hex(6)}"
    (store_server.folder / name).mkdir()
    return name


@pytest.fixture
def s3(store_server, stored) -> Url:
    """The URL of a file or folder in a bucket, `stored`, which is a fixture of the test's module."""
    return Url(f"s3://{stored.relative_to(store_server.folder)}")


@pytest.fixture(params=["s3", "http"])
def url(request, store_server, s3) -> Url:
    """The same, and that by which a plain web server gives it."""
    return s3 if request.param == "s3" else Url(f"{store_server.url}/{str(s3)[5:]}")


@pytest.fixture(scope="session")
def oblong(tmp_path_factory) -> Manifest:
    """Records as of --fit short: the shorter side 256, the other up to 400, so that the room differs and may be odd."""
    shapes = [(256, 256), (256, 257), (400, 256), (256, 331), (299, 256)] * 4
    jpegs = [jpeg(picture(seed, *shape)) for seed, shape in enumerate(shapes)]
    return pack(tmp_path_factory.mktemp("oblong") / "data", {"train": jpegs, "val": jpegs[::-1]}, fit="short")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def crop(data: bytes, row: int, column: int, mirror: int, size: int = 224) -> np.ndarray:
    """What the pipeline has to show, by Pillow and numpy: float32 (3, size, size), pixels 0-255."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)[row : row + size, column : column + size]
    return (pixels[:, ::-1] if mirror else pixels).transpose(2, 0, 1).astype(np.float32)


LUMA = np.array([0.299, 0.587, 0.114])
BLOCK = 8


def same(images, expected) -> bool:
    """Equal but for what JPEG decoders differ in: rounding, and the pixels that they put between those of chroma.

    A GPU's decoder repeats chroma where libjpeg-turbo interpolates. On these pictures that moves single pixels by 20 gray levels
    and colors by 3 on average, but luma by 0.25 on average, by 0.5 in the worst block of 8x8, and a channel's mean by 0.1; one
    pixel of offset moves luma by 1.5 on average and by 4 in some block. `test_other_pictures_are_told_apart` shows what this
    tells apart. The first axis of three is color.
    """
    if tuple(images.shape) != tuple(expected.shape):
        return False
    difference = np.asarray(images, np.float64) - np.asarray(expected, np.float64)
    luma = np.tensordot(LUMA, difference, 1) if len(difference) == 3 else difference
    height, width = (side // BLOCK * BLOCK for side in luma.shape)
    blocks = luma[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((1, 3))
    means = np.abs(difference.mean((-2, -1)))
    return means.max() < 0.5 and np.abs(luma).mean() < 0.5 and np.abs(blocks).max() < 1 and np.abs(difference).mean() < 5
