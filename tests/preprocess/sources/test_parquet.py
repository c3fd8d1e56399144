"""Parquet files as dataset hubs ship them, and other tables of images and labels."""

import builtins
import os
from decimal import Decimal

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import decode_example
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image
from imagefeed.preprocess.sources.spool import unpack
from tests import rawforms
from tests.frames import read_frames
from tests.rawtree import jpeg

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

DATA = [jpeg(40, 50, seed) for seed in range(6)]


def write(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def unpacked(root, folder, **more) -> dict[str, dict[str, int]]:
    source = unpack(find_images(root, **more), folder, ProcessRunner(1))
    assert not source.packed
    return {split: dict(zip(found.paths, found.labels.tolist())) for split, found in source.splits.items()}


def test_places_in_the_spool_are_those_of_the_images(tmp_path):
    images = rawforms.make_images()
    source = find_images(rawforms.write_parquet(tmp_path / "raw", images))
    assert [(packed.split, packed.num_images) for packed in source.packed] == [
        ("train", 10), ("train", 10), ("validation", 6), ("validation", 6)
    ]  # fmt: skip
    source = unpack(source, tmp_path / "spool", ProcessRunner(2))
    validation = rawforms.flat(images["val"])
    for image in source.images("validation", range(12)):
        of, data = validation[image.path.rpartition("/")[2]]
        with open(image.file, "rb") as file:
            file.seek(image.offset)
            assert file.read(image.size) == data
        assert image.label == rawforms.CLASSES.index(of)
    assert source.images("train", [0])[0].path == "data/train-00000-of-00002.parquet/n01440764_12.JPEG"


def test_wordnet_ids_are_sorted_and_other_names_keep_the_order_of_the_files(tmp_path):
    images = rawforms.make_images(["train"])
    shuffled = rawforms.CLASSES[::-1]
    source = find_images(rawforms.write_parquet(tmp_path / "ids", images, shuffled))
    assert source.classes == rawforms.CLASSES and source.decision.splits["train"].classes == len(rawforms.CLASSES)
    found = unpacked(tmp_path / "ids", tmp_path / "spool")["train"]
    for path, label in found.items():
        assert rawforms.CLASSES[label] == path.rpartition("/")[2].split("_")[0]
    names = ("tench", "goldfish", "great white shark", "hammerhead")
    images = {"train": {name: found for name, found in zip(names, images["train"].values())}}
    assert find_images(rawforms.write_parquet(tmp_path / "names", images, names)).classes == names


def test_plain_columns_of_bytes_and_of_names_or_numbers(tmp_path):
    write(tmp_path / "names" / "train.parquet", {"image": DATA, "label": ["dog", "cat", "dog", None, "", "cat"]})
    assert find_images(tmp_path / "names").classes == ("cat", "dog")
    found = unpacked(tmp_path / "names", tmp_path / "spool1")
    assert list(found["train"].values()) == [1, 0, 1, -1, -1, 0]
    assert list(found["train"])[:2] == ["train.parquet#000001", "train.parquet#000002"]
    write(tmp_path / "numbers" / "val" / "0000.parquet", {"image": DATA, "label": [100, 9, -1, 100, 10, 9]})
    assert find_images(tmp_path / "numbers").classes == ("9", "10", "100")
    assert list(unpacked(tmp_path / "numbers", tmp_path / "spool2")["val"].values()) == [2, 0, -1, 2, 1, 0]


def opaque(values):
    return pyarrow.ExtensionArray.from_storage(pyarrow.opaque(pyarrow.binary(), "image", "test"), pyarrow.array(values))


@pytest.mark.parametrize(
    "images",
    [
        pyarrow.array(DATA, pyarrow.binary_view()),
        pyarrow.array(DATA, pyarrow.large_binary()),
        pyarrow.array(DATA).dictionary_encode(),
        opaque(DATA),
        pyarrow.StructArray.from_arrays([pyarrow.array(DATA, pyarrow.binary_view())], ["bytes"]),
    ],
    ids=lambda images: str(images.type)[:20],
)
def test_images_are_found_in_columns_of_any_type_that_stores_bytes(images, tmp_path):
    write(tmp_path / "train.parquet", {"cls": [b"cat", b"dog"] * 3, "photo": images})
    source = unpack(find_images(tmp_path), tmp_path / "spool", ProcessRunner(1))
    assert (source.classes, source.splits["train"].labels.tolist()) == (("cat", "dog"), [0, 1] * 3)
    assert [read_image(source.root, image) for image in source.images("train", range(6))] == DATA


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([10.0, 9.0, float("nan"), None, -1.0, 100.0], ("9", "10", "100"), [1, 0, -1, -1, -1, 2]),
        ([b"cat", b"dog", b"", None, b"ant", b"cat"], ("ant", "cat", "dog"), [1, 2, -1, -1, 0, 1]),
        ([True, False, None, True, True, False], ("False", "True"), [1, 0, -1, 1, 1, 0]),
        ([Decimal(2), Decimal(1), None, Decimal(2), Decimal(2), Decimal(1)], ("1", "2"), [1, 0, -1, 1, 1, 0]),
        (pyarrow.array(["b", "a", None, "b", "b", "a"]).dictionary_encode(), ("a", "b"), [1, 0, -1, 1, 1, 0]),
    ],
)
def test_labels_of_any_type_that_stands_for_numbers_or_names(labels, classes, expected, tmp_path):
    write(tmp_path / "train.parquet", {"image": DATA, "label": labels})
    source = find_images(tmp_path)
    assert source.classes == classes
    decided = source.decision.splits["train"]
    assert decided.labeled == sum(label >= 0 for label in expected) and decided.classes == len({*expected} - {-1})
    assert unpack(source, tmp_path / "spool", ProcessRunner(1)).splits["train"].labels.tolist() == expected


def test_integers_in_one_file_and_floats_in_another_are_the_same_classes(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", {"image": DATA[:3], "label": [0, 1, 1]})
    write(tmp_path / "train-00001-of-00002.parquet", {"image": DATA[3:], "label": ["1", "0", None]})
    write(tmp_path / "test-00000-of-00001.parquet", {"image": DATA[:2], "label": [-1, -1]})
    source = find_images(tmp_path)
    assert source.classes == ("0", "1") and source.decision.splits["test"].labeled == 0
    assert unpack(source, tmp_path / "spool", ProcessRunner(1)).splits["train"].labels.tolist() == [0, 1, 1, 1, 0, -1]


def test_a_test_split_without_labels_and_an_image_that_is_missing(tmp_path):
    write(tmp_path / "raw" / "train-00000-of-00001.parquet", {"image": [*DATA[:3], None], "label": ["a", "b", "a", "a"]})
    write(tmp_path / "raw" / "test-00000-of-00001.parquet", {"image": DATA[3:]})
    out = tmp_path / "out"
    manifest = build_dataset(find_images(tmp_path / "raw"), out, ImageOptions(size=16), 0, ProcessRunner(1), 0.5)
    assert manifest.split("test").counts == (0, 0) and manifest.split("test").records == 3
    assert manifest.split("train").counts == (2, 1)
    assert "train-00000-of-00001.parquet#000004" in (out / "rejected.jsonl").read_text()
    shard = (out / manifest.split("test").shards[0].name).read_bytes()
    assert {decode_example(payload).label for _, payload in read_frames(memoryview(shard))} == {-1}


def test_a_file_without_rows_among_others(tmp_path):
    write(tmp_path / "raw" / "train-00000-of-00002.parquet", {"image": DATA, "label": ["a", "b"] * 3})
    nothing = {"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.string())}
    write(tmp_path / "raw" / "train-00001-of-00002.parquet", nothing)
    assert len(unpacked(tmp_path / "raw", tmp_path / "spool")["train"]) == 6


def test_files_of_several_splits_are_never_joined_to_one(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", {"image": DATA[:1], "label": ["a"]})
    with pytest.raises(UserError, match="already has splits, test, train; leave out"):
        find_images(tmp_path, "train")


def test_a_single_file_may_be_given_and_an_option_names_its_split(tmp_path):
    write(tmp_path / "some.parquet", {"image": DATA, "label": [0, 1] * 3})
    with pytest.raises(UserError, match="some.parquet: its name tells no split"):
        find_images(tmp_path)
    assert find_images(tmp_path / "some.parquet", "train").count("train") == 6


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: write(path, {"text": ["x"], "label": [0]}), "no image column .bytes and path., only text, label"),
        (lambda path: write(path, {"image": [b"x"], "kind": [0]}), "no column of labels, only image, kind; call it one of label"),
        (
            lambda path: write(path, {"image": [b"x"], "label": [0.5]}),
            "train.parquet: column label: the label 0.5 is neither a whole number",
        ),
        (lambda path: write(path, {"image": [b"x"], "label": [[0, 1]]}), "column label holds list<.*>, not one integer or name"),
        (lambda path: write(path, {"image": [b"x"], "label": [None]}), "column label is empty in every row; add labels"),
        (
            lambda path: write(path, {"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())}),
            "no rows",
        ),
        (lambda path: path.write_bytes(b"PAR1" * 10), "not readable as Parquet"),
        (lambda path: path.write_bytes(b""), "not readable as Parquet"),
        (lambda path: (write(path, {"image": DATA, "label": [0] * 6}), os.truncate(path, 3000)), "not readable as Parquet"),
    ],
)
def test_wrong_files_are_refused(prepare, message, tmp_path):
    prepare(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_corruption_inside_a_file_and_labels_beyond_the_names_are_refused(tmp_path):
    images = {"train": {"a": {"1": DATA[0]}, "b": {"2": DATA[1]}}}
    raw = rawforms.write_parquet(tmp_path / "raw", images, ("a", "b"), files=1)
    path = raw / "data" / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(UserError, match="train-00000-of-00001.parquet: not readable as Parquet"):
        unpack(find_images(raw), tmp_path / "spool", ProcessRunner(1))
    assert [file.suffix for file in (tmp_path / "spool").iterdir()] == []
    schema = parquet.read_schema(rawforms.write_parquet(tmp_path / "good", images, ("a", "b"), files=1) / path.relative_to(raw))
    table = pyarrow.Table.from_pylist([{"image": {"bytes": DATA[0], "path": "x"}, "label": 2}], schema)
    parquet.write_table(table, path)
    with pytest.raises(UserError, match="row 1 has label 2, but there are 2 classes"):
        unpack(find_images(raw), tmp_path / "spool", ProcessRunner(1))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", {"image": DATA, "label": [0] * 6})
    original = builtins.__import__

    def without(name, *arguments, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"Parquet files need pyarrow, .* pip install '.\[parquet\]'"):
        find_images(tmp_path)
