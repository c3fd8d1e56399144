"""Reads how a HEIF file (ISO/IEC 23008-12: HEIC, AVIF) composes its image from coded pictures.

ffmpeg decodes the coded pictures, but it crops odd sizes to even ones, drops alpha, and rotates and mirrors by rules that differ
between versions. So ffmpeg only decodes the coded pictures, and this file does the rest by the file's boxes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ALPHA = (b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha")
TRANSFORMS = (b"clap", b"irot", b"imir")
MAX_TILES = 1024  # a photo of 48 megapixels has 192


class Item(NamedTuple):
    """An image: coded pictures by their ids, in rows of `columns`, cropped to `width` x `height`; then its transforms."""

    tiles: tuple[int, ...]
    columns: int
    width: int
    height: int
    transforms: tuple[tuple[bytes, bytes], ...]


class Heif(NamedTuple):
    image: Item
    alpha: Item | None
    premultiplied: bool


def read_heif(data: bytes) -> Heif:
    """Reads the parts of the primary image. Raises ValueError if the file is damaged or has none, like a video."""
    try:
        meta = next((data[start + 4 : end] for kind, start, end in _boxes(data) if kind == b"meta"), b"")
        boxes = {kind: meta[start:end] for kind, start, end in _boxes(meta)}
        if b"pitm" not in boxes:
            raise ValueError("it has no primary image, as a video")
        file = _File(data, boxes)
        primary = int.from_bytes(boxes[b"pitm"][4:])
        alphas = [at for kind, at, of in file.references if kind == b"auxl" and primary in of and file.is_alpha(at)]
        premultiplied = any(kind == b"prem" and at == primary for kind, at, _ in file.references)
        return Heif(file.item(primary), file.item(alphas[0]) if alphas else None, premultiplied)
    except (IndexError, KeyError, StopIteration):
        raise ValueError("its boxes are damaged") from None


def apply_transforms(pixels: np.ndarray, item: Item) -> np.ndarray:
    """Crops, rotates and mirrors decoded pixels (rows, columns, channels), in the order that the file gives."""
    pixels = pixels[: item.height, : item.width]
    for kind, value in item.transforms:
        if kind == b"clap":  # ISO/IEC 14496-12, section 12.1.4: width, height, and how far the center is from the picture's
            numbers = [int.from_bytes(value[at : at + 4], signed=at in (16, 24)) for at in range(0, 32, 4)]
            wide, high, x, y = (numbers[at] / numbers[at + 1] for at in (0, 2, 4, 6))
            left, top = x + (pixels.shape[1] - wide) / 2, y + (pixels.shape[0] - high) / 2
            pixels = pixels[round(max(top, 0)) : round(top + high), round(max(left, 0)) : round(left + wide)]
        elif kind == b"irot":
            pixels = np.rot90(pixels, value[0] & 3)
        else:
            pixels = pixels[:, ::-1] if value[0] & 1 else pixels[::-1]
    return pixels


class _File:
    def __init__(self, data: bytes, boxes: dict[bytes, bytes]):
        self.data, self.boxes = data, boxes
        self.kinds = dict(_item_kinds(boxes[b"iinf"]))
        self.references = list(_references(boxes.get(b"iref", b"\0\0\0\0")))
        properties = {kind: boxes[b"iprp"][start:end] for kind, start, end in _boxes(boxes[b"iprp"])}
        shared = [(kind, properties[b"ipco"][start:end]) for kind, start, end in _boxes(properties[b"ipco"])]
        self.properties = {
            at: [shared[number - 1] for number in used if number] for at, used in _associations(properties[b"ipma"])
        }

    def is_alpha(self, at: int) -> bool:
        return any(kind == b"auxC" and value[4:].split(b"\0")[0] in ALPHA for kind, value in self.properties[at])

    def item(self, at: int) -> Item:
        properties = self.properties[at]
        transforms = tuple(each for each in properties if each[0] in TRANSFORMS)
        size = dict(properties)[b"ispe"]
        width, height = int.from_bytes(size[4:8]), int.from_bytes(size[8:12])
        if self.kinds[at] == b"grid":  # section 6.6.2.3.2: version, flags, rows - 1, columns - 1, width, height
            content = self._content(at)
            rows, columns = content[2] + 1, content[3] + 1
            tiles = next(of for kind, source, of in self.references if kind == b"dimg" and source == at)
            if len(tiles) != rows * columns or len(tiles) > MAX_TILES:
                raise ValueError(f"{len(tiles)} tiles do not make up {rows} rows of {columns}")
            return Item(tiles, columns, width, height, transforms)
        if self.kinds[at] in (b"iden", b"iovl", b"tmap"):
            raise ValueError(f"it is derived from other images, by {self.kinds[at].decode()}")
        return Item((at,), 1, width, height, transforms)

    def _content(self, at: int) -> bytes:
        """The first bytes of an item (ISO/IEC 14496-12, section 8.11.3)."""
        box = self.boxes[b"iloc"]
        version, sizes = box[0], (box[4] >> 4, box[4] & 15, box[5] >> 4, box[5] & 15 if box[0] else 0)
        wide = 4 if version == 2 else 2
        offset_size, length_size, base_size, index_size = sizes
        place = 6 + wide
        for _ in range(int.from_bytes(box[6:place])):
            item, place = int.from_bytes(box[place : place + wide]), place + wide
            method = box[place + 1] & 15 if version else 0
            place += (2 if version else 0) + 2  # and a data reference
            base, place = int.from_bytes(box[place : place + base_size]), place + base_size
            extents, place = int.from_bytes(box[place : place + 2]), place + 2
            start = base + int.from_bytes(box[place + index_size : place + index_size + offset_size])
            if item == at:
                return (self.boxes[b"idat"] if method == 1 else self.data)[start : start + 64]
            place += extents * (index_size + offset_size + length_size)
        raise KeyError(at)


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each box (ISO/IEC 14496-12, section 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size, head = int.from_bytes(data[at : at + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        yield data[at + 4 : at + 8], at + head, end
        at = end


def _item_kinds(box: bytes) -> Iterator[tuple[int, bytes]]:
    entries = box[6 if box[0] == 0 else 8 :]
    for kind, start, end in _boxes(entries):
        entry = entries[start:end]
        wide = 4 if entry[0] == 3 else 2
        if kind == b"infe" and entry[0] >= 2:
            yield int.from_bytes(entry[4 : 4 + wide]), entry[6 + wide : 10 + wide]


def _references(box: bytes) -> Iterator[tuple[bytes, int, tuple[int, ...]]]:
    wide, entries = 4 if box[0] else 2, box[4:]
    for kind, start, end in _boxes(entries):
        numbers = [int.from_bytes(entries[at : at + wide]) for at in range(start + wide + 2, end, wide)]
        yield kind, int.from_bytes(entries[start : start + wide]), tuple(numbers)


def _associations(box: bytes) -> Iterator[tuple[int, list[int]]]:
    """(item, numbers of its properties, counted from 1)."""
    wide, each, place = 4 if box[0] else 2, 2 if box[3] & 1 else 1, 8
    for _ in range(int.from_bytes(box[4:8])):
        item, count, place = int.from_bytes(box[place : place + wide]), box[place + wide], place + wide + 1
        mask = 0x7FFF if each == 2 else 0x7F  # the highest bit says whether a reader must know the property
        yield item, [int.from_bytes(box[place + at * each : place + (at + 1) * each]) & mask for at in range(count)]
        place += count * each
