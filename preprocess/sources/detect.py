"""Finds the images of a raw tree and their labels, whatever its layout, without opening one of them."""

import math
import re
from pathlib import Path

from imagefeed.dataset.errors import ArgumentError, UserError
from imagefeed.preprocess.sources.archives import SUFFIXES, find_archives, holds_archives
from imagefeed.preprocess.sources.folders import find_folders, find_kaggle, holds_kaggle
from imagefeed.preprocess.sources.listing import Source, scan
from imagefeed.preprocess.sources.parquet import find_parquet, parquet_files
from imagefeed.preprocess.sources.tables import find_table, holds_tables

LAYOUT_OF_SUFFIX = dict.fromkeys(SUFFIXES, "archives") | {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAME = re.compile(r"\w[\w-]*")  # it becomes part of file names


def find_images(root: Path, split: str | None = None, layout: str | None = None, frames_per_second: float = 1.0) -> Source:
    """Lists the images below `root`, of a layout of options.LAYOUTS, which is recognized where it is not given.

    `split` names the one split of a tree that does not name it itself. Of videos, `frames_per_second` become images. Labels
    are 0-based in the order of the sorted class names. Raises UserError where the layout is not as it should be, or a class
    is empty.
    """
    if not 0 < frames_per_second < math.inf:
        raise ArgumentError(f"`frames_per_second` is {frames_per_second}; choose a number above 0")
    source = _find(root, split, layout or _recognize(root), frames_per_second)
    for name in source.splits:
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(
                f"{root}: {name!a} cannot be a split's name, which is made of letters, digits, _ and -; rename the folder, "
                "or give --split"
            )
    for name in source.classes:
        if not name.isprintable():
            raise UserError(f"{root}: {name!a} cannot be a class's name, which must be printable UTF-8; rename the folder")
    return source


def _find(root: Path, split: str | None, layout: str, frames_per_second: float) -> Source:
    if root.is_file() and layout in ("folders", "kaggle"):
        raise UserError(f"{root}: not a folder; give the folder that holds the raw images")
    if layout == "archives":
        return find_archives(root, split)
    if layout == "csv":
        return find_table(root, split, frames_per_second)
    if layout == "parquet":
        return find_parquet(root, split)
    if layout == "kaggle":
        if split is not None:
            raise UserError(f"{root}: Kaggle's folders say themselves which split they are; leave out --split")
        return find_kaggle(root, frames_per_second)
    return find_folders(root, split, frames_per_second)


def _recognize(root: Path) -> str:
    if root.is_file():
        return next((layout for suffix, layout in LAYOUT_OF_SUFFIX.items() if root.name.endswith(suffix)), "folders")
    scan(root)  # says in one sentence where it is missing
    if holds_kaggle(root):
        return "kaggle"
    if holds_archives(root):
        return "archives"
    if parquet_files(root):
        return "parquet"
    return "csv" if holds_tables(root) else "folders"
