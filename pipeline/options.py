"""The loader's options, each stated once: name, default, range, help, and what it decides.

Command-line options, the checks of `ImageLoader`, a run's identity, the tuner and the profiler derive from `OPTIONS`. The
signature of `ImageLoader` is written out as well, for help() and type checkers; a test compares the two.
"""

import dataclasses
import inspect
import math
import numbers
import os
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import click

SHUFFLES = ("global", "blocks", "node-blocks", "none")
# torchvision's ImageNet statistics, in gray levels.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
BYTE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Kind(click.ParamType):
    """Values that an option takes: `parse` reads them from a command line, `valid` says whether a value is one of them."""

    name = "text"
    words: str  # completes "must be ..."
    metavar: str | None = None  # by default, the name

    def parse(self, text: str) -> object:
        return text

    def valid(self, value: object) -> bool:
        raise NotImplementedError

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        return self.metavar

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        try:
            parsed = self.parse(value) if isinstance(value, str) else value
        except ValueError:
            parsed = None
        if parsed is None or not self.valid(parsed):
            self.fail(f"{value!r} is not {self.words}", param, ctx)
        return parsed


class Number(Kind):
    """Finite numbers, or whole ones, from `low` to `high`, both excluded if `open_ends`."""

    def __init__(self, low: float = -math.inf, high: float = math.inf, *, whole: bool = False, open_ends: bool = False):
        self.low, self.high, self.whole, self.open_ends = low, high, whole, open_ends
        self.name = "integer" if whole else "number"
        if open_ends:
            limits = f" above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        elif high < math.inf:
            limits = f" from {low:g} to {high:,}" if high < 2**63 else " of 64 bits"
        else:
            limits = f" of at least {low:g}" if low > -math.inf else ""
        self.words = ("a whole number" if whole else "a number") + limits

    def parse(self, text: str) -> float:
        return int(text) if self.whole else float(text)

    def valid(self, value: object) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        return self.low < value < self.high if self.open_ends else self.low <= value <= self.high


class OneOf(Kind):
    def __init__(self, *choices: str):
        self.choices, self.words, self.metavar = choices, f"one of {', '.join(choices)}", f"[{'|'.join(choices)}]"

    def valid(self, value: object) -> bool:
        return isinstance(value, str) and value in self.choices


class Flag(Kind):
    name, words = "boolean", "True or False"

    def valid(self, value: object) -> bool:
        return isinstance(value, bool)


def are_numbers(value: object, count: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == count and all(map(Number().valid, value))


class Strengths(Kind):
    """Brightness, contrast, saturation and hue of torchvision's ColorJitter."""

    name, words = "B,C,S,H", "four numbers of 0 or more, the last at most 0.5, such as 0.4,0.4,0.4,0.1"

    def parse(self, text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split(",")))

    def valid(self, value: object) -> bool:
        return are_numbers(value, 4) and min(value) >= 0 and value[3] <= 0.5


class Channels(Kind):
    """A name, or three numbers for red, green and blue in gray levels of 0 to 255."""

    def __init__(self, *names: str, positive: bool = False):
        self.names, self.positive, self.metavar = names, positive, f"[{'|'.join(names)}|R,G,B]"
        self.words = (
            f"one of {', '.join(names)}, or three numbers for R, G and B in gray levels of 0 to 255, such as "
            f"{','.join(f'{x:g}' for x in (IMAGENET_STD if positive else IMAGENET_MEAN))} (those of torchvision, times 255)"
        )

    def parse(self, text: str) -> str | tuple[float, ...]:
        return text if text in self.names else tuple(map(float, text.split(",")))

    def valid(self, value: object) -> bool:
        if isinstance(value, str):
            return value in self.names
        if not (are_numbers(value, 3) and 0 <= min(value) and max(value) <= 255):
            return False
        # Fractions of 1, as torchvision has them, would scale pixels 255 times too much without a word.
        return max(value) > 1 and min(value) > 0 if self.positive else max(value) > 1 or not any(value)


class AutoAugment(Kind):
    metavar = "[none|trivial|rand|rand:N:M]"
    words = "none, trivial, rand, or rand:N:M for N operations, 1 to 10, of strength M, 0 to 30, such as rand:2:9"

    def valid(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch("none|trivial|rand(:([1-9]|10):([12]?[0-9]|30))?", value) is not None


class Transform(Kind):
    words = "a function of a batch's images, or of images and labels"

    def valid(self, value: object) -> bool:
        return callable(value)


class Names(Kind):
    """A list of `fewest` to `most` different names."""

    def __init__(self, words: str, fewest: int = 0, most: float = math.inf):
        self.words, self.fewest, self.most = words, fewest, most

    def valid(self, value: object) -> bool:
        if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
            return False
        return self.fewest <= len(value) == len(set(value)) <= self.most


class Values(Kind):
    """A value for each of several records or classes, whose content is checked against the dataset."""

    name = "FILE"

    def __init__(self, words: str, *names: str):
        self.words, self.names = words, names

    def valid(self, value: object) -> bool:
        if isinstance(value, str | os.PathLike):
            return not self.names or value in self.names
        return isinstance(value, Collection) or hasattr(value, "__array__")


class Folder(Kind):
    name, words = "FOLDER", "the path of a folder"

    def valid(self, value: object) -> bool:
        return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


class Bytes(Kind):
    name, words = "BYTES", "a number of bytes, such as 500_000_000, or 500M on a command line"

    def parse(self, text: str) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)B?", text.upper())
        if not match:
            raise ValueError
        return int(float(match[1]) * BYTE_UNITS[match[2]])

    def valid(self, value: object) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class Option:
    """An option: a keyword argument in Python, a flag on a command line.

    `decides` "batches" is part of a run's identity, "cost" may change when a run resumes, "place" is where it runs.
    `default_text` describes a default of None.
    """

    name: str
    default: object
    kind: Kind
    help: str
    decides: Literal["batches", "cost", "place"] = "batches"
    default_text: str = ""
    flag: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flag", self.flag or f"--{self.name.replace('_', '-')}")

    def check(self, value: object) -> None:
        """Raises ValueError, which names the argument, unless `value` is in range or the default."""
        if not (self.kind.valid(value) or (value is None and self.default is None)):
            raise ValueError(f"{self.name} must be {self.kind.words}, not {value!r}")

    def click_option(self, section: str = "Options") -> Callable:
        flags = f"{self.flag}/--no-{self.flag[2:]}" if isinstance(self.kind, Flag) and self.default else self.flag
        shape = {"is_flag": True} if isinstance(self.kind, Flag) else {"type": self.kind}
        default = ",".join(f"{x:g}" for x in self.default) if isinstance(self.default, tuple) else self.default
        show = self.default_text or (self.default is not None and self.default is not False)
        return click.option(
            flags, self.name, cls=SectionOption, section=section, default=default, show_default=show, help=self.help, **shape
        )


AUGMENTATION = (
    Option("crop_size", 224, Number(1, whole=True), "Side of a crop in pixels."),
    Option("random_resized_crop", False, Flag(), "Crop a random area, then resize it, as torchvision's RandomResizedCrop does."),
    Option("pca_jitter", 0.1, Number(0), "Strength of the PCA color jitter, in standard deviations; 0 turns it off."),
    Option("color_jitter", (0.0,) * 4, Strengths(), "Strengths of ColorJitter: brightness, contrast, saturation, hue."),
    Option(
        "auto_augment", "none", AutoAugment(), "Change each image by TrivialAugment, or RandAugment (2 operations of strength 9)."
    ),
    Option("random_erasing", 0.0, Number(0, 1), "Probability of erasing a rectangle of an image."),
    Option("mixup", 0.0, Number(0), "Alpha of mixup, such as 0.2: pairs of images and labels are blended; 0 turns it off."),
    Option(
        "cutmix",
        0.0,
        Number(0),
        "Alpha of cutmix, such as 1: pairs exchange a rectangle; with --mixup, one of the two each time.",
    ),
    Option("mean", "channel", Channels("channel", "image", "imagenet"), "Mean to subtract; image is the paper's mean image."),
    Option("std", "none", Channels("none", "dataset", "imagenet", positive=True), "Standard deviation to divide by."),
    Option(
        "shuffle",
        None,
        OneOf(*SHUFFLES),
        "Shuffle all records, blocks of consecutive ones (docs/shuffle.md), or none.",
        default_text="global; blocks from a store",
    ),
)
READING = (
    Option(
        "decoder",
        "auto",
        OneOf("auto", "native", "dali", "both"),
        "JPEG decoder: imagefeed's own on the cores (native), DALI's, or both; auto is dali for a GPU without cache host.",
        "cost",
    ),
    Option("native_share", 0.5, Number(0, 1), "Fraction of the records that the cores decode with decoder both.", "cost"),
    Option("num_threads", None, Number(1, whole=True), "Decoding threads.", "cost", "all cores", "--threads"),
    Option("prefetch", None, Number(1, whole=True), "Batches to prepare ahead.", "cost", "2, with DALI 4, both 3"),
    Option("read_ahead", 8, Number(0, whole=True), "Batches to prefetch from disk.", "cost"),
    Option("cache", "none", OneOf("none", "host", "device"), "Keep decoded images: host as RGB, device as YCbCr 4:2:0.", "cost"),
    Option("cache_bytes", None, Bytes(), "Memory for the cache, such as 117G.", "cost", "half of free memory"),
    Option("cache_dir", None, Folder(), "Keep what is read from a store in this folder.", "cost", "not kept"),
    Option("cache_dir_bytes", None, Bytes(), "Room in cache_dir, such as 200G.", "cost", "half of what is free"),
    Option("verify_checksums", True, Flag(), "Check each record's CRC when it is read.", "cost"),
    Option("max_corrupt", 100, Number(0, whole=True), "Stop after replacing this many corrupt records.", "cost"),
    Option("hw_decoder_load", 0.65, Number(0, 1), "Fraction of images for the GPU's hardware JPEG decoder.", "cost"),
)
TUNED = Option("tuned", True, Flag(), "Use the settings that `imagefeed tune` found; options given here win.", "cost")
OPTIONS = {
    option.name: option
    for option in (
        Option("batch_size", 128, Number(1, whole=True), "Images in a batch, on each rank."),
        Option(
            "keys", None, Names("two to four different names, for images, labels, ids and valid", 2, 4),
            "Names of images, labels, ids and valid in a batch that is a dict.", "cost", "a tuple",
        ),
        Option(
            "columns", (), Names("a list of different names of columns that build kept"),
            "Further columns that a batch has.", "cost",
        ),
        Option(
            "subset", None, Values("record ids, names of classes, or a file of them"),
            "Only these records: a file of ids, classes or raw files, one a line, or .npy.", default_text="all",
        ),
        Option(
            "weights", None, Values("a number for each record or class, or balanced", "balanced"),
            "How often each record or class comes.", default_text="alike",
        ),
        Option("repeats", 1, Number(1, whole=True), "Times that a record comes in a row, each with other crops and colors."),
        Option("crops", 1, Number(1, whole=True), "Random crops of a record in a batch."),
        Option("views", "random", OneOf("random", "center", "ten"), "Random crops, the center crop, or ten views."),
        *AUGMENTATION,
        Option("transform", None, Transform(), "Function of a batch's images, or of images and labels.", default_text="none"),
        Option("dtype", "float32", OneOf("float32", "float16", "bfloat16", "uint8"), "Type of the pixels."),
        Option("memory_format", "contiguous", OneOf("contiguous", "channels_last"), "Memory layout of a batch.", "cost"),
        Option("seed", 0, Number(-(2**63), 2**64 - 1, whole=True), "Random seed."),
        Option("rank", None, Number(0, whole=True), "This process's number among the ranks.", "place", "torch.distributed's"),
        Option("world_size", None, Number(1, whole=True), "Number of ranks.", "place", "torch.distributed's"),
        Option("pad_last", False, Flag(), "Pad the last batch of an evaluation, as over several ranks.", "cost"),
        Option("device", "cpu", Kind(), "Device for the batches: auto, cpu, cuda or cuda:N.", "place"),
        *READING,
        Option("position", 0, Number(0, 2**62, whole=True), "Steps since the first epoch began, to start from.", "place"),
    )
}  # fmt: skip
DEVICE = click.option(
    "--device",
    type=OneOf("auto", "cuda", "cpu"),
    default="auto",
    show_default=True,
    help="Device to use; auto is CUDA if PyTorch finds a GPU.",
)

# Names until version 0.1, as arguments and in the state of loaders and checkpoints, and flags that were renamed or removed.
OLD_NAMES = {
    "check": "verify_checksums",
    "colour": "pca_jitter",
    "colour_divisor": "pixel_divisor",
    "colour_epochs": "pca_jitter_epochs",
    "decay": "weight_decay",
    "deviation": "std",
    "layout": "memory_format",
    "lr_drops": "lr_milestones",
    "max_damaged": "max_corrupt",
    "random_resized": "random_resized_crop",
    "size": "crop_size",
}
OLD_FLAGS = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in OLD_NAMES.items()} | {
    "--deviation": "--std dataset",
    "--no-check": "--no-verify-checksums",
    "--no-colour": "--pca-jitter 0",
}


def check(arguments: dict[str, object]) -> None:
    """Raises ValueError for the first argument that is out of its option's range; arguments without an option are ignored."""
    for name, value in arguments.items():
        if name in OPTIONS and name != "device":
            OPTIONS[name].check(value)


def described(signature: inspect.Signature) -> str:
    """The arguments that are options, for a docstring: help, range and default of each."""
    lines = ["Arguments:"]
    for name, parameter in signature.parameters.items():
        if name in OPTIONS:
            option = OPTIONS[name]
            words = f"{option.kind.words}; " if hasattr(option.kind, "words") else ""
            text = f"{name}: {option.help[:-1]} ({words}default {option.default_text or repr(parameter.default)})."
            lines.append(textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        "))
    return "\n".join(lines)


def renamed(name: str, value: object) -> tuple[str, object]:
    """The present name and value of an argument that a state of version 0.1 holds."""
    if name == "deviation":
        return "std", "dataset" if value else "none"
    if name == "colour" and isinstance(value, bool):  # recipes; loaders kept the strength
        return "pca_jitter", 0.1 if value else 0.0
    return OLD_NAMES.get(name, name), value


class SectionOption(click.Option):
    """An option that `--help` lists under the heading `section`."""

    def __init__(self, *args, section: str, **attributes):
        super().__init__(*args, **attributes)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> dict:
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default  # without click's parentheses
        elif isinstance(self.default, float):
            extra["default"] = f"{self.default:g}"
        return extra


class Command(click.Command):
    """A command whose `--help` has sections, and which answers a renamed option with its new name."""

    def __init__(self, *args, **attributes):
        # Its own, as click keeps the help option of the first call, even if a later one comes from a group that knows -h.
        super().__init__(*args, context_settings={"help_option_names": ["-h", "--help"]}, **attributes)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in OLD_FLAGS:
                raise click.UsageError(f"{error.option_name} is now {OLD_FLAGS[error.option_name]}", ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section in sorted(sections, key=lambda name: name != "Options"):
            with formatter.section(section):
                formatter.write_dl(sections[section])


def add_options(table: dict[str, Sequence[Option]]) -> Callable[[Callable], Callable]:
    """A decorator that adds options to a command, by section of its `--help`."""

    def add(command: Callable) -> Callable:
        for section, options in reversed(table.items()):
            for option in reversed(options):
                command = option.click_option(section)(command)
        return command

    return add
