"""The commands of python -m pipeline, and the loader's options on a command line."""

import re
from collections.abc import Callable
from pathlib import Path

import click

from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.model import NETS
from imagefeed.pipeline import audit as auditing
from imagefeed.pipeline.graph import HW_DECODER_LOAD, PREFETCH
from imagefeed.pipeline.loader import CACHES, MAX_CORRUPT, MEANS, READ_AHEAD
from imagefeed.pipeline.plan import SHUFFLES, check_jitter
from imagefeed.pipeline.profiler.measure import BATCH_SIZE, profile_input
from imagefeed.pipeline.profiler.page import render_html
from imagefeed.pipeline.profiler.report import render_json, render_text
from imagefeed.pipeline.profiler.trace import render_trace
from imagefeed.pipeline.tuner.report import Watch, check_picture, draw, render_table, render_words
from imagefeed.pipeline.tuner.saved import in_words, keep, kept, key_of
from imagefeed.pipeline.tuner.tune import tune as find_settings

NEW_FILE = click.Path(path_type=Path, dir_okay=False)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(_context, _parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)B?", value.upper())
    if not match:
        raise click.BadParameter(f"{value!r} is no number of bytes, as 500M or 117G")
    return int(float(match[1]) * UNITS[match[2]])


def parse_jitter(_context, _parameter, value: str) -> tuple[float, ...]:
    try:
        strengths = tuple(float(part) for part in value.split(","))
        check_jitter(strengths)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not four numbers of 0 or more, the last at most 0.5, as 0.4,0.4,0.4,0.1"
        ) from None
    return strengths


def augmentation_options(command: Callable) -> Callable:
    """Adds those options of the loader that decide what the batches are."""
    for option in (
        click.option(
            "--color-jitter",
            default="0,0,0,0",
            callback=parse_jitter,
            metavar="B,C,S,H",
            help="Brightness, contrast, saturation and hue, as torchvision's ColorJitter takes them.",
        ),
        click.option("--random-resized-crop", is_flag=True, help="Rescaled random parts, as torchvision's RandomResizedCrop."),
        click.option(
            "--std",
            type=click.Choice(["none", "dataset"]),
            default="none",
            help="Divide by the standard deviation of each channel.",
        ),
        click.option("--mean", type=click.Choice(MEANS), default="channel", help="What is subtracted; image: the paper's."),
        click.option(
            "--shuffle",
            type=click.Choice(SHUFFLES),
            default="global",
            help="All records, blocks of consecutive ones, or none: the stored order.",
        ),
    ):
        command = option(command)
    return command


def reading_options(command: Callable) -> Callable:
    """Adds those that decide only what the batches cost; their names are the loader's."""
    for option in (
        click.option(
            "--hw-decoder-load",
            type=click.FloatRange(0, 1),
            default=HW_DECODER_LOAD,
            help="Share of the images that a GPU's JPEG decoder takes from CUDA's.",
        ),
        click.option("--prefetch", type=click.IntRange(1), default=PREFETCH, help="Batches that are made ahead of time."),
        click.option(
            "--read-ahead", type=click.IntRange(0), default=READ_AHEAD, help="Steps whose bytes are asked for ahead of time."
        ),
        click.option(
            "--verify-checksums/--no-verify-checksums", default=True, help="Compare each record's checksum when it is read."
        ),
        click.option(
            "--max-corrupt",
            type=click.IntRange(0),
            default=MAX_CORRUPT,
            help="Corrupt records that are replaced before the run ends.",
        ),
        click.option(
            "--cache-bytes",
            callback=parse_bytes,
            metavar="BYTES",
            help="Memory that decoded images may take, as 117G.  [default: half of what is free]",
        ),
        click.option(
            "--cache",
            type=click.Choice(CACHES),
            default="none",
            help="Decode once: keep images in host memory as RGB, or on the device as YCbCr 4:2:0.",
        ),
        click.option(
            "--threads", "num_threads", type=click.IntRange(1), help="Threads that decode images.  [default: all cores]"
        ),
        click.option(
            "--tuned/--no-tuned",
            default=True,
            help="Take what python -m pipeline tune found for this machine, dataset, batch and crop; options that are given win.",
        ),
    ):
        command = option(command)
    return command


def take_tuned(
    context: click.Context, options: dict[str, object], key: dict[str, object], err: bool = False
) -> dict[str, object]:
    """`options` with the settings kept under `key` in place of what the command line leaves out; a line says which."""
    found, since = kept(key)
    default = click.core.ParameterSource.DEFAULT
    taken = {name: value for name, value in found.items() if context.get_parameter_source(name) is default}
    if taken:
        click.echo(f"{since}: {', '.join(in_words(name, value) for name, value in taken.items())}", err=err)
    return options | taken


@click.group()
def main() -> None:
    """The input pipeline: what limits it, its fastest settings, and in which order it takes the records."""


@main.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", show_default="the training split", help="Split to read; its records must have labels.")
@click.option("--model", default="alexnet", metavar="NAME", help=f"The net that is trained: {', '.join(NETS)}.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="auto: bfloat16 on CUDA, on a CPU what is faster there.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    show_default=f"{BATCH_SIZE}, or all of a smaller split",
    help="Images in a batch, as in training.",
)
@click.option("--crop-size", type=click.IntRange(64), default=224, help="Pixels of a crop, as in training.")
@augmentation_options
@reading_options
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    help="Where images are decoded and the net is trained; auto is cuda where PyTorch finds a GPU, else cpu.",
)
@click.option(
    "--seconds", type=click.FloatRange(1), default=30, help="How long to measure, about; longer where a step takes seconds."
)
@click.option("--try", "attempt", is_flag=True, help="Apply the first fix, and measure again.")
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON, every step and every window.")
@click.option("--html", "page", type=NEW_FILE, metavar="FILE", help="Write it with plots too, as a page for a browser.")
@click.option("--trace", type=NEW_FILE, metavar="FILE", help="Write the steps too, as a trace for ui.perfetto.dev.")
@click.pass_context
def profile(
    context: click.Context,
    out: Path,
    seconds: float,
    attempt: bool,
    as_json: bool,
    page: Path | None,
    trace: Path | None,
    **options,
) -> None:
    """Say what limits training on the dataset OUT, what to do about it, and what that would gain.

    Measures loader and training together, each alone, each stage alone, and short runs with other options. The bytes that are
    read cold are put out of the page cache before.
    """
    with one_sentence():
        manifest = Manifest.load(out)
        for path in filter(None, (page, trace)):  # before half a minute of measuring
            if not path.parent.is_dir():
                raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another")

        def say(stage: str) -> None:
            click.echo(f"measuring {stage}", err=True)

        if options.pop("tuned"):
            options = take_tuned(context, options, key_of(manifest, **options), err=True)
        found = profile_input(manifest, seconds=seconds, attempt=attempt, on_stage=say, **options)
        for path, render in ((page, render_html), (trace, render_trace)):
            if path:
                write_atomically(path, render(found).encode())
        click.echo(render_json(found) if as_json else render_text(found))


@main.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", show_default="the training split", help="Split to read; its records must have labels.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    show_default=f"{BATCH_SIZE}, or all of a smaller split",
    help="Images in a batch, as in training.",
)
@click.option("--crop-size", type=click.IntRange(64), default=224, help="Pixels of a crop, as in training.")
@augmentation_options
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    help="Where images are decoded; auto is cuda where PyTorch finds a GPU, else cpu.",
)
@click.option("--seconds", type=click.FloatRange(1), default=60, help="How long it may take.")
@click.option("--picture", type=NEW_FILE, metavar="FILE", help="Draw what was tried too, as .png, .svg or .pdf.")
def tune(out: Path, seconds: float, picture: Path | None, **options) -> None:
    """Find the settings with which the dataset OUT is loaded fastest on this machine, and keep them.

    Tries threads, batches ahead, the cache, on a GPU the share of its JPEG decoder, and where the dataset is larger than memory
    how far to read ahead. train.py and profile take what was found for the same machine, dataset, batch and crop. The shuffle
    and the cache on the device decide what a net learns: they are only advised.
    """
    with one_sentence():
        manifest = Manifest.load(out)
        if picture:
            check_picture(picture)
        key = key_of(manifest, **options)
        with Watch() as watch:
            found = find_settings(manifest, seconds=seconds, on_progress=watch.show, **options)
        path = keep(key, found)
        if picture:
            draw(found, picture)
        click.echo(render_table(found))
        click.echo(render_words(found))
        click.echo(f"kept for train.py and profile: {path}" if path else "not kept: it holds only beside those programs")
        if picture:
            click.echo(f"picture: {picture}")


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", show_default="the training split", help="Split whose records are taken.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    show_default=f"{BATCH_SIZE}, or what a smaller split fills",
    help="Images in a batch of a rank, as in training.",
)
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Ranks, as in training.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the order, as in training.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Which one to walk, from 0.")
@click.option(
    "--shuffle",
    type=click.Choice(SHUFFLES),
    default="global",
    show_default=True,
    help="All records, blocks of consecutive ones, or none: the stored order.",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON.")
def audit(
    out: Path, split: str | None, batch_size: int | None, world_size: int, seed: int, epoch: int, shuffle: str, as_json: bool
) -> None:
    """Check the order in which an epoch takes the records of the dataset OUT.

    Walks all steps of all ranks, counts how often each record is taken, and compares the shuffle with others. Exit code 1 if
    a record is taken twice, or left out though it fills a batch.
    """
    with one_sentence():
        manifest = Manifest.load(out)
        split = split or manifest.train_split
        records = manifest.split(split).records
        batch_size = batch_size or max(min(BATCH_SIZE, records // world_size), 1)
        labels = manifest.load_index(split)["label"]
        found = auditing.audit(records, batch_size, world_size, seed, epoch, shuffle, labels=labels)
        click.echo(auditing.render_json(found) if as_json else auditing.render_text(found))
    if found.wrong:
        raise SystemExit(1)
