"""The commands of python -m preprocess."""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.manifest import Manifest
from imagefeed.preprocess.build import Part, build_dataset
from imagefeed.preprocess.engine import ProcessRunner, RayRunner, usable_cores
from imagefeed.preprocess.image import FITS, ImageOptions, codec_versions
from imagefeed.preprocess.inspection import describe, draw_contact_sheet, render_text
from imagefeed.preprocess.sample.tree import MAX_CLASSES, draw_sample
from imagefeed.preprocess.sources.detect import LAYOUTS, find_images
from imagefeed.preprocess.sources.listing import Packed
from imagefeed.preprocess.verify import verify_dataset

FOLDER = click.Path(path_type=Path, file_okay=False)
LINE_EVERY_S = 60  # where the output is no terminal
WORKERS = click.option(
    "--workers", type=click.IntRange(1), default=usable_cores, show_default="all cores", help="Processes that do the work."
)


def parse_part(_context, _parameter, value: str | None) -> Part | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", value)
    part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
    if not 1 <= part.number <= part.of:
        raise click.BadParameter(f"{value!r} is not K/N with K from 1 to N, as 3/8")
    return part


@click.group()
def main() -> None:
    """Raw images to sharded record files, once."""


@main.command()
@click.argument("raw", type=click.Path(path_type=Path))
@click.argument("out", type=FOLDER)
@click.option("--split", help="RAW's folders are classes, of this one split (train, val, ...).")
@click.option("--layout", type=click.Choice(LAYOUTS), help="Of RAW, where it is not recognized as it should be.")
@click.option(
    "--frames-per-second",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Images that become of a second of video.",
)
@click.option(
    "--size", type=click.IntRange(16, 4096), default=256, show_default=True, help="Pixels of the shorter side as stored."
)
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="Keep the center square, or all of it.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality as stored, 1-100.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the global shuffle.")
@click.option(
    "--max-rejected", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Share of images that may be bad."
)
@click.option("--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True, help="Who does the work.")
@click.option("--address", help="Of the Ray cluster; without it, one is found or started here.")
@click.option("--part", callback=parse_part, metavar="K/N", help="Write only the K-th of N shares; end with a build without.")
@WORKERS
def build(
    raw: Path,
    out: Path,
    split: str | None,
    layout: str | None,
    frames_per_second: float,
    size: int,
    fit: str,
    quality: int,
    seed: int,
    max_rejected: float,
    engine: str,
    address: str | None,
    part: Part | None,
    workers: int,
) -> None:
    """Pack the images of RAW into the dataset OUT.

    RAW holds folders of classes, or folders of splits of those; or ImageNet's archives as they are, other tar archives, what
    Kaggle's archive unpacks to, Parquet files, or tables of path and label. To go on after an interruption, run the same
    command again.
    """
    if address and engine != "ray":
        raise click.UsageError("--address is of a Ray cluster; add --engine ray")
    with one_sentence():
        options = ImageOptions(size, fit, quality)
        start_s = time.monotonic()
        source = find_images(raw, split, layout, frames_per_second)
        counts = ", ".join(f"{name} {source.count(name):,}" for name in source.splits)
        videos = sum(not packed.num_images for packed in source.packed)
        click.echo(
            f"{raw}: {source.layout}, {counts} images{f' and {videos:,} videos' if videos else ''} of "
            f"{len(source.classes):,} classes; {'Ray' if engine == 'ray' else f'{workers} worker' + 's' * (workers > 1)}; "
            + ", ".join(f"{library} {version}" for library, version in list(codec_versions().items())[:2])
        )
        if "pillow" in codec_versions():
            click.echo(
                "What is no common JPEG is resized by Pillow, 7 times slower than Pillow-SIMD; to put the latter in its place: "
                "python -m pip install --force-reinstall --no-deps .venv/wheels/pillow_simd-*.whl",
                err=True,
            )
        runner = RayRunner(address) if engine == "ray" else ProcessRunner(workers)
        with _progress(source.num_images, "packing", source.packed) as progress:
            manifest = build_dataset(source, out, options, seed, runner, max_rejected, progress, progress.unpacking, part)
        seconds = time.monotonic() - start_s
        if manifest is None:
            click.echo(
                f"{out}: part {part.number} of {part.of} is done, {progress.images:,} images now in {seconds:.1f} s; when all "
                "parts are, run build without --part to finish"
            )
            return
        stored = sum(part.bytes for part in manifest.splits.values())
        click.echo(
            f"{out}: {manifest.num_records:,} records in {sum(len(part.shards) for part in manifest.splits.values())} shards, "
            f"{stored / 1e6:,.1f} MB; {seconds:.1f} s, {progress.images / seconds:,.0f} images/s now; "
            + (", ".join(f"{count} {action}" for action, count in manifest.rejected.items()) or "no image rejected or converted")
            + f"; peak memory {_peak_mb():,.0f} MB"
        )


@main.command()
@click.argument("out", type=FOLDER)
@click.option("--deep", is_flag=True, help="Also decode every image, and compute the statistics again.")
@WORKERS
def verify(out: Path, deep: bool, workers: int) -> None:
    """Check that every byte of the dataset OUT is what was written. A line for each problem; exit code 1 if there is one."""
    with one_sentence():
        manifest = Manifest.load(out)
        problems = 0
        start_s = time.monotonic()
        with _progress(manifest.num_records, "verifying") as progress:
            progress(0, 0, 0)
            for problem in verify_dataset(manifest, deep, ProcessRunner(workers), progress):
                problems += 1
                click.echo(problem)
        seconds = time.monotonic() - start_s
        stored = sum(split.bytes for split in manifest.splits.values())
        if problems:
            raise UserError(f"{out}: {problems} problems in {manifest.num_records:,} records; mend them as the lines above say")
        click.echo(
            f"{out}: {manifest.num_records:,} records are whole{', decode, and give the statistics' if deep else ''}; "
            f"{stored / 1e6:,.1f} MB in {seconds:.1f} s"
        )


@main.command()
@click.argument("out", type=FOLDER)
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw a contact sheet into this file, .png or .pdf say."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(out: Path, picture: Path | None, as_json: bool) -> None:
    """Tell what is in the dataset OUT."""
    with one_sentence():
        manifest = Manifest.load(out)
        facts = describe(manifest)
        click.echo(json.dumps(facts, indent=1) if as_json else render_text(facts))
        if picture is not None:
            draw_contact_sheet(manifest, picture)
            click.echo(f"{picture}: contact sheet", err=as_json)


@main.command()
@click.argument("raw", type=FOLDER)
@click.option(
    "--images", type=click.IntRange(1), default=1000, show_default=True, help="Pictures in all; about a sixth go to val."
)
@click.option(
    "--classes",
    type=click.IntRange(2, MAX_CLASSES),
    default=10,
    show_default=True,
    help="Beyond 18, kinds repeat in other colors.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
def sample(raw: Path, images: int, classes: int, seed: int) -> None:
    """Draw a small labeled raw tree to try everything on: RAW/train and RAW/val, of drawn pictures."""
    with one_sentence():
        start_s = time.monotonic()
        with _progress(images, "drawing") as progress:
            draw_sample(raw, images, classes, seed, progress)
        seconds = time.monotonic() - start_s
        click.echo(f"{raw}: {images:,} pictures of {classes:,} classes, {progress.images:,} of them drawn now, {seconds:.1f} s")


def _peak_mb() -> float:
    """The largest resident size of this process or one of its workers, in MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3


class _Progress:
    """Counts what `build_dataset` reports; `images` are those done by this run, not those found finished.

    Where images have to be unpacked, that comes first, and only then is it known how many there are.
    """

    def __init__(self, verb: str, total: int, packed: Sequence[Packed], show) -> None:
        self.verb, self.total, self.num_files, self.show = verb, total, len(packed), show
        self.not_packed = total - sum(file.num_images for file in packed)
        self.found: int | None = None
        self.images = self.bytes = self.rejected = self.files = self.unpacked = 0
        self.start_s = time.monotonic()

    def unpacking(self, files: int, images: int, bytes_written: int) -> None:
        self.files += files
        self.unpacked += images
        self.bytes += bytes_written
        self.show(self)

    def __call__(self, images: int, bytes_read: int, rejected: int) -> None:
        if self.found is None:  # the first call tells of earlier runs
            self.found, self.rejected = images, rejected
            if self.files:
                self.total, self.bytes, self.start_s = self.not_packed + self.unpacked, 0, time.monotonic()
        else:
            self.images += images
            self.bytes += bytes_read
            self.rejected += rejected
        self.show(self)

    def stage(self) -> tuple[str, int, int, str]:
        """What is being done, how much of it is, and of how much."""
        if self.found is None:
            return "unpacking", self.files, self.num_files, "files"
        return self.verb, self.images + self.found, self.total, "images"

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.start_s, 1e-3)
        if self.found is None:
            return f"{self.unpacked:,} images, {self.bytes / seconds / 1e6:,.1f} MB/s"
        rate = self.images / seconds
        left_s = (self.total - self.images - (self.found or 0)) / rate if rate else 0
        return (
            f"{rate:,.0f} img/s, {self.bytes / seconds / 1e6:,.1f} MB/s, {self.rejected} rejected, "
            f"{left_s // 3600:.0f}:{left_s % 3600 // 60:02.0f}:{left_s % 60:02.0f} left"
        )


@contextlib.contextmanager
def _progress(total: int, verb: str, packed: Sequence[Packed] = ()) -> Iterator[_Progress]:
    """A bar on a terminal; elsewhere a line every minute."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(verb, total=total, rates="")

            def update(at: _Progress) -> None:
                doing, done, of, _ = at.stage()
                bar.update(task, description=doing, completed=done, total=of, rates=str(at))

            yield _Progress(verb, total, packed, update)
    else:
        next_line_s = time.monotonic() + LINE_EVERY_S

        def show(at: _Progress) -> None:
            nonlocal next_line_s
            if time.monotonic() >= next_line_s:
                next_line_s = time.monotonic() + LINE_EVERY_S
                doing, done, of, unit = at.stage()
                click.echo(f"{doing}: {done:,} of {of:,} {unit}, {at}", err=True)

        yield _Progress(verb, total, packed, show)
