"""Pictures of what a net has learnt, as figures 3 and 4 of Krizhevsky, Sutskever, Hinton 2012 show it."""

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
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.training.curves import save_figure
from imagefeed.training.evaluation import LOOKS, Member

BATCH_SIZE = 128
CANDIDATES = 128  # the first validation records, from which those to show are chosen
GUESSES, TOP = 8, 5  # figure 4, left
QUERIES, NEAREST = 5, 6  # figure 4, right
# Train records among which the nearest are sought, where the paper has all: some seconds, at the speed of either device.
SAMPLE = {"cuda": 8192, "cpu": 2048}
ACROSS = 16  # kernels in a row of figure 3
OTHER, TRUE = "#b5cfe8", "#f2a0a8"  # bars; dark text is read on both
SAME, DIFFERENT = "#1a7f37", "#57606a"  # names of classes
MIDDLE = {"ha": "center", "va": "center_baseline", "parse_math": False}


class Seen(NamedTuple):
    """Of some records, on the CPU: what they look like and what the net makes of them."""

    ids: list[int]
    labels: torch.Tensor  # (N,)
    pixels: torch.Tensor  # uint8 (N, 3, crop_size, crop_size)
    probabilities: torch.Tensor  # (N, classes)
    activations: torch.Tensor  # (N, units), of the last hidden layer


def draw_pictures(
    folder: Path, manifest: Manifest, member: Member, device: torch.device, reading: dict[str, object]
) -> list[Path]:
    """Writes filters.png, guesses.png and nearest.png, as far as net and dataset have what they show; returns their paths.

    Which records are shown depends on the dataset and the net alone. `reading` are the options of the loader about cost.
    """
    paths = []
    first = next((layer for layer in member.model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is not None and first.in_channels == 3:
        paths.append(folder / "filters.png")
        draw_filters(paths[-1], first.weight.detach().float().cpu().numpy(), getattr(member.model, "towers", 1))
    if manifest.eval_split is None:
        return paths
    batches = list(look(manifest, manifest.eval_split, member, device, reading, CANDIDATES))
    validation = Seen([n for seen in batches for n in seen.ids], *map(torch.cat, list(zip(*batches, strict=True))[1:]))
    names = [name_of(manifest, label) for label in range(len(manifest.classes))]
    paths += [folder / "guesses.png", folder / "nearest.png"]
    draw_guesses(paths[-2], validation, names)
    queries = varied(validation.labels.tolist())[:QUERIES]
    sample = look(manifest, manifest.train_split, member, device, reading, SAMPLE[device.type])
    draw_nearest(paths[-1], validation, queries, nearest(validation.activations[queries], sample), names)
    return paths


@torch.inference_mode()
def look(
    manifest: Manifest, split: str, member: Member, device: torch.device, reading: dict[str, object], records: int
) -> Iterator[Seen]:
    """Shows the net the center crops of a split's first records, batch by batch; a split is shuffled as it is stored."""
    batch_size = min(BATCH_SIZE, manifest.split(split).records)
    options = reading | {"cache": "none", "views": "center", "device": device}
    looks = dict(zip(LOOKS, member.looks, strict=True))
    model = member.model
    training = model.training
    with (
        ImageLoader(manifest, split, batch_size, **looks, **options) as inputs,
        ImageLoader(manifest, split, batch_size, crop_size=looks["crop_size"], dtype="uint8", **options) as pictures,
        last_inputs(model) as activations,
    ):
        model.eval()
        for batch, picture in itertools.islice(zip(inputs, pictures, strict=True), -(-records // batch_size)):
            outputs = forward(model, batch.images, member.precision)
            hidden = activations.pop().flatten(1).float() if activations else outputs
            valid = batch.valid.cpu()
            parts = (batch.labels, picture.images, outputs.softmax(1), hidden)
            yield Seen(batch.ids[valid].tolist(), *(part.cpu()[valid] for part in parts))
        model.train(training)


@contextlib.contextmanager
def last_inputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that each forward pass appends to what goes into the last full layer; nothing where the net has none.

    In AlexNet that is fc7's output behind its ReLU, halved by section 4.2, which changes no order of distances.
    """
    found: list[torch.Tensor] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) if layers else None
    try:
        yield found
    finally:
        if hook:
            hook.remove()


class Nearest(NamedTuple):
    sample: int  # records among which they were sought
    units: int  # in which distances were taken
    labels: list[list[int]]  # of each query's, nearest first
    pixels: list[list[torch.Tensor]]


def nearest(queries: torch.Tensor, batches: Iterator[Seen]) -> Nearest:
    """The records whose activations have the smallest Euclidean distance from those of the queries (Q, units).

    Section 6.1. Of each batch only the pixels that are among the nearest so far are kept.
    """
    best = torch.zeros(len(queries), 0)
    ids = torch.zeros(len(queries), 0, dtype=torch.int64)
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    sample = 0
    for seen in batches:
        sample += len(seen.ids)
        distances = torch.cat([best, torch.cdist(queries, seen.activations)], 1)
        places = distances.topk(min(NEAREST, distances.shape[1]), largest=False, sorted=True)
        ids = torch.cat([ids, torch.tensor(seen.ids).expand(len(queries), -1)], 1).gather(1, places.indices)
        best = places.values
        new = dict(zip(seen.ids, zip(seen.labels.tolist(), seen.pixels, strict=True), strict=True))
        kept = {n: (kept | new)[n] for n in set(ids.flatten().tolist())}
    labels = [[kept[n][0] for n in row] for row in ids.tolist()]
    return Nearest(sample, queries.shape[1], labels, [[kept[n][1] for n in row] for row in ids.tolist()])


def draw_filters(path: Path, kernels: np.ndarray, towers: int) -> None:
    """The first layer's kernels (N, 3, H, W), those of each tower apart; figure 3 of the paper.

    Each is scaled by its own largest weight, so that no weight is mid-gray.
    """
    n, _, height, width = kernels.shape
    across = ACROSS if n <= 12 * ACROSS else 2 * ACROSS
    wide = min(across, n // towers)
    blocks = [mosaic(block, wide) for block in np.split(kernels, towers)]
    rows = blocks[0].shape[0] / blocks[0].shape[1] * wide  # of a block, in kernels
    top = 1.1 if towers > 1 else 0.5
    figure, axes = canvas(across, top + towers * (rows + 0.6) - 0.6, 8 / across)
    axes.text(0, 0.1, f"{n} kernels of {height}x{width}x3 pixels in the first layer", va="center_baseline", fontsize=10)
    for tower, block in enumerate(blocks):
        y = top + tower * (rows + 0.6)
        if towers > 1:
            axes.text(0, y - 0.3, f"tower {tower + 1}: {n // towers} kernels", va="center_baseline", fontsize=8.5)
        axes.imshow(block, extent=(0, wide, y + rows, y), aspect="auto", interpolation="nearest")
    save_figure(figure, path)


def mosaic(kernels: np.ndarray, across: int) -> np.ndarray:
    """(rows, columns, 3) of 0 to 1: kernels beside each other, white between them."""
    n, _, height, width = kernels.shape
    shades = 0.5 + 0.5 * kernels / np.maximum(np.abs(kernels).max((1, 2, 3), keepdims=True), 1e-12)
    rows = -(-n // across)
    tiles = np.ones((rows * across, height + 1, width + 1, 3))
    tiles[:n, :height, :width] = shades.transpose(0, 2, 3, 1)
    tiles = tiles.reshape(rows, across, height + 1, width + 1, 3)
    return tiles.swapaxes(1, 2).reshape(rows * (height + 1), across * (width + 1), 3)[:-1, :-1]


def draw_guesses(path: Path, seen: Seen, names: list[str]) -> None:
    """Eight images, their class, and the likeliest five as bars, the right one in another color; figure 4 of the paper."""
    top = seen.probabilities.topk(min(TOP, len(names)))
    chosen = mixed((top.indices[:, 0] == seen.labels).tolist(), seen.labels.tolist())
    columns = min(GUESSES // 2, len(chosen))
    high = 1.24 + 0.11 * top.indices.shape[1]  # of a cell, in sides of an image
    figure, axes = canvas(1.06 * columns - 0.06, 0.14 + high * -(-len(chosen) // columns) - 0.1, 2.5)
    axes.text(
        0,
        0.03,
        "Validation images, their class, and the classes that the net takes for likeliest; red: the right one",
        va="center_baseline",
        fontsize=9,
    )
    for place, n in enumerate(chosen):
        x, y = 1.06 * (place % columns), 0.14 + high * (place // columns)
        label = int(seen.labels[n])
        put(axes, seen.pixels[n], x, y)
        axes.text(x + 0.5, y + 1.06, shortened(names[label], 30), **MIDDLE, fontsize=10, weight="bold")
        for bar, (index, probability) in enumerate(zip(top.indices[n].tolist(), top.values[n].tolist(), strict=True)):
            middle = y + 1.18 + 0.11 * bar
            axes.barh(middle, probability, 0.095, left=x, color=TRUE if index == label else OTHER)
            axes.text(x + 0.02, middle, shortened(names[index], 28), va="center_baseline", fontsize=8.5, parse_math=False)
            axes.text(x + 1, middle, f"{100 * probability:.0f} %", va="center_baseline", ha="right", fontsize=7, color=DIFFERENT)
    save_figure(figure, path)


def draw_nearest(path: Path, seen: Seen, queries: list[int], found: Nearest, names: list[str]) -> None:
    """Validation images in the first column, beside each the train images nearest to it; figure 4 of the paper."""
    columns = len(found.labels[0])
    figure, axes = canvas(1.15 + 1.04 * columns, 0.2 + 1.16 * len(queries), 1.35)
    axes.text(0, 0.04, f"Held out, and the nearest of {found.sample:,} train images by {found.units:,} activations of the last "
              "hidden layer; green: same class", fontsize=8.5, va="center_baseline")  # fmt: skip
    for row, n in enumerate(queries):
        label = int(seen.labels[n])
        y = 0.2 + 1.16 * row
        put(axes, seen.pixels[n], 0, y)
        axes.text(0.5, y + 1.07, shortened(names[label], 20), **MIDDLE, fontsize=8, weight="bold")
        for column, (other, pixels) in enumerate(zip(found.labels[row], found.pixels[row], strict=True)):
            x = 1.15 + 1.04 * column
            put(axes, pixels, x, y)
            color = SAME if other == label else DIFFERENT
            axes.text(x + 0.5, y + 1.07, shortened(names[other], 20), **MIDDLE, fontsize=8, color=color)
    save_figure(figure, path)


def canvas(width: float, height: float, inches: float) -> tuple:
    """A matplotlib Figure and its only Axes of (width, height), each of `inches`; an axes for each image takes 10 times as
    long."""
    from matplotlib.figure import Figure

    margin = 0.12 / inches
    crop_size = (inches * (width + 2 * margin), inches * (height + 2 * margin))
    figure = Figure(figsize=crop_size, dpi=120, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), autoscale_on=False)
    return figure, axes


def put(axes, pixels: torch.Tensor, x: float, y: float) -> None:
    """An image of (3, H, W) pixels, one unit wide and high, with its upper left corner at x, y."""
    axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=(x, x + 1, y + 1, y), aspect="auto", interpolation="antialiased")


def mixed(right: list[bool], labels: list[int]) -> list[int]:
    """Places of eight records, half of them guessed right as far as there are such, in their order."""
    order = varied(labels)
    hits, misses = [n for n in order if right[n]], [n for n in order if not right[n]]
    hits = hits[: max(GUESSES // 2, GUESSES - len(misses))]
    return sorted(hits + misses[: GUESSES - len(hits)])


def varied(labels: list[int]) -> list[int]:
    """All places: the first of each class, then the second of each, and so on."""
    before: Counter[int] = Counter()
    turn = []
    for label in labels:
        turn.append(before[label])
        before[label] += 1
    return sorted(range(len(labels)), key=lambda n: turn[n])


def name_of(manifest: Manifest, label: int) -> str:
    """What people call a class, by the first of its names."""
    return manifest.titles[label].split(",")[0] if manifest.titles else manifest.classes[label]


def shortened(name: str, characters: int) -> str:
    return name if len(name) <= characters else name[: characters - 1].rstrip() + "…"
