"""Images in folders: RAW/CLASS/IMAGE, RAW/SPLIT/CLASS/IMAGE, and Kaggle's ILSVRC/Data/CLS-LOC. Links are followed."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagefeed.dataset.console import examples, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming, read_file
from imagefeed.dataset.splits import TEST, TRAIN, split_role, split_roles
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.listing import Listing, RawTree, list_folder, list_images
from imagefeed.preprocess.sources.lists import labels_beside, number_classes
from imagefeed.preprocess.sources.suffixes import IMAGES, NO_IMAGES, PACKED, may_be_image, suffix
from imagefeed.preprocess.sources.tables import unread_tables

SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")
# Folders that operating systems make: thumbnails, resource forks, deleted files. Users cannot even read lost+found.
SYSTEM_FOLDERS = {"@eaDir", "@tmp", "__MACOSX", "#recycle", "$RECYCLE.BIN", "@Recycle", "System Volume Information", "lost+found"}
# If the only folder of a split or class has one of these names, it is not a class.
WRAPPERS = {"images", "image", "imgs", "img", "jpegimages", "jpegs", "jpg", "pictures", "photos", "data"}
# Beside one of those, for detectors and segmentation. Their files may be pictures too, but not of a class.
ANNOTATIONS = {"labels", "annotations", "masks", "mask", "segmentations", "segmentation", "groundtruth", "ground_truth", "gt"}


def find_folders(root: Path, options: SourceOptions) -> RawTree:
    """Lists the images of folders of splits, or with `split` of folders that are the classes of this split."""
    walk = _Walk(root, options.class_level == "top")
    if options.one_split:
        listings = [walk.split(None, split_role(options.split or TRAIN))]
    else:
        listings = list(_list_splits(walk))
    number_classes(listings, walk.listed, walk.notes)
    walk.notes += unread_tables(root)
    return RawTree(root, "folders", listings, skipped=walk.skipped, notes=walk.notes)


def _list_splits(walk: "_Walk") -> Iterator[Listing]:
    files, folders = walk.read("")
    if not folders:
        if packed := [name for name in files if suffix(name) in PACKED]:
            raise UserError(f"{walk.root}: holds {examples(packed)} and no folders; unpack the archives, or give their content")
        raise UserError(f"{walk.root}: no folders in it; images are expected as {walk.root}/train/CLASS/IMAGE")
    walk.skipped.update(f"{name}/" for name in SYSTEM_FOLDERS if (walk.root / name).is_dir())
    roles = split_roles(folders)
    holding = [name for name in folders if walk.loose(name)]
    others = [name for name in holding if name not in roles]
    if others and not roles:
        raise UserError(
            f"{walk.root}: its folders hold images, so they are classes, not splits; hold out validation images with "
            "`validation_fraction=0.1`, or name the only split, as in `split=train`"
        )
    if others:
        raise UserError(
            f"{walk.root}: {examples(others)} beside {examples(sorted(roles))} holds images without classes; move it out of "
            f"{walk.root}, or, if all of these folders are classes, move them all into a folder train in {walk.root}"
        )
    if loose := [name for name in files if suffix(name) in IMAGES]:
        walk.notes.append(f"{plural(len(loose), 'image')} beside the split folders left out: {examples(loose)}")
    full = [name for name in folders if walk.holds(name, bool(roles) and name not in roles, set())]
    for name in folders:
        if name in full or not full or roles.get(name) == TRAIN:  # a training split without images is an error
            yield walk.split(name, roles.get(name))
        else:
            walk.notes.append(f"the folder {name} has no images and is left out")


@dataclass
class _Walk:
    """Lists the images below `root`, in the order of their paths, without opening any."""

    root: Path
    top: bool  # the class is the first folder below the split, not the one that holds the images
    skipped: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    listed: list[Listing] = field(default_factory=list)  # whose labels are those of a list

    def split(self, name: str | None, role: str | None) -> Listing:
        """The images of RAW/NAME, or of RAW itself without a name."""
        folder = name or ""
        files, folders = self.read(folder, count=True)
        while not any(map(may_be_image, files)) and (
            inner := self.wrapper(folder, folders, name, role) or self.dataset_folder(folder, folders, name)
        ):
            self.count(files)
            folder = f"{folder}/{inner}" if folder else inner
            files, folders = self.read(folder, count=True)
        loose = list(filter(may_be_image, files))
        self.count(files)
        prefix = f"{folder}/" if folder else ""
        packed = [each for each in files if suffix(each) in PACKED and each.partition(".")[0] not in folders]
        if packed and folders and name:
            raise UserError(
                f"{self.root / folder}: {examples(packed)} beside the class folders {examples(folders)}; unpack "
                f"{'it' if len(packed) == 1 else 'them'}, or move {'it' if len(packed) == 1 else 'them'} out of {self.root}"
            )
        if packed:
            self.notes.append(
                f"{examples(packed)} beside the folders {'is' if len(packed) == 1 else 'are'} not unpacked and left out"
            )
        if loose and folders:
            raise UserError(
                f"{self.root / folder}: {plural(len(loose), 'image')} beside the class folders {examples(folders)}; move "
                f"{'it' if len(loose) == 1 else 'them'} into class folders, or out of {self.root}"
            )
        if loose:
            paths = [prefix + file for file in loose]
            names = labels_beside(self.root, self.root / (name or ""), paths)
            if names is None and role != TEST:
                what = f"{name} holds images without classes" if name else "it has images but no class folders"
                raise UserError(
                    f"{self.root}: {what}; sort them into class folders, {folder or 'RAW'}/CLASS/IMAGE, or list their "
                    f"labels in {name or 'train'}.txt, as lines of PATH LABEL"
                )
            listing = list_images(name, paths, names, folder)
            self.listed += [listing] if names else []
            return listing
        return self.classes(name, folder, folders)

    def wrapper(self, path: str, folders: list[str], split: str | None = None, role: str | None = None) -> str:
        """The one of the `folders` in `path` that holds all its images and is no class; "" if there is none.

        It is the split once more, as in seg_test/seg_test/CLASS, or called images, perhaps beside labels.
        """
        [only] = folders if len(folders) == 1 else [""]
        if only and (only == split or (role is not None and split_role(only) == role)):
            return only
        named = [name for name in folders if name.lower() in WRAPPERS]
        if len(named) != 1:
            return ""
        others = [name for name in folders if name not in named]
        if any(self.holds(f"{path}/{name}".lstrip("/"), False, set()) for name in others if name.lower() not in ANNOTATIONS):
            return ""
        self.skipped.update(f"{name}/" for name in others)
        return named[0]

    def dataset_folder(self, path: str, folders: list[str], split: str | None) -> str:
        """The only folder of a tree without splits if it is above the classes, as 2750 in 2750/Forest; else ""."""
        if split is not None or self.top or len(folders) != 1 or split_role(folders[0]):
            return ""
        files, inside = self.read(f"{path}/{folders[0]}".lstrip("/"))
        if any(map(may_be_image, files)) or not WRAPPERS.isdisjoint(map(str.lower, inside)):
            return ""
        return folders[0]

    def count(self, files: list[str]) -> None:
        self.skipped.update(f".{suffix(name)}" if "." in name else name for name in files if not may_be_image(name))

    def classes(self, name: str | None, folder: str, folders: list[str]) -> Listing:
        """The images of the classes in `folders` of `folder`, or deeper."""
        listing = Listing(name, [], (), np.empty(0, np.int32), folder=folder)
        if wrappers := [each for each in folders if each.lower() in WRAPPERS and len(folders) > 1]:
            self.notes.append(
                f"{examples(wrappers)} beside other folders: read as {'a class' if len(wrappers) == 1 else 'classes'}"
            )
        names: list[str] = []
        counts: list[int] = []
        above = (_identity(self.root), _identity(os.path.join(self.root, folder)))
        for class_name in folders:
            path = f"{folder}/{class_name}" if folder else class_name
            for name_below, paths in self.below(class_name, path, above):
                names.append(name_below)
                counts.append(len(paths))
                listing.paths += paths
        if not names:
            raise UserError(f"{self.root / folder}: no images in it; add class folders with images, or remove the folder")
        listing.names = tuple(names)
        listing.codes = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        return listing

    def below(self, name: str, path: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
        """(name, images) of each class at or below a folder; `above` identifies the folders above, which ends loops of links."""
        here = _identity(os.path.join(self.root, path))
        if here in above:
            return
        skipped = self.skipped.total()
        files, folders = self.read(path, count=True)
        if not files and (inner := self.wrapper(path, folders)):
            folders = [inner]
        own = [folder for folder in folders if folder.lower() not in WRAPPERS]
        if not files and own and not self.top:
            if wrappers := [folder for folder in folders if folder not in own]:
                raise UserError(
                    f"{self.root / path}: images in {examples(own)} beside {examples(wrappers)}, which is no class by its name; "
                    f"move what is not an image of {name}, such as masks, out of {self.root}, or use all by `class_level=top`"
                )
            for folder in folders:
                yield from self.below(f"{name}/{folder}", f"{path}/{folder}", (*above, here))
            return
        images = self.images(path, files, folders, (*above, here))
        inside = [] if self.top else [name for name in own if any(image.startswith(f"{path}/{name}/") for image in images)]
        if inside:
            raise UserError(
                f"{self.root / path}: {plural(len(files), 'image')} beside the folders {examples(inside)}; if these are classes, "
                f"move {'it' if len(files) == 1 else 'them'} into one; if {name} is the class, give `class_level=top`"
            )
        if images:
            yield name, images
        elif self.skipped.total() > skipped:  # such as a folder of annotations
            self.notes.append(f"the folder {path} has no images and is left out")
        else:
            raise UserError(f"{self.root / path}: the class has no images; add some, or remove the folder")

    def images(self, path: str, files: list[str], folders: list[str], above: tuple[tuple[int, int], ...]) -> list[str]:
        """The paths of `files` and of all images below `folders`.

        Dangling links are listed too, so that they are rejected by name and not silently skipped.
        """
        if not folders:
            return [f"{path}/{file}" for file in files]
        found: list[str] = []
        inside = set(folders)
        for name in sorted((*files, *folders)):
            below = f"{path}/{name}"
            if name not in inside:
                found.append(below)
            elif (here := _identity(os.path.join(self.root, below))) not in above:
                found += self.images(below, *self.read(below, count=True), (*above, here))
        return found

    def loose(self, folder: str) -> bool:
        """Whether a folder itself contains images."""
        return any(map(may_be_image, self.read(folder)[0]))

    def holds(self, folder: str, known: bool, seen: set[tuple[int, int]]) -> bool:
        """Whether any file below may be an image, or with `known` has the suffix of one."""
        here = _identity(os.path.join(self.root, folder))
        if here in seen:
            return False
        seen.add(here)
        files, folders = self.read(folder)
        if any(suffix(file) in IMAGES for file in files) if known else files:
            return True
        return any(self.holds(f"{folder}/{name}", known, seen) for name in folders)

    def read(self, folder: str, count: bool = False) -> tuple[list[str], list[str]]:
        """The names of the files and of the folders in a folder, sorted, without hidden ones and without what is no image."""
        files, folders = list_folder(os.path.join(self.root, folder))
        if "dataset.json" in files and any(name.endswith(".tfrecord") for name in files):
            raise UserError(f"{self.root / folder}: a dataset that was built, not raw images; move it out, or give another RAW")
        if not SYSTEM_FOLDERS.isdisjoint(folders):
            if count:
                self.skipped.update(f"{name}/" for name in folders if name in SYSTEM_FOLDERS)
            folders = [name for name in folders if name not in SYSTEM_FOLDERS]
        # A million names: 0.1 us each, where suffix() takes 0.3 us. Of a name without a dot this is all of it.
        if not NO_IMAGES.isdisjoint(map(str.lower, {name.rpartition(".")[2] for name in files})):
            if count:
                self.skipped.update(f".{suffix(name)}" for name in files if suffix(name) in NO_IMAGES)
            files = [name for name in files if suffix(name) not in NO_IMAGES]
        return files, folders


def holds_kaggle(root: Path) -> bool:
    """Whether Kaggle's ImageNet archive was unpacked to `root`, or `root` is the CLS-LOC folder in it."""
    return (root / KAGGLE_DATA).is_dir() or _beside(root, SYNSETS) is not None or _beside(root, SOLUTION) is not None


def find_kaggle(root: Path, options: SourceOptions) -> RawTree:
    """Lists train/WNID/IMAGE, val/IMAGE with the labels of LOC_val_solution.csv, and test/IMAGE, whose labels are unknown."""
    data = root / KAGGLE_DATA if (root / KAGGLE_DATA).is_dir() else root
    walk = _Walk(root, top=True)
    prefix = f"{KAGGLE_DATA}/" if data != root else ""
    splits = [name for name in ("train", "val", "test") if (data / name).is_dir()]
    if not splits:
        raise UserError(f"{data}: no folder train, val or test in it; unpack Kaggle's archive there")
    titles = _read_synsets(root)
    listings: list[Listing] = []
    for split in splits:
        files, folders = walk.read(prefix + split)
        if titles and (unknown := [name for name in folders if name not in titles]):
            raise UserError(f"{data}: {unknown[0]} is not a class of {SYNSETS}; remove the folder, or use the right {SYNSETS}")
        if split == "train" or folders:
            listings.append(walk.classes(split, prefix + split, folders))
        elif files:
            paths = walk.images(prefix + split, files, folders, ())
            wnids = _val_labels(root, paths) if split == "val" else None
            listings.append(list_images(split, paths, wnids, prefix + split))
    return RawTree(root, "Kaggle's ImageNet", listings, tuple(sorted(titles)), titles, skipped=walk.skipped)


def _beside(root: Path, name: str) -> Path | None:
    """One of Kaggle's tables, which lie beside the folder ILSVRC; `root` may also be the CLS-LOC folder inside it."""
    inside = root.absolute().parts[-3:] == KAGGLE_DATA.parts
    places = [root, root.absolute().parents[2]] if inside else [root]
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_synsets(root: Path) -> dict[str, str]:
    """The common name of each WordNet id, from lines such as "n01440764 tench, Tinca tinca"."""
    path = _beside(root, SYNSETS)
    lines = read_file(path).decode("utf-8", "replace").splitlines() if path else ()
    return {wnid: title.strip() for wnid, _, title in (line.partition(" ") for line in lines) if wnid}


def _val_labels(root: Path, paths: list[str]) -> list[str]:
    """Classes from LOC_val_solution.csv, whose lines give the class with each box: "NAME,n03995372 85 1 499 272 ..."."""
    path = _beside(root, SOLUTION)
    if path is None:
        raise UserError(f"{root}: {SOLUTION}, which has the labels of split val, is missing; put it there")
    with naming(path), open(path, newline="", encoding="utf-8", errors="replace") as file:
        wnids = {row[0]: row[1].partition(" ")[0] for row in csv.reader(file) if len(row) > 1}
    names = [wnids.get(os.path.splitext(os.path.basename(image))[0], "") for image in paths]
    if "" in names:
        raise UserError(f"{path}: {paths[names.index('')]} is not in it; download the table again, or remove the image")
    return names


def _identity(folder: Path | str) -> tuple[int, int]:
    """Identifies a folder, whatever links lead to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino
