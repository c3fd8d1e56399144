"""The commands of python -m pipeline."""

from pathlib import Path

import click

from pipeline.profile import BATCH_SIZE, profile_input
from pipeline.report import render_json, render_text
from preprocess.errors import one_sentence
from preprocess.manifest import Manifest


@click.group()
def main() -> None:
    """The input pipeline: what limits it."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", show_default="the training split", help="Split to read; its records must have labels.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    show_default=f"{BATCH_SIZE}, or all of a smaller split",
    help="Images in a batch, as in training.",
)
@click.option(
    "--size", type=click.IntRange(64), default=224, show_default=True, help="Pixels of a crop, as in training."
)
@click.option(
    "--threads", type=click.IntRange(1), show_default="all cores", help="CPU threads that read, decode and crop."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where images are decoded and the net is trained; auto is cuda where PyTorch finds a GPU, else cpu.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=30,
    show_default=True,
    help="How long to measure, about; on a CPU it takes longer, as a step of training takes seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdict and figures as JSON, every window's rate.")
def profile(
    out: Path,
    split: str | None,
    batch_size: int | None,
    size: int,
    threads: int | None,
    device: str,
    seconds: float,
    as_json: bool,
) -> None:
    """Say what limits training on the dataset OUT.

    Measures reading, decoding, the whole input pipeline, training AlexNet on one batch, and both together.
    """
    with one_sentence():
        manifest = Manifest.load(out)

        def say(stage: str) -> None:
            click.echo(f"measuring {stage}", err=True)

        found = profile_input(manifest, split, batch_size, threads, device, seconds, say, size)
        click.echo(render_json(found) if as_json else render_text(found))
