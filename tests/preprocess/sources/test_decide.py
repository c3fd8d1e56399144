"""Which folder is what: each raw tree is read as it is meant, or refused with what to type; nothing is guessed in silence."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from imagefeed import build
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.cli import main
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import Source
from tests.rawtree import jpeg

NFC = "café"
NFD = unicodedata.normalize("NFD", NFC)


def place(root: Path, names: str) -> Path:
    """Makes a tree of empty files, whose names alone are read here. "train/{a,b}" are two folders with two images each, "test/"
    is an empty folder, and ~ a blank."""
    for name in names.split():
        before, _, rest = name.replace("~", " ").partition("{")
        inside, _, after = rest.partition("}")
        for path in (root / f"{before}{each}{after}" for each in inside.split(",")):
            is_file = path.suffix in (".jpg", ".txt", ".xml", ".XML", ".db", ".tar", ".zip", ".json", ".tfrecord")
            images = [path] if is_file or name.endswith("/") else [path / "0.jpg", path / "1.jpg"]
            for image in images:
                image.parent.mkdir(parents=True, exist_ok=True)
                image.mkdir() if name.endswith("/") else image.touch()
    return root


def counts(source: Source) -> dict[str, dict[str, int]]:
    """Images by split and class; the class of unknown ones is empty."""
    names = [*source.classes, ""]
    return {
        split: {names[label]: int((found.labels == label).sum()) for label in np.unique(found.labels)}
        for split, found in source.splits.items()
    }


AB = {"a": 2, "b": 2}
XY = {"a/x": 2, "a/y": 2, "b": 2}
# What is in RAW, the options, the images by split and class, and the split to train on.
READ = {
    "any case": ("TRAIN/{a,b} Valid/{a,b} dev/{a,b}", {}, {"TRAIN": AB, "Valid": AB, "dev": AB}, "TRAIN"),
    "the alphabet does not choose": ("Testing/{a,b} Training/{a,b}", {}, {"Testing": AB, "Training": AB}, "Training"),
    "words beside it": ("train_images/{a,b} test_images/a", {}, {"train_images": AB, "test_images": {"a": 2}}, "train_images"),
    "years": ("train2017/{a,b} val2017/{a,b}", {}, {"train2017": AB, "val2017": AB}, "train2017"),
    "a blank": ("Training~Set/{a,b} Test~Set/{a,b}", {}, {"Training_Set": AB, "Test_Set": AB}, "Training_Set"),
    "a prefix of both": ("asl_train/{a,b} asl_test/{a,b}", {}, {"asl_train": AB, "asl_test": AB}, "asl_train"),
    "some of the tests": (
        "TRAIN/{a,b} TEST/{a,b} TEST_SIMPLE/a",
        {},
        {"TRAIN": AB, "TEST": AB, "TEST_SIMPLE": {"a": 2}},
        "TRAIN",
    ),
    "parts": ("train.X1/a train.X2/{a,b} val.X/a", {}, {"train": {"a": 4, "b": 2}, "val": {"a": 2}}, "train"),
    "one part keeps its name": ("train/{a,b} test1/0.jpg", {}, {"train": AB, "test1": {"": 1}}, "train"),
    "once more": ("seg_train/seg_train/{a,b} seg_test/seg_test/{a,b}", {}, {"seg_train": AB, "seg_test": AB}, "seg_train"),
    "no usual name": ("art/{a,b} photo/{a,b}", {"train_split": "photo"}, {"art": AB, "photo": AB}, "photo"),
    "another name beside train": ("holdout/{a,b} train/{a,b}", {}, {"holdout": AB, "train": AB}, "train"),
    "loose tests": ("train/{a,b} test/0.jpg", {}, {"train": AB, "test": {"": 1}}, "train"),
    "tests in a made-up folder": ("train/{a,b} test/all", {}, {"train": AB, "test": {"": 2}}, "train"),
    "images in each class": ("train/{a,b}/images train/a/0.txt test/images", {}, {"train": AB, "test": {"": 2}}, "train"),
    "images in each split": ("train/images/{a,b} val/images/{a,b}", {}, {"train": AB, "val": AB}, "train"),
    "annotations beside images": ("train/images/{a,b} train/{labels,extra}/0.txt train/masks", {}, {"train": AB}, "train"),
    "annotations in a class": ("train/a/{images,masks} train/a/labels/0.txt train/b", {}, {"train": AB}, "train"),
    "tests of a detector": ("train/{a,b} test/images test/labels/0.txt", {}, {"train": AB, "test": {"": 2}}, "train"),
    "classes like folders of images": ("train/{images,sketches}", {}, {"train": {"images": 2, "sketches": 2}}, "train"),
    "paths of folders": ("train/{a/x,a/y,b} val/{a/x,a/y,b}", {}, {"train": XY, "val": XY}, "train"),
    "top folders": ("train/{a/x,a/y,b}", {"class_level": "top"}, {"train": {"a": 4, "b": 2}}, "train"),
    "a class called train": ("train/{bus,car,train}", {}, {"train": {"bus": 2, "car": 2, "train": 2}}, "train"),
    "a class like a split": ("{bullet~train,car}", {"split": "train"}, {"train": {"bullet train": 2, "car": 2}}, "train"),
    "whole numbers": ("train/{0,1,2,10}", {}, {"train": {"0": 2, "1": 2, "2": 2, "10": 2}}, "train"),
    "one class": ("a", {"split": "train"}, {"train": {"a": 2}}, "train"),
    "only validation": ("{a,b}", {"split": "val"}, {"val": AB}, None),
    "only tests, loose": ("0.jpg", {"split": "test"}, {"test": {"": 1}}, None),
    "two Unicode forms": (f"train/{{{NFC},tea}} val/{NFD}", {}, {"train": {NFC: 2, "tea": 2}, "val": {NFC: 2}}, "train"),
    "images beside labels": ("images/{a,b} labels/x/0.txt 0.json", {"split": "test"}, {"test": AB}, None),
    "the dataset's own folder": ("2750/{a/x,a/y,b}", {"split": "train"}, {"train": XY}, "train"),
    "public tests": ("train_mini/{a,b} public_test/0.jpg", {}, {"train_mini": AB, "public_test": {"": 1}}, "train_mini"),
    "an empty test folder": ("train/{a,b} test/", {}, {"train": AB}, "train"),
    "no images beside the splits": ("train/{a,b} devkit/{data/0.txt,readme.txt} lost+found/", {}, {"train": AB}, "train"),
}
# What is in RAW, the options, and parts of the message.
REFUSED = {
    "loose validation images": ("train/{a,b} val/0.jpg", {}, "val holds images without classes", "list their labels in val.txt"),
    "a detector's images": ("{train,val}/images train/labels/0.txt val/labels/0.txt", {}, "train holds images without classes"),
    "a detector's only split": ("images labels/0.txt", {"split": "train"}, "it has images but no class folders"),
    "classes and no split": ("{a,b}", {}, "its folders hold images", "as in --split train", "--validation-fraction 0.1"),
    "one level too high": ("shapes/{train,val}/a", {}, "RAW is one level too high", "imagefeed build RAW/shapes OUT"),
    "two levels too high": ("x/y/{train,val}/a", {}, "RAW is one level too high", "imagefeed build RAW/x/y OUT"),
    "splits below images": ("images/{train,val} labels/{train,val}/0.txt", {}, "imagefeed build RAW/images OUT"),
    "itself once more": ("{train,val}/a chest/{train,val}/a", {}, "move chest out of RAW", "imagefeed build RAW/chest OUT"),
    "a split in itself": ("train/{a,train/a} val/a", {}, "move train/train out of RAW"),
    "--split for splits": ("{train,val}/a", {"split": "train"}, "it holds train, val", "leave out --split"),
    "--split train for validation": ("val/{a,b}", {"split": "train"}, "it holds val, which are names of splits"),
    "--split for loose splits": ("{train,val}", {"split": "train"}, "it holds train, val", "leave out --split"),
    "half sorted": ("train/{a,b} val/{a,b} val/{7,8}.jpg", {}, "RAW/val: 2 images beside the class folders a, b"),
    "half sorted classes": ("a b c.jpg", {"split": "train"}, "1 image beside the class folders a, b"),
    "half sorted paths": ("train/{a/x,a/y} train/a/7.jpg", {}, "1 image beside the folders x, y", "--class-level top"),
    "a class of validation": (
        "train/{a,b} val/c",
        {},
        "val has the class c, which train lacks (train has a, b)",
        "--classes FILE",
    ),
    "a class of tests": ("train/{a,b} test/{a,c}", {}, "test has the class c, which train lacks (train has a, b)"),
    "no training split": ("{art,photo}/a", {}, "none of art, photo is named like a training split", "--train-split NAME"),
    "two training splits": ("train2014/a train2017/a", {}, "train2014, train2017 are all named like", "--train-split NAME"),
    "groups of classes": ("birds/a fungi/b", {}, "none of birds, fungi is named", "--train-split NAME", "--split train"),
    "corruptions": ("fog/{1,2}/a", {}, "its only folder with images, fog, is not named", "imagefeed build RAW/fog/1 OUT"),
    "more corruptions": ("{fog,snow}/1/a {fog,snow}/2/a", {}, "imagefeed build RAW/fog/1 OUT --split val"),
    "no such split": ("train/a", {"train_split": "photo"}, "no split 'photo'", "--train-split must be one of train"),
    "images beside splits": ("train/a extra", {}, "extra beside train holds images without classes", "move it out of RAW"),
    "parts of a folder": (
        "HAM_images_part_{1,2}",
        {"split": "train"},
        "HAM_images_part_1, HAM_images_part_2 are named like folders",
    ),
    "folds": ("fold1/{a,b} fold2/{a,b}", {"split": "train"}, "fold1, fold2 are named like folders of images", "--classes FILE"),
    "one folder of images": ("img_align_celeba", {"split": "train"}, "img_align_celeba is named like folders of images"),
    "boxes of each image": ("{train,val}/images train/labels/0.txt", {}, "train holds images without classes"),
    "overlays": ("a/{images,overlays}", {"split": "train"}, "RAW/a: images in overlays beside images, which is no class"),
    "masks of all": ("images masks", {"split": "train"}, "it has images but no class folders"),
    "a class still packed": ("train/{a,b} train/c.tar", {}, "RAW/train: c.tar beside the class folders a, b; unpack it"),
    "archives alone": ("train.zip val.zip", {}, "holds train.zip, val.zip and no folders; unpack"),
    "a finished dataset": ("dataset.json 0.tfrecord", {"split": "train"}, "a dataset that was built, not raw images"),
    "a finished dataset as a class": (
        "train/{a,b} train/b/{dataset.json,0.tfrecord}",
        {},
        "RAW/train/b: a dataset that was built",
    ),
    "forms of the same images": ("{color,gray}/a", {}, "imagefeed build RAW/color OUT --split train"),
    "an empty class": ("train/a train/c/", {}, "RAW/train/c: the class has no images"),
    "an empty training split": ("train/ val/a", {}, "RAW/train: no images in it"),
    "an odd name": ("train/a train~copy/a", {}, "'train copy' cannot be a split's name; rename it"),
    "one image of each class": ("a/0.jpg b/0.jpg", {"validation_fraction": 0.5}, "no class has two images"),
    "two ways to name the split": ("a", {"split": "train", "validation_fraction": 0.1}, "leave out --split"),
}


@pytest.mark.parametrize("name", READ)
def test_a_tree_is_read_as_it_is_meant(name, tmp_path):
    names, options, expected, train = READ[name]
    source = find_images(place(tmp_path, names), **options)
    assert counts(source) == expected
    assert source.decision.train_split == train
    assert "  training split" in str(source.decision) if train else "no split to train on" in str(source.decision)


@pytest.mark.parametrize("name", REFUSED)
def test_a_tree_that_can_be_read_in_two_ways_is_refused_with_what_to_type(name, tmp_path, monkeypatch):
    names, options, *messages = REFUSED[name]
    place(tmp_path / "RAW", names)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        find_images(Path("RAW"), **options)
    for message in messages:
        assert message in refused.value.of_command()


def test_the_order_of_classes_is_by_value_by_name_or_as_a_file_says(tmp_path):
    raw = place(tmp_path / "raw", "train/{0,1,2,10}")
    assert find_images(raw).classes == ("0", "1", "2", "10")
    assert "sorted by value" in str(find_images(raw).decision)
    mixed = place(tmp_path / "mixed", "train/{1,10,2,tea}")
    assert find_images(mixed).classes == ("1", "10", "2", "tea")
    assert "3 of 4 classes are whole numbers, but sorted as names" in str(find_images(mixed).decision)
    order = tmp_path / "order.txt"
    order.write_text("tea\n2\n\n10\n1\nmissing\n")
    source = find_images(mixed, classes=order)
    assert source.classes == ("tea", "2", "10", "1", "missing")
    assert source.splits["train"].labels.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert "5 classes, in the order of order.txt" in str(source.decision)
    assert "1 class without images in train: missing" in source.decision.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\n", "order.txt: lacks the class b of"),
        (b"a\nb\na\n", "order.txt: has a twice"),
        (b"\n", "order.txt: is empty"),
        (b"\xff\xfe", "order.txt: not a readable text file"),
        (None, "order.txt: not a readable text file"),
    ],
)
def test_a_wrong_file_of_classes_is_refused(text, message, tmp_path):
    raw, order = place(tmp_path / "raw", "train/{a,b}"), tmp_path / "order.txt"
    if text is not None:
        order.write_bytes(text)
    with pytest.raises(UserError, match=message):
        find_images(raw, classes=order)


def test_a_file_of_classes_may_use_another_unicode_form_and_settles_classes_of_validation_only(tmp_path):
    raw, order = place(tmp_path / "raw", f"train/{NFD} val/{{{NFD},tea}}"), tmp_path / "order.txt"
    order.write_text(f"tea\n{NFC}\n", "utf-8")
    source = find_images(raw, classes=order)
    assert source.classes == ("tea", NFD) and counts(source) == {"train": {NFD: 2}, "val": {"tea": 2, NFD: 2}}


def test_names_that_differ_by_case_blanks_or_zeros_alone_are_noted(tmp_path):
    raw = place(tmp_path, "train/{Cat,cat,tea,tea~,3,03}")
    assert find_images(raw).decision.notes[:3] == (
        "'03', '3' are different classes",
        "'Cat', 'cat' are different classes",
        "'tea', 'tea ' are different classes",
    )


def test_masks_are_counted_and_a_class_named_like_a_folder_of_images_is_noted(tmp_path):
    masks = find_images(place(tmp_path / "masks", "a/{images,masks} b/{images,masks}"), "train")
    assert counts(masks) == {"train": AB} and masks.decision.skipped == {"masks/": 2}
    noted = find_images(place(tmp_path / "noted", "{images,sketches}"), "train")
    assert "images beside other folders: read as a class" in noted.decision.notes


def test_what_is_no_image_is_skipped_and_counted_but_damage_is_not(tmp_path):
    annotations = "train/a/{0.xml,1.XML} train/b/Thumbs.db train/a/@eaDir/0.jpg/T val/readme.txt train/notes/0.xml"
    raw = place(tmp_path, f"train/{{a,b}} val/{{a,b}} {annotations}")
    (raw / "train" / "a.zip").touch()
    for name in ("broken.part", "nosuffix", "x.npy"):
        (raw / "train" / "a" / name).touch()
    source = find_images(raw)
    assert counts(source) == {"train": {"a": 5, "b": 2}, "val": AB}
    assert source.decision.skipped == {".xml": 3, ".db": 1, ".txt": 1, ".zip": 1, "@eaDir/": 1}
    assert "the folder train/notes has no images and is left out" in source.decision.notes
    assert "  skipped, not images: 3 .xml, 1 .db, 1 .txt, 1 .zip, 1 @eaDir/" in source.decision.lines()


def test_videos_are_counted_apart(tmp_path):
    raw = place(tmp_path, "train/{a,b} test/0.jpg")
    for name in ("train/a/x.mp4", "test/y.mp4"):
        (raw / name).touch()
    lines = [line.split() for line in find_images(raw).decision.lines()]
    assert ["train", "train", "4", "+", "1", "video", "2", "known", "training", "split"] in lines
    assert ["test", "test", "1", "+", "1", "video", "0", "unknown"] in lines


def test_held_out_images_are_a_fraction_of_every_class_and_the_same_for_the_same_seed(tmp_path):
    raw = place(
        tmp_path, " ".join(f"{name}/{at:02}.jpg" for name, count in (("a", 30), ("b", 9), ("c", 1)) for at in range(count))
    )
    whole = find_images(raw, "train").splits["train"].paths
    source = find_images(raw, validation_fraction=0.2)
    assert counts(source) == {"train": {"a": 24, "b": 7, "c": 1}, "val": {"a": 6, "b": 2}}
    held = set(source.splits["val"].paths)
    assert source.splits["train"].paths == [path for path in whole if path not in held]
    assert find_images(raw, validation_fraction=0.2).fingerprint() == source.fingerprint()
    assert find_images(raw, validation_fraction=0.2, seed=1).fingerprint() != source.fingerprint()
    assert source.decision.train_split == "train" and "(seed 0)" in source.decision.notes[0]


def test_links_relative_paths_and_a_slash_at_the_end_change_nothing(tmp_path, monkeypatch):
    place(tmp_path / "real", "{train,val}/{a,b}")
    (tmp_path / "raw").mkdir()
    for split in ("train", "val"):
        (tmp_path / "raw" / split).symlink_to(tmp_path / "real" / split)
    monkeypatch.chdir(tmp_path)
    expected = find_images(tmp_path / "real")
    for raw in (Path("raw/"), Path("real"), Path("./real/../raw")):
        source = find_images(raw)
        assert (source.fingerprint(), source.decision) == (expected.fingerprint(), expected.decision)


def test_what_was_decided_is_built_kept_and_shown(tmp_path):
    """Testing comes first in the alphabet, has one class less, and a picture in another Unicode form of its class."""
    raw = tmp_path / "raw"
    for number, name in enumerate([f"Training/{NFC}", f"Training/{NFC}", "Training/ant", f"Testing/{NFD}"]):
        (raw / name).mkdir(parents=True, exist_ok=True)
        (raw / name / f"{number}.jpg").write_bytes(jpeg(40, 40, number))
    (raw / "Training" / "ant" / "2.xml").write_text("<annotation/>")
    out = tmp_path / "out"
    run = CliRunner().invoke
    shown = run(main, ["build", str(raw), str(out), "--dry-run"]).stdout
    assert not out.exists() and str(build(raw, dry_run=True)) == shown.removeprefix(f"{raw}: read as ").rstrip("\n")
    assert run(main, ["build", str(raw), str(out), "--size", "32", "--workers", "1"]).stdout.startswith(shown)
    manifest = Manifest.load(out)
    assert (manifest.train_split, manifest.eval_split, manifest.classes) == ("Training", "Testing", ("ant", NFC))
    assert {name: split.counts for name, split in manifest.splits.items()} == {"Testing": (0, 1), "Training": (1, 2)}
    assert sorted(manifest.load_index("Training")["label"]) == [0, 1, 1]
    assert manifest.load_statistics()["images"] == 3
    assert manifest.decision == find_images(raw).decision and manifest.options["train_split"] == "Training"
    inspected = run(main, ["inspect", str(out)]).stdout
    for line in shown.splitlines()[1:]:
        assert line.strip() in inspected
    assert "1 per class, largest 100.0%, 1 of 2 classes without any: ant" in inspected
    assert f"1 (ant) to 2 ({NFC}) per class" in inspected
    facts = json.loads(run(main, ["inspect", str(out), "--json"]).stdout)
    assert facts["splits"]["Testing"]["empty_classes"] == ["ant"] and facts["decision"]["skipped"] == {".xml": 1}
    assert facts["splits"]["Training"]["largest_class"] == {"name": NFC, "records": 2}
    (tmp_path / "classes.txt").write_text(f"ant\n{NFC}\n", "utf-8")
    with pytest.raises(UserError, match="begun with train_split Training, this call uses the default"):
        build(raw, out, size=32, train_split="Testing", classes=tmp_path / "classes.txt")


def test_unlabeled_tests_and_paths_of_folders_are_stored_so(tmp_path):
    raw = tmp_path / "raw"
    for number, name in enumerate(["train/x/a", "train/y/a", "test/all"]):
        (raw / name).mkdir(parents=True)
        (raw / name / f"{number}.jpg").write_bytes(jpeg(40, 40, number))
    manifest = build(raw, tmp_path / "out", size=32, workers=1)
    assert manifest.classes == ("x/a", "y/a")
    assert sorted(manifest.load_index("train")["label"]) == [0, 1] and manifest.load_index("test")["label"] == [NO_LABEL]
    assert manifest.eval_split is None and build(raw, tmp_path / "out", size=32, workers=1) == manifest
