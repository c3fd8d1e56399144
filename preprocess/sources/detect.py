"""Recognizes the layout of a raw tree, and lists its images and their labels without opening an image."""

import math
import re
from pathlib import Path

from imagefeed.dataset.errors import ArgumentError, UserError
from imagefeed.preprocess.sources.archives import SUFFIXES, find_archives, holds_archives
from imagefeed.preprocess.sources.folders import find_folders, find_kaggle, holds_kaggle
from imagefeed.preprocess.sources.listing import Source
from imagefeed.preprocess.sources.parquet import find_parquet, parquet_files
from imagefeed.preprocess.sources.tables import find_table, holds_tables
from imagefeed.preprocess.sources.video import separate_videos

# The functions that list and recognize each layout, in the order in which layouts are tried.
LAYOUTS = {
    "kaggle": (find_kaggle, holds_kaggle),
    "archives": (find_archives, holds_archives),
    "parquet": (find_parquet, parquet_files),
    "csv": (find_table, holds_tables),
    "folders": (find_folders, lambda root: True),
}
LAYOUT_OF_SUFFIX = dict.fromkeys(SUFFIXES, "archives") | {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_NAME = re.compile(r"\w[\w-]*")  # it becomes part of file names


def find_images(root: Path, split: str | None = None, layout: str | None = None, frames_per_second: float = 1.0) -> Source:
    """Lists the images in `root`, whose layout is one of options.LAYOUTS and recognized if not given.

    `split` names the only split of a tree that does not name it itself. `frames_per_second` of each video become images.
    Labels are 0-based, in the order of the sorted class names. Raises UserError if the tree is not as its layout demands, or
    a class is empty.
    """
    if not 0 < frames_per_second < math.inf:
        raise ArgumentError(f"`frames_per_second` is {frames_per_second}; choose a number above 0")
    layout = layout or _recognize(root)
    if root.is_file() and layout in ("folders", "kaggle"):
        raise UserError(f"{root}: not a folder; give the folder that holds the raw images")
    source = separate_videos(LAYOUTS[layout][0](root, split), frames_per_second)
    for name in source.splits:
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"{root}: {name!a} cannot be a split's name; use letters, digits, _ and - only, or give --split")
    for name in source.classes:
        if not name.isprintable():
            raise UserError(f"{root}: {name!a} cannot be a class's name; rename the folder in printable UTF-8")
    return source


def _recognize(root: Path) -> str:
    if root.is_file():
        return next((layout for suffix, layout in LAYOUT_OF_SUFFIX.items() if root.name.endswith(suffix)), "folders")
    return next(layout for layout, (_, recognizes) in LAYOUTS.items() if recognizes(root))
