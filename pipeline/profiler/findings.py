"""What a profile found: measure.py measures it, causes.py and fixes.py explain it, the reports show it."""

import functools
import itertools
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Shares of a step that wait for data, where xprof draws the lines.
SOME_WAIT, MUCH_WAIT = 0.05, 0.20
BANDS = ("not input-bound", "partly input-bound", "input-bound")
WINDOWS = 10
UNSET: Any = None  # not measured, or an option that the loader does not have
LARGER_BATCH = 4  # times the batch, to see which part of a step's time does not grow with it
LARGER = f"training, {LARGER_BATCH} times the batch"
# The stages of a batch in order, each with its side and its label. A profile leaves out those that cannot be told apart: for
# another loader "loading" stands for the whole input side, and for a loop without phases "step" for the training side.
STAGES = {
    "read": ("input", "Read"),
    "checksum": ("input", "Checksum"),
    "decode": ("input", "JPEG decode"),
    "crop": ("input", "Crop, flip, normalize"),
    "loading": ("input", "Loader, the rest"),
    "copy": ("training", "Host-to-device copy"),
    "forward": ("training", "Forward pass"),
    "backward": ("training", "Backward pass"),
    "optimizer": ("training", "Optimizer"),
    "step": ("training", "Step"),
    "rest": ("training", "Rest of the loop"),
}


def fact(label: str, unit: str, default: object = None) -> Any:
    """A field with what the reports call it, and the unit of its value."""
    return field(default=default, metadata={"label": label, "unit": unit})


@dataclass(frozen=True)
class Samples:
    """Images per second in each window of a measurement, without its warm-up."""

    windows: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.windows)

    @property
    def low(self) -> float:
        return min(self.windows)

    @property
    def high(self) -> float:
        return max(self.windows)


@dataclass(frozen=True)
class Span:
    """What the input side did within a step: "read", "decode" (the wait for the decoder) or "crop"."""

    name: str
    start_s: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step of loader and training together; times count from the start of the first step.

    The step waits `wait_s` for its batch (for an ImageLoader `spans` say why) and then goes through its `phases`, which map a
    name to seconds: "copy", "forward", "backward", "optimizer" and "rest", or only "step" where the loop does not tell them
    apart. On a GPU these are seconds of its stream.
    """

    start_s: float
    wait_s: float
    phases: dict[str, float]
    spans: tuple[Span, ...] = ()

    @property
    def seconds(self) -> float:
        return self.wait_s + sum(self.phases.values())


def cut(steps: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    """WINDOWS equal parts, or as many as there are steps."""
    edges = np.linspace(0, len(steps), min(WINDOWS, len(steps)) + 1).astype(int).tolist()
    return [steps[begin:end] for begin, end in itertools.pairwise(edges)]


def rates_of(steps: tuple[Step, ...], batch_size: int) -> Samples:
    return Samples(tuple(batch_size * len(window) / sum(step.seconds for step in window) for window in cut(steps)))


def data_wait(steps: tuple[Step, ...]) -> float:
    """The share of the time that waits for data."""
    return sum(step.wait_s for step in steps) / sum(step.seconds for step in steps)


@dataclass(frozen=True)
class Stage:
    """A stage of the way of a batch.

    `alone` is its rate when nothing else runs, None if that was not measured. With loader and training together, a step spends
    `p50_s`, `p95_s`, `p99_s` in it, as the training thread sees it; decoding runs beside that thread, so there it is the wait.
    `busy` is its share of the wall clock: of its own threads for decoding, of the training thread (on a GPU, its stream) for the
    others. `queue_empty` is the share of steps that found the queue behind it empty, None without a queue. `limit` is the most
    images/s that this machine could do, and `limit_name` what sets it ("disk", "libjpeg-turbo, 2 cores", "memory bandwidth").
    """

    name: str
    side: str  # "input" or "training"
    alone: Samples | None
    p50_s: float
    p95_s: float
    p99_s: float
    busy: float
    queue_empty: float | None = None
    limit: float | None = None
    limit_name: str = ""

    @property
    def of_limit(self) -> float | None:
        """Its rate alone as a share of the limit."""
        return self.alone.median / self.limit if self.alone and self.limit else None


@dataclass(frozen=True)
class Stall:
    """Steps far slower than the others: every `period` steps ("periodic"), or all from `first_step` on ("late", period None)."""

    kind: str
    first_step: int
    period: float | None
    seconds: float  # by which such a step is longer
    share: float  # of the time of all steps
    stage: str  # where the time is lost


@dataclass(frozen=True)
class Settings:
    """How the run was set up; fields from `threads` on are those of an ImageLoader, None for another loader."""

    device: str
    precision: str
    cores: int
    batch_size: int
    loader: str
    workers: int | None = None
    model: str | None = None
    threads: int = UNSET
    prefetch: int = UNSET
    hw_decoder_load: float = UNSET
    crop_size: int = UNSET
    split: str = UNSET
    root: str = UNSET
    records: int = UNSET
    record_bytes_per_step: float = UNSET
    pixels_per_image: float = UNSET
    cache: str = UNSET
    read_ahead: int = UNSET
    verify_checksums: bool = UNSET
    shuffle: str = UNSET
    random_resized_crop: bool = UNSET
    color_jitter: tuple[float, ...] = UNSET

    @property
    def ours(self) -> bool:
        return self.threads is not None

    @property
    def cuda(self) -> bool:
        return self.device != "CPU"

    @property
    def decoded_bytes(self) -> float:
        """Of all images as RGB."""
        return 3 * self.pixels_per_image * self.records


@dataclass(frozen=True)
class Evidence:
    """Facts about the run and the machine; None where one was not measured, a tuple where it was sampled."""

    resident_share: float = fact("Pages of the dataset in memory before", "%")
    evicted_share: float = fact("Pages read during the profile and evicted since", "%")
    throttled_share: float = fact("Time throttled by a control group", "%")
    dataset_bytes: float = fact("Dataset", "B")
    available_bytes: float = fact("Memory available", "B")
    limit_bytes: float = fact("Memory limit of the process", "B")
    record_bytes: float = fact("Mean record", "B")
    read_bytes_per_step: float = fact("Read from disk per step", "B")
    refaults_per_step: float = fact("Pages read again per step", "")
    disk_records_per_s: float = fact("Disk, past the page cache", "records/s")
    disk_bytes_per_s: float = fact("Disk, past the page cache", "B/s")
    memory_bytes_per_s: float = fact("Memory bandwidth", "B/s")
    copy_bytes_per_s: float = fact("Host-to-device copy, pinned", "B/s")
    matrix_flop_per_s: float = fact("Matrix products", "FLOP/s")
    decode_images_per_s: float = fact("libjpeg-turbo on one core", "images/s")
    parameters: float = fact("Parameters of the net", "")
    forward_flop: float = fact("Forward pass of an image", "FLOP")
    backward_flop: float = fact("Backward pass of an image", "FLOP")
    fixed_share: float = fact("Share of a step that does not grow with the batch", "%")
    read_s: float = fact("To read a batch from memory", "s")
    copy_s: float = fact("To copy a batch once", "s")
    update_s: float = fact("To update the parameters, at least", "s")
    # Sampled while the steps ran:
    others_share: tuple[float, ...] = fact("Processors used by other programs", "%", ())
    queued_share: tuple[float, ...] = fact("This program waiting for a processor", "%", ())
    lock_latency_s: tuple[float, ...] = fact("Latency of the interpreter lock", "s", ())
    fixed_s: tuple[float, ...] = fact("Time of a step that does not grow with the batch", "s", ())


@dataclass(frozen=True)
class Cause:
    """Something that costs time: its `share` of a step, and the `confidence` that it is the first cause (their sum is <= 1)."""

    name: str
    share: float
    confidence: float
    sentence: str


@dataclass(frozen=True)
class Fix:
    """A change against `cause`: `option` as it is typed, or "" if it is none; a `gain` of 0.3 is 30 % more images/s.

    `changes` are the arguments of ImageLoader that make it; empty where the profiler cannot try it.
    """

    cause: str
    option: str
    sentence: str
    images_per_second: float
    gain: float
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """The first fix, applied: predicted and achieved images/s."""

    option: str
    before: float
    predicted: float
    achieved: Samples


@dataclass(frozen=True)
class Profile:
    """All that was measured; `str(profile)` is what `imagefeed profile` prints.

    `rates` are, by name, "together", "training" (on one batch over and over: the ceiling), "loader warm" and "loader cold", and
    LARGER; `gains` those of each option in each round of its trial. `seconds` is how long the profile took.
    """

    settings: Settings
    seconds: float
    rates: dict[str, Samples]
    steps: tuple[Step, ...]
    stages: tuple[Stage, ...] = ()
    stalls: tuple[Stall, ...] = ()
    evidence: Evidence = Evidence()
    gains: dict[str, tuple[float, ...]] = field(default_factory=dict)
    causes: tuple[Cause, ...] = ()
    fixes: tuple[Fix, ...] = ()
    tried: Tried | None = None

    def __str__(self) -> str:
        from imagefeed.pipeline.profiler.report import render_text

        return render_text(self)

    @functools.cached_property
    def data_wait(self) -> float:
        return data_wait(self.steps)

    @property
    def data_wait_windows(self) -> tuple[float, ...]:
        return tuple(map(data_wait, cut(self.steps)))

    @property
    def band(self) -> str:
        return BANDS[(self.data_wait >= SOME_WAIT) + (self.data_wait >= MUCH_WAIT)]

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def stalls_s(self) -> tuple[float | None, float | None]:
        """Seconds a step by which the loader, from memory, is slower than training, and slower still from storage: the prep stall
        and fetch stall of Mohan et al. 2021 (arXiv 2007.06775)."""
        rates, batch = self.rates, self.settings.batch_size
        names = ("training", "loader warm", "loader cold")
        training_s, warm_s, cold_s = (batch / rates[name].median if name in rates else None for name in names)
        prep_s = None if training_s is None or warm_s is None else max(warm_s - training_s, 0.0)
        return prep_s, None if prep_s is None or training_s is None or cold_s is None else max(cold_s - training_s - prep_s, 0.0)
