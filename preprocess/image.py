"""Turns the bytes of one raw image into the JPEG that is stored: decoded strictly, upright, rescaled, YCbCr 4:2:0.

Common JPEGs go the fast way: libjpeg-turbo decodes them to planes of luma and chroma, which are rescaled (codec/libjpeg.c)
and encoded without ever becoming RGB. The other JPEGs and formats are decoded to RGB first (decoding.py).
"""

import io
import math
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import ExifTags, Image, features

from imagefeed.codec import decoder, libjpeg
from imagefeed.preprocess import ffmpeg
from imagefeed.preprocess.decoding import BadImage, check_size, decode, without_xmp
from imagefeed.preprocess.options import ImageOptions

MAX_SIDE = 65500  # libjpeg's limit
# How libjpeg-turbo's messages begin for lossless JPEGs, other depths, and JPEG-LS.
KINDS_WITHOUT_LIBJPEG = ("Unsupported JPEG ", "Unsupported marker type 0xf7")


class Planes(NamedTuple):
    """A picture as a JPEG 4:2:0 holds it, uint8: y (height, width); cb and cr half of each side, rounded up, where a sample
    stands for 2x2 pixels."""

    y: np.ndarray
    cb: np.ndarray
    cr: np.ndarray


class PreparedImage(NamedTuple):
    """`jpeg` is baseline, YCbCr 4:2:0, without metadata; `planes` is what was encoded; `converted` says how an image that was
    not a common JPEG was decoded, and is empty for one that was; `suspicious` means that it may be far too dark or bright."""

    jpeg: bytes
    planes: Planes
    converted: str
    suspicious: bool = False


def prepare_image(data: bytes, options: ImageOptions) -> PreparedImage:
    """Decodes one image, turns it upright, rescales and encodes it; raises BadImage with the reason if that is impossible."""
    if not data:
        raise BadImage("the file is empty")
    planes, complaint = _planes_of_jpeg(data, options) if data[:3] == b"\xff\xd8\xff" else (None, "")
    converted, suspicious = "", False
    if planes is None:
        image, converted, suspicious = decode(data, options.range, complaint)
        planes = _planes_of_picture(image, options)
    y, cb, cr = planes
    # simplejpeg reads two samples of luma for each one of chroma, so past the end of a row or plane of odd length: let it find
    # the edge again there, else the last column is wrong and the file depends on what lies behind the plane.
    height, width = y.shape
    if height % 2 or width % 2:  # np.pad takes 0.2 ms
        y = np.pad(y, ((0, height % 2), (0, width % 2)), mode="edge")[:height, :width]
    return PreparedImage(simplejpeg.encode_jpeg_yuv_planes(y, cb, cr, options.quality), planes, converted, suspicious)


def _planes_of_jpeg(data: bytes, options: ImageOptions) -> tuple[Planes | None, str]:
    """The planes of a JPEG of YCbCr or gray; for another one None, and libjpeg-turbo's complaint if it cannot read it."""
    try:
        width, height, colors, exif = libjpeg.header(data)
    except ValueError as error:
        # Only kinds that it lacks may go on to ffmpeg, which puts its own table in place of a lost one: with one wrong byte in
        # the header, the picture would be uniformly gray, or noise.
        if not str(error).startswith(KINDS_WITHOUT_LIBJPEG):
            raise BadImage(f"damaged JPEG: {error}") from None
        return None, str(error)
    check_size(width, height)
    _target(width, height, options)
    turn = _orientation(data) if exif else 1
    try:
        if colors == "other":
            libjpeg.check(data)  # Pillow would pass a damaged JPEG as a half-gray picture
            return None, ""
        planes = decode_planes(data, options.size, options.fit == "crop", turn)
    except ValueError as error:
        raise BadImage(f"damaged JPEG: {error}") from None
    if turn in UPRIGHT:
        # The crop is centered, so turning can come last, when the picture is small.
        planes = Planes(*(np.ascontiguousarray(UPRIGHT[turn](plane)) for plane in planes))
    return planes, ""


def decode_planes(jpeg: bytes, size: int, crop: bool, turn: int = 1) -> Planes:
    """The planes of a JPEG of YCbCr or gray, rescaled to a shorter side of `size`; with `crop` only the center size x size.

    `turn` is the EXIF orientation that the caller will undo. Raises ValueError with libjpeg-turbo's message on any damage.
    """
    how = size, crop, turn in (2, 3, 7, 8), turn in (3, 4, 6, 7)
    (found,) = decoder.samples([jpeg], 2 * size - 1, crop)  # larger ones libjpeg-turbo decodes at half the size or less
    height, width, y, cb, cr = libjpeg.rescale_samples(*found, *how) if found else libjpeg.rescale(jpeg, *how)
    half = ((height + 1) // 2, (width + 1) // 2)
    planes = (y, (height, width)), (cb, half), (cr, half)
    return Planes(*(np.frombuffer(plane, np.uint8).reshape(shape) for plane, shape in planes))


def stored_planes(jpegs: Sequence[bytes]) -> list[Planes | None]:
    """The planes of stored JPEGs, decoded as they are; None for one that `decode_planes` has to look at."""
    found: list[Planes | None] = []
    for decoded in decoder.samples(jpegs, MAX_SIDE, False):
        if decoded and decoded[3] == 2:
            samples, height, width, _ = decoded
            shape = -(-height // 16) * 16, -(-width // 16) * 16
            y, *chroma = np.frombuffer(samples, np.uint8, 3 * math.prod(shape)).reshape(3, *shape)
            halves = (plane[: (height + 1) // 2, : (width + 1) // 2] for plane in chroma)
            found.append(Planes(np.ascontiguousarray(y[:height, :width]), *map(np.ascontiguousarray, halves)))
        else:
            found.append(None)
    return found


def _orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return without_xmp(Image.open(io.BytesIO(data))).getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # an image with a damaged EXIF block may be whole


# By EXIF orientation (Exif 2.32, tag 0x0112): how to undo it.
UPRIGHT = {
    2: lambda plane: plane[:, ::-1],
    3: lambda plane: plane[::-1, ::-1],
    4: lambda plane: plane[::-1],
    5: lambda plane: plane.T,
    6: lambda plane: plane.T[:, ::-1],
    7: lambda plane: plane.T[::-1, ::-1],
    8: lambda plane: plane.T[::-1],
}


def _target(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    """The width and height as stored."""
    if options.fit == "crop":
        return options.size, options.size
    wide, high = (int(side * options.size / min(width, height) + 0.5) for side in (width, height))
    if max(wide, high) > MAX_SIDE:
        raise BadImage(f"{width}x{height} would become {wide}x{high}, and a JPEG has {MAX_SIDE} a side at most")
    return wide, high


def _planes_of_picture(image: Image.Image, options: ImageOptions) -> Planes:
    width, height = image.size
    target = _target(width, height, options)
    shorter = min(width, height)
    box: tuple[float, float, float, float] = (0, 0, width, height)
    if options.fit == "crop":
        left, top = (width - shorter) / 2, (height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
    # Bicubic with antialiasing, as in libjpeg.c; crop and resize in one call, so that nothing outside the crop is computed.
    rgb = np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=box), np.float32)
    y, cb, cr = np.moveaxis(rgb @ YCC.T, 2, 0)  # Pillow's own conversion truncates: half a gray level darker
    return Planes(_rounded(y), _rounded(_halved(cb) + 128), _rounded(_halved(cr) + 128))


# JFIF 1.02, section 7: rows are Y, Cb - 128, Cr - 128.
YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Means of 2x2 samples; an odd edge is repeated, as by libjpeg."""
    height, width = plane.shape
    plane = np.pad(plane, ((0, height % 2), (0, width % 2)), "edge")
    return (plane[::2, ::2] + plane[::2, 1::2] + plane[1::2, ::2] + plane[1::2, 1::2]) / 4


def _rounded(plane: np.ndarray) -> np.ndarray:
    return (plane + 0.5).clip(0, 255).astype(np.uint8)


# If one of them is missing, ffmpeg decodes its format.
PILLOW_LIBRARIES = {"libwebp": "webp", "libavif": "avif", "libtiff": "libtiff"}

Image.MAX_IMAGE_PIXELS = None  # check_size refuses large images before their pixels are decoded


def codec_versions() -> dict[str, str]:
    """The libraries that determine the stored bytes. Pillow-SIMD and Pillow share version numbers, so the name tells them apart.

    Apart from Pillow's, the names do not depend on what is installed; a library missing from Pillow is "none".
    """
    return {
        "libjpeg": str(libjpeg.LIBJPEG),
        "pillow-simd" if "post" in PIL.__version__ else "pillow": PIL.__version__,
        "simplejpeg": metadata.version("simplejpeg"),
        "libjpeg of Pillow": str(features.version("jpg")),
        **{f"{name} of Pillow": features.version(feature) or "none" for name, feature in PILLOW_LIBRARIES.items()},
        "ffmpeg": ffmpeg.version(),
        "numpy": np.__version__,  # its matrix product converts RGB
    }
