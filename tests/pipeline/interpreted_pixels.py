"""Run by test_gpu_check.py in a process with TRITON_INTERPRET=1. Its casts to bfloat16 truncate; a GPU's round."""

import itertools

import pytest
import torch

from imagefeed.pipeline import pixel_kernels, pixels

SHAPE, SIZE = (32, 36), 20
pixel_kernels.BLOCK, pixel_kernels.CROP_BLOCK = 1024, 1024  # two programs a crop, of which the last is not full
GENERATOR = torch.Generator().manual_seed(1)


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=GENERATOR)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype, by_image", [*itertools.product(FLOATS, (False, True)), (torch.uint8, False)], ids=str)
def test_kernels_give_what_tensor_operations_give(dtype, by_image, channels_last):
    """To the bit, but for bfloat16."""
    exact, as_bytes = dtype != torch.bfloat16, dtype == torch.uint8
    scale = torch.ones(3) if as_bytes else torch.tensor([0.5, 1.0, 0.01])
    means = torch.zeros(3, 3) if as_bytes else torch.randn(3, 3, generator=GENERATOR) * 20 + 100
    places = torch.tensor([[12, 16, 1], [0, 0, 0], [5, 7, 1]])
    image = torch.rand(3, *SHAPE, generator=GENERATOR) * 255 if by_image else None
    common = means, scale, dtype, channels_last, image
    crops = levels(3, SIZE, SIZE, 3)
    planes, numbers = levels(7, 32 * 36 * 3 // 2), torch.cat([torch.tensor([[6], [0], [6]]), places], 1).T.contiguous()
    pairs = (
        (pixels.normalized(crops, *common, places), pixels.launch_normalize(crops, *common, places)),
        (pixels.cropped(planes, numbers, SHAPE, SIZE, *common), pixels.launch_crop(planes, numbers, SHAPE, SIZE, *common)),
    )
    for wanted, found in pairs:
        assert found.dtype == dtype and found.stride() == wanted.stride() and wanted.float().std() > 1
        torch.testing.assert_close(found, wanted, rtol=0 if exact else 2**-7, atol=0)


def test_planes_are_stored_in_their_slots_alone():
    images, planes = levels(3, *SHAPE, 3), levels(7, 32 * 36 * 3 // 2)
    slots, before = torch.tensor([4, 0, 6]), planes.clone()
    pixels.launch_to_planes(images, slots, planes)
    wanted = pixels.to_planes(images)
    assert (planes[slots].int() - wanted.int()).abs().max() <= 1 and (planes[slots] != wanted).float().mean() < 1e-3
    assert torch.equal(planes[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
