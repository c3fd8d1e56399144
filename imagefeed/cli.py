"""The `imagefeed` command. A command's module is imported only when that command is used or listed."""

import os
from importlib import import_module

import click

from imagefeed import __version__
from imagefeed.dataset.errors import one_sentence

HELP_NAMES = ["-h", "--help"]
# In the order in which a newcomer needs them.
HOMES = {
    "sample": ("imagefeed.preprocess.cli", "sample"),
    "build": ("imagefeed.preprocess.cli", "build"),
    "verify": ("imagefeed.preprocess.cli", "verify"),
    "inspect": ("imagefeed.preprocess.cli", "inspect"),
    "convert": ("imagefeed.preprocess.cli", "convert"),
    "train": ("imagefeed.training.cli", "main"),
    "profile": ("imagefeed.pipeline.cli", "profile"),
    "tune": ("imagefeed.pipeline.cli", "tune"),
    "audit": ("imagefeed.pipeline.cli", "audit"),
}


class LazyGroup(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(HOMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return load(name) if name in HOMES else None


@click.group(cls=LazyGroup, context_settings={"help_option_names": HELP_NAMES})
@click.version_option(__version__, message="imagefeed %(version)s")
def main() -> None:
    """Pack images into a dataset once, then feed them to PyTorch as fast as the machine allows.

    A dataset, OUT, is a folder, or the URL of one: s3://, gs://, az:// or, to read it, http:// and https:// (docs/stores.md).
    """


def load(name: str) -> click.Command:
    """Imports a command, after setting what must be set in this process before torch loads."""
    # OpenMP reads this when torch loads: how long a thread spins for the others before it sleeps. A training step on a CPU
    # has thousands of short parallel regions. With the default of 300,000, two busy neighbors on two cores slowed training
    # from 48 to 2 images/s. Without spinning it ran at 16 to 20 images/s beside them, but at only 31 alone; with 3,000, at
    # 11 to 19 beside them and at 39 to 49 alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    module, attribute = HOMES[name]
    with one_sentence():  # Ctrl-C while the libraries load
        command: click.Command = getattr(import_module(module), attribute)
    return command
