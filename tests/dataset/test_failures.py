"""Each way in which a store fails: what is tried again, how that is counted, and the sentence when it is of no use."""

import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import ObjectChanged, StoreError
from imagefeed.dataset.storage import ObjectVersion, Url, store_of
from tests.dataset.store_server import StoreServer

DATA = np.random.default_rng(0).bytes(1_500_000)


@pytest.fixture
def stored(store_server, bucket):
    """The file of an object of DATA."""
    path = store_server.folder / bucket / "x"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("kind", "after", "counted"),
    [
        *((status, 0, status) for status in ("500", "502", "504")),
        ("refused", 0, "reset"),
        ("reset", 0, "reset"),
        ("reset", 600_000, "reset"),
        ("short", 600_000, "short"),
        ("short", 0, "short"),
        ("stall", None, "timeout"),
        ("stall", 600_000, "timeout"),
    ],
)
def test_a_request_that_fails_is_tried_again_where_it_ended(store_server, url, kind, after, counted, monkeypatch):
    if kind == "stall":
        monkeypatch.setenv("IMAGEFEED_STORE_TIMEOUT", "0.4")
    store = store_of(url)
    version = store.head(url)
    for begin, end in ((1000, 1_400_000),) if kind == "stall" else ((0, len(DATA)), (1000, 1_400_000)):
        store_server.requests.clear()
        store_server.fail(kind, after=after, times=2)
        assert store.get(url, begin, end, version) == DATA[begin:end]
        ranges = [request.headers["range"] for request in store_server.requests]
        assert len(ranges) == 3
        came = [int(given.removeprefix("bytes=").split("-")[0]) - begin for given in ranges]
        assert came[0] == 0 and (came[1] > 300_000) == (came[2] > came[1]) == bool(after)
    assert (
        store.counts.retries == {counted: 2 if kind == "stall" else 4}
        and store.counts.waited_s > 0
        and store.counts.in_flight == 0
    )


def test_a_file_that_is_read_whole_goes_on_where_it_ended(store_server, s3):
    store_server.fail("reset", after=700_000)
    assert store_of(s3).get(s3) == DATA
    first, second = (request.headers for request in store_server.requests)
    assert "range" not in first and second["range"].endswith(f"-{len(DATA) - 1}") and second["if-match"]


@pytest.mark.parametrize("method", ["HEAD", "PUT"])
def test_other_requests_are_tried_again_too(store_server, s3, method):
    store = store_of(s3)
    for kind in ("503", "refused"):
        store_server.fail(kind, method=method, times=2)
        assert (store.head(s3) if method == "HEAD" else store.put(s3, DATA)).size == len(DATA)
    assert store.counts.retries == {"503": 2, "reset": 2}


def test_a_busy_store_is_asked_again_when_it_says(store_server, url):
    date = url.scheme == "http"
    when = formatdate(time.time() + 2, usegmt=True) if date else "1"
    begun = time.time()
    store_server.fail("503", times=2, retry_after=when)
    assert store_of(url).get(url, 0, 10) == DATA[:10]
    assert 1 <= time.time() - begun < 8
    assert store_server.counts["GET"] == 3  # one more asks when, as obstore hides it
    assert store_of(url).counts.retries == {"503": 1}


def test_a_busy_store_that_does_not_say_when_is_asked_once(store_server, s3):
    store_server.fail("503", times=4)
    store_of(s3).get(s3, 0, 10)
    assert store_of(s3).tells_when is False and store_server.counts["GET"] == 5


def test_a_store_that_is_busy_for_longer_than_the_limit_is_not_waited_for(store_server, s3):
    begun = time.monotonic()
    store_server.fail("429", times=2, retry_after="3600")
    with pytest.raises(StoreError, match=f"^{s3}: the store answers 429 Error, and asks to wait 3,600 s; check the network"):
        store_of(s3).get(s3)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("503", r"answers 503 SlowDown \(\d+ times in \d s\); check the network and the store, then run the same command again"),
        ("reset", r"ends connections before the answer is complete \(\d+ times in \d s\); check the network"),
        ("short", r"sends fewer bytes than it says \(\d+ times in \d s\)"),
        ("stall", r"does not answer in time \(\d times in \d s\)"),
    ],
)
def test_there_is_a_limit_to_trying(store_server, s3, kind, sentence, monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_TIMEOUT", "0.4" if kind == "stall" else "5")
    monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", "1")
    store_server.fail(kind, times=1000)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=f"^{s3}: the store {sentence}"):
        store_of(s3).get(s3, 0, 100)
    assert time.monotonic() - begun < 5
    assert 2 <= sum(store_of(s3).counts.retries.values()) < 10


def test_a_store_that_fails_for_long_is_mentioned(store_server, s3, caplog, monkeypatch):
    monkeypatch.setattr("imagefeed.dataset.failures.SAY_AFTER_S", 0.2)
    store_server.fail("500", times=4)
    store_of(s3).get(s3)
    assert f"{s3.root}: the store answers 500 Error; trying again for up to 10 s" in caplog.text


def test_the_limit_counts_from_the_last_byte(store_server, s3):
    """A slow network that breaks every connection still brings all bytes."""
    store_server.fail("reset", times=12, after=300_000)
    data = DATA * 3
    (store_server.folder / s3.root[5:] / "x").write_bytes(data)
    assert store_of(s3).get(s3) == data
    assert store_of(s3).counts.retries["reset"] > 10


def test_a_process_does_not_end_later_because_a_store_fails(store_server, s3):
    """Threads that wait to ask again would keep it."""
    store_server.fail("500", times=1000)
    code = f"""
import time
from concurrent.futures import ThreadPoolExecutor
from imagefeed.dataset.storage import place, read_bytes
pool = ThreadPoolExecutor(4)
for _ in range(4):
    pool.submit(read_bytes, place({str(s3)!r}))
time.sleep(1)
raise KeyboardInterrupt
"""
    begun = time.monotonic()
    environment = os.environ | {"IMAGEFEED_STORE_LIMIT": "60"}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=50)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("kind", ["whole", "wide"])
def test_a_whole_answer_to_a_range_is_cut(store_server, url, caplog, kind):
    store = store_of(url)
    store_server.fail(kind, times=100)
    assert store.get(url, 600_000, 600_010) == DATA[600_000:600_010]
    out = np.empty(1_000_000, np.uint8)
    store.get_into(url, 17, out)
    assert out.tobytes() == DATA[17:1_000_017]
    assert store.counts.retries == {"whole": 2}
    assert caplog.messages == [f"{url.root}: the store answers requests for parts with whole objects, which takes longer"]


def test_an_object_that_is_absent_or_replaced_is_not_asked_for_again(store_server, url, stored):
    store = store_of(url)
    version = store.head(url)
    with pytest.raises(FileNotFoundError):
        store.get(url.parent / "absent")
    with pytest.raises(ObjectChanged):
        store.get(url, 0, 5, version._replace(etag='"other"'))
    store_server.fail("reset", after=700_000)
    stored.write_bytes(DATA[::-1])
    with pytest.raises(ObjectChanged):
        store.get(url, 0, len(DATA), ObjectVersion(len(DATA), version.etag))
    assert not store.counts.retries


def test_expired_credentials_are_read_anew(store_server, s3, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = x\naws_session_token = y\n")
    store = store_of(s3)
    assert store.get(s3) == DATA
    store_server.fail("expired", times=1000, method="*", keys="old")
    with pytest.raises(StoreError, match=f"^{s3}: the store answers 403 ExpiredToken: the credentials have expired; renew them"):
        store.get(s3)
    assert store_server.counts["fault expired"] == 2 and store.counts.retries == {"credentials": 1}
    file.write_text("[default]\naws_access_key_id = new\naws_secret_access_key = x\n")
    assert store.get(s3) == DATA and store.head(s3).size == len(DATA)
    assert store_server.counts["fault expired"] == 3 and store.counts.retries == {"credentials": 2}


def test_the_keys_of_a_profile_are_used(store_server, s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    for name in ("config", "credentials"):
        monkeypatch.setenv("AWS_CONFIG_FILE" if name == "config" else "AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / name))
    (tmp_path / "config").write_text(f"[profile me]\nregion = eu-west-1\nendpoint_url = {store_server.url}\n")
    (tmp_path / "credentials").write_text("[default]\n[me]\naws_access_key_id = mine\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match="^AWS_PROFILE is nobody, which is neither in"):
        store_of(s3)
    monkeypatch.setenv("AWS_PROFILE", "me")
    assert store_of(s3).get(s3) == DATA
    signed = store_server.requests[-1].headers["authorization"]
    assert "Credential=mine/" in signed and "/eu-west-1/s3/" in signed


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("skewed", "says that this machine's clock is off by minutes; set the clock"),
        ("403", "answers 403 Error: access is denied; check the credentials and the URL: some stores say so of objects"),
        ("401", "answers 401 Error: access is denied"),
        ("region", "says that the bucket is in another region; set AWS_REGION to eu-west-1"),
        ("301", "says that the bucket is in another region; set AWS_REGION to the bucket's"),
        ("400", "answers 400 Error; check the URL and the endpoint"),
    ],
)
def test_a_refusal_is_said_at_once(store_server, s3, kind, sentence):
    for ask in (store_of(s3).get, store_of(s3).head):
        store_server.fail(kind, times=10, method="*")
        with pytest.raises(StoreError, match=f"^{s3}: the store {sentence}"):
            ask(s3)
        store_server.faults.clear()


def test_without_credentials_it_says_so(store_server, s3, monkeypatch):
    """Asked last is the address that tells machines of a cloud theirs."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    with pytest.raises(StoreError, match=f"^{s3.root}: there are no credentials; set them in the environment"):
        store_of(s3)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", store_server.url)
    with pytest.raises(StoreError, match=f"^{s3}: the store cannot be asked without credentials; set them in the"):
        store_of(s3).get(s3)


def test_public_objects_need_no_credentials(store_server, s3, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    store_server.fail("503")
    assert store_of(s3).get(s3) == DATA
    assert all("authorization" not in request.headers for request in store_server.requests)


def test_a_server_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = Url(f"http://127.0.0.1:{port}/x")
    with pytest.raises(StoreError, match=rf"^{url}: the store cannot be reached \(\d+ times in \d s\); check the endpoint"):
        store_of(url).get(url)
    assert set(store_of(url).counts.retries) == {"connect"}


def test_a_server_that_does_not_accept_connections_has_timed_out():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        url = Url(f"http://127.0.0.1:{server.getsockname()[1]}/x")
        with socket.create_connection(server.getsockname()), pytest.MonkeyPatch.context() as patch:  # the queue is full
            patch.setenv("IMAGEFEED_STORE_TIMEOUT", "0.3")
            patch.setenv("IMAGEFEED_STORE_LIMIT", "1")
            with pytest.raises(StoreError, match="the store (cannot be reached|does not answer in time)"):
                store_of(url).get(url)
    assert sum(store_of(url).counts.retries.values()) >= 1


def test_a_name_that_does_not_resolve_is_said(monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", "1")
    url = Url("http://store.invalid/x")  # RFC 6761: never resolves
    with pytest.raises(StoreError, match=rf"^{url}: the store has a name that cannot be resolved .*; check the endpoint and"):
        store_of(url).get(url)
    assert store_of(url).counts.retries["dns"] >= 1


def test_a_certificate_must_be_trusted(tmp_path, bucket, stored):
    """SSL_CERT_FILE names those that are, here the server's own. Both clients, obstore's and ours, ask for it."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -addext subjectAltName=IP:127.0.0.1 -addext"
    try:
        files = "basicConstraints=CA:FALSE", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    (tmp_path / "both").write_bytes((tmp_path / "key").read_bytes() + (tmp_path / "certificate").read_bytes())
    with StoreServer(stored.parent.parent, certificate=tmp_path / "both") as server:
        url = Url(f"{server.url}/{bucket}/x")
        with pytest.raises(
            StoreError, match=rf"^{url}: the store has no certificate that this machine trusts \(UnknownIssuer\); set"
        ):
            store_of(url).get(url)
        assert not store_of(url).counts.retries
        code = f"from imagefeed.dataset.storage import *; url = place({str(url)!r}); "
        code += "print(len(read_bytes(url)), store_of(url).counts.waited_s)"
        server.fail("503", times=2, retry_after="1")
        environment = os.environ | {"SSL_CERT_FILE": str(tmp_path / "certificate")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout.split() == [str(len(DATA)), "1.0"], done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_limits_are_checked(value, monkeypatch):
    monkeypatch.setenv("IMAGEFEED_STORE_LIMIT", value)
    with pytest.raises(UserError, match=f"^IMAGEFEED_STORE_LIMIT is '{value}', which is no number of seconds above 0"):
        store_of(Url(f"s3://limit{value}"))


def test_every_byte_is_right_whatever_fails(store_server, s3):
    """Many threads read parts while requests fail at random; an object is put in between."""
    chance, store = random.Random(0), store_of(s3)
    version = store.head(s3)
    kinds = ("reset", "short", "wide", "whole", "refused", "500", "503", "429")
    for _ in range(150):
        method = "*" if (kind := chance.choice(kinds)) in ("refused", "500", "503", "429") else "GET"
        store_server.fail(kind, method=method, after=chance.randrange(0, 600_000, 1000))
    chance.shuffle(store_server.faults)

    def read(number: int) -> bool:
        begin, end = sorted((number * 7919 % len(DATA), number * 104_729 % len(DATA)))
        if number % 10 == 0:
            store.put(s3.parent / f"copy{number}", DATA[begin:end])
            return store.get_whole(s3.parent / f"copy{number}").tobytes() == DATA[begin:end]
        out = np.empty(end - begin, np.uint8)
        store.get_into(s3, begin, out, version)
        return out.tobytes() == DATA[begin:end]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(1, 161)))
    assert store.counts.in_flight == 0 and sum(store.counts.retries.values()) > 100
    assert not any(fault.times for fault in store_server.faults)
