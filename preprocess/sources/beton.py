"""Images in FFCV's .beton files, read in place: JPEGs whose place and size are in the file's tables.

Format, version 2: ffcv/types.py, ffcv/writer.py and ffcv/fields of https://github.com/libffcv/ffcv (1.0.2). A header and a
description of each field come first, then a row for each sample; the table of allocations at the end gives the size of what lies
at a place.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.splits import SPLIT_NAMES
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.columns import refuse_unknown
from imagefeed.preprocess.sources.decide import refuse_several_splits
from imagefeed.preprocess.sources.labels import name_labels
from imagefeed.preprocess.sources.listing import PLACE_DTYPE, Listing, RawTree, Root, code_classes, find_files, opened
from imagefeed.preprocess.sources.tables import LABEL_COLUMNS, pick_column

SUFFIXES = (".beton", ".ffcv")
VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("kind", "u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
BYTES = np.dtype([("place", "<u8"), ("size", "<u8")])
# What a row has of a field, by the field's kind.
FLOAT, INTEGER, RGB = 0, 1, 2
ROWS = {FLOAT: np.dtype("<f8"), INTEGER: np.dtype("<i8"), RGB: IMAGE, 3: BYTES, 4: np.dtype("<u8"), 5: BYTES, 6: np.dtype("<u8")}
JPEG = 0  # an image's mode; 1 is raw pixels


class _Beton(NamedTuple):
    places: np.ndarray  # PLACE_DTYPE, without the number of the file
    numbers: dict[str, np.ndarray]  # of fields of whole numbers and of fractions


def beton_files(root: Root) -> list[str]:
    return find_files(root, SUFFIXES)[1]


def find_beton(root: Root, options: SourceOptions) -> RawTree:
    """Lists the images of the FFCV files in the folder `root`, or of the file `root`. Classes are their numbers."""
    root, names = find_files(root, SUFFIXES)
    if not names:
        raise UserError(f"{root}: no .beton file in it; give the file, or another --layout")
    splits = [_split(name) for name in names]
    if options.one_split:
        refuse_several_splits(root, splits)
    read = [_read(root / name) for name in names]
    refuse_unknown(root, options.columns, (field for each in read for field in each.numbers))
    labels = [each.numbers[_label_field(root / name, each)].astype(str).tolist() for name, each in zip(names, read)]
    class_of = name_labels({label for found in labels for label in found}, root / names[0])
    listings = []
    for number, (name, split, each, found) in enumerate(zip(names, splits, read, labels)):
        each.places["file"] = number
        paths = [f"{name}#{row:06d}" for row in range(1, len(found) + 1)]
        columns = {column: each.numbers[column].tolist() for column in options.columns if column in each.numbers}
        columns |= {column: [None] * len(paths) for column in options.columns if column not in each.numbers}
        codes = code_classes([class_of[label] for label in found])
        listings.append(Listing(None if options.one_split else split, paths, *codes, each.places, columns=columns))
    return RawTree(root, "FFCV", listings, files=tuple(names))


def _split(name: str) -> str:
    """The split in a file's name, as in train.beton or train_500_0.50_90.ffcv; else the name itself."""
    stem = os.path.splitext(name)[0]
    known = re.match(rf"({'|'.join(SPLIT_NAMES)})(?![A-Za-z])", stem)
    return known[1] if known else stem


def _label_field(path: Root, beton: _Beton) -> str:
    whole = [name for name, values in beton.numbers.items() if values.dtype.kind == "i"]
    return whole[0] if len(whole) == 1 else pick_column(path, "labels", LABEL_COLUMNS, whole)


def _read(path: Root) -> _Beton:
    with opened(path) as (read, end):
        return _read_tables(path, read, end)


def _read_tables(path: Root, read: Callable[[int, int], bytes], end: int) -> _Beton:
    def rows_at(offset: int, kind: np.dtype, count: int) -> np.ndarray:
        if count * kind.itemsize > end - offset:
            raise ValueError(f"its tables exceed its {end} bytes")
        return np.frombuffer(read(count * kind.itemsize, offset), kind)

    try:
        header = rows_at(0, HEADER, 1)[0]
        if header["version"] != VERSION:
            raise UserError(f"{path}: version {header['version']} of FFCV's format, imagefeed reads {VERSION}; write it anew")
        fields = rows_at(HEADER.itemsize, FIELD, int(header["fields"]))
        kinds = [ROWS[kind] for kind in fields["kind"].tolist()]
        rows = np.dtype([(f"{at}", kind) for at, kind in enumerate(kinds)], align=True)
        table = rows_at(HEADER.itemsize + fields.nbytes, rows, int(header["samples"]))
        start = int(header["allocations"])
        allocations = np.sort(rows_at(start, ALLOCATION, max(end - start, 0) // ALLOCATION.itemsize), order="place")
        images = [f"{at}" for at, kind in enumerate(fields["kind"].tolist()) if kind == RGB]
        if len(images) != 1:
            raise ValueError(f"{len(images)} fields of images, {len(table)} rows")
        image = table[images[0]]
        at = np.searchsorted(allocations["place"], image["place"]).clip(max=len(allocations) - 1)
        if not np.array_equal(allocations["place"][at], image["place"]):
            raise ValueError("an image of unknown size")
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not readable as an FFCV file ({error}); write it anew") from None
    if (image["mode"] != JPEG).any():
        row = int(np.argmax(image["mode"] != JPEG)) + 1
        raise UserError(f"{path}: image {row} is stored as raw pixels; write the file with RGBImageField(write_mode='jpg')")
    places = np.zeros(len(table), PLACE_DTYPE)
    places["offset"], places["size"] = image["place"], allocations["size"][at]
    names = [name.decode("ascii", "replace") for name in fields["name"].tolist()]
    kept = [at for at, kind in enumerate(fields["kind"].tolist()) if kind in (FLOAT, INTEGER)]
    return _Beton(places, {names[at]: table[f"{at}"] for at in kept})
