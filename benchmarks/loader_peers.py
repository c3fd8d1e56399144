"""The rows of loader.py, this loader's and its peers': endless batches of random 224x224 crops, flipped at random.

    PYTHON -m benchmarks.loader_peers ROW DATASET WORK

runs one. Its first line of output says {"versions": ..., "how": ...}, or {"missing": ...} where a package is; then for each line
"go STEPS" that it reads it takes so many batches and says {"images": ..., "seconds": ...}. An epoch is made long where it would
be only 1,000 images, because ImageNet's is, and some pay for its beginning (FFCV with new buffers).
"""

import functools
import json
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.loader_ffcv import ffcv
from benchmarks.loader_images import (
    BATCH_SIZE,
    DEVIATION,
    EPOCHS,
    MEAN,
    SIZE,
    WARM_UP,
    WORKERS,
    Images,
    augment,
    pillow,
    simplejpeg,
    torchcodec,
)
from benchmarks.loader_streams import litdata, spdl, spdl_simplejpeg, streaming


def decode_only(dataset: str, work: str) -> Iterator:
    """libjpeg-turbo by DALI, whole images from memory, nothing else: the limit of all that decodes each time."""
    import torch

    from benchmarks.records import stacked
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.dataset.reader import RecordReader
    from imagefeed.pipeline.graph import GraphOptions, decode_pipeline

    manifest = Manifest.load(dataset)
    records = RecordReader(manifest, manifest.train_split)
    starts = range(0, len(records) - BATCH_SIZE + 1, BATCH_SIZE)
    kept = [stacked(records, start, BATCH_SIZE) for start in starts]
    options = GraphOptions(SIZE, num_threads=WORKERS)
    pipeline = decode_pipeline(lambda i: [kept[i % len(kept)]], BATCH_SIZE, options)
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images[0])[None]  # one image: what DALI decodes is not one array


def ours(dataset: str, work: str, **options) -> Iterator:
    """ImageLoader's defaults: global shuffle, exact order, checksums, for float32 the paper's colour jitter; cached is
    cache="host" from the second epoch on."""
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.pipeline.loader import ImageLoader

    manifest = Manifest.load(dataset)
    with ImageLoader(manifest, manifest.train_split, BATCH_SIZE, crop_size=SIZE, num_threads=WORKERS, **options) as loader:
        while True:
            for batch in loader:
                yield batch.images


def dali(dataset: str, work: str) -> Iterator:
    """fn.readers.tfrecord on imagefeed's shards with random_shuffle, then crop_mirror_normalize as in its ResNet-50 example
    (docs.nvidia.com/deeplearning/dali); buffer of 1,024 and queues of 2 are its defaults."""
    from nvidia.dali import fn, pipeline_def, tfrecord, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=WORKERS, device_id=None)
    def graph():
        read = fn.readers.tfrecord(
            path=sorted(map(str, Path(dataset).glob("train-*.tfrecord"))),
            index_path=sorted(map(str, Path(dataset).glob("train-*.idx"))),
            features={
                "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
                "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
            },
            random_shuffle=True,
        )
        images = fn.crop_mirror_normalize(
            fn.decoders.image(read["image/encoded"], device="cpu", output_type=types.RGB),
            crop=(SIZE, SIZE),
            crop_pos_x=fn.random.uniform(range=(0, 1)),
            crop_pos_y=fn.random.uniform(range=(0, 1)),
            mirror=fn.random.coin_flip(),
            mean=list(MEAN),
            std=list(DEVIATION),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return images, read["image/class/label"]

    for batch in DALIGenericIterator(graph(), ["images", "labels"], size=-1):  # -1: without end
        yield batch[0]["images"]


def data_loader(dataset: str, work: str, decoder) -> Iterator:
    """PyTorch's DataLoader over the JPEGs as files, a persistent worker for each core, shuffled; decoding, random crop and flip
    in Python (docs.pytorch.org, torch.utils.data)."""
    from torch.utils.data import DataLoader

    images = Images(work, decoder, augment, EPOCHS)
    options = {"num_workers": WORKERS, "persistent_workers": True, "drop_last": True}
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, **options)
    while True:
        for batch, _ in loader:
            yield batch


def web_dataset(dataset: str, work: str) -> Iterator:
    """Tar files, resampled, shuffled by a buffer of 1,000 before decoding by Pillow, WebLoader with workers as many as cores
    (github.com/webdataset/webdataset, README)."""
    import webdataset

    # Resampled shards have no end. They are shuffled before decoding, so that the buffer holds bytes, and DataLoader's own
    # collation makes the batches, in shared memory at once.
    shards = sorted(map(str, Path(work, "tars").glob("*.tar")))
    images = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    images = images.to_tuple("jpg", "cls").map_tuple(augment)
    for batch, _ in webdataset.WebLoader(images, batch_size=BATCH_SIZE, num_workers=WORKERS):
        yield batch


# Each with the packages whose versions count.
ROWS = {
    "decode only": (decode_only, ()),
    "float32": (ours, ()),
    "uint8": (functools.partial(ours, dtype="uint8"), ()),
    "float32, cached": (functools.partial(ours, cache="host"), ()),
    "uint8, cached": (functools.partial(ours, dtype="uint8", cache="host"), ()),
    "DALI": (dali, ()),
    "FFCV float32": (functools.partial(ffcv, dtype="float32"), ("ffcv", "numba")),
    "FFCV uint8": (functools.partial(ffcv, dtype="uint8"), ("ffcv", "numba")),
    "DataLoader, Pillow": (functools.partial(data_loader, decoder=pillow), ("torch", "pillow")),
    "DataLoader, simplejpeg": (functools.partial(data_loader, decoder=simplejpeg), ("torch", "simplejpeg")),
    "DataLoader, torchcodec": (functools.partial(data_loader, decoder=torchcodec), ("torch", "torchcodec")),
    "WebDataset": (web_dataset, ("webdataset", "pillow")),
    "LitData": (litdata, ("litdata", "torchvision")),
    "Streaming": (streaming, ("mosaicml-streaming", "pillow")),
    "SPDL float32": (functools.partial(spdl, dtype="float32"), ("spdl-io",)),
    "SPDL uint8": (functools.partial(spdl, dtype="uint8"), ("spdl-io",)),
    "SPDL, simplejpeg": (spdl_simplejpeg, ("spdl", "simplejpeg")),
}


def main() -> None:
    name, dataset, work = sys.argv[1:4]
    row, packages = ROWS[name]
    try:
        batches = row(dataset, work)
        shape = tuple(next(batches).shape)
        versions = {package: metadata.version(package) for package in packages}
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    crops = {(BATCH_SIZE, 3, SIZE, SIZE), (BATCH_SIZE, SIZE, SIZE, 3)}
    assert shape in crops or name == "decode only", f"{name} gives {shape}"
    how = " ".join(getattr(row, "func", row).__doc__.split())
    print(json.dumps({"versions": versions, "how": how}), flush=True)
    for line in sys.stdin:
        steps = int(line.split()[1])
        for _ in range(WARM_UP):
            next(batches)
        start_s = time.perf_counter()
        for _ in range(steps):
            next(batches)[:, 0, 0, 0].sum().item()  # a pixel of each image: the batch is really there
        seconds = time.perf_counter() - start_s
        print(json.dumps({"images": steps * BATCH_SIZE, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
