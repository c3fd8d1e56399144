"""LitData, MosaicML Streaming and SPDL as rows of loader.py, each with the settings that its own documentation recommends."""

import random
from collections.abc import Iterator

from benchmarks.loader_images import BATCH_SIZE, DEVIATION, EPOCHS, MEAN, SIDE, SIZE, WORKERS, Images, augment
from benchmarks.loader_images import simplejpeg as simplejpeg_decoder

LITDATA_COPIES = 16  # it has no longer epoch than its data


def sample(path_and_label: tuple[str, int]) -> dict:
    """What LitData stores of an image: its file as it is, because Pillow has not decoded it."""
    from PIL import Image

    path, label = path_and_label
    return {"image": Image.open(path), "label": label}


def cropped(row: dict) -> tuple:
    return augment(row["image"]), row["label"]


def litdata(dataset: str, work: str) -> Iterator:
    """optimize() to chunks of 64 MB that keep the JPEGs as they are, StreamingDataset with shuffle and drop_last, decoded by its
    own serializer with torchvision, transform in persistent workers as many as cores (github.com/Lightning-AI/litData)."""
    import litdata

    folder = f"{work}/litdata"
    samples = Images(work, lambda: None).samples * LITDATA_COPIES
    litdata.optimize(sample, samples, folder, chunk_bytes="64MB", num_workers=WORKERS, verbose=False)
    options = {"batch_size": BATCH_SIZE, "num_workers": WORKERS, "persistent_workers": True}
    images = litdata.StreamingDataset(folder, shuffle=True, drop_last=True, transform=cropped)
    loader = litdata.StreamingDataLoader(images, **options)
    while True:
        for batch, _ in loader:
            yield batch


def streaming(dataset: str, work: str) -> Iterator:
    """MDS shards with column kind jpeg as its ImageNet writer makes them, decoded by Pillow, shuffle py1e, batch_size told to the
    dataset, else its defaults, which "Performance Tuning" recommends (docs.mosaicml.com/projects/streaming)."""
    from PIL import Image
    from streaming import MDSWriter, Stream, StreamingDataset
    from torch.utils.data import DataLoader

    class Crops(StreamingDataset):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return augment(row["x"].convert("RGB")), row["y"]

    folder = f"{work}/mds"
    with MDSWriter(out=folder, columns={"x": "jpeg", "y": "int"}) as writer:
        for path, label in Images(work, lambda: None).samples:
            writer.write({"x": Image.open(path), "y": label})
    images = Crops(streams=[Stream(local=folder, repeat=EPOCHS)], shuffle=True, batch_size=BATCH_SIZE)
    loader = DataLoader(images, BATCH_SIZE, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    while True:
        for batch, _ in loader:
            yield batch


class Shuffled:
    """The paths of the folder without end, each epoch in another order."""

    def __init__(self, work: str):
        self.paths = [path for path, _ in Images(work, lambda: None).samples]

    def __iter__(self) -> Iterator[str]:
        while True:
            yield from random.sample(self.paths, len(self.paths))


def threads_pipeline(work: str, operation) -> Iterator:
    """Batches of `operation`, as many at once as there are threads."""
    from spdl.pipeline import PipelineBuilder

    builder = PipelineBuilder().add_source(Shuffled(work)).aggregate(BATCH_SIZE, drop_last=True)
    pipeline = builder.pipe(operation, concurrency=WORKERS).add_sink(2 * WORKERS).build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from pipeline


def normalise(pixels):
    """uint8 (N, SIZE, SIZE, 3) to float32 (N, 3, SIZE, SIZE)."""
    import torch

    floats = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(DEVIATION)[:, None, None])


def spdl(dataset: str, work: str, dtype: str) -> Iterator:
    """Threads as many as cores, a batch in each as in its ImageNet example (github.com/facebookresearch/spdl, examples): demuxed,
    decoded, cropped and flipped by FFmpeg, frames converted into one array; uint8 is channels last."""
    import spdl.io

    try:
        spdl.io.demux_image(Shuffled(work).paths[0])
    except RuntimeError as error:
        raise ImportError(f"SPDL finds no FFmpeg whose libraries it can load ({str(error)[:60]} ...)") from error

    def batch(paths: list[str]):
        frames = []
        for path in paths:
            left, top = random.randint(0, SIDE - SIZE), random.randint(0, SIDE - SIZE)
            crop = f"crop={SIZE}:{SIZE}:{left}:{top}," + random.choice(("", "hflip,")) + "format=pix_fmts=rgb24"
            frames.append(spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=crop))
        pixels = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return normalise(pixels) if dtype == "float32" else pixels

    return threads_pipeline(work, batch)


def spdl_simplejpeg(dataset: str, work: str) -> Iterator:
    """The same threads, with the decoder and the augmentation of DataLoader's row in place of FFmpeg."""
    import torch

    decode = simplejpeg_decoder()

    def batch(paths: list[str]):
        return torch.stack([augment(decode(path)) for path in paths])

    return threads_pipeline(work, batch)
