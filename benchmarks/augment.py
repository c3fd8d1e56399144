"""How fast is augmentation on a CPU, beside torchvision.transforms.v2?

    python -m benchmarks.augment DATASET [--rounds 7]      # results under "augment"

Crops of DATASET's training images, as bytes, become a batch of pixels less their mean. Each image is changed by RandAugment with
draws of its own, and pairs of images by mixup. torchvision's second row gives a whole batch to RandAugment at once, so that all
of its images go through the same operations. One thread; images per second of CPU time.
"""

import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch

from benchmarks import harness
from imagefeed.pipeline.augment import AugmentedBatches, AugmentOptions
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.operations import KINDS, make_operations, strengths
from imagefeed.pipeline.source import InputBatch

BATCH_SIZE, CROP_SIZE, BATCHES, STRENGTH = 128, 224, 4, 9
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
OURS, PER_IMAGE, PER_BATCH = "imagefeed", "torchvision, per image", "torchvision, per batch"


class Crops(NamedTuple):
    """In the place of the batches that are augmented: always the same."""

    images: torch.Tensor
    batch: InputBatch

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        return self

    def close(self) -> None:
        pass


def import_transforms():
    """torchvision.transforms.v2; the wheel for CUDA loads beside a CPU's torch only if its operators are known."""
    if torch.version.cuda is None and "+" not in metadata.version("torchvision"):
        import tests.clients.vision  # noqa: F401
    from torchvision.transforms import v2

    return v2


def rate_of(step: Callable[[], object], times: int = BATCHES) -> float:
    """Images per second of this process's CPU time."""
    begin_s = time.process_time()
    for _ in range(times):
        step()
    return times * BATCH_SIZE / (time.process_time() - begin_s)


def contestants(crops: Crops, augmented: AugmentedBatches, classes: int) -> dict[str, Callable[[], object]]:
    v2 = import_transforms()
    rand, normalize, mix = v2.RandAugment(), v2.Normalize(MEAN, STD), v2.MixUp(alpha=0.2, num_classes=classes)
    labels = torch.from_numpy(crops.batch.labels)

    def finish(images: torch.Tensor) -> object:
        return mix(normalize(images.float()), labels)

    return {
        OURS: augmented.next,
        PER_IMAGE: lambda: finish(torch.stack([rand(image) for image in crops.images])),
        PER_BATCH: lambda: finish(rand(crops.images)),
    }


def operations(crops: Crops, augmented: AugmentedBatches) -> dict[str, dict[str, float]]:
    """Microseconds of an image, beside the time without an operation."""
    v2 = import_transforms()
    rand, found = v2.RandAugment(), {}
    for kind, name in enumerate(KINDS):
        strength = strengths(False, CROP_SIZE)[kind, STRENGTH]
        made = make_operations(np.full((BATCH_SIZE, 1), kind), np.full((BATCH_SIZE, 1), strength), CROP_SIZE)
        theirs = name.title().replace("_", "").replace("Autocontrast", "AutoContrast")
        how = theirs, float(strength), v2.InterpolationMode.NEAREST, {torch.Tensor: None}
        ways = {
            OURS: lambda made=made: augmented._operate(crops.images, made, np.zeros((BATCH_SIZE, 3), np.float32)),
            "torchvision": lambda how=how: [rand._apply_image_or_video_transform(image, *how) for image in crops.images],
        }
        found[name] = {way: round(1e6 / statistics.median(rate_of(step, 1) for _ in range(3)), 1) for way, step in ways.items()}
    return found


@click.command()
@harness.DATASET
@harness.rounds_option(7)
def main(dataset: Path, rounds: int) -> None:
    """Time augmentation of DATASET's crops."""
    torch.set_num_threads(1)
    plain = {"crop_size": CROP_SIZE, "num_threads": 1}
    with ImageLoader(dataset, "train", BATCH_SIZE, dtype="uint8", pca_jitter=0, **plain) as loader:
        images, _ = next(iter(loader))
    with ImageLoader(dataset, "train", BATCH_SIZE, std="imagenet", mean="imagenet", **plain) as loader:
        source, classes = loader.open_source(), len(loader.classes)
        crops = Crops(images, source.next())
        augmented = AugmentedBatches(crops, source, AugmentOptions("rand", mixup=0.2), *loader._asked, classes)
        rates = harness.interleave(
            {name: lambda step=step: rate_of(step) for name, step in contestants(crops, augmented, classes).items()}, rounds
        )
        result = {"batch_size": BATCH_SIZE, "crop_size": CROP_SIZE, **harness.compared(rates, (OURS,))}
        result["microseconds"] = operations(crops, augmented)
        source.close()
    harness.save("augment", result, "torch", "torchvision")


if __name__ == "__main__":
    main()
