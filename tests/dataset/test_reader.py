import gc
import io
import os
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import nvidia.dali.tfrecord as tfrecord
import pytest
from nvidia.dali import Pipeline, fn
from PIL import Image

from imagefeed.dataset import gather
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import CorruptRecord, Dataset, RecordReader
from imagefeed.dataset.records import INDEX_DTYPE, index_name
from tests import faultyfs
from tests.conftest import jpeg, pack, picture, replace_index


def flip_bit(manifest, split, record_id, byte=None):
    """Changes one bit in the middle of a record's JPEG, or in another byte of it; returns the name of its shard."""
    row = manifest.load_index(split)[record_id]
    name = manifest.splits[split].shards[row["shard"]].name
    with open(manifest.root / name, "r+b") as file:
        file.seek(int(row["offset"]) + (int(row["length"]) // 2 if byte is None else byte % int(row["length"])))
        before = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([before ^ 0x10]))
    return name


def mapped(manifest):
    """The names of the dataset's shards that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return set(re.findall(rf"{re.escape(str(manifest.root))}/(.*\.tfrecord)", maps.read()))


def test_record_is_the_jpeg_that_was_packed(tiny):
    train, val = RecordReader(tiny, "train"), RecordReader(tiny, "val")
    assert (len(train), len(val)) == (50, 23)
    for record_id in (0, 24, 25, 49):
        assert train[record_id].tobytes() == jpeg(picture(record_id))
    assert val[22].tobytes() == jpeg(picture(122))


@pytest.mark.parametrize("kind", [str, lambda root: root, "manifest", "pickled"])
def test_a_dataset_gives_images_and_labels_by_number(tiny, kind):
    val = Dataset(tiny if isinstance(kind, str) else kind(tiny.root), "val")
    val = pickle.loads(pickle.dumps(val)) if kind == "pickled" else val  # as DataLoader sends it to its workers
    assert (len(val), val.classes, val.labels.dtype) == (23, tiny.classes, np.int32)
    image, label = val[22]
    assert (image.mode, image.size, label, type(label)) == ("RGB", (256, 256), 22 % 3, int)
    data = jpeg(picture(122))
    assert val.jpeg(22).tobytes() == data and not val.jpeg(22).flags.writeable
    assert np.array_equal(image, Image.open(io.BytesIO(data)))
    assert [label for _, label in val] == val.labels.tolist()
    with pytest.raises(IndexError, match="there is no image"):
        val[23]


def test_a_dataset_without_that_split_or_with_a_corrupt_record_is_one_sentence(tiny_copy):
    with pytest.raises(UserError, match="no split named 'test'; it has train, val"):
        Dataset(tiny_copy.root, "test")
    flip_bit(tiny_copy, "train", 30)
    with pytest.raises(CorruptRecord, match="record 30 of train .* fails its checksum"):
        Dataset(tiny_copy.root, "train")[30]


def test_labels_are_those_of_the_records(tiny):
    labels = RecordReader(tiny, "train").labels
    assert labels.dtype == np.int32
    assert labels.tolist() == [record_id % 3 for record_id in range(50)]


def test_record_is_a_readonly_array_of_its_own(tiny):
    dataset = RecordReader(tiny, "train")
    record = dataset[3]
    assert record.dtype == np.uint8 and not record.flags.writeable
    assert not np.shares_memory(record, dataset[3])


def test_shards_are_mapped_when_first_read_and_hold_no_file_open(tiny):
    dataset = RecordReader(tiny, "train")
    gc.collect()  # loaders of other tests
    before = len(os.listdir("/proc/self/fd"))
    assert mapped(tiny) == set()
    dataset[0]
    assert mapped(tiny) == {"train-00000-of-00002.tfrecord"}
    dataset[49]
    assert len(mapped(tiny)) == 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_unmaps_the_shards(tiny):
    dataset = RecordReader(tiny, "train")
    record = dataset[7]
    assert mapped(tiny)
    dataset.close()
    gc.collect()
    assert mapped(tiny) == set() and record.tobytes() == jpeg(picture(7))


def test_damaged_record_is_named(tiny_copy):
    name = flip_bit(tiny_copy, "train", 30)
    dataset = RecordReader(tiny_copy, "train")
    with pytest.raises(CorruptRecord, match=rf"{name}: record 30 of train .* fails its checksum"):
        dataset[30]
    assert dataset[29].tobytes() == jpeg(picture(29))
    assert dataset[31].tobytes() == jpeg(picture(31))


def test_check_can_be_switched_off(tiny_copy):
    flip_bit(tiny_copy, "train", 30)
    corrupt = RecordReader(tiny_copy, "train", verify_checksums=False)[30].tobytes()
    assert corrupt != jpeg(picture(30)) and len(corrupt) == len(jpeg(picture(30)))


def test_missing_shard_is_one_sentence_at_the_start(tiny_copy):
    path = tiny_copy.root / "train-00001-of-00002.tfrecord"
    path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: the shard is missing; run build again"):
        RecordReader(tiny_copy, "train")
    assert len(RecordReader(tiny_copy, "val")) == 23


@pytest.mark.parametrize("change", [-1, 1])
def test_shard_of_another_length_is_one_sentence_at_the_start(tiny_copy, change):
    path = tiny_copy.root / "train-00000-of-00002.tfrecord"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(UserError, match=f"has {size + change:,} bytes, the manifest says {size:,}"):
        RecordReader(tiny_copy, "train")


def test_another_shard_of_the_same_length_is_one_sentence_at_the_start(tiny_copy):
    path = next(tiny_copy.root.glob("train-00001*.tfrecord"))
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="train-00001.*is not the one that was packed, though as long"):
        RecordReader(tiny_copy, "train")
    assert len(RecordReader(tiny_copy, "train", verify_checksums=False)) == 50


def test_shard_that_goes_away_later_is_one_sentence(tiny_copy):
    dataset = RecordReader(tiny_copy, "train")
    (tiny_copy.root / "train-00000-of-00002.tfrecord").unlink()
    with pytest.raises(UserError, match="train-00000-of-00002.tfrecord: the shard is missing"):
        dataset[0]


@pytest.mark.parametrize(("field", "value"), [("shard", 2), ("offset", 10**9), ("offset", 2**64 - 5), ("length", 10**6)])
def test_index_that_points_outside_a_shard_is_refused(tiny_copy, field, value):
    index = tiny_copy.load_index("train").copy()
    index[17][field] = value
    replace_index(tiny_copy, "train", index)
    with pytest.raises(UserError, match="train.index.npy: record 17 lies outside its shard"):
        RecordReader(tiny_copy, "train")


def test_changed_index_is_refused(tiny_copy):
    """A label out of range would end training with a traceback, one in range would be learned."""
    index = tiny_copy.load_index("train").copy()
    index[17]["label"] = 77
    np.save(tiny_copy.index_path("train"), index)
    with pytest.raises(UserError, match="train.index.npy: its content is not what build wrote; delete it and run build"):
        RecordReader(tiny_copy, "train")


def test_dali_reads_the_shards_by_their_own_index(tiny):
    """An independent reader of the same files: DALI's TFRecord reader, with the .idx beside each shard."""
    names = [shard.name for shard in tiny.splits["train"].shards]
    features = {
        "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
        "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
    }
    pipeline = Pipeline(batch_size=50, num_threads=1, device_id=None)
    with pipeline:
        found = fn.readers.tfrecord(
            path=[str(tiny.root / name) for name in names],
            index_path=[str(tiny.root / index_name(name)) for name in names],
            features=features,
        )
        pipeline.set_outputs(found["image/encoded"], found["image/class/label"])
    jpegs, labels = pipeline.run()
    assert [np.asarray(jpegs[n]).tobytes() for n in range(50)] == [jpeg(picture(n)) for n in range(50)]
    assert labels.as_array()[:, 0].tolist() == [n % 3 for n in range(50)]


def test_gathered_records_are_the_records_each_followed_by_zeros(tiny):
    """Any number of them: the checksums of three are computed side by side."""
    dataset = RecordReader(tiny, "train")
    for ids in ([7], [3, 49], [0, 1, 2], [5, 5, 48, 12, 30], range(50), []):
        ids = np.array(ids, np.int64)
        stride = dataset.longest(ids) + 3
        out = np.full((len(ids) + 1) * stride, 9, np.uint8)
        assert dataset.gather(ids, out, stride).tolist() == [False] * len(ids)
        for record_id, row in zip(ids.tolist(), out.reshape(-1, stride), strict=False):
            data = dataset[record_id]
            assert np.array_equal(row[: len(data)], data) and not row[len(data) :].any()
        assert (out[len(ids) * stride :] == 9).all()


def test_gathering_finds_each_damaged_record_and_no_other(tmp_path):
    """A bit in the first and in the last byte of JPEGs whose lengths leave every remainder by 8."""
    jpegs = [jpeg(picture(n)) for n in range(40)]
    manifest = pack(tmp_path / "data", {"train": jpegs})
    assert {len(data) % 8 for data in jpegs} == set(range(8))
    bad = {0: 0, 13: 7, 14: -1, 39: -1}
    for record_id, place in bad.items():
        flip_bit(manifest, "train", record_id, byte=place)
    ids = np.arange(40)
    for check in (True, False):
        dataset = RecordReader(manifest, "train", verify_checksums=check)
        stride = dataset.longest(ids)
        found = dataset.gather(ids, np.empty(40 * stride, np.uint8), stride)
        assert np.flatnonzero(found).tolist() == (sorted(bad) if check else [])
    assert "record 13 of train" in str(dataset.damage(13))


def test_gathering_refuses_arrays_that_do_not_fit():
    rows = np.zeros(2, INDEX_DTYPE)
    rows["length"] = 4
    source = np.arange(8, dtype=np.uint8)
    bases = np.array([source.ctypes.data])
    for shard, stride, room, bad in ((1, 4, 8, 2), (0, 3, 8, 2), (0, 4, 7, 2), (0, 4, 8, 1)):
        rows["shard"] = shard
        with pytest.raises(ValueError, match="the sizes of the arrays do not match"):
            gather.gather(rows, bases, np.empty(room, np.uint8), stride, False, np.empty(bad, bool))
    rows["shard"] = 0
    out, bad = np.empty(8, np.uint8), np.empty(2, bool)
    gather.gather(rows, np.zeros(1, np.int64), out, 4, False, bad)
    assert bad.all()  # not mapped
    gather.gather(rows, bases, out, 4, False, bad)
    assert out.tolist() == [0, 1, 2, 3] * 2 and not bad.any()


def test_a_shard_that_is_shortened_while_it_is_mapped_has_corrupt_records(tiny_copy):
    """In a memory map, they would end the process."""
    dataset, shard = RecordReader(tiny_copy, "train"), tiny_copy.root / "train-00000-of-00002.tfrecord"
    ids = np.arange(50)
    stride = dataset.longest(ids)
    out = np.empty(50 * stride, np.uint8)
    assert not dataset.gather(ids, out, stride).any()
    os.truncate(shard, int(tiny_copy.load_index("train")["offset"][10]))
    assert np.flatnonzero(dataset.gather(ids, out, stride)).tolist() == list(range(10, 25))
    what = "lies beyond the end of the shard, as the shard has changed since it was opened"
    for read in (dataset.jpeg, dataset.filename, dataset.record):
        with pytest.raises(CorruptRecord, match=f"{shard}: record 20 of train .* {what}"):
            read(20)
    assert dataset[30].tobytes() == jpeg(picture(30))


FAULT = """
import ctypes, faulthandler, mmap, os, signal, sys
from imagefeed import Dataset
{before}
Dataset(sys.argv[1], "train").jpeg(0)
{after}
with open(sys.argv[2], "w+b") as file:
    file.write(bytes(4096))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
    {fault}
print("lives")
"""


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("", "", "mapped[0]"),
        ("", "", "os.kill(os.getpid(), signal.SIGBUS)"),
        ("faulthandler.enable()", "", "mapped[0]"),
        ("", "faulthandler.enable(); Dataset(sys.argv[1], 'train').jpeg(0)", "mapped[0]"),
    ],
)
def test_a_bus_error_elsewhere_ends_the_process_as_without_us(tiny, tmp_path, before, after, fault):
    code = FAULT.format(before=before, after=after, fault=fault)
    process = subprocess.run([sys.executable, "-c", code, tiny.root, tmp_path / "x"], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (-signal.SIGBUS, "")
    assert ("Fatal Python error: Bus error" in process.stderr) == bool(before + after)


def test_a_shard_that_is_replaced_before_its_first_read_is_checked_as_at_the_opening(tiny_copy):
    path = tiny_copy.root / "train-00000-of-00002.tfrecord"
    for change in (lambda data: data, lambda data: data[::-1]):
        dataset = RecordReader(tiny_copy, "train")
        path.with_suffix(".new").write_bytes(change(path.read_bytes()))
        path.with_suffix(".new").replace(path)
        if change(b"ab") == b"ab":
            assert dataset[7].tobytes() == jpeg(picture(7))
    with pytest.raises(UserError, match=f"{path}: the shard is not the one that was packed, though as long"):
        dataset[7]


def test_a_shard_that_is_overwritten_while_it_is_mapped_says_so(tiny_copy):
    dataset, path = RecordReader(tiny_copy, "train"), tiny_copy.root / "train-00000-of-00002.tfrecord"
    dataset[7]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptRecord, match="record 7 of train .* its checksum, as the shard has changed since it was opened"):
        dataset[7]


@pytest.mark.parametrize("direct", [True, False])
def test_a_disk_that_fails_to_read_costs_single_records(tiny, tmp_path, direct):
    """With direct_io, the file system refuses shared maps."""
    row = tiny.load_index("train")[7]
    name = tiny.splits["train"].shards[0].name
    bad = int(row["offset"]), int(row["offset"]) + 1
    with faultyfs.mounted(tiny.root, tmp_path / "mount", direct=direct, eio={name: bad}) as mount:
        dataset = RecordReader(Manifest.load(mount), "train")
        ids = np.arange(50)
        stride = dataset.longest(ids)
        found = np.flatnonzero(dataset.gather(ids, np.empty(50 * stride, np.uint8), stride)).tolist()
        assert 7 in found and set(found) <= {6, 7}  # those with bytes in the page that fails
        with pytest.raises(CorruptRecord, match=rf"{name}: record 7 of train .* cannot be read \(input/output error\); check"):
            dataset[7]
        assert dataset[8].tobytes() == jpeg(picture(8))
        dataset.close()


def test_records_of_a_shard_that_cannot_be_mapped_are_read_from_its_file(tiny_copy):
    flip_bit(tiny_copy, "train", 30)
    dataset = RecordReader(tiny_copy, "train")
    dataset._shards._maps = {0: None, 1: None}  # as where mmap(2) or process_vm_readv(2) is refused
    out = np.zeros(50 * dataset.longest(np.arange(50)), np.uint8)
    dataset.will_need(np.arange(50))
    assert np.flatnonzero(dataset.gather(np.arange(50), out, len(out) // 50)).tolist() == [30]
    for record_id, row in enumerate(out.reshape(50, -1)):
        assert record_id == 30 or row.tobytes().startswith(jpeg(picture(record_id)))
    assert (dataset.filename(7), dataset.record(7).jpeg) == ("7.jpg", jpeg(picture(7)))
