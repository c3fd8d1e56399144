"""Decides what the listings of a raw tree mean: its splits, the training split, the classes and their order.

Only this file decides, for every layout, so the same data in another layout gets the same labels.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imagefeed.dataset.console import examples, plural
from imagefeed.dataset.decision import Decision
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import read_file
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.splits import TEST, TRAIN, VAL, split_role, split_roles, statistics_split, training_split, whole_split
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.assemble import count_classes, describe_split, hold_out, join_columns, join_listings
from imagefeed.preprocess.sources.listing import Listing, RawTree, Source, SourceSplit
from imagefeed.preprocess.sources.suffixes import IMAGES, suffix

SPLIT_NAME = re.compile(r"\w[\w-]*")  # it becomes part of file names
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")
# images_001, HAM10000_images_part_2, fold3: where a large folder was cut. img_align_celeba is one if no other lies beside it.
CUT_FOLDER = re.compile(r"(.*[\W_])?(images?|imgs?|pictures?|photos?|files?|part|batch|chunk|fold)[\W_]*\d+", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"(.*[\W_])?(images?|imgs?|pictures|photos|jpe?gs?|dataset)([\W_].*)?", re.IGNORECASE)
SHOWN = 3  # first and last classes


@dataclass
class _Split:
    """The listings of one split, and its role."""

    role: str
    listings: list[Listing]
    folders: tuple[str, ...] = ()  # its names in the raw tree, if they differ

    @property
    def names(self) -> set[str]:
        return {name for listing in self.listings for name in listing.names}


def decide(tree: RawTree, options: SourceOptions) -> Source:
    """Makes a Source of what a layout listed. Raises UserError if the tree can be read in more than one way."""
    _unify_names(tree)
    splits = _name_splits(tree, options)
    for split in splits.values():
        for listing in split.listings:
            _refuse_splits_as_classes(tree, listing, splits)
            if listing.folder is not None and options.classes is None:
                refuse_cut_folders(tree.root, listing.names)
    train = _choose_training_split(tree, options, splits)
    _forget_made_up_classes(tree, splits, train)
    classes, order = _order_classes(tree, options, splits, train)
    label_of = {name: label for label, name in enumerate(classes)}
    packed = tuple(
        file.decided(name, [label_of[each] for each in listing.names])
        for name, split in splits.items()
        for listing in split.listings
        for file in listing.packed
    )
    found = {name: join_listings(split.listings, label_of) for name, split in splits.items()}
    if options.columns:
        columns = join_columns(tree, {name: split.listings for name, split in splits.items()}, options.columns)
        found = {name: replace(split, columns=columns[name]) for name, split in found.items()}
    unlabeled = {name: sum(listing.packed_unlabeled for listing in split.listings) for name, split in splits.items()}
    in_packed = {name: {label_of[each] for of in split.listings for each in of.packed_names} for name, split in splits.items()}
    if options.validation_fraction:
        if packed:
            raise UserError(f"{tree.root}: {tree.layout} must be unpacked before images can be held out; use `split` instead")
        [whole] = found.values()
        found = hold_out(tree, whole, options)
    roles = {name: split_role(name) if options.validation_fraction else splits[name].role for name in found}
    folders = {name: split.folders for name, split in splits.items()}
    described = {
        name: describe_split(
            split,
            [file for file in packed if file.split == name],
            unlabeled.get(name, 0),
            in_packed.get(name, ()),
            roles[name] or "",
        )
        for name, split in found.items()
    }
    decision = Decision(
        tree.layout,
        {name: replace(split, folders=tuple(map(_printable, folders.get(name, ())))) for name, split in described.items()},
        train,
        len(classes),
        classes[: SHOWN if len(classes) > 2 * SHOWN else len(classes)],
        classes[-SHOWN:] if len(classes) > 2 * SHOWN else (),
        order,
        dict(sorted(tree.skipped.items(), key=lambda kind: (-kind[1], kind[0]))),
        tuple(map(_printable, [*tree.notes, *_doubts(classes, order, found, train)])),
    )
    titles = tuple(tree.titles.get(name, "") for name in classes) if tree.titles else ()
    # Older datasets took the statistics from this split, and still do.
    usual = statistics_split(list(found))
    more: dict[str, Any] = {
        "train_split": train if train != usual else None,
        "validation_fraction": options.validation_fraction or None,
    }
    more["columns"] = list(options.columns) or None
    more = {name: value for name, value in more.items() if value is not None}
    return Source(tree.root, tree.layout, classes, found, titles, tree.files, packed, options=more, decision=decision)


def _printable(text: str) -> str:
    """The text with escapes for bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their labels: by value if all are whole numbers, else alphabetically."""
    found = set(names)
    if all(map(WHOLE_NUMBER.fullmatch, found)):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


# ---- Splits


def _name_splits(tree: RawTree, options: SourceOptions) -> dict[str, _Split]:
    """The splits, by the names that they are stored under."""
    if not any(listing.num_images for listing in tree.listings):
        raise UserError(f"{tree.root}: no images in it; check the path of the raw images")
    named = list(dict.fromkeys(listing.split for listing in tree.listings if listing.split is not None))
    if named and options.one_split:
        option = "split" if options.split is not None else "validation_fraction"
        raise UserError(f"{tree.root}: already has splits, {examples(named)}; leave out `{option}`")
    if not named and not options.one_split:
        raise UserError(
            f"{tree.root}: has no splits; hold out validation images with `validation_fraction=0.1`, or name the only split, as "
            "in `split=train`"
        )
    roles = split_roles(named)
    parts: dict[str, list[str]] = {}
    for name in named:
        parts.setdefault(whole_split(name), []).append(name)
    stored = {}
    for whole, names in parts.items():
        for name in names:
            merged = len(names) > 1 and whole not in named
            stored[name] = whole if merged or (not SPLIT_NAME.fullmatch(name) and whole not in named) else name
            if name in roles:
                stored[name] = re.sub(r"[^\w-]+", "_", stored[name]).strip("_-") or name
    splits: dict[str, _Split] = {}
    for listing in tree.listings:
        own = listing.split
        name = stored[own] if own is not None else TRAIN if options.split is None else options.split
        if not SPLIT_NAME.fullmatch(name):
            raise UserError(f"{tree.root}: {name!a} cannot be a split's name; rename it with letters, digits, _ and - only")
        split = splits.setdefault(name, _Split(roles.get(own or "") or split_role(name) or "", []))
        split.listings.append(listing)
        if own not in (None, name) and own not in split.folders:
            split.folders += (own,)
    return splits


def refuse_several_splits(root: object, names: Iterable[str]) -> None:
    """Raises UserError if files, of which one split is to be made, are named like several."""
    roles = split_roles(dict.fromkeys(names))
    if len(set(roles.values())) > 1:
        raise UserError(f"{root}: already has splits, {examples(sorted(roles))}; leave out `split` and `validation_fraction`")


def _choose_training_split(tree: RawTree, options: SourceOptions, splits: dict[str, _Split]) -> str | None:
    """The split to train on; None if the only split is one to evaluate on."""
    names = list(splits)
    if options.train_split is not None:
        wanted = options.train_split
        chosen = [name for name, split in splits.items() if wanted in (name, *split.folders)]
        if not chosen and not options.validation_fraction:
            raise UserError(f"{tree.root}: no split {wanted!r} to train on; `train_split` must be one of {', '.join(names)}")
        return chosen[0] if chosen else TRAIN
    if len(splits) == 1:
        [(name, split)] = splits.items()
        if not split.role and not options.one_split and split.listings[0].folder is not None:
            place = tree.root / _class_parent(split.listings[0])
            raise UserError(
                f"{tree.root}: its only folder with images, {name}, is not named like a split; if the folders in {place} are the "
                f"classes, type: imagefeed build {place} OUT --split train (or val, or test)"
            )
        return name if split.role in ("", TRAIN) else None
    train = training_split(names)
    if train is not None:
        return train
    alike = [name for name, split in splits.items() if split.role == TRAIN]
    seen = f"{examples(alike)} are all named" if alike else f"none of {examples(names)} is named"
    remedy = "name the one to train on with `train_split=NAME`"
    apart = len(set().union(*(split.names for split in splits.values()))) == sum(len(split.names) for split in splits.values())
    listings = [split.listings[0] for split in splits.values()]
    listing = next((each for each in listings if each.paths and suffix(each.paths[0]) in IMAGES), listings[0])
    if not any(split.role for split in splits.values()) and listing.folder is not None:
        place = tree.root / _class_parent(listing)
        if apart:
            remedy += ", or, if they are classes or groups of classes, read them as one split with `split=train`"
        else:
            usual = TRAIN if place == tree.root / listing.folder else VAL
            remedy += f", or build one of the folders alone, as in: imagefeed build {place} OUT --split {usual}"
    raise UserError(f"{tree.root}: {seen} like a training split; {remedy}")


def _class_parent(listing: Listing) -> str:
    """The folder in which classes are directly, as far as it can be told: fog/1 if fog/1 and fog/2 hold the same classes."""
    inside: dict[str, set[str]] = {}
    for name in listing.names:
        parent, _, leaf = name.rpartition("/")
        inside.setdefault(parent, set()).add(leaf)
    first = next(iter(inside), "")
    same = len(inside) > 1 and all(leaves & inside[first] for leaves in inside.values())
    return f"{listing.folder}/{first}" if same and first else listing.folder or ""


def _refuse_splits_as_classes(tree: RawTree, listing: Listing, splits: Mapping[str, _Split]) -> None:
    """Raises UserError if a folder named like a split was taken for a class, or for a part of its name."""
    children: dict[str, dict[str, bool]] = {}  # by parent, each child and whether it is a class itself
    for name in listing.names:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            children.setdefault("/".join(parts[:depth]), {})[part] = depth == len(parts) - 1
    for parent, inside in children.items():
        roles = split_roles(inside)
        if not roles:
            continue
        others = [name for name, is_class in inside.items() if name not in roles and is_class]
        # A class may be called train beside bus and car; where RAW itself may be the folder of splits, two others must prove it.
        if len(roles) == 1 and inside[next(iter(roles))] and len(others) >= (2 if listing.split is None else 1):
            continue
        folder = "/".join(filter(None, (listing.folder, parent)))
        seen = f"{folder or 'it'} holds {examples(sorted(roles))}, which are names of splits, not of classes"
        inner = folder if folder and not split_role(listing.split or "") else f"{folder}/{min(roles)}".lstrip("/")
        if not folder:
            remedy = "leave out `split` and `validation_fraction`, or rename the folders"
        elif listing.folder is None:
            remedy = "rename them if they are classes, or unpack it and give the folder of the splits"
        elif any(split.role for split in splits.values()):
            remedy = f"if this is a second copy of the dataset, move {inner} out of {tree.root}"
            remedy += f"; to read it alone, type: imagefeed build {tree.root / folder} OUT" if inner == folder else ""
        else:
            remedy = f"RAW is one level too high; type: imagefeed build {tree.root / folder} OUT"
        raise UserError(f"{tree.root}: {seen}; {remedy}")


def cut_folders(names: Iterable[str]) -> list[str]:
    """The first folders of the names of classes, if by their own names they only divide or hold all images."""
    top = sorted({name.partition("/")[0] for name in names})
    return top if all(map(CUT_FOLDER.fullmatch, top)) or (len(top) == 1 and IMAGE_FOLDER.fullmatch(top[0])) else []


def refuse_cut_folders(where: object, names: Iterable[str]) -> None:
    """Raises UserError, which names `where`, if classes are named after such folders."""
    if found := cut_folders(names):
        raise UserError(
            f"{where}: {examples(found)} {'is' if len(found) == 1 else 'are'} named like folders of images and not like classes; "
            "sort the images into class folders, or list their labels in a table; classes of such names need `classes=FILE`"
        )


# ---- Classes


def _unify_names(tree: RawTree) -> None:
    """Gives a class one spelling if its names differ only in Unicode normalization, as after copying from a Mac.

    Other names stay as they are.
    """
    spellings: dict[str, set[str]] = {}
    for name in [*tree.order, *(name for listing in tree.listings for name in listing.names)]:
        if not name.isprintable():
            raise UserError(f"{tree.root}: {name!a} cannot be a class's name; rename the folder in printable UTF-8")
        spellings.setdefault(name if name.isascii() else unicodedata.normalize("NFC", name), set()).add(name)
    spelling = {name: normal for normal, names in spellings.items() if len(names) > 1 for name in names}
    if not spelling:
        return
    tree.order = tuple(spelling.get(name, name) for name in tree.order)
    tree.titles = {spelling.get(name, name): title for name, title in tree.titles.items()}
    for listing in tree.listings:
        listing.names = tuple(spelling.get(name, name) for name in listing.names)


def _forget_made_up_classes(tree: RawTree, splits: dict[str, _Split], train: str | None) -> None:
    """Drops the labels of a test split whose only folder is not a known class, as in test/all/IMAGE."""
    known = {*tree.order, *(splits[train].names if train else ())}
    for name, split in splits.items():
        if split.role == TEST and name != train and known and len(split.names) == 1 and not split.names & known:
            tree.notes.append(
                f"the only class of {name}, {min(split.names)}, does not occur in {train or 'others'}, so its labels are unknown"
            )
            for listing in split.listings:
                listing.names, listing.codes = (), np.full(len(listing.paths), NO_LABEL, np.int32)


def _order_classes(
    tree: RawTree, options: SourceOptions, splits: dict[str, _Split], train: str | None
) -> tuple[tuple[str, ...], str]:
    """The classes in the order of their labels, and where the order comes from."""
    found = set().union(*(split.names for split in splits.values()))
    if options.classes is not None:
        path = Path(options.classes)
        order, source = _read_order(path, found), f"in the order of {path.name}"
    else:
        order, source = tree.order, f"in the order of {tree.layout}"
    if order:
        if unknown := sorted(found.difference(order)):
            where = options.classes if options.classes is not None else tree.root
            raise UserError(f"{where}: lacks the class {examples(unknown)} of {tree.root}; add it, or remove its images")
        return order, source
    trained = splits[train].names if train else set()
    for name, split in splits.items():
        if trained and (extra := sort_classes(split.names - trained)):
            place = tree.root / (split.listings[0].folder or "")
            raise UserError(
                f"{place}: split {name} has {'classes' if len(extra) > 1 else 'the class'} {examples(extra)}, which {train} "
                f"lacks ({train} has {examples(sort_classes(trained))}); correct or remove the folders or labels, or list all "
                "classes in the file of `classes=FILE`"
            )
    ordered = sort_classes(found)
    by_value = ordered and all(map(WHOLE_NUMBER.fullmatch, ordered))
    return ordered, "sorted by value" if by_value else "sorted by name"


def _read_order(path: Path, found: set[str]) -> tuple[str, ...]:
    """The names in a file of classes, one a line, spelled as in the raw tree where only the Unicode normal form differs."""
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error}); `classes` wants one with a name per line") from None
    spelling = {unicodedata.normalize("NFC", name): name for name in found}
    names = [unicodedata.normalize("NFC", line if line in found else line.strip()) for line in lines if line.strip()]
    if twice := [name for at, name in enumerate(names) if name in names[:at]] if len(set(names)) < len(names) else []:
        raise UserError(f"{path}: has {twice[0]} twice; `classes` wants each class once, one per line")
    if not names:
        raise UserError(f"{path}: is empty; `classes` wants the names of the classes, one per line")
    return tuple(spelling.get(name, name) for name in names)


def _doubts(classes: tuple[str, ...], order: str, splits: dict[str, SourceSplit], train: str | None) -> Iterator[str]:
    """Notes on what was read literally but may be meant differently."""
    if deep := [name for name in classes if "/" in name]:
        yield f"{plural(len(deep), 'class is a path', 'classes are paths')} of folders; --class-level top uses only the first"
        inside: dict[str, set[str]] = {}
        for name in classes:
            inside.setdefault(name.partition("/")[0], set()).add(name.partition("/")[2])
        same = next(iter(inside.values()))
        if len(inside) > 1 < len(same) and all(each == same for each in inside.values()):
            yield f"{examples(inside)} have the same classes; to read only one of them, give it as RAW"
    if len(classes) == 1:
        yield f"all images are of one class, {classes[0]}"
    alike: dict[str, list[str]] = {}
    for name in classes:
        key = str(int(name)) if WHOLE_NUMBER.fullmatch(name) else " ".join(re.sub(r"[\s_-]+", " ", name).casefold().split())
        alike.setdefault(key, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield f"{', '.join(map(repr, names))} are different classes"
    numbers = sum(1 for name in classes if WHOLE_NUMBER.fullmatch(name))
    if order == "sorted by name" and 1 < numbers < len(classes):
        yield f"{numbers:,} of {len(classes):,} classes are whole numbers, but sorted as names; set another order with --classes"
    if train in splits and classes and len(splits[train]) and (unknown := int((splits[train].labels == NO_LABEL).sum())):
        yield f"{plural(unknown, 'image')} of {train}, the training split, without a label"
    for name, split in splits.items():
        missing = np.flatnonzero(count_classes(split, len(classes)) == 0)
        if 0 < len(missing) < len(classes):
            lacking = examples(classes[at] for at in missing)
            yield f"{plural(len(missing), 'class', 'classes')} without images in {name}: {lacking}"
