"""Lists the images named in text files: lines of path and label, as in Caffe, MXNet and many public datasets."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming, read_file
from imagefeed.dataset.splits import TEST, TRAIN, split_role, split_roles
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.decide import cut_folders, refuse_cut_folders, sort_classes
from imagefeed.preprocess.sources.labels import name_labels
from imagefeed.preprocess.sources.listing import Listing, RawTree, Root, code_classes, list_folder, list_images, read_raw
from imagefeed.preprocess.sources.locate import Located, find_base, has_class_folders, list_split, locate, unused_folders
from imagefeed.preprocess.sources.suffixes import IMAGES
from imagefeed.preprocess.sources.tables import SUFFIXES as TABLES
from imagefeed.preprocess.sources.tables import read_table

SUFFIXES = (".txt", ".lst")
FOLDERS = ("", "meta/", "labels/", "lists/", "splits/", "annotations/", "ImageSets/", "ImageSets/Main/")  # of lists, in RAW
CLASS_FILES = ("classes.txt", "class_names.txt", "classnames.txt", "labels.txt", "synsets.txt", "wnids.txt")
IMAGE = re.compile(rf"(.*\.(?:{'|'.join(sorted(IMAGES))}))(?:[\"']?(\t| *[,;] *| +)(.*))?", re.IGNORECASE)
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?")
CLASS_A_LINE = re.compile(r"[^\W\d][\w-]*")  # such as a WordNet id; numbers would be ambiguous
SEVERAL = re.compile(r"[-0-9.]+([\s,;]+[-0-9.]+)+")
CUB = ("images.txt", "image_class_labels.txt")


@dataclass(frozen=True)
class _List:
    path: Path
    split: str  # by the list's name
    names: list[str]
    labels: list[str] | None


def holds_lists(root: Path) -> bool:
    """Whether lists in `root` name its images, and no class folders do."""
    if all((root / name).is_file() for name in CUB):
        return True
    if has_class_folders(root, list_folder(root)[1]):
        return False
    return any(_leads(root, path, split) for path, split in _split_lists(root))


def find_lists(root: Path, options: SourceOptions) -> RawTree:
    """Lists the images named in train.txt, val.lst and the like, or in the list `root`. Without labels, folders are classes."""
    single = root if root.is_file() else None
    root = root.parent if single else root
    if single is None and all((root / name).is_file() for name in CUB):
        lists = list(_read_cub(root))
    else:
        found = [(single, single.stem)] if single else [each for each in _split_lists(root) if _leads(root, *each)]
        lists = [_read(path, split) for path, split in found]
    if not lists:
        raise UserError(
            f"{root}: no list of images in it, such as train.txt with lines of PATH LABEL; give the list, or another --layout"
        )
    notes: list[str] = []
    located = [_locate(root, each) for each in lists]
    _check_images(lists, located, notes)
    labels = [_labels(each, where) for each, where in zip(lists, located)]
    class_of = name_labels({label for column in labels for label in column}, lists[0].path)
    order = class_file(root, set(class_of.values()) - {""}, notes)
    if order and all(map(str.isdecimal, filter(None, class_of.values()))):
        class_of = {label: order[int(name)] if name else "" for label, name in class_of.items()}
    # A list may be said to be of another split, but not of another kind, and several are not one.
    only = len(lists) == 1 and split_role(lists[0].split) in (None, split_role(options.split or TRAIN))
    named = not (only and options.one_split) and (single is None or split_role(single.stem) is not None)
    listings = [
        list_images(each.split if named else None, where.paths, [class_of[label] for label in column])
        for each, where, column in zip(lists, located, labels)
    ]
    notes += unused_folders(root, (path for where in located for path in where.paths))
    return RawTree(root, "lists", listings, tuple(order), notes=notes)


def labels_beside(root: Path, split_folder: Path, paths: Sequence[str]) -> list[str] | None:
    """The labels of `paths` in a list in or beside `split_folder`. `paths` are relative to `root`, and all in one folder.

    None if there is no such list. Raises UserError if it lacks images, or has some that do not exist.
    """
    split = split_folder.name if split_folder != root else ""
    found: list[tuple[Path, list[str]]] = []
    files = [path.rpartition("/")[2] for path in paths]
    position = {name.rpartition(".")[0] or name: at for at, name in enumerate(files)} | {
        name: at for at, name in enumerate(files)
    }
    for path in _candidates(root, split_folder, root / paths[0].rpartition("/")[0], split):
        rows = _read_rows(path)
        class_a_line = all(label is None and CLASS_A_LINE.fullmatch(name) and name not in position for name, label in rows)
        if class_a_line and len(rows) == len(paths) and re.search("label|synset", path.name):
            rows = [(file, name) for file, (name, _) in zip(files, rows)]  # in the order of the images
        if not any(name.rpartition("/")[2] in position for name, _ in rows):
            continue
        names, labels = _columns(path, rows)
        if labels is None:
            continue
        known = {at: label for name, label in zip(names, labels) if (at := position.get(name.rpartition("/")[2])) is not None}
        lost = [name for name in names if name.rpartition("/")[2] not in position]
        missed = [at for at in range(len(paths)) if at not in known]
        if lost or missed:
            examples = f"{paths[missed[0]]} is not in it" if missed else f"{lost[0]} does not exist"
            raise UserError(
                f"{path}: lacks {plural(len(missed), 'image')} of {split or root} and names {plural(len(lost), 'image')} that "
                f"do not exist ({examples}); correct the list, or put back the images"
            )
        found.append((path, [known[at] for at in range(len(paths))]))
    for path, other in found[1:]:
        if other != found[0][1]:
            raise UserError(f"{path}: differs from {found[0][0]} in the labels of {split or root}; remove one of them")
    return found[0][1] if found else None


def number_classes(listings: Sequence[Listing], listed: Sequence[Listing], notes: list[str]) -> None:
    """Replaces the labels of `listed` by classes. As in Caffe's lists, numbers are positions among the sorted class folders of
    the training split; labels.py converts other labels."""
    sorted_by_folder = [each for each in listings if not any(each is other for other in listed)]
    folders = {name for each in sorted_by_folder if split_role(each.split or TRAIN) == TRAIN for name in each.names}
    classes = sort_classes(folders)
    for listing in listed:
        class_of = name_labels(listing.names, f"the list of {listing.folder or listing.split}")
        names = [class_of[name] for name in listing.names]
        numbers = [name for name in names if name]
        if classes and not folders.issuperset(numbers) and all(map(str.isdecimal, numbers)):
            if beyond := [name for name in numbers if int(name) >= len(classes)]:
                raise UserError(
                    f"{listing.folder or listing.split}: its list has the label {beyond[0]}, but labels are positions among the "
                    f"{len(classes):,} sorted class folders, from 0 to {len(classes) - 1:,}; correct the list, or write the names"
                )
            names = [classes[int(name)] if name else "" for name in names]
            notes.append(
                f"numbers in the list of {listing.split} are positions among the sorted class folders: 0 is {classes[0]}, "
                f"{len(classes) - 1:,} is {classes[-1]}"
            )
        listing.names, listing.codes = code_classes([names[code] if code >= 0 else None for code in listing.codes])


# ---- Which files are lists


def _split_lists(root: Path) -> list[tuple[Path, str]]:
    """The files in `root` or its folders of lists that are named like lists of splits, and the names of those splits."""
    for folder in FOLDERS:
        if (root / folder).is_dir():
            stems = {name: list_split(Path(name).stem) for name in list_folder(root / folder)[0] if name.endswith(SUFFIXES)}
            roles = split_roles(stems.values())
            if found := [(root / folder / name, stem) for name, stem in stems.items() if stem in roles]:
                return found
    return []


def _candidates(root: Path, split_folder: Path, images: Path, split: str) -> Iterator[Path]:
    """Files that may list the images of a split: those in its folder or in that of its `images`, and others named like the split
    or like a general list."""
    role = split_role(split)
    for folder in dict.fromkeys(
        (split_folder, images, split_folder.parent if split else root, *(root / name for name in FOLDERS))
    ):
        if not folder.is_dir():
            continue
        for name in list_folder(folder)[0]:
            if name.lower().endswith(SUFFIXES + TABLES):
                stem = list_split(Path(name).stem)
                words = re.split(r"[^a-z]+", name.lower())
                general = stem == "" and name not in CLASS_FILES
                if (
                    folder in (split_folder, images)
                    or general
                    or stem == split
                    or (role and (split_role(stem) or _role_in(words)) == role)
                ):
                    yield folder / name


def _role_in(words: list[str]) -> str | None:
    """The role that one of the words names, as in places365_val."""
    roles = {role for word in words if (role := split_role(word))}
    return roles.pop() if len(roles) == 1 else None


def class_file(root: Root, used: set[str], notes: list[str]) -> list[str]:
    """The classes in the order of a file of class names, if that covers all names, or all numbers, in use."""
    for path in (root / folder / name for folder in FOLDERS for name in CLASS_FILES):
        if path.is_file():
            lines = [line.strip() for line in read_raw(path).decode("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
            if all(re.fullmatch(rf"{at + 1} .+", line) for at, line in enumerate(lines)):
                lines = [line.partition(" ")[2] for line in lines]
            if len(set(lines)) < len(lines):
                continue
            if used <= set(lines) or (all(map(str.isdecimal, used)) and max(map(int, used), default=0) < len(lines)):
                notes.append(f"the order of the classes is that of {str(path).removeprefix(f'{root}/')}")
                return lines
    return []


# ---- What is in a list


def _read(path: Path, split: str) -> _List:
    return _List(path, split, *_columns(path, _read_rows(path)))


def _read_rows(path: Path) -> list[tuple[str, str | None]]:
    """The name and the label, if any, in each line of a list or a table; other files may give anything."""
    if path.suffix.lower() in TABLES:
        return list(read_table(path) or ())
    with naming(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [_parse(line) for text in file if (line := text.strip()) and not line.startswith("#")]


def _columns(path: Path, rows: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[str] | None]:
    """The names and the labels of a list, None if it has none. Raises UserError for a line that is not like the others."""
    names = [name.replace("\\", "/") for name, _ in rows]
    labels = [label for _, label in rows if label is not None]
    if labels and len(labels) < len(names):
        lacking = next(name for name, label in rows if label is None)
        raise UserError(f"{path}: {lacking} has no label, but others have one; give each line a PATH and a LABEL")
    if several := next((label for label in labels if SEVERAL.fullmatch(label)), None):
        name = names[labels.index(several)]
        raise UserError(f"{path}: {name} has several labels, {several}; give each image one class")
    return names, labels or None


def _parse(line: str) -> tuple[str, str | None]:
    """The path and the label of a line; numbers of a box after the label are left out."""
    fields = line.split("\t")
    if len(fields) > 2 and fields[0].isdecimal() and IMAGE.fullmatch(fields[-1]):  # MXNet's: index, label, path
        return fields[-1], " ".join(fields[1:-1])
    if match := IMAGE.fullmatch(line):
        name, separator, rest = match.groups()
    elif len(fields) > 1:
        name, separator, rest = fields[0], "\t", "\t".join(fields[1:])
    else:
        name, separator, rest = *line.rpartition(" ")[:2], line.rpartition(" ")[2] or None
        if not separator:
            return line, None
    if rest is None:
        return name, None
    parts = rest.split((separator or "").strip() or ("\t" if separator == "\t" else None))
    if len(parts) == 5 and all(map(NUMBER.fullmatch, parts[1:])):  # a box
        return name.strip(), parts[0].strip()
    return name.strip(), rest.strip().strip("\"'")


def _read_cub(root: Path) -> Iterator[_List]:
    """The lists of CUB-200-2011: files of "ID VALUE", of paths, of classes' numbers, and of 1 for images to train on."""

    def read(name: str) -> dict[str, str]:
        lines = read_file(root / name).decode("utf-8", "surrogateescape").splitlines()
        return {number: value.strip() for number, _, value in (line.partition(" ") for line in lines) if number}

    paths, labels = map(read, CUB)
    trained = read("train_test_split.txt") if (root / "train_test_split.txt").is_file() else dict.fromkeys(paths, "1")
    names = read("classes.txt") if (root / "classes.txt").is_file() else {}
    for split, flag in ((TRAIN, "1"), (TEST, "0")):
        numbers = [number for number in paths if trained.get(number) == flag]
        if lost := [number for number in numbers if number not in labels]:
            raise UserError(f"{root / CUB[1]}: has no line for image {lost[0]}, {paths[lost[0]]}; download the dataset again")
        if numbers:
            classes = [names.get(labels[number], labels[number]) for number in numbers]
            yield _List(root / CUB[0], split, [paths[number] for number in numbers], classes)


# ---- The images that a list names


def _leads(root: Path, path: Path, split: str) -> bool:
    """Whether the first line of a list leads to an image."""
    with naming(path), open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        line = next((line.strip() for line in file if line.strip() and not line.startswith("#")), "")
    return bool(line) and find_base(root, [_parse(line)[0].replace("\\", "/")], split) is not None


def _locate(root: Path, each: _List) -> Located:
    base = find_base(root, each.names, each.split) if each.names else None
    if base is None:
        first = f"{each.names[0]} does not exist" if each.names else "has no lines"
        raise UserError(f"{each.path}: {first}; give lines of PATH LABEL, with paths relative to {root}")
    return locate(root, each.names, base)


def _check_images(lists: list[_List], located: list[Located], notes: list[str]) -> None:
    """Raises UserError if a listed image does not exist or is listed twice. Notes unlisted images in the same folders."""
    seen: dict[str, Path] = {}
    for each, where in zip(lists, located):
        for path in where.paths:
            if path in seen:
                raise UserError(f"{each.path}: {path} is also in {seen[path]}; keep one of the lists that divide these images")
            seen[path] = each.path
    unlisted = [path for path in dict.fromkeys(path for where in located for path in where.unlisted) if path not in seen]
    for each, where in zip(lists, located):
        if where.missing:
            raise UserError(
                f"{each.path}: {len(where.missing):,} of {plural(len(each.names), 'image')} do not exist, such as "
                f"{where.paths[where.missing[0]]}, and {plural(len(unlisted), 'image')} beside the others are in no list; "
                "correct the list, or put back the images"
            )
    if unlisted:
        notes.append(f"{plural(len(unlisted), 'image')} in no list left out, such as {unlisted[0]}")


def _labels(each: _List, where: Located) -> list[str]:
    """The labels of a list, or else the folders of its images below those that all share. A test split may have no labels."""
    if each.labels is not None:
        return each.labels
    folders = [path.split("/")[:-1] for path in where.paths]
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*folders))))
    if all(len(parts) > shared for parts in folders):
        names = ["/".join(parts[shared:]) for parts in folders]
        if split_role(each.split) == TEST and cut_folders(set(names)):
            return [""] * len(names)
        refuse_cut_folders(each.path, set(names))
        return names
    if split_role(each.split) == TEST:
        return [""] * len(folders)
    raise UserError(f"{each.path}: has no labels, and its images are in no folders of classes; give lines of PATH LABEL")
