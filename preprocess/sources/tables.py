"""Images that CSV or TSV tables list by path and label."""

import contextlib
import csv
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming
from imagefeed.dataset.splits import TEST, TRAIN, split_role, split_roles
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.columns import holds_several, refuse_unknown
from imagefeed.preprocess.sources.labels import name_labels
from imagefeed.preprocess.sources.listing import RawTree, find_files, list_folder, list_images
from imagefeed.preprocess.sources.locate import find_base, has_class_folders, list_split, locate, unused_folders

# Column names, most reliable first; a space in a name counts as _.
PATH_COLUMNS = tuple(
    "path image file filename image_path filepath file_name file_path filepaths image_name img_path img_name image_file "
    "imagename img images image_id img_id imageid id_code id name".split()
)
LABEL_COLUMNS = tuple(
    "label class target class_name labels category breed species label_name category_name class_id classid label_id category_id "
    "class_label diagnosis cls".split()
)
SPLIT_COLUMN = "split"
# Other columns that give the split, if their values are names of splits.
OTHER_SPLIT_COLUMNS = tuple("set subset partition data_set dataset phase fold usage".split())
FLAG_COLUMN = re.compile(r"is_(train|training|val|valid|validation|test)(?:ing)?(?:_(?:set|image|img))?")  # of 0 and 1
FLAGS = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
SUFFIXES = (".csv", ".tsv")
FORM = re.compile("sample_?submission|submission", re.IGNORECASE)  # a template for competitors; its labels are placeholders

Row = tuple[str, str, str, list[str]]  # path, label, split, values of the columns to keep


@dataclass(frozen=True)
class _Table:
    """A table and its columns. `labels` is one column; several if the table is one-hot; none if the classes are unknown."""

    path: Path
    delimiter: str
    columns: tuple[str, ...]
    has_header: bool
    image: int
    labels: tuple[int, ...]
    split: int | None
    guessed: bool  # the label column was taken because it is the only other one
    kept: tuple[int, ...] = ()  # columns whose values are kept

    def rows(self) -> Iterator[Row]:
        """Raises UserError for an incomplete row."""
        part = self.split or 0
        read_split = _split_reader(self.path, self.columns[part]) if self.split is not None else None
        one = self.labels[0] if len(self.labels) == 1 else -1
        needed = max(self.image, part, *self.labels)
        image, intern = self.image, sys.intern
        with _reading(self.path, self.delimiter) as rows:
            if self.has_header:
                next(rows, None)
            for row in rows:
                if len(row) > needed and row[image]:
                    label = row[one].strip() if one >= 0 else self._marked(row, rows.line_num) if self.labels else ""
                    split = read_split(row[part], rows.line_num) if read_split else ""
                    yield row[image], intern(label), split, [row[at] if at < len(row) else "" for at in self.kept]
                elif any(row):
                    raise UserError(f"{self.path}: line {rows.line_num} has no path or too few columns; correct the line")

    def _marked(self, row: list[str], number: int) -> str:
        values = [FLAGS.get(row[at].strip().lower()) for at in self.labels]
        if None in values or values.count(True) != 1:
            problem = "a value other than 0 or 1" if None in values else f"{values.count(True)} classes marked with 1"
            raise UserError(f"{self.path}: line {number} has {problem} in its one-hot columns; mark one class in each line")
        return self.columns[self.labels[values.index(True)]]


def holds_tables(root: Path) -> bool:
    """Whether `root` has only tables, a table named like a split, or a table whose images are not in class folders."""
    files, folders = list_folder(root)
    if not folders:
        return any(name.endswith(SUFFIXES) for name in files)
    named, others = _choose(root, [name for name in files if name.endswith(SUFFIXES)])
    in_classes = has_class_folders(root, folders)
    if readable := [table for table in map(_open_or_none, named) if table and (not table.guessed or _leads(root, table))]:
        return not in_classes or TRAIN in split_roles(list_split(table.path.stem) for table in readable).values()
    return not in_classes and any(table and _leads(root, table) for table in map(_open_or_none, others))


def unread_tables(root: Path) -> list[str]:
    """Notes on tables of images in `root` that are ignored because its folders are read."""
    tables = [path for paths in _choose(root, find_files(root, SUFFIXES)[1]) for path in paths if not FORM.search(path.name)]
    found = [table for path in tables if (table := _open_or_none(path)) and _leads(root, table)]
    return [f"{table.path.name} is not read, because the folders name the classes; to read it, give it as RAW" for table in found]


def find_table(root: Path, options: SourceOptions) -> RawTree:
    """Lists the rows of the table `root`, or of the tables in the folder `root`.

    Paths are relative to the table's folder and may lead out of it: the table is the user's own, and files are only read. The
    split of a row is in a column, or is the name of the table, or else of the folder that holds the image.
    """
    is_folder = root.is_dir()
    root, names = find_files(root, SUFFIXES)
    named, others = _choose(root, names)
    tables = [_open(path, len(named or others) > 1, options.columns) for path in named or others]
    if not tables:
        raise UserError(f"{root}: no .csv file in it; give the table itself, or another --layout")
    refuse_unknown(root, options.columns, (name for table in tables if table.has_header for name in table.columns))
    notes: list[str] = []
    # Paths, labels and the values of each column by split.
    listed: dict[str | None, tuple[list[str], list[str], dict[str, list]]] = {}
    for table in tables:
        if table.split is not None and options.one_split:
            raise UserError(f"{table.path}: has a split column, {table.columns[table.split]}; leave out --split")
        own = list_split(table.path.stem) if len(tables) > 1 or (named and not options.one_split) else None
        if table.guessed:
            notes.append(f"the labels are those of the column {table.columns[table.labels[0]]} of {table.path.name}")
        rows = list(table.rows())
        paths = _find_paths(root, [row[0] for row in rows], own, notes)
        if own in listed and not set(paths).isdisjoint(listed[own][0]):
            raise UserError(f"{table.path}: another table of split {own} has the same images; keep one, or give it as RAW")
        by_folder = own is None and not options.one_split
        several = {*table.labels} <= {*table.kept} and any(holds_several(label) for _, label, *_ in rows)
        if several:
            notes.append(
                f"{table.columns[table.labels[0]]} of {table.path.name} has several labels in a row, so classes are unknown"
            )
        kept = [table.columns[at] for at in table.kept]
        for path, (_, label, split, values) in zip(paths, rows):
            by_name = dict(zip(kept, values))
            name = split or own or (_split_folder(path.partition("/")[0]) if by_folder else None)
            found = listed.setdefault(name, ([], [], {column: [] for column in options.columns}))
            found[0].append(path)
            found[1].append("" if several else label)
            for column, column_values in found[2].items():
                column_values.append(by_name.get(column))
    if not listed:
        raise UserError(f"{tables[0].path}: the table has no rows; list images in it")
    if None in listed and len(listed) > 1:
        path = listed[None][0][0]
        raise UserError(f"{tables[0].path}: the split of {path} is unknown; add a column split, with a value in each row")
    class_of = name_labels(set().union(*(labels for _, labels, _ in listed.values())), tables[0].path)
    listings = []
    for name, (paths, labels, columns) in listed.items():
        listings.append(replace(list_images(name, paths, [class_of[label] for label in labels]), columns=columns))
    notes += unused_folders(root, (path for paths, *_ in listed.values() for path in paths)) if is_folder else []
    return RawTree(root, "CSV", listings, notes=notes)


def read_table(path: Path) -> list[tuple[str, str]] | None:
    """(path, label) of each row; None if the file is not a table of images and labels."""
    table = _open_or_none(path)
    return [(image, label) for image, label, *_ in table.rows()] if table and table.labels else None


def pick_column(path: object, content: str, accepted: Iterable[str], header: Iterable[str]) -> str:
    """The first of the accepted names that is a column of the table at `path`."""
    found = next((name for name in accepted if name in header), None)
    if found is None:
        columns = ", ".join(header)[:80] or "none"
        raise UserError(f"{path}: no column of {content}, only {columns}; call it one of {', '.join(accepted)}")
    return found


def _choose(root: Path, names: list[str]) -> tuple[list[Path], list[Path]]:
    """The tables named like splits, and the others, without submission templates."""
    tables = [root / name for name in names if len(names) == 1 or not FORM.search(name)]
    roles = split_roles(list_split(path.stem) for path in tables)
    named = [path for path in tables if list_split(path.stem) in roles]
    return named, [path for path in tables if path not in named]


def _find_paths(root: Path, names: list[str], split: str | None, notes: list[str]) -> list[str]:
    """The paths in a table, unchanged if they lead to files; otherwise the files that they refer to, if there are any."""
    if not names or (root / names[0]).is_file():
        return names
    base = find_base(root, names, split)
    if base is None:
        return names  # each is then rejected by name when it is read
    found = locate(root, names, base)
    if found.missing and len(found.missing) < len(names):
        lost = found.paths[found.missing[0]]
        notes.append(f"{plural(len(found.missing), 'image')} of the table not found, such as {lost}")
    return found.paths


def _open(path: Path, several: bool = False, keep: Sequence[str] = ()) -> _Table:
    """Finds the columns of a table. It may lack labels only if it is a test split, and one of `several` tables, or has columns to
    keep."""
    with naming(path), open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        line = file.readline(1 << 20)
    counts = Counter(letter for letter in line if letter in ",;\t|")
    usual = "\t" if path.suffix == ".tsv" else ","
    delimiter = usual if usual in counts or not counts else counts.most_common(1)[0][0]
    with _reading(path, delimiter) as rows:
        first: list[str] = next(rows, [])
        row: list[str] = next(rows, [])
    if len(first) > 1 and (path.parent / first[0]).is_file():  # path and label without a header
        return _Table(path, delimiter, tuple(first), False, 0, (1,), None, False)
    columns = tuple(name.strip() for name in first)
    names = [re.sub(r"[\s-]+", "_", name.lower()) for name in columns]
    row += [""] * (len(names) - len(row))
    split = _split_column(path, names, row)
    image = names.index(pick_column(path, "image paths", PATH_COLUMNS, names))
    possible = [names.index(name) for name in PATH_COLUMNS if name in names]
    if len(possible) > 1:
        image = next((at for at in possible if row[at] and find_base(path.parent, [row[at]], list_split(path.stem))), image)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names and names.index(name) not in (image, split)), None)
    kept = tuple(columns.index(name) for name in keep if name in columns)
    taken = {image, split, *kept}
    others = [at for at in range(len(names)) if at not in taken and names[at] not in ("", "index", "unnamed:_0")]
    labels: tuple[int, ...] = () if label is None else (label,)
    if label is None and len(others) == 1:
        labels = (others[0],)
    elif label is None and len(others) > 1:
        marks = [FLAGS.get(row[at].strip().lower()) for at in others]
        labels = tuple(others) if None not in marks and marks.count(True) == 1 else ()
    if not labels and not kept and not (several and split_role(list_split(path.stem)) == TEST):
        pick_column(path, "labels" if not several else "labels (one table alone may be given as RAW)", LABEL_COLUMNS, names)
    return _Table(path, delimiter, columns, True, image, labels, split, label is None and len(labels) == 1, kept)


def _split_column(path: Path, names: list[str], row: list[str]) -> int | None:
    """The split column, if there is one: `split`, a column whose first value names a split, or a flag column."""
    if SPLIT_COLUMN in names:
        return names.index(SPLIT_COLUMN)
    for at, name in enumerate(names):
        if name in OTHER_SPLIT_COLUMNS and split_role(row[at]):
            return at
    flags = [at for at, name in enumerate(names) if FLAG_COLUMN.fullmatch(name)]
    if len(flags) > 1:
        raise UserError(f"{path}: {' and '.join(names[at] for at in flags)} all give the split; give it in one column, split")
    return flags[0] if flags else None


@contextlib.contextmanager
def _reading(path: Path, delimiter: str) -> Iterator:
    """The csv.reader of a table. Raises UserError if the file is not a table."""
    try:
        with naming(path), open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            yield csv.reader(file, delimiter=delimiter)
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error}); save it as CSV in UTF-8") from None


@functools.lru_cache
def _split_folder(folder: str) -> str | None:
    return folder if split_role(folder) else None


def _split_reader(path: Path, column: str) -> Callable[[str, int], str]:
    """Returns a reader of split columns, whose values are names, or flags for the split in the column's name."""
    flag = FLAG_COLUMN.fullmatch(re.sub(r"[\s-]+", "_", column.lower()))

    def read(value: str, number: int) -> str:
        value = value.strip()
        if flag:
            said = FLAGS.get(value.lower())
            if said is None:
                raise UserError(f"{path}: line {number} has {value!r} in column {column}; write 1 or 0")
            trained = said == (split_role(flag[1]) == TRAIN)
            return TRAIN if trained else TEST if split_role(flag[1]) == TRAIN else flag[1]
        return value

    return read


def _open_or_none(path: Path) -> _Table | None:
    with contextlib.suppress(UserError):
        table = _open(path)
        next(table.rows(), None)
        return table
    return None


def _leads(root: Path, table: _Table) -> bool:
    """Whether the first row leads to a file."""
    first = next(table.rows(), None)
    return first is not None and find_base(root, [first[0]], list_split(table.path.stem)) is not None
