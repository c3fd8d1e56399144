"""Names of splits are known in the forms in which public datasets write them, and names of classes are not taken for them."""

import pytest

from imagefeed.dataset.splits import evaluation_split, split_role, split_roles, training_split, whole_split

ROLES = {
    "train": "train training TRAIN Training train_images images_train seg_train train2017 trainset TrainSet train-data train.X1 "
    "ILSVRC2012_img_train trainval train_part2 train_256",
    "val": "val validation valid VAL Validation dev val2017 val.X val_images valset eval ILSVRC2012_img_val",
    "test": "test testing TEST Testing TEST_SIMPLE test1 seg_pred testset test_images test-dev2017",
}


@pytest.mark.parametrize(("name", "role"), [(name, role) for role, names in ROLES.items() for name in names.split()])
def test_a_split_is_known_by_its_name(name, role):
    assert split_role(name) == role


@pytest.mark.parametrize(
    "name",
    ["bullet train", "train station", "test tube", "trainer", "valley", "contest", "training shoe", "latest", "0", "images", ""],
)
def test_a_class_is_no_split(name):
    assert split_role(name) is None


def test_names_that_differ_by_the_split_alone_are_splits():
    assert split_roles(["asl_alphabet_train", "asl_alphabet_test", "readme"]) == {
        "asl_alphabet_train": "train",
        "asl_alphabet_test": "test",
    }
    assert split_roles(["bullet_train", "test_tube", "car"]) == {}


@pytest.mark.parametrize(
    ("name", "whole"),
    [("train.X1", "train"), ("val.X", "val"), ("train_part2", "train"), ("TRAIN-03", "TRAIN"), ("test1", "test")]
    + [(name, name) for name in ("train", "train2017", "train_images", "TEST_SIMPLE", "X1")],
)
def test_parts_name_their_split(name, whole):
    assert whole_split(name) == whole


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        (["Testing", "Training"], "Training", "Testing"),
        (["dev", "test", "train"], "train", "dev"),
        (["test", "train", "train_small", "validation"], "train", "validation"),
        (["train2014", "train2017", "val2014"], None, "val2014"),
        (["art", "photo"], None, None),
        (["TEST", "TEST_SIMPLE", "TRAIN"], "TRAIN", "TEST"),
    ],
)
def test_the_splits_to_train_and_to_evaluate_on_are_chosen_by_name_never_by_the_alphabet(names, train, evaluation):
    assert (training_split(names), evaluation_split(names)) == (train, evaluation)
