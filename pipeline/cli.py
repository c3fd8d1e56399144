"""The commands of python -m pipeline."""

from pathlib import Path

import click

from pipeline.profile import profile_input
from pipeline.report import render_json, render_text
from preprocess.errors import one_sentence
from preprocess.manifest import Manifest


@click.group()
def main() -> None:
    """The input pipeline: what limits it."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", help="Which split to read; the training split by default.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(1), show_default="all cores", help="CPU threads of the pipeline.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="Where.")
@click.option("--seconds", type=click.FloatRange(1), default=30, show_default=True, help="Time to measure for, about.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def profile(
    out: Path, split: str | None, batch_size: int, threads: int | None, device: str, seconds: float, as_json: bool
) -> None:
    """Say what limits training on the dataset OUT.

    Measures reading, decoding, the whole input pipeline, training AlexNet on one batch, and both together.
    """
    with one_sentence():
        manifest = Manifest.load(out)

        def say(stage: str) -> None:
            click.echo(f"measuring {stage}", err=True)

        found = profile_input(manifest, split, batch_size, threads, device, seconds, say)
        click.echo(render_json(found) if as_json else render_text(found))
