"""Every raw form of the same images is recognized, and gives the same labels and the same stored bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import decode_example
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.inspection import describe, draw_contact_sheet, render_text
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.verify import verify
from tests import rawforms
from tests.frames import read_frames
from tests.rawforms import CLASSES, TITLES
from tests.rawtree import jpeg, make_raw_tree

ROOT = Path(__file__).parents[3]
FORMS = {
    "folders": (rawforms.write_folders, "folders"),
    "archives": (rawforms.write_archives, "ImageNet 2012 archives"),
    "kaggle": (rawforms.write_kaggle, "Kaggle's ImageNet"),
    "csv": (rawforms.write_csv, "CSV"),
    "parquet": (rawforms.write_parquet, "Parquet"),
}


def build(raw, out, **more):
    return build_dataset(find_images(raw, **more), out, ImageOptions(size=32), 0, ProcessRunner(2))


def stored(out: Path) -> dict[str, tuple[int, str, bytes]]:
    """(label, class, JPEG) of each record by the last part of its name."""
    manifest = Manifest.load(out)
    return {
        record.filename.rpartition("/")[2]: (record.label, record.class_name, record.jpeg)
        for split in manifest.splits.values()
        for shard in split.shards
        for record in (decode_example(payload) for _, payload in read_frames(memoryview((out / shard.name).read_bytes())))
    }


@pytest.fixture(scope="module")
def images():
    return rawforms.make_images()


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    build(rawforms.write_folders(folder / "raw", images), folder / "out")
    return stored(folder / "out")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_gives_the_same_labels_and_jpegs(form, images, reference, tmp_path):
    write, name = FORMS[form]
    raw = write(tmp_path / "raw", images)
    source = find_images(raw)
    assert (source.layout, source.classes, source.num_images) == (name, CLASSES, 32)
    assert source.fingerprint() == find_images(raw).fingerprint() == find_images(raw, layout=form).fingerprint()
    manifest = build(raw, tmp_path / "out")
    assert {label for label, _, _ in reference.values()} == {0, 1, 2, 3} and len(reference) == 32
    assert stored(tmp_path / "out") == reference
    assert manifest.titles == (TITLES if form in ("archives", "kaggle") else ())
    assert sorted(split.records for split in manifest.splits.values()) == [12, 20]
    assert verify(manifest.root, workers=1) == []
    assert not (tmp_path / "out" / ".build").exists()


def test_the_challenge_of_2010_with_its_own_names_and_test_labels(images, tmp_path):
    test = {f"ILSVRC2010_test_{number:08d}.JPEG": jpeg(40, 50, number) for number in (1, 2, 3)}
    raw = rawforms.write_archives_2010(tmp_path / "raw", images, test)
    source = find_images(raw)
    assert (source.layout, source.classes, source.titles) == ("ImageNet 2010 archives", CLASSES, TITLES)
    val = dict(zip(source.splits["val"].paths, source.splits["val"].labels.tolist()))
    for name, (of, _) in rawforms.flat(images["val"]).items():
        path = f"ILSVRC2010_images_val.tar/val/{name.replace('2012', '2010')}"
        assert val[path] == CLASSES.index(of)
    assert source.splits["test"].labels.tolist() == [-1, -1, -1]
    (raw / "ILSVRC2010_test_ground_truth.txt").write_text("4\n1\n3\n")  # by the kit's ids, see KIT_IDS
    assert find_images(raw).splits["test"].labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("write", [rawforms.write_archives, rawforms.write_kaggle])
def test_unlabeled_images_are_kept(write, images, tmp_path):
    test = {f"ILSVRC2012_test_{number:08d}.JPEG": jpeg(90, 120, number) for number in range(7)}
    out = tmp_path / "out"
    manifest = build(write(tmp_path / "raw", images, test), out)
    assert {name: split.records for name, split in manifest.splits.items()} == {"train": 20, "val": 12, "test": 7}
    assert manifest.load_index("test")["label"].tolist() == [-1] * 7
    assert manifest.split("test").counts == (0, 0, 0, 0)
    assert stored(out)["ILSVRC2012_test_00000003.JPEG"][:2] == (-1, "")
    assert (manifest.train_split, manifest.eval_split) == ("train", "val")
    assert verify(manifest.root, workers=1) == []
    assert "test                7 records" in render_text(describe(manifest))
    assert "no labels" in render_text(describe(manifest))


def test_a_dataset_may_consist_of_unlabeled_images(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    test = {f"test/ILSVRC2012_test_{number:08d}.JPEG": jpeg(90, 120, number) for number in range(3)}
    (raw / "ILSVRC2012_img_test.tar").write_bytes(rawforms.make_tar(test))
    manifest = build(raw, tmp_path / "out")
    assert (manifest.classes, manifest.num_records, manifest.eval_split) == ((), 3, None)
    assert verify(manifest.root, workers=1) == []
    draw_contact_sheet(manifest, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_an_unlabeled_split_is_not_the_evaluation_split(images, tmp_path):
    test = {"ILSVRC2012_test_00000001.JPEG": jpeg(90, 120, 1)}
    manifest = build(rawforms.write_archives(tmp_path / "raw", {"train": images["train"]}, test), tmp_path / "out")
    assert list(manifest.splits) == ["train", "test"] and manifest.eval_split is None


def test_titles_appear_on_the_contact_sheet(images, tmp_path):
    manifest = build(rawforms.write_kaggle(tmp_path / "raw", images), tmp_path / "out")
    draw_contact_sheet(manifest, tmp_path / "sheet.svg")
    text = (tmp_path / "sheet.svg").read_text()
    assert "<!-- tench -->" in text and "<!-- power drill -->" in text and "n01440764" not in text


def test_the_recognized_layout_is_printed_and_another_can_be_chosen(images, tmp_path):
    raw = rawforms.write_csv(tmp_path / "raw", images)
    rawforms.write_folders(raw / "more", {"train": images["train"]})
    command = [sys.executable, "-m", "preprocess", "build", raw, tmp_path / "out", "--size", "32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"{raw}: read as CSV\n") and "4 classes, sorted by name: n01440764, " in result.stdout
    with pytest.raises(UserError, match="its folders hold images"):
        find_images(raw, layout="folders")
    assert find_images(raw / "more", layout="folders").num_images == 20


def test_an_unrelated_table_does_not_hide_a_tree_of_folders(tmp_path):
    raw = make_raw_tree(tmp_path / "raw", {"train": 1})
    (raw / "noisy.csv").write_text("path,noisy_labels_0\ntrain/x.JPEG,n01440764\n")
    (raw / "train.csv").write_text("path,noisy_labels_0\ntrain/x.JPEG,n01440764\n")
    assert find_images(raw).layout == "folders"


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "with space"])
def test_a_split_name_must_be_a_valid_file_name(tmp_path, name):
    make_raw_tree(tmp_path / "raw", {"train": 1})
    with pytest.raises(UserError, match="cannot be a split's name"):
        find_images(tmp_path / "raw" / "train", name)


def test_class_folders_that_are_not_utf8_are_refused(tmp_path):
    make_raw_tree(tmp_path, {"train": 1})
    os.rename(tmp_path / "train" / "n01440764", os.fsencode(tmp_path / "train") + b"/\xff\xfe")
    with pytest.raises(UserError, match="cannot be a class's name"):
        find_images(tmp_path)
