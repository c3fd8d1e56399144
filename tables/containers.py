"""docs/containers.md: how containers and loaders treat damage, ranks and resuming, and what they cost.

Ten records of 20,000 bytes, of which record 5 has a byte flipped in its payload, are read by each library with its defaults.
"""

import io
import os
import struct
import tarfile
from pathlib import Path

from tables import containers_cost, containers_order, containers_resume, containers_tars
from tables.common import IMAGEFEED, INPUTS, Page
from tables.containers_inputs import FLIPPED, LENGTH, RECORDS, flip, payload, read_all, write_inputs
from tables.containers_order import STREAMING, streaming_module

NUMPY = "numpy==2.4.6"


page = Page("containers", [IMAGEFEED], write_inputs)
flipped = page.table("flipped", ["Reader", "record 5, of which a bit is flipped", "checksums in the file"])


@flipped.add("TensorFlow 2.21.0, TFRecordDataset", ["tensorflow-cpu==2.21.0", NUMPY])
def tensorflow():
    import tensorflow as tf

    def rows():
        for row in tf.data.TFRecordDataset(str(INPUTS / "x.tfrecord")):
            yield tf.io.parse_single_example(row, {"x": tf.io.FixedLenFeature([], tf.string)})["x"].numpy()

    return [read_all(rows), "CRC-32C of each record"]


@flipped.add("tfrecord 1.14.6 (PyTorch)", ["tfrecord==1.14.6", NUMPY])
def tfrecord():
    from tfrecord.reader import tfrecord_loader

    path = str(INPUTS / "x.tfrecord")
    return [read_all(lambda: (row["x"] for row in tfrecord_loader(path, None, {"x": "byte"}))), "the same"]


@flipped.add("DALI 2.4.0, readers.tfrecord", [IMAGEFEED])
def dali():
    import numpy as np
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.tfrecord import FixedLenFeature, string

    path = INPUTS / "x.tfrecord"
    data, at, index = path.read_bytes(), 0, []
    while at < len(data):
        length = struct.unpack_from("<Q", data, at)[0] + 16
        index.append(f"{at} {length}\n")
        at += length
    Path("x.idx").write_text("".join(index))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipe():
        return fn.readers.tfrecord(path=str(path), index_path="x.idx", features={"x": FixedLenFeature((), string, "")})["x"]

    made = pipe()
    made.build()
    return [read_all(lambda: [np.array(made.run()[0][0]).tobytes() for _ in range(RECORDS)]), "the same"]


@flipped.add("array-record 0.8.6", ["array-record==0.8.6", "absl-py==2.3.1", "etils[epath]==1.13.0", NUMPY])
def array_record():
    from array_record.python import array_record_module as module

    writer = module.ArrayRecordWriter("x.array_record", "group_size:1,uncompressed")
    for n in range(RECORDS):
        writer.write(payload(n))
    writer.close()
    flip(".")
    reader = module.ArrayRecordReader("x.array_record")
    return [read_all(lambda: [reader.read([n])[0] for n in range(RECORDS)]), "a hash of each chunk"]


@flipped.add("Streaming (MDS) 0.13.0", STREAMING)
def mosaic():
    streaming = streaming_module()

    with streaming.MDSWriter(out="mds", columns={"x": "bytes"}, hashes=["sha1"]) as writer:
        for n in range(RECORDS):
            writer.write({"x": payload(n)})
    flip("mds")
    dataset = streaming.StreamingDataset(local="mds", shuffle=False, batch_size=1)
    return [read_all(lambda: [dataset[n]["x"] for n in range(RECORDS)]), "hashes of shards, if asked for"]


@flipped.add("LitData 0.2.76", [IMAGEFEED, "litdata==0.2.76"])
def litdata():
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    os.mkdir("lit")
    cache = Cache("lit", chunk_bytes="64MB")
    for n in range(RECORDS):
        cache[n] = payload(n)
    cache.done()
    cache.merge()
    flip("lit")
    dataset = StreamingDataset("lit")
    return [read_all(lambda: [dataset[n] for n in range(RECORDS)]), "none"]


@flipped.add("Lance (pylance) 14.0.2", ["pylance==14.0.2", "pyarrow==26.0.1", NUMPY])
def lance():
    import lance
    import pyarrow

    lance.write_dataset(pyarrow.table({"x": [payload(n) for n in range(RECORDS)]}), "x.lance")
    flip("x.lance")
    return [read_all(lambda: lance.dataset("x.lance").to_table()["x"].to_pylist()), "none (read)"]


@flipped.add("Parquet, pyarrow 26.0.1", ["pyarrow==26.0.1"])
def parquet():
    return parquet_with()


@flipped.add("the same, page checksums written and verified", ["pyarrow==26.0.1"])
def parquet_verified():
    return parquet_with(write_page_checksum=True)


def parquet_with(**options):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"x": [payload(n) for n in range(RECORDS)]})
    parquet.write_table(table, "x.parquet", compression="none", use_dictionary=False, **options)
    flip(".")
    read = {"page_checksum_verification": True} if options else {}
    return [read_all(lambda: parquet.read_table("x.parquet", **read)["x"].to_pylist()), "CRC-32 of pages, if asked for"]


@flipped.add("datasets 5.2.0, Arrow", ["datasets==5.2.0", NUMPY])
def datasets():
    import datasets

    datasets.Dataset.from_dict({"x": [payload(n) for n in range(RECORDS)]}).save_to_disk("arrow")
    flip("arrow")
    return [read_all(lambda: [row["x"] for row in datasets.load_from_disk("arrow")]), "none"]


@flipped.add("webdataset 1.0.2, tar", ["webdataset==1.0.2", NUMPY])
def webdataset():
    import webdataset

    with tarfile.open("x.tar", "w") as tar:
        for n in range(RECORDS):
            member = tarfile.TarInfo(f"{n:03d}.bin")
            member.size = LENGTH
            tar.addfile(member, io.BytesIO(payload(n)))
    flip(".")
    return [read_all(lambda: [row["bin"] for row in webdataset.WebDataset("x.tar", shardshuffle=False)]), "of headers only"]


@flipped.add("lmdb 3.0.0", ["lmdb==3.0.0"])
def lmdb():
    import lmdb

    with lmdb.open("lmdb") as store, store.begin(write=True) as transaction:
        for n in range(RECORDS):
            transaction.put(b"%03d" % n, payload(n))
    flip("lmdb")

    def read():
        with lmdb.open("lmdb", readonly=True) as store, store.begin() as transaction:
            return [bytes(value) for _, value in transaction.cursor()]

    return [read_all(read), "none"]


@flipped.add("zarr 3.1.6, sharded, default codecs", ["zarr==3.1.6", NUMPY])
def zarr():
    import numpy as np
    import zarr

    array = zarr.create_array(
        "x.zarr", shape=(RECORDS, LENGTH), dtype="u1", chunks=(1, LENGTH), shards=(RECORDS, LENGTH), compressors=None
    )
    array[:] = np.stack([np.frombuffer(payload(n), np.uint8) for n in range(RECORDS)])
    flip("x.zarr")
    return [
        read_all(lambda: [zarr.open_array("x.zarr", mode="r")[n].tobytes() for n in range(RECORDS)]),
        "CRC-32C of the index only",
    ]


@flipped.add("h5py 3.16.0, default", ["h5py==3.16.0", NUMPY])
def h5py():
    return hdf5()


@flipped.add("the same, fletcher32=True", ["h5py==3.16.0", NUMPY])
def h5py_checked():
    return hdf5(chunks=(1, LENGTH), fletcher32=True)


def hdf5(**options):
    import h5py
    import numpy as np

    with h5py.File("x.h5", "w") as file:
        data = np.stack([np.frombuffer(payload(n), np.uint8) for n in range(RECORDS)])
        file.create_dataset("x", data=data, **options)
    flip(".")
    with h5py.File("x.h5") as file:
        return [read_all(lambda: [file["x"][n].tobytes() for n in range(RECORDS)]), "Fletcher-32 of chunks, if asked for"]


@flipped.add("imagefeed, `Dataset`", [IMAGEFEED])
def ours():
    import numpy as np
    from PIL import Image

    import imagefeed

    raw = Path("raw/train/one")
    raw.mkdir(parents=True)
    for n in range(RECORDS):
        pixels = np.frombuffer(payload(n)[:12288], np.uint8).reshape(64, 64, 3)
        Image.fromarray(pixels).save(raw / f"{n}.png")
    imagefeed.build("raw", "out", size=64, workers=1)
    dataset = imagefeed.Dataset("out", "train")
    flip("out", dataset.jpeg(FLIPPED).tobytes()[600:650])
    try:
        [dataset.jpeg(n) for n in range(RECORDS)]
    except imagefeed.UserError as error:
        return [f"error: {type(error).__name__}, which names it", "CRC-32C of each record"]
    return ["no error", ""]


page.tables += [containers_tars.tars, containers_order.ranks, containers_resume.resuming, containers_cost.cost]
