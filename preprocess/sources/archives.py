"""Images in tar archives, read in place: ImageNet's archives of 2010 and 2012, and archives of classes or of CLASS/IMAGE.

The labels of ImageNet's validation and test images are in its development kits (preprocess/sources/devkit.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.splits import TEST, split_role, split_roles
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.columns import refuse_unknown
from imagefeed.preprocess.sources.decide import refuse_several_splits
from imagefeed.preprocess.sources.devkit import Devkit, read_devkit, read_ids
from imagefeed.preprocess.sources.folders import WRAPPERS
from imagefeed.preprocess.sources.labels import name_labels
from imagefeed.preprocess.sources.listing import (
    PLACE_DTYPE,
    Listing,
    RawTree,
    Root,
    code_classes,
    find_files,
    list_folder,
    opened,
    read_raw,
)
from imagefeed.preprocess.sources.lists import class_file
from imagefeed.preprocess.sources.tar import Member, list_members
from imagefeed.preprocess.sources.webdataset import WANTED, Samples, pair_samples

# Without ILSVRC2012_img_train_t3.tar, whose dogs are in the archive of training images too.
IMAGENET = re.compile(r"ILSVRC(2010|2012)_im(?:g|ages)_(train|val|test)(?:(?<=test)\w+)?\.tar")
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # only the first can be read in place
SHARD_NUMBER = re.compile(r"(?:[-_.]|^)(?:\d{3,}|\d+-of-\d+)$|\d{5,}$")
KITS = {"2010": "ILSVRC2010_devkit-1.0.tar.gz", "2012": "ILSVRC2012_devkit_t12.tar.gz"}
# Headers lie 110 KB apart, so listing waits for the disk, and threads wait in parallel. With 12,800 such members on disk,
# 1 thread lists one in 96 us, 4 in 39 us, 16 in 29 us; in memory it is 6 to 8 us with any number.
THREADS = 16


class _Part(NamedTuple):
    """An archive: `file`, or the bytes of it from `start` to `end`. `name` is for reports."""

    file: str
    name: str
    start: int = 0
    end: int | None = None


class _Group(NamedTuple):
    """Members of one archive and one class. `split` is set if a folder inside the archive names it."""

    part: _Part
    class_name: str
    members: list[Member]
    split: str = ""


def holds_archives(root: Root) -> bool:
    """Whether `root` holds ImageNet's archives, or tar archives where other trees have folders of images.

    Raises UserError if some of ImageNet's splits are archives and others are folders.
    """
    files, folders = list_folder(root)
    found = sorted({match[2] for match in map(IMAGENET.fullmatch, (*files, *folders)) if match})
    for folder in folders if found else ():
        if folder in {"train", "val"}.difference(found):
            packed = " and ".join(found)
            raise UserError(f"{root}: split {folder} is a folder, {packed} an archive; choose, as in: --layout archives")
    if found or not folders:
        return any(name.endswith(SUFFIXES) for name in (*files, *folders))
    return all(_tars(root, folder) and not list_folder(root / folder)[1] for folder in folders)


def find_archives(root: Root, options: SourceOptions) -> RawTree:
    """Lists the images of the archives in the folder `root`, or of the archive `root`."""
    root, names = find_files(root, SUFFIXES)
    official = list(filter(None, map(IMAGENET.fullmatch, names)))
    return _find_imagenet(root, official) if official else _find_any(root, names, options)


def _tars(root: Root, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in find_files(root / folder, SUFFIXES)[1]]


def _find_imagenet(root: Root, archives: list[re.Match]) -> RawTree:
    years = sorted({match[1] for match in archives})
    if len(years) > 1:
        raise UserError(f"{root}: archives of {' and '.join(years)}; move each year's into its own folder")
    file_of: dict[str, str] = {}
    for match in archives:
        if match[2] in file_of:
            raise UserError(f"{root}: {file_of[match[2]]} and {match[0]} are both of split {match[2]}; remove one")
        file_of[match[2]] = match[0]
    devkit = read_devkit(root, years[0])
    parts = {name: _Part(file_of[name], file_of[name]) for name in ("train", "val", "test") if name in file_of}
    files = tuple(part.file for part in parts.values())
    members = {name: found.images for name, found in zip(parts, _list_all(root, parts.values()))}
    train = _by_class(root, parts["train"], members["train"]) if "train" in parts else []
    order = tuple(sorted(devkit.wnids.values())) if devkit else ()
    for group in train if devkit else ():
        if group.class_name not in order:
            raise UserError(f"{root / files[0]}: {group.class_name} is not a class of {devkit.name}; use the kit of that year")
    listings = [_join("train", train, files)] if train else []
    for name, part in parts.items():
        if name != "train":
            wnids = _validation_labels(root / part.file, years[0], name, members[name], devkit)
            listings.append(_join(name, [_Group(part, "", members[name])], files))
            listings[-1].names, listings[-1].codes = code_classes(wnids)
    return RawTree(root, f"ImageNet {years[0]} archives", listings, order, devkit.titles if devkit else {}, files)


def _validation_labels(archive: Root, year: str, split: str, members: list[Member], devkit: Devkit | None) -> list[str | None]:
    """The classes of validation or test images, by the numbers in their names. Those of most tests were never published."""
    truth = archive.with_name(f"ILSVRC{year}_test_ground_truth.txt")
    if split == "test" and not truth.exists():
        return [None] * len(members)
    if devkit is None:
        raise UserError(f"{archive}: the labels of split {split} need {KITS[year]}, which is missing; put it beside the archive")
    ids = devkit.ids if split == "val" else read_ids(read_raw(truth), truth)
    labels: list[str | None] = []
    for member in members:
        match = re.search(r"_(\d{1,9})\.\w+$", member.name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(ids):
            numbers = f"no number from 1 to {len(ids)}, the lines of the ground truth"
            raise UserError(f"{archive}: {member.name!r} has {numbers}; use archive and kit of the same challenge")
        wnid = devkit.wnids.get(ids[number - 1])
        if wnid is None:
            raise UserError(f"{archive}: {member.name} has a label that {devkit.name} lacks; download both again")
        labels.append(wnid)
    return labels


def _find_any(root: Root, names: list[str], options: SourceOptions) -> RawTree:
    """Archives RAW/SPLIT.tar of CLASS/IMAGE or of class tars, RAW/SPLIT/CLASS.tar, or with `split` RAW/CLASS.tar.

    WebDataset's shards are RAW/SPLIT-000000.tar or RAW/SPLIT/000000.tar.
    """
    files = tuple(names or (file for folder in list_folder(root)[1] for file in _tars(root, folder)))
    if not files:
        raise UserError(f"{root}: no .tar files in it; give the folder that holds the archives, or another --layout")
    if options.one_split:
        refuse_several_splits(root, [file.rpartition("/")[0] or _shard_split(file) for file in files])
    parts = [_Part(file, file) for file in files]
    samples = _list_all(root, parts, options.columns)
    skipped = sum((found.skipped for found in samples), Counter())
    if any(found.labels for found in samples):
        return _find_shards(root, parts, samples, skipped, options)
    groups: dict[str, list[_Group]] = {}
    for part, (members, _, beside, *_) in zip(parts, samples):
        found = _by_class(root, part, members, options.class_level == "top")
        folder, _, name = part.file.rpartition("/")
        own_name = _shard_split(name) if split_role(_shard_split(name)) else name.removesuffix(".tar")
        itself = all(not group.split and group.class_name in ("", _stem(name)) for group in found)
        flat = not any("/" in member.name for member in members)
        if itself and flat and max(beside[".json"], beside[".txt"]) >= len(members) > 0:
            problem = "a .json or .txt beside each image, but no label in it"
            raise UserError(f"{root / part.file}: {problem}; add KEY.cls files, or the field label to the .json")
        if itself and not options.one_split and not folder:
            role = split_role(own_name)
            if role not in (None, TEST):
                raise UserError(f"{root / part.file}: has no classes; pack its images as CLASS/IMAGE")
            if role is None:
                problem = "has no classes, so it is itself a class; name its split, as in: --split train"
                raise UserError(f"{root / part.file}: {problem}")
            found = [group._replace(class_name="") for group in found]
        for group in found:
            if options.one_split and group.split:
                raise UserError(f"{root / part.file}: a folder inside it names split {group.split}; leave out --split")
            unlabeled = not group.class_name and split_role(group.split or folder or own_name) != TEST
            if unlabeled and (images := [member for member in group.members if not member.odd]):
                seen = f"{plural(len(images), 'image')} without a class, such as {images[0].name}"
                remedy = "unpack it if a list in it has their labels, or put them into folders of classes"
                raise UserError(f"{root / part.name}: {seen}; {remedy}")
            groups.setdefault("" if options.one_split else group.split or folder or own_name, []).append(group)
    for found in groups.values():
        found.sort(key=lambda group: group.class_name)
    listings = [_join(name or None, found, files) for name, found in groups.items()]
    return RawTree(root, "tar archives", listings, files=files, skipped=skipped)


def _find_shards(root: Root, parts: list[_Part], samples: list[Samples], skipped: Counter, options: SourceOptions) -> RawTree:
    """WebDataset's shards, those of a split together."""
    files = tuple(part.file for part in parts)
    class_of = name_labels({label for found in samples for label in found.labels if label is not None}, root)
    notes: list[str] = []
    order = class_file(root, set(class_of.values()) - {""}, notes)
    if order and all(map(str.isdecimal, filter(None, class_of.values()))):
        class_of = {label: order[int(name)] if name else "" for label, name in class_of.items()}
    splits: dict[str, list[tuple[_Part, Samples]]] = {}
    for part, found in zip(parts, samples):
        folder, _, name = part.file.rpartition("/")
        splits.setdefault("" if options.one_split else folder or _shard_split(name), []).append((part, found))
    listings = []
    for split, shards in splits.items():
        listing = _join(split or None, [_Group(part, "", found.images) for part, found in shards], files)
        labels = [label for _, found in shards for label in found.labels or [None] * len(found.images)]
        missing = [path for path, label in zip(listing.paths, labels) if label is None]
        if 0 < len(missing) < len(labels):
            raise UserError(
                f"{root}: {len(missing):,} of {plural(len(labels), 'image')} of {split or 'the shards'} have no label in a .cls "
                f"or .json of their key, such as {missing[0]}; add it, or remove the image"
            )
        listing.names, listing.codes = code_classes([label if label is None else class_of[label] for label in labels])
        listing.columns = {
            name: [value for _, found in shards for value in found.columns.get(name) or [None] * len(found.images)]
            for name in options.columns
        }
        listings.append(listing)
    texts = (kind.removeprefix(".") for kind in skipped)
    refuse_unknown(root, options.columns, sorted({*texts}.union(*(found.names for found in samples))))
    alone = [f"{part.name}/{key}" for part, found in zip(parts, samples) for key in found.alone]
    notes += [f"{plural(len(alone), 'label')} without an image left out, such as that of {alone[0]}"] if alone else []
    return RawTree(root, "WebDataset", listings, tuple(order), files=files, skipped=skipped, notes=notes)


def _shard_split(name: str) -> str:
    """train for train-000012.tar and train-00012-of-01024.tar, nothing for 000012.tar."""
    return SHARD_NUMBER.sub("", name.removesuffix(".tar"))


def _by_class(root: Root, part: _Part, members: list[Member], top: bool = True) -> list[_Group]:
    """An archive's members by class: by class tars inside it, by CLASS/IMAGE, or all of one class that the archive names."""
    tars = [member for member in members if member.name.endswith(".tar")]
    for tar in tars:
        if tar.odd:
            raise UserError(f"{root / part.name}: {tar.name} is {tar.odd}; download the archive again")
    if tars:
        inner = [_Part(part.file, f"{part.name}/{tar.name}", tar.offset, tar.offset + tar.size) for tar in tars]
        inner.sort(key=lambda part: part.name)
        groups = [_Group(part, _stem(part.name), found.images) for part, found in zip(inner, _list_all(root, inner))]
    else:
        groups = _by_folder(part, members, top) or [_Group(part, _stem(part.name), members)]
    for group in groups:
        if not group.members:
            raise UserError(f"{root / group.part.name}: the class has no images; add some, or remove it")
    return groups


def _by_folder(part: _Part, members: list[Member], top: bool) -> list[_Group]:
    """Members of [...]/SPLIT/CLASS/... or [...]/CLASS/..., where all share the folders [...]; odd members get no class.

    The class is the first folder that holds images itself, by its path, or with `top` the first of all. Files beside the
    folders, such as a README, are left out, as in trees of folders. Without a class are images in a split's folder images alone.
    Empty if there are no folders of classes.
    """
    by_folder: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        if not member.odd and "/" in member.name:
            by_folder.setdefault(tuple(member.name.split("/")[:-1]), []).append(member)
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*(folders[:-1] for folders in by_folder)))))
    roles = split_roles({name for folders in by_folder for name in folders[:-1]})
    starts: dict[tuple[str, ...], tuple[str, int]] = {}  # the split, and where the name of the class begins
    for folders in by_folder:
        split = next((at for at, name in enumerate(folders[:-1]) if name in roles), None)
        starts[folders] = ("", shared) if split is None else (folders[split], split + 1)
    first: dict[str, set[str]] = {}  # folders of each split
    for folders, (split, start) in starts.items():
        first.setdefault(split, set()).add(folders[start])
    found: dict[tuple[str, str], list[Member]] = {}
    for folders, inside in by_folder.items():
        split, start = starts[folders]
        if len(first[split]) == 1 and folders[start].lower() in WRAPPERS:
            start += 1
        deep = start + 1 if top else next((at for at in range(start + 1, len(folders) + 1) if folders[:at] in by_folder), start)
        if deep > start + 1 and folders[deep - 1].lower() in WRAPPERS:
            deep -= 1
        found.setdefault((split, "/".join(folders[start:deep])), []).extend(inside)
    if list(found) == [("", "")]:
        return []
    groups = [_Group(part, name, found, split) for (split, name), found in sorted(found.items())]
    odd = [member for member in members if member.odd]
    return [*groups, _Group(part, "", odd, groups[0].split)] if groups and odd else groups


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".tar")


def _list_all(root: Root, parts: Iterable[_Part], columns: Sequence[str] = ()) -> list[Samples]:
    wanted = WANTED + tuple(f".{name}" for name in columns)

    def list_part(part: _Part) -> Samples:
        archive = root / part.name
        with opened(root / part.file) as (read, size):
            end = size if part.end is None else part.end
            return pair_samples(list_members(read, part.start, end, archive, wanted), archive, columns)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(list_part, parts))


def _join(split: str | None, groups: list[_Group], files: tuple[str, ...]) -> Listing:
    """A split from groups, in their order."""
    paths: list[str] = []
    codes, places = [], []
    reasons: dict[int, str] = {}
    number = {file: at for at, file in enumerate(files)}
    names = tuple(dict.fromkeys(group.class_name for group in groups if group.class_name))
    code_of = {name: code for code, name in enumerate(names)}
    for part, name, members, _ in groups:
        reasons |= {at: member.odd for at, member in enumerate(members, len(paths)) if member.odd}
        paths += [f"{part.name}/{member.name}" for member in members]
        codes.append(np.full(len(members), code_of.get(name, NO_LABEL), np.int32))
        file = number[part.file]
        places.append(np.array([(file, member.offset, member.size) for member in members], PLACE_DTYPE))
    return Listing(split, paths, names, np.concatenate(codes), np.concatenate(places), reasons)
