"""Writes HEIC files: pictures that ffmpeg encodes as HEVC, in boxes by hand (ISO/IEC 23008-12)."""

import struct
import subprocess

import imageio_ffmpeg
import numpy as np

ALPHA = b"urn:mpeg:hevc:2015:auxid:1\0"


def heic(tiles: list[np.ndarray], columns: int = 1, size=None, alpha=None, transforms=()) -> bytes:
    """A HEIC of uint8 RGB `tiles` in rows of `columns`, cropped to `size` (width, height); several of them are a grid.

    `alpha` is a gray picture of the same size as the tile; `transforms` are (kind, content) of boxes, for image and alpha.
    """
    pictures = [_hevc(tile, "yuv420p") for tile in tiles] + ([_hevc(alpha, "gray")] if alpha is not None else [])
    height, width = tiles[0].shape[:2]
    properties = [box for configuration, _ in pictures for box in (_box(b"hvcC", configuration),)]
    properties += [_box(b"ispe", struct.pack(">III", 0, width, height))]
    ispe = len(properties)
    properties += [_box(kind, content) for kind, content in transforms]
    turns = list(range(ispe + 1, len(properties) + 1))
    primary, extra, references = 1, [], b""
    items = [(at + 1, b"hvc1", [at + 1, ispe]) for at in range(len(pictures))]
    if len(tiles) > 1:
        primary = len(items) + 1
        properties.append(_box(b"ispe", struct.pack(">III", 0, *size)))
        items.append((primary, b"grid", [len(properties)]))
        extra = [struct.pack(">BBBBHH", 0, 0, len(tiles) // columns - 1, columns - 1, *size)]
        ids = range(1, len(tiles) + 1)
        references += _box(b"dimg", struct.pack(f">HH{len(tiles)}H", primary, len(tiles), *ids))
    items[primary - 1][2].extend(turns)
    if alpha is not None:
        properties.append(_box(b"auxC", bytes(4) + ALPHA))
        items[len(pictures) - 1][2].extend([*turns, len(properties)])
        references += _box(b"auxl", struct.pack(">HHH", len(pictures), 1, primary))
    contents = [sample for _, sample in pictures] + extra
    used = b"".join(struct.pack(">HB", number, len(of)) + bytes(of) for number, _, of in items)
    entries = [_box(b"infe", b"\2\0\0\0" + struct.pack(">HH", number, 0) + kind + b"\0") for number, kind, _ in items]

    def meta(start: int) -> bytes:
        places, at = b"", start
        for (number, _, _), content in zip(items, contents):
            places += struct.pack(">HHHII", number, 0, 1, at, len(content))
            at += len(content)
        return _box(
            b"meta",
            bytes(4)
            + _box(b"hdlr", bytes(8) + b"pict" + bytes(13))
            + _box(b"pitm", bytes(4) + struct.pack(">H", primary))
            + _box(b"iloc", bytes(4) + b"\x44\0" + struct.pack(">H", len(items)) + places)
            + _box(b"iinf", bytes(4) + struct.pack(">H", len(items)) + b"".join(entries))
            + (_box(b"iref", bytes(4) + references) if references else b"")
            + _box(b"iprp", _box(b"ipco", b"".join(properties)) + _box(b"ipma", bytes(4) + struct.pack(">I", len(items)) + used)),
        )

    head = _box(b"ftyp", b"heic" + bytes(4) + b"mif1heic")
    return head + meta(len(head) + len(meta(0)) + 8) + _box(b"mdat", b"".join(contents))


def _hevc(pixels: np.ndarray, format: str) -> tuple[bytes, bytes]:
    """The hvcC and the one sample of a picture, which ffmpeg puts into an MP4."""
    height, width = pixels.shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24" if pixels.ndim == 3 else "gray", "-s", f"{width}x{height}", "-i", "pipe:"]
    codec = ["-pix_fmt", format, "-color_range", "pc", "-c:v", "libx265", "-x265-params", "log-level=none:qp=4", "-tag:v", "hvc1"]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        *source,
        *codec,
        "-movflags",
        "frag_keyframe",
        "-f",
        "mp4",
        "pipe:",
    ]
    mp4 = subprocess.run(command, input=pixels.tobytes(), capture_output=True, check=True).stdout
    return _content(mp4, b"hvcC"), _content(mp4, b"mdat")


def _content(data: bytes, kind: bytes) -> bytes:
    at = data.index(kind)
    return data[at + 4 : at - 4 + int.from_bytes(data[at - 4 : at])]


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content
