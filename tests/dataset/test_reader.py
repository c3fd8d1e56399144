import gc
import io
import os
import pickle
import re

import numpy as np
import nvidia.dali.tfrecord as tfrecord
import pytest
from nvidia.dali import Pipeline, fn
from PIL import Image

from imagefeed.dataset import gather
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.reader import CorruptRecord, Dataset, RecordReader
from imagefeed.dataset.records import INDEX_DTYPE, index_name
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


def test_record_is_a_readonly_view_of_the_map(tiny):
    dataset = RecordReader(tiny, "train")
    view = dataset[3]
    assert view.dtype == np.uint8 and not view.flags.writeable
    assert np.shares_memory(view, dataset[3])


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


def test_view_outlives_the_dataset_and_the_map_goes_with_it(tiny):
    dataset = RecordReader(tiny, "train")
    view = dataset[7]
    dataset.close()
    del dataset
    gc.collect()
    assert view.tobytes() == jpeg(picture(7))
    del view
    gc.collect()
    assert mapped(tiny) == set()


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
        with pytest.raises(ValueError, match="not mapped, or the sizes of the arrays do not match"):
            gather.gather(rows, bases, np.empty(room, np.uint8), stride, False, np.empty(bad, bool))
    rows["shard"] = 0
    with pytest.raises(ValueError, match="not mapped"):
        gather.gather(rows, np.zeros(1, np.int64), np.empty(8, np.uint8), 4, False, np.empty(2, bool))
    out = np.empty(8, np.uint8)
    gather.gather(rows, bases, out, 4, False, np.empty(2, bool))
    assert out.tolist() == [0, 1, 2, 3] * 2
