"""From what was measured to causes, how sure each is, and what to do.

A step of loader and training together is taken apart into what the training thread did (on a GPU, its stream): the parts add up
to the step. Each cause claims a share of it: the time that would be gone without the cause. Where a trial was made (a short
run with one option changed, in turns with a run without the change) its gain tells causes apart whose parts look alike. The
largest claim is the first cause; if none is worth removing, training itself is the limit. Confidence is the share of
resampled measurements (steps in blocks, trials by their rounds) in which the same cause comes first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from imagefeed.pipeline.profiler.findings import Cause, Profile, Stall, Step

PARTS = ("read", "decode", "crop", "loading", "hand-over", "forward", "backward", "optimizer", "step", "rest")
INPUT, TRAINING = PARTS[:4], PARTS[4:]
CPU_BOUND = ("read", "decode", "crop", "loading", "forward", "backward", "optimizer", "step")
# A claim below this is no cause; a step's fixed cost is part of every training, and has to be larger.
WORTH, WORTH_FIXED, WORTH_SHARED = 0.05, 0.2, 0.1
RESAMPLED, BLOCKS = 200, 20
# A thread that lets go of the interpreter's lock has it back in 0.07 ms where nobody wants it, in 5 ms from one that computes.
LOCK_HELD_S, OFTEN = 1e-3, 0.2
# Stored pixels of the size that `build` makes by default.
USUAL_PIXELS = 256 * 256
LARGER_BATCH = 4
FIXED = "fixed seconds of a step"  # what does not grow with the batch, the optimizer's too
LATE_STEPS = 24  # fewer do not show that something began late
PIECES, LATE_TIMES = 16, 1.3
EARLY, LATE = 2, 4  # pieces that come before it began, and after, at least
RARE, REGULAR = 0.34, 0.35  # stalls' share of the steps at most; deviation of their distances, divided by the mean
STALL_TIMES = 1.5  # a step that takes this many times the median, and more than the others scatter, is stalled
EXPLAINS = 0.2  # of a part, which a trial must explain to give the part its name


FROM_DISK = 0.02  # of the bytes, from which on storage may be what is slow
IN_MEMORY = {"dataset in memory": True}  # no argument of the loader, but as good as one


@dataclass(frozen=True)
class Remedy:
    """An option of the loader that would remove `cause`, of which `part` of the step speaks."""

    cause: str
    option: str
    changes: dict[str, object]
    part: str


def remedies(settings: dict, evidence: dict[str, float]) -> list[Remedy]:
    """Those options that are not yet as they should be; each is tried where its part of the step is large."""
    if "threads" not in settings:  # another loader
        return []
    cores, cuda = settings["cores"], settings["device"] != "CPU"
    found = []
    if settings["threads"] < cores:
        found.append(Remedy("decode threads", f"--threads {cores}", {"num_threads": cores}, "decode"))
    if settings["prefetch"] < 4:
        found.append(Remedy("prefetch", "--prefetch 4", {"prefetch": 4}, "decode"))
    if cuda and settings["hw_decoder_load"] < 0.05:
        found.append(Remedy("hardware decoder off", "--hw-decoder-load 0.65", {"hw_decoder_load": 0.65}, "decode"))
    if settings["random_resized_crop"] or any(settings["color_jitter"]):
        plain = {"random_resized_crop": False, "color_jitter": (0, 0, 0, 0)}
        named = [("--random-resized-crop", settings["random_resized_crop"]), ("--color-jitter", any(settings["color_jitter"]))]
        option = "no " + ", no ".join(name for name, used in named if used)
        found.append(Remedy("augmentation", option, plain, "decode"))
    elif settings["cache"] == "none" and settings["decoded bytes"] < evidence["memory available bytes"] / 2:
        found.append(Remedy("decode", "--cache host", {"cache": "host"}, "decode"))
    if evidence.get("read bytes a step", 0.0) > FROM_DISK * settings["record bytes a step"]:
        found.append(Remedy("cold page cache", "dataset in memory", IN_MEMORY, "read"))
        if settings["read_ahead"] < 8:
            found.append(Remedy("cold page cache", "--read-ahead 8", {"read_ahead": 8}, "read"))
    larger = LARGER_BATCH * settings["batch_size"]
    if evidence.get("fixed share of a step", 0.0) > WORTH_FIXED and larger <= settings["records"]:
        found.append(Remedy("small batch", f"--batch-size {larger}", {"batch_size": larger}, "forward"))
    return found


def table(steps: Iterable[Step], ours: bool, cuda: bool) -> np.ndarray:
    """(steps, PARTS) seconds. What the host did for a batch is scaled down to what the stream waited, if that is less."""
    rows = []
    for step in steps:
        row = dict.fromkeys(PARTS, 0.0)
        noted = sum(span.seconds for span in step.spans)
        scale = min(1.0, step.wait_s / noted) if noted else 0.0
        for span in step.spans:
            row[span.name] += span.seconds * scale
        row["decode" if ours and cuda else "loading"] += max(step.wait_s - noted * scale, 0.0)
        for name, seconds in step.phases.items():
            row[name] += seconds
        rows.append([row[name] for name in PARTS])
    return np.array(rows).reshape(-1, len(PARTS))


def find_stalls(parts: np.ndarray) -> tuple[Stall, ...]:
    """Late and periodic stalls in (steps, PARTS) seconds."""
    late = late_stall(parts)
    if late:
        return (late,)
    totals = parts.sum(1)
    high = stalled(totals)
    places = np.flatnonzero(high)
    if len(places) < 3 or high.mean() > RARE:
        return ()
    gaps, times = np.diff(places), np.diff(np.cumsum(totals)[places])
    if np.median(gaps) < 2 or min(np.std(gaps) / np.mean(gaps), np.std(times) / np.mean(times)) > REGULAR:
        return ()
    excess = parts[high] - np.median(parts[~high], 0)
    seconds, share = float(np.median(excess.sum(1))), float(excess.sum() / totals.sum())
    return (Stall("periodic", int(places[0]), float(np.median(gaps)), seconds, share, PARTS[int(np.argmax(excess.sum(0)))]),)


def late_stall(parts: np.ndarray) -> Stall | None:
    """Of pieces of the run, each with its median step: whether the last are slower than the first, and from where on."""
    if len(parts) < LATE_STEPS:
        return None
    totals = parts.sum(1)
    pieces = np.array_split(np.arange(len(parts)), PIECES)
    medians = np.array([np.median(totals[piece]) for piece in pieces])
    early, late = np.median(medians[:EARLY]), np.median(medians[-LATE:])
    slow = medians > (early + late) / 2
    if late < LATE_TIMES * early or slow[:EARLY].any() or not slow[-LATE:].all():
        return None
    first = int(pieces[int(np.flatnonzero(~slow)[-1]) + 1][0])
    excess = np.median(parts[first:], 0) - np.median(parts[:first], 0)
    share = float((np.median(totals[first:]) - early) * (len(parts) - first) / totals.sum())
    return Stall("late", first, None, float(late - early), share, PARTS[int(np.argmax(excess))])


def stalled(totals: np.ndarray) -> np.ndarray:
    """(steps,) bool: which are far slower than the median."""
    median = np.median(totals)
    spread = 1.4826 * np.median(np.abs(totals - median))
    return totals > np.maximum(STALL_TIMES * median, median + 6 * spread)


def diagnose(profile: Profile) -> tuple[Cause, ...]:
    """The causes, largest claim first; the last one stands for what is left to training itself."""
    ours, cuda = "threads" in profile.settings, profile.settings["device"] != "CPU"
    parts = table(profile.steps, ours, cuda)
    claims = weigh(profile, parts)
    first = next(iter(claims))
    drawn = np.random.default_rng(0)
    wins = dict.fromkeys(claims, 0)
    for _ in range(RESAMPLED):
        winner = next(iter(weigh(profile, resample(parts, drawn), drawn)))
        wins[winner] = wins.get(winner, 0) + 1
    return tuple(
        Cause(name, float(share), wins[name] / RESAMPLED, "") for name, share in claims.items() if share > 0.01 or name == first
    )


def resample(parts: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    blocks = np.array_split(parts, min(BLOCKS, len(parts)))
    return np.concatenate([blocks[n] for n in drawn.integers(len(blocks), size=len(blocks))])


def weigh(profile: Profile, parts: np.ndarray, drawn: np.random.Generator | None = None) -> dict[str, float]:
    """The claims, largest first, shares of all time; with `drawn`, of series that are resampled too."""
    evidence, settings = profile.evidence, profile.settings

    def series(name: str, default: float) -> float:
        values = profile.series.get(name, ())
        if not values:
            return default
        return float(np.median(drawn.choice(values, len(values)) if drawn is not None else values))

    def rate(name: str) -> float | None:
        if name not in profile.rates:
            return None
        windows = profile.rates[name].windows
        return float(np.median(drawn.choice(windows, len(windows)) if drawn is not None else windows))

    from_disk = min(evidence.get("read bytes a step", 0.0) / max(settings.get("record bytes a step", 1), 1), 1.0)
    # Reads that stall, as of several batches at once from a disk, are storage's.
    stalls = [stall for stall in profile.stalls if stall.stage != "read" or from_disk <= FROM_DISK]
    high = stalled(parts.sum(1)) if stalls and stalls[0].kind == "periodic" else np.zeros(len(parts), bool)
    mean = parts[~high].mean(0)
    usual_s = mean.sum()
    part = dict(zip(PARTS, mean / usual_s, strict=True))
    claims: dict[str, float] = {}

    # Who waits for the interpreter's lock, or for a processor that another program has, waits in every part alike. A program's
    # own threads wait for each other too, so neither others' share nor the waiting alone tells what others cost.
    gain = series("gain of sys.setswitchinterval(1e-4)", 0.0)
    held = lock_held(profile.series)
    claims["interpreter lock"] = max(gain, 0) / (1 + max(gain, 0)) if held else 0.0
    others = min(series("others' CPU", 0.0), series("queued", 0.0))
    free = 1 - max(others, claims["interpreter lock"])
    for stall in stalls:  # a neighbor's coming looks like a late one
        claims[f"{stall.kind} stall"] = stall.share
        if stall.kind == "late":  # as the run goes on: what it takes of the steps since it began
            claims["late stall"] = stall.seconds / float(np.median(parts[stall.first_step :].sum(1))) * free
            part[stall.stage] = max(part[stall.stage] - stall.share, 0.0)

    # Reading: only what came from a disk can be storage's fault.
    from_memory = evidence.get("seconds to read a batch from memory", 0.0) / usual_s
    storage = max(part["read"] - from_memory, 0.0) if from_disk > FROM_DISK else 0.0
    if from_disk > FROM_DISK and not settings.get("check", True):  # nothing touches the bytes before the decoder does
        storage = max(storage, min(part["decode"], (profile.fetch_stall_s or 0.0) / usual_s))
    claims[storage_cause(evidence)] = storage
    claims["checksums and Python of reading"] = min(part["read"], from_memory) * free

    # Decoding: the option whose trial explains the waiting gives it its name.
    # Cropping takes longer than alone where the decoder's threads have the processors: that is the decoder's.
    crop = profile.stage("crop")
    cropping = part["crop"]
    if crop and crop.alone and settings["device"] == "CPU":
        cropping = min(cropping, settings["batch_size"] / crop.alone.median / usual_s)
    waiting = max(part["decode"] - (storage if not settings.get("check", True) else 0.0), 0.0) * free
    waiting += (part["crop"] - cropping) * free
    explained = {
        remedy.cause: series(f"gain of {remedy.option}", 0.0)
        for remedy in remedies(settings, evidence)
        if remedy.part == "decode" and remedy.cause != "decode"
    }
    explained = {cause: max(gain, 0) / (1 + max(gain, 0)) for cause, gain in explained.items()}
    pixels = settings.get("pixels an image", USUAL_PIXELS)
    if pixels > 1.5 * USUAL_PIXELS:
        explained["image size"] = part["decode"] * (1 - USUAL_PIXELS / pixels)
    best = max(explained, key=explained.get, default=None)
    ceiling, loader = rate("training"), rate("loader warm")
    unexplained = sum(part[name] for name in CPU_BOUND)
    if best and explained[best] > EXPLAINS * waiting:
        # A trial shows what the option costs, whatever else goes on.
        claims[best] = max(waiting, explained[best])
        unexplained -= part["decode"]
    elif ceiling and loader and loader > 1.25 * ceiling and not settings["device"] != "CPU":
        claims["shared cores"] = waiting
    else:
        claims["decode"] = waiting
    claims["crop"] = cropping * free
    claims["loader"] = part["loading"] * free

    # Training: what is more than it must be.
    claims["hand-over"] = max(part["hand-over"] - evidence.get("seconds to copy a batch", 0.0) / usual_s, 0.0)
    least = evidence.get("seconds to update, at least", 0.0) / usual_s
    claims["optimizer"] = max(part["optimizer"] - least, 0.0)
    fixed = series(FIXED, 0.0) / usual_s - part["optimizer"] - part["hand-over"] - part["rest"]
    fixed = min(fixed, part["forward"] + part["backward"] + part["step"])
    claims["small batch"] = fixed * free if fixed > WORTH_FIXED else 0.0
    claims["rest of the loop"] = part["rest"]
    if ceiling and "shared cores" not in claims and settings["device"] == "CPU" and "threads" in settings:
        inflated = sum(part[name] for name in TRAINING) - batch_seconds(settings, ceiling) / usual_s
        inflated = (inflated - part["rest"]) * free
        claims["shared cores"] = inflated if inflated > WORTH_SHARED else 0.0
    unexplained -= claims["optimizer"] + storage
    claims["busy neighbor"] = others * max(unexplained, 0.0)
    usual_share = parts[~high].sum() / parts.sum()
    claims = {name: share * (1 if name.endswith("stall") else usual_share) for name, share in claims.items()}
    ranked = dict(sorted(claims.items(), key=lambda claim: -claim[1]))
    left = max(
        sum(part[name] for name in ("forward", "backward", "step"))
        - sum(claims.get(name, 0.0) for name in ("small batch", "busy neighbor", "interpreter lock")),
        0.0,
    )
    if next(iter(ranked.values())) < WORTH:
        return {"training": left} | ranked
    return ranked | {"training": left}


def batch_seconds(settings: dict, rate: float) -> float:
    return settings["batch_size"] / rate


def lock_held(series: dict[str, tuple[float, ...]]) -> bool:
    """Whether the interpreter's lock was often away when it was asked for."""
    latencies = series.get("lock latency s", ())
    return bool(latencies) and float(np.mean(np.array(latencies) > LOCK_HELD_S)) > OFTEN


def storage_cause(evidence: dict[str, float]) -> str:
    """What kind of storage's fault it is, if it is: one that passes once all is in memory, or one that stays."""
    if evidence.get("gone pages", 0.0) > 0.1:
        return "memory pressure"
    fits = evidence.get("dataset bytes", 0.0) < evidence.get("memory available bytes", 0.0)
    return "cold page cache" if fits else "slow disk"
