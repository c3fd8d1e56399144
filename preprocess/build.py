"""The command `build` as a function."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from imagefeed.dataset.errors import ArgumentError
from imagefeed.dataset.storage import Url, place
from imagefeed.preprocess.options import ENGINES, ImageOptions, SourceOptions, check_choice, check_ranges

if TYPE_CHECKING:
    from imagefeed.dataset.decision import Decision
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.preprocess.sources.listing import Source


def build(
    raw: str | Path | Url,
    out: str | Path | Url | None = None,
    *,
    split: str | None = SourceOptions.split,
    train_split: str | None = SourceOptions.train_split,
    validation_fraction: float = SourceOptions.validation_fraction,
    classes: str | Path | None = SourceOptions.classes,
    class_level: str = SourceOptions.class_level,
    layout: str | None = SourceOptions.layout,
    frames_per_second: float = SourceOptions.frames_per_second,
    columns: Sequence[str] = SourceOptions.columns,
    size: int = ImageOptions.size,
    fit: str = ImageOptions.fit,
    quality: int = ImageOptions.quality,
    range: tuple[float, float] | None = None,
    seed: int = 0,
    max_rejected: float = 0.01,
    engine: str = "process",
    address: str | None = None,
    part: tuple[int, int] | None = None,
    workers: int | None = None,
    work_dir: str | Path | None = None,
    dry_run: bool = False,
    on_progress: Callable[["BuildProgress"], None] = lambda progress: None,
) -> "Manifest | Decision | None":
    """Packs the images of `raw` into the dataset `out`, and continues where an earlier call stopped.

        manifest = imagefeed.build("/data/imagenet", "/data/imagenet-256", workers=16)
        print(manifest.num_records, manifest.classes[:3])

    Rewrites the shards whose raw images have changed since, by the size and time of their files.

    raw: a folder of class folders, or of splits of those; ImageNet's archives, WebDataset's shards or other tar archives;
        Kaggle's ImageNet; Parquet files; FFCV's .beton files; tables or lists of path and label; a URL of tars or Parquet files.
    out: the folder of the dataset, which must not lie in `raw`, or its URL, s3://, gs:// or az:// (docs/stores.md).
    split: the name of the one split whose classes are the folders of `raw`.
    train_split: the split to train on, if its name does not say so.
    validation_fraction: the fraction of each class, up to 0.9, to hold out as split val, if `raw` has no splits.
    classes: a file with the name of each class on a line, in the order of the labels; by default sorted, whole numbers by value.
    class_level: "deepest" if a class in nested folders is the path to its images, as in Aves/3, "top" if it is the first folder.
    layout: "folders", "archives", "kaggle", "csv", "lists", "parquet" or "ffcv"; detected by default.
    frames_per_second: frames to extract per second of video.
    columns: names of further columns to keep, of tables, Parquet files and WebDataset's members: numbers, text, lists of numbers.
    size, quality: pixels of the shorter side as stored, 16 to 4096; JPEG quality, 1 to 100.
    fit: "crop" keeps the center square, "short" the whole image.
    range: (low, high), the values to store as black and white in images with more than 8 bits or floating-point samples; by
        default the range of the bits that each file declares.
    seed: seed of the shuffle. The same images, options and seed give the same bytes, whatever the workers and interruptions.
    max_rejected: the fraction of images that may be bad, 0 to 1; they are left out and listed in rejected.jsonl. The same limit
        applies to suspicious images, which have more than 8 bits and come out nearly black or white.
    engine: "process" for worker processes here, "ray" for a Ray cluster at `address`; by default one is found, or started here.
    part: (k, n) writes only the k-th of n parts of the shards, for n jobs; a call without it completes the dataset.
    workers: worker processes; by default one for each core this process may use.
    work_dir: the folder to pack a dataset for a URL in, by default in TMPDIR: shards on their way, and what is unpacked.
    dry_run: only detect the splits, classes and labels in `raw`; `out` may be omitted.
    on_progress: called with a BuildProgress, first after the images are listed.

    Returns the manifest of the complete dataset; None with `part`; with `dry_run`, the decision, whose str() is a table.
    Raises UserError if an argument is wrong, `raw` can be read in two ways, `out` was begun with other images or options, another
    build is writing into it, or too many images are bad; OSError if a disk is full or fails, after which the same call goes on.
    """
    from imagefeed.preprocess.engine import ProcessRunner, RayRunner
    from imagefeed.preprocess.packing import build_anywhere  # NumPy and Pillow load here, not for --help
    from imagefeed.preprocess.renew import Notices
    from imagefeed.preprocess.sources.detect import read_tree

    _check(engine, address, part, seed=seed, max_rejected=max_rejected, workers=1 if workers is None else workers)
    options = ImageOptions(size, fit, quality, range)
    given = SourceOptions(split, train_split, layout, classes, class_level, validation_fraction, seed, frames_per_second, columns)
    dest = _place(out, dry_run, engine, work_dir)
    source = read_tree(raw, given)
    if dest is None:
        return source.decision
    runner = RayRunner(address) if engine == "ray" else ProcessRunner(workers)
    progress = BuildProgress(source, on_progress)
    on_progress(progress)
    noticed = Notices(progress.checked, progress.renewed, progress.sending)
    arguments = options, seed, runner, max_rejected, progress.packed, progress.unpacked, part, asdict(given), noticed
    return build_anywhere(source, dest, work_dir, *arguments)


def _check(engine: str, address: str | None, part: tuple[int, int] | None, **numbers: float) -> None:
    check_ranges(**numbers)
    check_choice("engine", engine, ENGINES)
    if address and engine != "ray":
        raise ArgumentError("`address` is for a Ray cluster; set `engine` to ray as well")
    if part and not 1 <= part[0] <= part[1]:
        raise ArgumentError(f"`part` is {part[0]}/{part[1]}; choose K/N with K from 1 to N, such as 3/8")


def _place(out: str | Path | Url | None, dry_run: bool, engine: str, work_dir: str | Path | None) -> Path | Url | None:
    if dry_run:
        return None
    if out is None:
        raise ArgumentError("`out` is missing; it may be omitted only with `dry_run`")
    dest = place(out)
    if engine == "ray" and isinstance(dest, Url) and work_dir is None:
        raise ArgumentError("`engine` ray packs a dataset for a URL in a folder that all nodes share; name it with `work_dir`")
    return dest


@dataclass
class BuildProgress:
    """How far a build has come. In each phase, `done` of `total` items are complete, including those of earlier calls: images
    compared, files unpacked, images packed, or the last shards sent to a URL. This call took `seconds` for the phase so far, for
    `images` of them and `bytes_read`. In phase "renewing", `changed` has the paths of the changed images, or none if RAW lists
    its images in another order, and `stale_shards` is the number of shards to rewrite."""

    source: "Source"
    on_progress: Callable[["BuildProgress"], None]
    phase: str = "listed"  # then perhaps "checking", "renewing" and "unpacking", then "packing", and perhaps "sending"
    done: int = 0
    total: int = 0
    images: int = 0
    bytes_read: int = 0
    rejected: int = 0
    start_s: float = 0
    changed: list[str] = field(default_factory=list)
    stale_shards: int = 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start_s, 1e-3)

    def checked(self, images: int, total: int) -> None:
        if self.phase != "checking":
            self._begin("checking", total)
        self._add(images, images, 0)

    def renewed(self, paths: list[str], shards: int) -> None:
        self.changed, self.stale_shards = paths, shards
        self._begin("renewing", 0)
        self.on_progress(self)

    def unpacked(self, files: int, images: int, bytes_written: int) -> None:
        if self.phase != "unpacking":
            self._begin("unpacking", len(self.source.packed))
        self._add(files, images, bytes_written)

    def packed(self, images: int, bytes_read: int, rejected: int) -> None:
        if self.phase == "packing":
            self._add(images, images, bytes_read, rejected)
            return
        total = self.source.num_images
        if self.phase == "unpacking":  # only now it is known how many images there are
            total += self.images - sum(packed.num_images for packed in self.source.packed)
        self._begin("packing", total)
        self._add(images, 0, bytes_read, rejected)  # the first call counts what earlier calls packed

    def sending(self, shards: int) -> None:
        if self.phase != "sending":
            self.phase, self.total = "sending", shards
        self.done = self.total - shards
        self.on_progress(self)

    def _begin(self, phase: str, total: int) -> None:
        self.phase, self.total, self.start_s = phase, total, time.monotonic()
        self.done = self.images = self.bytes_read = 0

    def _add(self, done: int, images: int, bytes_read: int, rejected: int = 0) -> None:
        self.done += done
        self.images += images
        self.bytes_read += bytes_read
        self.rejected += rejected
        self.on_progress(self)
