"""Finds the files that a list or a table refers to, by path, or by id without folder or suffix."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagefeed.dataset.console import examples
from imagefeed.dataset.splits import TRAIN, split_role, split_roles
from imagefeed.preprocess.sources.listing import list_folder
from imagefeed.preprocess.sources.suffixes import IMAGES, suffix

MAX_FOLDERS = 200  # tried at each level; with more, they are class folders


# Words in a list's name that describe the list, not the split.
KIND = re.compile(
    r"(?<![a-z])(file|image|path|label|class|synset)?_?(list|map|labels?|annotations?|files|paths|names|gt|truth|synsets?)(?![a-z])"
)


@dataclass(frozen=True)
class Located:
    """The path below the root of each name; `missing` are the positions of names without a file, and `unlisted` the images
    in the same folders that no name refers to."""

    paths: list[str]
    missing: list[int]
    unlisted: list[str]


def list_split(stem: str) -> str:
    """The split in the name of a list or a table: train for train_list, trainLabels and labels_train, "" for labels.

    Other names stay as they are.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", stem).lower()
    rest = KIND.sub("", words).strip("_-. ")
    return stem if split_role(stem) or (rest and not split_role(rest)) else rest


def find_base(root: Path, names: Sequence[str], split: str | None = None) -> tuple[str, int] | None:
    """The folder below `root`, with a slash, to which `names` are relative, and how many of their characters to leave out before.

    Tried are `root`, its folders and those inside them, the ones called like the split, or else for training, first. If none has
    the first, the middle and the last name, the first alone will do. None if there is no such file.
    """
    tried = [names[0], names[len(names) // 2], names[-1]]
    return _find_base(root, tried, split) or _find_base(root, tried[:1], split)


def _find_base(root: Path, names: Sequence[str], split: str | None) -> tuple[str, int] | None:
    name = names[0]
    shorter = [0]
    if name.startswith("/"):  # of the machine where the list was written
        shorter += [at + 1 for at, letter in enumerate(name[:-1]) if letter == "/"]
    elif name.startswith(f"{root.absolute().name}/"):
        shorter.append(len(root.absolute().name) + 1)
    for bases in _levels(root, split):
        for skip in shorter:
            for base in bases:
                if all(_exists(root, base + name[skip:]) for name in names):
                    return base, skip
    return None


def _levels(root: Path, split: str | None = None) -> Iterator[list[str]]:
    """The root, its folders, and those inside them, which are read only if they are needed."""
    bases = [""]
    for _ in range(2):
        yield bases
        bases = [f"{base}{folder}/" for base in bases for folder in _folders(root, base, split)]
    yield bases


def locate(root: Path, names: Sequence[str], base: tuple[str, int]) -> Located:
    """Where the files of all names are, by `find_base` of one of them: there, or else in one other folder that `find_base` tries,
    as images_001/ and images_002/. Reads each folder once."""
    prefix, skip = base
    files: dict[str, dict[str, str]] = {}  # by folder, the names of its files by themselves and by those without suffix
    used: dict[str, set[str]] = {}
    others: list[str] | None = None

    def find(start: str, name: str) -> tuple[str, str | None]:
        """The path of an image, and the name of its file if there is one."""
        folder, slash, file = (start + name).rpartition("/")
        if folder not in files:
            inside = list_folder(root / folder)[0] if (root / folder).is_dir() else []
            files[folder] = {os.path.splitext(each)[0]: each for each in inside if suffix(each) in IMAGES} | dict(
                zip(inside, inside)
            )
            used[folder] = set()
        found = files[folder].get(file)
        return f"{folder}{slash}{found or file}", found

    paths, missing = [], []
    for at, name in enumerate(names):
        name = name[skip:].removeprefix("./")
        path, found = find(prefix, name)
        if found is None:
            others = [base for bases in _levels(root) for base in bases if base != prefix] if others is None else others
            elsewhere = [each for each in (find(other, name) for other in others) if each[1]]
            if len(elsewhere) == 1:
                [(path, found)] = elsewhere
        if found is None:
            missing.append(at)
        else:
            used[path.rpartition("/")[0]].add(found)
        paths.append(path)
    unlisted = [
        f"{folder}/{name}" if folder else name
        for folder, inside in files.items()
        for name in sorted(set(inside.values()) - used[folder])
        if suffix(name) in IMAGES
    ]
    return Located(paths, missing, unlisted)


def has_class_folders(root: Path, folders: Iterable[str]) -> bool:
    """Whether one of the `folders` of `root` is a training split that has folders itself, so that they may be its classes."""
    return any(list_folder(root / name)[1] for name, role in split_roles(folders).items() if role == TRAIN)


def unused_folders(root: Path, paths: Iterable[str]) -> list[str]:
    """A sentence about folders that hold images of which no list names any."""
    used = {path.removeprefix("./").partition("/")[0] for path in paths}
    left = [name for name in list_folder(root)[1][:MAX_FOLDERS] if name not in used]
    full = [name for name in left if any(suffix(file) in IMAGES for file in list_folder(root / name)[0])]
    return [f"the images in {examples(full)} are in no list and left out"] if full else []


def _folders(root: Path, base: str, split: str | None) -> list[str]:
    role = split_role(split or "") or TRAIN
    return sorted(list_folder(root / base)[1][:MAX_FOLDERS], key=lambda name: (name != split, split_role(name) != role))


def _exists(root: Path, path: str) -> bool:
    """Whether it is a file, with the suffix of an image if the path has none itself."""
    if os.path.isfile(root / path):
        return True
    if suffix(path) in IMAGES:
        return False
    for other in ("jpg", "jpeg", "JPEG", "png", "JPG", "PNG", "webp", "tif", "bmp", "gif"):
        if os.path.isfile(root / f"{path}.{other}"):
            return True
    return False
