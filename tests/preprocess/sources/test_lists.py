"""Labels from lists: the forms in which public datasets ship them, and the refusals of lists that do not fit their images."""

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.detect import find_images

WNIDS = ("n01440764", "n01443537", "n01484850")


def make(root, files: dict[str, str]):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def images(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, "x")


def labels(source) -> dict[str, dict[str, str]]:
    """The class of each image by split and by the end of its path."""
    return {
        split: {
            path.rpartition("/")[2]: source.classes[label] if label >= 0 else "" for path, label in zip(found.paths, found.labels)
        }
        for split, found in source.splits.items()
    }


TRAIN = images(*(f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(2)))
VAL = [f"v{number}.JPEG" for number in range(3)]
FLAT = TRAIN | images(*(f"val/{name}" for name in VAL))
OF_VAL = dict(zip(VAL, (WNIDS[2], WNIDS[0], WNIDS[1])))
BOXES = "\t0\t0\t44\t41"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 1\n"),
        ("val_map.txt", "v2.JPEG 1\r\nv1.JPEG 0\r\nv0.JPEG 2\r\n\r\n"),
        ("val.txt", "# made by a script\nval/v0.JPEG\t2\n./val/v1.JPEG\t0\n/data/imagenet/val/v2.JPEG\t1\n"),
        ("val/labels.txt", "v0 n01484850\nv1 n01440764\nv2 n01443537\n"),
        ("val.txt", "v0.JPEG,n01484850\nv1.JPEG,n01440764\nv2.JPEG,n01443537\n"),
        ("meta/val.txt", "v0.JPEG 2.0\nv1.JPEG 0.0\nv2.JPEG 1.0\n"),
        ("val.lst", "0\t2.000000\tv0.JPEG\n1\t0.000000\tval/v1.JPEG\n2\t1.000000\tv2.JPEG\n"),
        ("synset_labels.txt", "n01484850\nn01440764\nn01443537\n"),
        ("imagenet_2012_validation_synset_labels.txt", "n01484850\nn01440764\nn01443537"),
        ("val/val_annotations.txt", f"v0.JPEG\tn01484850{BOXES}\nv1.JPEG\tn01440764{BOXES}\nv2.JPEG\tn01443537{BOXES}\n"),
        ("places365_val.txt", "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 1\n"),
        ("val.csv", "filename,label\nv0.JPEG,n01484850\nv1.JPEG,n01440764\nv2.JPEG,n01443537\n"),
        ("val/labels.csv", "id;class\nv0;2\nv1;0\nv2;1\n"),
        ("val/GT-final_val.csv", "Filename;Width;ClassId\nv0.JPEG;64;2\nv1.JPEG;64;0\nv2.JPEG;64;1\n"),
    ],
)
def test_a_list_labels_the_images_of_a_flat_split(name, text, tmp_path):
    source = find_images(make(tmp_path, FLAT | {name: text}))
    assert source.classes == WNIDS and source.decision.train_split == "train"
    assert labels(source)["val"] == OF_VAL
    numbers = "n01484850" not in text
    assert any("numbers in the list of val are positions" in note for note in source.decision.notes) == numbers


def test_other_text_beside_a_flat_split_is_no_list(tmp_path):
    """A README, the ids of the development kit, which are no positions, and a list of another split."""
    more = {
        "val/README.txt": "Images of val.\nSee v0 and others\n",
        "val_ground_truth.txt": "3\n1\n2\n",
        "train.txt": "v0.JPEG 1\n",
    }
    with pytest.raises(UserError, match="val holds images without classes"):
        find_images(make(tmp_path, FLAT | more))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"val.txt": "v0.JPEG 2\nv7.JPEG 0\nv8.JPEG 0\n"},
            r"val.txt: lacks 2 images of val and names 2 images .* \(val/v1.JPEG is not",
        ),
        (
            {"val.txt": "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 0\nv9.JPEG 0\n"},
            r"lacks 0 images of val and names 1 image .*\(v9.JPEG does not",
        ),
        (
            {"val.txt": "v0.JPEG 3\nv1.JPEG 1\nv2.JPEG 2\n"},
            "has the label 3, but labels are positions among the 3 sorted class folders",
        ),
        ({"val.txt": "v0.JPEG cat\nv1.JPEG n01440764\nv2.JPEG n01443537\n"}, "split val has the class cat, which train lacks"),
        ({"val.txt": "v0.JPEG 2\nv1.JPEG\nv2.JPEG 1\n"}, "val.txt: v1.JPEG has no label, but others have one"),
        ({"val.txt": "v0.JPEG 0 1 0\nv1.JPEG 1 1 0\nv2.JPEG 0 0 1\n"}, "val.txt: v0.JPEG has several labels, 0 1 0; give each"),
        (
            {"val.txt": "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 1\n", "val_map.txt": "v0.JPEG 2\nv1.JPEG 0\nv2.JPEG 0\n"},
            "val_map.txt: differs from .*val.txt in the labels of val; remove one",
        ),
    ],
)
def test_a_list_that_does_not_fit_a_flat_split_is_refused(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find_images(make(tmp_path, FLAT | files))


FOOD = images(*(f"images/{name}/{number}.jpg" for name in ("pie", "soup") for number in range(3)))
BIRDS = images(*(f"images/00{label}.bird/{label}{number}.jpg" for label in (1, 2) for number in range(2)))


@pytest.mark.parametrize(
    ("files", "expected", "classes"),
    [
        (  # Caffe's
            images("img/a b.jpg", "img/c.jpg", "img/d.jpg")
            | {"train.txt": "img/a b.jpg 10\nimg/c.jpg 9\n", "val.txt": "img/d.jpg 9\n"},
            {"train": {"a b.jpg": "10", "c.jpg": "9"}, "val": {"d.jpg": "9"}},
            ("9", "10"),
        ),
        (  # in folders of splits
            images("train/a.jpg", "train/b.jpg", "val/a.jpg") | {"train.txt": "a.jpg cat\nb.jpg dog\n", "val.txt": "a.jpg dog\n"},
            {"train": {"a.jpg": "cat", "b.jpg": "dog"}, "val": {"a.jpg": "dog"}},
            ("cat", "dog"),
        ),
        (  # MXNet's
            images("a/1.jpg", "a/2 b.jpg", "a/3.jpg")
            | {"data_train.lst": "7\t1.000000\ta/1.jpg\n4\t0.000000\ta/2 b.jpg\n", "data_val.lst": "3\t1.000000\ta/3.jpg\n"},
            {"data_train": {"1.jpg": "1", "2 b.jpg": "0"}, "data_val": {"3.jpg": "1"}},
            ("0", "1"),
        ),
        (  # Food-101
            FOOD
            | {
                "meta/train.txt": "pie/0\npie/1\nsoup/0\n",
                "meta/test.txt": "soup/1\npie/2\nsoup/2\n",
                "meta/classes.txt": "soup\npie\n",
            },
            {"train": {"0.jpg": "soup", "1.jpg": "pie"}, "test": {"1.jpg": "soup", "2.jpg": "soup"}},
            ("soup", "pie"),
        ),
        (  # CUB-200-2011
            BIRDS
            | {
                "images.txt": "1 001.bird/10.jpg\n2 001.bird/11.jpg\n3 002.bird/20.jpg\n4 002.bird/21.jpg\n",
                "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
                "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n",
                "classes.txt": "1 001.bird\n2 002.bird\n",
            },
            {"train": {"10.jpg": "001.bird", "20.jpg": "002.bird"}, "test": {"11.jpg": "001.bird", "21.jpg": "002.bird"}},
            ("001.bird", "002.bird"),
        ),
        (  # numbers and a file of names
            images("img/a.jpg", "img/b.jpg") | {"train_list.txt": "img/a.jpg 1\nimg/b.jpg 0\n", "classes.txt": "wolf\nant\n"},
            {"train": {"a.jpg": "ant", "b.jpg": "wolf"}},
            ("wolf", "ant"),
        ),
        (  # tests without labels
            images("img/a.jpg", "img/b.jpg", "img/c.jpg")
            | {"train.txt": "img/a.jpg 1\nimg/b.jpg 0\n", "test.txt": "img/c.jpg\n"},
            {"train": {"a.jpg": "1", "b.jpg": "0"}, "test": {"c.jpg": ""}},
            ("0", "1"),
        ),
        (  # written on Windows
            images("img/a.jpg", "img/b.jpg") | {"train.txt": "img\\a.jpg 1\r\nimg\\b.jpg 0\r\n"},
            {"train": {"a.jpg": "1", "b.jpg": "0"}},
            ("0", "1"),
        ),
        (  # written elsewhere
            images("img/a.jpg", "img/b.jpg") | {"train.txt": "/mnt/x/img/a.jpg 1\n/mnt/x/img/b.jpg 0\n"},
            {"train": {"a.jpg": "1", "b.jpg": "0"}},
            ("0", "1"),
        ),
    ],
)
def test_lists_of_splits(files, expected, classes, tmp_path):
    source = find_images(make(tmp_path, files))
    assert source.layout == "lists"
    assert (labels(source), source.classes) == (expected, classes)


def test_a_list_may_be_given_itself(tmp_path):
    make(tmp_path, images("img/a.jpg", "img/b.jpg") | {"some.lst": "0\t1\timg/a.jpg\n1\t0\timg/b.jpg\n"})
    assert labels(find_images(tmp_path / "some.lst", "train")) == {"train": {"a.jpg": "1", "b.jpg": "0"}}
    with pytest.raises(UserError, match="has no splits"):
        find_images(tmp_path / "some.lst")


@pytest.mark.parametrize(
    ("lists", "options", "message"),
    [
        ({"test_list.txt": "0.jpg\n2.jpg\n"}, {"split": "train"}, "already has splits, test"),
        ({"train.txt": "0.jpg a\n1.jpg b\n", "val.txt": "2.jpg a\n"}, {"split": "train"}, "already has splits, train, val"),
        (
            {"train_val_list.txt": "0.jpg\n2.jpg\n", "test_list.txt": "3.jpg\n"},
            {},
            "images_001, images_002 are named like folders",
        ),
    ],
)
def test_a_list_of_tests_is_never_trained_on(lists, options, message, tmp_path):
    cut = images(*(f"images_00{number // 2 + 1}/{number}.jpg" for number in range(4)))
    with pytest.raises(UserError, match=message):
        find_images(make(tmp_path, cut | lists), **options)


def test_images_of_a_list_may_lie_in_several_folders(tmp_path):
    files = images(*(f"images_00{number // 2 + 1}/images/{number}.png" for number in range(4)), "more/9.png")
    files["train_val.txt"], files["test.txt"] = "0.png a\n1.png b\n2.png a\n", "3.png b\n"
    source = find_images(make(tmp_path, files))
    assert labels(source) == {"train_val": {"0.png": "a", "1.png": "b", "2.png": "a"}, "test": {"3.png": "b"}}
    assert source.decision.train_split == "train_val"
    assert "the images in more are in no list and left out" in source.decision.notes


def test_images_in_no_list_are_counted(tmp_path):
    make(tmp_path, images("img/a.jpg", "img/b.jpg", "img/c.jpg", "img/notes.txt") | {"train.txt": "img/a.jpg 1\nimg/b.jpg 0\n"})
    assert find_images(tmp_path).decision.notes == ("1 image in no list left out, such as img/c.jpg",)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"train.txt": "img/a.jpg 1\nimg/x.jpg 0\nimg/y.jpg 0\n"},
            "train.txt: 2 of 3 images do not exist, such as img/x.jpg, and 1 image beside the others are in no list",
        ),
        (
            {"train1.txt": "img/a.jpg 1\nimg/b.jpg 0\n", "train2.txt": "img/a.jpg 1\n"},
            "train2.txt: img/a.jpg is also in .*train1.txt",
        ),
        ({"train.txt": "img/a.jpg\nimg/b.jpg\n"}, "train.txt: has no labels, and its images are in no folders of classes"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find_images(make(tmp_path, images("img/a.jpg", "img/b.jpg") | lists))
