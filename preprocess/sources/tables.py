"""Images that CSV or TSV tables list by path and label."""

import contextlib
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.splits import SPLIT_NAMES
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.listing import RawTree, find_files, is_folder, list_images, scan

PATH_COLUMNS = ("path", "image", "file", "filename", "image_path", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "class_name")
SPLIT_COLUMN = "split"
SUFFIXES = (".csv", ".tsv")


def holds_tables(root: Path) -> bool:
    """Whether `root` has a table that is named like a split and has columns of path and label, or has nothing but tables."""
    tables = find_files(root, SUFFIXES)[1]
    if not any(is_folder(entry) for entry in scan(root)):
        return bool(tables)
    return any(_is_readable(root / name) for name in tables if Path(name).stem in SPLIT_NAMES)


def find_table(root: Path, options: SourceOptions) -> RawTree:
    """Lists the rows of the table `root`, or of the tables in the folder `root`, each of which is named like its split.

    Paths are relative to the table's folder and may lead out of it: the list is the user's own, and files are only read. An
    empty label is an unknown one.
    """
    root, names = find_files(root, SUFFIXES)
    names = [name for name in names if Path(name).stem in SPLIT_NAMES] or names
    if not names:
        raise UserError(f"{root}: no .csv file in it; give the table itself, or another --layout")
    listed: dict[str, tuple[list[str], list[str | None]]] = {}  # paths and classes by split
    for name in names:
        for path, class_name, of_split in _rows(root / name, options.split, len(names)):
            paths, classes = listed.setdefault(of_split, ([], []))
            paths.append(path)
            classes.append(class_name or None)
    if not listed:
        raise UserError(f"{root / names[0]}: the table has no rows; list images in it")
    splits = [list_images(None if options.one_split else name, *columns) for name, columns in listed.items()]
    return RawTree(root, "CSV", splits)


def pick_column(path: Path, content: str, accepted: Iterable[str], header: list[str]) -> str:
    """The first of the accepted names that is a column of the table at `path`."""
    found = next((name for name in accepted if name in header), None)
    if found is None:
        columns = ", ".join(header)[:80] or "none"
        raise UserError(f"{path}: no column of {content}, only {columns}; call it one of {', '.join(accepted)}")
    return found


def _rows(path: Path, split: str | None, tables: int) -> Iterator[tuple[str, str, str]]:
    """(path, class, split) of each row."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            header = [name.strip().lower() for name in next(rows, [])]
            image = header.index(pick_column(path, "image paths", PATH_COLUMNS, header))
            label = header.index(pick_column(path, "labels", LABEL_COLUMNS, header))
            part = header.index(SPLIT_COLUMN) if SPLIT_COLUMN in header else None
            own = split or (path.stem if path.stem in SPLIT_NAMES or tables > 1 else "")
            if part is not None and split is not None:
                raise UserError(f"{path}: has a column {SPLIT_COLUMN}; leave out --split")
            if part is None and not own:
                raise UserError(f"{path}: does not name its split; name it, as in: --split train")
            needed = max(image, label, part or 0)
            for row in rows:
                if len(row) > needed and row[image]:
                    row_split = row[part].strip() if part is not None else ""
                    yield row[image], sys.intern(row[label].strip()), row_split or own
                elif any(row):
                    raise UserError(f"{path}: line {rows.line_num} has no path or too few columns; correct the line")
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from None


def _is_readable(path: Path) -> bool:
    with contextlib.suppress(UserError):
        next(_rows(path, None, 1), None)
        return True
    return False
