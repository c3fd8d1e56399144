"""The table of docs/containers.md about the cost of opening a container, and of reading single records at random.

Records have 2,500 bytes. Times are CPU times of one process, with all files in the page cache.
"""

import random
import shutil
import time
from pathlib import Path

from tables.common import IMAGEFEED, INPUTS, Table
from tables.containers_order import STREAMING, streaming_module

NUMPY = "numpy==2.4.6"
SIZES = (10_000, 100_000, 1_281_167)
LENGTH, READS = 2500, 2000
heads = ["Reader", "us to read a record, of 10,000", "of 100,000", "of 1,281,167", "ms to open, 10,000", "100,000", "1,281,167"]
cost = Table("cost", heads, tolerance=0.6)
POOL = random.Random(0).randbytes(4_000_000)


def record(n):
    at = n * 7919 % (len(POOL) - LENGTH)
    return POOL[at : at + LENGTH]


def measured(write, opened, sizes=SIZES):
    """The cells of a container: `write(path, count)` makes it, and `opened(path)` gives a function that reads record n."""
    reads, opening = [], []
    for count in sizes:
        path = INPUTS / "cost"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        write(path, count)
        opened(path)(0)  # imports, and fills caches
        begun = time.process_time()
        read = opened(path)
        read(0)
        opening.append(1e3 * (time.process_time() - begun))
        numbers = random.Random(1).sample(range(count), READS)
        for n in numbers:
            read(n)  # pages are mapped, caches filled
        begun = time.process_time()
        for n in numbers:
            read(n)
        reads.append(1e6 * (time.process_time() - begun) / READS)
        assert bytes(read(7))[:LENGTH] == record(7) or opened.__name__ == "ours", "another record came"
        del read
    shutil.rmtree(INPUTS / "cost")
    missing = ["-"] * (len(SIZES) - len(sizes))
    shown = [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in reads]
    opened_ms = [f"{value:.0f}" if value >= 10 else "under 10" for value in opening]  # which vary by more than the tolerance
    return [*shown, *missing, *opened_ms, *missing]


@cost.add("LMDB, lmdb 3.0.0", ["lmdb==3.0.0"])
def lmdb():
    import lmdb

    def write(path, count):
        with lmdb.open(str(path), map_size=1 << 33) as store:
            for start in range(0, count, 10000):
                with store.begin(write=True) as transaction:
                    for n in range(start, min(start + 10000, count)):
                        transaction.put(b"%09d" % n, record(n), append=True)

    def opened(path):
        transaction = lmdb.open(str(path), readonly=True, lock=False, map_size=1 << 33).begin()
        return lambda n: transaction.get(b"%09d" % n)

    return measured(write, opened)


@cost.add("SQLite, rowid", [])
def sqlite():
    import sqlite3

    def write(path, count):
        with sqlite3.connect(path / "x.db") as base:
            base.execute("CREATE TABLE x (id INTEGER PRIMARY KEY, data BLOB)")
            base.executemany("INSERT INTO x VALUES (?, ?)", ((n, record(n)) for n in range(count)))

    def opened(path):
        base = sqlite3.connect(path / "x.db")
        return lambda n: base.execute("SELECT data FROM x WHERE id = ?", (n,)).fetchone()[0]

    return measured(write, opened)


@cost.add("datasets 5.2.0, Arrow", ["datasets==5.2.0", NUMPY], limit_s=1500)
def datasets():
    import datasets
    import pyarrow

    def write(path, count):
        from datasets.arrow_writer import ArrowWriter

        features = datasets.Features({"x": datasets.Value("binary")})
        with ArrowWriter(path=str(path / "x.arrow"), features=features) as writer:
            for start in range(0, count, 1000):
                chunk = [record(n) for n in range(start, min(start + 1000, count))]
                writer.write_table(pyarrow.table({"x": pyarrow.array(chunk, pyarrow.binary())}))
            writer.finalize()

    def opened(path):
        rows = datasets.Dataset.from_file(str(path / "x.arrow"))
        return lambda n: rows[n]["x"]

    return measured(write, opened)


@cost.add("Parquet, row groups of 1,000, pyarrow 26.0.1", ["pyarrow==26.0.1"], limit_s=1500)
def parquet():
    import pyarrow
    from pyarrow import parquet

    def write(path, count):
        options = {"compression": "none", "use_dictionary": False}
        with parquet.ParquetWriter(path / "x.parquet", pyarrow.schema({"x": pyarrow.binary()}), **options) as writer:
            for start in range(0, count, 1000):
                writer.write_table(pyarrow.table({"x": [record(n) for n in range(start, min(start + 1000, count))]}))

    def opened(path):
        file = parquet.ParquetFile(path / "x.parquet")
        return lambda n: file.read_row_group(n // 1000)["x"][n % 1000].as_py()

    return measured(write, opened)


@cost.add("h5py 3.16.0, variable length", ["h5py==3.16.0", NUMPY], limit_s=1500)
def h5py():
    import h5py
    import numpy as np

    def write(path, count):
        with h5py.File(path / "x.h5", "w") as file:
            kept = file.create_dataset("x", (count,), h5py.vlen_dtype(np.uint8))
            for n in range(count):
                kept[n] = np.frombuffer(record(n), np.uint8)

    def opened(path):
        kept = h5py.File(path / "x.h5")["x"]
        return lambda n: kept[n]

    return measured(write, opened, SIZES[:2])


@cost.add("Lance (pylance) 14.0.2", ["pylance==14.0.2", "pyarrow==26.0.1", NUMPY], limit_s=1500)
def lance():
    import lance
    import pyarrow

    schema = pyarrow.schema({"x": pyarrow.binary()})

    def write(path, count):
        def batches():
            for start in range(0, count, 1000):
                chunk = [record(n) for n in range(start, min(start + 1000, count))]
                yield pyarrow.record_batch([pyarrow.array(chunk, pyarrow.binary())], schema=schema)

        lance.write_dataset(batches(), str(path / "x.lance"), schema=schema)

    def opened(path):
        rows = lance.dataset(str(path / "x.lance"))
        return lambda n: rows.take([n])["x"][0].as_py()

    return measured(write, opened)


@cost.add("Streaming (MDS) 0.13.0", STREAMING, limit_s=1500)
def mosaic():
    streaming = streaming_module()

    def write(path, count):
        with streaming.MDSWriter(out=str(path), columns={"x": "bytes"}) as writer:
            for n in range(count):
                writer.write({"x": record(n)})

    def opened(path):
        rows = streaming.StreamingDataset(local=str(path), shuffle=False, batch_size=1)
        return lambda n: rows[n]["x"]

    return measured(write, opened)


@cost.add("array-record 0.8.6, group_size:1", ["array-record==0.8.6", "absl-py==2.3.1", "etils[epath]==1.13.0", NUMPY])
def array_record():
    from array_record.python import array_record_module as module

    def write(path, count):
        writer = module.ArrayRecordWriter(str(path / "x"), "group_size:1,uncompressed")
        for n in range(count):
            writer.write(record(n))
        writer.close()

    def opened(path):
        reader = module.ArrayRecordReader(str(path / "x"))
        return lambda n: reader.read([n])[0]

    return measured(write, opened, SIZES[:2])


@cost.add("zarr 3.1.6, a chunk a record, 1,000 a shard", ["zarr==3.1.6", NUMPY])
def zarr():
    import numpy as np
    import zarr

    def write(path, count):
        shape = {"shape": (count, LENGTH), "chunks": (1, LENGTH), "shards": (1000, LENGTH)}
        array = zarr.create_array(str(path / "x"), dtype="u1", compressors=None, **shape)
        for start in range(0, count, 1000):
            chunk = b"".join(record(n) for n in range(start, start + 1000))
            array[start : start + 1000] = np.frombuffer(chunk, np.uint8).reshape(1000, LENGTH)

    def opened(path):
        array = zarr.open_array(str(path / "x"), mode="r")
        return lambda n: array[n].tobytes()

    return measured(write, opened, SIZES[:1])


@cost.add("imagefeed, `Dataset.jpeg`, checksum verified", [IMAGEFEED])
def imagefeed_cells():
    """Shards of drawn noise, repeated as hard links: about as many records, of about 2,500 bytes."""
    import numpy as np
    from PIL import Image

    import imagefeed
    from benchmarks.data import stretch

    raw, packed = Path("raw/train/one"), Path("packed")
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(2500):
        Image.fromarray(rng.integers(0, 256, (44, 44, 3), np.uint8)).save(raw / f"{n:04d}.png")
    imagefeed.build("raw", packed, size=44, workers=1)

    def write(path, count):
        stretch(packed, path / "out", -(-count // 2500), linked=True)

    def ours(path):
        rows = imagefeed.Dataset(path / "out", "train")
        return rows.jpeg

    return measured(write, ours)
