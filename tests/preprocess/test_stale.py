"""A build that finds an earlier one takes up what has changed in RAW since, and ends as a clean build does, byte for byte."""

import dataclasses
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner

import imagefeed
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.preprocess import state
from imagefeed.preprocess.cli import main
from imagefeed.preprocess.compare import compare_raw, load_record
from imagefeed.preprocess.options import ImageOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.raw import RAW
from imagefeed.preprocess.renew import Notices
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.stale import BUILD
from tests import rawforms

NAMES = [f"{label}/{number:03d}.jpg" for label in ("ant", "bee") for number in range(70)]  # 3 shards of train


class Here:
    """Runs tasks in this process, which starts sooner than another one."""

    def map(self, function, tasks, progress=lambda *_: None):
        return (function(task, progress) for task in tasks)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return simplejpeg.encode_jpeg(pixels, 95, "RGB", "444")


def write(path: Path, data: bytes) -> None:
    """As a program does that runs later than all before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    write.later = getattr(write, "later", 1_700_000_000) + 1
    os.utime(path, (write.later, write.later))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    raw = tmp_path_factory.mktemp("original")
    for seed, name in enumerate(NAMES):
        write(raw / "train" / name, picture(seed))
        if seed % 20 == 0:
            write(raw / "val" / name, picture(1000 + seed))
    write(raw / "train" / "ant" / "bad.jpg", b"no picture")
    return raw


@pytest.fixture
def raw(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "raw")


def build(raw: Path, out: Path, told: list | None = None, **more) -> Manifest | None:
    notices = Notices(renewing=lambda paths, shards: None if told is None else told.append((paths, shards)))
    more = {"max_rejected": 0.05, "options": ImageOptions(size=16), **more}
    return build_dataset(find_images(raw), out, more.pop("options"), 0, Here(), notices=notices, **more)


def interrupt(raw: Path, out: Path, after: int = 2) -> None:
    """A build that ends after some shards are finished."""
    done = iter(range(after))

    class Interrupted(Here):
        def map(self, function, tasks, progress=lambda *_: None):
            return (function(task, progress) for task, _ in zip(tasks, done))

    with pytest.raises(FileNotFoundError):
        build_dataset(find_images(raw), out, ImageOptions(size=16), 0, Interrupted(), 0.05)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.tfrecord")}


def shards_of(out: Path, *paths: str) -> set[str]:
    return {path.name for path in out.glob("*.tfrecord") if any(name.encode() in path.read_bytes() for name in paths)}


CHANGES = {
    "a changed image": {"train/bee/007.jpg": picture(5000)},
    "a changed image of the validation split": {"val/ant/000.jpg": picture(5001)},
    "an image that is bad now": {"train/ant/003.jpg": b"broken"},
    "two images": {"train/ant/001.jpg": picture(5002), "train/bee/066.jpg": picture(5003)},
    "an empty file": {"val/bee/010.jpg": b""},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_dataset_takes_up_what_changed(raw, tmp_path, change):
    out, told = tmp_path / "out", []
    build(raw, out)
    before, expected = written(out), shards_of(out, *CHANGES[change])
    for name, data in CHANGES[change].items():
        write(raw / name, data)
    build(raw, out, told)
    assert told == [(sorted(CHANGES[change]), len(expected))] and len(expected) < len(before)
    assert {name for name, time in written(out).items() if time != before[name]} == expected
    build(raw, tmp_path / "clean")
    assert files(out) == files(tmp_path / "clean") and not (out / ".build").exists()
    after = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    build(raw, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == after


@pytest.mark.parametrize("change", ["an image that is bad now", "two images"])
def test_an_interrupted_build_never_mixes_old_and_new_images(raw, tmp_path, change):
    interrupt(raw, tmp_path / "out")
    for name, data in CHANGES[change].items():
        write(raw / name, data)
    build(raw, tmp_path / "out")
    build(raw, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


@pytest.mark.parametrize("finish", [build, interrupt])
def test_mended_images_are_taken(raw, tmp_path, finish):
    finish(raw, tmp_path / "out")
    write(raw / "train" / "ant" / "bad.jpg", picture(6000))
    manifest = build(raw, tmp_path / "out", max_rejected=0)
    assert manifest.rejected == {} and manifest.num_records == 148
    build(raw, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


@pytest.mark.parametrize("finish", [build, interrupt])
def test_files_of_which_only_the_time_changed_cost_one_reading(raw, tmp_path, finish):
    out, told, read = tmp_path / "out", [], []
    finish(raw, out)
    before = written(out)
    for name in ("train/ant/001.jpg", "val/bee/010.jpg"):
        write(raw / name, (raw / name).read_bytes())
    for _ in range(2):
        notices = Notices(lambda images, total: read.append(images), lambda *changes: told.append(changes))
        build_dataset(find_images(raw), out, ImageOptions(size=16), 0, Here(), 0.05, notices=notices)
    assert told == [] and sum(read) == 2 - (finish is interrupt and len(before) < 4 and sum(read) == 1)
    assert before.items() <= written(out).items()
    build(raw, tmp_path / "clean")
    assert files(out) == files(tmp_path / "clean")


def test_an_interruption_while_it_renews_loses_nothing(raw, tmp_path):
    out = tmp_path / "out"
    build(raw, out)
    write(raw / "train/ant/001.jpg", picture(5000))
    interrupt(raw, out, after=0)
    assert not (out / "dataset.json").exists()
    write(raw / "train/bee/002.jpg", picture(5001))
    build(raw, out)
    build(raw, tmp_path / "clean")
    assert files(out) == files(tmp_path / "clean")


def test_parts_take_up_changes_too(raw, tmp_path):
    out = tmp_path / "out"
    for part in ((1, 2), (2, 2)):
        build(raw, out, part=part)
    write(raw / "train/ant/001.jpg", picture(5000))
    for part in ((1, 2), (2, 2)):
        build(raw, out, part=part)
    build(raw, out)
    build(raw, tmp_path / "clean")
    assert files(out) == files(tmp_path / "clean")
    write(raw / "train/ant/001.jpg", picture(5001))
    with pytest.raises(
        UserError, match=r"1 raw image has changed \(train/ant/001.jpg\) since the build finished; run build without part"
    ):
        build(raw, out, part=(1, 2))


@pytest.mark.parametrize("lost", [RAW, BUILD])
def test_without_its_memory_a_dataset_stays_what_it_is(raw, tmp_path, lost):
    """Without raw.npz a change cannot be seen; without build.npz all images are read, and all shards rewritten."""
    out = tmp_path / "out"
    build(raw, out)
    (out / lost).write_bytes((out / lost).read_bytes()[:-40])
    before = files(out)
    build(raw, out)
    assert {name: before[name] for name in before if name != BUILD} == {
        name: data for name, data in files(out).items() if name != BUILD
    }
    write(raw / "train/ant/001.jpg", picture(5000))
    build(raw, out)
    build(raw, tmp_path / "clean")
    assert (files(out) == files(tmp_path / "clean")) == (lost == BUILD)


LISTINGS = {
    r"2 were added \(train/ant/x.jpg, train/ant/y.jpg\); to add images, build all of RAW": ("train/ant/x.jpg", "train/ant/y.jpg"),
    r"1 was removed \(train/ant/004.jpg\); restore RAW": ("-train/ant/004.jpg",),
    r"4 were added \(train/bee/a, train/bee/b, train/bee/c, ...\), 1 was removed \(val/ant/000.jpg\)": (
        *(f"train/bee/{name}" for name in "abcd"),
        "-val/ant/000.jpg",
    ),
}


@pytest.mark.parametrize("finish", [build, interrupt])
@pytest.mark.parametrize("message", LISTINGS)
def test_added_and_removed_files_are_named(raw, tmp_path, message, finish):
    finish(raw, tmp_path / "out")
    before = files(tmp_path / "out")
    for name in LISTINGS[message]:
        if name[0] == "-":
            (raw / name[1:]).unlink()
        else:
            write(raw / name, picture(1))
    since = "this dataset was built" if finish is build else "this build started"
    with pytest.raises(UserError, match=f"RAW has changed since {since}: {message}"):
        build(raw, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_table_with_other_labels_or_in_another_order(raw, tmp_path):
    rows = [f"train/{name},{name[:3]}" for name in NAMES]
    table = tmp_path / "raw" / "train.csv"

    def save(rows):
        write(table, "\n".join(["path,label", *rows]).encode())

    save(rows)
    build(table, tmp_path / "out")
    save([*rows[:-1], f"train/{NAMES[-1]},ant"])
    since = "since this dataset was built: 1 image"
    with pytest.raises(UserError, match=rf"labels in RAW have changed {since} \(train/bee/069.jpg\)"):
        build(table, tmp_path / "out")
    save(rows[::-1])
    build(table, tmp_path / "out")
    build(table, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_images_that_cannot_be_read_any_more_replace_nothing(raw, tmp_path):
    table = tmp_path / "raw" / "train.csv"
    write(table, "\n".join(["path,label", *(f"train/{name},{name[:3]}" for name in NAMES)]).encode())
    build(table, tmp_path / "out")
    before = files(tmp_path / "out")
    for name in NAMES[:10]:
        (raw / "train" / name).unlink()
    with pytest.raises(UserError, match=r"10 raw images can no longer be read \(train/ant/000.jpg, .*the dataset is unchanged"):
        build(table, tmp_path / "out")
    assert files(tmp_path / "out") == before


def tar(raw: Path, path: Path, **options) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name in sorted(file for file in raw.rglob("train/*/*")):
            archive.add(name, name.relative_to(raw))
    os.utime(path, (write.later, write.later))


@pytest.mark.parametrize("finish", [build, interrupt])
@pytest.mark.parametrize("data", [picture(7000), b"", None])
def test_an_archive_that_was_replaced(raw, tmp_path, finish, data):
    """By one with a longer image, an empty one, or the same images at other places."""
    archives = tmp_path / "archives"
    archives.mkdir()
    tar(raw, archives / "all.tar")
    finish(archives, tmp_path / "out")
    if data is not None:
        write(raw / "train/bee/007.jpg", data * 3)
    tar(raw, archives / "all.tar", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 999})
    before, told = written(tmp_path / "out"), []
    build(archives, tmp_path / "out", told)
    if finish is build:
        changed = ["all.tar/train/bee/007.jpg"] if data is not None else []
        assert told == [(changed, len(changed))] and sum(
            written(tmp_path / "out")[name] != before[name] for name in before
        ) == len(changed)
    build(archives, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")


@pytest.mark.parametrize("finish", [build, interrupt])
def test_a_parquet_file_that_was_replaced(tmp_path, finish):
    images = rawforms.make_images()
    raw = rawforms.write_parquet(tmp_path / "raw", images)
    finish(raw, tmp_path / "out", **({} if finish is build else {"after": 5}))
    first = next(iter(images["train"]["n02084071"]))
    images["train"]["n02084071"][first] = picture(1)
    shutil.rmtree(raw)
    rawforms.write_parquet(raw, images)
    told = []
    build(raw, tmp_path / "out", told)
    assert [path.rpartition("/")[2] for path in told[0][0]] == [first]
    build(raw, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")
    told.clear()
    for path in raw.rglob("*.parquet"):
        os.utime(path)
    unpacked = []
    build(raw, tmp_path / "out", told, unpacking=lambda *counts: unpacked.append(counts))
    assert told == unpacked == []


@pytest.mark.parametrize("finish", [build, interrupt])
def test_a_video_that_was_mended_has_other_frames_so_all_shards_are_written(raw, tmp_path, finish):
    from tests.preprocess.sources.test_video import make_video

    video = raw / "train/ant/clip.avi"
    make_video(tmp_path / "whole.avi", "-c:v", "mjpeg", frames=3, rate=1)
    write(video, (tmp_path / "whole.avi").read_bytes()[:-4000])
    size = video.stat().st_size
    finish(raw, tmp_path / "out")
    write(video, (tmp_path / "whole.avi").read_bytes())
    told = []
    build(raw, tmp_path / "out", told)
    assert size < video.stat().st_size and [paths for paths, _ in told] == [[]]
    build(raw, tmp_path / "clean")
    assert files(tmp_path / "out") == files(tmp_path / "clean")
    assert Manifest.load(tmp_path / "out").num_records == 147 + 3


def test_datasets_of_another_packer_are_complete_and_never_mixed(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = build(raw, out)
    assert manifest.versions["packer"] == state.PACKER
    older = dataclasses.replace(manifest, versions={name: value for name, value in manifest.versions.items() if name != "packer"})
    older.save()
    before = files(out)
    assert build(raw, out) == older and files(out) == before
    refusal = "begun by packer 1 of imagefeed; this release has packer 2, .*choose another OUT"
    write(raw / "train/ant/001.jpg", picture(5000))
    with pytest.raises(UserError, match=r"1 raw image has changed \(train/ant/001.jpg\) and 1 shard must be .*" + refusal):
        build(raw, out)
    assert files(out) == before
    (out / "statistics.npz").unlink()
    with pytest.raises(UserError, match="lacks statistics.npz; it was " + refusal):
        build(raw, out)
    assert (out / "dataset.json").exists()
    interrupt(raw, tmp_path / "half")
    monkeypatch.setattr(state, "PACKER", "3")
    with pytest.raises(UserError, match="half: begun by packer 2 of imagefeed; this release has packer 3"):
        build(raw, tmp_path / "half")


def test_verify_compares_raw_images_one_by_one(raw, tmp_path):
    out = tmp_path / "out"
    build(raw, out)
    command = ["verify", str(out), "--raw", str(raw), "--workers", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and f"{out}: 147 records intact, packed from the images in {raw}; " in result.stdout, (
        result.output
    )
    write(raw / "train/ant/001.jpg", picture(5000))
    write(raw / "train/ant/bad.jpg", b"no  picture")
    write(raw / "train/bee/new.jpg", picture(1))
    (raw / "val/bee/010.jpg").unlink()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "train/ant/001.jpg: has changed since it was packed; run build again to repack it",
        "train/ant/bad.jpg: has changed since it was packed; run build again to repack it",
        "val/bee/010.jpg: is missing; restore it, or build into another OUT",
        "train/bee/new.jpg: was added after the build; remove it, or build into another OUT",
    ]
    (out / RAW).unlink()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "raw.npz: missing, damaged, or from another dataset" in result.stderr


def test_one_new_image_draws_other_validation_images_which_are_told_apart(tmp_path):
    for number in range(20):
        write(tmp_path / f"raw/{'ab'[number % 2]}/{number:02}.jpg", picture(number))
    manifest = imagefeed.build(tmp_path / "raw", tmp_path / "out", validation_fraction=0.3, size=16, workers=1)
    write(tmp_path / "raw/a/new.jpg", picture(20))
    with pytest.raises(UserError, match=r"1 was added \(a/new.jpg\), \d+ were moved to another split \(.*; restore RAW, or"):
        imagefeed.build(tmp_path / "raw", tmp_path / "out", validation_fraction=0.3, size=16, workers=1)
    found = list(compare_raw(load_record(manifest), tmp_path / "raw", Here(), lambda images: None))
    assert found.pop() == ("a/new.jpg", "was added after the build", "remove it, or build into another OUT")
    assert {what for _, what, _ in found} == {
        "is in split val now, but was packed in train",
        "is in split train now, but was packed in val",
    }


def test_verify_compares_images_of_parquet_files(tmp_path):
    images = rawforms.make_images()
    raw = rawforms.write_parquet(tmp_path / "raw", images)
    record = load_record(build(raw, tmp_path / "out"))
    assert list(compare_raw(record, raw, Here(), lambda images: None)) == []
    images["val"]["n02084071"].popitem()
    images["train"]["n02084071"][next(iter(images["train"]["n02084071"]))] = picture(1)
    shutil.rmtree(raw)
    found = list(compare_raw(record, rawforms.write_parquet(raw, images), Here(), lambda images: None))
    assert sum(what == "is missing" for _, what, _ in found) >= 1 and any("has changed" in what for _, what, _ in found)


def test_build_says_which_images_have_changed(raw, tmp_path):
    command = ["build", str(raw), str(tmp_path / "out"), "--size", "16", "--workers", "1", "--max-rejected", "0.05"]
    assert CliRunner().invoke(main, command).exit_code == 0
    write(raw / "train/ant/001.jpg", picture(5000))
    result = CliRunner().invoke(main, command)
    assert f"{tmp_path / 'out'}: 1 raw image has changed (train/ant/001.jpg); rewriting 1 shard" in result.stdout.splitlines()
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["versions"]["packer"] == state.PACKER
    assert "complete already; " in CliRunner().invoke(main, command).stdout
    (tmp_path / "out" / RAW).unlink()
    assert "complete already, but changes in RAW go unnoticed without raw.npz; " in CliRunner().invoke(main, command).stdout


def table(raw: Path, split: str, captions: dict[str, str]) -> None:
    lines = [f"{name},{name.partition('/')[0]},{caption},{len(caption)}" for name, caption in captions.items()]
    (raw / f"{split}.csv").write_text("\n".join(["path,label,caption,length", *lines]) + "\n")


def columns_of(out: Path) -> dict[str, dict[str, str]]:
    """The caption of each stored image by its file name."""
    found = {}
    for split in Manifest.load(out).splits:
        dataset = imagefeed.Dataset(out, split)
        captions, lengths = dataset.column("caption"), dataset.column("length")
        found[split] = {dataset.filename(at): captions[at] for at in range(len(dataset))}
        assert lengths.tolist() == list(map(len, captions))
    return found


def test_columns_stay_with_their_images(raw, tmp_path):
    """Through rejected images, an interruption, parts, a changed image, and changed values."""
    raw = raw / "train"
    names = [*NAMES, "ant/bad.jpg"]
    captions = {"train": {name: f"<{name}>" for name in names[::2]}, "val": {name: f"<{name}>!" for name in names[1::2]}}

    def make(out, columns=("caption", "length"), **more):
        for split, found in captions.items():
            table(raw, split, found)
        return build_dataset(find_images(raw, columns=columns), out, ImageOptions(size=16), 0, Here(), 0.05, **more)

    out, stored = (
        tmp_path / "out",
        lambda: {split: {n: c for n, c in f.items() if "bad" not in n} for split, f in captions.items()},
    )
    make(out, part=(1, 2))
    make(out)
    assert columns_of(out) == stored()
    write(raw / NAMES[4], b"no picture")  # rejected from now on
    write(raw / NAMES[6], picture(77))
    make(out)
    expected = stored()
    del expected["train"][NAMES[4]]
    assert columns_of(out) == expected
    captions["train"][NAMES[8]] = "new"
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tfrecord")}
    for split, texts in captions.items():
        table(raw, split, texts)
    record = load_record(Manifest.load(out))
    assert list(compare_raw(dataclasses.replace(record, listing={"columns": ["caption", "length"]}), raw, Here(), print)) == [
        (f"column {name}", "has changed since it was packed", "run build again to repack it") for name in ("caption", "length")
    ]
    make(out)
    assert columns_of(out)["train"][NAMES[8]] == "new"
    assert shards == {path.name: path.stat().st_mtime_ns for path in out.glob("*.tfrecord")}  # not written again
    make(tmp_path / "clean")
    assert Manifest.load(out).files == Manifest.load(tmp_path / "clean").files
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()
    }
    with pytest.raises(UserError, match="begun with columns caption,length, this call says caption; use the same"):
        make(out, ("caption",))
    with pytest.raises(UserError, match="begun with columns caption,length, this call uses the default"):
        make(out, ())
