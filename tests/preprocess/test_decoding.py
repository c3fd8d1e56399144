"""Pixels as files mean them: depth, range, transparency, orientation and whole pictures, whichever decoder it takes."""

import base64
import io
import os
import re
import struct
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess import ffmpeg
from imagefeed.preprocess.decoding import BadImage, decode
from imagefeed.preprocess.image import prepare_image
from imagefeed.preprocess.options import ImageOptions
from tests.heic import heic

RNG = np.random.default_rng(7)
RAMP = np.arange(64 * 64).reshape(64, 64)  # all values of 12 bits
COLORED = np.dstack([RAMP, RAMP[::-1], RAMP.T])


def pixels(data: bytes, value_range=None) -> np.ndarray:
    return np.asarray(decode(data, value_range).image).astype(int)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.floor((values.astype(float) - low) * 255 / (high - low) + 0.5).clip(0, 255)


# ---- PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, bits: int, color: int, transparent: tuple = ()) -> bytes:
    """PNG (ISO/IEC 15948) of `color` 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA; each row has filter 0."""
    flat = samples.reshape(len(samples), -1)
    lines = [flat.astype(">u2").tobytes()] if bits == 16 else []
    if bits < 16:
        digits = (flat[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(len(flat), -1)
        lines = [np.packbits(digits, axis=1).tobytes()]
    size = len(lines[0]) // len(flat)
    rows = b"".join(b"\0" + lines[0][at : at + size] for at in range(0, len(lines[0]), size))
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), bits, color, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_gray_of_a_png_becomes_white(bits):
    gray = RNG.integers(0, 1 << bits, (20, 30))
    gray[:, :10] = 1
    seen = gray * 255 // ((1 << bits) - 1) if bits < 16 else gray >> 8
    np.testing.assert_array_equal(pixels(png(gray, bits, 0, (1,)))[..., 0], np.where(gray == 1, 255, seen))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_color_of_a_png_becomes_white_and_no_other(bits):
    color = RNG.integers(0, 1 << bits, (20, 30, 3))
    color[:, :10] = (1, 2, 3)
    color[:, 20:] = (1, 2, 4) if bits == 8 else (1, 2, 3 + 256)
    expected = np.where((color == (1, 2, 3)).all(2)[..., None], 255, color >> (bits - 8))
    np.testing.assert_array_equal(pixels(png(color, bits, 2, (1, 2, 3))), expected)


@pytest.mark.parametrize(("color", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_twelve_bits_in_sixteen_are_suspicious_until_their_range_is_given(color, bands):
    samples = np.dstack([RAMP, RAMP.T, RAMP[::-1], RAMP])[..., :bands]
    if bands in (2, 4):
        samples[..., -1] = 65535
    data = png(samples, 16, color)
    seen = samples[..., : 1 if bands < 3 else 3]
    found = decode(data, None)
    assert found.suspicious and "nearly black" in found.how and "--range LOW,HIGH" in found.how
    assert np.abs(np.asarray(found.image) - (seen >> 8)).max() == 0
    assert not decode(data, (0, 4095)).suspicious
    np.testing.assert_array_equal(pixels(data, (0, 4095)), np.broadcast_to(scaled(seen, 0, 4095), (64, 64, 3)))


@pytest.mark.parametrize(
    ("samples", "bits", "suspicious"),
    [
        (RAMP * 16, 16, False),
        (65535 - RAMP, 16, True),  # 12 bits of which 0 is white
        (RAMP * 10000 // 4095, 16, True),  # reflectance
        (RAMP % 40, 8, False),  # a night's photo
    ],
)
def test_only_pictures_of_more_than_8_bits_are_suspicious(samples, bits, suspicious):
    assert decode(png(samples, bits, 0), None).suspicious == suspicious


# ---- TIFF

TYPES = {1: "B", 3: "H", 4: "I"}


def tiff(
    samples: np.ndarray, photometric=1, packed: bytes | None = None, order="<", planes=False, deflated=False, **tags
) -> bytes:
    """A TIFF 6.0 of one strip, or of one for each plane; further `tags` by their numbers, as t338=2."""
    bands = samples.shape[2] if samples.ndim == 3 else 1
    strips = list(np.moveaxis(samples, 2, 0)) if planes else [samples]
    content = [packed or strip.astype(strip.dtype.newbyteorder(order)).tobytes() for strip in strips]
    content = [zlib.compress(strip) for strip in content] if deflated else content
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = {256: (4, [samples.shape[1]]), 257: (4, [len(samples)]), 258: (3, [samples.dtype.itemsize * 8] * bands)}
    entries |= {259: (3, [8 if deflated else 1]), 262: (3, [photometric]), 277: (3, [bands]), 278: (4, [len(samples)])}
    entries |= {279: (4, [len(strip) for strip in content]), 284: (3, [2 if planes else 1]), 339: (3, [kind] * bands)}
    entries |= {int(name[1:]): (3, list(np.atleast_1d(value))) for name, value in tags.items()}
    head, extra = 8 + 2 + 12 * (len(entries) + 1) + 4, b""
    place = head + 16 * 16
    entries[273] = (4, [place + sum(map(len, content[:at])) for at in range(len(content))])
    directory = struct.pack(order + "H", len(entries))
    for tag, (type_, values) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(values)}{TYPES[type_]}", *values)
        if len(value) > 4:
            extra, value = extra + value, struct.pack(order + "I", head + len(extra))
        directory += struct.pack(order + "HHI", tag, type_, len(values)) + value.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return (start + directory + bytes(4) + extra).ljust(place, b"\0") + b"".join(content)


def twelve_bits(samples: np.ndarray, photometric=1) -> bytes:
    even, odd = samples.reshape(-1, 2).T
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1).astype(np.uint8).tobytes()
    return tiff(samples.astype(np.uint16), photometric, packed, t258=12)


GRAY, COLOR = (RAMP * 16).astype(np.uint16), (COLORED * 16).astype(np.uint16)
BANDS = np.dstack([COLORED >> 4, RAMP.T[::-1] >> 4]).astype(np.uint8)


@pytest.mark.parametrize(("order", "deflated"), [("<", False), (">", True)], ids=["Intel", "Motorola, deflated"])
@pytest.mark.parametrize(
    ("samples", "options", "expected"),
    [
        (GRAY, {}, GRAY >> 8),
        (GRAY, {"photometric": 0}, 255 - (GRAY >> 8)),
        (COLOR, {"photometric": 2}, COLOR >> 8),
        (COLOR, {"photometric": 2, "planes": True}, COLOR >> 8),
        (BANDS, {"photometric": 2}, BANDS[..., :3]),  # four bands, nothing says that the fourth is alpha
        (BANDS, {"photometric": 2, "t338": 0}, BANDS[..., :3]),
        (BANDS[..., :2], {"t338": 0}, BANDS[..., 0]),
    ],
    ids=["gray", "white is 0", "color", "planes", "4 bands", "4th unspecified", "gray and unspecified"],
)
def test_a_tiff_is_read_as_its_tags_say(samples, options, expected, order, deflated):
    found = pixels(tiff(samples, order=order, deflated=deflated, **options))
    np.testing.assert_array_equal(found, np.broadcast_to(np.atleast_3d(expected), found.shape))


@pytest.mark.parametrize("deflated", [False, True], ids=["raw", "deflated"])
def test_the_alpha_of_a_tiff_is_put_on_white(deflated):
    straight = BANDS.copy()
    straight[:, 32:, 3] = 0
    share = straight[..., 3:].astype(int)
    expected = (straight[..., :3] * share + 255 * (255 - share)) / 255
    assert np.abs(pixels(tiff(straight, 2, deflated=deflated, t338=2)) - expected).max() < 1.5
    multiplied = straight.copy()
    multiplied[..., :3] = (straight[..., :3].astype(int) * share + 127) // 255
    assert np.abs(pixels(tiff(multiplied, 2, deflated=deflated, t338=1)) - expected).max() < 3


@pytest.mark.parametrize(("photometric", "expected"), [(1, RAMP >> 4), (0, 255 - (RAMP >> 4))])
def test_twelve_bits_of_a_tiff_are_counted_as_twelve(photometric, expected):
    found = decode(twelve_bits(RAMP, photometric), None)
    np.testing.assert_array_equal(np.asarray(found.image)[..., 0], expected)
    assert not found.suspicious


@pytest.mark.parametrize(
    ("samples", "value_range", "kind"),
    [
        ((RAMP - 1024).astype(np.int16), (-1024, 3071), "16-bit signed integers"),
        ((RAMP // 16 - 128).astype(np.int8), (-128, 127), "8-bit signed integers"),
        (RAMP.astype(np.uint32) << 20, (0, 4095 << 20), "32-bit unsigned integers"),
        ((RAMP.astype(np.int64) - 2048 << 20).astype(np.int32), (-2048 << 20, 2047 << 20), "32-bit signed integers"),
        (np.where(RAMP == 9, np.nan, RAMP / 1000 - 1).astype(np.float32), (-1, 3.095), "32-bit floating-point numbers"),
    ],
)
def test_numbers_of_unknown_range_are_refused_until_it_is_given(samples, value_range, kind):
    data = tiff(samples)
    with pytest.raises(BadImage, match=f"a TIFF of {kind}, whose range is unknown; give it with --range LOW,HIGH"):
        decode(data, None)
    expected = scaled(np.nan_to_num(samples.astype(float), nan=value_range[0]), *value_range)
    assert np.abs(pixels(data, value_range)[..., 0] - expected).max() <= (samples.dtype == np.float32)


def test_a_range_is_of_the_values_in_the_file():
    white = tiff(GRAY, 0)
    np.testing.assert_array_equal(pixels(white, (0, 30000))[..., 0], 255 - scaled(GRAY, 0, 30000))
    for options in ({}, {"planes": True}, {"deflated": True}):
        np.testing.assert_array_equal(pixels(tiff(COLOR, 2, **options), (100, 9000)), scaled(COLOR, 100, 9000))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.zeros((8, 8, 13), np.uint16)), "a TIFF of 13 bands, but its color space has 1; store three of them as red"),
        (tiff(np.zeros((8, 8, 3), np.uint8)), "a TIFF of 3 bands, but its color space has 1"),
        (tiff(BANDS, 2, t254=1), "a TIFF whose first image is a thumbnail"),
        (tiff(GRAY, 32803), "PhotometricInterpretation 32803"),
        (tiff(GRAY.astype(np.float64)), "64-bit floating-point numbers, whose range is unknown"),
        (tiff(np.full((8, 8, 3), 90, np.uint8), 6), "it cannot read a TIFF of YCbCr"),
    ],
    ids=["13 bands", "gray and 2", "thumbnail", "sensor", "float64", "YCbCr"],
)
def test_a_tiff_that_would_be_guessed_at_is_refused(data, reason, caplog):
    with pytest.raises(BadImage, match=reason):
        decode(data, None)
    assert not caplog.records


# ---- JPEG: arithmetic coding, and whose orientation counts

# 48 x 32, arithmetic-coded by libjpeg-turbo 2.1.5: RGB, CMYK.
ARITHMETIC = {
    "RGB": (
        "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCxAWEBETFBUVFQwPFxgWFBgS"
        "FBUU/8kAEQgAIAAwA1IRAEcRAEIRAP/MAAYAEBAF/9oADANSAEcAQgAAPwD/AO2S3tI5Zjy3aU0o2slwYV1HeIZ3g/vfqWSr0wsekSvFMn+J0emG"
        "wBO5R09lg3E6zQ+Vf1l3aB49U5Zu4OEnYwXO+RiD40/E7SM6T5eWb+OrxKGiJ/VPygA0fKlNoXRhybBcJyqq0cmQW84FRFs0z8TyNy0t8GSWvQLj"
        "qq8OGQRH1B9AYF+euDmh2+S9dYLA6zj1CcnQ99hbrdEgVNs4DXWK4SEpzydI+tndDxzAAzCKbcrO/9k="
    ),
    "CMYK": (
        "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4LCxAWEBETFBUVFQwPFxgWFBgS"
        "FBUU/8kAFAgAIAAwBEMRAE0RAFkRAEsRAP/MAAYAEBAF/9oADgRDAE0AWQBLAAA/AP8A7ZLe0jlmPLdpTSjayXBiSwqzjs18930L7Rk4zEUVX1S6"
        "v7+01lapNAEmMC46UBgt/d9/BPZY738iqxMYLk+uKYTpt74b9OfLRlo8mw4my8ceGh0pf6vdlB1p4wY3XOFmZiaZqOBolD1hpvmOCOuuuFDSfT7r"
        "ZSxT878EJ+KrE3NstYVA/nqLzctcpC747oUBLXsASIeHtOSylix2P+C54qXchG/GCak+RpXNEPr+aoz/AIu2Svu8nG+A/9k="
    ),
}


@pytest.mark.parametrize("colors", ARITHMETIC)
def test_an_arithmetic_coded_jpeg_is_decoded_past_the_first_block(colors):
    """Pillow reads 65,536 bytes at a time, and libjpeg cannot pause in arithmetic-coded data: the boundary falls into it here."""
    small = base64.b64decode(ARITHMETIC[colors])
    scan = small.index(b"\xff\xda")
    padding = 65536 - scan - (len(small) - scan) // 2 - 4
    data = small[:2] + b"\xff\xef" + struct.pack(">H", padding + 2) + bytes(padding) + small[2:]
    expected = np.asarray(Image.open(io.BytesIO(small)).convert("RGB"))
    np.testing.assert_array_equal(pixels(data), expected)
    assert prepare_image(data, ImageOptions(16)).converted == f"JPEG {colors}"


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def test_exif_turns_an_image_and_xmp_does_not():
    image = Image.fromarray(BANDS[..., :3]).resize((60, 40))
    maker, turned = Image.Exif(), Image.Exif()
    maker[271], turned[274] = "a maker", 6
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP)
    lying = [
        saved(image, "JPEG", xmp=XMP.encode()),
        saved(image, "JPEG", xmp=XMP.encode(), exif=maker),
        saved(image.convert("CMYK"), "JPEG", xmp=XMP.encode(), exif=maker),
        saved(image, "PNG", pnginfo=text, exif=maker),
        saved(image, "WEBP", xmp=XMP.encode()),
        saved(image, "TIFF", tiffinfo={700: XMP.encode()}),
    ]
    upright = [saved(image, format, exif=turned) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    upright += [saved(image, "JPEG", exif=turned, xmp=XMP.replace('"6"', '"3"').encode())]
    sizes = [prepare_image(data, ImageOptions(20, "short")).planes.y.shape for data in lying + upright]
    assert sizes == [(20, 30)] * len(lying) + [(30, 20)] * len(upright)


# ---- By ffmpeg

CORNERS = np.zeros((64, 96, 3), np.uint8)
CORNERS[:32, :48], CORNERS[:32, 48:], CORNERS[32:, :48], CORNERS[32:, 48:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255


def encoded(pixels: np.ndarray, codec: str, *options: str, frames=1) -> bytes:
    kind = {1: "gray16le" if pixels.dtype == np.uint16 else "gray", 3: "rgb24", 4: "rgba"}[np.atleast_3d(pixels).shape[2]]
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    source = ["-f", "rawvideo", "-pix_fmt", kind, "-s", size, "-i", "pipe:"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-c:v", codec, *options, "pipe:"]
    return subprocess.run(command, input=pixels.tobytes() * frames, capture_output=True, check=True).stdout


def assert_corners(found: np.ndarray, expected: np.ndarray, tolerance=12) -> None:
    height, width = found.shape[:2]
    for y in (2, height // 2 - 6, height // 2 + 6, height - 3):
        for x in (2, width // 2 - 6, width // 2 + 6, width - 3):
            assert np.abs(found[y, x] - expected[y, x]).max() <= tolerance, (y, x, found[y, x], expected[y, x])


# Of ISO/IEC 14496-12: width and height, and how far the center of what is kept lies from that of the picture, as fractions.
ODD = struct.pack(">IIIIiIiI", 95, 1, 63, 1, -1, 2, -1, 2)


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([], CORNERS),
        ([(b"clap", ODD)], CORNERS[:63, :95]),
        ([(b"irot", b"\1")], np.rot90(CORNERS)),
        ([(b"irot", b"\3")], np.rot90(CORNERS, 3)),
        ([(b"imir", b"\0")], CORNERS[::-1]),
        ([(b"imir", b"\1")], CORNERS[:, ::-1]),
        ([(b"clap", ODD), (b"irot", b"\3"), (b"imir", b"\1")], np.rot90(CORNERS[:63, :95], 3)[:, ::-1]),
    ],
    ids=["plain", "odd", "left", "right", "flipped", "mirrored", "all"],
)
def test_a_heic_is_whole_and_upright(transforms, expected):
    found = pixels(heic([CORNERS], transforms=transforms))
    assert found.shape == expected.shape
    assert_corners(found, expected)


def test_the_tiles_of_a_heic_are_put_together_and_cropped():
    parts = [np.full((64, 64, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))]
    whole = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
    found = pixels(heic(parts, 2, (127, 101), transforms=[(b"irot", b"\3")]))
    assert found.shape == (127, 101, 3)
    assert np.abs(found[::40, ::45] - np.rot90(whole[:101, :127], 3)[::40, ::45]).max() < 12


def test_a_large_heic_with_alpha_is_put_on_white():
    noise = RNG.integers(0, 256, (256, 384, 3)).astype(np.uint8)
    alpha = np.full((256, 384), 255, np.uint8)
    alpha[:, :100] = 0
    data = heic([noise], alpha=alpha, transforms=[(b"imir", b"\1")])
    found = decode(data, None)
    assert len(data) > 1 << 16 and found.how == "decoded by ffmpeg on white"
    assert np.asarray(found.image)[:, -90:].min() > 250 and np.asarray(found.image)[:, :-110].mean() < 150
    with pytest.raises(BadImage, match="ffmpeg: .*(partial file|corrupt input packet|End of file)"):
        decode(data[: len(data) * 2 // 3], None)


def test_what_has_no_primary_image_is_a_video():
    mp4 = encoded(CORNERS, "libx264", "-pix_fmt", "yuv420p", "-movflags", "frag_keyframe", "-f", "mp4")
    with pytest.raises(BadImage, match="no primary image, as a video"):
        decode(mp4, None)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libjxl", ("-distance", "0", "-f", "image2pipe")),
        ("jpeg2000", ("-pred", "1", "-f", "image2pipe")),
        ("libopenjpeg", ("-f", "image2pipe")),
        ("jpeg2000", ("-pred", "1", "-format", "j2k", "-f", "image2pipe")),
    ],
    ids=["JPEG XL", "JP2", "OpenJPEG's JP2", "bare JPEG 2000"],
)
def test_jpeg_xl_and_jpeg_2000_are_put_on_white(codec, options):
    clear = np.dstack([CORNERS // 2, np.full((64, 96), 255, np.uint8)])
    clear[:32, :, 3] = 0
    found = decode(encoded(clear, codec, *options), None)
    assert found.how == "decoded by ffmpeg on white"
    expected = np.where(clear[..., 3:] == 0, 255, clear[..., :3])
    assert_corners(np.asarray(found.image).astype(int), expected.astype(int))


def test_jpeg_2000_is_counted_by_its_own_bits():
    data = encoded(GRAY, "jpeg2000", "-pred", "1", "-format", "j2k", "-f", "image2pipe")
    assert data[:4] == b"\xff\x4f\xff\x51"
    np.testing.assert_array_equal(pixels(data)[..., 0], GRAY >> 8)
    assert np.abs(pixels(data, (0, 30000))[..., 0] - scaled(GRAY, 0, 30000)).max() == 0


def test_the_first_frame_of_an_animation_counts():
    data = encoded(CORNERS, "libjxl_anim", "-distance", "0.3", "-f", "image2pipe", frames=3)
    assert_corners(pixels(data), CORNERS)


def test_without_memfd_a_temporary_file_will_do(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert pixels(encoded(CORNERS, "jpeg2000", "-f", "image2pipe")).shape == CORNERS.shape


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (None, UserError, r"/ffmpeg: cannot be run \(No such file or directory\); install imageio-ffmpeg again"),
        ("kill -9 $$", UserError, "ffmpeg was killed, probably because memory ran out"),
        ("kill -11 $$", BadImage, r"ffmpeg unknown crashes on it \(SIGSEGV\); another version of imageio-ffmpeg may read it"),
    ],
)
def test_an_ffmpeg_that_does_not_work_is_no_fault_of_the_image(script, error, message, monkeypatch, tmp_path):
    program = tmp_path / "ffmpeg"
    if script:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    assert ffmpeg.version() == ("unknown" if script else "none")
    with pytest.raises(error, match=message):
        decode(b"\xff\x4f\xff\x51" + bytes(100), None)


def test_the_words_of_ffmpeg_hold_neither_addresses_nor_paths():
    with pytest.raises(ffmpeg.FfmpegError) as error:
        ffmpeg.decode(b"\xff\x4f\xff\x51" + bytes(100), 1 << 20)
    assert str(error.value) and not re.search("0x[0-9a-f]{6}|/dev/fd|@", str(error.value))
