"""How `build` reads a raw tree: printed before it starts, and kept in the manifest."""

from dataclasses import dataclass, field

from imagefeed.dataset.console import plural


@dataclass(frozen=True)
class SplitDecision:
    """`role` is train, val, test, or empty if the name does not tell; `folders` are its names in the raw tree, if they differ.
    `images` and `labeled` exclude the frames of `videos`, which are counted when they are unpacked."""

    role: str
    images: int
    labeled: int  # of the images
    classes: int  # that have images here
    videos: int = 0
    folders: tuple[str, ...] = ()

    @property
    def labels(self) -> str:
        unlabeled = self.images - self.labeled
        return "known" if not unlabeled else f"{plural(unlabeled, 'image')} without" if self.labeled else "unknown"


@dataclass(frozen=True)
class Decision:
    """`order` says where the order of the classes comes from; `skipped` counts files and folders that are not images."""

    layout: str = ""
    splits: dict[str, SplitDecision] = field(default_factory=dict)
    train_split: str | None = None  # None if the only split is for evaluation
    num_classes: int = 0
    first_classes: tuple[str, ...] = ()
    last_classes: tuple[str, ...] = ()
    order: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: dict) -> "Decision":
        """Raises TypeError or KeyError unless `data` is dataclasses.asdict of a decision."""
        splits = {name: SplitDecision(**split | {"folders": tuple(split["folders"])}) for name, split in data["splits"].items()}
        tuples = {name: tuple(data[name]) for name in ("first_classes", "last_classes", "notes")}
        return cls(**data | tuples | {"splits": splits})

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The layout, a table of the splits, and one line each for the classes, the skipped files and every note."""
        rows = [("split", "role", "images", "classes", "labels", "")]
        for name, split in self.splits.items():
            count = f"{split.images:,}" + (f" + {plural(split.videos, 'video')}" if split.videos else "")
            remarks = ["training split"] if name == self.train_split else []
            remarks += [f"from {' + '.join(split.folders)}"] if split.folders else []
            rows.append((name, split.role or "none", count, f"{split.classes:,}", split.labels, ", ".join(remarks)))
        width = [max(map(len, column)) for column in zip(*rows)]
        lines = [self.layout]
        for name, role, count, classes, labels, remark in rows:
            line = f"  {name:<{width[0]}}  {role:<{width[1]}}  {count:>{width[2]}}  {classes:>{width[3]}}  {labels:<{width[4]}}"
            lines.append(f"{line}  {remark}".rstrip())
        if self.train_split is None:
            lines.append("  no split to train on")
        if self.num_classes:
            shown = ", ".join(self.first_classes) + (", ..., " + ", ".join(self.last_classes) if self.last_classes else "")
            lines.append(f"  {plural(self.num_classes, 'class', 'classes')}, {self.order}: {shown}")
        if self.skipped:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.items())
            lines.append(f"  skipped, not images: {kinds}")
        return lines + [f"  note: {note}" for note in self.notes]
