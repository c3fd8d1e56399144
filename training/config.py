"""The file of a run: recipe.json, or some of its keys, as `imagefeed train --config` takes it."""

import difflib
import json
from pathlib import Path
from typing import Any

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.options import Flag, Kind, OneOf, renamed
from imagefeed.training.options import COMPILE, COUNT, RECIPE, Name
from imagefeed.training.recipes import RECIPES

# The keys that are not values of a Recipe, as resume.py writes them.
OTHERS: dict[str, Kind] = {
    "recipe": OneOf(*RECIPES),
    "dataset_path": Name(),
    "dataset": Name(),  # its fingerprint
    "ranks": COUNT,
    "images_a_step": COUNT,
    "compile": COMPILE,
    "cache_device": Flag(),
    "weights": Name(),
    "subset": Name(),
    "subset_records": Name(),  # their number and digest
}
FILES = ("weights", "subset")  # what a run may have been given
KEYS = (*OTHERS, *RECIPE)


def read_config(path: Path) -> dict[str, Any]:
    """The values of a file, by their keys; `batch_size` is of all ranks together, as in RECIPES.

    Raises UserError for what is no JSON object, unknown keys, values out of range, and batch sizes that contradict each other.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; give the recipe.json of a run folder, or a file with some of its keys")
    values: dict[str, Any] = {}
    for key, given in content.items():
        name, value = renamed(key, given)
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            hint = f"the nearest is {near[0]}" if near else "keys are options of train, as in lr and batch_size"
            raise UserError(f"{path}: {key} is no key of recipe.json; {hint}")
        optional = name in (*FILES, "subset_records") or (name in RECIPE and RECIPE[name].default is None)
        kind = RECIPE[name].kind if name in RECIPE else OTHERS[name]
        if not (kind.valid(value) or (value is None and optional)):
            raise UserError(f"{path}: {key} must be {kind.words}, not {json.dumps(given)}; correct it")
        values[name] = tuple(value) if isinstance(value, list) else value
    images, batch_size, ranks = (values.get(key) for key in ("images_a_step", "batch_size", "ranks"))
    if batch_size is not None:
        product = batch_size * (ranks or 1)
        if images not in (None, product):
            of_ranks = f"batch_size {batch_size} on {plural(ranks or 1, 'rank')}"
            raise UserError(f"{path}: {of_ranks} is {product} images a step, but images_a_step is {images}; correct one of them")
        images = product
    return values if images is None else values | {"batch_size": images}
