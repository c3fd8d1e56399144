"""Recognizes the layout of a raw tree, and lists its images and their labels without opening an image."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.storage import Url
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.archives import SUFFIXES, find_archives, holds_archives
from imagefeed.preprocess.sources.beton import SUFFIXES as BETON
from imagefeed.preprocess.sources.beton import beton_files, find_beton
from imagefeed.preprocess.sources.decide import decide
from imagefeed.preprocess.sources.folders import find_folders, find_kaggle, holds_kaggle
from imagefeed.preprocess.sources.listing import RawTree, Root, Source
from imagefeed.preprocess.sources.lists import SUFFIXES as LISTS
from imagefeed.preprocess.sources.lists import find_lists, holds_lists
from imagefeed.preprocess.sources.parquet import find_parquet, parquet_files
from imagefeed.preprocess.sources.remote import ONLY, REMEDY, RemotePath, open_raw
from imagefeed.preprocess.sources.tables import find_table, holds_tables
from imagefeed.preprocess.sources.video import Video, separate_videos

# The functions that list and recognize each layout, in the order in which layouts are tried. They only list what is there;
# decide.py decides what it means.
LAYOUTS: dict[str, tuple[Callable[..., RawTree], Callable[..., Any]]] = {
    "kaggle": (find_kaggle, holds_kaggle),
    "archives": (find_archives, holds_archives),
    "parquet": (find_parquet, parquet_files),
    "ffcv": (find_beton, beton_files),
    "csv": (find_table, holds_tables),
    "lists": (find_lists, holds_lists),
    "folders": (find_folders, lambda root: True),
}
REMOTE = ("archives", "parquet", "ffcv")  # those that can be read at a URL
LAYOUT_OF_SUFFIX = (
    dict.fromkeys(SUFFIXES, "archives")
    | dict.fromkeys(BETON, "ffcv")
    | dict.fromkeys(LISTS, "lists")
    | {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
)


def find_images(root: Path | Url | str, split: str | None = None, **more: Any) -> Source:
    """`read_tree` with the SourceOptions `split` and `more`."""
    return read_tree(root, SourceOptions(split, **more))


def read_tree(raw: Path | Url | str, options: SourceOptions) -> Source:
    """Lists the images in `raw`, which may be at a URL, as `options` say; the layout is recognized if they do not name it.

    Labels are 0-based, in the order of the classes. Raises UserError if the tree is not as its layout demands, a class is empty,
    or it is unclear what is what.
    """
    root = open_raw(raw)
    layout = options.layout or _recognize(root)
    if isinstance(root, RemotePath) and layout not in REMOTE:
        raise UserError(f"{root}: {ONLY}, not the layout {layout}; {REMEDY}")
    if root.is_file() and layout in ("folders", "kaggle"):
        raise UserError(f"{root}: not a folder; give the folder that holds the raw images")
    tree = LAYOUTS[layout][0](root, options)
    source = separate_videos(decide(tree, options), options.frames_per_second)
    found = [packed for packed in source.packed if isinstance(packed, Video)]
    videos = Counter(video.split for video in found)
    labeled = Counter(video.split for video in found if video.label != NO_LABEL)
    splits = {
        name: replace(split, images=split.images - videos[name], labeled=split.labeled - labeled[name], videos=videos[name])
        for name, split in source.decision.splits.items()
    }
    return replace(source, decision=replace(source.decision, splits=splits)) if found else source


def _recognize(root: Root) -> str:
    if root.is_file():
        return next((layout for suffix, layout in LAYOUT_OF_SUFFIX.items() if root.name.endswith(suffix)), "folders")
    layouts = REMOTE if isinstance(root, RemotePath) else tuple(LAYOUTS)
    return next((layout for layout in layouts if LAYOUTS[layout][1](root)), layouts[0])
