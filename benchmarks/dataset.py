"""How fast is `dataset[i]` in a DataLoader, beside Pillow's own decoding and torchvision's ImageFolder?

    python -m benchmarks.dataset DATASET RAW [--rounds 5]

RAW holds the images that DATASET was packed from, in class folders. Each row is a map-style dataset of PIL images and labels in a
DataLoader with two workers that keep the images: "Dataset"; "Pillow", which decodes the same JPEGs from memory; "ImageFolder",
which reads and decodes the files of RAW as torchvision does. "decode only" is Pillow's decoding of the same batches in a loop.
Rates are images per second of the workers' CPU time, times two: other programs on the machine change them little.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import harness
from imagefeed.dataset.reader import Dataset
from imagefeed.preprocess.sources.suffixes import IMAGES, suffix

WORKERS = 2
BATCH_SIZE = 64


class Pillow:
    """The JPEGs of a dataset in memory, decoded by Pillow."""

    def __init__(self, dataset: Dataset):
        self.jpegs = [dataset.jpeg(number).tobytes() for number in range(len(dataset))]
        self.labels = dataset.targets

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        image = Image.open(io.BytesIO(self.jpegs[number]))
        image.load()
        return image, self.labels[number]


class ImageFolder:
    """What torchvision.datasets.ImageFolder does for an image (its `pil_loader`); torchvision itself does not load beside every
    build of torch."""

    def __init__(self, raw: Path):
        self.samples = [(path, 0) for path in sorted(raw.rglob("*")) if suffix(path.name) in IMAGES]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        path, label = self.samples[number]
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB"), label


def labels_only(samples: list) -> list[int]:
    return [label for _, label in samples]


def cpu_s(processes: list) -> float:
    """The CPU time that the processes took so far (proc(5), schedstat)."""
    return sum(int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) for process in processes) / 1e9


def in_workers(dataset: Dataset | Pillow | ImageFolder) -> Callable[[], float]:
    """Measures an epoch in a random order, in workers that stay."""
    torch.manual_seed(0)
    loader: DataLoader = DataLoader(
        dataset,  # type: ignore[arg-type]
        BATCH_SIZE,
        shuffle=True,
        num_workers=WORKERS,
        collate_fn=labels_only,
        persistent_workers=True,
    )
    workers = iter(loader)._workers  # type: ignore[attr-defined]

    def measure() -> float:
        start_s = cpu_s(workers)
        images = sum(map(len, loader))
        return WORKERS * images / (cpu_s(workers) - start_s)

    return measure


def in_a_loop(dataset: Pillow) -> float:
    order = torch.randperm(len(dataset)).tolist()
    start_s = time.process_time()
    for start in range(0, len(order), BATCH_SIZE):
        labels_only([dataset[number] for number in order[start : start + BATCH_SIZE]])
    return WORKERS * len(dataset) / (time.process_time() - start_s)


@click.command()
@harness.DATASET
@harness.RAW
@harness.rounds_option(5)
def main(dataset: Path, raw: Path, rounds: int) -> None:
    """Time the training split of DATASET beside the files of RAW."""
    manifest = Dataset(dataset, "train").manifest
    packed = Dataset(manifest, manifest.train_split)
    memory, files = Pillow(packed), ImageFolder(raw)
    ways = {"Dataset": in_workers(packed), "Pillow": in_workers(memory), "ImageFolder": in_workers(files)}
    rates = harness.interleave(ways | {"decode only": lambda: in_a_loop(memory)}, rounds)
    result = {"images": len(packed), "raw_images": len(files), "workers": WORKERS, "batch_size": BATCH_SIZE, "rounds": rounds}
    result["rates"] = f"images per second of the workers' CPU time, times {WORKERS}"
    package = "pillow-simd" if "post" in Image.__version__ else "pillow"
    harness.save("dataset", result | harness.compared(rates, ("Dataset",)), "torch", package)


if __name__ == "__main__":
    main()
