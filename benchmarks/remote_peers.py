"""Reads the JPEGs of a dataset from a store as other libraries do, for benchmarks.remote; runs with the peers' Python alone.

    .venv-peers/bin/python benchmarks/remote_peers.py Streaming write|read FOLDER

"write" makes files of the library in FOLDER/bucket from FOLDER/bucket/data. "read" takes a shuffled epoch of s3://bucket in one
process, from an empty local cache, and prints what it took.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BATCH_SIZE = 128
CHUNK_BYTES = 64 << 20


def jpegs(folder: Path) -> Iterator[tuple[bytes, int]]:
    """The JPEGs and labels of the dataset, in stored order."""
    shards = [np.memmap(path, np.uint8, "r") for path in sorted((folder / "data").glob("train-*.tfrecord"))]
    for shard, offset, length, _, label in np.load(folder / "data" / "train.index.npy").tolist():
        yield shards[shard][offset : offset + length].tobytes(), label


class Streaming:
    """MDS shards of 64 MB, StreamingDataset with shuffle py1e and batch_size, else its defaults."""

    def write(self, folder: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"x": "bytes", "y": "int"}, size_limit=CHUNK_BYTES) as writer:
            for jpeg, label in jpegs(folder):
                writer.write({"x": jpeg, "y": label})

    def read(self, local: str) -> Iterator[bytes]:
        from streaming import StreamingDataset

        images = StreamingDataset(remote="s3://bucket/mds", local=local, shuffle=True, batch_size=BATCH_SIZE)
        for row in images:
            yield row["x"]


def sample(record: tuple[bytes, int]) -> dict:
    return {"x": record[0], "y": record[1]}


class LitData:
    """Chunks of 64 MB by optimize(), StreamingDataset with shuffle."""

    def write(self, folder: Path) -> None:
        import litdata

        out = str(folder / "litdata")
        litdata.optimize(sample, list(jpegs(folder)), out, chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False)

    def read(self, local: str) -> Iterator[bytes]:
        import litdata

        endpoint = {"endpoint_url": os.environ["S3_ENDPOINT_URL"]}
        images = litdata.StreamingDataset("s3://bucket/litdata", cache_dir=local, shuffle=True, storage_options=endpoint)
        for row in images:
            yield row["x"]


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    peer, what, folder = {"Streaming": Streaming, "LitData": LitData}[sys.argv[1]](), sys.argv[2], Path(sys.argv[3]) / "bucket"
    if what == "write":
        for name in ("mds", "litdata"):
            if name == {"Streaming": "mds", "LitData": "litdata"}[sys.argv[1]]:
                shutil.rmtree(folder / name, ignore_errors=True)
        peer.write(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        begun_s, begun_cpu_s, images, size = time.perf_counter(), None, 0, 0
        for jpeg in peer.read(local):
            if begun_cpu_s is None:  # what comes before is importing and opening
                begun_cpu_s = cpu_s()
            images += 1
            size += len(jpeg)
        taken_s = cpu_s() - (begun_cpu_s or 0.0)
        print(
            json.dumps({"cpu_s": taken_s, "wall_s": time.perf_counter() - begun_s, "images": images, "bytes": size}), flush=True
        )


if __name__ == "__main__":
    main()
