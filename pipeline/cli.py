"""The commands imagefeed profile, tune and audit."""

import dataclasses
from pathlib import Path

import click

from imagefeed.dataset.console import Progress
from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.options import DATASET
from imagefeed.dataset.storage import Url
from imagefeed.model import NETS
from imagefeed.pipeline.options import AUGMENTATION, DEVICE, OPTIONS, READING, TUNED, Command, Number, OneOf, add_options
from imagefeed.pipeline.plan import fill_batch

OUT = click.argument("out", type=DATASET)
SPLIT = click.option("--split", show_default="the training split", help="Split to read; its records must have labels.")
BATCH_SIZE = OPTIONS["batch_size"].click_option()
NEW_FILE = click.Path(path_type=Path, dir_okay=False)
SECONDS = Number(1)
LINE_EVERY_S = 10  # if stderr is not a terminal
DEFAULT = click.core.ParameterSource.DEFAULT
MIN_CROP = 64  # pixels, below which the nets have nothing left to pool


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Find what limits the input pipeline, its fastest settings, and how an epoch visits the records."""


@main.command(cls=Command)
@OUT
@SPLIT
@click.option("--model", default="alexnet", show_default=True, metavar="NAME", help=f"Net to train: {', '.join(NETS)}.")
@click.option(
    "--precision",
    type=OneOf("auto", "float32", "bfloat16"),
    default="auto",
    show_default=True,
    help="Precision of training; auto is bfloat16 on CUDA, and the faster one on a CPU.",
)
@BATCH_SIZE
@DEVICE
@click.option("--seconds", type=SECONDS, default=30, show_default=True, help="Approximate time; longer if steps take seconds.")
@click.option("--try", "attempt", is_flag=True, help="Apply the first fix and measure again.")
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON, with every step and window.")
@click.option("--html", "page", type=NEW_FILE, metavar="FILE", help="Write a page with plots for a browser.")
@click.option("--trace", type=NEW_FILE, metavar="FILE", help="Write the steps as a trace for ui.perfetto.dev.")
@add_options({"Images": AUGMENTATION, "Speed and memory": (TUNED, *READING)})
@click.pass_context
def profile(
    context: click.Context,
    out: Path | Url,
    split: str | None,
    batch_size: int,
    attempt: bool,
    as_json: bool,
    page: Path | None,
    trace: Path | None,
    tuned: bool,
    **options,
) -> None:
    """Say what limits training on the dataset OUT, how to fix it, and what that gains.

    Measures loader and training together and alone, each stage alone, and short runs with other options. Bytes to be read from
    the disk are evicted from the page cache first.
    """
    if options["crop_size"] < MIN_CROP:
        raise click.BadParameter(f"nets take crops of {MIN_CROP} pixels or more", context, param_hint="--crop-size")
    with one_sentence():
        for path in filter(None, (page, trace)):  # before half a minute of measuring
            check_folder(path)
        manifest = Manifest.load(out)
        split, batch_size = chosen_batch(manifest, split, batch_size)
        options |= {"split": split, "batch_size": batch_size}
        from imagefeed.model.nets import own_input
        from imagefeed.pipeline.profiler.measure import profile_input
        from imagefeed.pipeline.profiler.page import render_html
        from imagefeed.pipeline.profiler.report import render_json, render_text
        from imagefeed.pipeline.profiler.trace import render_trace
        from imagefeed.pipeline.tuner.saved import key_of

        own = own_input(options["model"])
        if own and own.fixed and own.crop_size and context.get_parameter_source("crop_size") is DEFAULT:
            options["crop_size"] = own.crop_size  # as in training
        if tuned:
            options = take_tuned(context, options, key_of(manifest, **options), err=True)
        found = profile_input(
            manifest, attempt=attempt, on_stage=lambda stage: click.echo(f"measuring {stage}", err=True), **options
        )
        for path, render in ((page, render_html), (trace, render_trace)):
            if path:
                write_atomically(path, render(found).encode())
        click.echo(render_json(found) if as_json else render_text(found))


@main.command(cls=Command)
@OUT
@SPLIT
@BATCH_SIZE
@DEVICE
@click.option("--seconds", type=SECONDS, default=60, show_default=True, help="Time to spend.")
@click.option("--picture", type=NEW_FILE, metavar="FILE", help="Plot the settings tried, as .png, .svg or .pdf.")
@add_options({"Images": AUGMENTATION})
def tune(out: Path | Url, split: str | None, batch_size: int, seconds: float, picture: Path | None, **options) -> None:
    """Find the fastest loader settings for the dataset OUT on this machine, and save them.

    Tries decoding threads, prefetch and the cache; on a GPU, its decoders, the cores, and shares of each; and, if the dataset is
    larger than memory, read-ahead. `imagefeed train` and `imagefeed profile` use the settings for the same machine, dataset,
    batch and crop. The shuffle and the cache on the device change what a net learns, so this only recommends them.
    """
    with one_sentence():
        from imagefeed.pipeline.tuner import report, saved
        from imagefeed.pipeline.tuner.tune import tune as find_settings

        if picture:
            report.check_format(picture)
            check_folder(picture)
        manifest = Manifest.load(out)
        split, batch_size = chosen_batch(manifest, split, batch_size)
        key = saved.key_of(manifest, split, batch_size, **options)
        with Progress(1, every_s=LINE_EVERY_S, transient=True) as progress:
            found = find_settings(manifest, split, batch_size, seconds=seconds, on_progress=progress.update, **options)
        click.echo(report.render_text(found))
        try:
            path = saved.save(key, found)
            refusal = "not saved: other programs took too much of the processors"
            click.echo(f"saved for train and profile: {path}" if path else refusal)
        except UserError as error:
            click.echo(f"not saved: {error.of_command()}")
        if picture:
            report.draw(found, picture)
            click.echo(f"picture: {picture}")


@main.command(cls=Command)
@OUT
@click.option("--split", show_default="the training split", help="Split to audit.")
@BATCH_SIZE
@dataclasses.replace(OPTIONS["world_size"], default=1, default_text="").click_option()
@OPTIONS["seed"].click_option()
@click.option("--epoch", type=Number(0, whole=True), default=0, show_default=True, help="Epoch to walk, from 0.")
@OPTIONS["shuffle"].click_option()
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON.")
def audit(
    out: Path | Url,
    split: str | None,
    batch_size: int,
    world_size: int,
    seed: int,
    epoch: int,
    shuffle: str | None,
    as_json: bool,
) -> None:
    """Check how an epoch visits the records of the dataset OUT.

    Walks every step of every rank, counts how often each record is visited, and compares the shuffle with others. Exits with 1 if
    a record is visited twice, or is left out although it fills a batch.
    """
    with one_sentence():
        from imagefeed.pipeline import audit as auditing
        from imagefeed.pipeline.arguments import default_shuffle

        manifest = Manifest.load(out)
        split, batch_size = chosen_batch(manifest, split, batch_size, world_size)
        shuffle = shuffle or default_shuffle(manifest)
        records, labels = manifest.split(split).records, manifest.load_index(split)["label"]
        found = auditing.audit(records, batch_size, world_size, seed, epoch, shuffle, labels=labels)
        click.echo(auditing.render_json(found) if as_json else auditing.render_text(found))
    if found.wrong:
        raise SystemExit(1)


def chosen_batch(manifest: Manifest, split: str | None, batch_size: int, world_size: int = 1) -> tuple[str, int]:
    """The split to read, and the batch size, lowered with a word on stderr if the split does not fill it.

    Says so, too, if the split is not one to train on, because there is none.
    """
    if split is None and not manifest.trainable:
        click.echo(f"{manifest.root}: no split to train on; reads {manifest.train_split}", err=True)
    split = split or manifest.train_split
    batch_size, lowered = fill_batch(split, manifest.split(split).records, batch_size, world_size)
    if lowered:
        click.echo(lowered, err=True)
    return split, batch_size


def take_tuned(context: click.Context, options: dict, key: dict[str, object], err: bool = False) -> dict[str, object]:
    """`options` with the settings saved under `key` where the command line gives none; a line says which."""
    from imagefeed.pipeline.tuner.saved import in_words, load

    settings, since = load(key)
    taken = {name: value for name, value in settings.items() if context.get_parameter_source(name) is DEFAULT}
    if taken:
        click.echo(f"{since}: {', '.join(in_words(name, value) for name, value in taken.items())}", err=err)
    return options | taken


def check_folder(path: Path) -> None:
    """Raises UserError if the file's folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or choose another")
