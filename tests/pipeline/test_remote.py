"""A loader over a dataset in a store: the same batches as from a local one, whatever store and cache do."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imagefeed.dataset.blocks import Block
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import ObjectChanged
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import Dataset
from imagefeed.pipeline import plan as planning
from imagefeed.pipeline import schedule as scheduling
from imagefeed.pipeline.fetching import Held
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler.measure import profile
from imagefeed.pipeline.schedule import Need
from tests.conftest import jpeg, pack, picture

RECORDS = 203


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Manifest:
    """Records of one block are in several of its shards."""
    jpegs = {"train": [jpeg(picture(seed, 64, 64)) for seed in range(RECORDS)]}
    jpegs["val"] = [jpeg(picture(1000 + seed, 64, 64)) for seed in range(31)]
    return pack(tmp_path_factory.mktemp("packed") / "data", jpegs, shards=5, size=64)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 records and windows of 4 blocks, so that few records have many of them."""
    for module, name, value in (
        (planning, "BLOCK", 8), (planning, "WINDOW", 32), (scheduling, "BLOCK", 8), (scheduling, "MEMORY_BLOCKS", 8),
        (scheduling, "FEW_BLOCKS", 3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("imagefeed.pipeline.fetching._said", set())
    monkeypatch.setattr("imagefeed.pipeline.fetching.BLOCK", 8)
    monkeypatch.setattr("imagefeed.pipeline.fetching.MEMORY_BLOCKS", 8)
    monkeypatch.setattr("imagefeed.dataset.blocks.GAP_BYTES", 1 << 12)  # three records
    planning.epoch_order.cache_clear()
    yield
    planning.epoch_order.cache_clear()


@pytest.fixture
def folder(packed, store_server, bucket) -> Path:
    """The dataset in the store."""
    return shutil.copytree(packed.root, store_server.folder / bucket / "data")


@pytest.fixture
def url(folder, store_server, bucket) -> str:
    return f"{store_server.url}/{bucket}/data"


def loader(dataset, split="train", batch_size=10, **options) -> ImageLoader:
    return ImageLoader(dataset, split, batch_size, crop_size=48, **options)


def content(batches) -> list[tuple]:
    return [(batch.ids.tolist(), batch.valid.tolist(), batch.images.numpy().tobytes()) for batch in batches]


def taken(dataset, epochs=2, **options) -> list[tuple]:
    """Every batch of some epochs."""
    with loader(dataset, **options) as opened:
        return [batch for _ in range(epochs) for batch in content(opened)]


def requested(store_server, suffix: str) -> int:
    return sum(request.method == "GET" and request.path.endswith(suffix) for request in store_server.requests)


def bytes_of(folder: Path) -> int:
    """As the file system has them; some may go meanwhile."""
    sizes = []
    for path in folder.glob("*.block"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


OPTIONS = [
    *({"shuffle": shuffle} for shuffle in ("blocks", "node-blocks", "global", "none")),
    {"views": "center"},
    {"views": "ten", "batch_size": 7},
    {"subset": list(range(3, RECORDS, 5))},
    {"subset": list(range(20, 90)), "shuffle": "node-blocks"},
    {"subset": ["ant"], "views": "center"},
    {"weights": "balanced"},
    {"weights": {"ant": 1, "bee": 5, "cat": 0}, "shuffle": "none"},
    {"rank": 1, "world_size": 2},
    {"rank": 2, "world_size": 3, "shuffle": "node-blocks"},
    {"rank": 1, "world_size": 2, "views": "center"},
    {"repeats": 2, "crops": 2},
    {"repeats": 2, "shuffle": "node-blocks"},
    {"batch_size": 50},
    {"cache": "host"},
    {"position": 13},
    {"read_ahead": 0, "shuffle": "global"},
    {"verify_checksums": False},
]
# With a cache too; the others differ in what has no part in it.
KEPT = [OPTIONS[number] for number in (0, 1, 2, 4, 6, 9, 11, 12, 17)]


@pytest.mark.parametrize(
    ("options", "cached"),
    [(options, "in memory") for options in OPTIONS] + [(options, kept) for options in KEPT for kept in ("on disk", "small")],
    ids=str,
)
def test_batches_are_those_of_a_local_dataset(packed, url, tmp_path, options, cached):
    size = packed.split("train").bytes
    kept = {"in memory": {}, "on disk": {"cache_dir": tmp_path / "kept"}, "small": {"cache_dir": tmp_path / "kept"}}[cached]
    if cached == "small":
        kept["cache_dir_bytes"] = size // 3
    local = {"shuffle": "blocks"} | options
    assert taken(url, **options, **kept) == taken(packed, **local)
    if cached == "small":
        assert bytes_of(tmp_path / "kept") <= size // 3


def test_blocks_is_the_shuffle_of_a_store(packed, url):
    with loader(url) as remote, loader(packed) as local:
        assert (remote.plan.shuffle, local.plan.shuffle) == ("blocks", "global")
        assert remote.state_dict()["identity"]["shuffle"] == "blocks"


def test_a_run_goes_on_from_a_store_and_back(packed, url):
    """With the same shuffle, and in the middle of an epoch."""
    wanted = taken(packed, shuffle="blocks")
    with loader(packed, shuffle="blocks") as local:
        batches = iter(local)
        found = content([next(batches) for _ in range(7)])
        state = local.state_dict()
    with loader(url) as remote:
        remote.load_state_dict(state)
        batches = iter(remote)
        found += content([next(batches) for _ in range(8)])
        state = remote.state_dict()
    with loader(packed, shuffle="blocks") as local:
        local.load_state_dict(state)
        found += [batch for _ in range(2) for batch in content(local)]
    assert found == wanted


def test_datasets_in_files_and_in_stores_are_joined(packed, tiny, url):
    for shuffle in ("blocks", "global"):
        assert taken([url, packed], shuffle=shuffle) == taken([packed, packed], shuffle=shuffle)
    assert taken({packed.root: 0.5, url: 0.5}) == taken({packed.root: 0.5, str(packed.root): 0.5}, shuffle="blocks")
    dataset = Dataset(url, "train")
    assert [dataset.filename(n) for n in (0, 77)] == ["0.jpg", "77.jpg"]


def test_single_images_are_read(packed, url):
    remote, local = Dataset(url, "val"), Dataset(packed, "val")
    for number in (0, 30, 7):
        assert remote.jpeg(number).tobytes() == local.jpeg(number).tobytes()
        assert remote.filename(number) == local.filename(number)


def test_a_small_dataset_is_fetched_once(packed, url, store_server):
    """It fits where two windows do."""
    subset = list(range(60))
    for shuffle in ("blocks", "global", "node-blocks", "none"):
        before = store_server.counts["bytes"]
        taken(url, 4, subset=subset, shuffle=shuffle, batch_size=5)
        size = packed.split("train").bytes * 60 / RECORDS
        index = sum((packed.root / name).stat().st_size for name in ("train.index.npy", "statistics.npz", "dataset.json"))
        assert store_server.counts["bytes"] - before - index < 1.35 * size  # the first batch's records come twice


def test_memory_holds_two_windows(url):
    with loader(url, batch_size=4) as opened:
        for _ in range(2):
            for _ in opened:
                held = opened._source._fetcher._held
                assert len(held) <= 8
        assert sum(len(memory) for memory in opened.reader.remote._memory._free) <= 8 << 20


def test_an_epoch_that_fits_into_the_cache_is_read_once(packed, url, store_server, tmp_path):
    first = taken(url, 1, cache_dir=tmp_path / "kept")
    assert packed.split("train").bytes * 0.9 < bytes_of(tmp_path / "kept") < packed.split("train").bytes
    before = requested(store_server, ".tfrecord")
    assert taken(url, 2, cache_dir=tmp_path / "kept")[: len(first)] == first
    assert taken(url, 2, cache_dir=tmp_path / "kept", shuffle="node-blocks") == taken(packed, 2, shuffle="node-blocks")
    assert taken(url, 2, cache_dir=tmp_path / "kept", shuffle="global") == taken(packed, 2)
    assert requested(store_server, ".tfrecord") == before


def test_the_cache_keeps_what_is_needed_soonest(url, store_server, tmp_path):
    """With room for half of the blocks, an epoch fetches little more than the other half: LRU would fetch all of them."""
    with loader(url, cache_dir=tmp_path / "kept", batch_size=8) as opened:
        size = sum(row["length"] for row in opened.reader.rows(np.arange(RECORDS))) + 300 * RECORDS
    requests = []
    with loader(url, cache_dir=tmp_path / "kept", cache_dir_bytes=int(size * 0.6), batch_size=8) as opened:
        for _ in range(6):
            before = store_server.counts["bytes"]
            for _ in opened:
                assert bytes_of(tmp_path / "kept") <= size * 0.6
            requests.append(store_server.counts["bytes"] - before)
    assert sum(requests[2:]) / 4 < 0.62 * size


def test_a_damaged_file_of_the_cache_is_fetched_again(packed, url, store_server, tmp_path, caplog):
    first = taken(url, 1, cache_dir=tmp_path / "kept")
    victims = sorted((tmp_path / "kept").glob("*.block"))[:3]
    damage(victims[0], 100)
    victims[1].write_bytes(victims[1].read_bytes()[:-7])
    victims[2].write_bytes(b"")
    assert taken(url, 1, cache_dir=tmp_path / "kept") == first
    before = requested(store_server, ".tfrecord")
    assert taken(url, 1, cache_dir=tmp_path / "kept") == first
    assert requested(store_server, ".tfrecord") - before <= 2  # the block of the flipped bit
    before = requested(store_server, ".tfrecord")
    assert taken(url, 1, cache_dir=tmp_path / "kept") == first
    assert requested(store_server, ".tfrecord") == before and not caplog.records


def test_a_full_disk_is_said_once(url, packed, tmp_path, caplog, monkeypatch):
    """As far as the loader sees: its writes fail."""
    import imagefeed.dataset.blockcache as blockcache

    def full(handle: int, memory: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blockcache, "write_all", full)
    assert taken(url, cache_dir=tmp_path / "kept") == taken(packed, shuffle="blocks")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{tmp_path / 'kept'}: blocks cannot be kept there (no space left on device)" in record.getMessage()
    assert not list((tmp_path / "kept").glob("*.block")) and not list((tmp_path / "kept").glob(".*.part"))


def test_a_cache_that_cannot_be_made_is_refused(packed, url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/kept: blocks cannot be kept there .*; give another folder as cache_dir"):
        loader(url, cache_dir=tmp_path / "file" / "kept")
    with pytest.raises(UserError, match="data: not in a store, so cache_dir would keep nothing; leave it out"):
        loader(packed, cache_dir=tmp_path / "kept")
    with pytest.raises(UserError, match="cache_dir_bytes is the room in cache_dir"):
        loader(url, cache_dir_bytes=10**9)


def take_all(url: str, kept: Path) -> None:
    """In a process of its own, and with blocks of the usual size."""
    taken(url, 2, cache_dir=kept)


def test_ranks_share_a_cache(packed, url, store_server, tmp_path):
    """Each block is fetched by one of them."""
    store_server.latency_s = 0.01
    # In threads: locks of files exclude each other in one process as well.
    with ThreadPoolExecutor(2) as pool:
        ranks = range(2)
        found = pool.map(lambda rank: taken(url, 2, cache_dir=tmp_path / "kept", rank=rank, world_size=2), ranks)
    for rank, batches in zip(ranks, found, strict=True):
        assert batches == taken(packed, 2, shuffle="blocks", rank=rank, world_size=2)
    shards = sum(path.stat().st_size for path in packed.root.glob("train*.tfrecord"))
    blocks = [request for request in store_server.requests if request.path.endswith(".tfrecord") and request.method == "GET"]
    assert bytes_of(tmp_path / "kept") < shards and len(blocks) < 1.6 * RECORDS / 8 + 2 * 2 * 10


def test_a_killed_process_leaves_nothing_in_the_way(packed, url, store_server, tmp_path):
    """It was fetching blocks, of which others go on to use those that were whole."""
    context = multiprocessing.get_context("spawn")
    store_server.rate = 40_000  # so that it is in the middle of some
    process = context.Process(target=take_all, args=(url, tmp_path / "kept"))
    process.start()
    until = time.monotonic() + 60
    while not list((tmp_path / "kept").glob(".*.part")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store_server.rate = None
    assert list((tmp_path / "kept").glob(".*.part"))
    assert taken(url, cache_dir=tmp_path / "kept") == taken(packed, shuffle="blocks")
    assert not list((tmp_path / "kept").glob(".*.part"))
    counted = int((tmp_path / "kept" / ".bytes").read_text())
    assert counted == bytes_of(tmp_path / "kept")


def test_a_shard_that_is_replaced_ends_the_epoch_with_its_name(folder, url):
    with loader(url, batch_size=4) as opened:
        batches = iter(opened)
        for _ in range(3):
            next(batches)
        for path in folder.glob("train*.tfrecord"):
            path.write_bytes(path.read_bytes())  # the same bytes, but another ETag
        with pytest.raises(ObjectChanged, match=r"train-0000\d-of-00005.tfrecord: the object has been replaced"):
            list(batches)


def test_a_shard_of_another_length_is_refused(folder, url):
    path = next(folder.glob("train-00002*.tfrecord"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00002-of-00005.tfrecord: the shard has [\d,]+ bytes, the manifest says"):
        taken(url)
    path.unlink()
    with pytest.raises(UserError, match="train-00002-of-00005.tfrecord: the shard is missing; upload it again"):
        taken(url)


def test_a_bad_record_is_fetched_once_more(url, packed, store_server, caplog):
    """A bit that the network flipped, and after that one that is wrong in the store."""
    store_server.fail("bit", times=3, name="train-00001-of-00005.tfrecord")
    assert taken(url, 1, batch_size=8) == taken(packed, 1, batch_size=8, shuffle="blocks")
    assert store_server.counts["fault bit"] == 3 and not caplog.records


def test_a_corrupt_record_is_replaced_and_named(url, folder, packed, caplog):
    local = Manifest.load(shutil.copytree(packed.root, folder.parent / "local"))
    _, offset, length, _, _ = local.load_index("train")[50].item()
    for root in (folder, local.root):
        damage(root / "train-00001-of-00005.tfrecord", offset + length // 2)
    with loader(url) as remote:
        found = content(remote)
        assert remote.corrupt_ids == {50}
    assert f"{url}/train-00001-of-00005.tfrecord: record 50 of train" in caplog.text
    assert found == taken(local, 1, shuffle="blocks")


def test_a_store_that_stumbles_is_asked_again(url, packed, store_server):
    for kind, options in (("503", {}), ("reset", {"after": 500}), ("short", {"after": 100}), ("500", {}), ("whole", {})):
        store_server.fail(kind, times=2, name=".tfrecord", **options)
    assert taken(url, 1) == taken(packed, 1, shuffle="blocks")
    assert all(not fault.times for fault in store_server.faults)


def test_a_store_that_fails_for_good_ends_the_epoch_in_one_sentence(url, store_server, monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", "0.5")
    with loader(url, batch_size=4) as opened:
        batches = iter(opened)
        next(batches)
        fault = store_server.fail("500", times=10**6, name=".tfrecord")
        with pytest.raises(UserError, match="the store .*500"):
            list(batches)
        fault.times = 0
        found = content([opened.batch_at(opened.position)])
    assert found == taken(url, 1, batch_size=4)[opened.position - 1 :][:1]  # and goes on where it was


def test_closing_does_not_wait_for_the_store(url, store_server):
    with loader(url, batch_size=4) as opened:
        next(iter(opened))
        store_server.fail("stall", times=10**6, name=".tfrecord", seconds=30)
        for fault in store_server.faults:
            fault.after = None
        opened.set_epoch(3)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2


def test_closing_ends_what_is_under_way(url, store_server, monkeypatch):
    """Over a slow link, blocks that nobody needs would hold up what comes next, and the end of the program."""
    for module in ("imagefeed.dataset.objects", "tests.dataset.store_server"):
        monkeypatch.setattr(f"{module}.PIECE", 1 << 10)
    with loader(url, batch_size=4) as opened:
        next(iter(opened))
        block, over = Block(opened.reader.rows(np.arange(RECORDS))), Future()
        store_server.rate = 50_000  # with which it takes 10 s
        opened.reader.remote.load(block, over.set_result)
        held = opened._source._fetcher._held
        held[()] = Held(Need(0, 0, 0), block, False)
        while not opened.reader.remote._pool._work_queue.empty():  # a request that has not begun is cancelled without a word
            time.sleep(0.01)
    assert "no longer wanted" in str(over.result(30))  # a block that came to its end gives None


@pytest.mark.parametrize("shuffle", ["blocks", "global"])
def test_ctrl_c_ends_a_loop_while_the_store_is_silent(url, store_server, shuffle, monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_TIMEOUT", "20")
    with loader(url, shuffle=shuffle) as opened:
        store_server.fail("stall", name=".tfrecord", after=None, times=1000, seconds=8)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            next(iter(opened))
        assert time.monotonic() - begun < 7
        store_server.faults.clear()
        assert len(next(iter(opened))[0]) == 10  # which begins at the same batch


def test_a_profile_names_the_store(url, store_server):
    store_server.latency_s = 0.05
    with loader(url, batch_size=10) as opened:
        found = profile(opened, lambda batch: time.sleep(0.001), seconds=1)
    cause = found.causes[0]
    assert cause.name == "store" and re.match(r"storage: \d+ ms a request, \d+ in flight, \d+ MB/s", cause.sentence)
    assert found.evidence.store_request_s >= 0.04
    assert "--cache-dir FOLDER" in {fix.option for fix in found.fixes}
    assert f"the limit is {cause.sentence}" in str(found)


def test_what_a_shuffle_of_all_records_costs_is_said_once(url, caplog, monkeypatch):
    monkeypatch.setattr(scheduling, "MEMORY_BLOCKS", 2)
    for _ in range(2):
        with loader(url, shuffle="global") as opened:
            next(iter(opened))
    (record,) = caplog.records
    assert f"{url}: shuffle global reads each record by a request of its own, 203 an epoch" in record.getMessage()


def test_the_traffic_of_a_loader_is_counted(packed, url, store_server):
    with loader(packed) as local:
        assert local.traffic is None
    with loader(url) as opened:
        before = opened.traffic
        list(opened)
        store_server.fail("503", name=".tfrecord")
        list(opened)
        found = opened.traffic.since(before)
    assert found["requests"] >= 27 and found["bytes"] > 0.9 * packed.split("train").bytes and found["ms_per_request"] > 0


def test_a_closed_loader_reads_again(packed, url):
    opened = loader(url, batch_size=8)
    first = content(opened)
    opened.close()
    opened.set_epoch(0)
    assert content(opened) == first == taken(packed, 1, batch_size=8, shuffle="blocks")
    copied = pickle.loads(pickle.dumps(opened))
    opened.close()
    with copied:
        assert content(copied) == taken(packed, 2, batch_size=8, shuffle="blocks")[len(first) :]


def test_an_evaluation_fetches_nothing_of_the_next_one(url, store_server):
    """But for the batches that are read ahead."""
    with loader(url, views="center", batch_size=5) as opened:
        list(opened)
        time.sleep(0.2)
        held = [held for held in opened._source._fetcher._held.values() if held.first >= len(opened)]
        assert len(held) <= 2
        assert len(list(opened)) == len(opened)


def test_a_forked_process_reads_for_itself(packed, url):
    """As the workers of a DataLoader do, after this one has read."""
    dataset = Dataset(url, "train")
    wanted = [Dataset(packed, "train").jpeg(number).tobytes() for number in range(6)]
    assert dataset.jpeg(0).tobytes() == wanted[0]
    inherited.append(dataset)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(inherited_jpeg, range(6)) == wanted


inherited: list[Dataset] = []


def inherited_jpeg(number: int) -> bytes:
    return inherited[-1].jpeg(number).tobytes()
