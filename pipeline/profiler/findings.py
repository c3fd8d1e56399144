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
# The stages of a batch in order, each with its side and its label. For another loader "loading" stands for the whole input side,
# and for a loop without phases "step" for the training side.
STAGES = {
    "read": ("input", "Read"),
    "checksum": ("input", "Checksum"),
    "decode": ("input", "JPEG decode"),
    "crop": ("input", "Crop, flip, normalize"),
    "upload": ("input", "Copy of crops to the device"),
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
    """What the input side did within a step: "read", "decode" (the wait for the decoder), "crop", or "upload" the
    wait for copies to the device."""

    name: str
    start_s: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step of loader and training together; times count from the start of the first step.

    The step waits `wait_s` for its batch (`spans` say why), then goes through its `phases`: seconds by name, as in STAGES, on a
    GPU those of its stream.
    """

    start_s: float
    wait_s: float
    phases: dict[str, float]
    spans: tuple[Span, ...] = ()

    @property
    def seconds(self) -> float:
        return self.wait_s + sum(self.phases.values())


def cut(steps: tuple[Step, ...]) -> list[tuple[Step, ...]]:
    edges = np.linspace(0, len(steps), min(WINDOWS, len(steps)) + 1).astype(int).tolist()
    return [steps[begin:end] for begin, end in itertools.pairwise(edges)]


def rates_of(steps: tuple[Step, ...], batch_size: int) -> Samples:
    return Samples(tuple(batch_size * len(window) / sum(step.seconds for step in window) for window in cut(steps)))


def data_wait(steps: tuple[Step, ...]) -> float:
    return sum(step.wait_s for step in steps) / sum(step.seconds for step in steps)


@dataclass(frozen=True)
class Stage:
    """A stage that batches pass through, as the training thread sees it: decoding runs beside it, so its times are the wait."""

    name: str
    side: str  # "input" or "training"
    alone: Samples | None  # its rate when nothing else runs
    p50_s: float  # of the time that a step spends in it
    p95_s: float
    p99_s: float
    busy: float  # share of the wall clock: of decoding's own threads, else of the training thread (on a GPU, its stream)
    queue_empty: float | None = None  # share of the steps that found the queue behind it empty
    limit: float | None = None  # images/s, the most that this machine could do
    limit_name: str = ""  # what sets the limit

    @property
    def of_limit(self) -> float | None:
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
    decoder: str = UNSET
    prefetch: int = UNSET
    hw_decoder_load: float = UNSET
    crop_size: int = UNSET
    split: str = UNSET
    root: str = UNSET
    records: int = UNSET
    record_bytes_per_step: float = UNSET
    pixels_per_image: float = UNSET
    cache: str = UNSET
    cache_dir: str = UNSET
    read_ahead: int = UNSET
    verify_checksums: bool = UNSET
    shuffle: str = UNSET
    random_resized_crop: bool = UNSET
    color_jitter: tuple[float, ...] = UNSET
    native_share: float = UNSET
    hardware_decoder: bool = UNSET  # whether DALI finds it; of a GPU

    @property
    def ours(self) -> bool:
        return self.threads is not None

    @property
    def cuda(self) -> bool:
        return self.device != "CPU"

    @property
    def unnoted(self) -> str:
        """The stage to which a step's wait belongs that the host did not see: what its stream waited for."""
        if not (self.ours and self.cuda):
            return "loading"
        return "upload" if self.decoder == "native" else "decode"


@dataclass(frozen=True)
class Evidence:
    """Facts about the run and the machine; None where one was not measured, a tuple where it was sampled."""

    resident_share: float = fact("Pages of the dataset in memory before", "%")
    evicted_share: float = fact("Pages read during the profile and evicted since", "%")
    throttled_share: float = fact("Time held back by a CPU quota", "%")
    cpu_quota: float = fact("CPU quota of the control group", "cores")
    dataset_bytes: float = fact("Dataset", "B")
    available_bytes: float = fact("Memory available", "B")
    limit_bytes: float = fact("Memory limit of the process", "B")
    record_bytes: float = fact("Mean record", "B")
    read_bytes_per_step: float = fact("Read from disk per step", "B")
    refaults_per_step: float = fact("Pages read again per step", "")
    disk_records_per_s: float = fact("Disk, past the page cache", "records/s")
    disk_bytes_per_s: float = fact("Disk, past the page cache", "B/s")
    store_requests_per_step: float = fact("Requests to the store per step", "")
    store_request_s: float = fact("Request to the store", "s")
    store_in_flight: float = fact("Requests to the store in flight", "")
    store_bytes_per_s: float = fact("Read from the store", "B/s")
    store_retries: float = fact("Requests to the store that were repeated", "")
    memory_bytes_per_s: float = fact("Memory bandwidth", "B/s")
    copy_bytes_per_s: float = fact("Host-to-device copy, pinned", "B/s")
    matrix_flop_per_s: float = fact("Matrix products", "FLOP/s")
    decode_images_per_s: float = fact("libjpeg-turbo on one core", "images/s")
    native_images_per_s: float = fact("imagefeed's decoder on one core", "images/s")
    cores_images_per_s: float = fact("imagefeed's decoder on all threads", "images/s")
    dali_images_per_s: float = fact("DALI's decoder on the device", "images/s")
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
    """Something that costs time."""

    name: str
    share: float  # of a step
    confidence: float  # that it is the first cause; all of them add up to at most 1
    sentence: str


@dataclass(frozen=True)
class Fix:
    """A change that removes or reduces `cause`."""

    cause: str
    option: str  # as it is typed; may be empty
    sentence: str
    images_per_second: float
    gain: float  # 0.3 is 30 % more images/s
    changes: dict[str, Any] = field(default_factory=dict)  # the arguments of ImageLoader that make it, if any do


@dataclass(frozen=True)
class Tried:
    """The first fix, applied: predicted and achieved images/s."""

    option: str
    before: float
    predicted: float
    achieved: Samples


@dataclass(frozen=True)
class Profile:
    """All that was measured; `str(profile)` is what `imagefeed profile` prints."""

    settings: Settings
    seconds: float  # that the profile took
    rates: dict[str, Samples]  # by the names of report.RATES
    steps: tuple[Step, ...]
    stages: tuple[Stage, ...] = ()
    stalls: tuple[Stall, ...] = ()
    evidence: Evidence = Evidence()
    gains: dict[str, tuple[float, ...]] = field(default_factory=dict)  # of each option, in each round of its trial
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
        seconds = {name: self.settings.batch_size / rate.median for name, rate in self.rates.items()}
        if not seconds.keys() >= {"training", "loader warm"}:
            return None, None
        prep_s = max(seconds["loader warm"] - seconds["training"], 0.0)
        return prep_s, max(seconds["loader cold"] - seconds["training"] - prep_s, 0.0) if "loader cold" in seconds else None
