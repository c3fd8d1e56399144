"""Values of further columns, as tables, Parquet files and WebDataset's shards spell them."""

import json
import math
from datetime import date
from decimal import Decimal

import numpy as np
import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.columns import describe, make_column
from imagefeed.preprocess.sources.detect import find_images
from tests.rawforms import make_tar

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["1", "-2", " 3 "], "whole numbers", [1, -2, 3]),
        (["1", "2.5", "", "nan", None], "numbers, 3 missing", [1, 2.5, NAN, NAN, NAN]),
        (["1.0", "2"], "numbers", [1.0, 2.0]),
        ([1.0, 2.0], "numbers", [1.0, 2.0]),
        (["1e3", ".5", "+2."], "numbers", [1000, 0.5, 2]),
        ([True, False, None], "numbers, 1 missing", [1, 0, NAN]),
        ([Decimal("1.5"), 2, NAN], "numbers, 1 missing", [1.5, 2, NAN]),
        (["007", "8"], "text", ["007", "8"]),
        (["1_000", "2"], "text", ["1_000", "2"]),
        (["a b", " nan", None, ""], "text", ["a b", " nan", "", ""]),
        (["3,14", "2"], "text", ["3,14", "2"]),
        (["9223372036854775807"], "whole numbers", [2**63 - 1]),
        (["9223372036854775808"], "text", [str(2**63)]),
        (["9007199254740993", ""], "text", ["9007199254740993", ""]),  # as float64 it would be another number
        (["1 2", "3", ""], "lists of whole numbers", [[1, 2], [3], []]),
        (["[1, 2.5]", "[]", "3;4;5"], "lists of numbers", [[1, 2.5], [], [3, 4, 5]]),
        (["1 2", "3|4"], "2 whole numbers each", [[1, 2], [3, 4]]),
        ([[1, 2], [3, None]], "2 numbers each", [[1, 2], [3, NAN]]),
        ([(1,), None], "lists of whole numbers", [[1], []]),
        ([["a"], [1, 2]], "text", ['["a"]', "[1, 2]"]),
        ([[[1, 2]], [[3, 4]]], "text", ["[[1, 2]]", "[[3, 4]]"]),
        ([{"é": 1}, 5, "x", b"y"], "text", ['{"é": 1}', "5", "x", "y"]),
        ([date(2026, 1, 2), None], "text", ["2026-01-02", ""]),
        ([None, None], "text", ["", ""]),
    ],
)
def test_kinds_of_values(values, kind, expected):
    column = make_column(values)
    assert describe(column) == kind
    found = [each if isinstance(each, str) else each.tolist() for each in column]
    assert found == expected or np.array_equal(found, expected, equal_nan=True)


def values_of(source, split="train") -> dict[str, list]:
    columns = source.splits[split].columns
    return {name: [each if isinstance(each, str) else each.tolist() for each in column] for name, column in columns.items()}


def test_columns_of_tables(tmp_path):
    (tmp_path / "train.csv").write_text("path,label,Weight,caption\na,x,1,one\nb,y,2\n")
    (tmp_path / "val.csv").write_text("path,label,caption\nc,x,three\nd,y,\n")
    source = find_images(tmp_path, columns=("caption", "Weight"))
    assert values_of(source) == {"caption": ["one", ""], "Weight": [1, 2]}
    assert source.splits["val"].columns["caption"][0] == "three" and math.isnan(source.splits["val"].columns["Weight"][0])
    assert source.decision.notes == ("column caption is kept: text", "column Weight is kept: numbers, 2 missing")
    assert source.options == {"columns": ["caption", "Weight"]}


def test_a_table_of_columns_alone_has_unknown_classes(tmp_path):
    """A table without a label column, and one whose label column holds several labels."""
    (tmp_path / "train.csv").write_text("path,caption\na,one\nb,two\n")
    source = find_images(tmp_path, columns=("caption",))
    assert (source.classes, source.splits["train"].labels.tolist()) == ((), [-1, -1])
    (tmp_path / "train.csv").write_text("path,labels\na,3\nb,3 5\n")
    source = find_images(tmp_path, columns=("labels",))
    assert source.splits["train"].labels.tolist() == [-1, -1] and values_of(source) == {"labels": [[3], [3, 5]]}
    assert "labels of train.csv has several labels in a row, so classes are unknown" in source.decision.notes
    (tmp_path / "train.csv").write_text("path,label,caption\na,x,one\nb,y,two\n")
    assert find_images(tmp_path, columns=("label", "caption")).classes == ("x", "y")


def test_held_out_images_keep_their_values(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,n\n" + "".join(f"{n},x,{n}\n" for n in range(20)))
    source = find_images(tmp_path, columns=("n",), validation_fraction=0.3)
    for split in source.splits.values():
        assert [str(n) for n in split.columns["n"].values] == split.paths


def test_columns_of_shards(tmp_path):
    train = {"a.jpg": b"a", "a.cls": b"0", "a.json": json.dumps({"w": 1.5, "t": [1]}).encode(), "a.caption": "ä b".encode()}
    train |= {"b.jpg": b"b", "b.cls": b"1", "b.json": b'{"t": [2, 3], "x": 0}'}
    (tmp_path / "train-000.tar").write_bytes(make_tar(train))
    (tmp_path / "test-000.tar").write_bytes(make_tar({"c.jpg": b"c", "c.caption": b"c"}))
    source = find_images(tmp_path, columns=("w", "t", "caption"))
    found = values_of(source)
    assert (found["t"], found["caption"], found["w"][0]) == ([[1], [2, 3]], ["ä b", ""], 1.5) and math.isnan(found["w"][1])
    assert values_of(source, "test")["caption"] == ["c"] and source.splits["test"].labels.tolist() == [-1]
    assert source.classes == ("0", "1") and source.num_images == 3


def test_columns_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, rows in {"train-00000-of-00002": (0, 1, 2), "train-00001-of-00002": (3, 4), "test-00000-of-00001": (5,)}.items():
        columns = {"image": [b"x"] * len(rows), "label": [n % 2 for n in rows], "tags": [list(range(n)) for n in rows]}
        columns |= {"caption": pyarrow.array([None if n == 1 else f"№ {n}" for n in rows], pyarrow.large_string())}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    source = find_images(tmp_path, columns=("caption", "tags"))
    assert values_of(source) == {"caption": ["№ 0", "", "№ 2", "№ 3", "№ 4"], "tags": [list(range(n)) for n in range(5)]}
    assert values_of(source, "test") == {"caption": ["№ 5"], "tags": [[0, 1, 2, 3, 4]]}
    table = parquet.read_table(tmp_path / "test-00000-of-00001.parquet").drop_columns(["label"])
    parquet.write_table(table.rename_columns(["image", "label", "caption"]), tmp_path / "test-00000-of-00001.parquet")
    source = find_images(tmp_path / "test-00000-of-00001.parquet", "train", columns=("label",))
    assert source.classes == () and values_of(source)["label"] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("files", "columns", "message"),
    [
        ({"train.csv": "path,label,w\na,x,1\n"}, ["W"], "no column 'W', as columns asks for; there are path, label, w"),
        ({"train.csv": "a.jpg,x\n", "a.jpg": ""}, ["w"], "no column 'w', as columns asks for; there are none with a name"),
        ({"train/x/a.jpg": "", "train/y/b.jpg": ""}, ["w"], "read as folders, which has no columns; columns is for tables"),
        ({"train.csv": "path,label,w\na,x,\udcff\n"}, ["w"], "column w has text that is not UTF-8; convert the file to UTF-8"),
        ({"train.csv": "path,label,w\na.mp4,x,1\nb.jpg,x,2\n"}, ["w"], "a.mp4 is a video, and columns is for images only"),
        ({"train.csv": f"path,label,{'w' * 250}\na,x,1\n"}, ["w" * 250], "column 'w+' is too long or empty for a file"),
        ({"train-000.tar": {"a.jpg": "a", "a.cls": "0", "a.json": '{"u": 1}'}}, ["w"], "no column 'w', .* there are json, u$"),
        ({"train-000.tar": {"a.jpg": "a", "a.cls": "0", "a.json": "{"}}, ["w"], "a.json is not readable as JSON, which columns"),
        ({"train-000.tar": {"a.jpg": "a", "a.cls": "0", "a.w": "x" * 70000}}, ["w"], "a.w has more than 65,536 bytes, too many"),
        ({"train.csv": "path,label,w\na,x,1\n"}, "w", "columns is 'w'; give a list of names of columns"),
    ],
)
def test_columns_that_cannot_be_kept_are_one_sentence(files, columns, message, tmp_path):
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            (tmp_path / path).write_bytes(make_tar({name: text.encode() for name, text in content.items()}))
        else:
            (tmp_path / path).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        find_images(tmp_path, columns=columns)
