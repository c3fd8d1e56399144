"""The stills of docs/images.md: a left half in one color and a right half in another, in odd but valid files.

Writes JPEGs without a library, with blocks of one value each, because no library writes all these headers.
"""

import struct
import zlib

WIDTH, HEIGHT = 96, 96
LEFT, RIGHT = (200, 90, 40), (40, 110, 180)
# Packages that write what is not written by hand below.
PACKAGES = ["numpy==2.4.6", "pillow==13.0.0", "imageio-ffmpeg==0.8.1", "imagecodecs==2026.3.6"]


def ycc(color):
    r, g, b = color
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg(left, right, factors, ids=(1, 2, 3, 4), markers=b"", bits=8):
    """A JPEG of the samples `left` and `right` of each component, with these sampling factors (h, v) and component ids."""
    center, step = 1 << bits - 1, 8 if bits == 8 else 16
    widest, highest = max(h for h, _ in factors), max(v for _, v in factors)
    frame = struct.pack(">BHHB", bits, HEIGHT, WIDTH, len(factors))
    frame += b"".join(bytes([ids[n], h << 4 | v, 0]) for n, (h, v) in enumerate(factors))
    scan = bytes([len(factors)]) + b"".join(bytes([ids[n], 0]) for n in range(len(factors))) + bytes([0, 63, 0])
    dc = bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]) + bytes(range(12))  # ITU-T T.81, table K.3
    codes = {0: "00", 1: "010", 2: "011", 3: "100", 4: "101", 5: "110"} | {n: "1" * (n - 3) + "0" for n in range(6, 12)}
    out, before = "", [0] * len(factors)
    if len(factors) == 1:
        factors, widest, highest = [(1, 1)], 1, 1  # a scan of one component has its blocks row by row
    wide, high = -(-WIDTH // (8 * widest)), -(-HEIGHT // (8 * highest))
    for column in [column for _ in range(high) for column in range(wide)]:
        for n, (h, v) in enumerate(factors):
            for block in [block for _ in range(v) for block in range(h)]:
                middle = (column + (block + 0.5) / h) * 8 * widest
                value = round((left[n] if middle <= WIDTH / 2 else right[n]) - center) * 8 // step
                change, before[n] = value - before[n], value
                size = abs(change).bit_length()
                shown = change if change > 0 else change + (1 << size) - 1
                out += codes[size] + (f"{shown:0{size}b}" if size else "") + "0"  # and no AC coefficient
    data = int(out + "1" * (-len(out) % 8), 2).to_bytes((len(out) + 7) // 8).replace(b"\xff", b"\xff\x00")
    tables = segment(0xDB, bytes([0]) + bytes([step] * 64)) + segment(0xC4, b"\0" + dc)
    tables += segment(0xC4, b"\x10" + bytes([1]) + bytes(15) + b"\0")
    head = segment(0xC0 if bits == 8 else 0xC1, frame)
    return b"\xff\xd8" + markers + tables + head + segment(0xDA, scan) + data + b"\xff\xd9"


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform):
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def color_jpeg(*factors, **options):
    return jpeg(ycc(LEFT), ycc(RIGHT), factors, markers=JFIF, **options)


def cmyk(color):
    """Inverted, as Adobe stores it: 255 is no ink."""
    return (*color, 255)


def png(depth, kind, rows, *chunks):
    """A PNG of packed rows; `kind` is its color type."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks) + body + chunk(b"IEND", b"")


def tiff(bits, white, data):
    """A gray TIFF of one strip; `white` is 0 if 0 is white, else 1."""
    tags = [(256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, HEIGHT), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def wide_row(left, right, count=1):
    return (struct.pack(">H", left) * count * (WIDTH // 2)) + struct.pack(">H", right) * count * (WIDTH // 2)


def stills(lossless=True):
    """By name: the bytes, and the right colors of the left and right half. The lossless JPEGs need imagecodecs."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2], pixels[:, WIDTH // 2 :] = LEFT, RIGHT
    gray, both, grays = np.ascontiguousarray(pixels[..., 0]), (LEFT, RIGHT), ((200,) * 3, (40,) * 3)
    white = (255, 255, 255)

    def saved(image, format, **options):
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    plain = saved(Image.fromarray(pixels), "JPEG", subsampling=0, quality=95)
    low = np.where(gray == 200, 1, 2).astype(np.uint8).reshape(HEIGHT, -1, 4) << np.array([6, 4, 2, 0], np.uint8)
    pairs = bytes([200, 0x0C, 0x80]) * (WIDTH // 4) + bytes([40, 0x02, 0x80]) * (WIDTH // 4)  # of 12 bits: 0xC80, 0x280
    red = Image.new("RGB", (WIDTH, HEIGHT), (255, 0, 0))
    rgb16 = png(16, 2, [wide_row(0x1234, 0x2828, 3)] * HEIGHT, (b"tRNS", b"\x12\x34" * 3))
    gray2 = png(2, 0, [row.tobytes() for row in low.sum(-1).astype(np.uint8)], (b"tRNS", b"\0\1"))
    gray8 = png(8, 0, [row.tobytes() for row in gray], (b"tRNS", b"\0\xc8"))
    frames = [Image.fromarray(pixels), Image.fromarray(pixels[:, ::-1].copy())]
    apng = saved(red, "PNG", save_all=True, default_image=True, append_images=frames)
    one = [(1, 1)] * 3
    marked = jpeg(ycc(LEFT), ycc(RIGHT), one, markers=JFIF + adobe(0))
    named = jpeg(ycc(LEFT), ycc(RIGHT), one, ids=b"RGB", markers=JFIF)
    return {
        "JPEG 4:2:0": (color_jpeg((2, 2), (1, 1), (1, 1)), both),
        "JPEG, gray with factors 2x2": (jpeg([200], [40], [(2, 2)], markers=JFIF), grays),
        "JPEG, chroma finer than luma (1x1, 2x1, 2x1)": (color_jpeg((1, 1), (2, 1), (2, 1)), both),
        "JPEG, luma 3x1": (color_jpeg((3, 1), (1, 1), (1, 1)), both),
        "JPEG, luma 1x3": (color_jpeg((1, 3), (1, 1), (1, 1)), both),
        "JPEG 4:1:0 (4x2)": (color_jpeg((4, 2), (1, 1), (1, 1)), both),
        "JPEG, mixed (2x2, 1x2, 2x1)": (color_jpeg((2, 2), (1, 2), (2, 1)), both),
        "JPEG, JFIF and Adobe transform 0 (YCbCr by JFIF)": (marked, both),
        "JPEG, ids R, G, B without markers (RGB)": (jpeg(LEFT, RIGHT, [(1, 1)] * 3, ids=b"RGB"), both),
        "JPEG, ids R, G, B with JFIF (YCbCr by JFIF)": (named, both),
        "JPEG, CMYK with Adobe marker": (jpeg(cmyk(LEFT), cmyk(RIGHT), [(1, 1)] * 4, markers=adobe(0)), both),
        "JPEG, CMYK without marker (inverted too)": (jpeg(cmyk(LEFT), cmyk(RIGHT), [(1, 1)] * 4), both),
        "JPEG, 12 bits": (color_jpeg12(), both),
        "JPEG without Huffman tables": (without(plain), both),
        "PNG, gray, 16 bits (0xC8FF, 0x2800)": (png(16, 0, [wide_row(0xC8FF, 0x2800)] * HEIGHT), grays),
        "PNG, RGB, 16 bits, tRNS for the left": (rgb16, (white, (40,) * 3)),
        "PNG, gray, 2 bits, tRNS for the left": (gray2, (white, (170,) * 3)),
        "PNG, gray, 8 bits, tRNS for the left": (gray8, (white, (40,) * 3)),
        "APNG with a default image outside the animation": (apng, ((255, 0, 0),) * 2),
        "TIFF, gray, 16 bits, 0 is white": (tiff(16, 0, (0xFFFF - gray.astype("<u2") * 257).tobytes()), grays),
        "TIFF, gray, 12 bits": (tiff(12, 1, pairs * HEIGHT), grays),
        **(lossless_jpegs(pixels, gray, both, grays) if lossless else {}),
    }  # fmt: skip


def lossless_jpegs(pixels, gray, both, grays):
    from imagecodecs import jpeg8_encode, ljpeg_encode

    color = jpeg8_encode(pixels, lossless=True)
    return {"JPEG, lossless, color": (color, both), "JPEG, lossless, gray": (ljpeg_encode(gray), grays)}


def color_jpeg12():
    left, right = ([16 * value for value in ycc(color)] for color in (LEFT, RIGHT))
    return jpeg(left, right, [(1, 1)] * 3, markers=JFIF, bits=12)


def tables_of(data):
    """Where the Huffman tables of a JPEG begin."""
    at = 2
    while data[at + 1] != 0xDA:
        if data[at + 1] == 0xC4:
            yield at
        at += 2 + int.from_bytes(data[at + 2 : at + 4])


def without(data):
    """The JPEG without its Huffman tables, which are the standard's, as in a frame of Motion JPEG."""
    for at in reversed(list(tables_of(data))):
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    return data


def turned():
    """By format: a picture stored lying on its side, whose orientation (6, or the same as boxes) makes it stand."""
    import io

    import numpy as np
    from imagecodecs import jpegxl_encode_jpeg
    from PIL import Image

    from tests.heic import heic

    pixels = np.zeros((64, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2], pixels[:, WIDTH // 2 :] = LEFT, RIGHT
    exif = Image.Exif()
    exif[0x112] = 6
    formats = {"JPEG": {"quality": 95}, "PNG": {}, "WebP": {"lossless": True}, "TIFF": {}, "AVIF": {"quality": 90}}
    made = {}
    for name, options in formats.items():
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, name, exif=exif, **options)
        made[name] = stream.getvalue()
    return made | {"JPEG XL of a JPEG": jpegxl_encode_jpeg(made["JPEG"]), "HEIC": heic([pixels], transforms=[(b"irot", b"\3")])}
