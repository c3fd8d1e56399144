"""What a device does to the pixels of a batch: normalize crops, keep images as planes, crop those.

By Triton on a GPU, one kernel each; elsewhere, and without Triton, in plain tensor operations with the same results.
"""

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
RGB = 3


def normalized(
    crops: torch.Tensor,
    means: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean_image: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """(pixel - mean) * scale, (N, 3, size, size) in `dtype` and PyTorch's contiguous or channels-last strides, computed in
    float32.

    crops: uint8 (N, size, size, 3). means: float32 (N, 3); scale: (3,). mean_image: (3, height, width), of which the part under
    each crop is subtracted too; places: int64 (N, 3), top, left and mirror.
    """
    if HAS_TRITON and crops.is_cuda:
        return launch_normalize(crops, means, scale, dtype, channels_last, mean_image, places)
    means = means[:, None, None, :]
    if mean_image is not None:
        means = windows(mean_image, places, crops.shape[1]) + means
    return _arranged(crops.to(torch.float32).sub_(means).mul_(scale).movedim(-1, -3), dtype, channels_last)


def windows(mean_image: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """The mean image (3, height, width) under each crop, (N, size, size, 3); places: int64 (N, 3), top, left and mirror."""
    tops, lefts, mirrors = places.T
    found = mean_image.unfold(1, size, 1).unfold(2, size, 1)[:, tops, lefts].movedim(0, -1)
    return torch.where(mirrors[:, None, None, None] > 0, found.flip(2), found)


def to_planes(images: torch.Tensor) -> torch.Tensor:
    """RGB uint8 (N, height, width, 3) to YCbCr 4:2:0 uint8 (N, height * width * 3 / 2): Y, Cb, Cr (JFIF 1.02, section 7)."""
    count, height, width, _ = images.shape
    red, green, blue = images.to(torch.float32).unbind(-1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [luma.flatten(1)]
    for channel, weight in ((blue, 1.772), (red, 1.402)):
        chroma = ((channel - luma) / weight).view(count, height // 2, 2, width // 2, 2).mean((2, 4)) + 128
        planes.append(chroma.flatten(1))
    return torch.cat(planes, 1).add_(0.5).clamp_(0, 255).to(torch.uint8)


def store_planes(images: torch.Tensor, slots: torch.Tensor, planes: torch.Tensor) -> None:
    """Writes `to_planes(images)` into `planes` (slots, height * width * 3 / 2) at `slots` int64 (N,)."""
    if HAS_TRITON and images.is_cuda:
        launch_to_planes(images, slots, planes)
    else:
        planes[slots] = to_planes(images)


def cropped(
    planes: torch.Tensor,
    numbers: torch.Tensor,
    shape: tuple[int, int],
    size: int,
    means: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    mean_image: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Crops of images of a shape (height, width) that are kept as planes, as `normalized` returns them; in `out` if given.

    numbers: int64 (4, N): slot, top, left and mirror. uint8 is rounded.
    """
    if HAS_TRITON and planes.is_cuda:
        return launch_crop(planes, numbers, shape, size, means, scale, dtype, channels_last, mean_image, out)
    height, width = shape
    slots, tops, lefts, mirrors = numbers[:, :, None, None]
    along = torch.arange(size, device=planes.device)
    rows = tops + along[:, None]
    columns = lefts + torch.where(mirrors > 0, size - 1 - along, along)
    half = (rows // 2) * (width // 2) + columns // 2
    luma = planes[slots, rows * width + columns].to(torch.float32)
    cb = planes[slots, height * width + half].to(torch.float32) - 128
    cr = planes[slots, height * width * 5 // 4 + half].to(torch.float32) - 128
    rgb = (luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb)
    pixels = torch.stack(rgb, 1).add(0.5).floor().clamp(0, 255)
    if mean_image is not None:
        pixels = pixels - mean_image.flatten(1)[:, rows * width + columns].movedim(0, 1)
    found = _arranged((pixels - means[:, :, None, None]) * scale[:, None, None], dtype, channels_last)
    return found if out is None else out.copy_(found)


def _arranged(images: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    if dtype == torch.uint8:
        images = images.add_(0.5).floor_().clamp_(0, 255)
    return images.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def kernels():
    """Triton takes a second to load."""
    from imagefeed.pipeline import pixel_kernels

    return pixel_kernels


def _empty(images: int, size: int, like: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((images, RGB, size, size), dtype=dtype, device=like.device, memory_format=layout)


# Fused multiply-adds would round otherwise than the tensor operations.
EXACT = {"enable_fp_fusion": False}


def launch_normalize(crops, means, scale, dtype, channels_last, mean_image, places) -> torch.Tensor:
    """`normalized` by its kernel."""
    images, size = crops.shape[:2]
    out = _empty(images, size, crops, dtype, channels_last)
    if images:
        shared = {"WITH_IMAGE": mean_image is not None, "LAST": channels_last, "BLOCK": kernels().BLOCK}
        grid = -(-RGB * size * size // kernels().BLOCK), images
        sizes = size, *(mean_image.shape[1:] if mean_image is not None else (0, 0))
        with torch.cuda.device_of(crops):
            given = crops.contiguous(), means.contiguous(), scale, mean_image, places
            kernels().normalize[grid](*given, out, *sizes, **shared, **EXACT)
    return out


def launch_to_planes(images: torch.Tensor, slots: torch.Tensor, planes: torch.Tensor) -> None:
    """`store_planes` by its kernel."""
    count, height, width, _ = images.shape
    block = kernels().BLOCK // 8
    if count:
        with torch.cuda.device_of(images):
            grid = -(-height * width // 4 // block), count
            kernels().to_planes[grid](images.contiguous(), slots, planes, height, width, BLOCK=block, **EXACT)


def launch_crop(planes, numbers, shape, size, means, scale, dtype, channels_last, mean_image, out=None) -> torch.Tensor:
    """`cropped` by its kernel."""
    images = numbers.shape[1]
    out = _empty(images, size, planes, dtype, channels_last) if out is None else out
    if images:
        shared = {"WITH_IMAGE": mean_image is not None, "LAST": channels_last, "BLOCK": kernels().CROP_BLOCK}
        grid = -(-RGB * size * size // kernels().CROP_BLOCK), images
        with torch.cuda.device_of(planes):
            given = planes, numbers.contiguous(), means, scale, mean_image
            kernels().crop[grid](*given, out, images, size, *shape, **shared, **EXACT)
    return out
