"""Decodes JPEGs in memory: regular ones by decoder.c, all others by libjpeg-turbo, with the same pixels."""

import contextlib
import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from imagefeed.codec import decoder, libjpeg
from imagefeed.codec.cores import usable_cores

# As decoder.c reads it: the addresses of a JPEG (`length` bytes) and of its crop's first value; the size of the image; the crop;
# 1 to mirror it left to right; what is subtracted from each channel; 1 once the crop is written.
# `size`, if not 0, is the side to resize the crop to, as torch does on uint8 with antialias=True. With `recolor`, pixels p of the
# crop, whose mean is m, become colors[0] @ p + colors[1] @ m, rounded and clipped to 0-255. `keep`, if not 0, is an address to
# write the whole image to, uint8 (image_height, image_width, 3).
_WHOLE = ("length", "image_height", "image_width", "top", "left", "height", "width", "mirror")
JOB = np.dtype(
    [
        ("data", "<i8"),
        ("out", "<i8"),
        *((name, "<i4") for name in _WHOLE),
        ("mean", "<f4", 3),
        *((name, "<i4") for name in ("done", "size", "recolor")),
        ("colors", "<f4", (2, 3, 3)),
        ("keep", "<i8"),
    ],
    align=True,
)
RGB = 3
PIECE = 32  # images that a thread takes at a time; two go in turns, and the last one of a piece goes alone


@dataclass(frozen=True)
class Format:
    """The crops' values: `dtype` "float32", "bfloat16", "float16" or "uint8"; channels first or last; (pixel - mean) * scale.

    `mean_image`, float32 (3, height, width) of the images' size, is subtracted too. uint8 is rounded, and takes neither of both.
    """

    dtype: str = "float32"
    channels_last: bool = False
    scale: np.ndarray = field(default_factory=lambda: np.ones(RGB, np.float32))
    mean_image: np.ndarray | None = None


def decode(
    jpegs: Sequence[bytes],
    size: int | tuple[int, int] | None = None,
    crop: np.ndarray | None = None,
    dtype: str = "uint8",
    layout: str = "NHWC",
    threads: int | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Decodes JPEGs to RGB: one array (N, height, width, 3), or a list of N arrays if they differ in size.

    With `size`, a number or (height, width), only a crop of that size is decoded: the center, or what begins at `crop`, an array
    (N, 2) of top and left. Nothing is resized. `dtype` is "uint8", "float32" or "float16", of pixels from 0 to 255, and `layout`
    "NHWC" or "NCHW". `threads` is all cores by default.

    The pixels are those of libjpeg-turbo's default. What it refuses or warns of raises ValueError with the image's index.
    """
    for name, value, choices in (("dtype", dtype, ("uint8", "float32", "float16")), ("layout", layout, ("NHWC", "NCHW"))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    buffers = [memoryview(jpeg) for jpeg in jpegs]
    jobs = np.zeros(len(buffers), JOB)
    decoder.locate(jobs, buffers)
    for number, reason in find_sizes(jobs).items():
        raise ValueError(f"jpegs[{number}]: {reason}")
    _place_crops(jobs, size, crop)
    sides = jobs[["height", "width"]].tolist()
    shapes = [(*side, RGB) if layout == "NHWC" else (RGB, *side) for side in sides]
    alike = len(set(shapes)) == 1
    out = aligned((len(jobs), *shapes[0]), dtype) if alike else [aligned(shape, dtype) for shape in shapes]
    if isinstance(out, list):
        jobs["out"] = [array.ctypes.data for array in out]
    else:
        jobs["out"] = out.ctypes.data + out.strides[0] * np.arange(len(jobs))
    form = Format(dtype, layout == "NHWC")
    pieces = [(begin, min(begin + PIECE, len(jobs))) for begin in range(0, len(jobs), PIECE)]
    threads = min(threads or usable_cores(), len(pieces))
    # One thread is this one: starting another for 32 images takes a tenth of their time.
    with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        for damaged in (pool.map if pool else map)(lambda piece: decode_jobs(jobs, form, *piece), pieces):
            for number, reason in damaged.items():
                raise ValueError(f"jpegs[{number}]: {reason}")
    return out


def decode_jobs(jobs: np.ndarray, form: Format, begin: int, end: int, to_end: bool = True) -> dict[int, str]:
    """Decodes `jobs` (JOB) from `begin` to `end`. Returns libjpeg-turbo's message for each that it refuses or warns of.

    Jobs of one JPEG that follow each other are decoded once. Unless `to_end`, damage behind a crop's last row may go unnoticed:
    enough where a checksum vouches for the bytes.
    """
    decoder.decode(jobs, form.scale, form.mean_image, form.dtype, form.channels_last, to_end, begin, end)
    damaged: dict[int, str] = {}
    left = begin + np.flatnonzero(jobs["done"][begin:end] == 0)
    other = (np.diff(left) > 1) | (np.diff(jobs["data"][left]) != 0) | (np.diff(jobs["length"][left]) != 0)
    for numbers in np.split(left, np.flatnonzero(other) + 1) if len(left) else []:
        try:
            _by_libjpeg(jobs[numbers[0] : numbers[-1] + 1], form)
        except ValueError as error:
            damaged |= dict.fromkeys(numbers.tolist(), str(error))
    return damaged


def convert_jobs(jobs: np.ndarray, form: Format, begin: int, end: int) -> None:
    """As `decode_jobs`, from decoded images: `data` of a job is the address of uint8 (image_height, image_width, 3)."""
    decoder.convert(jobs, form.scale, form.mean_image, form.dtype, form.channels_last, True, begin, end)


def find_sizes(jobs: np.ndarray) -> dict[int, str]:
    """Sets the size of each job's image. Returns libjpeg-turbo's message for each that has none."""
    decoder.sizes(jobs)
    damaged = {}
    for number in np.flatnonzero((jobs["image_height"] == 0) | (jobs["image_width"] == 0)).tolist():
        data = _bytes_at(int(jobs["data"][number]), int(jobs["length"][number])).tobytes()
        try:
            jobs["image_width"][number], jobs["image_height"][number], *_ = libjpeg.header(data)
        except ValueError as error:
            damaged[number] = str(error)
    return damaged


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes. Floats that do not cannot be streamed, and take a sixth longer."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _by_libjpeg(jobs: np.ndarray, form: Format) -> None:
    """Decodes jobs of one JPEG by libjpeg-turbo. Raises ValueError with its message."""
    data, out, length, height, width = (int(jobs[name][0]) for name in ("data", "out", "length", "image_height", "image_width"))
    crop, keep = [int(jobs[name][0]) for name in ("height", "width", "mirror")], jobs["keep"][jobs["keep"] != 0].tolist()
    changed = any(jobs[name][0].any() for name in ("mean", "size", "recolor"))
    as_decoded = form.dtype == "uint8" and form.channels_last and crop == [height, width, 0] and not changed
    if as_decoded:
        keep.append(out)
    pixels = _bytes_at(keep[0], height, width, RGB) if keep else np.empty((height, width, RGB), np.uint8)
    libjpeg.decode(_bytes_at(data, length).data, pixels)
    for address in keep[1:]:
        _bytes_at(address, height, width, RGB)[:] = pixels
    copies = jobs[as_decoded:].copy()
    copies["data"] = pixels.ctypes.data
    convert_jobs(copies, form, 0, len(copies))
    jobs["done"] = 1


def _bytes_at(address: int, *shape: int) -> np.ndarray:
    return np.ndarray(shape, np.uint8, memoryview((ctypes.c_uint8 * math.prod(shape)).from_address(address)))


def _place_crops(jobs: np.ndarray, size: int | tuple[int, int] | None, crop: np.ndarray | None) -> None:
    images = np.stack((jobs["image_height"], jobs["image_width"]), 1)
    if size is None and crop is not None:
        raise ValueError("`crop` says where crops begin, so `size` must say how large they are")
    given = images if size is None else np.asarray(size)
    if size is not None and (given.shape not in ((), (2,)) or not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"`size` must be a whole number or two, (height, width), not {size!r}")
    sizes = np.broadcast_to(given.astype(np.int64), images.shape)
    places = (images - sizes) // 2 if crop is None else np.asarray(crop)
    if places.shape != images.shape or not np.issubdtype(places.dtype, np.integer):
        raise ValueError(f"`crop` must be whole numbers of shape {images.shape}, not {places.dtype} of shape {places.shape}")
    outside = ((sizes < 1) | (places < 0) | (places > images - sizes)).any(1)
    for number in np.flatnonzero(outside).tolist():
        (height, width), (high, wide), place = images[number], sizes[number], tuple(places[number].tolist())
        raise ValueError(f"jpegs[{number}] has {height} rows of {width} pixels: a crop of {high} by {wide} at {place} is outside")
    jobs["height"], jobs["width"] = sizes.T
    jobs["top"], jobs["left"] = places.T
