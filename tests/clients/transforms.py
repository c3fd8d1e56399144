"""torchvision.transforms.v2: our operations equal its own, and its transforms work as `transform=`."""

import numpy as np
import pytest
import torch

from benchmarks.augment import import_transforms
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.operations import BINS, KINDS, SIGNED, WARPS, apply_operations, make_operations, strengths
from tests.conftest import picture
from tests.pipeline.test_loader import equal

try:
    v2 = import_transforms()
except ImportError as missing:
    pytest.skip(f"no torchvision: {missing}", allow_module_level=True)

SIZE = 96
NEAR = 1e-3  # of a pixel: torchvision's sums of coordinates are rounded otherwise than ours


def far_from_middles(matrix: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE) bool: whether the source of a pixel is clearly nearest to one pixel."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    sources = np.einsum("ij,jyx->iyx", matrix.astype(np.float64), np.stack((columns, rows, np.ones_like(rows))))
    return (np.abs(sources % 1 - 0.5) > NEAR).all(0)


@pytest.mark.parametrize("wide", [False, True], ids=["RandAugment", "TrivialAugmentWide"])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_each_operation_is_torchvisions_at_each_strength(kind, wide):
    theirs = v2.TrivialAugmentWide() if wide else v2.RandAugment()
    name = KINDS[kind].title().replace("_", "").replace("Autocontrast", "AutoContrast")
    image = torch.from_numpy(picture(kind)[None, :SIZE, :SIZE].transpose(0, 3, 1, 2).copy())
    of_bins, signed = theirs._AUGMENTATION_SPACE[name]
    known = of_bins(BINS, SIZE, SIZE)
    assert signed == SIGNED[kind]
    for number, strength in enumerate(strengths(wide, SIZE)[kind]):
        assert known is None or strength == float(known[number])
        for turned in {strength, -strength if signed else strength}:
            wanted = theirs._apply_image_or_video_transform(
                image, name, float(turned), v2.InterpolationMode.NEAREST, {torch.Tensor: None}
            )
            operation = make_operations(np.full((1, 1), kind), np.full((1, 1), turned), SIZE)
            difference = (apply_operations(image.clone(), operation).int() - wanted.int()).abs().numpy()
            if kind in WARPS:
                assert not (difference * far_from_middles(operation["matrix"][0, 0])).any(), turned
            else:
                assert difference.max() <= (KINDS[kind] == "color"), turned


@pytest.mark.parametrize(
    "transform",
    [
        v2.MixUp(alpha=0.4, num_classes=3),
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(p=1.0), v2.CutMix(num_classes=3)]),
        v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)]),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_transforms_of_batches_are_seeded_by_the_plan(tiny, transform):
    with ImageLoader(tiny, "train", 8, crop_size=64, transform=transform) as loader:
        batches = list(loader)
        resumed = loader.reopened(position=2)
    for images, labels in batches:
        assert images.shape == (8, 3, 64, 64) and labels.shape == (8, 3) and torch.allclose(labels.sum(1), torch.ones(8))
    with resumed:
        assert equal(list(resumed), batches[2:])


def test_transforms_of_images_leave_labels_alone(tiny):
    plain, changed = {"dtype": "uint8", "pca_jitter": 0.0, "crop_size": 64}, []
    for options in ({}, {"transform": v2.RandAugment()}, {"transform": torch.nn.Sequential(v2.RandomInvert(p=1.0))}):
        with ImageLoader(tiny, "train", 8, **plain, **options) as loader:
            changed.append(next(iter(loader)))
    (images, labels), (rand, same), (inverted, _) = changed
    assert torch.equal(labels, same) and not torch.equal(images, rand) and torch.equal(inverted, 255 - images)
