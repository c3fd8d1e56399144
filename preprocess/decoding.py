"""Decodes images other than common JPEGs to upright 8-bit RGB, with Pillow or else ffmpeg. Transparency becomes white.

Samples of more than 8 bits keep the highest 8 of the bits that the file declares, unless the user gives their range.
"""

import io
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from imagefeed.preprocess import ffmpeg
from imagefeed.preprocess.heif import Item, apply_transforms, read_heif

MAX_PIXELS = 1 << 27  # 134 million: four times the largest ImageNet image; decoding it takes at most 0.9 GB
MAX_ASPECT = 40  # 10,000 x 1 would become 2,560,000 x 256
# Samples of more than 8 bits are suspicious if nearly all lie in the darkest or the brightest quarter. Examples: a camera's 10 to
# 14 bits in a 16-bit file, reflectance up to 10,000, depth in millimeters.
SHARE, DARK, BRIGHT = 0.99, 64, 192
OF_KNOWN_RANGE = ("PNG", "TIFF", "PPM", "SGI")  # Pillow's formats with more than 8 bits; FITS and others hold measurements
RANGE_UNKNOWN = "whose range is unknown; give it with --range LOW,HIGH"

Range = tuple[float, float] | None


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, as it stands in rejected.jsonl."""


class Decoded(NamedTuple):
    """`how` names the format, and ffmpeg if it decoded the image; `suspicious` means that the assumed range may be wrong."""

    image: Image.Image  # RGB
    how: str
    suspicious: bool = False


class Samples(NamedTuple):
    """The samples of one image as the file stores them, with the `bits` that it declares; `inverted` means that 0 is white."""

    values: np.ndarray  # (height, width) or (height, width, 3)
    bits: int
    inverted: bool = False


class Tiff(NamedTuple):
    """The first page of a TIFF (TIFF 6.0, sections 8, 18 and 19). `alpha` is 0 for none, 1 for premultiplied, 2 for straight."""

    bits: int
    bands: int
    colors: int
    kind: str  # the kind of samples, if their range is unknown
    inverted: bool  # 0 is white, and the decoder does not know: see _with_black_zero
    alpha: int
    planar: bool
    tiled: bool
    ycbcr: bool


def decode(data: bytes, value_range: Range, complaint: str = "") -> Decoded:
    """Decodes an image. `complaint` is libjpeg-turbo's message if it refused the JPEG. Raises BadImage with the reason."""
    tiff = _read_tiff(data)
    if tiff and tiff.kind and value_range is None:
        raise BadImage(f"a TIFF of {tiff.bits}-bit {tiff.kind}, {RANGE_UNKNOWN}")
    if tiff and tiff.inverted:
        data = _with_black_zero(data)
    if not _needs_ffmpeg(data, tiff, value_range):
        try:
            return _decode_by_pillow(data, tiff, value_range, refused=bool(complaint))
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # Pillow raises almost anything on damaged files, even SyntaxError and struct.error
            complaint = complaint or str(error).split(" <_io.BytesIO", 1)[0][:200]  # an address would differ from run to run
        if tiff and tiff.kind:  # ffmpeg would silently decode it wrongly
            raise BadImage(f"a TIFF of {tiff.bits}-bit {tiff.kind} that Pillow does not read: {complaint}")
        if ffmpeg.demuxers(data) in ("", "png_pipe"):
            raise BadImage(f"not an image that can be decoded: {complaint}")
    try:
        return _decode_by_ffmpeg(data, tiff, value_range)
    except ffmpeg.FfmpegError as error:
        by_pillow = f"Pillow: {complaint}; " if complaint else ""
        raise BadImage(f"neither Pillow nor ffmpeg decodes it: {by_pillow}ffmpeg: {error}") from None


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} are more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} is more than {MAX_ASPECT} times as long as wide")


def without_xmp(image: Image.Image) -> Image.Image:
    """Removes XMP, so that only Exif gives the orientation. ffmpeg, OpenCV, DALI and browsers ignore XMP's; Pillow does not."""
    for name in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(name, None)
    image._exif = None  # it may have been read already, for the resolution
    return image


# ---- Which decoder

LAB = 8
COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, LAB: 3}  # by PhotometricInterpretation; others are of raw files
SAMPLE_KINDS = {2: "signed integers", 3: "floating-point numbers", 5: "complex integers", 6: "complex numbers"}  # by SampleFormat


def _read_tiff(data: bytes) -> Tiff | None:
    """Returns None if the data are not a TIFF, or a damaged one, which Pillow reports. Raises BadImage for ambiguous kinds."""
    big = data[:4] in (b"II+\0", b"MM\0+")
    if not big and data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(data)
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if big else 8))
            file.seek(tags.next)
            tags.load(file)
            thumbnail, bits, photometric = tags.get(254, 0) & 1, max(tags.get(258, (1,))), tags.get(262, 1)
            bands, planar, tiled = tags.get(277, 1), tags.get(284, 1) == 2, 322 in tags
            extra, formats = tags.get(338, ()), tags.get(339, (1,))
    except Exception:  # whatever Pillow raises on damage
        return None
    if thumbnail:
        raise BadImage("a TIFF whose first image is a thumbnail, as in raw files of cameras; convert it")
    if photometric not in COLORS or (photometric == LAB and planar):  # Pillow reads planes of CIELab without their signs
        raise BadImage(f"a TIFF with PhotometricInterpretation {photometric}, which imagefeed does not read; convert it")
    colors = COLORS[photometric]
    if bands < colors or bands > colors + (3 if colors > 1 else 1):
        raise BadImage(f"a TIFF of {bands} bands, but its color space has {colors}; store three of them as red, green and blue")
    kind = next((SAMPLE_KINDS[each] for each in formats if each in SAMPLE_KINDS), "unsigned integers" if bits > 16 else "")
    alpha = extra[0] if bands > colors and extra and extra[0] in (1, 2) else 0
    ycbcr = photometric == 6 and tags.get(259, 1) != 7  # in JPEG compression, every decoder knows the range
    inverted = photometric == 0 and (bits > 8 or bool(kind))
    return Tiff(bits, bands, colors, kind, inverted, alpha, planar, tiled, ycbcr)


def _with_black_zero(data: bytes) -> bytes:
    """Sets PhotometricInterpretation to 1: above 8 bits, Pillow does not invert samples, and ffmpeg inverts each byte."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    wide = 8 if data[2:4] in (b"+\0", b"\0+") else 4  # bytes of an offset; BigTIFF counts tags in 8 bytes instead of 2
    place = int.from_bytes(data[wide : 2 * wide], order) + (8 if wide == 8 else 2)
    while int.from_bytes(data[place : place + 2], order) != 262:
        place += 4 + 2 * wide
    return data[: place + 4 + wide] + (1).to_bytes(2, order) + data[place + 6 + wide :]


def _needs_ffmpeg(data: bytes, tiff: Tiff | None, value_range: Range) -> bool:
    """Whether Pillow would decode it incorrectly: of color samples with more than 8 bits, it reads only the high bytes."""
    if tiff:
        return tiff.bands > 1 and 8 < tiff.bits <= 16 and (tiff.planar or (value_range is not None and tiff.colors == 3))
    if ffmpeg.demuxers(data) == "png_pipe":
        depth, color = data[24:25], data[25:26]
        transparent = color == b"\2" and b"tRNS" in data[: data.find(b"IDAT")]
        return depth == b"\x10" and color != b"\0" and (transparent or value_range is not None)
    return ffmpeg.demuxers(data) == "j2k_pipe"  # whatever Pillow's build: few have a decoder


# ---- By Pillow


def _decode_by_pillow(data: bytes, tiff: Tiff | None, value_range: Range, refused: bool) -> Decoded:
    image: Image.Image = Image.open(io.BytesIO(data))
    check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        if refused:
            raise ValueError("a JPEG that libjpeg-turbo refuses")
        image.decodermaxblock = len(data)  # type: ignore[attr-defined]  # libjpeg cannot pause in arithmetic-coded data
    high_bytes = ";16" in str(image.tile)  # type: ignore[attr-defined]  # unless the mode says otherwise
    if image.format != "TIFF":
        image.load()  # a PNG may have its XMP last, and a TIFF is turned by loading it
    found, key, known = f"{image.format} {image.mode}", image.info.get("transparency"), image.format in OF_KNOWN_RANGE
    image = ImageOps.exif_transpose(without_xmp(image))
    if image.mode.startswith("I") or image.mode == "F" or (tiff and tiff.kind):
        if value_range is None and not known:
            raise BadImage(f"{found}, {RANGE_UNKNOWN}")
        samples = _samples(image, tiff)
        rgb = _to_rgb(samples, value_range)
        if key is not None:
            rgb, found = _on_white(rgb, np.where(samples.values == key, 0, 255).astype(np.uint8)), f"{found} on white"
        return _decoded(rgb, found, deep=value_range is None)
    if tiff and tiff.bands > tiff.colors and not tiff.alpha:
        image = image.convert("L" if tiff.colors == 1 else "RGB")  # the first bands: Pillow takes the next one for alpha
    elif image.mode == "L" and key is not None and ffmpeg.demuxers(data) == "png_pipe":
        image.info["transparency"] = key * (255 // ((1 << data[24]) - 1))  # Pillow scales samples of few bits, but not this
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return _decoded(_on_white(image.convert("RGB"), np.asarray(image)[..., 3]), f"{found} on white", high_bytes)
    return _decoded(image.convert("RGB"), found, high_bytes)


def _samples(image: Image.Image, tiff: Tiff | None) -> Samples:
    values = np.asarray(image)
    if not tiff:
        return Samples(values, 16)
    if tiff.kind == "unsigned integers":
        values = values.view(np.uint32)
    elif tiff.bits == 8:
        values = values.view(np.int8)
    return Samples(values, tiff.bits, tiff.inverted)


# ---- By ffmpeg


def _decode_by_ffmpeg(data: bytes, tiff: Tiff | None, value_range: Range) -> Decoded:
    inks = tiff and tiff.planar and tiff.colors == 4
    for unable, what in ((tiff and tiff.tiled, "tiles"), (inks, "planes of ink"), (tiff and tiff.ycbcr, "YCbCr")):
        if unable:  # ffmpeg would silently scramble them, or take YCbCr for a video's limited range
            raise ffmpeg.FfmpegError(f"it cannot read a TIFF of {what}")
    formats, alpha, premultiplied = ffmpeg.demuxers(data), None, bool(tiff and tiff.alpha == 1)
    if formats == "mov":
        try:
            heif = read_heif(data)
        except ValueError as error:
            raise BadImage(f"not an image that can be decoded: {error}") from None
        check_size(heif.image.width, heif.image.height)
        pixels = _decode_item(data, heif.image)
        alpha, premultiplied = _decode_item(data, heif.alpha)[..., 0] if heif.alpha else None, heif.premultiplied
    else:
        pixels = ffmpeg.decode(data, MAX_PIXELS)
        check_size(pixels.shape[1], pixels.shape[0])
    if pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], None if tiff and not tiff.alpha else pixels[..., -1]
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    deep = pixels.dtype == np.uint16 and formats.startswith(("png", "tiff", "j2k", "jpegxl"))  # HEIC, AVIF and JPEG hold photos
    if deep:
        rgb = _to_rgb(_samples_of_ffmpeg(pixels, data, tiff, value_range), value_range)
    else:
        rgb = Image.fromarray(_high_bytes(pixels)).convert("RGB")
    if alpha is not None:
        rgb = _on_white(rgb, _high_bytes(alpha), premultiplied)
    return _decoded(rgb, "decoded by ffmpeg" + (" on white" if alpha is not None else ""), deep and value_range is None)


def _decode_item(data: bytes, item: Item) -> np.ndarray:
    return apply_transforms(ffmpeg.decode(data, MAX_PIXELS, item.tiles, item.columns), item)


def _samples_of_ffmpeg(values: np.ndarray, data: bytes, tiff: Tiff | None, value_range: Range) -> Samples:
    """The file's own samples; ffmpeg spread them over 16 bits."""
    if tiff:
        return Samples(values >> (16 - tiff.bits), tiff.bits, tiff.inverted)
    if ffmpeg.demuxers(data) != "j2k_pipe":
        return Samples(values, 16)
    depth = data[data.find(b"\xff\x4f\xff\x51") + 42]  # ISO/IEC 15444-1, A.5.1: a component's bits less 1, and a flag
    bits, signed = (depth & 127) + 1, depth > 127
    if signed and value_range is None:
        raise BadImage(f"a JPEG 2000 of signed integers, {RANGE_UNKNOWN}")
    return Samples((values >> (16 - bits)).astype(np.int32) - (1 << bits - 1 if signed else 0), bits)


# ---- To RGB of 8 bits


def _to_rgb(samples: Samples, value_range: Range) -> Image.Image:
    pixels = np.empty(samples.values.shape, np.uint8)
    for row, values in enumerate(samples.values):  # row by row: a floating-point copy of all could take a gigabyte
        if value_range is None:
            pixels[row] = (values >> (samples.bits - 8)).clip(0, 255)
        else:
            low, high = value_range
            scaled = (values.astype(np.float64) - low) * (255 / (high - low)) + 0.5
            pixels[row] = np.nan_to_num(scaled, nan=0).clip(0, 255)  # NaN becomes black
    return Image.fromarray(255 - pixels if samples.inverted else pixels).convert("RGB")


def _high_bytes(samples: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(samples >> 8 if samples.dtype == np.uint16 else samples).astype(np.uint8)


def _on_white(rgb: Image.Image, alpha: np.ndarray, premultiplied: bool = False) -> Image.Image:
    mask = Image.fromarray(alpha).resize(rgb.size)  # HEIF allows another size
    if premultiplied:
        missing = 255 - np.asarray(mask, np.uint16)[..., None]
        return Image.fromarray(np.minimum(np.asarray(rgb) + missing, 255).astype(np.uint8))
    rgb.putalpha(mask)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def _decoded(rgb: Image.Image, how: str, deep: bool) -> Decoded:
    """`deep` means that the samples had more than 8 bits and no range was given."""
    if deep:
        counts = np.array(rgb.histogram()).reshape(3, 256).sum(0)
        for tone, share in (("black", counts[:DARK].sum()), ("white", counts[BRIGHT:].sum())):
            if share >= SHARE * counts.sum():
                how = f"{how}, nearly {tone} as stored; if its values have another range, give it with --range LOW,HIGH"
                return Decoded(rgb, how, suspicious=True)
    return Decoded(rgb, how)
