"""The rows of loader.py, this loader's and its peers': endless batches of random 224x224 crops, flipped at random.

    PYTHON -m benchmarks.loader_peers ROW DATASET WORK OPTIONS

runs one as a worker of the harness; OPTIONS are those of the rows that decode with DALI. Epochs are made as long as ImageNet's
rather than 1,000 images, because some peers pay for the beginning of an epoch (FFCV allocates new buffers). Each peer runs with
the settings that its own documentation recommends; the docstring of a row is shown on the page.
"""

import functools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from benchmarks.harness import serve

BATCH_SIZE, SIDE, CROP_SIZE, WORKERS = 128, 256, 224, 2
WARM_UP = 8  # batches before the clock starts: more than any row prepares ahead while it is not measured
EPOCHS = 64  # of 1,000 images, in a long epoch
LITDATA_COPIES = 16  # LitData's epoch is as long as its data
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB, 0-255


class Images:
    """The folder of JPEGs as a dataset of decoded, and transformed, images with their labels."""

    def __init__(self, work: str, decode=None, transform=lambda image: image, epochs: int = 1):
        paths = sorted(Path(work, "jpegs").glob("*/*.jpg"))
        self.samples = [(str(path), int(path.parent.name)) for path in paths] * epochs
        self.decode, self.transform = decode, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple:
        path, label = self.samples[number]
        return self.transform(self.decode(path)), label


def pillow():
    import PIL
    from PIL import Image

    if "post" in PIL.__version__:
        raise ImportError("this is Pillow-SIMD; give --peers a Python with plain Pillow")
    return lambda path: Image.open(path).convert("RGB")


def simplejpeg():
    from simplejpeg import decode_jpeg

    return lambda path: decode_jpeg(Path(path).read_bytes(), "RGB")


def torchcodec():
    try:
        from torchcodec.decoders import decode_jpeg
    except OSError as error:  # its wheel is built for CUDA, which a CPU build of torch cannot load
        raise ImportError(f"torchcodec: {error}") from error
    return lambda path: decode_jpeg(Path(path).read_bytes())


def augment(image):
    """What torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize do, on whatever the decoder returns."""
    import numpy as np
    import torch

    pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)
    top, left = random.randint(0, SIDE - CROP_SIZE), random.randint(0, SIDE - CROP_SIZE)
    crop = pixels[:, top : top + CROP_SIZE, left : left + CROP_SIZE]
    return normalize(crop.flip(-1) if random.random() < 0.5 else crop)


def normalize(pixels):
    import torch

    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def firsts(loader) -> Iterator:
    """The images of a loader's batches, epoch after epoch."""
    while True:
        for batch in loader:
            yield batch[0]


def torch_loader(images, **options) -> Iterator:
    from torch.utils.data import DataLoader

    return firsts(DataLoader(images, BATCH_SIZE, num_workers=WORKERS, persistent_workers=True, drop_last=True, **options))


def decode_only(dataset: str, work: str, device: str, batch_size: int, **options) -> Iterator:
    """The decoder alone, by DALI, on whole images from memory: the limit of everything that decodes each image."""
    import torch

    from benchmarks.data import jpeg_batches
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.pipeline.graph import GraphOptions, decode_pipeline

    kept = jpeg_batches(Manifest.load(dataset), batch_size, 8)
    graph = GraphOptions(device_id=0 if device == "cuda" else None, **options)
    pipeline = decode_pipeline(lambda i: [kept[i % len(kept)]], batch_size, graph)
    while True:
        (images,) = pipeline.run()
        yield torch.from_dlpack(images[0])[None]  # one image: what DALI decodes is not one array


def simplejpeg_only(dataset: str, work: str, batch_size: int, num_threads: int, **_) -> Iterator:
    """libjpeg-turbo by simplejpeg in threads as many as cores, on whole images from memory."""
    import torch
    from simplejpeg import decode_jpeg

    from benchmarks.data import jpeg_batches
    from imagefeed.dataset.manifest import Manifest

    kept = jpeg_batches(Manifest.load(dataset), batch_size, 8)
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            for jpegs in kept:
                first, *_ = pool.map(lambda jpeg: decode_jpeg(jpeg.data, "RGB"), jpegs)
                yield torch.from_numpy(first)[None]


def ours(dataset: str, work: str, **options) -> Iterator:
    """ImageLoader's defaults: global shuffle, exact order, checksums, for float32 PCA jitter; cached is cache="host" from the
    second epoch on."""
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.pipeline.loader import ImageLoader

    manifest = Manifest.load(dataset)
    with ImageLoader(manifest, manifest.train_split, **options) as loader:
        yield from firsts(loader)


def dali(
    dataset: str,
    work: str,
    device: str,
    batch_size: int,
    crop_size: int,
    num_threads: int,
    prefetch: int = 2,
    hw_decoder_load=0.65,
) -> Iterator:
    """fn.readers.tfrecord on imagefeed's shards with random_shuffle, then crop_mirror_normalize as in its ResNet-50 example
    (docs.nvidia.com/deeplearning/dali); buffer of 1,024 and queues of 2 are its defaults."""
    from nvidia.dali import fn, pipeline_def, tfrecord, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    cuda = device == "cuda"
    decoder = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if cuda else {"device": "cpu"}
    features = {
        "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
        "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
    }
    shards, indexes = (sorted(map(str, Path(dataset).glob(f"train-*.{ext}"))) for ext in ("tfrecord", "idx"))

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=0 if cuda else None, prefetch_queue_depth=prefetch)
    def graph():
        read = fn.readers.tfrecord(path=shards, index_path=indexes, features=features, random_shuffle=True)
        images = fn.crop_mirror_normalize(
            fn.decoders.image(read["image/encoded"], output_type=types.RGB, **decoder),
            crop=(crop_size, crop_size), crop_pos_x=fn.random.uniform(range=(0, 1)), crop_pos_y=fn.random.uniform(range=(0, 1)),
            mirror=fn.random.coin_flip(), mean=list(MEAN), std=list(STD), dtype=types.FLOAT, output_layout="CHW",
        )  # fmt: skip
        return images, read["image/class/label"]

    for batch in DALIGenericIterator(graph(), ["images", "labels"], size=-1):  # -1: without end
        yield batch[0]["images"]


def ffcv(dataset: str, work: str, dtype: str) -> Iterator:
    """Mode jpg of quality 90 made of the same pixels, OrderOption.RANDOM and os_cache=True as its performance guide says where
    data fits into memory (docs.ffcv.io), workers as many as cores, compiled crops; channels last."""
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
        """FFCV's own random crop rescales."""

        def generate_code(self):
            each = Compiler.get_iterator()

            def crop(images, out):
                places = np.random.randint(0, SIDE - CROP_SIZE + 1, (len(images), 2))
                for i in each(len(images)):
                    top, left = places[i]
                    out[i] = images[i, top : top + CROP_SIZE, left : left + CROP_SIZE]
                return out

            crop.is_parallel = True
            return crop

        def declare_state_and_memory(self, previous):
            shape = (CROP_SIZE, CROP_SIZE, 3)
            return replace(previous, shape=shape, jit_mode=True), AllocationQuery(shape, previous.dtype)

    beton = f"{work}/{dtype}.beton"
    images = Images(work, pillow())
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(beton, fields, num_workers=WORKERS).from_indexed_dataset(images)
    floats = [NormalizeImage(np.array(MEAN), np.array(STD), np.float32)] if dtype == "float32" else []
    crops = [SimpleRGBImageDecoder(), RandomCrop(), RandomHorizontalFlip(), *floats, ToTensor(), ToTorchImage()]
    options = {"order": OrderOption.RANDOM, "indices": np.tile(np.arange(len(images), dtype=np.uint64), EPOCHS)}
    pipelines = {"image": crops, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    return firsts(Loader(beton, BATCH_SIZE, num_workers=WORKERS, os_cache=True, pipelines=pipelines, **options))


def data_loader(dataset: str, work: str, decoder) -> Iterator:
    """PyTorch's DataLoader over the JPEGs as files, a persistent worker for each core, shuffled; decoding, random crop and flip
    in Python (docs.pytorch.org, torch.utils.data)."""
    return torch_loader(Images(work, decoder(), augment, EPOCHS), shuffle=True)


def web_dataset(dataset: str, work: str) -> Iterator:
    """Tar files, resampled, shuffled by a buffer of 1,000 before decoding by Pillow, WebLoader with workers as many as cores
    (github.com/webdataset/webdataset, README)."""
    import webdataset

    # Resampled shards have no end. They are shuffled before decoding, so that the buffer holds bytes, and DataLoader's own
    # collation puts the batches into shared memory at once.
    shards = sorted(map(str, Path(work, "tars").glob("*.tar")))
    images = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    images = images.to_tuple("jpg", "cls").map_tuple(augment)
    return firsts(webdataset.WebLoader(images, batch_size=BATCH_SIZE, num_workers=WORKERS))


def opened(path_and_label: tuple[str, int]) -> dict:
    """LitData and Streaming store the file as it is, because Pillow has not decoded it."""
    from PIL import Image

    return {"x": Image.open(path_and_label[0]), "y": path_and_label[1]}


def litdata_crop(row: dict) -> tuple:
    return augment(row["x"]), row["y"]


def litdata(dataset: str, work: str) -> Iterator:
    """optimize() to chunks of 64 MB that keep the JPEGs as they are, StreamingDataset with shuffle and drop_last, decoded by its
    own serializer with torchvision, transform in persistent workers as many as cores (github.com/Lightning-AI/litData)."""
    import litdata

    samples, folder = Images(work).samples * LITDATA_COPIES, f"{work}/litdata"
    litdata.optimize(opened, samples, folder, chunk_bytes="64MB", num_workers=WORKERS, verbose=False)
    images = litdata.StreamingDataset(folder, shuffle=True, drop_last=True, transform=litdata_crop)
    return firsts(litdata.StreamingDataLoader(images, batch_size=BATCH_SIZE, num_workers=WORKERS, persistent_workers=True))


def streaming(dataset: str, work: str) -> Iterator:
    """MDS shards with column kind jpeg as its ImageNet writer makes them, decoded by Pillow, shuffle py1e, batch_size told to the
    dataset, else its defaults, which "Performance Tuning" recommends (docs.mosaicml.com/projects/streaming)."""
    from streaming import MDSWriter, Stream, StreamingDataset

    class Crops(StreamingDataset):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return augment(row["x"].convert("RGB")), row["y"]

    with MDSWriter(out=f"{work}/mds", columns={"x": "jpeg", "y": "int"}) as writer:
        for sample in Images(work).samples:
            writer.write(opened(sample))
    return torch_loader(Crops(streams=[Stream(local=f"{work}/mds", repeat=EPOCHS)], shuffle=True, batch_size=BATCH_SIZE))


class Shuffled:
    """The paths of the folder without end, each epoch in another order."""

    def __init__(self, work: str):
        self.paths = [path for path, _ in Images(work).samples]

    def __iter__(self) -> Iterator[str]:
        while True:
            yield from random.sample(self.paths, len(self.paths))


def spdl_threads(work: str, make_batch) -> Iterator:
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(Shuffled(work)).aggregate(BATCH_SIZE, drop_last=True)
    pipeline = builder.pipe(make_batch, concurrency=WORKERS).add_sink(2 * WORKERS).build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from pipeline


def spdl(dataset: str, work: str, dtype: str) -> Iterator:
    """Threads as many as cores, a batch in each as in its ImageNet example (github.com/facebookresearch/spdl, examples): demuxed,
    decoded, cropped and flipped by FFmpeg, frames converted into one array; uint8 is channels last."""
    import spdl.io

    try:
        spdl.io.demux_image(Images(work).samples[0][0])
    except RuntimeError as error:
        raise ImportError(f"SPDL finds no FFmpeg whose libraries it can load ({str(error)[:60]} ...)") from error

    def batch(paths: list[str]):
        frames = []
        for path in paths:
            left, top = random.randint(0, SIDE - CROP_SIZE), random.randint(0, SIDE - CROP_SIZE)
            crop = f"crop={CROP_SIZE}:{CROP_SIZE}:{left}:{top}," + random.choice(("", "hflip,")) + "format=pix_fmts=rgb24"
            frames.append(spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=crop))
        pixels = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return normalize(pixels.permute(0, 3, 1, 2)) if dtype == "float32" else pixels

    return spdl_threads(work, batch)


def spdl_simplejpeg(dataset: str, work: str) -> Iterator:
    """The same threads, with the decoder and the augmentation of DataLoader's row in place of FFmpeg."""
    import torch

    decode = simplejpeg()
    return spdl_threads(work, lambda paths: torch.stack([augment(decode(path)) for path in paths]))


def row(function, *packages: str, **options) -> tuple:
    """A row, and the packages whose versions count."""
    return functools.partial(function, **options), packages


def group_usage() -> dict[str, float]:
    """Seconds of processors that this process group has taken, and megabytes that it holds without mapped files, of which the
    system takes back what it needs."""
    ticks = held_kb = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == os.getpgrp():
                ticks += int(fields[11]) + int(fields[12])
                memory = dict(line.split()[:2] for line in (process / "smaps_rollup").read_text().splitlines()[1:])
                held_kb += int(memory["Pss_Anon:"]) + int(memory["Pss_Shmem:"])
        except OSError:
            continue  # another process, which has just ended
    return {"cpu_s": ticks / os.sysconf("SC_CLK_TCK"), "memory_mb": held_kb / 1e3}


SHARED = {"decode only": row(decode_only), "float32": row(ours), "uint8": row(ours, dtype="uint8")}
TYPES = ("float32", "uint8")
OURS = SHARED | {
    **{f"{dtype}, channels last": row(ours, dtype=dtype, memory_format="channels_last") for dtype in TYPES},
    **{f"{dtype}, --decoder dali": row(ours, dtype=dtype, decoder="dali") for dtype in TYPES},
    **{f"{dtype}, cached": row(ours, dtype=dtype, cache="host") for dtype in TYPES},
    **{
        f"float32, RandomResizedCrop{how}": row(ours, random_resized_crop=True, **options)
        for how, options in {"": {}, ", --decoder dali": {"decoder": "dali"}, ", cached": {"cache": "host"}}.items()
    },
    "decode only, simplejpeg": row(simplejpeg_only, "simplejpeg"),
    "DALI": row(dali),
}
OURS_CUDA = SHARED | {
    **{f"{dtype}, channels last": row(ours, dtype=dtype, memory_format="channels_last") for dtype in ("bfloat16", "float16")},
    **{f"float32, {how}": row(ours) for how in ("DALI's defaults", "batch 128", "batch 256", "batch 1024")},
    **{f"DALI, {how}": row(dali) for how in ("its defaults", "tuned settings")},
    "float32, no PCA jitter": row(ours, pca_jitter=0.0),
}
ROWS = OURS | {
    **{f"FFCV {dtype}": row(ffcv, "ffcv", "numba", dtype=dtype) for dtype in TYPES},
    "DataLoader, Pillow": row(data_loader, "torch", "pillow", decoder=pillow),
    "DataLoader, simplejpeg": row(data_loader, "torch", "simplejpeg", decoder=simplejpeg),
    "DataLoader, torchcodec": row(data_loader, "torch", "torchcodec", decoder=torchcodec),
    "WebDataset": row(web_dataset, "webdataset", "pillow"),
    "LitData": row(litdata, "litdata", "torchvision"),
    "Streaming": row(streaming, "mosaicml-streaming", "pillow"),
    **{f"SPDL {dtype}": row(spdl, "spdl-io", dtype=dtype) for dtype in TYPES},
    "SPDL, simplejpeg": row(spdl_simplejpeg, "spdl", "simplejpeg"),
}


def main() -> None:
    name, dataset, work, options = sys.argv[1:5]
    options = json.loads(options)
    batch_size, side = options["batch_size"], options["crop_size"]
    make, packages = (ROWS | OURS_CUDA)[name]
    try:
        batches = make(dataset, work, **options if name in OURS or name in OURS_CUDA else {})
        shape = tuple(next(batches).shape)
        versions = {package: metadata.version(package) for package in packages}
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    known = {(batch_size, 3, side, side), (batch_size, side, side, 3)}
    assert shape in known or name.startswith("decode only"), f"{name} gives {shape}"

    def measure(steps: int) -> dict:
        for _ in range(WARM_UP):
            next(batches)
        before, start_s, caller_s = group_usage(), time.perf_counter(), time.thread_time()
        for _ in range(steps):
            next(batches)[:, 0, 0, 0].sum().item()  # a pixel of each image: the batch is really there
        seconds, caller_s, after = time.perf_counter() - start_s, time.thread_time() - caller_s, group_usage()
        used = {"cpu_s": after["cpu_s"] - before["cpu_s"], "caller_s": caller_s, "memory_mb": after["memory_mb"]}
        return {"images": steps * batch_size, "seconds": seconds, **used}

    serve({"versions": versions, "how": " ".join(make.func.__doc__.split())}, measure)


if __name__ == "__main__":
    main()
