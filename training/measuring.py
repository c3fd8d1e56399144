"""Measures checkpoints: what `train.py --evaluate` does."""

import contextlib
import csv
import io
from pathlib import Path

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import Batch
from imagefeed.training.checkpoints import identity, load_checkpoint, load_latest, refuse_another, usable
from imagefeed.training.evaluation import LOOKS, TOP, VIEWS, Member, evaluate, net_from, validation
from imagefeed.training.parallel import Ranks
from imagefeed.training.pictures import draw_pictures
from imagefeed.training.reporting import Display
from imagefeed.training.summary import published, show_errors


def measure(
    manifest: Manifest,
    paths: list[Path],
    device: torch.device,
    reading: dict[str, object],
    ranks: Ranks,
    predictions: Path | None,
    pictures: Path | None,
) -> None:
    """Prints the errors of a checkpoint, the newest in a folder, or several averaged, on the validation split of the dataset.

    `predictions` is a file to write those of ten views to (`write_predictions`), `pictures` a folder for those of the first
    checkpoint (pictures.py). `reading` are the options of the loader that are about cost.
    """
    if manifest.eval_split is None:
        raise UserError(f"{manifest.root}: no validation split to measure on; build the dataset with one, such as val")
    # Before the measuring, which takes long.
    if predictions and not predictions.resolve().parent.is_dir():
        raise UserError(f"{predictions}: there is no folder {predictions.parent}; make it first")
    if pictures and ranks.first:
        pictures.mkdir(parents=True, exist_ok=True)
    members, steps, others = [], [], {}
    for path in paths:
        state = read_checkpoint(path, manifest)
        with usable(path):
            members.append(open_member(manifest, path, state, device))
            steps.append(f"{path}, step {state['progress']['step']:,}")
            if len(paths) == 1:
                others = published(manifest, *(state["made_with"][f"--{name}"] for name in ("model", "lrn", "overlapping")))
    with Display(1, 0) as display:
        found = {}
        for views, name in VIEWS.items():
            rows: list[tuple[np.ndarray, ...]] = []
            with contextlib.ExitStack() as stack:
                kinds = {member.looks for member in members}
                loaders = {
                    looks: stack.enter_context(validation(manifest, views, 128, device, reading, looks, ranks))
                    for looks in sorted(kinds)
                }
                watch = lambda share, name=name: display.show(share, f"{name}: {share:.0%}")  # noqa: E731
                keep = lambda batch, scores, rows=rows: rows.append(best(batch, scores))  # noqa: E731
                found[name] = evaluate(members, loaders, ranks, watch, keep)
    print(f"{' + '.join(steps)}, on {manifest.eval_split} of {manifest.root}")
    show_errors(found, len(manifest.classes), others)
    if predictions:
        parts = ranks.gathered([np.concatenate(column) for column in zip(*rows, strict=True)])
        if ranks.first:
            write_predictions(predictions, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    if pictures and ranks.first:
        written = draw_pictures(pictures, manifest, members[0], device, reading)
        print(f"pictures: {', '.join(map(str, written))}")


def read_checkpoint(path: Path, manifest: Manifest) -> dict:
    """What is in a checkpoint, or in the newest of a run folder; raises UserError where there is none."""
    state = load_latest(path) if path.is_dir() else load_checkpoint(path)
    if state is None:
        raise UserError(f"{path}: there is no checkpoint in this folder; train one with: python train.py {manifest.root}")
    return state


def open_member(manifest: Manifest, path: Path, state: dict, device: torch.device) -> Member:
    """The net of a checkpoint, whatever dataset of the same classes it was trained on.

    Raises UserError where the classes are others, and whatever torch and the lookups do where `state` is none of ours.
    """
    made_with = state["made_with"]
    mine = identity(manifest)
    if made_with["dataset"] == mine.pop("dataset"):
        del mine["class names"]  # the dataset's fingerprint is also of them
    refuse_another(made_with, mine, path, "measure it on a dataset of the same classes")
    model = net_from(made_with, len(manifest.classes), "--")
    model.load_state_dict(state["model"])
    looks = tuple(made_with[f"--{name}"] for name in LOOKS)
    return Member(model.to(device, memory_format=torch.channels_last), made_with["--precision"], looks)


def best(batch: Batch, scores: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Of the records that count: ids (N,), labels (N,), the five likeliest classes (N, 5), and their probabilities."""
    valid = batch.valid.cpu()
    top = scores.topk(min(TOP, scores.shape[1]))
    columns = (batch.ids, batch.labels, top.indices, top.values.exp())
    return tuple(column.cpu()[valid].numpy() for column in columns)


def write_predictions(path: Path, ids: np.ndarray, labels: np.ndarray, classes: np.ndarray, probabilities: np.ndarray) -> None:
    """A .npz with these names, or a .csv of a line for each record: id, label, class1 .. class5, probability1 .. 5.

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
