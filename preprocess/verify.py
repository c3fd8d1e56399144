"""The command `verify` as a function: checks that every byte of a dataset is as written."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.codec import libjpeg
from imagefeed.codec.decode import PIECE
from imagefeed.dataset.columns import file_names
from imagefeed.dataset.errors import CHECK_DISK, UserError, reason_of
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard
from imagefeed.dataset.records import FOOTER, HEADER, NO_LABEL, crc32c, decode_example, index_name, jpeg_of_example, masked
from imagefeed.dataset.storage import Url, hash_of, read_bytes
from imagefeed.dataset.streams import FileStream, ObjectStream, open_stream
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import decode_planes, stored_planes
from imagefeed.preprocess.options import check_ranges
from imagefeed.preprocess.statistics import PixelSums

REBUILD_SHARD = "delete the shard and run build again"
REBUILD_FRAMES = "delete this file and run build again"
REBUILD_ALL = "delete this file and run build again, which writes the whole dataset anew"
MISSING = "the file is missing", "run build again"
OTHER = "its content is not what was written"
UNDECODABLE = "its JPEG does not decode ({})"
# Statistics are of the pixels given to the JPEG encoder, `deep` sees them after it. At quality 90 the two differ by less
# than 0.1 gray levels in mean and 1 % in covariance over 1,000 images; lower quality and fewer images differ more.
MEAN_TOLERANCE = 2.0
COVARIANCE_TOLERANCE = 0.1


class Problem(NamedTuple):
    """A damaged file or record, what is wrong with it, and what to do."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


def verify(
    out: str | Path | Url,
    *,
    deep: bool = False,
    raw: str | Path | Url | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda records, total: None,
    on_problem: Callable[[Problem], None] = lambda problem: None,
) -> list[Problem]:
    """Checks that every byte of the dataset `out`, a folder or a URL, is as written; returns the problems, none if it is intact.

        from imagefeed import verify

        for problem in verify("/data/imagenet-256"):
            print(problem.where, problem.what, problem.remedy)

    Checks the sizes and hashes of all files, the checksums of every record, indexes, labels and counts. With `deep` every image
    is strictly decoded too, and the statistics are computed again. With `raw`, every image there is read and compared with those
    that were packed, including rejected ones; a missing, changed or new image is a problem. `workers` is the
    number of processes, by default one for each core this process may use. `on_progress` is called with the number of records
    and raw images verified so far and of all, `on_problem` with each problem as soon as it is found. Raises UserError if `out`
    has no readable manifest.
    """
    check_ranges(workers=1 if workers is None else workers)
    manifest = Manifest.load(out)
    verified, problems = 0, []
    runner, total = ProcessRunner(workers), manifest.num_records

    def report(records: int) -> None:
        nonlocal verified
        verified += records
        on_progress(verified, total)

    found = _problems(manifest, deep, runner, report)
    if raw is not None:
        from imagefeed.preprocess.compare import compare_raw, load_record

        record = load_record(manifest)
        total += sum(record.lengths.values())
        found = chain(found, (Problem(*differing) for differing in compare_raw(record, raw, runner, report)))
    for problem in found:
        problems.append(problem)
        on_problem(problem)
    return problems


@dataclass(frozen=True)
class _ShardTask:
    path: Path | Url
    shard: Shard
    rows: np.ndarray
    classes: tuple[str, ...]
    frames_hash: str
    size: int
    deep: bool

    def __str__(self) -> str:
        return self.shard.name

    def class_name(self, label: int) -> str:
        return self.classes[label] if label != NO_LABEL else ""


def _problems(manifest: Manifest, deep: bool, runner: ProcessRunner, report: Callable[[int], None]) -> Iterator[Problem]:
    damaged = set()
    for name, digest in manifest.files.items():
        if name.endswith(".idx"):
            continue  # checked with its shard, where the damaged line can be named
        if found := _check_content(manifest.root / name, digest):
            damaged.add(name)
            yield found
    size, classes = manifest.options["size"], manifest.classes
    tasks = []
    for split, content in manifest.splits.items():
        try:
            index = manifest.load_index(split)
        except (UserError, OSError):
            continue  # its hash has been reported
        labels = index["label"][index["label"] != NO_LABEL]
        counts = np.bincount(labels.clip(0, len(classes)), minlength=len(classes) + 1)
        if tuple(counts[:-1].tolist()) != content.counts:
            yield Problem(f"{split}.index.npy", "its numbers of images per class differ from the manifest's", REBUILD_ALL)
        shard_of = index["shard"]
        for number, shard in enumerate(content.shards):
            rows = np.array(index[np.searchsorted(shard_of, number) : np.searchsorted(shard_of, number, "right")])
            frames_hash = manifest.files.get(index_name(shard.name), "")
            tasks.append(_ShardTask(manifest.root / shard.name, shard, rows, classes, frames_hash, size, deep))
    for split in manifest.splits:
        for name in manifest.columns:
            try:
                manifest.load_column(split, name)
            except OSError:
                continue  # its hash has been reported
            except UserError as error:
                files = file_names(split, name, manifest.columns[name])
                if damaged.isdisjoint(files):
                    yield Problem(files[0], str(error).partition(": ")[2].partition("; ")[0], REBUILD_ALL)
    sums = PixelSums(size)
    names = {shard.name for shard in manifest.split(manifest.statistics_split).shards}
    whole = True
    for name, problems, shard_sums in runner.map(_verify_shard, tasks, report):
        yield from problems
        if shard_sums is not None and name in names:
            sums.merge(shard_sums)
            whole &= not any(problem.where.startswith(name) for problem in problems)
    if sums.images and whole:  # of damaged shards, the sums differ from the statistics, which may well be right
        yield from _compare_statistics(manifest, sums)


def _check_content(path: Path | Url, digest: str) -> Problem | None:
    """What is wrong with a file that must have this hash."""
    try:
        return None if hash_of(path) == digest else Problem(path.name, OTHER, REBUILD_ALL)
    except OSError as error:
        return _unreadable(path.name, error)


def _unreadable(where: str, error: OSError) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(where, *MISSING)
    return Problem(where, f"cannot be read ({reason_of(error)})", CHECK_DISK)


def _verify_shard(task: _ShardTask, report: Callable[[int], None]) -> tuple[str, list[Problem], PixelSums | None]:
    sums = PixelSums(task.size) if task.deep else None
    try:
        with open_stream(task.path) as stream:
            return task.path.name, _find_problems(task, stream, sums, report), sums
    except FileNotFoundError:
        return task.path.name, [Problem(task.path.name, *MISSING)], sums


def _find_problems(
    task: _ShardTask, stream: FileStream | ObjectStream, sums: PixelSums | None, report: Callable[[int], None]
) -> list[Problem]:
    path, shard, size = task.path, task.shard, stream.size
    problem = functools.partial(Problem, remedy=REBUILD_SHARD)
    problems = list(_verify_frames(task))
    if size != shard.bytes:
        problems.append(problem(path.name, f"has {size} bytes, the manifest says {shard.bytes}"))
    if len(task.rows) != shard.records:
        what = f"the index lists {len(task.rows)} of its records, the manifest {shard.records}"
        problems.append(Problem(path.name, what, REBUILD_ALL))
    if not size:
        return problems
    digest, end = hashlib.sha256(), 0
    for first in range(0, len(task.rows), PIECE):
        rows, starts = task.rows[first : first + PIECE], {}
        jpegs: dict[int, bytes] = {}
        wrong: dict[int, tuple[str, str]] = {}  # what, and the remedy
        for number, row in enumerate(rows, first):
            starts[number], end = end, int(row["offset"]) + int(row["length"]) + FOOTER.size
            try:
                frame = memoryview(stream.read(starts[number], min(end, size)))
                digest.update(frame)
                jpegs[number] = _read_record(frame, starts[number], row, task)
            except OSError as error:
                wrong[number] = _unreadable(path.name, error)[1:]
            except ValueError as error:
                wrong[number] = str(error), REBUILD_SHARD
        if sums is not None:
            wrong |= {number: (what, REBUILD_SHARD) for number, what in _add_images(jpegs, sums).items()}
        for number in sorted(wrong):
            problems.append(Problem(f"{path.name}, record {number} (byte {starts[number]})", *wrong[number]))
        report(len(rows))
    if end != size:
        problems.append(problem(path.name, f"{size - end} bytes follow the last record"))
    # All frames may be right and the file still another one: the hash of all of it decides.
    if not problems and digest.hexdigest() != shard.sha256:
        problems.append(problem(path.name, OTHER))
    return problems


def _read_record(frame: memoryview, start: int, row: np.void, task: _ShardTask) -> bytes:
    """The JPEG of a record, of which `deep` has still to look at the pixels; raises ValueError with what is wrong."""
    size = len(frame) - HEADER.size - FOOTER.size
    if size < 0:
        raise ValueError("the file ends before it, or the index is wrong")
    length, length_crc = HEADER.unpack_from(frame)
    if masked(crc32c(frame[:8])) != length_crc:
        raise ValueError("the checksum of its length does not match")
    if length != size:
        raise ValueError(f"it has {length} bytes, the index says {size}")
    payload = frame[HEADER.size : -FOOTER.size]
    if masked(crc32c(payload)) != FOOTER.unpack_from(frame, HEADER.size + size)[0]:
        raise ValueError("the checksum of its data does not match")
    _, offset, length, crc, label = row.item()
    end = start + HEADER.size + size
    known = NO_LABEL <= label < len(task.classes)
    jpeg: bytes | memoryview | None = None
    height = width = task.size
    if known and offset + length == end:
        jpeg = jpeg_of_example(payload, length, height, width, label, task.class_name(label))
    if jpeg is None or crc32c(jpeg) != crc:
        record = decode_example(bytes(payload))
        jpeg, height, width = record.jpeg, record.height, record.width
        if (end - len(jpeg), len(jpeg), crc32c(jpeg)) != (offset, length, crc):
            raise ValueError("offset, length or checksum of the JPEG differ from the index")
        if record.label != label or not known:
            raise ValueError(f"its label is {record.label}, the index says {label}, of {len(task.classes)} classes")
        if record.class_name != task.class_name(label):
            raise ValueError(f"its class is {record.class_name!r}, the manifest says {task.class_name(label)!r}")
    if task.deep:
        try:
            wide, high, *_ = libjpeg.header(jpeg)
        except ValueError as error:
            raise ValueError(UNDECODABLE.format(error)) from None
        if (wide, high) != (width, height) or min(wide, high) != task.size:
            raise ValueError(f"its JPEG is {wide}x{high}, the record says {width}x{height}")
    return bytes(jpeg)


def _add_images(jpegs: dict[int, bytes], sums: PixelSums) -> dict[int, str]:
    """Adds images, whose shorter sides are the size of `sums`; returns what is wrong with each that does not decode."""
    wrong = {}
    for (number, jpeg), planes in zip(jpegs.items(), stored_planes(list(jpegs.values()))):
        try:
            sums.add(planes or decode_planes(jpeg, sums.image.shape[1], crop=False))
        except ValueError as error:
            wrong[number] = UNDECODABLE.format(error)
    return wrong


def _verify_frames(task: _ShardTask) -> Iterator[Problem]:
    """Compares DALI's index, a line of offset and size for each record, with ours."""
    path = task.path.parent / index_name(task.path.name)
    try:
        lines = (data := read_bytes(path)).split(b"\n")
    except OSError as error:
        yield _unreadable(path.name, error)
        return
    ends = task.rows["offset"].astype(np.int64) + task.rows["length"] + FOOTER.size
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    expected = [b"%d %d" % (start, end - start) for start, end in zip(starts, ends)] + [b""]
    for number, (line, right) in enumerate(zip(lines, expected)):
        if line != right:
            what = f"says {line.decode(errors='replace')!r}, the record lies at {right.decode()!r}"
            yield Problem(f"{path.name}, record {number}", what, REBUILD_FRAMES)
    if len(lines) != len(expected) or hashlib.sha256(data).hexdigest() != task.frames_hash:
        yield Problem(path.name, OTHER, REBUILD_FRAMES)


def _compare_statistics(manifest: Manifest, sums: PixelSums) -> Iterator[Problem]:
    try:
        stored = manifest.load_statistics()
    except (UserError, OSError):
        return  # its hash has been reported
    found = sums.statistics()
    problem = functools.partial(Problem, STATISTICS, remedy=REBUILD_ALL)
    if (int(found["images"]), int(found["pixels"])) != (int(stored["images"]), int(stored["pixels"])):
        yield problem(f"of {stored['images']} images, the shards hold {found['images']}")
    difference = np.abs(found["channel_mean"] - stored["channel_mean"]).max()
    if difference > MEAN_TOLERANCE:
        yield problem(f"the stored pixels' mean differs by {difference:.2f} gray levels")
    difference = np.abs(found["covariance"] - stored["covariance"]).max() / np.abs(stored["covariance"]).max()
    if difference > COVARIANCE_TOLERANCE:
        yield problem(f"the stored pixels' covariance differs by {difference:.1%}")
