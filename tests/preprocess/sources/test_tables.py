"""Tables of paths and labels, and the refusals of incomplete ones."""

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image
from tests.rawtree import jpeg


def labels(source):
    return {split: dict(zip(found.paths, found.labels.tolist())) for split, found in source.splits.items()}


def test_a_table_with_a_column_of_splits(tmp_path):
    (tmp_path / "list.csv").write_text(
        '\ufeffID,Image, Label ,split\r\n1,a/x.jpg,dog,train\r\n2,"a, b.jpg",cat,train\r\n\r\n3,../y.jpg,,val\r\n', "utf-8"
    )
    source = find_images(tmp_path / "list.csv")
    assert (source.layout, source.classes, source.root) == ("CSV", ("cat", "dog"), tmp_path)
    assert labels(source) == {"train": {"a/x.jpg": 1, "a, b.jpg": 0}, "val": {"../y.jpg": -1}}
    assert labels(find_images(tmp_path)) == labels(source)
    with pytest.raises(UserError, match="has a column split; leave out --split"):
        find_images(tmp_path, "train")


def test_numeric_labels_are_sorted_by_value(tmp_path):
    (tmp_path / "train.csv").write_text("path,label\na,10\nb,9\nc,100\nd,9\n")
    source = find_images(tmp_path)
    assert source.classes == ("9", "10", "100")
    assert labels(source)["train"] == {"a": 1, "b": 0, "c": 2, "d": 0}


def test_labels_that_are_only_partly_numbers_are_sorted_as_names(tmp_path):
    (tmp_path / "train.tsv").write_text("path\tlabel\na\t10\nb\t9\nc\tcat\n")
    assert find_images(tmp_path).classes == ("10", "9", "cat")


def test_classes_come_from_all_tables(tmp_path):
    (tmp_path / "train.csv").write_text("file,class\na,dog\nc,cat\n")
    (tmp_path / "val.csv").write_text("file,class\nb,cat\n")
    (tmp_path / "notes.csv").write_text("anything\n")
    assert labels(find_images(tmp_path)) == {"train": {"a": 1, "c": 0}, "val": {"b": 0}}


def test_paths_are_relative_to_the_table_and_may_lead_out_of_its_folder(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "x.jpg").write_bytes(jpeg(20, 30, 1))
    (tmp_path / "tables" / "train.csv").write_text(f"path,label\n../x.jpg,a\n{tmp_path}/x.jpg,a\n")
    source = find_images(tmp_path / "tables")
    for image in source.images("train", [0, 1]):
        assert read_image(source.root, image) == jpeg(20, 30, 1)


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("note,label\n", "train", "list.csv: no column of image paths, only note, label; call it one of path,"),
        ("path,kind,size\nx,y,3\n", "train", "list.csv: no column of labels, .* call it one of label, class"),
        ("", "train", "no column of image paths, only none"),
        ("path,label\n", "train", "the table has no rows"),
        ("path,label\nx,y\n", None, "does not name its split; name it, as in split=train"),
        ("path,label\nx,y\nz\n", "train", "line 3 has no path or too few columns"),
        ("path,label\nx,y\n,y\n", "train", "line 3 has no path"),
        ("path,label\nx," + "y" * 200_000 + "\n", "train", "not readable as a table"),
    ],
)
def test_a_wrong_table_is_refused(text, split, message, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path / "list.csv", split)


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(UserError, match="no .csv file in it"):
        find_images(tmp_path, layout="csv")
