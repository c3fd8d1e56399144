"""The images that a table lists by path and label: CSV files."""

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import SPLIT_NAMES
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.listing import Source, SourceSplit, is_folder, scan
from imagefeed.preprocess.sources.video import Video, part_videos, video_options

PATH_COLUMNS = ("path", "image", "file", "filename", "image_path", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
SPLIT_COLUMNS = ("split",)
SUFFIXES = (".csv", ".tsv")


def holds_tables(root: Path) -> bool:
    """Whether `root` has a table named as a split with columns of path and label, or nothing but tables."""
    entries = scan(root)
    tables = [entry for entry in entries if entry.name.endswith(SUFFIXES) and entry.is_file()]
    if not any(is_folder(entry) for entry in entries):
        return bool(tables)
    return any(_stem(table.name) in SPLIT_NAMES and _has_columns(Path(table.path)) for table in tables)


def find_table(root: Path, split: str | None, frames_per_second: float) -> Source:
    """Lists the rows of the table `root`, or of the tables in the folder `root`; the name of a table is its split.

    Paths are relative to the table's folder. They may lead out of it, for the list is the user's own: files are only read,
    with the user's rights, and what is no image is rejected. An empty label is one that is not known.
    """
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        names = [entry.name for entry in scan(root) if entry.name.endswith(SUFFIXES) and entry.is_file()]
        names = [name for name in names if _stem(name) in SPLIT_NAMES] or names
    if not names:
        raise UserError(f"{root}: no .csv file in it; name the table itself, or another --layout")
    paths: dict[str, list[str]] = {}
    classes: dict[str, list[str]] = {}
    for name in names:
        for path, class_name, of_split in _rows(root / name, split, len(names)):
            paths.setdefault(of_split, []).append(path)
            classes.setdefault(of_split, []).append(class_name)
    if not paths:
        raise UserError(f"{root / names[0]}: the table has no rows; list images in it")
    in_order = sort_classes(name for found in classes.values() for name in set(found))
    label_of = {"": NO_LABEL} | {name: label for label, name in enumerate(in_order)}
    splits: dict[str, SourceSplit] = {}
    videos: list[Video] = []
    for name, found in paths.items():
        labels = np.array([label_of[class_name] for class_name in classes[name]], np.int32)
        splits[name], of_split = part_videos(root, name, found, labels, frames_per_second)
        videos += of_split
    return Source(root, "CSV", in_order, splits, packed=tuple(videos), options=video_options(videos, frames_per_second))


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: whole numbers by value, other names by their characters."""
    found = set(names) - {""}
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) < 20 for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _rows(path: Path, split: str | None, tables: int) -> Iterable[tuple[str, str, str]]:
    """(path, class, split) of each row."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            header = [name.strip().lower() for name in next(rows, [])]
            image, label, part = (_column(header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
            if image is None or label is None:
                what, names = ("images' paths", PATH_COLUMNS) if image is None else ("labels", LABEL_COLUMNS)
                raise UserError(
                    f"{path}: no column of {what}, by the names of the first line ({', '.join(header)[:80]}); "
                    f"call it one of {', '.join(names)}"
                )
            own = split or (_stem(path.name) if _stem(path.name) in SPLIT_NAMES or tables > 1 else None)
            if part is not None and split is not None:
                raise UserError(f"{path}: has a column {header[part]}; leave out --split")
            if part is None and own is None:
                raise UserError(f"{path}: does not say which split it is; say so, as in: --split train")
            needed = max(image, label, part or 0)
            for row in rows:
                if len(row) <= needed or not row[image]:
                    if any(row):
                        raise UserError(
                            f"{path}: line {rows.line_num} has no path, or fewer columns than the first; mend the line"
                        )
                    continue
                yield (row[image], sys.intern(row[label].strip()), (row[part].strip() if part is not None else "") or own or "")
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from None


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _has_columns(path: Path) -> bool:
    try:
        next(iter(_rows(path, None, 1)), None)
    except UserError:
        return False
    return True
