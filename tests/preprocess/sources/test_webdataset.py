"""WebDataset's shards: each image has the label of its key, and what else lies in them is no image and no damage."""

import json

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image
from tests.rawforms import make_tar


def write(root, shards: dict[str, dict[str, bytes]]):
    for name, members in shards.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make_tar(members))
    return root


def shard(labels: dict[str, object], kind: str = "cls", suffix: str = "jpg") -> dict[str, bytes]:
    """An image and a label for each key."""
    found = {}
    for key, label in labels.items():
        found[f"{key}.{suffix}"] = key.encode()
        found[f"{key}.{kind}"] = (json.dumps(label) if kind == "json" else str(label)).encode()
    return found


def labels(source) -> dict[str, dict[str, str]]:
    """The class of each image by split and content."""
    return {
        split: {
            read_image(source.root, image).decode(): source.classes[image.label] if image.label >= 0 else ""
            for image in source.images(split, range(len(found)))
        }
        for split, found in source.splits.items()
    }


ODDS = {"a.seg.png": b"no", "a.json": b'{"label": 7}', "b.jpg": b"b", "b.cls": b"0", "z.cls": b"3", "README.md": b"x"}
THREE = (shard({"a": 2}), shard({"b": 10, "c": 2}), shard({"d": 10}))
TRAIN = {"train": {"a": "2", "b": "10", "c": "2"}, "val": {"d": "10"}}


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        (dict(zip(("train-000000.tar", "train-000001.tar", "val-000000.tar"), THREE)), TRAIN),
        (dict(zip(("train/00000.tar", "train/00001.tar", "val/00000.tar"), THREE)), TRAIN),
        (dict(zip(("train-0-of-2.tar", "train-1-of-2.tar", "val-0-of-1.tar"), THREE)), TRAIN),
        ({"train.tar": shard({"a": 2, "b": 10, "c": 2}), "val.tar": shard({"d": 10})}, TRAIN),
        (
            {
                "train-0000.tar": shard(
                    {"a": {"label": 2, "class_name": "x"}, "b": {"cls": 10.0}, "c": {"label": "2"}}, "json", "PNG"
                ),
                "val-0000.tar": shard({"d": {"url": "https://", "label": 10}}, "json"),
            },
            TRAIN,
        ),
        (
            {"train-000.tar": shard({"a": 1, "b": 0}), "test-000.tar": {"c.jpg": b"c", "c.txt": b"a cat"}},
            {"train": {"a": "1", "b": "0"}, "test": {"c": ""}},
        ),
        (
            {"train-000.tar": shard({"a": 1, "b": 0}), "test-000.tar": shard({"c": -1, "d": ""})},
            {"train": {"a": "1", "b": "0"}, "test": {"c": "", "d": ""}},
        ),
        (
            {"imagenet1k-train-0000.tar": shard({"n01/x.1": "n01", "n02/x": "n02\n"})},
            {"imagenet1k-train": {"n01/x.1": "n01", "n02/x": "n02"}},
        ),
        ({"train-000.tar": shard({"a": 1}) | ODDS}, {"train": {"a": "1", "b": "0"}}),
    ],
)
def test_labels_are_those_of_the_keys(shards, expected, tmp_path):
    source = find_images(write(tmp_path, shards))
    assert (source.layout, labels(source)) == ("WebDataset", expected)
    assert list(source.classes) == sorted(
        {name for of in expected.values() for name in of.values()} - {""}, key=lambda n: (len(n), n)
    )


def test_members_that_are_no_images_are_counted(tmp_path):
    source = find_images(
        write(tmp_path, {"train-000.tar": shard({"a": 1, "b": 0}) | {"a.txt": b"a cat", "b.txt": b"", "a.json": b"{}"}})
    )
    assert source.num_images == 2 and source.decision.skipped == {".txt": 2, ".json": 1}


def test_labels_without_an_image_are_noted(tmp_path):
    source = find_images(
        write(tmp_path, {"train-000.tar": shard({"a": 1, "b": 0}) | {"x/c.cls": b"7", "d.json": b'{"label": 8}'}})
    )
    assert source.classes == ("0", "1")
    assert source.decision.notes == ("2 labels without an image left out, such as that of train-000.tar/x/c",)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            {"train-000.tar": shard({"a": 1}) | {"b.jpg": b"b"}},
            r"1 of 2 images of train have no label .* such as train-000.tar/b.jpg",
        ),
        ({"train-000.tar": shard({"a": 1}), "train-001.tar": {"b.jpg": b"b"}}, "1 of 2 images of train have no label"),
        ({"train-000.tar": shard({"a": 1}) | {"a.png": b"b"}}, "a.jpg and a.png share one label; keep one image for each key"),
        ({"train-000.tar": shard({"a": 0.5, "b": 1})}, "the label 0.5 is neither a whole number nor a name"),
        ({"00000.tar": shard({"a": 1})}, "has no splits"),
        ({"00000.tar": {"a.jpg": b"a", "a.txt": b"a cat", "a.json": b"{}"}}, "a .json or .txt beside each image, but no label"),
    ],
)
def test_wrong_shards_are_refused(shards, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find_images(write(tmp_path, shards))
