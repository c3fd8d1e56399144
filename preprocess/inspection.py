"""Says what is in a dataset: counts, sizes, settings and statistics as text or JSON, and a contact sheet as a picture."""

import io
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import NO_LABEL

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
COLUMNS, ROWS = 10, 5  # images of the contact sheet
JITTER_SD = (-3, -1.5, 0, 1.5, 3)  # of the drawn offsets, in the jitter's own deviations
JITTER = 0.1  # Krizhevsky et al. 2012, section 4.1
PUBLISHED_DEVIATIONS = (121.78, 37.09, 19.72)  # of ImageNet's colors along their axes, by AlexNet's authors (docs/format.md)


def describe(manifest: Manifest) -> dict:
    """All that `inspect` tells, as plain numbers, strings and lists."""
    statistics = manifest.load_statistics()
    splits = {}
    for name, split in manifest.splits.items():
        lengths = manifest.load_index(name)["length"]
        used = [count for count in split.counts if count] or [0]  # none has a label in a challenge's test split
        splits[name] = {
            "records": split.records,
            "shards": len(split.shards),
            "bytes": split.bytes,
            "jpeg_bytes_median": float(np.median(lengths)),
            "jpeg_bytes_max": int(lengths.max()),
            "classes": sum(map(bool, used)),
            "smallest_class": min(used),
            "largest_class": max(used),
            "majority_share": max(used) / split.records,
            "counts": dict(zip(manifest.classes, split.counts)),
        }
    return {
        "dataset": str(manifest.root),
        "format_version": manifest.version,
        "fingerprint": manifest.fingerprint,
        "classes": len(manifest.classes),
        "splits": splits,
        "options": manifest.options,
        "versions": manifest.versions,
        "rejected": manifest.rejected,
        "duplicates": manifest.duplicates,
        "statistics": {
            "split": manifest.train_split,
            "images": int(statistics["images"]),
            "pixels": int(statistics["pixels"]),
            **{
                name: statistics[name].round(4).tolist()
                for name in ("channel_mean", "channel_std", "covariance", "eigenvalues", "eigenvectors")
            },
        },
    }


def render_text(facts: dict) -> str:
    """What `describe` found, for people."""
    lines = [f"{facts['dataset']}: format {facts['format_version']}, {facts['classes']:,} classes"]
    for name, split in facts["splits"].items():
        lines.append(
            f"  {name:<11}{split['records']:>10,} records {split['shards']:>5} shards {split['bytes'] / 1e6:>10,.1f} MB"
            f"   JPEG {split['jpeg_bytes_median'] / 1e3:.1f} KB (median)"
            + (
                f"   {split['smallest_class']:,}-{split['largest_class']:,} a class, largest {split['majority_share']:.1%}"
                if split["classes"]
                else "   labels not known"
            )
        )
    statistics = facts["statistics"]
    deviations = np.sqrt(statistics["eigenvalues"])
    lines += [
        "  stored as  " + ", ".join(f"{name} {facts['options'][name]}" for name in ("size", "fit", "quality", "seed")),
        "  written by " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "  images     " + (", ".join(f"{count:,} {action}" for action, count in facts["rejected"].items()) or "all as they were"),
        "  duplicates " + (", ".join(f"{count:,} {name}" for name, count in facts["duplicates"].items()) or "none"),
        f"  colors    of {statistics['images']:,} images of {statistics['split']}: mean {_triple(statistics['channel_mean'])}, "
        f"deviation {_triple(statistics['channel_std'])}",
        f"             along their axes {_triple(deviations)} (ImageNet {_triple(PUBLISHED_DEVIATIONS)})",
    ]
    return "\n".join(lines)


def _triple(values) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def draw_contact_sheet(manifest: Manifest, path: Path) -> None:
    """Draws images of as many classes as fit, with their names, and one image's colors moved along their axes."""
    from matplotlib.figure import Figure  # loads for half a second; only pictures need it

    if path.suffix not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: not a picture's name; end it in one of {', '.join(PICTURE_SUFFIXES)}")
    split = manifest.train_split
    picked = _pick(manifest, split, COLUMNS * ROWS)
    rows = -(-len(picked) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * 1.5, rows * 1.75 + 2.6), dpi=100, facecolor="white")
    figure.suptitle(
        f"{manifest.root.resolve().name}: {split}, {manifest.split(split).records:,} images of {len(manifest.classes):,} classes",
        x=0.02, ha="left", fontsize=15, weight="bold", parse_math=False,
    )  # fmt: skip
    top, bottom = figure.subfigures(2, 1, height_ratios=[rows * 1.75 + 0.6, 2])
    cells = top.subplots(rows, COLUMNS, squeeze=False, gridspec_kw={"hspace": 0.28, "wspace": 0.06})
    top.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.01)
    for axes in cells.flat:
        axes.axis("off")
    for axes, (label, pixels) in zip(cells.flat, picked):
        axes.imshow(_square(pixels))
        name = _title(manifest, label)
        axes.set_title(
            name if len(name) <= 18 else textwrap.shorten(name, 18, placeholder="…") or name[:17] + "…",
            fontsize=8,
            pad=3,
            parse_math=False,
        )
    _draw_jitter(bottom, manifest, max((pixels for _, pixels in picked), key=_colorfulness))
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())


def _draw_jitter(figure, manifest: Manifest, pixels: np.ndarray) -> None:
    statistics = manifest.load_statistics()
    deviations = np.sqrt(statistics["eigenvalues"])
    figure.text(
        0.02, 0.97,
        "Color jitter: one image moved along the three axes of all colors, by so many of the jitter's standard deviations",
        fontsize=11, weight="bold", va="top",
    )  # fmt: skip
    cells = figure.subplots(1, 3 * len(JITTER_SD), gridspec_kw={"wspace": 0.05})
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.02)
    for axis in range(3):
        for place, sd in enumerate(JITTER_SD):
            axes = cells[axis * len(JITTER_SD) + place]
            offset = JITTER * sd * deviations[axis] * statistics["eigenvectors"][:, axis]
            axes.imshow((_square(pixels) + offset).clip(0, 255).astype(np.uint8))
            axes.set_title(f"{f'axis {axis + 1}' if not place else ''}\n{f'{sd:+g}' if sd else '0'}", fontsize=8, pad=3)
            axes.axis("off")


def _title(manifest: Manifest, label: int) -> str:
    """What people call a class, by the first of its names."""
    if label == NO_LABEL:
        return ""
    return manifest.titles[label].split(",")[0] if manifest.titles else manifest.classes[label]


def _colorfulness(pixels: np.ndarray) -> float:
    """How far apart the channels of its pixels lie on average."""
    return float(np.ptp(pixels, axis=2).mean())


def _square(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _pick(manifest: Manifest, split: str, wanted: int) -> list[tuple[int, np.ndarray]]:
    """(label, pixels) of `wanted` records: evenly over the classes, the first records of each."""
    index = manifest.load_index(split)
    labels = np.flatnonzero(manifest.split(split).counts)
    labels = labels if len(labels) else np.array([NO_LABEL])
    labels = labels[np.linspace(0, len(labels) - 1, min(wanted, len(labels))).astype(int)]
    take = Counter({int(label): wanted // len(labels) + (place < wanted % len(labels)) for place, label in enumerate(labels)})
    picked = []
    for record in np.flatnonzero(np.isin(index["label"], labels)):
        label = int(index["label"][record])
        if take[label]:
            take[label] -= 1
            shard = manifest.root / manifest.split(split).shards[index["shard"][record]].name
            with open(shard, "rb") as file:
                file.seek(int(index["offset"][record]))
                data = file.read(int(index["length"][record]))
            try:
                picked.append((label, np.asarray(Image.open(io.BytesIO(data)))))
            except OSError:
                raise UserError(
                    f"{shard}: record {record} of {split} is damaged; find what else is with: python -m preprocess verify "
                    f"{manifest.root}"
                ) from None
        if not +take:
            break
    return sorted(picked, key=lambda item: item[0])
