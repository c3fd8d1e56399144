"""Pictures of what a net has learned, like figures 3 and 4 of Krizhevsky, Sutskever, Hinton 2012."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from imagefeed.dataset.manifest import Manifest
from imagefeed.model.step import forward
from imagefeed.training.evaluation import TOP, Member
from imagefeed.training.inputs import Inputs
from imagefeed.training.summary import save_figure

BATCH_SIZE = 128
CANDIDATES = 128  # the first validation records, from which those to show are chosen
GUESSES = 8  # figure 4, left
QUERIES, NEAREST = 5, 6  # figure 4, right
# Train records among which the nearest are sought, where the paper takes all: some seconds at the speed of either device.
SAMPLE = {"cuda": 8192, "cpu": 2048}
COLUMNS = 16  # of kernels in figure 3
OTHER, TRUE = "#b5cfe8", "#f2a0a8"  # bars; dark text is readable on both
SAME, DIFFERENT = "#1a7f37", "#57606a"  # class names
MIDDLE = {"va": "center_baseline", "parse_math": False}
ALONE = {"rank": 0, "world_size": 1}  # one rank draws


class Seen(NamedTuple):
    """Some records, on the CPU: their pixels, and what the net makes of them."""

    ids: list[int]
    labels: torch.Tensor  # (N,)
    pixels: torch.Tensor  # uint8 (N, 3, crop_size, crop_size)
    probabilities: torch.Tensor  # (N, classes)
    activations: torch.Tensor  # (N, units), of the last hidden layer


def draw_pictures(folder: Path, inputs: Inputs, member: Member) -> list[Path]:
    """Writes filters.png, guesses.png and nearest.png, if net and dataset have what they show; returns their paths.

    Dataset and net alone decide which records are shown.
    """
    manifest, paths = inputs.manifest, []
    first = next((layer for layer in member.model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels == 3:
        paths.append(folder / "filters.png")
        draw_filters(paths[-1], first.weight.detach().float().cpu().numpy(), getattr(member.model, "towers", 1))
    split = inputs.eval_split
    if split is None or sum(manifest.split(split).counts) < manifest.split(split).records:  # some have no class to show
        return paths
    batches = list(show(inputs, split, member, CANDIDATES))
    validation = Seen([n for seen in batches for n in seen.ids], *map(torch.cat, list(zip(*batches, strict=True))[1:]))
    names = class_names(manifest)
    paths.append(folder / "guesses.png")
    draw_guesses(paths[-1], validation, names)
    if not inputs.manifest.trainable:
        return paths
    paths.append(folder / "nearest.png")
    queries = varied(validation.labels.tolist())[:QUERIES]
    sample = show(inputs, inputs.train_split, member, SAMPLE[inputs.device.type])
    draw_nearest(paths[-1], validation, queries, sample, names)
    return paths


@torch.inference_mode()
def show(inputs: Inputs, split: str, member: Member, records: int) -> Iterator[Seen]:
    """Shows the net the center crops of a split's first records, batch by batch; records are stored shuffled."""
    batch_size = min(BATCH_SIZE, inputs.manifest.split(split).records)
    options = ALONE | {"views": "center", "cache": "none"}
    model, training = member.model, member.model.training
    with (
        inputs.open(split, batch_size, member.preprocessing, **options) as batches,
        inputs.open(split, batch_size, member.preprocessing, dtype="uint8", **options) as pictures,
        last_inputs(model) as activations,
    ):
        model.eval()
        for batch, picture in itertools.islice(zip(batches, pictures, strict=True), -(-records // batch_size)):
            outputs = forward(model, batch.images, member.precision)
            hidden = activations.pop().flatten(1).float() if activations else outputs
            valid = batch.valid.cpu()
            parts = (batch.labels, picture.images, outputs.softmax(1), hidden)
            yield Seen(batch.ids[valid].tolist(), *(part.cpu()[valid] for part in parts))
        model.train(training)


@contextlib.contextmanager
def last_inputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list to which each forward pass appends the input of the last full layer, if the net has one.

    In AlexNet that is fc7's output after its ReLU, halved by section 4.2, which changes no order of distances.
    """
    found: list[torch.Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for layer in layers[-1:]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def nearest(queries: torch.Tensor, batches: Iterator[Seen]) -> tuple[int, list[list[tuple[int, torch.Tensor]]]]:
    """Finds the records whose activations are nearest to those of the queries (Q, units), by Euclidean distance (section 6.1).

    Returns the number of records searched, and label and pixels of each query's, nearest first. Keeps only these pixels.
    """
    best = torch.zeros(len(queries), 0)
    ids = torch.zeros(len(queries), 0, dtype=torch.int64)
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    searched = 0
    for seen in batches:
        searched += len(seen.ids)
        distances = torch.cat([best, torch.cdist(queries, seen.activations)], 1)
        places = distances.topk(min(NEAREST, distances.shape[1]), largest=False, sorted=True)
        ids = torch.cat([ids, torch.tensor(seen.ids).expand(len(queries), -1)], 1).gather(1, places.indices)
        best = places.values
        kept |= zip(seen.ids, zip(seen.labels.tolist(), seen.pixels, strict=True), strict=True)
        kept = {n: kept[n] for n in set(ids.flatten().tolist())}
    return searched, [[kept[n] for n in row] for row in ids.tolist()]


def draw_filters(path: Path, kernels: np.ndarray, towers: int) -> None:
    """Draws the first layer's kernels (N, 3, H, W), each tower apart; figure 3 of the paper.

    Each is scaled by its own largest weight, so that a weight of 0 is mid-gray.
    """
    n, _, height, width = kernels.shape
    columns = COLUMNS if n <= 12 * COLUMNS else 2 * COLUMNS
    wide = min(columns, n // towers)
    blocks = [mosaic(block, wide) for block in np.split(kernels, towers)]
    rows = blocks[0].shape[0] / blocks[0].shape[1] * wide  # of a block, in kernels
    top = 1.1 if towers > 1 else 0.5
    figure, axes = canvas(columns, top + towers * (rows + 0.6) - 0.6, 8 / columns)
    axes.text(0, 0.1, f"{n} kernels of {height}x{width}x3 pixels in the first layer", fontsize=10, **MIDDLE)
    for tower, block in enumerate(blocks):
        y = top + tower * (rows + 0.6)
        if towers > 1:
            axes.text(0, y - 0.3, f"tower {tower + 1}: {n // towers} kernels", fontsize=8.5, **MIDDLE)
        axes.imshow(block, extent=(0, wide, y + rows, y), aspect="auto", interpolation="nearest")
    save_figure(figure, path)


def mosaic(kernels: np.ndarray, columns: int) -> np.ndarray:
    """Returns (height, width, 3) pixels of 0 to 1: the kernels beside each other, white between them."""
    n, _, height, width = kernels.shape
    shades = 0.5 + 0.5 * kernels / np.maximum(np.abs(kernels).max((1, 2, 3), keepdims=True), 1e-12)
    rows = -(-n // columns)
    tiles = np.ones((rows * columns, height + 1, width + 1, 3))
    tiles[:n, :height, :width] = shades.transpose(0, 2, 3, 1)
    tiles = tiles.reshape(rows, columns, height + 1, width + 1, 3)
    return tiles.swapaxes(1, 2).reshape(rows * (height + 1), columns * (width + 1), 3)[:-1, :-1]


def draw_guesses(path: Path, seen: Seen, names: list[str]) -> None:
    """Draws eight images, their class, and the likeliest five as bars, the true one in another color; figure 4 of the paper."""
    top = seen.probabilities.topk(min(TOP, len(names)))
    chosen = mixed((top.indices[:, 0] == seen.labels).tolist(), seen.labels.tolist())
    columns = min(GUESSES // 2, len(chosen))
    high = 1.24 + 0.11 * top.indices.shape[1]  # of a cell, in sides of an image
    figure, axes = canvas(1.06 * columns - 0.06, 0.14 + high * -(-len(chosen) // columns) - 0.1, 2.5)
    axes.text(
        0, 0.03, "Validation images, their class, and the net's likeliest classes; red: the true class", fontsize=9, **MIDDLE
    )
    for place, n in enumerate(chosen):
        x, y = 1.06 * (place % columns), 0.14 + high * (place // columns)
        label = int(seen.labels[n])
        draw_image(axes, seen.pixels[n], x, y)
        axes.text(x + 0.5, y + 1.06, shortened(names[label], 30), ha="center", fontsize=10, weight="bold", **MIDDLE)
        for bar, (index, probability) in enumerate(zip(top.indices[n].tolist(), top.values[n].tolist(), strict=True)):
            middle = y + 1.18 + 0.11 * bar
            axes.barh(middle, probability, 0.095, left=x, color=TRUE if index == label else OTHER)
            axes.text(x + 0.02, middle, shortened(names[index], 28), fontsize=8.5, **MIDDLE)
            axes.text(x + 1, middle, f"{100 * probability:.0f} %", ha="right", fontsize=7, color=DIFFERENT, **MIDDLE)
    save_figure(figure, path)


def draw_nearest(path: Path, seen: Seen, queries: list[int], sample: Iterator[Seen], names: list[str]) -> None:
    """Draws validation images in the first column, and beside each the nearest of a sample of train images; figure 4."""
    searched, found = nearest(seen.activations[queries], sample)
    figure, axes = canvas(1.15 + 1.04 * len(found[0]), 0.2 + 1.16 * len(queries), 1.35)
    title = f"Validation images, and the nearest of {searched:,} train images by {seen.activations.shape[1]:,} activations"
    axes.text(0, 0.04, f"{title} of the last hidden layer; green: same class", fontsize=8.5, **MIDDLE)
    for row, n in enumerate(queries):
        label = int(seen.labels[n])
        y = 0.2 + 1.16 * row
        draw_image(axes, seen.pixels[n], 0, y)
        axes.text(0.5, y + 1.07, shortened(names[label], 20), ha="center", fontsize=8, weight="bold", **MIDDLE)
        for column, (other, pixels) in enumerate(found[row]):
            x, color = 1.15 + 1.04 * column, SAME if other == label else DIFFERENT
            draw_image(axes, pixels, x, y)
            axes.text(x + 0.5, y + 1.07, shortened(names[other], 20), ha="center", fontsize=8, color=color, **MIDDLE)
    save_figure(figure, path)


def canvas(width: float, height: float, inches: float) -> tuple:
    """Makes a Figure and one Axes of (width, height), in units of `inches`; an Axes for each image would take 10 times as
    long."""
    from matplotlib.figure import Figure

    margin = 0.12 / inches
    figure = Figure(figsize=(inches * (width + 2 * margin), inches * (height + 2 * margin)), dpi=120, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), autoscale_on=False)
    return figure, axes


def draw_image(axes, pixels: torch.Tensor, x: float, y: float) -> None:
    """Draws (3, H, W) pixels, one unit wide and high, with the upper left corner at x, y."""
    axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=(x, x + 1, y + 1, y), aspect="auto", interpolation="antialiased")


def mixed(right: list[bool], labels: list[int]) -> list[int]:
    """Chooses eight places, in order, half of them guessed right if there are enough of either kind."""
    order = varied(labels)
    hits, misses = [n for n in order if right[n]], [n for n in order if not right[n]]
    hits = hits[: max(GUESSES // 2, GUESSES - len(misses))]
    return sorted(hits + misses[: GUESSES - len(hits)])


def varied(labels: list[int]) -> list[int]:
    """Orders all places: the first of each class, then the second of each, and so on."""
    before: Counter[int] = Counter()
    rounds = []
    for label in labels:
        rounds.append(before[label])
        before[label] += 1
    return sorted(range(len(labels)), key=lambda n: rounds[n])


def class_names(manifest: Manifest) -> list[str]:
    """What people call each class: the first of its titles, or its name in the dataset."""
    return [title.split(",")[0] for title in manifest.titles] or list(manifest.classes)


def shortened(name: str, characters: int) -> str:
    return name if len(name) <= characters else name[: characters - 1].rstrip() + "…"
