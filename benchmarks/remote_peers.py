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
from collections.abc import Iterable, Iterator
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

    files = "mds"

    def write(self, folder: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder), columns={"x": "bytes", "y": "int"}, size_limit=CHUNK_BYTES) as writer:
            for jpeg, label in jpegs(folder.parent):
                writer.write({"x": jpeg, "y": label})

    def opened(self, local: str) -> Iterable[dict]:
        from streaming import StreamingDataset

        return StreamingDataset(remote="s3://bucket/mds", local=local, shuffle=True, batch_size=BATCH_SIZE)


def sample(record: tuple[bytes, int]) -> dict:
    return {"x": record[0], "y": record[1]}


class LitData:
    """Chunks of 64 MB by optimize(), StreamingDataset with shuffle."""

    files = "litdata"

    def write(self, folder: Path) -> None:
        import litdata

        samples = list(jpegs(folder.parent))
        litdata.optimize(sample, samples, str(folder), chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False)

    def opened(self, local: str) -> Iterable[dict]:
        import litdata
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for an endpoint without TLS
        endpoint = {"endpoint_url": os.environ["S3_ENDPOINT_URL"]}
        return litdata.StreamingDataset("s3://bucket/litdata", cache_dir=local, shuffle=True, storage_options=endpoint)


def cpu_s() -> float:
    """CPU seconds of this process and of all that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(each.ru_utime + each.ru_stime for each in used)
    fields = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        fields[int(name.split()[0])] = rest.split()
    family = {os.getpid()}
    for pid in sorted(fields):
        if int(fields[pid][1]) in family:
            family.add(pid)
            total += sum(map(int, fields[pid][11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    peer, what, folder = {"Streaming": Streaming, "LitData": LitData}[sys.argv[1]](), sys.argv[2], Path(sys.argv[3]) / "bucket"
    if what == "write":
        shutil.rmtree(folder / peer.files, ignore_errors=True)
        peer.write(folder / peer.files)
        return
    with tempfile.TemporaryDirectory() as local:
        opened = peer.opened(local)
        begun_s, begun_cpu_s, images, size = time.perf_counter(), cpu_s(), 0, 0
        for row in opened:
            images += 1
            size += len(row["x"])
        found = {"cpu_s": cpu_s() - begun_cpu_s, "wall_s": time.perf_counter() - begun_s, "images": images, "bytes": size}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
