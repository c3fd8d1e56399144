"""Triton kernels for the pixels of a batch: each reads and writes it once.

Bytes a pixel: `normalize` reads 3 and writes 6 in bfloat16; `crop` reads 1.5 and writes 6; `to_planes` reads 3 and writes 1.5.
Numbers are computed as pixels.py has them in tensor operations, and rounded alike (without fused multiply-adds).
"""

import triton
import triton.language as tl

BLOCK, CROP_BLOCK = 2048, 1024  # numbers that a program takes: a thread loads and stores 16 bytes at a time


@triton.jit
def of_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def per_channel(base, channel):
    """One of three numbers at `base`."""
    return of_channel(channel, tl.load(base), tl.load(base + 1), tl.load(base + 2))


@triton.jit
def place_of(n, size, top, left, mirror):
    """Row and column in the image of number `n` of a crop in NHWC order."""
    row, column = n // 3 // size, n // 3 % size
    return top + row, left + tl.where(mirror > 0, size - 1 - column, column)


@triton.jit
def put(out, image, n, inside, channel, value, size, LAST: tl.constexpr):
    """Stores numbers of a crop in NHWC order, or in NCHW."""
    at = n if LAST else channel * (size * size) + n // 3
    if out.dtype.element_ty == tl.uint8:
        value = tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)
    tl.store(out + image.to(tl.int64) * (3 * size * size) + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalize(
    crops, means, scale, mean_image, places, out, size, height, width, WITH_IMAGE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`crops` uint8 (N, size, size, 3) minus `means` (N, 3), times `scale` (3,). Grid: 3 * size * size / BLOCK, N.

    WITH_IMAGE also subtracts `mean_image` (3, height, width) at `places` int64 (N, 3): top, left and mirror.
    """
    image = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, channel = n < 3 * size * size, n % 3
    pixel = tl.load(crops + image.to(tl.int64) * (3 * size * size) + n, mask=inside, other=0).to(tl.float32)
    mean = per_channel(means + 3 * image, channel)
    if WITH_IMAGE:
        top, left, mirror = tl.load(places + 3 * image), tl.load(places + 3 * image + 1), tl.load(places + 3 * image + 2)
        row, column = place_of(n, size, top, left, mirror)
        mean = tl.load(mean_image + (channel * height + row) * width + column, mask=inside, other=0.0) + mean
    put(out, image, n, inside, channel, (pixel - mean) * per_channel(scale, channel), size, LAST)


@triton.jit
def crop(
    planes, numbers, means, scale, mean_image, out, images, size, height, width, WITH_IMAGE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As `normalize`, of crops of `planes` uint8 (slots, height * width * 3 / 2), YCbCr 4:2:0 (JFIF 1.02, section 7).

    `numbers` int64 (4, images): slot, top, left and mirror. Grid: 3 * size * size / BLOCK, images.
    """
    image = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, channel = n < 3 * size * size, n % 3
    slot, top = tl.load(numbers + image), tl.load(numbers + images + image)
    left, mirror = tl.load(numbers + 2 * images + image), tl.load(numbers + 3 * images + image)
    row, column = place_of(n, size, top, left, mirror)
    area = height * width
    luma_plane = planes + slot * (area // 2 * 3)
    half = row // 2 * (width // 2) + column // 2
    luma = tl.load(luma_plane + row * width + column, mask=inside, other=0).to(tl.float32)
    cb = tl.load(luma_plane + area + half, mask=inside, other=0).to(tl.float32) - 128
    cr = tl.load(luma_plane + area // 4 * 5 + half, mask=inside, other=0).to(tl.float32) - 128
    value = of_channel(channel, luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb)
    pixel = tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)
    mean = per_channel(means + 3 * image, channel)
    if WITH_IMAGE:
        pixel -= tl.load(mean_image + channel * area + row * width + column, mask=inside, other=0.0)
    put(out, image, n, inside, channel, (pixel - mean) * per_channel(scale, channel), size, LAST)


@triton.jit
def luma_of(images, at, inside):
    """Y, R and B of the pixels at `at`."""
    red = tl.load(images + at, mask=inside, other=0).to(tl.float32)
    green = tl.load(images + at + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(images + at + 2, mask=inside, other=0).to(tl.float32)
    return 0.299 * red + 0.587 * green + 0.114 * blue, red, blue


@triton.jit
def as_byte(value):
    return tl.minimum(tl.maximum(value + 0.5, 0.0), 255.0).to(tl.uint8)


@triton.jit
def to_planes(images, slots, planes, height, width, BLOCK: tl.constexpr):
    """Stores `images` uint8 (N, height, width, 3) in `planes` at `slots` int64 (N,). Grid: height * width / 4 / BLOCK, N."""
    image = tl.program_id(1)
    half = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    inside = half < area // 4
    row, column = half // (width // 2), half % (width // 2)
    plane = planes + tl.load(slots + image) * (area // 2 * 3)
    corner = 2 * row * width + 2 * column
    cb = tl.zeros((BLOCK,), tl.float32)
    cr = tl.zeros((BLOCK,), tl.float32)
    for down in tl.static_range(2):
        for across in tl.static_range(2):
            at = corner + down * width + across
            luma, red, blue = luma_of(images + image.to(tl.int64) * (3 * area), 3 * at, inside)
            tl.store(plane + at, as_byte(luma), mask=inside)
            cb += (blue - luma) / 1.772
            cr += (red - luma) / 1.402
    tl.store(plane + area + half, as_byte(cb / 4 + 128), mask=inside)
    tl.store(plane + area // 4 * 5 + half, as_byte(cr / 4 + 128), mask=inside)
