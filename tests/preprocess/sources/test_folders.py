"""Trees of folders, including Kaggle's: their images and labels, and the refusals of wrong ones."""

import os
import shutil

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image
from tests import rawforms
from tests.rawtree import make_raw_tree


@pytest.fixture(scope="module")
def images():
    return rawforms.make_images()


def test_splits_and_sorted_labels_are_found(tmp_path):
    classes = ("n01440764", "n02084071", "n04037443")
    make_raw_tree(tmp_path, {"train": 3, "val": 2})
    source = find_images(tmp_path)
    assert source.classes == classes
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 9, "val": 6}
    assert source.splits["val"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.splits["val"].paths[2] == f"val/{classes[1]}/{classes[1]}_0.JPEG"


def test_a_class_absent_from_a_split_keeps_the_labels_of_the_others(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    make_raw_tree(tmp_path / "more", {"val": 1}, ("n04037443",))
    os.rename(tmp_path / "more" / "val", tmp_path / "val")
    (tmp_path / "more").rmdir()
    assert find_images(tmp_path).splits["val"].labels.tolist() == [2]


def test_an_option_names_the_only_split(tmp_path):
    make_raw_tree(tmp_path, {"train": 2})
    source = find_images(tmp_path / "train", "holdout")
    assert list(source.splits) == ["holdout"]
    assert source.splits["holdout"].paths[0].startswith("n01440764")
    with pytest.raises(UserError, match="split=train"):
        find_images(tmp_path / "train")


def test_links_are_followed_and_loops_end(tmp_path):
    make_raw_tree(tmp_path / "real", {"train": 2})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train").symlink_to(tmp_path / "real" / "train")
    (tmp_path / "real" / "train" / "n01440764" / "loop").symlink_to(tmp_path / "real" / "train" / "n01440764")
    source = find_images(tmp_path / "raw")
    assert len(source.splits["train"].paths) == 6
    image = source.images("train", [0])[0]
    assert read_image(source.root, image)[:2] == b"\xff\xd8"


def test_images_in_subfolders_belong_to_the_class(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    (tmp_path / "train" / "n02084071" / "images").mkdir()
    (tmp_path / "train" / "n02084071" / "images" / "x.JPEG").write_bytes(b"x")
    source = find_images(tmp_path)
    assert source.splits["train"].labels.tolist() == [0, 1, 1, 2]


def test_hidden_files_are_left_out_and_dangling_links_are_listed(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    (tmp_path / "train" / "n01440764" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "n01440764" / "gone.JPEG").symlink_to(tmp_path / "nowhere")
    assert [path.rsplit("/", 1)[1] for path in find_images(tmp_path).splits["train"].paths[:2]] == [
        "gone.JPEG",
        "n01440764_0.JPEG",
    ]


def test_the_fingerprint_changes_with_names_and_labels(tmp_path):
    make_raw_tree(tmp_path, {"train": 2})
    before = find_images(tmp_path).fingerprint()
    assert find_images(tmp_path).fingerprint() == before
    folder = tmp_path / "train" / "n01440764"
    os.rename(folder / "n01440764_0.JPEG", folder / "renamed.JPEG")
    assert find_images(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root.rmdir(), "no such folder"),
        (lambda root: None, "no folders in it"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "the class has no images"),
        (lambda root: (root.rmdir(), root.write_text("")), "not a folder"),
    ],
)
def test_a_wrong_tree_is_refused(tmp_path, prepare, message):
    root = tmp_path / "raw"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=message):
        find_images(root)


def test_kaggles_inner_folder_may_be_given_and_its_validation_images_may_be_in_class_folders(images, tmp_path):
    raw = rawforms.write_kaggle(tmp_path / "raw", images)
    data = raw / "ILSVRC" / "Data" / "CLS-LOC"
    whole = find_images(raw)
    assert find_images(data, layout="kaggle").splits["val"].labels.tolist() == whole.splits["val"].labels.tolist()
    assert find_images(data).layout == "Kaggle's ImageNet"
    shutil.rmtree(data / "val")
    rawforms.write_folders(data, {"val": images["val"]})
    assert sorted(find_images(raw).splits["val"].labels.tolist()) == sorted(whole.splits["val"].labels.tolist())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda raw, data: (raw / "LOC_val_solution.csv").unlink(),
            "LOC_val_solution.csv, which has the labels of split val, is missing",
        ),
        (lambda raw, data: (data / "val" / "x.JPEG").write_bytes(b""), "val/x.JPEG is not in it"),
        (lambda raw, data: (data / "train" / "n09999999").mkdir(), "n09999999 is not a class of LOC_synset_mapping.txt"),
        (lambda raw, data: shutil.rmtree(data), "no folder train, val or test"),
    ],
)
def test_a_wrong_kaggle_tree_is_refused(damage, message, images, tmp_path):
    raw = rawforms.write_kaggle(tmp_path / "raw", images)
    damage(raw, raw / "ILSVRC" / "Data" / "CLS-LOC")
    with pytest.raises(UserError, match=message):
        find_images(raw)


def test_links_to_themselves_and_upwards_end(tmp_path):
    """A link to itself is listed, so that it is rejected by name; one that leads up adds no images of other classes."""
    make_raw_tree(tmp_path, {"train": 1})
    folder = tmp_path / "train" / "n01440764"
    (folder / "self").symlink_to("self")
    (folder / "up").symlink_to("..")
    (folder / "top").symlink_to(tmp_path)
    paths = find_images(tmp_path).splits["train"].paths
    assert [path for path in paths if "n01440764" in path] == ["train/n01440764/n01440764_0.JPEG", "train/n01440764/self"]
    assert len(paths) == 4
