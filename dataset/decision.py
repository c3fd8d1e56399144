"""What `build` decided a raw tree to be, as it prints it before it starts and the manifest keeps it."""

from dataclasses import dataclass, field

from imagefeed.dataset.console import plural


@dataclass(frozen=True)
class SplitDecision:
    """`role` is train, val, test, or empty if the name says none. `folders` are the split's names in the raw tree, if others."""

    role: str
    images: int
    labeled: int  # of the images
    classes: int  # that have images here
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """`order` says what the order of the classes comes from. `skipped` counts files and folders that are no images, by kind."""

    layout: str = ""
    splits: dict[str, SplitDecision] = field(default_factory=dict)
    train_split: str | None = None  # None if the only split is not one to train on
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
        lines = [f"{'split':<14} {'role':<6} {'images':>11} {'classes':>8}  labels"]
        for name, split in self.splits.items():
            unknown = split.images - split.labeled
            labels = "known" if not unknown else "unknown" if not split.labeled else f"{plural(unknown, 'image')} without one"
            trained = "  <- trained on" if name == self.train_split else ""
            parts = f"  ({' + '.join(split.folders)})" if split.folders else ""
            lines.append(f"{name:<14} {split.role or '-':<6} {split.images:>11,} {split.classes:>8,}  {labels}{trained}{parts}")
        if self.num_classes:
            shown = ", ".join(self.first_classes) + (" ... " + ", ".join(self.last_classes) if self.last_classes else "")
            lines.append(f"{plural(self.num_classes, 'class', 'classes')}, {self.order}: {shown}")
        if self.train_split is None:
            lines.append("no split to train on")
        if self.skipped:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.items())
            lines.append(f"skipped, because they are no images: {kinds}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
