"""The kind of argument that names a dataset on a command line."""

from pathlib import Path
from typing import Any

import click

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.storage import Url, place


class PlaceType(click.ParamType):
    """A Path or a Url; with `folder`, a Path that is no file, and without `urls`, no Url."""

    name = "directory"

    def __init__(self, folder: bool = True, urls: bool = True):
        self.path, self.urls = click.Path(path_type=Path, file_okay=not folder), urls

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Path | Url:
        try:
            found = place(value)
        except UserError as error:
            self.fail(error.of_command(), parameter, context)
        if isinstance(found, Url) and not self.urls:
            self.fail(f"{found} is a URL; give a folder on a disk", parameter, context)
        return found if isinstance(found, Url) else self.path.convert(found, parameter, context)


DATASET = PlaceType()
