"""The commands build, verify, inspect, convert and sample."""

import inspect as python_inspect
import json
import math
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from imagefeed.dataset.console import Progress, plural
from imagefeed.dataset.decision import Decision
from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.options import DATASET, PlaceType
from imagefeed.dataset.storage import Url, exists
from imagefeed.preprocess.build import BuildProgress
from imagefeed.preprocess.build import build as build_dataset
from imagefeed.preprocess.options import CLASS_LEVELS, ENGINES, FITS, FORMATS, LAYOUTS, RANGES

RAW = PlaceType(folder=False)
FOLDER = PlaceType(urls=False)
DEFAULTS = {name: argument.default for name, argument in python_inspect.signature(build_dataset).parameters.items()}
LINE_EVERY_S = 60  # if the output is not a terminal
SIMD_HINT = (
    "Pillow {} resizes images other than common JPEGs; Pillow-SIMD does so about 7 times faster: make install, or "
    "pip install --force-reinstall --no-deps --no-binary pillow-simd pillow-simd"
)


class PartType(click.ParamType):
    name = "K/N"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", value)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not K/N with K from 1 to N, such as 3/8", parameter, context)
        return int(match[1]), int(match[2])


class NamesType(click.ParamType):
    name = "NAME[,NAME...]"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)
        if not all(names) or len(set(names)) < len(names):
            self.fail(f"{value!r} is not NAME[,NAME...] with different names", parameter, context)
        return names


class RangeType(click.ParamType):
    name = "LOW,HIGH"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[float, float]:
        try:
            low, high = map(float, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not LOW,HIGH with LOW below HIGH, such as 0,4095", parameter, context)
        return low, high


def option(name: str, help: str, type: Any = None, show: str = "", **more: Any) -> Callable:
    """An option of `build`, or one that another command shares, with the function's default, shown as `show`, and its range."""
    if name in RANGES:
        low, high = RANGES[name]
        type = click.FloatRange(low, high) if isinstance(low, float) else click.IntRange(low, None if high == math.inf else high)
    default = DEFAULTS[name]
    return click.option(
        "--" + name.replace("_", "-"),
        type=type,
        default=default,
        show_default=show or default not in (None, False),
        help=help,
        **more,
    )


WORKERS = option("workers", "Worker processes.", show="one per core")


# Each command has its own: click keeps the help option of its first call, even if a later one comes from a group that knows -h.
HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=HELP)
def main() -> None:
    """Pack images into a dataset, check it, and look at it."""


@main.command(context_settings=HELP)
@click.argument("raw", type=RAW)
@click.argument("out", type=DATASET, required=False)
@option("split", "Name of the split (train, val, ...) if the folders of RAW are the classes of one split.", metavar="NAME")
@option("train_split", "Split to train on, if no name makes it clear.", metavar="NAME", show="the split named like train")
@option("validation_fraction", "Fraction of each class to hold out as split val, if RAW has no splits.", show="none")
@option("classes", "File of class names, one per line, in label order.", metavar="FILE", show="sorted names")
@option("class_level", "Class in nested folders: the whole path, or the top folder only.", click.Choice(CLASS_LEVELS))
@option("layout", "Layout of RAW, if auto-detection is wrong.", click.Choice(LAYOUTS))
@option("frames_per_second", "Frames to extract per second of video.", float)
@option("columns", "Further columns to keep, of tables, Parquet files or WebDataset's shards.", NamesType(), show="none")
@option("size", "Pixels of the shorter side as stored.")
@option("fit", "Store the center square, or the whole image.", click.Choice(FITS))
@option("quality", "JPEG quality as stored.")
@option("range", "Values to store as black and white in images with more than 8 bits.", RangeType(), show="the bits of each file")
@option("seed", "Random seed of the shuffle.")
@option("max_rejected", "Abort if more than this fraction of images is bad, or suspicious (nearly black or white).")
@option("engine", "Run on worker processes here, or on a Ray cluster.", click.Choice(ENGINES))
@option("address", "Address of the Ray cluster.", show="found, or started here")
@option("part", "Write only the K-th of N parts; complete the dataset with a build without --part.", PartType())
@WORKERS
@option("work_dir", "Folder to pack in if OUT is a URL.", FOLDER, show="in TMPDIR", metavar="DIR")
@option("dry_run", "Print the splits, classes and labels found in RAW, and stop.", is_flag=True)
def build(raw: Path | Url, out: Path | Url | None, **options: Any) -> None:
    """Pack the images of RAW into the dataset OUT.

    RAW is a folder of class folders, with or without splits; ImageNet's archives, WebDataset's shards or other tar archives;
    Kaggle's ImageNet, unpacked; Parquet files; FFCV's .beton files; or lists or tables of paths and labels. OUT, and RAW of
    archives or Parquet files, may be URLs: s3://, gs:// or az://. After an interruption, or when raw images have changed, run
    the same command again.
    """
    if out is None and not options["dry_run"]:
        raise click.UsageError("Missing argument 'OUT'.")
    start_s = time.monotonic()
    phase, images = "", 0
    with one_sentence(), Progress(1, every_s=LINE_EVERY_S) as display:

        def show(at: BuildProgress) -> None:
            nonlocal phase, images
            if at.phase == "listed":
                describe_source(raw, at, options)
            elif at.phase == "renewing":
                from imagefeed.preprocess.renew import describe_changes

                changes = describe_changes(at.changed, at.stale_shards)
                click.echo(f"{out}: {changes}; rewriting {plural(at.stale_shards, 'shard')}")
            elif at.phase != phase:
                display.restart(at.total, at.done)
            else:
                display.update(at.done, describe_progress(at))
            phase, images = at.phase, at.images

        manifest = build_dataset(raw, out, **options, on_progress=show)
    if isinstance(manifest, Decision):
        click.echo(f"{raw}: read as {manifest}")
        return
    seconds = time.monotonic() - start_s
    if manifest is None:
        number, of = options["part"]
        click.echo(
            f"{out}: part {number} of {of} is done, {plural(images, 'image')} in {seconds:.1f} s; when all parts are, run build "
            "without --part to complete the dataset"
        )
        return
    splits = manifest.splits.values()
    unnoticed = "" if exists(manifest.root / "raw.npz") else ", but changes in RAW go unnoticed without raw.npz"
    click.echo(
        f"{out}: {plural(manifest.num_records, 'record')} in {plural(sum(len(split.shards) for split in splits), 'shard')}, "
        f"{sum(split.bytes for split in splits) / 1e6:,.1f} MB; "
        + (f"{seconds:.1f} s, {images / seconds:,.0f} images/s; " if images else f"complete already{unnoticed}; ")
        + (", ".join(f"{count:,} {action}" for action, count in manifest.rejected.items()) or "no image rejected or converted")
        + f"; peak memory {peak_mb():,.0f} MB"
    )


def describe_source(raw: Path | Url, at: BuildProgress, options: dict[str, Any]) -> None:
    from imagefeed.codec.cores import usable_cores
    from imagefeed.preprocess.image import codec_versions

    source, versions = at.source, codec_versions()
    engine = "Ray" if options["engine"] == "ray" else plural(options["workers"] or usable_cores(), "worker")
    click.echo(f"{raw}: read as {source.decision}")
    click.echo(f"{engine}; " + ", ".join(f"{library} {version}" for library, version in list(versions.items())[:2]))
    if "pillow" in versions:
        click.echo(SIMD_HINT.format(versions["pillow"]), err=True)


def describe_progress(at: BuildProgress) -> str:
    if at.phase == "sending":
        return f"sent {at.done:,} of the last {plural(at.total, 'shard')}"
    speed = f"{at.bytes_read / at.seconds / 1e6:,.1f} MB/s"
    if at.phase == "unpacking":
        return f"unpacked {at.done:,} of {plural(at.total, 'file')}, {plural(at.images, 'image')}, {speed}"
    rate = f"{at.images / at.seconds:,.0f} images/s"
    if at.phase == "checking":
        return f"compared {at.done:,} of {plural(at.total, 'image')} that may have changed, {rate}"
    return f"packed {at.done:,} of {plural(at.total, 'image')}, {rate}, {speed}, {at.rejected:,} rejected"


def peak_mb() -> float:
    """The largest resident size of this process or one of its workers, in MB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3


@main.command(context_settings=HELP)
@click.argument("out", type=DATASET)
@click.option("--deep", is_flag=True, help="Also decode every image and recompute the statistics.")
@click.option("--raw", type=RAW, metavar="RAW", help="Also check that RAW has the images that were packed.")
@WORKERS
def verify(out: Path | Url, deep: bool, raw: Path | Url | None, workers: int | None) -> None:
    """Check that every byte of the dataset OUT is as written.

    Prints a line for each problem; the exit code is 1 if there is one.
    """
    with one_sentence():
        from imagefeed.dataset.manifest import Manifest
        from imagefeed.preprocess.verify import verify as verify_dataset

        start_s = time.monotonic()
        manifest = Manifest.load(out)
        with Progress(manifest.num_records, every_s=LINE_EVERY_S) as display:

            def show(records: int, total: int) -> None:
                display.total = total
                display.update(records, f"verified {records:,} of {plural(total, 'record')}")

            problems = verify_dataset(out, deep=deep, raw=raw, workers=workers, on_progress=show, on_problem=click.echo)
        records = plural(manifest.num_records, "record")
        if problems:
            raise UserError(f"{out}: {plural(len(problems), 'problem')} in {records}; see the lines above")
        megabytes = sum(split.bytes for split in manifest.splits.values()) / 1e6
        click.echo(
            f"{out}: {records} intact{', decode, and match the statistics' if deep else ''}"
            f"{f', packed from the images in {raw}' if raw else ''}; {megabytes:,.1f} MB in {time.monotonic() - start_s:.1f} s"
        )


@main.command(context_settings=HELP)
@click.argument("out", type=DATASET)
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw a contact sheet into this .png, .jpg, .pdf or .svg."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(out: Path | Url, picture: Path | None, as_json: bool) -> None:
    """Print counts, sizes and statistics of the dataset OUT."""
    with one_sentence():
        from imagefeed.dataset.manifest import Manifest
        from imagefeed.preprocess.inspection import describe, draw_contact_sheet, render_text

        manifest = Manifest.load(out)
        facts = describe(manifest)
        if picture is not None:
            draw_contact_sheet(manifest, picture)
        click.echo(json.dumps(facts, indent=1) if as_json else render_text(facts))
        if picture is not None:
            click.echo(f"{picture}: contact sheet", err=as_json)


@main.command(context_settings=HELP)
@click.argument("out", type=DATASET)
@click.argument("dest", type=FOLDER)
@click.option("--format", type=click.Choice(FORMATS), required=True, help="Form to write.")
@click.option("--split", metavar="NAME", help="Write only this split.")
def convert(out: Path | Url, dest: Path, format: str, split: str | None) -> None:
    """Write the dataset OUT into the new folder DEST for other programs.

    The stored JPEGs stay as they are. folders has SPLIT/CLASS/NAME.jpg; webdataset has tar shards of KEY.jpg, KEY.cls and
    KEY.json; parquet has the columns of Hugging Face datasets. The shards of OUT are TFRecord files already, of tf.train.Example
    with 0-based labels; tfrecord adds the columns that were kept with build --columns to each record.

    Prints a line for each corrupt record, which is left out; the exit code is 1 if there is one.
    """
    with one_sentence():
        from imagefeed.preprocess.convert import convert as convert_dataset

        start_s = time.monotonic()
        with Progress(1, every_s=LINE_EVERY_S) as display:

            def show(records: int, total: int) -> None:
                display.total = total
                display.update(records, f"wrote {records:,} of {plural(total, 'record')}")

            done = convert_dataset(out, dest, format=format, split=split, on_progress=show, on_problem=click.echo)
        for note in done.notes:
            click.echo(f"note: {note}")
        click.echo(f"{dest}: {plural(done.records, 'record')} as {format}, in {time.monotonic() - start_s:.1f} s")
        if done.corrupt:
            raise UserError(f"{dest}: lacks {plural(len(done.corrupt), 'corrupt record')} of {out}; see the lines above")


def check_classes(_context: click.Context, parameter: click.Parameter, value: int) -> int:
    from imagefeed.preprocess.sample.tree import MAX_CLASSES  # loads NumPy, so not for --help

    return click.IntRange(2, MAX_CLASSES).convert(value, parameter, _context)


@main.command(context_settings=HELP)
@click.argument("raw", type=FOLDER)
@click.option(
    "--images", type=click.IntRange(1), default=1000, show_default=True, help="Images to draw; about 1 in 6 goes to val."
)
@click.option(
    "--classes", type=int, default=10, show_default=True, callback=check_classes, help="Beyond 18, kinds repeat in other colors."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed of the drawings.")
def sample(raw: Path, images: int, classes: int, seed: int) -> None:
    """Draw a small labeled tree of images, RAW/train and RAW/val, to try everything on."""
    with one_sentence():
        from imagefeed.preprocess.sample.tree import draw_sample

        start_s, done = time.monotonic(), -1
        with Progress(images, every_s=LINE_EVERY_S) as display:

            def show(drawn: int, _bytes: int, _rejected: int) -> None:
                nonlocal done
                if done < 0:  # the first call counts what an earlier run drew
                    done = drawn
                    display.restart(images, done)
                else:
                    done += drawn
                    display.update(done, f"drew {done:,} of {plural(images, 'image')}")

            drawn = draw_sample(raw, images, classes, seed, show)
        seconds = time.monotonic() - start_s
        click.echo(f"{raw}: {plural(images, 'image')} of {classes:,} classes, {drawn:,} of them drawn now, in {seconds:.1f} s")
