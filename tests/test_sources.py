"""What is found in raw trees, and what is said of odd ones."""

import os

import pytest
from rawtree import CLASSES, make_raw_tree

from preprocess.errors import UserError
from preprocess.sources import find_images, read_image


def test_splits_and_sorted_labels_are_found(tmp_path):
    make_raw_tree(tmp_path, {"train": 3, "val": 2})
    source = find_images(tmp_path)
    assert source.classes == CLASSES
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 9, "val": 6}
    assert source.splits["val"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.splits["val"].paths[2] == f"val/{CLASSES[1]}/{CLASSES[1]}_0.JPEG"


def test_a_class_absent_from_a_split_keeps_the_labels_of_the_others(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    make_raw_tree(tmp_path / "more", {"val": 1}, CLASSES[2:])
    os.rename(tmp_path / "more" / "val", tmp_path / "val")
    (tmp_path / "more").rmdir()
    assert find_images(tmp_path).splits["val"].labels.tolist() == [2]


def test_one_split_is_named_by_option(tmp_path):
    make_raw_tree(tmp_path, {"train": 2})
    source = find_images(tmp_path / "train", "holdout")
    assert list(source.splits) == ["holdout"]
    assert source.splits["holdout"].paths[0].startswith(CLASSES[0])
    with pytest.raises(UserError, match="--split train"):
        find_images(tmp_path / "train")


def test_links_are_followed_and_loops_end(tmp_path):
    make_raw_tree(tmp_path / "real", {"train": 2})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "real" / "train" / CLASSES[0] / "loop").symlink_to(tmp_path / "real" / "train" / CLASSES[0])
    source = find_images(tmp_path / "raw")
    assert len(source.splits["train"].paths) == 6
    image = source.images("train", [0])[0]
    assert read_image(source.root, image)[:2] == b"\xff\xd8"


def test_images_in_folders_of_a_class_belong_to_the_class(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    (tmp_path / "train" / CLASSES[1] / "images").mkdir()
    (tmp_path / "train" / CLASSES[1] / "images" / "x.JPEG").write_bytes(b"x")
    source = find_images(tmp_path)
    assert source.splits["train"].labels.tolist() == [0, 1, 1, 2]


def test_hidden_files_are_no_images_and_dangling_links_are_listed(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    (tmp_path / "train" / CLASSES[0] / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / CLASSES[0] / "gone.JPEG").symlink_to(tmp_path / "nowhere")
    assert [path.rsplit("/", 1)[1] for path in find_images(tmp_path).splits["train"].paths[:2]] == [
        "gone.JPEG",
        f"{CLASSES[0]}_0.JPEG",
    ]


def test_the_fingerprint_changes_with_names_and_labels(tmp_path):
    make_raw_tree(tmp_path, {"train": 2})
    before = find_images(tmp_path).fingerprint()
    assert find_images(tmp_path).fingerprint() == before
    folder = tmp_path / "train" / CLASSES[0]
    os.rename(folder / f"{CLASSES[0]}_0.JPEG", folder / "renamed.JPEG")
    assert find_images(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root.rmdir(), "there is no such folder"),
        (lambda root: None, "no folders in it"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "the class has no images"),
        (lambda root: (root.rmdir(), root.write_text("")), "not a folder"),
    ],
)
def test_an_odd_tree_is_one_sentence(tmp_path, prepare, message):
    root = tmp_path / "raw"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=message):
        find_images(root)
