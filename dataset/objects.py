"""Reads and writes the objects of a store. The only module that imports obstore.

Each request is made once by obstore and again by us: it counts no retries, goes on at the first byte of a broken answer, and does
not see Retry-After (0.12).
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import HTTPStore, from_url

from imagefeed.dataset.answers import retry_after
from imagefeed.dataset.credentials import from_files, has_credentials, on
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import BUSY, Attempts, Failure, Policy, StoreCounts, StoreError, failure_of
from imagefeed.dataset.replies import (
    ShortAnswerError,
    check_version,
    is_not_partial,
    is_out_of_range,
    options_of,
    replaced,
    version_of,
)
from imagefeed.dataset.storage import HTTP, ObjectVersion, Url

T = TypeVar("T")
Wanted = Callable[[], bool]
# A broken answer goes on at the last piece that came whole. Pieces of 64 KB to 1 MB, and whole answers, take the same CPU time.
PIECE = 1 << 18
LARGE = 8 << 20
AT_ONCE = 8
MULTIPART = 64 << 20  # a larger object is put in parts
PART = 16 << 20
PARTS_AT_ONCE = 4
PUT_SILENCE_S = 300  # while a part goes up, no byte comes back
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
}


class Store:
    """A bucket, or a server over plain HTTP. For any number of threads at once; see failures.py for what is tried again.

    Errors: FileNotFoundError for an object that is not there, ObjectChanged for one that has been replaced, and StoreError.
    """

    def __init__(self, root: Url):
        self.root = root
        self.policy = Policy.of_environment()
        self.counts = StoreCounts()
        self.tells_when: bool | None = None  # whether it answers Retry-After; None until it is known
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._generation = 0  # of the credentials
        self._open()

    def _open(self) -> None:
        """Opens the bucket with the credentials that the environment has now."""
        self._reading = open_client(self.root, self.policy, self.policy.silence_s)
        self._writing = open_client(self.root, self.policy, max(self.policy.silence_s, PUT_SILENCE_S))

    def head(self, url: Url) -> ObjectVersion:
        """The version of an object."""

        def ask() -> ObjectVersion:
            try:
                return version_of(obstore.head(self._reading, url.key))
            except BaseError as error:
                if failure_of(error).retried:
                    raise
                # The answer to a HEAD has no body, which would say why.
                return version_of(obstore.get(self._reading, url.key, options={"range": (0, 1)}).meta)

        return self._retried(url, ask)

    def get(
        self, url: Url, begin: int = 0, end: int | None = None, version: ObjectVersion | None = None, wanted: Wanted | None = None
    ) -> bytes:
        """The bytes of an object from `begin` to `end`, or to its end, exactly; of that version if one is given. Raises
        StoreError once they are no longer `wanted`, which is asked for each piece."""
        if begin == end:
            return b""
        pieces: list[bytes] = []
        self._read(url, begin, end, version, pieces.append, wanted=wanted)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def get_whole(self, url: Url, hashed: Callable[[memoryview], None] = lambda data: None) -> np.ndarray:
        """All of an object, uint8 (bytes,), by several requests at once if it is large: one connection rarely fills a link.
        `hashed` is called with its parts in order, while others are on their way."""
        pieces: list[bytes] = []
        version = self._read(url, 0, LARGE, None, pieces.append, clamp=True)
        whole = np.empty(version.size, np.uint8)
        whole[:LARGE] = np.frombuffer(b"".join(pieces), np.uint8)
        parts = [whole[begin : begin + LARGE] for begin in range(0, version.size, LARGE)]
        pool, ended = ThreadPoolExecutor(AT_ONCE, "whole"), threading.Event()
        try:
            rest = [
                pool.submit(self.get_into, url, n * LARGE, part, version, lambda: not ended.is_set())
                for n, part in enumerate(parts)
                if n
            ]
            for n, part in enumerate(parts):
                if n:
                    rest[n - 1].result()
                hashed(part.data)
        finally:
            ended.set()  # after an error or Ctrl-C, a silent request is not waited for, nor made again
            pool.shutdown(wait=False, cancel_futures=True)
        return whole

    def get_into(
        self, url: Url, begin: int, out: np.ndarray, version: ObjectVersion | None = None, wanted: Wanted | None = None
    ) -> None:
        """Fills `out`, contiguous uint8, with the bytes of an object from `begin` on, as `get` does."""
        view, at = out.data.cast("B"), 0

        def take(piece: bytes) -> None:
            nonlocal at
            view[at : at + len(piece)] = piece
            at += len(piece)

        if len(view):
            self._read(url, begin, begin + len(view), version, take, wanted=wanted)

    def put(self, url: Url, source: Path | bytes, create: bool = False) -> ObjectVersion:
        """Writes an object, whole or not at all. With `create`, raises FileExistsError if there is one."""
        self._check_writable(url, "written to")
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        parts: dict[str, Any] = {"use_multipart": size > MULTIPART, "chunk_size": PART, "max_concurrency": PARTS_AT_ONCE}

        if create:
            parts = {"mode": "create", "use_multipart": False}

        def put() -> ObjectVersion:
            try:
                etag = obstore.put(self._writing, url.key, source, **parts)["e_tag"]
            except AlreadyExistsError:
                raise FileExistsError(errno.EEXIST, "there is such an object", str(url)) from None
            except FileNotFoundError as error:
                failure = failure_of(error)
                raise StoreError(f"{url}: the store {failure.what}; {failure.remedy}") from None
            return ObjectVersion(size, etag)

        version = self._retried(url, put, size)
        if size <= MULTIPART and version.etag:
            return version
        found = self.head(url)  # which may have another ETag than putting the parts gave, as with rclone
        if found.size != size:
            raise StoreError(f"{url}: the store kept {found.size:,} of {size:,} bytes; delete it and try again")
        return found

    def list(self, url: Url) -> Iterator[tuple[str, ObjectVersion]]:
        """The names of the objects below `url`, without it, and their versions."""
        self._check_writable(url, "listed")
        prefix = f"{url.key}/" if url.key else None
        attempts, last, pages = self._attempts(url), None, None
        while True:
            try:
                with self._request(attempts):
                    pages = obstore.list(self._reading, prefix, offset=last) if pages is None else pages
                    page = next(pages, None)
            except (BaseError, FileNotFoundError) as error:
                self._wait(attempts, error)
                pages = None  # a new one goes on behind the last name
                continue
            if page is None:
                return
            attempts.progressed()
            for meta in page:
                last = meta["path"]
                yield last[len(prefix or "") :], version_of(meta)

    def delete(self, url: Url) -> None:
        """Deletes an object, if there is one."""
        self._check_writable(url, "written to")
        with contextlib.suppress(FileNotFoundError):
            self._retried(url, lambda: obstore.delete(self._writing, url.key))

    def _check_writable(self, url: Url, what: str) -> None:
        if self.root.scheme in HTTP:
            raise UserError(f"{url}: a plain web server cannot be {what}; give an s3://, gs:// or az:// URL")

    def _read(
        self,
        url: Url,
        begin: int,
        end: int | None,
        version: ObjectVersion | None,
        take: Callable[[bytes], None],
        clamp: bool = False,
        wanted: Wanted | None = None,
    ) -> ObjectVersion:
        """Hands the bytes to `take`, piece by piece and each once. With `clamp`, the object may end before `end`."""
        attempts, at, whole = self._attempts(url), begin, False
        while True:
            came = at
            check_wanted(url, wanted)
            try:
                with self._request(attempts) as request:
                    result = obstore.get(self._reading, url.key, options=options_of(at, end, version, whole))
                    self.counts.reached = True
                    version = check_version(url, version, version_of(result.meta))
                    if end is None or (clamp and end > version.size):
                        end = version.size
                    if end > version.size:
                        raise StoreError(f"{url}: it has {version.size:,} bytes, so none up to {end:,}; check the file")
                    skip = at if whole else 0
                    for piece in result.stream(min_chunk_size=PIECE):
                        request.size += len(piece)
                        piece, skip = piece[skip:], max(0, skip - len(piece))
                        piece = piece[: end - at]
                        at += len(piece)
                        take(piece)
                        if at == end:
                            return version
                        check_wanted(url, wanted)
                if at == end:  # of an empty object
                    return version
                error: Exception = ShortAnswerError()
            except (BaseError, FileNotFoundError, ShortAnswerError) as caught:
                error = caught
            if at > came:
                attempts.progressed()
            if not whole and is_not_partial(error):
                whole = True
                self.counts.retry("whole", 0)
                self.counts.say(f"{self.root}: the store answers requests for parts with whole objects, which takes longer")
                continue
            if not whole and at == 0 and is_out_of_range(error):  # an empty object has no range
                whole = True
                continue
            self._wait(attempts, error)

    def _retried(self, url: Url, ask: Callable[[], T], size: int = 0) -> T:
        attempts = self._attempts(url)
        while True:
            try:
                with self._request(attempts) as request:
                    result = ask()
                    self.counts.reached = True
                    request.size = size
                    return result
            except (BaseError, FileNotFoundError) as error:
                self._wait(attempts, error)

    def _attempts(self, url: Url) -> Attempts:
        return Attempts(url, self.policy, self.counts)

    @contextlib.contextmanager
    def _request(self, attempts: Attempts) -> Iterator["Request"]:
        if self._process != os.getpid():
            raise StoreError(
                f"{attempts.url}: opened before this process was forked, which its client does not survive; open the dataset in "
                "this process, or start processes by spawn"
            )
        request, begun = Request(), self.counts.begin()
        attempts.generation = self._generation
        try:
            yield request
        finally:
            self.counts.end(begun, request.size)

    def _wait(self, attempts: Attempts, error: Exception) -> None:
        """Returns when to ask again; raises what the user is to see otherwise."""
        url = attempts.url
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(url)) from None
        if isinstance(error, PreconditionError):
            raise replaced(url) from None
        failure = Failure("short", "sends fewer bytes than it says") if isinstance(error, ShortAnswerError) else failure_of(error)
        if failure.kind == "credentials" and not attempts.renewed:
            attempts.renewed = True
            self._renew(attempts.generation)
            self.counts.retry(failure.kind, 0)
            return
        asked_s = self._when(url) if failure.kind in BUSY and self.tells_when is not False else None
        attempts.wait(failure, asked_s)

    def _renew(self, generation: int) -> None:
        """Reads the credentials anew, unless another thread has done so since the request."""
        with self._lock:
            if generation == self._generation:
                self._open()
                self._generation += 1

    def _when(self, url: Url) -> float | None:
        """How long a busy store asks to wait, in seconds; None if it does not say."""
        try:
            signed = str(url) if self.root.scheme in HTTP else obstore.sign(self._reading, "GET", url.key, timedelta(minutes=5))
        except (BaseError, ValueError):  # without a key of its own, as on machines of Google's, it cannot sign
            self.tells_when = False
            return None
        answer = retry_after(signed, self.policy)
        self.tells_when = answer.told if answer.busy else self.tells_when
        return answer.seconds


@dataclass
class Request:
    size: int = 0


def check_wanted(url: Url, wanted: Wanted | None) -> None:
    if wanted is not None and not wanted():
        raise StoreError(f"{url}: no longer wanted")


def open_client(root: Url, policy: Policy, silence_s: float) -> Any:
    """obstore's client of a bucket or server, as the environment says."""
    given = from_files() if root.scheme == "s3" else {}
    kind = "az" if root.scheme.startswith("ab") else root.scheme
    endpoints = [str(root), given.get("endpoint", ""), *(os.environ.get(name, "") for name in ENDPOINTS.get(kind, ()))]
    plain = any(endpoint.startswith("http:") for endpoint in endpoints) or on("AZURE_STORAGE_USE_EMULATOR")
    options: dict[str, Any] = {
        **given,
        "client_options": {
            "allow_http": plain,
            "connect_timeout": timedelta(seconds=policy.connect_s),
            "read_timeout": timedelta(seconds=silence_s),
            "timeout": "1day",  # of the whole answer, which may be large and the link slow
        },
        "retry_config": {"max_retries": 0},
    }
    if root.scheme == "s3" and on("AWS_EC2_METADATA_DISABLED") and not has_credentials(given):
        raise StoreError(f"{root}: there are no credentials; set them in the environment (docs/stores.md)")
    try:
        return HTTPStore.from_url(str(root), **options) if root.scheme in HTTP else from_url(str(root), **options)
    except (BaseError, ValueError) as error:
        what = " ".join(str(error).partition("\n")[0].split())
        raise StoreError(f"{root}: the store cannot be opened ({what}); check the URL and the environment") from None
