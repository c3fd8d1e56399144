"""Images that CSV or TSV tables list by path and label."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import SPLIT_NAMES
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.listing import Source, SourceSplit, find_files, is_folder, scan

PATH_COLUMNS = ("path", "image", "file", "filename", "image_path", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
SPLIT_COLUMNS = ("split",)
SUFFIXES = (".csv", ".tsv")


def holds_tables(root: Path) -> bool:
    """Whether `root` has a table that is named like a split and has columns of path and label, or has nothing but tables."""
    tables = find_files(root, SUFFIXES)[1]
    if not any(is_folder(entry) for entry in scan(root)):
        return bool(tables)
    return any(_is_readable(root / name) for name in tables if _stem(name) in SPLIT_NAMES)


def find_table(root: Path, split: str | None) -> Source:
    """Lists the rows of the table `root`, or of the tables in the folder `root`, each of which is named like its split.

    Paths are relative to the table's folder and may lead out of it: the list is the user's own, and files are only read. An
    empty label is an unknown one.
    """
    root, names = find_files(root, SUFFIXES)
    names = [name for name in names if _stem(name) in SPLIT_NAMES] or names
    if not names:
        raise UserError(f"{root}: no .csv file in it; give the table itself, or another --layout")
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
    splits = {
        name: SourceSplit(found, np.array([label_of[class_name] for class_name in classes[name]], np.int32))
        for name, found in paths.items()
    }
    return Source(root, "CSV", in_order, splits)


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: integers by value, other names alphabetically."""
    found = set(names) - {""}
    if all(name.isascii() and name.removeprefix("-").isdigit() and len(name) < 20 for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _rows(path: Path, split: str | None, tables: int) -> Iterator[tuple[str, str, str]]:
    """(path, class, split) of each row."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            header = [name.strip().lower() for name in next(rows, [])]
            image, label, part = (
                next((header.index(name) for name in names if name in header), None)
                for names in (PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
            )
            for column, content, names in ((image, "image paths", PATH_COLUMNS), (label, "labels", LABEL_COLUMNS)):
                if column is None:
                    found = ", ".join(header)[:80]
                    raise UserError(f"{path}: no column of {content}, only {found or 'none'}; call it one of {', '.join(names)}")
            own = split or (_stem(path.name) if _stem(path.name) in SPLIT_NAMES or tables > 1 else None)
            if part is not None and split is not None:
                raise UserError(f"{path}: has a column {header[part]}; leave out --split")
            if part is None and own is None:
                raise UserError(f"{path}: does not name its split; name it, as in: --split train")
            needed = max(image, label, part or 0)
            for row in rows:
                if len(row) > needed and row[image]:
                    row_split = row[part].strip() if part is not None else ""
                    yield row[image], sys.intern(row[label].strip()), row_split or own or ""
                elif any(row):
                    raise UserError(f"{path}: line {rows.line_num} has no path or too few columns; correct the line")
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from None


def _is_readable(path: Path) -> bool:
    with contextlib.suppress(UserError):
        next(_rows(path, None, 1), None)
        return True
    return False
