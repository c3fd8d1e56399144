"""Datasets are the same bytes however they came about, and odd raw data costs one sentence or one line."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from imagefeed.dataset.errors import ArgumentError, UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import decode_example
from imagefeed.preprocess import build as build_module
from imagefeed.preprocess.plan import num_shards
from imagefeed.preprocess.sources.detect import find_images
from tests.frames import read_frames
from tests.rawtree import CLASSES, jpeg, make_raw_tree

ROOT = Path(__file__).parents[2]


def build(raw, out, workers=2, size=64, **more):
    return build_module.build(raw, out, workers=workers, size=size, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw_tree(tmp_path_factory.mktemp("raw"), {"train": 60, "val": 7})


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    build(raw, out)
    return out


def records(out: Path, split: str):
    for shard in Manifest.load(out).split(split).shards:
        for _, payload in read_frames(memoryview((out / shard.name).read_bytes())):
            yield decode_example(payload)


def test_every_image_is_in_it_once_with_its_label(raw, built):
    for split, count in (("train", 180), ("val", 21)):
        stored = list(records(built, split))
        assert sorted(record.filename for record in stored) == find_images(raw).splits[split].paths
        assert len(stored) == count == Manifest.load(built).split(split).records
        for record in stored:
            assert record.filename.split("/")[1] == record.class_name == CLASSES[record.label]
            assert simplejpeg.decode_jpeg(record.jpeg).shape == (record.height, record.width, 3) == (64, 64, 3)


def test_classes_are_mixed_in_every_shard(built):
    index = np.load(built / "train.index.npy")
    assert set(index["shard"]) == {0, 1, 2}
    for shard in range(3):
        assert set(index["label"][index["shard"] == shard]) == {0, 1, 2}


def test_the_index_finds_the_jpeg_of_each_record(built):
    manifest = Manifest.load(built)
    index = manifest.load_index("train")
    for row, record in zip(index, records(built, "train")):
        data = (built / manifest.split("train").shards[row["shard"]].name).read_bytes()
        assert data[row["offset"] : row["offset"] + row["length"]] == record.jpeg
        assert row["label"] == record.label


def test_statistics_are_of_the_training_split(built):
    pixels = np.concatenate([simplejpeg.decode_jpeg(record.jpeg)[None] for record in records(built, "train")]).astype(float)
    found = Manifest.load(built).load_statistics()
    assert (found["images"], found["pixels"]) == (180, 180 * 64 * 64)
    # The reference sees the pixels after JPEG, the statistics were taken before.
    np.testing.assert_allclose(found["channel_mean"], pixels.mean((0, 1, 2)), atol=0.5)
    np.testing.assert_allclose(found["channel_std"], pixels.std((0, 1, 2)), rtol=0.05)
    assert np.abs(found["mean_image"] - pixels.mean(0)).mean() < 0.5


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(raw, built, tmp_path, workers):
    build(raw, tmp_path, workers)
    assert files(tmp_path) == files(built)


def test_another_seed_gives_another_order_of_the_same_records(raw, built, tmp_path):
    build(raw, tmp_path, seed=1)
    names = [[record.filename for record in records(out, "train")] for out in (built, tmp_path)]
    assert names[0] != names[1] and sorted(names[0]) == sorted(names[1])


def test_no_temporary_or_state_file_is_left(built):
    assert {Path(name).suffix for name in files(built)} == {".json", ".jsonl", ".npz", ".npy", ".tfrecord", ".idx"}


def test_a_killed_build_goes_on_to_the_same_bytes(raw, built, tmp_path):
    """SIGKILL to the driver at five random moments; nothing half-written ever carries a final name."""
    command = [sys.executable, "-m", "preprocess", "build", raw, tmp_path, "--size", "64"]
    moments = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1.0))
        process.kill()
        process.wait()
        for path in tmp_path.glob("*.tfrecord"):
            assert path.read_bytes() == (built / path.name).read_bytes()
    # A worker outlives its driver until it next reports; the lock is the driver's and gone at once.
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert files(tmp_path) == files(built)


def test_a_full_disk_is_one_sentence_and_later_the_build_goes_on(raw, built, tmp_path):
    """A limit on file sizes stands for the disk: writing fails in the middle of a shard."""
    command = f"ulimit -f 50; exec {sys.executable} -m preprocess build {raw} {tmp_path} --size 64"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "dataset.json").exists()
    build(raw, tmp_path)
    assert files(tmp_path) == files(built)


def test_a_finished_dataset_is_left_as_it_is(raw, built):
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    build(raw, built)
    assert before == {path: path.stat().st_mtime_ns for path in built.iterdir()}


@pytest.mark.parametrize("name", ["train-00001-of-00003.tfrecord", "val-00000-of-00001.idx", "val.index.npy", "statistics.npz"])
def test_a_file_deleted_from_a_finished_dataset_is_made_again(raw, built, tmp_path, name):
    build(raw, tmp_path)
    (tmp_path / name).unlink()
    build(raw, tmp_path)
    assert files(tmp_path) == files(built)


def test_other_options_or_images_are_refused(raw, built, tmp_path):
    with pytest.raises(UserError, match="begun with quality 90, this call says 80"):
        build(raw, built, quality=80)
    with pytest.raises(UserError, match="begun with seed 0, this call says 5"):
        build(raw, built, seed=5)
    other = make_raw_tree(tmp_path / "other", {"train": 2})
    with pytest.raises(UserError, match="RAW has changed since this dataset was built"):
        build(other, built)


def test_options_left_out_are_named_in_words(tmp_path):
    raw, out = make_raw_tree(tmp_path, {"train": 9}) / "train", tmp_path / "out"
    deep = {"range": (0, 4095)}
    build(raw, out, validation_fraction=0.2, **deep)
    for options, message in (
        ({"validation_fraction": 0.3, **deep}, "begun with validation_fraction 0.2, this call says 0.3; use the same"),
        ({"split": "train", **deep}, "begun with validation_fraction 0.2, this call uses the default"),
        ({"validation_fraction": 0.2}, "begun with range 0,4095, this call uses the default"),
    ):
        with pytest.raises(UserError, match=message):
            build(raw, out, **options)
    build(raw, tmp_path / "whole", split="train")
    with pytest.raises(UserError, match="begun with the default range, this call says 0,255"):
        build(raw, tmp_path / "whole", split="train", range=(0, 255))


def test_a_second_build_into_the_same_folder_is_refused(raw, tmp_path):
    command = [sys.executable, "-m", "preprocess", "build", raw, tmp_path]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / ".build" / "settings.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another build is writing into it"):
            build(raw, tmp_path, size=256)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0


def test_bad_images_are_listed_and_the_build_goes_on(raw, tmp_path):
    work = tmp_path / "raw"
    make_raw_tree(work, {"train": 10})
    folder = work / "train" / CLASSES[0]
    (folder / "cut.JPEG").write_bytes(jpeg(300, 400, 1)[:-3000])
    (folder / "text.JPEG").write_text("not a picture")
    (folder / "gone.JPEG").symlink_to(tmp_path / "nowhere")
    manifest = build(work, tmp_path / "out", max_rejected=0.2)
    entries = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {entry["path"]: entry["action"] for entry in entries} == {
        f"train/{CLASSES[0]}/{name}.JPEG": "rejected" for name in ("cut", "text", "gone")
    }
    assert all(entry["reason"] for entry in entries)
    assert manifest.rejected == {"rejected": 3} and manifest.split("train").records == 30


def test_too_many_bad_images_end_the_build_and_a_higher_limit_goes_on(raw, tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 10})
    (work / "train" / CLASSES[0] / "text.JPEG").write_text("not a picture")
    with pytest.raises(UserError, match="1 of 31 images are bad, more than the 1.00% that max_rejected allows"):
        build(work, tmp_path / "out")
    assert "text.JPEG" in (tmp_path / "out" / "rejected.jsonl").read_text()
    with pytest.raises(UserError, match="1 of 31 images are bad"):  # the same call again, now with nothing left to pack
        build(work, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert build(work, tmp_path / "out", max_rejected=0.05).num_records == 30


def test_pictures_stored_nearly_black_are_listed_limited_and_mapped_by_a_range(tmp_path):
    """Of 31 images, one has 12 bits in 16."""
    work = make_raw_tree(tmp_path / "raw", {"train": 10})
    dark = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(dark).save(work / "train" / CLASSES[0] / "dark.png")
    with pytest.raises(UserError, match="1 of 31 images would be stored nearly black or white, more than the 1.00%"):
        build(work, tmp_path / "limited", size=32)
    manifest = build(work, tmp_path / "allowed", size=32, max_rejected=0.05)
    assert manifest.rejected == {"suspicious": 1} and manifest.num_records == 31
    entry = json.loads((tmp_path / "allowed" / "rejected.jsonl").read_text())
    assert entry["path"].endswith("dark.png") and entry["action"] == "suspicious" and "--range LOW,HIGH" in entry["reason"]
    manifest = build(work, tmp_path / "mapped", size=32, range=(0, 4095))
    assert manifest.rejected == {"converted": 1} and manifest.options["range"] == [0, 4095]
    assert build(work, tmp_path / "mapped", size=32, range=(0, 4095)).fingerprint == manifest.fingerprint
    for out, other in (("mapped", {}), ("mapped", {"range": (0, 1023)}), ("allowed", {"range": (0, 4095)})):
        with pytest.raises(UserError, match="begun with (the default )?range"):
            build(work, tmp_path / out, size=32, **other)


def test_bad_images_that_were_mended_are_taken(tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 10})
    bad = work / "train" / CLASSES[0] / "bad.JPEG"
    bad.write_bytes(jpeg(300, 400, 1)[:-3000])
    with pytest.raises(UserError, match="1 of 31 images are bad"):
        build(work, tmp_path / "out")
    bad.write_bytes(jpeg(300, 400, 1))
    manifest = build(work, tmp_path / "out")
    assert manifest.num_records == 31 and manifest.rejected == {}


def test_bad_images_of_parts_count_at_the_end(tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 50})
    for number in range(3):
        (work / "train" / CLASSES[0] / f"text{number}.JPEG").write_text("not a picture")
    for number in (1, 2):
        build(work, tmp_path / "out", max_rejected=1, part=(number, 2))
    with pytest.raises(UserError, match="3 of 153 images are bad"):
        build(work, tmp_path / "out")


def test_out_inside_raw_is_refused(tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 1})
    for out in (work, work / "train", work / "packed"):
        with pytest.raises(UserError, match="lies in the folder of the raw images"):
            build(work, out)
    assert not (work / "packed").exists() and not (work / ".build").exists()


def test_a_shortened_shard_of_a_finished_dataset_is_written_again(raw, built, tmp_path):
    build(raw, tmp_path)
    shard = tmp_path / "val-00000-of-00001.tfrecord"
    shard.write_bytes(shard.read_bytes()[:-5])
    build(raw, tmp_path)
    assert files(tmp_path) == files(built)


def test_a_split_of_bad_images_only_is_refused(tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 2})
    for name in CLASSES:
        (work / "val" / name).mkdir(parents=True)
        (work / "val" / name / "x.JPEG").write_text("no")
    with pytest.raises(UserError, match="all images of split val are bad"):
        build(work, tmp_path / "out", max_rejected=1)


def test_imagenet_gives_313_shards_and_small_datasets_enough_for_all_cores():
    assert num_shards(1_281_167) == 313
    assert num_shards(50_000) == 32
    assert num_shards(1_000) == 16
    assert num_shards(1) == 1


def test_progress_counts_every_image_once(raw, tmp_path):
    calls = []
    build(raw, tmp_path, on_progress=lambda at: calls.append((at.phase, at.done, at.images, at.total, at.bytes_read)))
    size = sum(os.path.getsize(path) for path in raw.rglob("*.JPEG"))
    assert calls[:2] == [("listed", 0, 0, 0, 0), ("packing", 0, 0, 201, 0)]
    assert calls[-1] == ("packing", 201, 201, 201, size)
    assert [done for _, done, *_ in calls] == sorted(done for _, done, *_ in calls)


def test_images_of_the_same_bytes_are_counted_and_listed(tmp_path):
    work = make_raw_tree(tmp_path / "raw", {"train": 3, "val": 2})
    first = work / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    (work / "train" / CLASSES[1] / "again.JPEG").write_bytes(first.read_bytes())
    (work / "val" / CLASSES[0] / "again.JPEG").write_bytes(first.read_bytes())
    other = work / "val" / CLASSES[2] / f"{CLASSES[2]}_0.JPEG"
    (work / "val" / CLASSES[2] / "twin.JPEG").write_bytes(other.read_bytes())
    manifest = build(work, tmp_path / "out")
    assert manifest.duplicates == {"groups": 2, "images": 5, "across splits": 1, "across classes": 1}
    groups = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    c = CLASSES
    assert [set(group["paths"]) for group in groups] == [
        {f"train/{c[0]}/{c[0]}_0.JPEG", f"train/{c[1]}/again.JPEG", f"val/{c[0]}/again.JPEG"},
        {f"val/{c[2]}/{c[2]}_0.JPEG", f"val/{c[2]}/twin.JPEG"},
    ]
    assert manifest.num_records == 18


def test_one_checksum_is_not_enough_to_be_a_duplicate(tmp_path):
    """Marks that say all three images have one CRC and size: the bytes decide."""
    from imagefeed.preprocess.duplicates import MARK_DTYPE, find_duplicates

    work = make_raw_tree(tmp_path / "raw", {"train": 1})
    source = find_images(work)
    marks = np.array([(7, 100)] * 3, MARK_DTYPE)
    assert list(find_duplicates(source, {"train": marks})) == []


def test_parts_written_apart_are_the_same_bytes_as_one_build(raw, built, tmp_path):
    """Two jobs at the same time and one after, then the call that ends it."""
    command = [sys.executable, "-m", "preprocess", "build", raw, tmp_path, "--size", "64", "--workers", "1", "--part"]
    jobs = [subprocess.Popen([*command, part], cwd=ROOT, stdout=subprocess.PIPE, text=True) for part in ("1/3", "3/3")]
    for job in jobs:
        assert "run build without --part to complete the dataset" in job.communicate()[0]
        assert job.returncode == 0
    assert not (tmp_path / "dataset.json").exists()
    assert build(raw, tmp_path, part=(2, 3)) is None
    calls = []
    build(raw, tmp_path, on_progress=lambda at: calls.append((at.phase, at.done, at.images)))
    assert calls == [("listed", 0, 0), ("packing", 201, 0)]  # nothing was left to do
    assert files(tmp_path) == files(built)


def test_the_same_part_twice_at_once_is_refused(raw, tmp_path):
    from imagefeed.preprocess.state import at_work

    with at_work(tmp_path, (1, 2)):
        with pytest.raises(UserError, match="another build of part 1/2"):
            build(raw, tmp_path, part=(1, 2))
        with pytest.raises(UserError, match="another build is writing"):
            build(raw, tmp_path)


ARGUMENTS = {
    "size is 15; choose 16 to 4096": {"size": 15},
    "size is 4097; choose 16 to 4096": {"size": 4097},
    "fit is 'warp'; choose one of crop, short": {"fit": "warp"},
    "quality is 0; choose 1 to 100": {"quality": 0},
    "quality is 101; choose 1 to 100": {"quality": 101},
    "range is 5,5; choose LOW,HIGH with LOW below HIGH, such as 0,4095": {"range": (5, 5)},
    "range is 0,inf; choose LOW,HIGH with LOW below HIGH, such as 0,4095": {"range": (0, math.inf)},
    "seed is -1; choose 0 to 4294967295": {"seed": -1},
    "max_rejected is 1.5; choose 0.0 to 1.0": {"max_rejected": 1.5},
    "workers is 0; choose 1 or more": {"workers": 0},
    "frames_per_second is 0; choose a number above 0": {"frames_per_second": 0},
    "frames_per_second is nan; choose a number above 0": {"frames_per_second": math.nan},
    "engine is 'dask'; choose one of process, ray": {"engine": "dask"},
    "layout is 'zip'; choose one of folders, archives, kaggle, csv, lists, parquet, ffcv": {"layout": "zip"},
    "address is for a Ray cluster; set engine to ray as well": {"address": "10.0.0.1:6379"},
    "part is 4/3; choose K/N with K from 1 to N, such as 3/8": {"part": (4, 3)},
    "part is 0/3; choose K/N with K from 1 to N, such as 3/8": {"part": (0, 3)},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_wrong_arguments_are_refused_before_anything_is_written(raw, tmp_path, message):
    with pytest.raises(ArgumentError) as caught:
        build(raw, tmp_path / "out", **ARGUMENTS[message])
    assert str(caught.value) == message and not (tmp_path / "out").exists()


def test_paths_may_be_strings(raw, built):
    assert build(str(raw), str(built)).num_records == 201
