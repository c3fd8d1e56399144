"""The state of an unfinished build, OUT/.build: its lock, its settings, and a file for each finished shard."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import (
    locked,
    naming,
    owned,
    owner,
    remove_temporaries,
    temporaries,
    time_of,
    try_lock,
    write_atomically,
)
from imagefeed.dataset.manifest import NAME, Manifest, Shard
from imagefeed.dataset.records import index_name
from imagefeed.preprocess.image import codec_versions
from imagefeed.preprocess.statistics import PixelSums

REJECTED = "rejected.jsonl"
STATE = ".build"
SETTINGS = f"{STATE}/settings.json"
SHARD_FILE = re.compile(r".+-\d{5}-of-\d{5}\.(tfrecord|idx)")
SPOOL = "spool"  # in STATE: images that had to be unpacked before they could be read singly
STAMP_DTYPE = np.dtype([("size", "<i8"), ("mtime_ns", "<i8")])  # of the file that an image lies in; NO_STAMP if unreadable
# Incremented whenever some image is stored with other pixels than before. Datasets of packer 1 do not name it.
PACKER = "2"
LOCKS_FAIL = "the file locks of this mount do not reach that machine"
WATCHED_S, WATCH_S = 60, 3  # of temporary files that were written to so recently, one that grows meanwhile has a writer
RELEASED_S = 1
log = logging.getLogger("imagefeed")


def filled_stamps(length: int, stamp: tuple[int, int]) -> np.ndarray:
    return np.full(length, np.array(stamp, STAMP_DTYPE))


def versions() -> dict[str, str]:
    """What determines the stored bytes besides images and options: this program's packer and the libraries."""
    return {"packer": PACKER, **codec_versions()}


@dataclass(frozen=True)
class ShardState:
    """What the manifest needs of a shard: its index rows (INDEX_DTYPE), a mark (MARK_DTYPE) and a stamp (STAMP_DTYPE) of each
    raw image, the sums of its pixels, and the lines of rejected.jsonl for images that were rejected or converted.
    `rejected` has the positions of the former among the shard's raw images."""

    shard: Shard
    entries: list[dict[str, str]]
    rows: np.ndarray
    marks: np.ndarray
    stamps: np.ndarray
    sums: PixelSums
    rejected: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def save(self, out: Path) -> None:
        """Marks the shard as finished."""
        report = json.dumps({"shard": asdict(self.shard), "entries": self.entries})
        arrays = {name: getattr(self, name) for name in ("rows", "marks", "stamps", "rejected")} | self.sums.arrays()
        save_arrays(state_path(out, self.shard.name), np.savez, report=np.array(report), **arrays)

    @classmethod
    def load(cls, out: Path, shard: str) -> "ShardState":
        with np.load(state_path(out, shard)) as arrays:
            report = json.loads(str(arrays["report"]))
            rows, marks, stamps, sums = arrays["rows"], arrays["marks"], arrays["stamps"], PixelSums.from_arrays(arrays)
            rejected = arrays["rejected"] if "rejected" in arrays.files else np.empty(0, np.int64)  # of an older program
            return cls(Shard(**report["shard"]), report["entries"], rows, marks, stamps, sums, rejected)

    def forget(self, out: Path) -> None:
        """Causes the shard to be written again."""
        state_path(out, self.shard.name).unlink()

    @property
    def actions(self) -> Counter:
        """How often each action was taken."""
        return Counter(entry["action"] for entry in self.entries)


def load_entries(out: Path, shard: str) -> list[dict[str, str]]:
    """The entries alone, in 0.5 ms instead of 5."""
    with np.load(state_path(out, shard)) as arrays:
        return json.loads(str(arrays["report"]))["entries"]


def save_arrays(path: Path, save: Callable, *arrays: np.ndarray, **named: np.ndarray) -> None:
    """Writes what numpy's `save` makes of arrays; in one go, because numpy hides the reason when a disk is full."""
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    write_atomically(path, buffer.getvalue())


def state_path(out: Path, shard: str) -> Path:
    return out / STATE / f"{shard}.npz"


def uploaded_path(out: Path, shard: str) -> Path:
    """The file that says, by the shard's size, that a shard and its index are at the URL of the dataset (upload.py)."""
    return out / STATE / f"{shard}.uploaded"


def mark_uploaded(out: Path, shard: str, size: int) -> None:
    write_atomically(uploaded_path(out, shard), b"%d" % size)


def is_finished(out: Path, shard: str, sizes: dict[str, int] | None) -> bool:
    """Whether a shard exists with its index and its state; given the manifest's `sizes`, with its index and its size."""
    if (marker := uploaded_path(out, shard)).exists():
        size = int(marker.read_bytes())
    elif (out / shard).is_file() and (out / index_name(shard)).is_file():
        size = (out / shard).stat().st_size
    else:
        return False
    return state_path(out, shard).exists() if sizes is None else size == sizes.get(shard)


@contextlib.contextmanager
def at_work(out: Path, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Creates OUT and keeps other builds out of it; jobs of different parts may work at the same time.

    Raises UserError if another build holds it. An OSError without a file name, such as that of a full disk, gets OUT's.
    """
    busy = f"{out}: another build{{}} is writing into it; wait until it ends, or choose another OUT"
    share = f"{part[0]}-{part[1]}" if part else "all"
    with naming(out), owned(f"{owner()}_{share}"):
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(locked(out / STATE / "lock", busy.format(""), shared=bool(part)))
            if part:
                own = locked(out / STATE / f"lock-{share}", busy.format(f" of part {part[0]}/{part[1]}"))
                stack.enter_context(own)
            elif other := _writing(out):
                raise UserError(f"{busy.format(f' on {other}')} ({LOCKS_FAIL})")
            _remove_temporaries(out)
            try:
                yield
            finally:
                _remove_temporaries(out)
                if try_lock(lock):  # the last one to leave clears up
                    if other := _writing(out):
                        log.warning("%s: a build on %s is writing into it too (%s)", out, other, LOCKS_FAIL)
                    elif (out / NAME).exists():
                        shutil.rmtree(out / STATE, ignore_errors=True)
        if (out / NAME).exists():
            _remove_folder(out / STATE)


def _remove_folder(path: Path) -> None:
    """Removes a folder once it is empty: NFS and FUSE keep an open file that was deleted, here the lock, under another name until
    it is closed, and a little longer. Gives up after RELEASED_S, as others may have come since."""
    deadline_s = time.monotonic() + RELEASED_S
    with contextlib.suppress(FileNotFoundError):
        while time.monotonic() < deadline_s and all(name.startswith((".nfs", ".fuse_hidden")) for name in os.listdir(path)):
            with contextlib.suppress(OSError):
                path.rmdir()
                return
            time.sleep(0.02)


def _folders(out: Path) -> list[Path]:
    return [folder for folder in (out, out / STATE, out / STATE / SPOOL) if folder.is_dir()]


def _remove_temporaries(out: Path) -> None:
    for folder in _folders(out):
        remove_temporaries(folder)


def _writing(out: Path) -> str:
    """The host of another build that is writing shards, though this process holds the lock alone; "" if there is none.

    Some network and FUSE mounts keep locks to themselves. Then temporary files of others that grow tell.
    """

    def others() -> dict[Path, tuple[int, str]]:
        found = {}
        for path, name in (each for folder in _folders(out) for each in temporaries(folder)):
            with contextlib.suppress(FileNotFoundError):
                if name not in ("", owner()):
                    found[path] = path.stat().st_mtime_ns, name
        return found

    before = others()
    if before and time_of(out) - max(before.values())[0] / 1e9 < WATCHED_S:
        deadline_s = time.monotonic() + WATCH_S
        while time.monotonic() < deadline_s:
            time.sleep(0.2)
            for path, (when_ns, name) in others().items():
                if when_ns > before.get(path, (0, ""))[0]:
                    return name.partition("_")[0]
    return ""


def compare_settings(out: Path, settings: dict) -> dict[str, dict]:
    """The `settings` and `versions` that `out` was begun with; the first call records its own.

    Raises UserError if `out` was begun with other settings, of which only `source` may differ.
    """
    path = out / SETTINGS
    if (out / NAME).exists():
        manifest = Manifest.load(out)
        begun = {"settings": manifest.options, "versions": manifest.versions}
    elif path.exists():
        begun = json.loads(path.read_bytes())
    else:
        record_settings(out, settings)
        begun = json.loads(path.read_bytes())  # perhaps of another part that began at the same time
    for name in begun["settings"] | settings:
        before, value = begun["settings"].get(name), settings.get(name)
        if before != value and name != "source":
            first = f"with {name} {_in_words(before)}" if before is not None else f"with the default {name}"
            second = f"says {_in_words(value)}" if value is not None else "uses the default"
            raise UserError(f"{out}: begun {first}, this call {second}; use the same, or choose another OUT")
    return begun


def _in_words(value: Any) -> str:
    return ",".join(each if isinstance(each, str) else f"{each:g}" for each in value) if isinstance(value, list) else str(value)


def record_settings(out: Path, settings: dict) -> dict[str, dict]:
    begun = {"settings": settings, "versions": versions()}
    write_atomically(out / SETTINGS, json.dumps(begun).encode())
    return begun


def compare_versions(out: Path, before: dict[str, str], need: str = "") -> None:
    """Raises UserError if `out`, begun with other versions, has to be written on; `need` says why if that is not plain."""
    now = versions()
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if "packer" in differing:
        raise UserError(
            f"{out}: {need}begun by packer {before.get('packer', 1)} of imagefeed; this release has packer {PACKER}, which "
            "stores other pixels for some images; choose another OUT, or use the release that began it"
        )
    if differing:
        old, new = (", ".join(f"{name} {each.get(name, '(none)')}" for name in differing) for each in (before, now))
        raise UserError(
            f"{out}: {need}begun with {old}, this environment has {new}, which may store other bytes; install the earlier ones, "
            "or choose another OUT"
        )
