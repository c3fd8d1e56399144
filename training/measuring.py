"""Measures the errors of checkpoints: `imagefeed train OUT --evaluate`."""

import contextlib
import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagefeed.dataset.console import Progress
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.batch import Batch
from imagefeed.training.checkpoints import identity, read_checkpoint, readable, refuse_difference
from imagefeed.training.evaluation import TOP, VIEWS, Member, evaluate, net_of
from imagefeed.training.inputs import Inputs, Preprocessing
from imagefeed.training.options import RECIPE
from imagefeed.training.pictures import draw_pictures
from imagefeed.training.recipes import Recipe
from imagefeed.training.summary import published, show_errors

BATCH_SIZE = 128


def measure(inputs: Inputs, paths: list[Path], predictions: Path | None = None, pictures: Path | None = None) -> None:
    """Prints the validation errors of a checkpoint, the newest in a folder, or several averaged.

    `predictions` is a file for those by ten views (`write_predictions`), `pictures` a folder for pictures of the first
    checkpoint.
    """
    manifest, ranks = inputs.manifest, inputs.ranks
    if manifest.eval_split is None:
        raise UserError(f"{manifest.root}: no validation split to measure on; build the dataset with one, such as val")
    if predictions and not predictions.resolve().parent.is_dir():  # not after minutes of measuring
        raise UserError(f"{predictions}: the folder {predictions.parent} does not exist; create it first")
    if pictures and ranks.first:
        pictures.mkdir(parents=True, exist_ok=True)
    members, names, others = [], [], {}
    for path in paths:
        state = read_checkpoint(path)
        with readable(path):
            members.append(open_member(manifest, path, state, inputs.device))
            names.append(f"{path}, step {state['progress']['step']:,}")
            others = published(manifest, recipe_of(state)) if len(paths) == 1 else {}
    errors, rows = {}, []
    with Progress(1, every_s=30, stream=sys.stdout) as progress:
        for views, name in VIEWS.items():
            rows.clear()
            progress.restart(1)
            with contextlib.ExitStack() as stack:
                loaders = {
                    preprocessing: stack.enter_context(inputs.validation(views, BATCH_SIZE, preprocessing))
                    for preprocessing in dict.fromkeys(member.preprocessing for member in members)
                }
                errors[name] = evaluate(
                    members,
                    loaders,
                    ranks,
                    lambda fraction, name=name: progress.update(fraction, name),
                    lambda batch, scores: rows.append(likeliest(batch, scores)),
                )
    print(f"{' + '.join(names)}, on {manifest.eval_split} of {manifest.root}")
    show_errors(errors, len(manifest.classes), others)
    if predictions:
        parts = ranks.gathered([np.concatenate(column) for column in zip(*rows, strict=True)])
        if ranks.first:
            write_predictions(predictions, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    if pictures and ranks.first:
        print(f"pictures: {', '.join(map(str, draw_pictures(pictures, inputs, members[0])))}")


def recipe_of(state: dict[str, Any]) -> Recipe:
    """The recipe of a checkpoint, except the number of epochs and images a step."""
    made_with = state["made_with"]
    own = {name: made_with[option.flag] for name, option in RECIPE.items() if name not in ("epochs", "batch_size")}
    return Recipe(**own, epochs=made_with.get("--epochs", RECIPE["epochs"].default))


def open_member(manifest: Manifest, path: Path, state: dict[str, Any], device: torch.device) -> Member:
    """The net of a checkpoint that was trained on this dataset, or on another with the same classes.

    Raises UserError for other classes, and whatever torch and the lookups raise for a malformed `state`.
    """
    mine = identity(manifest)
    if state["made_with"]["dataset"] == mine.pop("dataset"):
        del mine["class names"]  # the dataset's fingerprint covers them
    refuse_difference(state["made_with"], mine, path, "measure it on a dataset with the same classes")
    recipe = recipe_of(state)
    model = net_of(recipe, len(manifest.classes))
    model.load_state_dict(state["model"])
    preprocessing = Preprocessing(recipe.crop_size, recipe.mean, recipe.std)
    return Member(model.to(device, memory_format=torch.channels_last), recipe.precision, preprocessing)


def likeliest(batch: Batch, scores: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Ids (N,), labels (N,), the five likeliest classes (N, 5), and their probabilities, without padding."""
    valid = batch.valid.cpu()
    top = scores.topk(min(TOP, scores.shape[1]))
    columns = (batch.ids, batch.labels, top.indices, top.values.exp())
    return tuple(column.cpu()[valid].numpy() for column in columns)


def write_predictions(path: Path, ids: np.ndarray, labels: np.ndarray, classes: np.ndarray, probabilities: np.ndarray) -> None:
    """Writes a .npz with these names, or a .csv with a line for each record: id, label, class1 .. class5, probability1 .. 5.

    Labels and classes are indices into the dataset's classes; records are in the order of their ids.
    """
    order = np.argsort(ids)
    ids, labels, classes, probabilities = (column[order] for column in (ids, labels, classes, probabilities))
    if path.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, ids=ids, labels=labels, classes=classes, probabilities=probabilities)
        write_atomically(path, file.getvalue())
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    places = range(1, classes.shape[1] + 1)
    table.writerow(["id", "label", *(f"class{n}" for n in places), *(f"probability{n}" for n in places)])
    for row in zip(ids, labels, classes, probabilities, strict=True):
        table.writerow([row[0], row[1], *row[2], *(f"{p:.6g}" for p in row[3])])
    write_atomically(path, text.getvalue().encode())
