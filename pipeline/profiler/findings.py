"""What a profile found, as plain numbers: profile.py measures them, diagnosis.py names causes, reports show them."""

import dataclasses
import statistics
from dataclasses import dataclass, field

# Shares of a step that wait for data, where xprof draws the lines.
SOME_WAIT, MUCH_WAIT = 0.05, 0.20
BANDS = ("not input-bound", "partly input-bound", "input-bound")


@dataclass(frozen=True)
class Samples:
    """Images per second in each window of a measurement; warm-up is left out."""

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
class Stage:
    """A stage on the way of a batch, in the order of STAGES.

    `alone` is what it does when nothing else runs, None where that was not measured. In place (loader and training together)
    a step spends `p50_s`, `p95_s`, `p99_s` seconds in it, as seen by the thread that trains; of decoding, which goes on beside
    it, that is the waiting for it. `busy` is its share of the wall clock: of its own threads for decoding, of the training
    thread (on a GPU, of its stream) for the others. `queue_empty` is the share of steps that found nothing ready in the queue
    behind it, None where there is no queue. `limit` is what this machine could do at most, in images/s, and `limit_name`
    what sets it ("page cache", "libjpeg-turbo, 2 cores", "memory bandwidth").
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


# In the order of the way. Those that could not be told apart are left out of a profile: "loading" and "step" then stand for a
# whole side, of loaders and loops that are not ours.
STAGES = (
    ("read", "input"),
    ("checksum", "input"),
    ("decode", "input"),
    ("crop", "input"),
    ("loading", "input"),
    ("hand-over", "training"),
    ("forward", "training"),
    ("backward", "training"),
    ("optimizer", "training"),
    ("step", "training"),
    ("rest", "training"),
)


@dataclass(frozen=True)
class Span:
    """A stretch of the input side's work within a step: "read", "decode" (waiting for it) or "crop"."""

    name: str
    start_s: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step of loader and training together; times count from the first step's beginning.

    In order: `wait_s` for the loader (made of `spans` where it is ours), then `phases`, name to seconds: "hand-over", "forward",
    "backward", "optimizer", "rest" (what the loop does besides), or "step" alone where the loop does not tell them apart.
    On a GPU the seconds are those of its stream.
    """

    start_s: float
    wait_s: float
    phases: dict[str, float]
    spans: tuple[Span, ...] = ()

    @property
    def seconds(self) -> float:
        return self.wait_s + sum(self.phases.values())


@dataclass(frozen=True)
class Stall:
    """Steps far slower than the others: every `period` steps ("periodic"), or all from `first_step` on ("late", period None)."""

    kind: str
    first_step: int
    period: float | None
    seconds: float  # by which such a step is longer
    share: float  # of all the time
    stage: str  # where they are lost: "wait", or a phase


@dataclass(frozen=True)
class Cause:
    """Something that costs time: `share` of a step that it takes, `confidence` that it is the first (of the causes, sum <= 1)."""

    name: str
    share: float
    confidence: float
    sentence: str


@dataclass(frozen=True)
class Fix:
    """What to change: `option` as it is typed, empty where it is no option; `gain` 0.3 is 30 % more images/s.

    `changes` are the loader's arguments that do it, for `--try`; empty where the profiler cannot do it itself. `cause` is the
    name of what it removes.
    """

    cause: str
    option: str
    sentence: str
    images_per_second: float
    gain: float
    changes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Tried:
    """The first fix, applied: predicted and achieved images/s."""

    option: str
    before: float
    predicted: float
    achieved: Samples


@dataclass(frozen=True)
class Profile:
    """All that was measured.

    `settings`: device, precision, cores, threads, prefetch, batch_size, size, split, records, model, cache ... `rates`, by name:
    "training" (on one batch over and over: the ceiling), "loader cold", "loader warm", "together". `data_wait` is the share of
    time that waits for data, `data_wait_windows` the same in each window. `prep_stall_s` and `fetch_stall_s` are the seconds a
    step by which the loader is slower than training from memory, and slower still from storage (Mohan et al. 2021, arXiv
    2007.06775). `evidence` holds facts of the machine by name, a number each; `series` those that were sampled on the way.
    `seconds` is how long it all took.
    """

    settings: dict[str, object]
    seconds: float
    rates: dict[str, Samples]
    data_wait: float
    data_wait_windows: tuple[float, ...]
    prep_stall_s: float | None
    fetch_stall_s: float | None
    stages: tuple[Stage, ...]
    stalls: tuple[Stall, ...]
    steps: tuple[Step, ...]
    evidence: dict[str, float]
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)
    causes: tuple[Cause, ...] = ()
    fixes: tuple[Fix, ...] = ()
    tried: Tried | None = None

    @property
    def band(self) -> str:
        return BANDS[(self.data_wait >= SOME_WAIT) + (self.data_wait >= MUCH_WAIT)]

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)
