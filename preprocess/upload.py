"""Sends a dataset to its URL while it is built in a work folder: each shard once it is finished, the manifest last.

URL/.build holds what OUT/.build does: the settings, the raw images as listed, and a state for each shard that is at the URL. So
a build goes on from any machine. Two builds of the same images with the same options write the same bytes; others are refused by
the settings, which only the first build can create.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, write_atomically
from imagefeed.dataset.manifest import NAME, Manifest
from imagefeed.dataset.records import index_name
from imagefeed.dataset.storage import ObjectVersion, Url, read_bytes, store_of
from imagefeed.preprocess.raw import RAW
from imagefeed.preprocess.stale import BUILD
from imagefeed.preprocess.state import (
    SETTINGS,
    SHARD_FILE,
    STATE,
    ShardState,
    is_finished,
    mark_uploaded,
    state_path,
    uploaded_path,
)

THREADS = 16  # for small files
# Shards under way, each in four parts at once, which takes 60 MB of memory; and finished ones that may wait, as a slow store must
# not fill the disk.
UPLOADS, WAITING = 2, 4


class OnDisk:
    """What a build does at each step about a URL: nothing, as OUT is on a disk."""

    def begin(self) -> None:
        """Before anything else: brings into the work folder how far the build at the URL is."""

    def look(self, shards: Iterable[str], sizes: dict[str, int] | None) -> None:
        """Finds out which shards are at the URL; of a finished dataset, with the `sizes` that the manifest says."""

    def settle(self, shards: Iterable[str], whole: bool) -> None:
        """Before shards are written: brings the URL up to what the work folder holds. `shards` are those that this build writes,
        all of them if it is `whole`."""

    def add(self, shard: str) -> None:
        """A shard is finished."""

    def wait(self, left: Callable[[int], None]) -> None:
        """After the last shard; calls `left` with the number of shards that are not yet sent."""

    def finish(self, manifest: Manifest) -> None:
        """The dataset is complete."""

    def close(self) -> None:
        """At the end, also after an error."""


class Upload(OnDisk):
    """`known` has the SHA-256 of each object at the URL that this build has read or written."""

    def __init__(self, url: Url, work: Path):
        self.url, self.work, self.store = url, work, store_of(url)
        self.known: dict[str, str] = {}
        self.listed: dict[str, ObjectVersion] = {}
        self.threads, self.senders = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(UPLOADS)
        self.sending: set[Future] = set()

    def begin(self) -> None:
        self.listed = dict(self.store.list(self.url))
        if self._fetch(NAME):
            list(self.threads.map(self._fetch, _small_files(Manifest.load(self.work))))
        elif not self._fetch(SETTINGS):  # then nothing was packed, or all was removed
            for path in [*(self.work / STATE).glob("*.npz"), *(self.work / STATE).glob("*.uploaded")]:
                path.unlink(missing_ok=True)  # another part may do the same
        else:
            self._fetch(f"{STATE}/{RAW}")

    def look(self, shards: Iterable[str], sizes: dict[str, int] | None) -> None:
        list(self.threads.map(lambda shard: self._look(shard, sizes), shards))

    def _look(self, shard: str, sizes: dict[str, int] | None) -> None:
        uploaded_path(self.work, shard).unlink(missing_ok=True)
        there, state = self.listed.get(shard), state_path(self.work, shard)
        size = there.size if there and index_name(shard) in self.listed else -1
        if sizes is not None:
            expected = sizes[shard]
        elif _state_name(shard) in self.listed and self._fetch(_state_name(shard)):
            expected = ShardState.load(self.work, shard).shard.bytes
        else:
            if not (self.work / shard).exists():
                state.unlink(missing_ok=True)  # a build elsewhere has discarded the shard
            return
        if size == expected:
            mark_uploaded(self.work, shard, size)
            (self.work / shard).unlink(missing_ok=True)
        else:
            state.unlink(missing_ok=True)

    def settle(self, shards: Iterable[str], whole: bool) -> None:
        shards = list(shards)
        if SETTINGS in self.known:
            self._send(SETTINGS)
        else:
            self._claim()
        self._send(f"{STATE}/{RAW}")
        list(self.threads.map(self._settle, shards))
        if NAME in self.known and not (self.work / NAME).exists():
            self._delete(NAME)  # once the states are there, so that an interrupted build goes on from them
        names = {name for shard in shards for name in (shard, index_name(shard))}
        if whole:  # those of another plan; names in folders below are another dataset's
            others = {name for name in self.listed if SHARD_FILE.fullmatch(name) and "/" not in name} - names
            list(self.threads.map(self._delete, others))
        for shard in shards:
            if is_finished(self.work, shard, None) and not uploaded_path(self.work, shard).exists():
                self.add(shard)  # of a build that was interrupted

    def _settle(self, shard: str) -> None:
        state = _state_name(shard)
        if not state_path(self.work, shard).exists():
            uploaded_path(self.work, shard).unlink(missing_ok=True)
            if state in self.known or state in self.listed:
                self._delete(state)
        elif uploaded_path(self.work, shard).exists():
            self._send(state)
            if not (self.work / index_name(shard)).exists():
                self._fetch(index_name(shard))

    def _claim(self) -> None:
        """Creates the settings, unless another build has done so since `begin`."""
        data = (self.work / SETTINGS).read_bytes()
        try:
            self.store.put(self.url / SETTINGS, data, create=True)
        except FileExistsError:
            if read_bytes(self.url / SETTINGS) != data:
                raise UserError(
                    f"{self.url}: another build began to write there just now, with other options, images or libraries; choose "
                    "another OUT, or use the same"
                ) from None
        self.known[SETTINGS] = hashlib.sha256(data).hexdigest()

    def add(self, shard: str) -> None:
        while len(self.sending) >= UPLOADS + WAITING:
            self._collect(*wait(self.sending, return_when=FIRST_COMPLETED))
        self.sending.add(self.senders.submit(self._add, shard))

    def _add(self, shard: str) -> None:
        state = _state_name(shard)
        version = self.store.put(self.url / shard, self.work / shard)
        self._send(index_name(shard))
        if state_path(self.work, shard).exists():
            self._send(state)  # which says that the shard is at the URL
        mark_uploaded(self.work, shard, version.size)
        (self.work / shard).unlink(missing_ok=True)

    def _collect(self, done: set[Future], sending: set[Future]) -> None:
        self.sending = sending
        for future in done:
            future.result()

    def wait(self, left: Callable[[int], None] = lambda shards: None) -> None:
        while self.sending:
            left(len(self.sending))
            self._collect(*wait(self.sending, return_when=FIRST_COMPLETED))

    def finish(self, manifest: Manifest) -> None:
        self.wait()
        list(self.threads.map(self._send, _small_files(manifest)))
        self._send(NAME)
        list(self.threads.map(self._delete, [f"{STATE}/{name}" for name, _ in self.store.list(self.url / STATE)]))

    def close(self) -> None:
        for threads in (self.senders, self.threads):
            threads.shutdown(cancel_futures=True)

    def _fetch(self, name: str) -> bool:
        """Brings a small object here, or removes the file that has no object; whether there is one."""
        try:
            data = read_bytes(self.url / name)
        except FileNotFoundError:
            (self.work / name).unlink(missing_ok=True)
            return False
        write_atomically(self.work / name, data)
        self.known[name] = hashlib.sha256(data).hexdigest()
        return True

    def _send(self, name: str) -> None:
        """Sends a file, unless there is none, or the object is the same."""
        path = self.work / name
        if path.exists() and self.known.get(name) != (digest := hash_file(path)):
            self.store.put(self.url / name, path)
            self.known[name] = digest

    def _delete(self, name: str) -> None:
        self.store.delete(self.url / name)
        self.known.pop(name, None)
        self.listed.pop(name, None)


def _state_name(shard: str) -> str:
    return f"{STATE}/{shard}.npz"


def _small_files(manifest: Manifest) -> list[str]:
    return [*(name for name in manifest.files if not name.endswith(".idx")), RAW, BUILD]


def work_folder(url: Url, parent: str | Path | None) -> Path:
    """The folder to build a dataset for `url` in: in `parent`, by default this user's in TMPDIR."""
    digest = hashlib.sha256(str(url).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", str(url).partition("://")[2])[-80:].strip("-.")
    folder = Path(tempfile.gettempdir()) / f"imagefeed-{os.getuid()}" if parent is None else Path(parent)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if parent is None and folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; choose a folder with `work_dir`")
    return folder / f"{name}-{digest}"
