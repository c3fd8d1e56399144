"""Columns as they are stored and read."""

import numpy as np
import pytest

from imagefeed.dataset.columns import LISTS, NUMBERS, TEXT, Column, file_names
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file
from imagefeed.dataset.joined import open_datasets
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import Dataset

TEXTS = [f"№ {number}" * (number % 3) for number in range(50)]
ROWS = [list(range(number % 4)) for number in range(50)]
COLUMNS = {
    "weight": Column(NUMBERS, np.arange(50) / 4),
    "box": Column(NUMBERS, np.arange(100).reshape(50, 2)),
    "a.b/c %": Column.of_pieces(TEXT, [len(text.encode()) for text in TEXTS], np.frombuffer("".join(TEXTS).encode(), np.uint8)),
    "tags": Column.of_pieces(LISTS, map(len, ROWS), np.concatenate(ROWS).astype(np.int64)),
}


def store_columns(tiny_copy: Manifest) -> Manifest:
    for name, column in COLUMNS.items():
        tiny_copy.columns[name] = column.kind
        for split, records in (("train", 50), ("val", 23)):
            files = column.take(np.arange(records)).save(tiny_copy.root, split, name)
            tiny_copy.files.update({file: hash_file(tiny_copy.root / file) for file in files})
    tiny_copy.save()
    return Manifest.load(tiny_copy.root)


@pytest.fixture
def stored(tiny_copy) -> Manifest:
    return store_columns(tiny_copy)


def plain(values) -> list:
    return [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in values]


def test_a_dataset_gives_the_columns_of_its_images(stored):
    train = Dataset(stored.root, "train")
    assert train.columns == tuple(COLUMNS)
    for name, values in {
        "weight": np.arange(50) / 4,
        "box": np.arange(100).reshape(50, 2),
        "a.b/c %": TEXTS,
        "tags": ROWS,
    }.items():
        values = plain(values)
        column = train.column(name)
        assert (len(column), plain(column), plain(column[3:5])) == (50, values, values[3:5])
        assert plain(train[10:40:3].column(name)) == values[10:40:3]
        assert plain(train[::-1].column(name)) == values[::-1]
    assert not train.column("weight").flags.owndata and not train.column("weight").flags.writeable  # mapped
    with pytest.raises(IndexError):
        train.column("tags")[50]


def test_columns_of_several_datasets_follow_one_another(stored, tiny):
    both = open_datasets([stored.root, stored.root], "train")
    for name, column in COLUMNS.items():
        assert plain(both.load_column("train", name)) == plain(column) * 2
    with pytest.raises(UserError, match="no column 'tags'"):
        open_datasets([stored.root, tiny.root], "train").load_column("train", "tags")


def test_opening_reads_no_column(stored):
    for path in stored.root.glob("*.column.*"):
        path.unlink()
    assert len(Dataset(stored.root, "train")) == 50


def test_names_that_no_file_may_have_stay_apart():
    assert file_names("train", "a.b/c", NUMBERS) == ["train.column.a%2Eb%2Fc.npy"]
    names = ["a", "a.offsets", "a%2Eoffsets", "Ä b", "..", "a/b"]
    files = [file for name in names for file in file_names("train", name, TEXT)]
    assert len(set(files)) == 2 * len(names) and not any("/" in file for file in files)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"train.column.weight.npy": None}, "train.column.weight.npy: the file is missing; run build again"),
        ({"train.column.weight.npy": np.zeros(50)}, "train.column.weight.npy: its content is not what build wrote"),
        ({"train.column.weight.npy": np.zeros(49), "hash": 1}, "holds 49 records, the manifest says another"),
        ({"train.column.weight.npy": np.zeros(50, np.uint8), "hash": 1}, r"holds \(50,\) of uint8"),
        ({"train.column.tags.offsets.npy": np.zeros(51, np.int64), "hash": 1}, "tags.offsets.npy: has offsets outside of its"),
        ({"train.column.tags.offsets.npy": np.zeros(50, np.int64), "hash": 1}, r"has \(50,\) offsets of int64"),
    ],
)
def test_a_file_that_build_did_not_write_is_refused(damage, message, stored):
    (file, array), *hashed = damage.items()
    (stored.root / file).unlink()
    if array is not None:
        np.save(stored.root / file, array)
    if hashed:
        stored.files[file] = hash_file(stored.root / file)
        stored.save()
    with pytest.raises(UserError, match=message):
        Dataset(stored.root, "train").column(file.split(".")[2])


def test_an_unknown_column_is_one_sentence(stored, tiny):
    with pytest.raises(UserError, match="no column 'mass'; it has weight, box"):
        Dataset(stored, "val").column("mass")
    with pytest.raises(UserError, match="no column 'mass'; none was kept with build --columns"):
        Dataset(tiny, "val").column("mass")
