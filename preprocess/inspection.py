"""Describes a dataset: counts, sizes, settings and statistics as text or JSON, and a contact sheet as a picture."""

import dataclasses
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagefeed.dataset.console import examples, plural
from imagefeed.dataset.decision import Decision
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import Dataset
from imagefeed.dataset.records import NO_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
COLUMNS, ROWS = 10, 5  # images of the contact sheet
JITTER_SD = (-3, -1.5, 0, 1.5, 3)  # the drawn offsets, in standard deviations of the jitter
JITTER = 0.1  # Krizhevsky et al. 2012, section 4.1
PUBLISHED_STD = (121.78, 37.09, 19.72)  # of ImageNet's colors along their axes, by AlexNet's authors (docs/format.md)
ARRAYS = ("channel_mean", "channel_std", "covariance", "eigenvalues", "eigenvectors")


def describe(manifest: Manifest) -> dict[str, Any]:
    """Everything that `inspect` prints, as plain numbers, strings and lists."""
    statistics = manifest.load_statistics()
    splits = {}
    for name, split in manifest.splits.items():
        lengths = manifest.load_index(name)["length"]
        used = sorted((count, name) for name, count in zip(manifest.classes, split.counts) if count)
        splits[name] = {
            "records": split.records,
            "shards": len(split.shards),
            "bytes": split.bytes,
            "jpeg_bytes_median": float(np.median(lengths)),
            "jpeg_bytes_max": int(lengths.max()),
            "classes": len(used),
            # None in a challenge's test split, which has no labels.
            "smallest_class": {"name": used[0][1], "records": used[0][0]} if used else None,
            "largest_class": {"name": used[-1][1], "records": used[-1][0]} if used else None,
            "majority_share": used[-1][0] / split.records if used else 0.0,
            "empty_classes": [name for name, count in zip(manifest.classes, split.counts) if not count] if used else [],
            "counts": dict(zip(manifest.classes, split.counts)),
        }
    return {
        "dataset": str(manifest.root),
        "format_version": manifest.version,
        "fingerprint": manifest.fingerprint,
        "classes": len(manifest.classes),
        "decision": dataclasses.asdict(manifest.decision) if manifest.decision else None,
        "splits": splits,
        "columns": manifest.columns,
        "options": manifest.options,
        "versions": manifest.versions,
        "rejected": manifest.rejected,
        "duplicates": manifest.duplicates,
        "statistics": {
            "split": manifest.statistics_split,
            "images": int(statistics["images"]),
            "pixels": int(statistics["pixels"]),
            **{name: statistics[name].round(4).tolist() for name in ARRAYS},
        },
    }


def render_text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['dataset']}: format {facts['format_version']}, {plural(facts['classes'], 'class', 'classes')}"]
    for name, split in facts["splits"].items():
        lines.append(
            f"  {name:<11}{plural(split['records'], 'record'):>18} {plural(split['shards'], 'shard'):>12} "
            f"{split['bytes'] / 1e6:>10,.1f} MB   JPEG {split['jpeg_bytes_median'] / 1e3:.1f} KB (median)   "
            + (_class_sizes(split, facts["classes"]) if split["classes"] else "no labels")
        )
    statistics, options = facts["statistics"], facts["options"]
    for title, text in {
        "stored as": ", ".join(
            f"{name} {options[name]}" for name in ("size", "fit", "quality", "range", "seed") if name in options
        ),
        **({"columns": ", ".join(f"{name} ({kind})" for name, kind in facts["columns"].items())} if facts["columns"] else {}),
        "written by": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "images": ", ".join(f"{count:,} {action}" for action, count in facts["rejected"].items()) or "none rejected or converted",
        "duplicates": ", ".join(
            plural(count, name[:-1]) if name in ("groups", "images") else f"{count:,} {name}"
            for name, count in facts["duplicates"].items()
        )
        or "none",
        "colors": f"mean {_triple(statistics['channel_mean'])}, standard deviation {_triple(statistics['channel_std'])} "
        f"({plural(statistics['images'], 'image')} of {statistics['split']})",
        "": f"along their axes {_triple(np.sqrt(statistics['eigenvalues']))} (ImageNet {_triple(PUBLISHED_STD)})",
    }.items():
        lines.append(f"  {title:<11}{text}")
    if facts["decision"]:
        head, *table = Decision.from_json(facts["decision"]).lines()
        lines += [f"  {'read as':<11}{head}", *(" " * 11 + line for line in table)]
    return "\n".join(lines)


def _class_sizes(split: dict[str, Any], classes: int) -> str:
    smallest, largest = split["smallest_class"], split["largest_class"]
    if smallest["records"] == largest["records"]:
        sizes = f"{largest['records']:,} per class"
    else:
        sizes = f"{smallest['records']:,} ({smallest['name']}) to {largest['records']:,} ({largest['name']}) per class"
    empty = split["empty_classes"]
    none = f", {len(empty):,} of {plural(classes, 'class', 'classes')} without any: {examples(empty)}" if empty else ""
    return f"{sizes}, largest {split['majority_share']:.1%}{none}"


def _triple(values: Any) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def draw_contact_sheet(manifest: Manifest, path: Path) -> None:
    """Draws images of as many classes as fit, with their names, and one image with its colors moved along their axes."""
    from matplotlib.figure import Figure

    if path.suffix not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: not the name of a picture; end it in one of {', '.join(PICTURE_SUFFIXES)}")
    split = manifest.train_split
    picked = _pick(manifest, split, COLUMNS * ROWS)
    rows = -(-len(picked) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * 1.5, rows * 1.75 + 2.6), dpi=100, facecolor="white")
    counts = f"{plural(manifest.split(split).records, 'image')} of {plural(len(manifest.classes), 'class', 'classes')}"
    title = f"{manifest.root.resolve().name}: {split}, {counts}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, weight="bold", parse_math=False)
    halves: Any = figure.subfigures(2, 1, height_ratios=[rows * 1.75 + 0.6, 2])
    top, bottom = halves
    cells = top.subplots(rows, COLUMNS, squeeze=False, gridspec_kw={"hspace": 0.28, "wspace": 0.06})
    top.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.01)
    for axes in cells.flat:
        axes.axis("off")
    for axes, (label, pixels) in zip(cells.flat, picked):
        names = manifest.titles or manifest.classes
        name = names[label].split(",")[0] if label != NO_LABEL else ""
        _show(axes, pixels, name if len(name) <= 18 else textwrap.shorten(name, 18, placeholder="…") or name[:17] + "…")
    _draw_jitter(bottom, manifest, max((pixels for _, pixels in picked), key=lambda pixels: np.ptp(pixels, axis=2).mean()))
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())


def _draw_jitter(figure: "SubFigure", manifest: Manifest, pixels: np.ndarray) -> None:
    statistics = manifest.load_statistics()
    steps = JITTER * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]  # columns: one standard deviation
    title = "PCA jitter: one image moved along the three axes of all colors, in standard deviations of the jitter"
    figure.text(0.02, 0.97, title, fontsize=11, weight="bold", va="top")
    cells = figure.subplots(1, 3 * len(JITTER_SD), gridspec_kw={"wspace": 0.05})
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.02)
    for place, axes in enumerate(cells):
        axis, column = divmod(place, len(JITTER_SD))
        moved = (pixels + JITTER_SD[column] * steps[:, axis]).clip(0, 255).astype(np.uint8)
        _show(axes, moved, f"{f'axis {axis + 1}' if not column else ''}\n{JITTER_SD[column]:+g}".replace("+0", "0"))
        axes.axis("off")


def _show(axes: "Axes", pixels: np.ndarray, title: str) -> None:
    """Shows the center square of an image."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    axes.imshow(pixels[top : top + side, left : left + side])
    axes.set_title(title, fontsize=8, pad=3, parse_math=False)


def _pick(manifest: Manifest, split: str, wanted: int) -> list[tuple[int, np.ndarray]]:
    """(label, pixels) of `wanted` records: evenly over the classes, the first records of each."""
    dataset = Dataset(manifest, split)
    labels = np.flatnonzero(manifest.split(split).counts)
    labels = labels if len(labels) else np.array([NO_LABEL])
    labels = labels[np.linspace(0, len(labels) - 1, min(wanted, len(labels))).astype(int)]
    each, more = divmod(wanted, len(labels))
    ids = [np.flatnonzero(dataset.labels == label)[: each + (place < more)] for place, label in enumerate(labels)]
    return [(int(dataset.labels[record]), np.asarray(dataset[record][0])) for record in np.concatenate(ids)]
