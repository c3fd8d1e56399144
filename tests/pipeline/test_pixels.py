"""The kernels for pixels in machine code, and their arithmetic; tests of the cache and of what copies batches use them."""

import numpy as np
import pytest
import torch

from imagefeed.pipeline import pixels
from tests.gpu_kernels import CAPABILITIES, build

pytest.importorskip("triton")
TYPES = {
    "crops": "*u8", "planes": "*u8", "means": "*fp32", "scale": "*fp32", "mean_image": "*fp32", "places": "*i64",
    "numbers": "*i64", "slots": "*i64", "out": "*bf16", "size": "i32", "height": "i32", "width": "i32",
}  # fmt: skip
# Registers of a thread and bytes of shared memory, at most.
BOUNDS = {"normalize": (40, 4096), "crop": (72, 0), "to_planes": (48, 512)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BOUNDS)
def test_kernels_fit_the_device(name, capability):
    """In bfloat16 and channels-last: no spills, and pixels are stored 16 bytes at a time."""
    from imagefeed.pipeline import pixel_kernels

    kernel = getattr(pixel_kernels, name)
    types = TYPES | {"images": "*u8" if name == "to_planes" else "i32"}
    block = {"normalize": pixel_kernels.BLOCK, "crop": pixel_kernels.CROP_BLOCK, "to_planes": pixel_kernels.BLOCK // 8}[name]
    constants = {"WITH_IMAGE": False, "LAST": True, "BLOCK": block}
    given = [{n: of[n] for n in kernel.arg_names if n in of} for of in (types, constants)]
    built = build(kernel, capability, *(tuple(of.items()) for of in given))
    registers, shared = BOUNDS[name]
    assert built.registers <= registers and built.shared <= shared and built.stack == 0
    assert built.stores[16] == {"normalize": 2, "crop": 1, "to_planes": 0}[name]


def test_normalized_pixels_are_the_literal_arithmetic():
    rng = np.random.default_rng(0)
    crops, means, scale = (
        rng.integers(0, 256, (3, 5, 5, 3), dtype=np.uint8),
        rng.normal(100, 20, (3, 3)),
        np.array([0.5, 1, 0.01]),
    )
    image, places = rng.uniform(0, 255, (3, 9, 8)), np.array([[0, 0, 0], [4, 3, 1], [2, 1, 1]])
    wanted = np.empty((3, 3, 5, 5))
    for n, (top, left, mirror) in enumerate(places):
        under = image[:, top : top + 5, left : left + 5]
        under = under[:, :, ::-1] if mirror else under
        wanted[n] = (crops[n].transpose(2, 0, 1) - under - means[n][:, None, None]) * scale[:, None, None]
    given = (torch.from_numpy(values).float() for values in (means, scale, image))
    means, scale, image = given
    found = pixels.normalized(torch.from_numpy(crops), means, scale, torch.float32, True, image, torch.from_numpy(places))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
