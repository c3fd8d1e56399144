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
    with pytest.raises(UserError, match="has a split column, split; leave out --split"):
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


def make(root, files: dict[str, str]):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def named(source) -> dict[str, dict[str, str]]:
    """The class of each image by split and path."""
    return {
        split: {path: source.classes[label] if label >= 0 else "" for path, label in zip(found.paths, found.labels)}
        for split, found in source.splits.items()
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.csv": "path,label\na,0.0\nb,11.0\nc,\nd,nan\n"}, {"train": {"a": "0", "b": "11", "c": "", "d": ""}}),
        ({"train.csv": "path,label\na,0\n", "test.csv": "path,label\nb,-1\n"}, {"train": {"a": "0"}, "test": {"b": ""}}),
        ({"train.csv": "path,label\na,0\n", "test.csv": "path\nb\n"}, {"train": {"a": "0"}, "test": {"b": ""}}),
        ({"train.csv": "path;label\na, b;cat\n"}, {"train": {"a, b": "cat"}}),
        ({"train.csv": "file name\tClass\na\tcat\n"}, {"train": {"a": "cat"}}),
        ({"t.csv": "img_id,breed,Set\na,pug,Training\nb,pug,valid\n"}, {"Training": {"a": "pug"}, "valid": {"b": "pug"}}),
        ({"t.csv": "path,label,is_train\na,x,1\nb,x,0\n"}, {"train": {"a": "x"}, "test": {"b": "x"}}),
        ({"t.csv": "path,label,is_valid\na,x,False\nb,x,True\n"}, {"train": {"a": "x"}, "valid": {"b": "x"}}),
        ({"train.csv": "image,Rust,Scab\na,1,0\nb,0.0,1.0\n"}, {"train": {"a": "Rust", "b": "Scab"}}),
        ({"train.csv": "path,mood\na,glad\n"}, {"train": {"a": "glad"}}),
        (  # Kaggle: ids without a suffix, a form to fill in, images of a folder named like a split
            {"labels.csv": "id,breed\na1,pug\nb2,boxer\n", "sample_submission.csv": "id,pug,boxer\nc,0.5,0.5\n"}
            | dict.fromkeys(("train/a1.jpg", "train/b2.jpg", "test/c.jpg"), "x"),
            {"train": {"train/a1.jpg": "pug", "train/b2.jpg": "boxer"}},
        ),
        (
            {"train.csv": "image_id,label\n7,1\n8,0\n", "test.csv": "image_id\n9\n"}
            | dict.fromkeys(("train_images/7.png", "train_images/8.png", "test_images/9.png"), "x"),
            {"train": {"train_images/7.png": "1", "train_images/8.png": "0"}, "test": {"test_images/9.png": ""}},
        ),
        (  # the same ids in two folders
            {"trainLabels.csv": "id,label\n1,frog\n2,truck\n"} | dict.fromkeys(("train/1.png", "train/2.png", "test/1.png"), "x"),
            {"train": {"train/1.png": "frog", "train/2.png": "truck"}},
        ),
        (
            {"labels.csv": "id,label\n1,frog\n2,truck\n"}
            | dict.fromkeys(("a/1.png", "b/1.png", "b/2.png", "b/train/x.png"), "x"),
            None,
        ),
        (  # the first of two possible columns that leads to files
            {"data.csv": "id,name,label\n0,x 1.jpg,cat\n1,x 2.jpg,dog\n"} | dict.fromkeys(("val/x 1.jpg", "val/x 2.jpg"), "x"),
            {"val": {"val/x 1.jpg": "cat", "val/x 2.jpg": "dog"}},
        ),
        (  # no header
            {"train.csv": "img/a.jpg,3\nimg/b.jpg,12\n"} | dict.fromkeys(("img/a.jpg", "img/b.jpg"), "x"),
            {"train": {"img/a.jpg": "3", "img/b.jpg": "12"}},
        ),
        (  # beside folders that say no splits
            {"data.csv": "path,label,split\nimg/cat/1.jpg,cat,train\nimg/dog/2.jpg,dog,train\nimg/dog/3.jpg,dog,test\n"}
            | dict.fromkeys(("img/cat/1.jpg", "img/dog/2.jpg", "img/dog/3.jpg"), "x"),
            {"train": {"img/cat/1.jpg": "cat", "img/dog/2.jpg": "dog"}, "test": {"img/dog/3.jpg": "dog"}},
        ),
    ],
)
def test_tables_in_the_forms_of_public_datasets(files, expected, tmp_path):
    source = find_images(make(tmp_path, files), "holdout" if expected is None else None)
    if expected is None:
        expected = {"holdout": {"b/1.png": "frog", "b/2.png": "truck"}}
    assert (source.layout, named(source)) == ("CSV", expected)


@pytest.mark.parametrize("name", ["data.csv", "val.csv"])
def test_a_table_beside_class_folders_is_mentioned(name, tmp_path):
    paths = ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")
    make(tmp_path, dict.fromkeys(paths, "x") | {name: "path,label\nval/cat/3.jpg,cat\nval/dog/4.jpg,dog\n"})
    source = find_images(tmp_path)
    assert source.layout == "folders" and source.num_images == 4
    assert source.decision.notes == (f"{name} is not read, because the folders name the classes; to read it, give it as RAW",)


def test_two_tables_of_the_same_images_are_refused(tmp_path):
    make(tmp_path, {"train.csv": "id,label\na,0\nb,1\n", "train_labels.csv": "id,kind\na,0\nb,1\n"})
    with pytest.raises(UserError, match="train_labels.csv: another table of split train has the same images; keep one"):
        find_images(tmp_path)


def test_images_of_a_table_that_are_not_found_are_counted(tmp_path):
    make(tmp_path, {"train.csv": "id,label\na,0\nb,1\nc,1\n", "img/a.jpg": "x", "img/c.jpg": "x"})
    source = find_images(tmp_path)
    assert source.splits["train"].paths == ["img/a.jpg", "img/b", "img/c.jpg"]
    assert source.decision.notes == ("1 image of the table not found, such as img/b",)


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("note,label\n", "train", "list.csv: no column of image paths, only note, label; call it one of path,"),
        ("path,kind,size\nx,y,3\n", "train", "list.csv: no column of labels, .* call it one of label, class"),
        ("", "train", "no column of image paths, only none"),
        ("path,label\n", "train", "the table has no rows"),
        ("path,a,b\nx,1,0\ny,1,1\n", "train", "line 3 has 2 classes marked with 1 in its one-hot columns; mark one"),
        ("path,a,b\nx,1,0\ny,2,1\n", "train", "line 3 has a value other than 0 or 1"),
        ("path,label\nx,0.5\n", "train", "list.csv: the label 0.5 is neither a whole number nor a name"),
        ("path,label,is_train,is_val\nx,y,1,0\n", None, "is_train and is_val all give the split; give it in one column, split"),
        ("path,label,is_train\nx,y,2\n", None, "line 2 has '2' in column is_train; write 1 or 0"),
        ("path,label,split\nx,y,1\nz,y,2\n", None, "none of 1, 2 is named like a training split; name the one"),
        ("path,label\nx,y\n", None, "has no splits; hold out validation images with"),
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
