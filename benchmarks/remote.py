"""How fast does the loader read a dataset in an object store, beside a local one, the link and two peers?

    python -m benchmarks.remote DATASET [--rounds 3] [--peers .venv-peers/bin/python]     # results under "remote"

A store of our own on this machine, in a process of its own, adds 30 ms to each request; its answers share a link of 200 MB/s, or
one without a limit. It serves --records records of DATASET, repacked into shards of 4,096. Each measurement is a fresh process.
"plain" fetches the shards by as many requests at once as the loader, and does nothing with them.
"decoded" are float32 batches, "read" is what the loader does before decoding, checksums included: so the link is the limit of a
machine whose cores decode less than it carries. Times are of whole epochs, from the first request on; CPU time is that of the
loading process and its children, without the store's, which is reported beside.
"""

import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from benchmarks import harness
from benchmarks.data import repack
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split, hash_file
from imagefeed.dataset.records import INDEX_DTYPE, shard_name
from imagefeed.dataset.storage import Url, store_of
from imagefeed.pipeline.fetching import REQUESTS
from imagefeed.pipeline.loader import ImageLoader

LATENCY_S, LINK = 0.03, 200e6
BATCH_SIZE = 128
BLOCK_BYTES = 5_600_000
EPOCHS = 2
MANY, OF_A_SHARD, RECORD_BYTES = 10_000_000, 4096, 22_000  # of the large index
PEERS = ("Streaming", "LitData")
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
S3_KEYS |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def store(folder: Path, rate: float | None, latency_s: float = LATENCY_S) -> Iterator[tuple[str, subprocess.Popen]]:
    """The URL and the process of a store that serves FOLDER."""
    limited = ("--rate", rate) if rate else ()
    command = harness.python("tests.dataset.store_server", folder, "--latency", latency_s, *limited)
    process = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()


def cpu_s_of(process: subprocess.Popen) -> float:
    """CPU seconds that a running process has taken."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Peak:
    """The most memory that this process has held while it was looked at, without pages of files, which the kernel may drop."""

    def __init__(self):
        self.bytes, self.over = 0, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self.over.wait(0.05):
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


def measure(request: dict) -> dict:
    """Opens a loader and takes epochs; in a process of its own."""
    begun_s = time.perf_counter()
    options = request["options"]
    if request["what"] == "plain":
        return plain(request["where"])
    with ImageLoader(request["where"], "train", BATCH_SIZE, shuffle="blocks", **options) as loader:
        found = {"open_s": time.perf_counter() - begun_s, "first_s": None, "wall_s": [], "cpu_s": []}
        if request["what"] == "opened":
            return found
        peak, source = Peak(), loader.open_source() if request["what"] == "read" else None
        for _ in range(request["epochs"]):
            begun_s, begun_cpu_s = time.perf_counter(), cpu_s()
            for _ in range(len(loader)) if source else loader:
                if source:
                    source.next()
                if found["first_s"] is None:
                    found["first_s"] = time.perf_counter() - begun_s
            found["wall_s"].append(time.perf_counter() - begun_s)
            found["cpu_s"].append(cpu_s() - begun_cpu_s)
        peak.over.set()
        if source:
            source.close()
        return found | {"images": len(loader) * BATCH_SIZE, "memory_mb": peak.bytes / 1e6}


def plain(where: str) -> dict:
    """The shards by requests of a block's size, REQUESTS at once, into the same memory again and again."""
    found = []
    for shard in Manifest.load(where).split("train").shards:
        begins = range(0, shard.bytes, BLOCK_BYTES)
        found += [(Url(f"{where}/{shard.name}"), begin, min(BLOCK_BYTES, shard.bytes - begin)) for begin in begins]
    local = threading.local()

    def fetch(url: Url, begin: int, size: int) -> None:
        if not hasattr(local, "memory"):
            local.memory = np.empty(BLOCK_BYTES, np.uint8)
        store_of(url).get_into(url, begin, local.memory[:size])

    begun_s, begun_cpu_s = time.perf_counter(), cpu_s()
    with ThreadPoolExecutor(REQUESTS) as pool:
        for done in [pool.submit(fetch, *request) for request in found]:
            done.result()
    return {"wall_s": [time.perf_counter() - begun_s], "cpu_s": [cpu_s() - begun_cpu_s]}


def measured(where: str | Path, what: str, epochs: int = 1, **options) -> dict:
    request = {"where": str(where), "what": what, "epochs": epochs, "options": options}
    return json.loads(harness.call("benchmarks.remote", "--measure", json.dumps(request)).splitlines()[-1])


def large_index(dataset: Path, out: Path) -> Path:
    """A dataset of MANY records whose shards are holes: enough to open."""
    manifest = Manifest.load(dataset)
    out.mkdir(parents=True)
    index = np.zeros(MANY, INDEX_DTYPE)
    index["shard"], place = np.divmod(np.arange(MANY), OF_A_SHARD)
    index["offset"], index["length"] = place * RECORD_BYTES, RECORD_BYTES - 300
    count = -(-MANY // OF_A_SHARD)
    shards = []
    for number in range(count):
        records = min(OF_A_SHARD, MANY - number * OF_A_SHARD)
        shards.append(Shard(shard_name("train", number, count), records, records * RECORD_BYTES, f"{number:064x}"))
        with open(out / shards[-1].name, "wb") as file:
            file.truncate(records * RECORD_BYTES)
    counts = (MANY, *[0] * (len(manifest.classes) - 1))
    large = replace(manifest, root=out, splits={"train": Split(tuple(shards), counts)})
    np.save(large.index_path("train"), index)
    shutil.copy(dataset / STATISTICS, out)
    replace(large, files={name: hash_file(out / name) for name in ("train.index.npy", STATISTICS)}).save()
    return out


def rows(folder: Path, url: str, fast_url: str, kept: Path) -> dict[str, dict]:
    """A round: each row in a process of its own, and an empty cache for the row that fills it."""
    local, data = folder / "bucket" / "data", "bucket/data"
    shutil.rmtree(kept, ignore_errors=True)
    return {
        "local, decoded": measured(local, "decoded", EPOCHS),
        "link, decoded": measured(f"{url}/{data}", "decoded"),
        "fast link, decoded": measured(f"{fast_url}/{data}", "decoded"),
        "cache, decoded": measured(f"{fast_url}/{data}", "decoded", EPOCHS, cache_dir=str(kept)),
        "local, read": measured(local, "read", EPOCHS),
        "link, plain": measured(f"{url}/{data}", "plain"),
        "link, read": measured(f"{url}/{data}", "read"),
        "fast link, read": measured(f"{fast_url}/{data}", "read"),
    }


def compare(rounds: list[dict[str, dict]], size: int) -> dict:
    """Medians over rounds of ratios within each."""

    def middle(value) -> float:
        return statistics.median(value(row) for row in rounds)

    def cpu(row: dict, epoch: int = 0) -> float:
        return row["cpu_s"][epoch]

    local, read = "local, decoded", "local, read"
    return {
        "first batch, s": middle(lambda r: r["link, decoded"]["first_s"]),
        "opening, s": middle(lambda r: r["link, decoded"]["open_s"]),
        "cold epoch read / link": middle(lambda r: size / LINK / r["link, read"]["wall_s"][0]),
        "cold epoch read / plain requests": middle(lambda r: r["link, plain"]["wall_s"][0] / r["link, read"]["wall_s"][0]),
        "cold epoch decoded / link": middle(lambda r: size / LINK / r["link, decoded"]["wall_s"][0]),
        "cold epoch decoded, fast link / local": middle(lambda r: r[local]["wall_s"][1] / r["fast link, decoded"]["wall_s"][0]),
        "the same by CPU time": middle(lambda r: cpu(r[local], 1) / cpu(r["fast link, decoded"])),
        "second epoch from cache / local": middle(lambda r: r[local]["wall_s"][1] / r["cache, decoded"]["wall_s"][1]),
        "second epoch from cache / local, by CPU time": middle(lambda r: cpu(r[local], 1) / cpu(r["cache, decoded"], 1)),
        "read, fast link / local, by CPU time": middle(lambda r: cpu(r[read], 1) / cpu(r["fast link, read"])),
        "memory above local, MB": middle(lambda r: r["link, decoded"]["memory_mb"] - r[local]["memory_mb"]),
        "memory above local with cache_dir, MB": middle(lambda r: r["cache, decoded"]["memory_mb"] - r[local]["memory_mb"]),
    }


def against_peers(peers: str, folder: Path, rounds: int) -> dict:
    """CPU seconds of reading an epoch's JPEGs from an empty cache, of the loading process and of the store."""
    script, found = Path(__file__).with_name("remote_peers.py"), {}
    for peer in PEERS:
        done = subprocess.run([peers, script, peer, "write", folder], capture_output=True, text=True)
        if done.returncode:
            found[peer] = {"missing": (done.stderr.strip().splitlines() or ["it fails without a reason"])[-1][:200]}
    taken: dict[str, list[dict]] = {name: [] for name in ("imagefeed", *PEERS) if name not in found}
    with store(folder, LINK) as (url, process):
        for _ in range(rounds):
            for name in taken:
                served_s, begun_s = cpu_s_of(process), time.perf_counter()
                if name == "imagefeed":
                    row = measured(f"{url}/bucket/data", "read")
                    row = {"cpu_s": row["cpu_s"][0], "wall_s": row["wall_s"][0], "images": row["images"]}
                else:
                    environment = os.environ | S3_KEYS | {"AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
                    command = [peers, script, name, "read", folder]
                    done = subprocess.run(command, capture_output=True, text=True, env=environment)
                    if done.returncode:
                        found[name] = {"missing": (done.stderr.strip().splitlines() or ["it fails"])[-1][:200]}
                        continue
                    row = json.loads(done.stdout.splitlines()[-1])
                row |= {"store_cpu_s": cpu_s_of(process) - served_s, "process_s": time.perf_counter() - begun_s}
                taken[name].append(row)
                print(f"{name}: {row}", flush=True)
    ours = [1e6 * row["cpu_s"] / row["images"] for row in taken["imagefeed"]]
    for name, rows_ in taken.items():
        each = [1e6 * row["cpu_s"] / row["images"] for row in rows_]
        if each:
            found[name] = {
                "cpu_us_an_image": statistics.median(each),
                "store_cpu_us_an_image": statistics.median(1e6 * row["store_cpu_s"] / row["images"] for row in rows_),
                "wall_s": statistics.median(row["wall_s"] for row in rows_),
                "times_imagefeed": statistics.median(a / b for a, b in zip(each, ours, strict=True)),
            }
    return found


def opening(dataset: Path, folder: Path, rounds: int) -> dict:
    """Seconds to open MANY records, local and remote, and what the link takes for the index."""
    large = large_index(dataset, folder / "bucket" / "large")
    size = sum((large / name).stat().st_size for name in ("train.index.npy", STATISTICS, "dataset.json"))
    found: dict[str, list[float]] = {"local": [], "remote": []}
    with store(folder, LINK) as (url, _):
        for _ in range(rounds):
            for name, where in (("local", large), ("remote", f"{url}/bucket/large")):
                found[name].append(measured(where, "opened", verify_checksums=False)["open_s"])
    local, remote = (statistics.median(found[name]) for name in ("local", "remote"))
    allowed = 1.2 * local + 2 * LATENCY_S + size / LINK
    return {"records": MANY, "bytes": size, "local_s": local, "remote_s": remote, "remote / allowed": remote / allowed}


@click.command()
@click.argument("dataset", type=harness.EXISTING, required=False)
@harness.rounds_option(3)
@harness.FOLDER
@harness.PEERS
@click.option("--records", default=24_000, show_default=True)
@click.option("--only", type=click.Choice(["loader", "peers", "opening"]), help="One part alone.")
@click.option("--measure", "request", hidden=True)
def main(
    dataset: Path | None, rounds: int, folder: Path | None, peers: str, records: int, only: str | None, request: str | None
) -> None:
    """Read DATASET from a store on this machine."""
    if request:
        print(json.dumps(measure(json.loads(request))))
        return
    if dataset is None:
        raise click.UsageError("DATASET is missing")
    with harness.working_folder(folder) as work:
        data = work / "bucket" / "data"
        manifest = Manifest.load(data) if data.exists() else repack(dataset, data, records)
        size = manifest.split("train").bytes
        notes = harness.Notes("remote", "obstore", "torch", "numpy")
        notes["settings"] = {"records": records, "bytes": size, "rounds": rounds, "latency_s": LATENCY_S, "link": LINK}
        if only in (None, "loader"):
            with store(work, LINK) as (url, _), store(work, None) as (fast_url, _):
                taken = []
                for number in range(rounds):
                    taken.append(rows(work, url, fast_url, work / "kept"))
                    for name, row in taken[-1].items():
                        print(f"round {number + 1}: {name}: {row}", flush=True)
            notes["each"] = {name: [row[name] for row in taken] for name in taken[0]}
            notes["loader"] = compare(taken, size)
        if only in (None, "peers") and peers != sys.executable:
            notes["peers"] = against_peers(peers, work, rounds)
        if only in (None, "opening"):
            notes["opening"] = opening(dataset, work, rounds)


if __name__ == "__main__":
    main()
