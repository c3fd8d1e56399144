"""Turns the bytes of one raw image into the JPEG that is stored: decoded strictly, upright, rescaled, YCbCr 4:2:0.

Common JPEGs go the fast way: libjpeg-turbo decodes them to planes of luma and chroma, which are rescaled (codec.c) and encoded
as they are, never becoming RGB. What libjpeg-turbo does not take goes by Pillow, and what Pillow does not know by ffmpeg.
"""

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess import codec

FITS = ("crop", "short")
MAX_PIXELS = 1 << 27  # 134 million: four times the largest ImageNet image; decoding it takes at most 0.9 GB
MAX_SIDE = 65500  # of a JPEG, as libjpeg takes it
MAX_ASPECT = 40  # an image of 10,000 x 1 is no picture, and would become 2,560,000 x 256
# What ffmpeg is asked about. Not everything: it takes text files for pictures of a terminal, and playlists for orders.
FFMPEG_SIGNATURES = (
    (4, b"ftyp"),  # HEIC, AVIF: ISO base media
    (0, b"\xff\x0a"),  # JPEG XL, bare
    (4, b"JXL "),  # JPEG XL in a container
    (4, b"jP  "),  # JPEG 2000
    (0, b"\xff\xd8\xff"),  # JPEG of a process that libjpeg-turbo and Pillow lack (lossless, 12 bits)
    (0, b"RIFF"),  # WebP where Pillow was built without
    (0, b"II*\0"),  # TIFF, likewise
    (0, b"MM\0*"),
)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, as it stands in rejected.jsonl."""


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored: the shorter side becomes `size` pixels, then `fit` "crop" keeps the center size x size
    (Krizhevsky et al. 2012, section 2), "short" the whole aspect; `quality` is libjpeg's, 1 to 100."""

    size: int = 256
    fit: str = "crop"
    quality: int = 90

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 4096:
            raise UserError(f"size is {self.size}; choose 16 to 4096 pixels")
        if self.fit not in FITS:
            raise UserError(f"fit is {self.fit!r}; choose one of {', '.join(FITS)}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}; choose 1 to 100")


class Planes(NamedTuple):
    """A picture as a JPEG 4:2:0 holds it, uint8: y (height, width); cb and cr half of each side, rounded up, where a sample
    stands for 2x2 pixels."""

    y: np.ndarray
    cb: np.ndarray
    cr: np.ndarray


class PreparedImage(NamedTuple):
    """`jpeg`: baseline, YCbCr 4:2:0, no metadata. `planes`: what was given to the encoder. `converted`: how it was made what
    it is where it was no common JPEG, else empty."""

    jpeg: bytes
    planes: Planes
    converted: str


def prepare_image(data: bytes, options: ImageOptions) -> PreparedImage:
    """Decodes, turns upright, rescales and encodes one image; raises BadImage with the reason where that cannot be."""
    if not data:
        raise BadImage("the file is empty")
    complaint = ""
    if data[:3] == b"\xff\xd8\xff":
        try:
            width, height, colors, exif = codec.header(data)
        except ValueError as error:
            complaint = str(error)  # of a header truncated or damaged too: Pillow is strict about those
        else:
            _check_size(width, height)
            _target(width, height, options)
            if colors != "other":
                return _encoded(_planes_of_jpeg(data, options, exif), options, "")
            try:
                codec.check(data)  # Pillow alone would pass a damaged one as a half-grey picture
            except ValueError as error:
                raise BadImage(f"damaged JPEG: {error}") from None
    image, converted = _decode_by_library(data, complaint)
    return _encoded(_planes_of_picture(image, options), options, converted)


def _encoded(planes: Planes, options: ImageOptions, converted: str) -> PreparedImage:
    y, cb, cr = planes
    if any(side % 2 for side in y.shape):
        # simplejpeg reads two samples of luma for each one of chroma, past the end of a plane of odd sides (seen by ASan), and
        # what lay there changed the file. Here it finds the last row and sample again.
        y = np.concatenate([y.ravel(), y[-1], y[-1, -1:]])[: y.size].reshape(y.shape)
    return PreparedImage(simplejpeg.encode_jpeg_yuv_planes(y, cb, cr, options.quality), planes, converted)


def decode_planes(jpeg: bytes, size: int, crop: bool, turn: int = 1) -> Planes:
    """The planes of a JPEG of YCbCr or grey, rescaled so that the shorter side is `size`, and with `crop` the center
    size x size of it; `turn` is the EXIF orientation that will be undone. Raises ValueError with libjpeg-turbo's words where
    any of it is damaged."""
    height, width, y, cb, cr = codec.rescale(jpeg, size, crop, turn in (2, 3, 7, 8), turn in (3, 4, 6, 7))
    half = ((height + 1) // 2, (width + 1) // 2)
    planes = (y, (height, width)), (cb, half), (cr, half)
    return Planes(*(np.frombuffer(plane, np.uint8).reshape(shape) for plane, shape in planes))


def _planes_of_jpeg(data: bytes, options: ImageOptions, exif: bool) -> Planes:
    turn = _orientation(data) if exif else 1
    try:
        planes = decode_planes(data, options.size, options.fit == "crop", turn)
    except ValueError as error:
        raise BadImage(f"damaged JPEG: {error}") from None
    if turn in UPRIGHT:
        # What is kept lies in the middle, so that turning may come last, when the picture is small.
        planes = Planes(*(np.ascontiguousarray(UPRIGHT[turn](plane)) for plane in planes))
    return planes


def _orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # a damaged EXIF block says nothing about the picture


# EXIF orientation (Exif 2.32, tag 0x0112) to what undoes it.
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
    """Width and height as stored."""
    if options.fit == "crop":
        return options.size, options.size
    target = tuple(int(side * options.size / min(width, height) + 0.5) for side in (width, height))
    if max(target) > MAX_SIDE:
        raise BadImage(f"{width}x{height} would become {target[0]}x{target[1]}, and a JPEG has {MAX_SIDE} a side at most")
    return target


def _planes_of_picture(image: Image.Image, options: ImageOptions) -> Planes:
    width, height = image.size
    target = _target(width, height, options)
    shorter = min(width, height)
    box = (0, 0, width, height)
    if options.fit == "crop":
        left, top = (width - shorter) / 2, (height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
    # Bicubic with antialiasing, as in codec.c; crop and resize in one, so that nothing outside the crop is computed.
    rgb = np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=box), np.float32)
    y, cb, cr = np.moveaxis(rgb @ YCC.T, 2, 0)  # Pillow's own conversion does not round: half a grey level darker
    return Planes(_rounded(y), _rounded(_halved(cb) + 128), _rounded(_halved(cr) + 128))


# JFIF 1.02, section 7: rows are Y, Cb - 128, Cr - 128.
YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Means of 2x2; an odd edge is repeated, as libjpeg does."""
    height, width = plane.shape
    plane = np.pad(plane, ((0, height % 2), (0, width % 2)), "edge")
    return (plane[::2, ::2] + plane[::2, 1::2] + plane[1::2, ::2] + plane[1::2, 1::2]) / 4


def _rounded(plane: np.ndarray) -> np.ndarray:
    return (plane + 0.5).clip(0, 255).astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} are more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is longer than {MAX_ASPECT} times its width")


def _decode_by_library(data: bytes, complaint: str) -> tuple[Image.Image, str]:
    try:
        return _decode_by_pillow(data, refused=bool(complaint))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files, SyntaxError and struct.error included
        complaint = complaint or str(error)
    if not any(data[at : at + len(mark)] == mark for at, mark in FFMPEG_SIGNATURES):
        raise BadImage(f"not an image that can be decoded: {_short(complaint)}")
    image, how = _decode_by_pillow(_ppm_by_ffmpeg(data, complaint))
    return image, f"decoded by ffmpeg{', ' + how if how else ''}"


def _short(text: str) -> str:
    """The text without the addresses of objects that Pillow puts into its messages, so that reports are repeatable."""
    return text.split(" <_io.BytesIO", 1)[0][:200]


def _decode_by_pillow(data: bytes, refused: bool = False) -> tuple[Image.Image, str]:
    image = Image.open(io.BytesIO(data))
    _check_size(*image.size)
    if image.format == "JPEG" and refused:
        raise ValueError("a JPEG that libjpeg-turbo refuses")
    image.load()
    found = f"{image.format} {image.mode}"
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: the high byte
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("an image of floating-point numbers, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), f"{found} on white"
    return image.convert("RGB"), found


def _ppm_by_ffmpeg(data: bytes, complaint: str) -> bytes:
    import ffmpeg  # these two cost 100 ms to load, and are hardly ever needed
    import imageio_ffmpeg

    process = (
        ffmpeg.input("pipe:", protocol_whitelist="pipe", err_detect="explode")
        .output("pipe:", format="image2pipe", vcodec="ppm", vframes=1, loglevel="error")
        .global_args("-xerror")
    )
    try:
        out, _ = process.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), input=data, capture_stdout=True, capture_stderr=True)
    except ffmpeg.Error:
        raise BadImage(f"neither Pillow nor ffmpeg decodes it: {_short(complaint)}") from None
    if not out:
        raise BadImage(f"ffmpeg finds no picture in it: {_short(complaint)}")
    return out


Image.MAX_IMAGE_PIXELS = None  # _check_size refuses before pixels are decoded, with a reason of its own


def codec_versions() -> dict[str, str]:
    """The libraries that decide the stored bytes. Pillow-SIMD and Pillow share a version, so the name tells them apart."""
    from importlib import metadata

    import PIL
    from PIL import features

    simd = "post" in PIL.__version__
    return {
        "libjpeg": str(codec.LIBJPEG),
        "pillow-simd" if simd else "pillow": PIL.__version__,
        "simplejpeg": metadata.version("simplejpeg"),
        "libjpeg of Pillow": str(features.version("jpg")),
    }
