"""The images of tar archives, read in place: ImageNet's own archives of 2010 and 2012, archives of classes, of CLASS/IMAGE.

The labels of ImageNet's validation and test images are in its development kits (preprocess/sources/devkit.py).
"""

import functools
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import SPLIT_NAMES
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.devkit import Devkit, read_devkit, read_ids
from imagefeed.preprocess.sources.listing import PLACE_DTYPE, Source, SourceSplit, is_folder, scan
from imagefeed.preprocess.sources.tar import Member, list_members

# Not ILSVRC2012_img_train_t3.tar, which holds dogs of the training images once more.
IMAGENET = re.compile(r"ILSVRC(2010|2012)_im(?:g|ages)_(train|val|test)(?:(?<=test)\w+)?\.tar")
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # of which only the first can be read in place
# Headers lie 110 KB apart: waiting for the disk, not Python, is what takes time, and threads wait together. Of 12,800
# such members on disk, 1 thread lists one in 96 us, 4 in 39 us, 16 in 29 us; in memory it is 6 to 8 us with any number.
THREADS = 16


class _Part(NamedTuple):
    """An archive: `file` or, where `size` is not -1, a stretch of it. `name` is for reports."""

    file: str
    name: str
    start: int = 0
    size: int = -1


class _Group(NamedTuple):
    """Members of one class in one archive."""

    part: _Part
    class_name: str
    members: list[Member]
    split: str = ""  # where the archive itself says it


def holds_archives(root: Path) -> bool:
    """Whether `root` is laid out as archives: ImageNet's own, or tars where folders of images could be.

    Raises UserError where some of ImageNet's splits are archives and others are folders.
    """
    entries = scan(root)
    folders = [entry for entry in entries if is_folder(entry)]
    found = {match[2] for match in (IMAGENET.fullmatch(entry.name) for entry in entries) if match}
    if found:
        for folder in folders:
            if folder.name in {"train", "val"} - found:
                raise UserError(
                    f"{root}: split {folder.name} is a folder, {' and '.join(sorted(found))} an archive; say which to take, as "
                    "in: --layout archives"
                )
        return True
    if not folders:
        return any(entry.name.endswith(SUFFIXES) for entry in entries)
    return all(_tars(folder.path) and not any(is_folder(entry) for entry in scan(folder.path)) for folder in folders)


def find_archives(root: Path, split: str | None = None) -> Source:
    """Lists the images of the archives in the folder `root`, or of the archive `root`."""
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        names = _tars(root)
    official = [match for match in map(IMAGENET.fullmatch, names) if match]
    if official:
        if split is not None:
            raise UserError(f"{root}: ImageNet's archives say themselves which split they are; leave out --split")
        return _find_imagenet(root, official)
    return _find_any(root, names, split)


def _tars(folder: Path | str) -> list[str]:
    return [entry.name for entry in scan(folder) if entry.name.endswith(SUFFIXES) and entry.is_file()]


def _find_imagenet(root: Path, archives: list[re.Match]) -> Source:
    years = sorted({match[1] for match in archives})
    if len(years) > 1:
        raise UserError(f"{root}: archives of {' and '.join(years)}; put each year's into a folder of its own")
    file_of: dict[str, str] = {}
    for match in archives:
        if match[2] in file_of:
            raise UserError(f"{root}: {file_of[match[2]]} and {match[0]} are both of split {match[2]}; remove one")
        file_of[match[2]] = match[0]
    devkit = read_devkit(root, years[0])
    parts = {name: _Part(file_of[name], file_of[name]) for name in ("train", "val", "test") if name in file_of}
    listed = dict(zip(parts, _list_all(root, parts.values())))
    groups: list[_Group] = []
    if "train" in parts:
        groups = _by_class(root, parts["train"], listed["train"])
    classes = tuple(sorted(devkit.wnids.values() if devkit else {group.class_name for group in groups}))
    label_of = {name: label for label, name in enumerate(classes)}
    files = tuple(part.file for part in parts.values())
    splits = {}
    for name, part in parts.items():
        if name == "train":
            for group in groups:
                if group.class_name not in label_of:
                    raise UserError(
                        f"{root / part.file}: {group.class_name} is no class of {devkit.name}; use the kit of the same year"
                    )
            splits[name] = _join([(group, label_of[group.class_name]) for group in groups], files)
        else:
            ids = _validation_ids(root, years[0], name, devkit)
            labels = [_validation_label(member, ids, devkit, label_of, root / part.file) for member in listed[name]]
            splits[name] = _join([(_Group(part, "", listed[name]), labels)], files)
    titles = tuple(devkit.titles[name] for name in classes) if devkit else ()
    return Source(root, f"ImageNet {years[0]} archives", classes, splits, titles, files)


def _validation_ids(root: Path, year: str, split: str, devkit: Devkit | None) -> list[int] | None:
    """The devkit's ids of the images of a split, by number; None where nobody has published them."""
    path = root / f"ILSVRC{year}_test_ground_truth.txt"
    if split == "test" and not path.exists():
        return None
    if devkit is None:
        what = "ILSVRC2012_devkit_t12.tar.gz" if year == "2012" else "ILSVRC2010_devkit-1.0.tar.gz"
        raise UserError(f"{root}: the labels of split {split} need {what}, which is not there; put it beside the archives")
    return devkit.ids if split == "val" else read_ids(path.read_bytes(), path)


def _validation_label(
    member: Member, ids: list[int] | None, devkit: Devkit | None, label_of: dict[str, int], archive: Path
) -> int:
    if ids is None:
        return NO_LABEL
    number = re.search(r"_(\d{1,9})\.\w+$", member.name)
    if not number or not 1 <= int(number[1]) <= len(ids):
        raise UserError(
            f"{archive}: {member.name!r} has no number from 1 to {len(ids)}, the lines of the ground truth; "
            "use archive and kit of the same challenge"
        )
    wnid = devkit.wnids.get(ids[int(number[1]) - 1])
    if wnid is None:
        raise UserError(f"{archive}: the ground truth of {member.name} is no class of {devkit.name}; download both again")
    return label_of[wnid]


def _find_any(root: Path, names: list[str], split: str | None) -> Source:
    """Archives RAW/SPLIT.tar of CLASS/IMAGE or of class tars, RAW/SPLIT/CLASS.tar, or with `split` RAW/CLASS.tar."""
    parts = [_Part(name, name) for name in names]
    for folder in scan(root) if not names else ():
        if folder.is_dir():
            files = [f"{folder.name}/{name}" for name in _tars(folder.path)]
            parts += [_Part(file, file) for file in files]
    if not parts:
        raise UserError(f"{root}: no .tar files in it; give the folder that holds the archives, or another --layout")
    groups: dict[str, list[_Group]] = {}
    for part, members in zip(parts, _list_all(root, parts)):
        found = _by_class(root, part, members)
        folder, _, name = part.file.rpartition("/")
        own_name = name.removesuffix(".tar")
        if split is None and not folder and all(group.class_name in ("", own_name) for group in found):
            raise UserError(
                f"{root / part.file}: holds images and no classes, so it is itself a class; say which split the archives "
                "are, as in: --split train"
            )
        for group in found:
            if split and group.split:
                raise UserError(f"{root / part.file}: holds split {group.split}, by its own folders; leave out --split")
            groups.setdefault(split or group.split or folder or own_name, []).append(group)
    classes = tuple(sorted({group.class_name for found in groups.values() for group in found} - {""}))
    label_of = {name: label for label, name in enumerate(classes)}
    files = tuple(part.file for part in parts)
    splits = {}
    for name, found in groups.items():
        found.sort(key=lambda group: group.class_name)
        splits[name] = _join([(group, label_of.get(group.class_name, NO_LABEL)) for group in found], files)
    return Source(root, "tar archives", classes, splits, files=files)


def _by_class(root: Path, part: _Part, members: list[Member]) -> list[_Group]:
    """The members of an archive by class: of class tars inside it, of CLASS/IMAGE, or all of one class, named as the archive."""
    tars = [member for member in members if member.name.endswith(".tar")]
    for member in tars:
        if member.odd:
            raise UserError(f"{root / part.name}: {member.name} is {member.odd}; download the archive again")
    if tars:
        inner = [_Part(part.file, f"{part.name}/{member.name}", member.offset, member.size) for member in tars]
        inner.sort(key=lambda part: part.name)
        groups = [_Group(part, _stem(part.name), found) for part, found in zip(inner, _list_all(root, inner))]
    else:
        groups = _by_folder(part, members) or [_Group(part, _stem(part.name), members)]
    for group in groups:
        if not group.members:
            raise UserError(f"{root / group.part.name}: the class has no images; put some in, or remove it")
    return groups


def _by_folder(part: _Part, members: list[Member]) -> list[_Group]:
    """Members of [...]/SPLIT/CLASS/... or [...]/CLASS/..., where [...] are folders that all share; odd ones have no class.

    Files beside the folders, such as a README, are left out, as in trees of folders. Empty where there are no folders.
    """
    of_folder: dict[str, list[Member]] = {}
    for member in members:
        of_folder.setdefault("" if member.odd else member.name.rpartition("/")[0], []).append(member)
    odd = [member for member in of_folder.pop("", ()) if member.odd]
    folders = {folder: folder.split("/") for folder in of_folder}
    shared = 0
    while folders and all(len(parts) > shared + 1 for parts in folders.values()):
        if len({parts[shared] for parts in folders.values()}) > 1:
            break
        shared += 1
    found: dict[tuple[str, str], list[Member]] = {}
    for folder, parts in folders.items():
        split = next((at for at, name in enumerate(parts[:-1]) if name in SPLIT_NAMES), None)
        key = ("", parts[shared]) if split is None else (parts[split], parts[split + 1])
        found.setdefault(key, []).extend(of_folder[folder])
    groups = [_Group(part, name, found, split) for (split, name), found in sorted(found.items())]
    if groups and odd:
        groups.append(_Group(part, "", odd, groups[0].split))
    return groups


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".tar")


def _list_all(root: Path, parts: Iterable[_Part]) -> list[list[Member]]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda part: _list(root, part), parts))


def _list(root: Path, part: _Part) -> list[Member]:
    with open(root / part.file, "rb", buffering=0) as file:
        handle = file.fileno()
        end = part.start + part.size if part.size >= 0 else os.fstat(handle).st_size
        return list_members(functools.partial(os.pread, handle), part.start, end, root / part.name)


def _join(groups: list[tuple[_Group, int | list[int]]], files: tuple[str, ...]) -> SourceSplit:
    """A split of groups, each with its label or a label for each of its members."""
    paths: list[str] = []
    labels, places = [], []
    reasons: dict[int, str] = {}
    number = {file: at for at, file in enumerate(files)}
    for group, label in groups:
        reasons |= {len(paths) + at: member.odd for at, member in enumerate(group.members) if member.odd}
        paths += [f"{group.part.name}/{member.name}" for member in group.members]
        labels.append(np.broadcast_to(np.array(label, np.int32), len(group.members)))
        file = number[group.part.file]
        places.append(np.array([(file, member.offset, member.size) for member in group.members], PLACE_DTYPE))
    return SourceSplit(paths, np.concatenate(labels), np.concatenate(places), reasons)
