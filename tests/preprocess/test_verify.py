"""Any damage to a dataset is found, at the right place."""

import dataclasses
import io
import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from imagefeed.codec import libjpeg
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import INDEX_DTYPE, ShardWriter, decode_example, index_name
from imagefeed.preprocess.build import build
from imagefeed.preprocess.verify import verify
from tests import faultyfs
from tests.rawtree import make_raw_tree


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw_tree(tmp_path_factory.mktemp("raw"), {"train": 30, "val": 4})


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    build(raw, out, size=64, workers=2)
    return out


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def problems(out, deep=False):
    return [str(problem) for problem in verify(out, deep=deep, workers=1)]


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_dataset_has_no_problems(built, deep):
    assert problems(built, deep) == []


def test_progress_counts_every_record_and_problems_come_as_they_are_found(copy):
    flip(copy / "val-00000-of-00001.tfrecord", 500 * 8)
    calls, found = [], []
    problems = verify(str(copy), workers=1, on_progress=lambda *at: calls.append(at), on_problem=found.append)
    assert len(problems) == 1 and found == problems
    assert calls == sorted(calls) and calls[-1] == (102, 102)


def test_a_flipped_bit_in_a_shard_is_found_at_its_record_and_nowhere_else(copy):
    manifest = Manifest.load(copy)
    shard = manifest.split("train").shards[1]
    index = manifest.load_index("train")
    rows = index[index["shard"] == 1]
    ends = rows["offset"].astype(int) + rows["length"] + 4
    draw = random.Random(1)
    for _ in range(6):
        byte = draw.randrange(shard.bytes)
        flip(copy / shard.name, 8 * byte)
        found = problems(copy, deep=True)
        assert len(found) == 1
        assert found[0].startswith(f"{shard.name}, record {np.searchsorted(ends, byte, 'right')} ")
        assert found[0].endswith("delete the shard and run build again")
        flip(copy / shard.name, 8 * byte)


@pytest.mark.parametrize("name", ["train.index.npy", "val.index.npy", "statistics.npz", "train-00000-of-00002.idx"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_in_any_other_file_is_found(copy, name, place):
    size = (copy / name).stat().st_size
    flip(copy / name, int(8 * size * place))
    assert any(problem.startswith(name) for problem in problems(copy))


def test_a_flipped_bit_in_the_manifest_is_found(copy):
    size = (copy / "dataset.json").stat().st_size
    draw = random.Random(2)
    for _ in range(50):
        bit = draw.randrange(8 * size)
        flip(copy / "dataset.json", bit)
        with pytest.raises(UserError):
            Manifest.load(copy)
        flip(copy / "dataset.json", bit)


@pytest.mark.parametrize("name", ["val-00000-of-00001.tfrecord", "val-00000-of-00001.idx", "val.index.npy", "statistics.npz"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert any(problem.startswith(f"{name}: the file is missing") for problem in problems(copy))


def test_a_shortened_and_a_lengthened_shard_are_found(copy):
    path = copy / "val-00000-of-00001.tfrecord"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    assert any("the manifest says" in problem for problem in problems(copy))
    path.write_bytes(data + b"more")
    assert any("4 bytes follow the last record" in problem for problem in problems(copy))


def test_swapped_shards_are_found(copy):
    one, two = copy / "train-00000-of-00002.tfrecord", copy / "train-00001-of-00002.tfrecord"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert any(problem.startswith(one.name) for problem in problems(copy))
    assert any(problem.startswith(two.name) for problem in problems(copy))


def test_deleting_the_bad_shard_and_building_again_mends_it(raw, copy, built):
    path = copy / "train-00000-of-00002.tfrecord"
    flip(path, 5000)
    path.unlink()
    build(raw, copy, size=64, workers=2)
    assert path.read_bytes() == (built / path.name).read_bytes()
    assert problems(copy, deep=True) == []


def test_deep_tells_of_images_what_libjpeg_turbo_says(copy):
    """In a shard with right checksums, among images that our decoder leaves to it though they are sound."""
    manifest = Manifest.load(copy)
    split, index = manifest.split("train"), np.array(manifest.load_index("train"))
    shard, *others = split.shards
    data = (copy / shard.name).read_bytes()
    ends = np.cumsum([int(size) for _, size in map(str.split, (copy / f"{shard.name[:-8]}idx").read_text().splitlines())])
    records = [decode_example(data[start + 12 : end - 4]) for start, end in zip([0, *ends[:-1]], ends)]
    jpeg = records[3].jpeg
    wide = Image.open(io.BytesIO(jpeg)).resize((65, 64))
    changes = {
        3: saved(jpeg, progressive=True), 4: saved(jpeg, subsampling="4:4:4"), 5: jpeg[:-200] + b"\xff\xd9", 6: jpeg[:-100],
        8: jpeg[:-300] + b"\xff\xd0" + jpeg[-298:], 9: jpeg[2:], 10: saved(wide), 40: jpeg[:-2] + bytes(30) + jpeg[-2:],
    }  # fmt: skip
    with ShardWriter(copy / shard.name, 0) as writer:
        for number, record in enumerate(records):
            writer.append(record._replace(jpeg=changes.get(number, record.jpeg)))
    index[index["shard"] == 0] = np.array(writer.rows, INDEX_DTYPE)
    np.save(copy / "train.index.npy", index)
    shards = (dataclasses.replace(shard, bytes=writer.bytes_written, sha256=writer.sha256), *others)
    manifest.splits["train"] = dataclasses.replace(split, shards=shards)
    manifest.files.update({name: hash_file(copy / name) for name in ("train.index.npy", f"{shard.name[:-8]}idx")})
    manifest.save()
    assert problems(copy) == []
    found = {int(problem.split()[2]): problem.partition("): ")[2].partition(";")[0] for problem in problems(copy, deep=True)}
    told = dict.fromkeys([5, 6, 8, 9, 40])
    for number in told:
        with pytest.raises(ValueError) as error:
            libjpeg.header(changes[number])
            libjpeg.check(changes[number])
        told[number] = f"its JPEG does not decode ({error.value})"
    assert found == told | {10: "its JPEG is 65x64, the record says 64x64"}


def saved(picture, **options) -> bytes:
    out = io.BytesIO()
    (Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture).save(out, "JPEG", **options)
    return out.getvalue()


def test_deep_finds_statistics_of_other_pixels(copy):
    """Written anew with a right hash: only the pixels can tell."""

    arrays = dict(np.load(copy / "statistics.npz"))
    arrays["channel_mean"] += 10
    np.savez(copy / "statistics.npz", **arrays)
    manifest = Manifest.load(copy)
    manifest.files["statistics.npz"] = hash_file(copy / "statistics.npz")
    manifest.save()
    assert problems(copy) == []
    assert any("mean differs by 10" in problem for problem in problems(copy, deep=True))


def test_a_manifest_of_another_version_is_refused(copy):
    data = json.loads((copy / "dataset.json").read_text())
    data["version"] = 99
    (copy / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="format version 99"):
        Manifest.load(copy)


def test_what_a_disk_fails_to_read_is_named(built, tmp_path):
    manifest = Manifest.load(built)
    row = manifest.load_index("train")[3]
    shard, at = manifest.split("train").shards[row["shard"]].name, int(row["offset"])
    eio = {shard: (at, at + 1), index_name(shard): (0, 1), "val.index.npy": (0, 1)}
    with faultyfs.mounted(built, tmp_path / "mount", direct=True, eio=eio) as mount:
        found = problems(mount)
    remedy = "cannot be read (input/output error); check the disk or the mount"
    assert found[:2] == [f"val.index.npy: {remedy}", f"{index_name(shard)}: {remedy}"]
    assert len(found) == 3 and found[2].startswith(f"{shard}, record 3 (byte ") and found[2].endswith(remedy)
