"""The rows of loader.py, this loader's and its peers': endless batches of random 224x224 crops, flipped at random.

    PYTHON -m benchmarks.loader_peers ROW DATASET WORK

runs one. Its first line of output says {"versions": ...}, or {"missing": ...} where a package is; then for each line "go STEPS"
that it reads it takes so many batches and says {"images": ..., "seconds": ...}. An epoch is made long where it would be only
1,000 images, because ImageNet's is, and some pay for its beginning (FFCV with new buffers).
"""

import functools
import json
import random
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

BATCH_SIZE = 128
SIDE, SIZE = 256, 224
WORKERS = 2
WARM_UP = 8  # batches before the clock starts, more than any row prepares ahead: those were made while nobody took them
EPOCHS = 64  # a long epoch is so many of 1,000 images
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB, 0-255


def decode_only(dataset: str, work: str) -> Iterator:
    """Yields one whole image, not a batch: what DALI decodes is not one array."""
    import torch

    from pipeline.dataset import ShardedDataset
    from pipeline.graph import GraphOptions, decode_pipeline
    from preprocess.manifest import Manifest

    manifest = Manifest.load(dataset)
    records = ShardedDataset(manifest, manifest.train_split)
    starts = range(0, len(records) - BATCH_SIZE + 1, BATCH_SIZE)
    kept = [[records.jpeg(start + n) for n in range(BATCH_SIZE)] for start in starts]
    options = GraphOptions(SIZE, num_threads=WORKERS)
    pipeline = decode_pipeline(lambda i: [kept[i % len(kept)]], BATCH_SIZE, options)
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images[0])[None]


def ours(dataset: str, work: str, **options) -> Iterator:
    from pipeline import ImageLoader
    from preprocess.manifest import Manifest

    manifest = Manifest.load(dataset)
    with ImageLoader(manifest, manifest.train_split, BATCH_SIZE, size=SIZE, num_threads=WORKERS, **options) as loader:
        while True:
            for batch in loader:
                yield batch.images


def dali(dataset: str, work: str) -> Iterator:
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


def ffcv(dataset: str, work: str, dtype: str) -> Iterator:
    from dataclasses import replace

    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    class RandomCrop(Operation):
        """FFCV has none that does not rescale."""

        def generate_code(self):
            each = Compiler.get_iterator()

            def crop(images, out):
                places = np.random.randint(0, SIDE - SIZE + 1, (len(images), 2))
                for i in each(len(images)):
                    top, left = places[i]
                    out[i] = images[i, top : top + SIZE, left : left + SIZE]
                return out

            crop.is_parallel = True
            return crop

        def declare_state_and_memory(self, previous):
            shape = (SIZE, SIZE, 3)
            return replace(previous, shape=shape, jit_mode=True), AllocationQuery(shape, previous.dtype)

    beton = f"{work}/{dtype}.beton"
    images = Images(work, pillow)
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(beton, fields, num_workers=WORKERS).from_indexed_dataset(images)
    normalize = [NormalizeImage(np.array(MEAN), np.array(DEVIATION), np.float32)] if dtype == "float32" else []
    crops = [SimpleRGBImageDecoder(), RandomCrop(), RandomHorizontalFlip(), *normalize, ToTensor(), ToTorchImage()]
    loader = Loader(
        beton,
        BATCH_SIZE,
        num_workers=WORKERS,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(len(images), dtype=np.uint64), EPOCHS),
        pipelines={"image": crops, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    while True:
        for batch in loader:
            yield batch[0]


class Images:
    """The folder as a data set: images as they are decoded, or what `transform` makes of them, and labels."""

    def __init__(self, work: str, decoder, transform=None, epochs: int = 1):
        paths = sorted(Path(work, "jpegs").glob("*/*.jpg"))
        self.samples = [(str(path), int(path.parent.name)) for path in paths] * epochs
        self.decode = decoder()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple:
        path, label = self.samples[number]
        image = self.decode(path)
        return (self.transform(image) if self.transform else image), label


def pillow():
    import PIL
    from PIL import Image

    if "post" in PIL.__version__:
        raise ImportError("this is Pillow-SIMD, give --peers a Python with plain Pillow")
    return lambda path: Image.open(path).convert("RGB")


def simplejpeg():
    from simplejpeg import decode_jpeg

    return lambda path: decode_jpeg(read(path), "RGB")


def torchcodec():
    try:
        from torchcodec.decoders import decode_jpeg
    except OSError as error:  # its wheel is CUDA's, which the CPU's torch cannot load
        raise ImportError(f"torchcodec: {error}") from error
    return lambda path: decode_jpeg(read(path))


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def augment(image):
    """What torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize do, on whatever the decoder gives."""
    import numpy as np
    import torch

    top, left = random.randint(0, SIDE - SIZE), random.randint(0, SIDE - SIZE)
    if isinstance(image, torch.Tensor):  # (3, SIDE, SIDE)
        pixels = image[:, top : top + SIZE, left : left + SIZE]
    else:
        crop = np.asarray(image)[top : top + SIZE, left : left + SIZE]
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    if random.random() < 0.5:
        pixels = pixels.flip(-1)
    pixels = pixels.contiguous().to(torch.float32)
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(DEVIATION)[:, None, None])


def data_loader(dataset: str, work: str, decoder) -> Iterator:
    from torch.utils.data import DataLoader

    images = Images(work, decoder, augment, EPOCHS)
    options = {"num_workers": WORKERS, "persistent_workers": True, "drop_last": True}
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, **options)
    while True:
        for batch, _ in loader:
            yield batch


def web_dataset(dataset: str, work: str) -> Iterator:
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
}


def main() -> None:
    name, dataset, work = sys.argv[1:4]
    row, packages = ROWS[name]
    batches = row(dataset, work)
    try:
        shape = tuple(next(batches).shape)
        versions = {package: metadata.version(package) for package in packages}
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    crops = {(BATCH_SIZE, 3, SIZE, SIZE), (BATCH_SIZE, SIZE, SIZE, 3)}
    assert shape in crops or name == "decode only", f"{name} gives {shape}"
    print(json.dumps({"versions": versions}), flush=True)
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
