"""Archives are read in place, whatever is in them, and nothing else is read or written."""

import gzip
import io
import json
import os
import tarfile
import zlib

import numpy as np
import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.archives import find_archives
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.devkit import read_devkit
from imagefeed.preprocess.sources.listing import read_image
from tests import rawforms
from tests.rawforms import CLASSES, make_tar
from tests.rawtree import jpeg


@pytest.fixture(scope="module")
def images():
    return rawforms.make_images()


def by_path(source, split):
    found = source.splits[split]
    return dict(zip(found.paths, found.labels.tolist()))


def contents(source, split):
    return [read_image(source.root, image) for image in source.images(split, np.arange(len(source.splits[split])))]


def test_places_are_those_of_the_images_inside_the_archives(images, tmp_path):
    source = find_images(rawforms.write_archives(tmp_path, images))
    expected = [data for name in CLASSES for data in images["train"][name].values()]
    assert contents(source, "train") == expected
    assert source.splits["train"].paths[0] == "ILSVRC2012_img_train.tar/n01440764.tar/n01440764_4.JPEG"
    assert contents(source, "val") == [data for _, data in rawforms.flat(images["val"]).values()]


def test_the_kits_ids_are_mapped_to_the_order_of_wordnet_ids(images, tmp_path):
    devkit = read_devkit(rawforms.write_archives(tmp_path, images), "2012")
    assert devkit.wnids == {3: "n01440764", 1: "n02084071", 4: "n03995372", 2: "n04037443"}
    labels = by_path(find_images(tmp_path), "val")
    for name, (of, _) in rawforms.flat(images["val"]).items():
        assert labels[f"ILSVRC2012_img_val.tar/{name}"] == CLASSES.index(of)


def test_labels_count_all_classes_even_if_the_training_archive_lacks_some(images, tmp_path):
    train = {name: found for name, found in images["train"].items() if name != CLASSES[1]}
    source = find_images(rawforms.write_archives(tmp_path, {"train": train, "val": images["val"]}))
    assert source.classes == CLASSES
    assert sorted(set(source.splits["train"].labels.tolist())) == [0, 2, 3]


def test_the_kit_may_be_unpacked_and_the_training_archive_needs_none(images, tmp_path):
    rawforms.write_archives(tmp_path, images)
    with_kit = find_images(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(kit) as tar:
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            path = tmp_path / "ILSVRC2012_devkit_t12" / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(f"ILSVRC2012_devkit_t12/data/{name}").read())
    kit.unlink()
    assert find_images(tmp_path).fingerprint() == with_kit.fingerprint()
    os.rename(tmp_path / "ILSVRC2012_devkit_t12", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the labels of split val need ILSVRC2012_devkit_t12.tar.gz, which is missing"):
        find_images(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    assert find_images(tmp_path).classes == CLASSES and find_images(tmp_path).titles == ()


def test_the_separate_archive_of_dogs_is_left_out(images, tmp_path):
    rawforms.write_archives(tmp_path, images)
    before = find_images(tmp_path).fingerprint()
    (tmp_path / "ILSVRC2012_img_train_t3.tar").write_bytes((tmp_path / "ILSVRC2012_img_train.tar").read_bytes())
    assert find_images(tmp_path).fingerprint() == before


def test_archives_are_preferred_to_folders_of_the_same_splits_only(images, tmp_path):
    rawforms.write_archives(tmp_path, images)
    rawforms.write_folders(tmp_path, images)
    assert find_images(tmp_path).layout == "ImageNet 2012 archives"
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(UserError, match="split train is a folder, val an archive; choose, as in: --layout archives"):
        find_images(tmp_path)
    assert find_images(tmp_path, layout="archives").num_images == 12
    assert find_images(tmp_path, layout="folders").num_images == 32


def write_kit(folder, truth=(1, 2), **more):
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(rawforms.make_devkit(list(truth), **more))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: write_kit(folder), "has no number from 1 to 2, the lines of the ground truth"),
        (lambda folder: write_kit(folder, [1001] * 12), "00000001.JPEG has a label that ILSVRC2012_devkit_t12.tar.gz lacks"),
        (lambda folder: write_kit(folder, ["x"] * 12), "a line that is not a number"),
        (lambda folder: write_kit(folder, [1] * 12, classes=("n1", "n2", "n3", "n4")), "n01440764 is not a class of"),
        (lambda folder: write_kit(folder, [1] * 12, classes=("n1", "n1", "n3", "n4")), "has no classes or has one twice"),
        (lambda folder: write_kit(folder, [1] * 12, year="2010"), "no data/ILSVRC2012_validation_ground_truth.txt"),
        (
            lambda folder: os.rename(folder / "ILSVRC2012_img_val.tar", folder / "ILSVRC2010_images_val.tar"),
            "archives of 2010 and 2012",
        ),
        (
            lambda folder: [(folder / f"ILSVRC2012_img_{name}.tar").write_bytes(b"") for name in ("test", "test_v2")],
            "ILSVRC2012_img_test.tar and ILSVRC2012_img_test_v2.tar are both of split test",
        ),
        (lambda folder: os.truncate(folder / "ILSVRC2012_img_train.tar", 200_000), "ILSVRC2012_img_train.tar: truncated"),
        (lambda folder: os.truncate(folder / "ILSVRC2012_devkit_t12.tar.gz", 700), "ILSVRC2012_devkit_t12.tar.gz: corrupt"),
    ],
)
def test_wrong_archives_of_imagenet_are_refused(damage, message, images, tmp_path):
    rawforms.write_archives(tmp_path, images)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_a_kit_that_is_a_zip_bomb_is_refused_before_it_fills_the_memory(images, tmp_path, monkeypatch):
    monkeypatch.setattr("imagefeed.preprocess.sources.devkit.MAX_UNPACKED", 1 << 20)
    rawforms.write_archives(tmp_path, images)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(UserError, match="unpacks to more than 1048576 bytes"):
        find_images(tmp_path)
    packed = zlib.compress(bytes(2 << 20))
    meta = bytes(124) + b"\0\1IM" + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
    folder = "ILSVRC2012_devkit_t12/data"
    truth = f"{folder}/ILSVRC2012_validation_ground_truth.txt"
    kit.write_bytes(gzip.compress(make_tar({f"{folder}/meta.mat": meta, truth: b"1\n"})))
    with pytest.raises(UserError, match="meta.mat is corrupt .it unpacks to more"):
        find_images(tmp_path)
    kit.write_bytes(gzip.compress(make_tar({f"{folder}/meta.mat": os.urandom(5000), truth: b"1\n"})))
    with pytest.raises(UserError, match="meta.mat is corrupt"):
        find_images(tmp_path)


PLAIN = {f"{of}/{number}.JPEG": f"{of}{number}".encode() for of in ("cat", "dog") for number in (1, 2)}


@pytest.mark.parametrize(
    ("files", "splits", "classes"),
    [
        ({"train.tar": make_tar(PLAIN), "val.tar": make_tar(PLAIN)}, ["train", "val"], ["cat", "dog"]),
        ({"train.tar": make_tar({f"train/{name}": data for name, data in PLAIN.items()})}, ["train"], ["cat", "dog"]),
        ({"train.tar": make_tar({"README": b"x", **PLAIN})}, ["train"], ["cat", "dog"]),
        ({"train.tar": make_tar({"cat/1.JPEG": b"x"})}, ["train"], ["cat"]),
        (
            {"all.tar": make_tar({f"set/{split}/{name}": data for split in ("train", "val") for name, data in PLAIN.items()})},
            ["train", "val"],
            ["cat", "dog"],
        ),
        (
            {"train.tar": make_tar({"cat.tar": make_tar({"1": b"x"}), "dog.tar": make_tar({"1": b"y"})})},
            ["train"],
            ["cat", "dog"],
        ),
        (
            {"all.tar": make_tar({f"{split}/{name}": data for split in ("Training", "Testing") for name, data in PLAIN.items()})},
            ["Testing", "Training"],
            ["cat", "dog"],
        ),
        (
            {f"train-{at:06d}.tar": make_tar({f"{of}/1.JPEG": of.encode()}) for at, of in enumerate(("cat", "dog"))},
            ["train"],
            ["cat", "dog"],
        ),
        (
            {"train.tar": make_tar({f"{of}/images/1.JPEG": of.encode() for of in ("cat", "dog")} | {"cat/boxes.txt": b"x"})},
            ["train"],
            ["cat", "dog"],
        ),
        (
            {"all.tar": make_tar({f"{split}/images/{name}": data for split in ("train", "val") for name, data in PLAIN.items()})},
            ["train", "val"],
            ["cat", "dog"],
        ),
        ({f"train/{of}.tar": make_tar({f"{of}/images/1.JPEG": of.encode()}) for of in ("cat", "dog")}, ["train"], ["cat", "dog"]),
        (
            {"train.tar": make_tar({"pets/cat/1.JPEG": b"x", "pets/dog/1.JPEG": b"x", "wild/cat/1.JPEG": b"x"})},
            ["train"],
            ["pets/cat", "pets/dog", "wild/cat"],
        ),
        (
            {f"{split}/{of}.tar": make_tar({"1": b"x"}) for split in ("train", "val") for of in ("cat", "dog")},
            ["train", "val"],
            ["cat", "dog"],
        ),
    ],
)
def test_classes_of_other_archives(files, splits, classes, tmp_path):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = find_images(tmp_path)
    assert source.layout == "tar archives"
    assert (list(source.splits), list(source.classes)) == (splits, classes)
    for split in splits:
        for (path, label), data in zip(by_path(source, split).items(), contents(source, split)):
            assert classes[label] in path.replace("all", "").replace("train.tar/", "")
            assert data in (b"x", b"y") or data.startswith(classes[label].encode())


def test_hard_links_are_images_like_those_they_name(tmp_path):
    """As GNU tar stores a tree in which two names are one file."""
    for number, path in enumerate(("cat/1.JPEG", "dog/1.JPEG")):
        (tmp_path / "tree" / path).parent.mkdir(parents=True)
        (tmp_path / "tree" / path).write_bytes(b"%d" % number)
    os.link(tmp_path / "tree/cat/1.JPEG", tmp_path / "tree/dog/2.JPEG")
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw" / "train.tar", "w") as tar:
        tar.add(tmp_path / "tree", ".")
    source = find_images(tmp_path / "raw")
    assert contents(source, "train") == [b"0", b"1", b"0"] and source.splits["train"].reasons == {}
    assert source.splits["train"].labels.tolist() == [0, 1, 1]


def test_a_flat_archive_named_like_a_test_set_has_no_labels(tmp_path):
    (tmp_path / "train.tar").write_bytes(make_tar(PLAIN))
    (tmp_path / "test.tar").write_bytes(make_tar({"1.JPEG": b"x", "2.JPEG": b"y"}))
    source = find_images(tmp_path)
    assert source.classes == ("cat", "dog") and source.splits["test"].labels.tolist() == [-1, -1]


def test_archives_of_several_splits_are_never_joined_to_one(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.tar").write_bytes(make_tar({"a/0.jpg": b"x"} if name == "train" else {"0.jpg": b"x"}))
    with pytest.raises(UserError, match="already has splits, train, val"):
        find_images(tmp_path, "train")
    with pytest.raises(UserError, match="val.tar: has no classes; pack its images as CLASS/IMAGE"):
        find_images(tmp_path)


def test_an_option_names_the_split_of_class_archives(tmp_path):
    for name in ("n02", "n01"):
        (tmp_path / f"{name}.tar").write_bytes(make_tar({f"{name}_1.JPEG": name.encode()}))
    with pytest.raises(UserError, match="has no classes, so it is itself a class; name its split, as in: --split train"):
        find_images(tmp_path)
    source = find_images(tmp_path, "train")
    assert source.classes == ("n01", "n02") and contents(source, "train") == [b"n01", b"n02"]
    assert by_path(find_images(tmp_path / "n01.tar", "val"), "val") == {"n01.tar/n01_1.JPEG": 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(make_tar(PLAIN)), "train.tar: compressed .gzip., so its images cannot be read in place"),
        (make_tar({"cat.tar": gzip.compress(make_tar(PLAIN))}), "train.tar/cat.tar: compressed"),
        (make_tar({"cat.tar": make_tar({})}), "train.tar/cat.tar: the class has no images"),
        (make_tar({"cat.tar": b"x"}), "train.tar/cat.tar: truncated"),
        (make_tar({}), "train.tar: the class has no images"),
        (make_tar({"images/1.jpg": b"x", "labels/1.txt": b"x"}), "train.tar: has no classes"),
        (
            make_tar({"train/images/1.jpg": b"x", "train/labels/1.txt": b"x"}),
            "1 image without a class, such as train/images/1.jpg",
        ),
        (
            make_tar({"t/train/n01/images/1.jpg": b"x", "t/val/images/1.jpg": b"x", "t/val/val_annotations.txt": b"1.jpg n01"}),
            "1 image without a class, such as t/val/images/1.jpg; unpack it if a list in it has their labels",
        ),
    ],
)
def test_wrong_archives_are_refused(data, message, tmp_path):
    (tmp_path / "train.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_a_class_archive_that_exceeds_its_end_is_refused(tmp_path):
    """Its last member claims more bytes than it has left, although the archive around it has them."""
    info = tarfile.TarInfo("a.JPEG")
    info.size = 5000
    (tmp_path / "train.tar").write_bytes(make_tar({"cat.tar": info.tobuf(), "dog.tar": make_tar({"1": bytes(20000)})}))
    with pytest.raises(UserError, match="train.tar/cat.tar: truncated"):
        find_images(tmp_path)


def test_a_hostile_archive_does_no_harm(tmp_path):
    """Its odd members become lines in rejected.jsonl; no file is created and none outside is read."""
    secret = tmp_path / "secret.JPEG"
    secret.write_bytes(jpeg(100, 100, 99))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name, data=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))

        for number in range(12):
            add(f"cat/{number}.JPEG", jpeg(60, 80, number))
        add("dog/1.JPEG", jpeg(60, 80, 20))
        add("cat/link.JPEG", type=tarfile.SYMTYPE, linkname=str(secret))
        add("cat/hard.JPEG", type=tarfile.LNKTYPE, linkname="../secret.JPEG")
        add("cat/zero.JPEG", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add("cat/pipe.JPEG", type=tarfile.FIFOTYPE)
        add("../../escaped/x.JPEG", jpeg(60, 80, 21))
        add(f"{tmp_path}/absolute/x.JPEG", jpeg(60, 80, 22))
        add("cat/nested.tar.JPEG", make_tar({"x.JPEG": jpeg(60, 80, 23)}))
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.tar").write_bytes(out.getvalue())
    before = sorted(path.name for path in tmp_path.iterdir())
    source = find_images(raw)
    assert "escaped" not in source.classes
    manifest = build_dataset(source, tmp_path / "out", ImageOptions(size=32), 0, ProcessRunner(1), max_rejected=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert [path.name for path in raw.iterdir()] == ["train.tar"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines if "nested" not in line["path"]} == {
        "train.tar/cat/link.JPEG": "a symbolic link",
        "train.tar/cat/hard.JPEG": "a hard link to no earlier member",
        "train.tar/cat/zero.JPEG": "a device",
        "train.tar/cat/pipe.JPEG": "a named pipe",
        "train.tar/../../escaped/x.JPEG": "a path that leaves the archive",
    }
    assert len(lines) == 6 and manifest.num_records == 14


def test_many_members_are_listed_by_their_headers_alone(tmp_path):
    """300 GB of images in a sparse file: reading their bytes would take minutes."""
    path = tmp_path / "cat.tar"
    with open(path, "wb") as file:
        at = 0
        for number in range(3000):
            info = tarfile.TarInfo(f"{number}.JPEG")
            info.size = 100_000_000
            file.seek(at)
            file.write(info.tobuf())
            at += 512 + -(-info.size // 512) * 512
        file.truncate(at + 1024)
    [listing] = find_archives(path, SourceOptions("train")).listings
    assert listing.num_images == 3000
    assert listing.places[-1].tolist() == (0, at - -(-info.size // 512) * 512, 100_000_000)
