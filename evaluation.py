"""Errors on the held-out split: of a net in training, of checkpoints, and of several as an ensemble."""

import contextlib
import csv
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints import identity, load_checkpoint, load_latest, refuse_another, usable
from model import build_net
from model.step import forward
from parallel import Ranks
from pipeline import Batch, ImageLoader
from preprocess.errors import UserError
from preprocess.manifest import Manifest
from preprocess.records import write_atomically
from reporting import Display, show_errors

VIEWS = {"center": "centre crop", "ten": "ten views"}
NET = ("model", "lrn", "overlapping", "dropout", "bias", "size")  # of a recipe, what build_net takes
LOOKS = ("size", "mean", "deviation")  # and what an image is for it
TOP = 5


class Member(NamedTuple):
    """A trained net, and what it was trained with."""

    model: torch.nn.Module
    precision: str
    looks: tuple  # values of LOOKS


def net_from(settings: dict[str, object], classes: int, prefix: str = "") -> torch.nn.Module:
    """A new net as a recipe says, whose names carry a prefix in a checkpoint."""
    name, *options = (settings[prefix + key] for key in NET)
    return build_net(name, classes, **dict(zip(NET[1:], options, strict=True)))


def held_out(
    manifest: Manifest,
    views: str,
    batch_size: int,
    device: torch.device,
    reading: dict[str, object],
    looks: tuple,
    ranks: Ranks,
) -> ImageLoader:
    """Each held-out record once, this rank's share, about `batch_size` crops at a time; no cache, which is for what is seen
    again."""
    return ImageLoader(
        manifest,
        manifest.eval_split,
        max(1, batch_size // 10) if views == "ten" else batch_size,
        views=views,
        device=device,
        rank=ranks.rank,
        world_size=ranks.count,
        **dict(zip(LOOKS, looks, strict=True)),
        **reading | {"cache": "none"},
    )


@torch.inference_mode()
def evaluate(
    members: list[Member],
    loaders: dict[tuple, Iterable[Batch]],
    ranks: Ranks,
    watch: Callable[[float], None] = lambda share: None,
    keep: Callable[[Batch, torch.Tensor], None] = lambda batch, scores: None,
) -> dict[str, float]:
    """Top-1 and top-5 error in percent, the mean loss, and the number of records that count, over all ranks.

    `loaders` are of the same records, one for each kind of looks. The softmax outputs of all views (section 4.1) and
    members (section 6) are averaged. `watch` gets the share that is done, batch by batch, and `keep` each batch with the
    logarithms (N, classes) of its averages.
    """
    for member in members:
        member.model.eval()
    first = next(iter(loaders.values()))
    sums = torch.zeros(4, dtype=torch.float64, device=first.device)
    for done, batches in enumerate(zip(*loaders.values(), strict=True), 1):
        seen = dict(zip(loaders, batches, strict=True))
        batch = batches[0]
        outputs = []
        for member in members:
            crops = seen[member.looks].images
            logits = forward(member.model, crops.flatten(0, -4), member.precision)
            outputs.append(logits.unflatten(0, (len(batch.labels), -1)).log_softmax(-1))
        outputs = torch.cat(outputs, 1)
        scores = outputs.logsumexp(1) - math.log(outputs.shape[1])
        hits = scores.topk(min(TOP, scores.shape[1])).indices == batch.labels[:, None]
        loss = F.nll_loss(scores, batch.labels, reduction="none")
        counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)])
        sums += (counts * batch.valid).sum(1)
        keep(batch, scores)
        watch(done / len(first))
    for member in members:
        member.model.train()
    top1, top5, loss, records = ranks.sum(sums).tolist()
    return {
        "top1_error": 100 - 100 * top1 / records,
        "top5_error": 100 - 100 * top5 / records,
        "loss": loss / records,
        "records": int(records),
    }


def measure(
    manifest: Manifest,
    paths: list[Path],
    device: torch.device,
    reading: dict[str, object],
    ranks: Ranks,
    predictions: Path | None,
) -> None:
    """Prints the errors of a checkpoint, the newest in a folder, or several averaged, on the held-out split of the dataset.

    `predictions` is a file to write those of ten views to (`write_predictions`).
    """
    if manifest.eval_split is None:
        raise UserError(f"{manifest.root}: no held-out split to measure on; build the dataset with one, such as val")
    members, steps = [], []
    for path in paths:
        state = load_latest(path) if path.is_dir() else load_checkpoint(path)
        if state is None:
            raise UserError(
                f"{path}: there is no checkpoint in this folder; train one with: python train.py {manifest.root}"
            )
        with usable(path):
            members.append(open_member(manifest, path, state, device))
            steps.append(f"{path}, step {state['progress']['step']:,}")
    with Display(1, 0) as display:
        found = {}
        for views, name in VIEWS.items():
            rows: list[tuple[np.ndarray, ...]] = []
            with contextlib.ExitStack() as stack:
                kinds = {member.looks for member in members}
                loaders = {
                    looks: stack.enter_context(held_out(manifest, views, 128, device, reading, looks, ranks))
                    for looks in sorted(kinds)
                }
                watch = lambda share, name=name: display.show(share, f"{name}: {share:.0%}")  # noqa: E731
                keep = lambda batch, scores, rows=rows: rows.append(best(batch, scores))  # noqa: E731
                found[name] = evaluate(members, loaders, ranks, watch, keep)
    if predictions:
        parts = ranks.gathered([np.concatenate(column) for column in zip(*rows, strict=True)])
        if ranks.first:
            write_predictions(predictions, *(np.concatenate(column) for column in zip(*parts, strict=True)))
    show_errors(f"{' + '.join(steps)}, on {manifest.eval_split} of {manifest.root}", found, len(manifest.classes))


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


def write_predictions(
    path: Path, ids: np.ndarray, labels: np.ndarray, classes: np.ndarray, probabilities: np.ndarray
) -> None:
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
