"""Measures the errors of checkpoints: `imagefeed train OUT --evaluate`."""

import contextlib
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagefeed.dataset.console import Progress, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.dataset.records import NO_LABEL
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
    """Prints the errors of a checkpoint, the newest in a folder, or several averaged, on the split to evaluate on.

    `predictions` is a file for those by ten views (`write_predictions`), `pictures` a folder for pictures of the first
    checkpoint.
    """
    manifest, ranks, split = inputs.manifest, inputs.ranks, inputs.eval_split
    if split is None:
        raise UserError(f"{manifest.root}: no validation split to measure on; build one, or name another split with --split")
    if not any(manifest.split(split).counts) and not predictions:
        raise UserError(f"{manifest.root}: the images of split {split} have no labels to measure errors; give --predictions FILE")
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
            others = published(manifest, recipe_of(state), split) if len(paths) == 1 else {}
            of_dataset = {members[-1].preprocessing.mean, members[-1].preprocessing.std} & {"channel", "image", "dataset"}
            if state["made_with"]["dataset"] != manifest.fingerprint[:16] and of_dataset:
                print(
                    f"{path}: trained on another dataset, or {manifest.root} has changed; normalizing by the latter's statistics"
                )
    filenames = read_filenames(manifest, split) if predictions and ranks.first else []  # may fail, so before measuring
    errors, rows = {}, []
    with Progress(1, every_s=30, stream=sys.stdout) as progress:
        for views, name in VIEWS.items():
            rows.clear()
            progress.restart(1)
            progress.say(f"measuring by {name}: {plural(manifest.split(split).records, 'image')} of split {split}")
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
    print(f"{' + '.join(names)}, on split {split} of {manifest.root}")
    labeled = sum(manifest.split(split).counts)
    if labeled:
        show_errors(errors, len(manifest.classes), others, f"images of {split}")
    if labeled < manifest.split(split).records:
        print(f"{plural(manifest.split(split).records - labeled, 'image')} of {split} without labels not counted")
    if predictions:
        parts = ranks.gathered([np.concatenate(column) for column in zip(*rows, strict=True)])
        if ranks.first:
            columns = (np.concatenate(column) for column in zip(*parts, strict=True))
            write_predictions(predictions, filenames, manifest.classes, *columns)
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


def read_filenames(manifest: Manifest, split: str) -> list[str]:
    """The name of each record's raw image, by record id."""
    reader = RecordReader(manifest, split)
    return [reader.filename(record_id) for record_id in range(len(reader))]


def write_predictions(
    path: Path,
    filenames: Sequence[str],
    names: Sequence[str],
    ids: np.ndarray,
    labels: np.ndarray,
    classes: np.ndarray,
    probabilities: np.ndarray,
) -> None:
    """Writes a line for each record, in the order of their ids, as .csv: id, label, class1 .. class5, probability1 .. 5, file,
    class, predicted, predicted2 .. 5; or a .npz with ids, labels, classes, probabilities, files, and the names of all classes.

    `label` and `class1` are indices into the dataset's classes, `class` and `predicted` their names. The label of an image of
    unknown class is -1, and its class empty. `filenames` are by record id.
    """
    order = np.argsort(ids)
    ids, labels, classes, probabilities = (column[order] for column in (ids, labels, classes, probabilities))
    files = [filenames[n] for n in ids]
    if path.suffix == ".npz":
        file = io.BytesIO()
        arrays = {"ids": ids, "labels": labels, "classes": classes, "probabilities": probabilities}
        np.savez(file, **arrays, files=np.array(files), names=np.array(names))
        write_atomically(path, file.getvalue())
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    places = range(1, classes.shape[1] + 1)
    predicted = ["predicted", *(f"predicted{n}" for n in places[1:])]
    head = ["id", "label", *(f"class{n}" for n in places), *(f"probability{n}" for n in places), "file", "class", *predicted]
    table.writerow(head)
    for number, label, top, chances, name in zip(ids, labels, classes, probabilities, files, strict=True):
        true = "" if label == NO_LABEL else names[label]
        table.writerow([number, label, *top, *(f"{p:.6g}" for p in chances), name, true, *(names[n] for n in top)])
    write_atomically(path, os.fsencode(text.getvalue()))  # file names are bytes, not always UTF-8
