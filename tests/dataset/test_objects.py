"""Objects of a store: reading and writing, and each way in which a store fails."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import ObjectChanged, StoreError
from imagefeed.dataset.storage import Url, place, store_of

DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def stored(store_server, bucket):
    """The file of an object of DATA."""
    path = store_server.folder / bucket / "folder" / "x"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


def test_an_object_is_read_whole_and_in_parts(url):
    store = store_of(url)
    version = store.head(url)
    assert version.size == len(DATA) and version.etag
    assert store.get(url) == DATA
    for begin, end in ((0, 1), (5, 5), (0, len(DATA)), (1_000_000, 2_000_001), (len(DATA) - 1, None), (17, None)):
        assert store.get(url, begin, end) == store.get(url, begin, end, version) == DATA[begin:end]
    out = np.empty((2, 50_000), np.uint8)
    store.get_into(url, 1234, out, version)
    assert out.tobytes() == DATA[1234:101_234]
    with pytest.raises(StoreError, match="it has 3,000,000 bytes, so none up to 3,000,001"):
        store.get(url, 0, 3_000_001)


def test_many_requests_go_at_once(store_server, url):
    store_server.latency_s = 0.2
    begun = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda n: store_of(url).get(url, n, n + 1000), range(0, 32_000, 1000)))
    assert b"".join(found) == DATA[:32_000]
    assert time.monotonic() - begun < 5.5  # one after the other, 6.4 s
    counts = store_of(url).counts
    assert (counts.requests, counts.bytes, counts.in_flight) == (32, 32_000, 0) and counts.seconds > 6.4


def test_an_object_that_has_been_replaced_is_named(stored, url):
    version = store_of(url).head(url)
    for content in (DATA[::-1], DATA + b"1"):
        stored.write_bytes(content)
        with pytest.raises(ObjectChanged, match=f"{url}: the object has been replaced since it was opened"):
            store_of(url).get(url, 0, 10, version)


def test_a_web_server_without_etags_tells_of_a_replaced_object_by_its_time(store_server, bucket, stored):
    url = Url(f"{store_server.url}/{bucket}/folder/x")
    store = store_of(url)
    store_server.hidden = {"ETag"}
    version = store.head(url)
    assert version.etag and version.etag.startswith("modified 20") and store.get(url, 5, 10, version) == DATA[5:10]
    os.utime(stored, (1, 2_000_000_000))
    with pytest.raises(ObjectChanged):
        store.get(url, 5, 10, version)
    store_server.hidden = {"ETag", "Last-Modified"}
    version = store.head(url)
    assert version == (len(DATA), None) and store.get(url, 5, 10, version) == DATA[5:10]
    stored.write_bytes(DATA + b"1")
    with pytest.raises(ObjectChanged):
        store.get(url, 5, 10, version)


def test_objects_are_put_listed_and_deleted(store_server, bucket, stored, tmp_path):
    folder = place(f"s3://{bucket}/out")
    store = store_of(folder)
    (tmp_path / "file").write_bytes(DATA)
    for name, source in (("a b%#?.txt", b"abc"), ("sub/file", tmp_path / "file"), ("empty", b"")):
        version = store.put(folder / name, source)
        assert version == store.head(folder / name)
        assert store.get(folder / name) == (source if isinstance(source, bytes) else DATA)
    listed = dict(store.list(folder))
    assert {name: version.size for name, version in listed.items()} == {"a b%#?.txt": 3, "empty": 0, "sub/file": len(DATA)}
    assert listed["sub/file"] == store.head(folder / "sub/file")
    assert "folder/x" in dict(store.list(place(f"s3://{bucket}"))) and not list(store.list(place(f"s3://{bucket}/ou")))
    store.delete(folder / "empty")
    store.delete(folder / "empty")
    assert "empty" not in dict(store.list(folder))


def test_a_large_object_is_put_in_parts(store_server, bucket, tmp_path):
    path, url = tmp_path / "large", place(f"s3://{bucket}/large")
    with open(path, "wb") as file:
        file.truncate(66 << 20)
        file.write(b"begin")
    version = store_of(url).put(url, path)
    assert version == store_of(url).head(url) and version.size == 66 << 20
    stored = store_server.folder / bucket / "large"
    assert stored.read_bytes() == path.read_bytes()
    assert store_server.counts["PUT"] == 5 and store_server.counts["POST"] == 2


def test_a_list_of_many_pages_is_whole_though_a_page_fails(store_server, bucket):
    folder = store_server.folder / bucket / "many"
    folder.mkdir()
    for n in range(2100):
        (folder / f"{n:04}").touch()
    url = place(f"s3://{bucket}/many")
    names = store_of(url).list(url)
    assert next(names)[0] == "0000"
    store_server.fail("503")
    assert [name for name, _ in names] == [f"{n:04}" for n in range(1, 2100)]
    assert store_of(url).counts.retries == {"503": 1}


def test_a_plain_web_server_is_only_read(store_server):
    url = place(f"{store_server.url}/x")
    for act in (lambda: store_of(url).put(url, b""), lambda: store_of(url).delete(url), lambda: list(store_of(url).list(url))):
        with pytest.raises(UserError, match=rf"{url}: a plain web server cannot be \w+.*; give an s3://"):
            act()
