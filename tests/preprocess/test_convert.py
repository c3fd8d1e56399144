"""Datasets in the forms of other programs: read back by build, and by what those programs use."""

import json
import math
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from imagefeed import Dataset, convert
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.preprocess.cli import main
from imagefeed.preprocess.options import ImageOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import find_images
from tests.conftest import jpeg as encoded
from tests.conftest import pack, picture
from tests.dataset.test_reader import flip_bit
from tests.examples import parse_example
from tests.frames import read_frames
from tests.preprocess.test_stale import Here

COLUMNS = ("weight", "caption", "tags")
NAMES = ("a/1.jpg", "b/1.png", "a/.hid.jpg", "a/two.parts", "c/1-5.jpg", "c/été.JPEG", "x" * 120 + "/" + "y" * 240 + ".jpg")


def build(raw: Path, out: Path, **more) -> Manifest:
    return build_dataset(find_images(raw, **more), out, ImageOptions(size=16), 0, Here())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Manifest:
    """Classes 9, 10 and 11 with columns; test has no labels, train and val lack some."""
    raw = tmp_path_factory.mktemp("raw")
    for split, count in {"train": 80, "val": 9, "test": 7}.items():
        lines = ["path,label,weight,caption,tags"]
        for number in range(count):
            path = raw / split / (NAMES[number] if number < len(NAMES) else f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(len(lines) + 100 * count, 24, 32)))
            label = "" if split == "test" or number == 3 else str(9 + number % 3)
            weight, tags = "" if number == 4 else number / 4, " ".join(map(str, range(number % 3)))
            lines.append(f'{path.relative_to(raw)},{label},{weight},"№ {number}, ""{split}""",{tags}')
        (raw / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return build(raw, tmp_path_factory.mktemp("built") / "out", columns=COLUMNS)


def content(manifest: Manifest) -> dict[str, dict[str, tuple]]:
    """Class and columns of each record by its caption."""
    found = {}
    for split in manifest.splits:
        dataset = Dataset(manifest, split)
        names = [dataset.classes[label] if label >= 0 else None for label in dataset.targets]
        weights = [None if math.isnan(weight) else weight for weight in dataset.column("weight").tolist()]
        rows = zip(names, weights, [tags.tolist() for tags in dataset.column("tags")], strict=True)
        found[split] = dict(zip(dataset.column("caption"), rows, strict=True))
        assert len(found[split]) == len(dataset)
    return found


def jpegs(manifest: Manifest) -> list[bytes]:
    return sorted(
        Dataset(manifest, split).jpeg(n).tobytes() for split in manifest.splits for n in range(manifest.split(split).records)
    )


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_build_reads_what_convert_wrote(form, built, tmp_path):
    done = convert(built.root, tmp_path / "dest", format=form)
    assert (done.records, done.corrupt, len(done.notes)) == (96, [], 3)
    again = build(tmp_path / "dest", tmp_path / "again", columns=COLUMNS)
    assert (again.classes, content(again)) == (built.classes, content(built)) and built.classes == ("9", "10", "11")
    assert {name: split.counts for name, split in again.splits.items()} == {
        name: split.counts for name, split in built.splits.items()
    }


def test_folders_are_those_of_the_classes(built, tmp_path):
    dest = tmp_path / "dest"
    done = convert(built.root, dest, format="folders")
    assert done.notes == [
        "folders hold no columns, so weight, caption, tags are left out",
        "readers sort the classes by name; their label order is in classes.txt, for build --classes",
        "7 images of test without a label: they are in test/unlabeled, which is no class",
        "1 image of train without a label: they are in train/unlabeled, which is no class",
        "1 image of val without a label: they are in val/unlabeled, which is no class",
    ]
    assert sorted(path.read_bytes() for path in dest.rglob("*.jpg")) == jpegs(built)
    for split in ("train", "val"):
        dataset = Dataset(built, split)
        for label, name in enumerate(built.classes):
            assert len([*(dest / split / name).iterdir()]) == dataset.targets.count(label)
    assert {"1.jpg", "hid.jpg", "été.jpg"} <= {path.name for path in (dest / "train").rglob("*")}
    assert (dest / "train" / "unlabeled" / "two.parts.jpg").is_file()
    for split in ("train", "val"):
        (dest / split / "unlabeled").rename(tmp_path / split)
    again = build(dest, tmp_path / "again", classes=dest / "classes.txt")
    counts = {name: split.counts for name, split in built.splits.items()}
    assert (again.classes, {name: split.counts for name, split in again.splits.items()}) == (built.classes, counts)


def test_images_of_one_name_get_names_of_their_own(tmp_path):
    root = tmp_path / "raw"
    for number, name in enumerate(("a/1.jpg", "a/1.png", "a/1-0.jpg", "a/1-1.jpg", "a/1-2.jpg")):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(encoded(picture(number, 24, 32)))
    manifest = build(root, tmp_path / "out")
    convert(manifest.root, tmp_path / "dest", format="folders")
    assert sorted(path.read_bytes() for path in (tmp_path / "dest").rglob("*.jpg")) == jpegs(manifest)


def test_shards_have_what_webdataset_decodes(built, tmp_path):
    convert(built.root, tmp_path / "dest", format="webdataset", split="train")
    assert sorted(path.name for path in (tmp_path / "dest").iterdir()) == ["classes.txt", "train-000000.tar", "train-000001.tar"]
    dataset, read = Dataset(built, "train"), 0
    for path in sorted((tmp_path / "dest").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dict.fromkeys(name.partition(".")[0] for name in members):
            number, about = int(key), json.loads(members[f"{key}.json"])
            assert members[f"{key}.jpg"] == dataset.jpeg(number).tobytes()
            assert int(members[f"{key}.cls"]) == dataset.targets[number]
            name = dataset.classes[dataset.targets[number]] if dataset.targets[number] >= 0 else ""
            assert (about["filename"], about["class_name"]) == (dataset.filename(number), name)
            assert about["caption"] == dataset.column("caption")[number]
            read += 1
    assert read == len(dataset)


def test_parquet_files_are_as_hugging_face_writes_them(built, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    convert(built.root, tmp_path / "dest", format="parquet")
    dataset = Dataset(built, "train")
    files = sorted((tmp_path / "dest" / "data").glob("train-0000?-of-00002.parquet"))
    rows = [row for path in files for row in parquet.read_table(path).to_pylist()]
    assert [row["image"]["bytes"] for row in rows] == [dataset.jpeg(n).tobytes() for n in range(len(dataset))]
    assert [row["image"]["path"] for row in rows] == [dataset.filename(n) for n in range(len(dataset))]
    assert [row["label"] for row in rows] == dataset.targets
    features = json.loads(parquet.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"names": ["9", "10", "11"], "_type": "ClassLabel"},
        "weight": {"dtype": "float64", "_type": "Value"},
        "caption": {"dtype": "string", "_type": "Value"},
        "tags": {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "Sequence"},
    }


def test_tfrecord_files_have_the_columns_as_features(built, tmp_path):
    convert(built.root, tmp_path / "dest", format="tfrecord", split="val")
    dataset = Dataset(built, "val")
    [path] = (tmp_path / "dest").glob("*.tfrecord")
    weights, tags = dataset.column("weight"), dataset.column("tags")
    for number, (_, payload) in enumerate(read_frames(path.read_bytes())):
        found = parse_example(payload)
        assert (found["image/encoded"], found["image/class/label"]) == (
            [dataset.jpeg(number).tobytes()],
            [dataset.targets[number]],
        )
        assert found["caption"] == [dataset.column("caption")[number].encode()] and found["tags"] == tags[number].tolist()
        assert np.array_equal(found["weight"], [weights[number]], equal_nan=True)
    assert number + 1 == len(dataset)


def test_corrupt_records_are_left_out_and_named(tiny_copy, tmp_path):
    flip_bit(tiny_copy, "train", 30)
    with open(tiny_copy.root / tiny_copy.splits["val"].shards[0].name, "r+b") as file:
        file.seek(30)  # in the features before the JPEG
        file.write(b"\0\0")
    result = CliRunner().invoke(main, ["convert", str(tiny_copy.root), str(tmp_path / "dest"), "--format", "webdataset"])
    assert result.exit_code == 1
    assert [line.split(": ")[1].split(" (")[0] for line in result.stdout.splitlines()[:2]] == [
        "record 30 of train",
        "record 0 of val",
    ]
    assert f"{tmp_path / 'dest'}: 71 records as webdataset, in " in result.stdout
    assert result.stderr.endswith(f"dest: lacks 2 corrupt records of {tiny_copy.root}; see the lines above\n")
    assert len(list((tmp_path / "dest").iterdir())) == 5


@pytest.mark.parametrize(
    ("form", "dest", "message"),
    [
        ("zip", "dest", "format is 'zip'; choose one of folders, webdataset, parquet, tfrecord"),
        ("folders", "full", "full: exists and is not an empty folder; choose another DEST"),
        ("folders", "full/file", "full/file: exists and is not an empty folder; choose another DEST"),
        ("folders", "data/inside", "inside: lies in the dataset itself; choose a DEST outside of it"),
        ("tfrecord", "dest", "its shards are TFRecord files of tf.train.Example already, .* read SPLIT-.*.tfrecord as they are"),
        ("folders", "classes", r"class '\.\./x' cannot be the name of a folder; use another format"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(form, dest, message, tiny_copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    if dest == "classes":
        object.__setattr__(tiny_copy, "classes", ("../x", "b", "c"))
        tiny_copy.save()
    with pytest.raises(UserError, match=message):
        convert(tiny_copy.root, tmp_path / dest, format=form)
    with pytest.raises(UserError, match="no split named 'dev'; it has train, val"):
        convert(tiny_copy.root, tmp_path / "other", format="folders", split="dev")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "data"}


def test_a_killed_convert_leaves_no_dest_and_the_next_one_is_whole(tmp_path):
    manifest = pack(tmp_path / "data", {"train": [encoded(picture(seed, 64, 64)) for seed in range(30)] * 40}, shards=30, size=64)
    dest, temporary = tmp_path / "dest", tmp_path / ".dest.converting"
    command = [sys.executable, "-m", "imagefeed", "convert", str(manifest.root), str(dest), "--format", "folders"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any(temporary.rglob("*.jpg")) and process.poll() is None:
        time.sleep(0.005)
    with pytest.raises(UserError, match="another convert is writing it; wait until it ends"):
        convert(manifest.root, dest, format="folders")
    process.kill()
    assert process.wait() == -signal.SIGKILL and not dest.exists() and temporary.exists()
    dest.mkdir()
    assert convert(manifest.root, dest, format="webdataset").records == 1200
    assert len(list(dest.iterdir())) == 31 and not temporary.exists()
