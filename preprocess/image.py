"""Turns the bytes of one raw image into the JPEG that is stored: decoded strictly, upright, rescaled, RGB.

Common JPEGs go the fast way (libjpeg-turbo by simplejpeg, resized by Pillow-SIMD without a copy between them). What
libjpeg-turbo does not take goes by Pillow, and what Pillow does not know by ffmpeg.
"""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from preprocess.errors import UserError

FITS = ("crop", "short")
MAX_PIXELS = 1 << 27  # 134 million: four times the largest ImageNet image; a decoded image then takes at most 0.5 GB
MAX_ASPECT = 40  # an image of 10,000 x 1 is no picture, and would become 2,560,000 x 256
# libjpeg-turbo decodes at 1/2, 1/4 and 1/8 with fast code; the rest of the way down to `size` is left to the resize.
EXIF_MARK = b"Exif\0\0"
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
    """How images are stored: the shorter side becomes `size` pixels, then `fit` "crop" keeps the centre size x size
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


class PreparedImage(NamedTuple):
    """`jpeg`: baseline, YCbCr 4:2:0, no metadata. `pixels`: uint8 (height, width, 3) as given to the encoder.
    `converted`: how it was made RGB where it was not, else empty."""

    jpeg: bytes
    pixels: np.ndarray
    converted: str


def prepare_image(data: bytes, options: ImageOptions) -> PreparedImage:
    """Decodes, turns upright, rescales and encodes one image; raises BadImage with the reason where that cannot be."""
    image, converted = _decode(data, options.size)
    width, height = image.size
    shorter = min(width, height)
    if options.fit == "crop":
        target = (options.size, options.size)
        left, top = (width - shorter) / 2, (height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
    else:
        target = (round(width * options.size / shorter), round(height * options.size / shorter))
        box = (0, 0, width, height)
    # Bicubic with antialiasing; crop and resize in one, so that nothing outside the crop is computed.
    # To three bytes by Pillow: 60 us with the copy to NumPy, which itself takes 300 us to leave out every fourth byte.
    pixels = np.asarray(image.resize(target, Image.Resampling.BICUBIC, box=box).convert("RGB"))
    return PreparedImage(simplejpeg.encode_jpeg(pixels, options.quality, "RGB", "420"), pixels, converted)


def _decode(data: bytes, size: int) -> tuple[Image.Image, str]:
    """An upright picture of mode RGB or RGBX, and what had to be converted."""
    if not data:
        raise BadImage("the file is empty")
    if data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            # Truncated or damaged headers end here too: Pillow is strict about those.
            return _decode_by_library(data, str(error))
        _check_size(width, height)
        if colours in ("CMYK", "YCCK"):
            _strictly(data, "CMYK")  # Pillow alone would pass a damaged one as a half-grey picture
            return _decode_by_library(data, "")
        return _decode_jpeg(data, size), ""
    return _decode_by_library(data, "")


def _strictly(data: bytes, colorspace: str, **scale) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, colorspace, strict=True, **scale)
    except ValueError as error:
        raise BadImage(f"damaged JPEG: {error}") from None


def _decode_jpeg(data: bytes, size: int) -> Image.Image:
    # Four bytes a pixel, as Pillow holds them: frombuffer then takes the array as it is, resize reads from it.
    pixels = _strictly(data, "RGBX", min_height=size, min_width=size, min_factor=2)
    height, width = pixels.shape[:2]
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    if EXIF_MARK in data[: 1 << 16]:
        try:
            turn = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:
            turn = 1  # a damaged EXIF block says nothing about the picture
        if turn in TRANSPOSE:
            image = image.transpose(TRANSPOSE[turn])
    return image


# EXIF orientation (Exif 2.32, tag 0x0112) to what undoes it.
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} are more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is longer than {MAX_ASPECT} times its width")


def _decode_by_library(data: bytes, complaint: str) -> tuple[Image.Image, str]:
    try:
        return _decode_by_pillow(data)
    except BadImage:
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


def _decode_by_pillow(data: bytes) -> tuple[Image.Image, str]:
    image = Image.open(io.BytesIO(data))
    _check_size(*image.size)
    if image.format == "JPEG" and image.mode != "CMYK":
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
        "pillow-simd" if simd else "pillow": PIL.__version__,
        "simplejpeg": metadata.version("simplejpeg"),
        "libjpeg of Pillow": str(features.version("jpg")),
    }
