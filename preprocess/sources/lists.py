"""Labels that a list gives for images which lie in no class folders."""

from pathlib import Path


def labels_beside(root: Path, split_folder: Path, paths: list[str]) -> list[str] | None:
    """The class of each of `paths`, images of `split_folder` relative to `root`, by a list in or beside that folder; None if
    there is no list."""
    return None  # a stub: no list is read yet
