"""Tells the stages of a run apart, names the causes of lost time, and says how sure each is.

A step of loader and training together is split into what the training thread did (on a GPU, its stream): the parts add up to
the step. Each cause claims a share of it: the time that would be gone without the cause. Where parts look alike, trials tell
causes apart: short runs with one option changed, in turns with runs without the change. The largest claim is the first cause; if
none is worth removing, training itself is the limit. Confidence is the share of resampled measurements (steps in blocks, trials
by their rounds) in which the same cause comes first.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from imagefeed.dataset.console import plural
from imagefeed.pipeline.cache import RGB
from imagefeed.pipeline.profiler import fixes
from imagefeed.pipeline.profiler.findings import STAGES, Cause, Evidence, Profile, Samples, Settings, Stage, Stall, Step

PARTS = tuple(name for name in STAGES if name != "checksum")  # a checksum is a part of reading
TRAINING = tuple(name for name in PARTS if STAGES[name][0] == "training")
COMPUTING = ("forward", "backward", "step")
CPU_BOUND = ("read", "decode", "crop", "loading", *COMPUTING, "optimizer")
WORTH_SHARED = 0.1  # as WORTH, of cores that loader and training share
RESAMPLED, BLOCKS = 200, 20
# A thread that releases the interpreter's lock has it back in 0.07 ms if nobody wants it, in 5 ms if another thread computes.
LOCK_HELD_S, OFTEN = 1e-3, 0.2
LATE_STEPS = 24  # fewer do not show that a slowdown began late
PIECES, LATE_TIMES = 16, 1.3
EARLY, LATE = 2, 4  # pieces before it began, and after it, at least
RARE, REGULAR = 0.34, 0.35  # stalls: at most this share of the steps; deviation of their distances, divided by the mean
STALL_TIMES = 1.5  # a step is stalled if it takes this many times the median, and stands out from the scatter
EXPLAINS = 0.2  # of a part: less than this, and a trial's option does not give the part its name
AUGMENTED = 0.5  # the same for augmentation, without which the images are still decoded
LITTLE = 0.02  # of a step: a smaller rest of an ImageLoader's time is not shown
NOT_READY, NOT_READY_S = 0.05, 5e-4  # of a step, and seconds: who waits longer for a batch found the queue empty
EVICTED = 0.1  # of the pages read: memory is short


def table(steps: Iterable[Step], unnoted: str) -> np.ndarray:
    """(steps, PARTS) seconds. The host's work on a batch is scaled down to the time the stream waited, if that is less; what the
    stream waited beyond that is of the stage `unnoted` (Settings)."""
    rows = []
    for step in steps:
        row = dict.fromkeys(PARTS, 0.0)
        noted = sum(span.seconds for span in step.spans)
        scale = min(1.0, step.wait_s / noted) if noted else 0.0
        for span in step.spans:
            row[span.name] += span.seconds * scale
        row[unnoted] += max(step.wait_s - noted * scale, 0.0)
        for name, seconds in step.phases.items():
            row[name] += seconds
        rows.append([row[name] for name in PARTS])
    return np.array(rows).reshape(-1, len(PARTS))


def stages_of(profile: Profile, alone: tuple[Step, ...], measured: dict[str, Samples]) -> tuple[Stage, ...]:
    """Each stage alone (training from the steps `alone` on one batch, the input side as `measured`), in place, and its limit."""
    steps, settings, evidence = profile.steps, profile.settings, profile.evidence
    images = settings.batch_size
    parts = dict(zip(PARTS, table(steps, settings.unnoted).T, strict=True))
    ceiling = dict(zip(PARTS, table(alone, "loading").T, strict=True))
    total_s = sum(step.seconds for step in steps)
    rate = images * len(steps) / total_s
    limits = limits_by_stage(settings, evidence) if evidence.memory_bytes_per_s else {}
    found = []
    for name, (side, _) in STAGES.items():
        seconds = parts.get(name, np.zeros(len(steps)))
        rates = measured.get(name)
        if side == "training" and ceiling[name].sum() > 0:
            each = np.array_split(ceiling[name], min(5, len(alone)))
            rates = Samples(tuple(images / max(float(np.mean(part)), 1e-9) for part in each))
        if rates is None and seconds.sum() <= (LITTLE * total_s if settings.ours and name == "loading" else 0.0):
            continue
        p50_s, p95_s, p99_s = np.percentile(seconds, (50, 95, 99)).tolist()
        busy, empty = float(seconds.sum() / total_s), None
        if name in ("decode", "loading"):
            enough_s = max(NOT_READY * np.median([step.seconds for step in steps]), NOT_READY_S)
            empty = float(np.mean(seconds > enough_s))
        threads_crop = name == "crop" and (settings.decoder == "native" or not seconds.any())
        if rates and (name == "decode" or threads_crop):  # threads of their own are busy; the training thread only waits
            busy = min(rate / rates.median, 1.0)
        if rates and name == "checksum":  # a part of reading
            busy = rate / rates.median
            p50_s = p95_s = p99_s = images / rates.median
        limit, limit_name = limits.get(name, (None, ""))
        found.append(Stage(name, side, rates, p50_s, p95_s, p99_s, busy, empty, limit, limit_name))
    return tuple(found)


def limits_by_stage(settings: Settings, evidence: Evidence) -> dict[str, tuple[float, str]]:
    """The most images/s that the machine could do, and what sets the limit."""
    images = settings.batch_size
    found = {"copy": (images / evidence.copy_s, "copy bandwidth" if settings.cuda else "memory bandwidth")}
    if evidence.update_s:
        found["optimizer"] = (images / evidence.update_s, "memory bandwidth")
    for name, flop in (("forward", evidence.forward_flop), ("backward", evidence.backward_flop)):
        if flop:
            found[name] = (evidence.matrix_flop_per_s / flop, "matrix products")
    if evidence.record_bytes is None:  # another loader
        return found
    found["read"] = (evidence.memory_bytes_per_s / evidence.record_bytes, "memory bandwidth")
    if fixes.from_disk(settings, evidence) and evidence.disk_records_per_s:
        found["read"] = (evidence.disk_records_per_s, "disk")
    if settings.cuda and evidence.copy_bytes_per_s:
        crop_bytes = RGB * settings.crop_size**2
        found["upload"] = (evidence.copy_bytes_per_s / crop_bytes, "copy bandwidth")
    if not settings.cuda:
        (decoder, rate), *_ = decoder_limits(settings, evidence).items()
        found["decode"] = (rate, f"{decoder}, {plural(settings.cores, 'core')}")
        found["crop"] = (images / evidence.copy_s, "memory bandwidth")
    return found


def decoder_limits(settings: Settings, evidence: Evidence) -> dict[str, float]:
    """Images/s of the decoder in use, on all cores, then of the other one."""
    found = [("libjpeg-turbo", evidence.decode_images_per_s), ("imagefeed's decoder", evidence.native_images_per_s)]
    return {name: rate * settings.cores for name, rate in found[:: -1 if settings.decoder == "native" else 1] if rate}


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
    """Whether the last pieces of the run, by their median steps, are slower than the first, and from which step on."""
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


def explain(profile: Profile) -> Profile:
    """The profile with its causes, largest claim first, and with the fixes."""
    parts = table(profile.steps, profile.settings.unnoted)
    claims = weigh(profile, parts)
    first = next(iter(claims))
    drawn, winners = np.random.default_rng(0), []
    blocks = np.array_split(parts, min(BLOCKS, len(parts)))
    for _ in range(RESAMPLED):
        again = np.concatenate([blocks[n] for n in drawn.integers(len(blocks), size=len(blocks))])
        winners.append(next(iter(weigh(profile, again, drawn))))
    causes = tuple(
        Cause(name, float(share), winners.count(name) / RESAMPLED, fixes.sentence(profile, name))
        for name, share in claims.items()
        if share > 0.01 or name == first
    )
    profile = replace(profile, causes=causes)
    return replace(profile, fixes=fixes.find_fixes(profile))


def weigh(profile: Profile, parts: np.ndarray, drawn: np.random.Generator | None = None) -> dict[str, float]:
    """The claims, largest first, as shares of all time; with `drawn`, the samples are resampled too."""
    evidence, settings = profile.evidence, profile.settings

    def middle(values: tuple[float, ...]) -> float:
        if not values:
            return 0.0
        return float(np.median(drawn.choice(values, len(values)) if drawn is not None else values))

    def saved(option: str) -> float:
        gain = max(middle(profile.gains.get(option, ())), 0.0)
        return gain / (1 + gain)

    stored = fixes.from_disk(settings, evidence) or fixes.from_store(evidence)
    # Reads that stall, as when several batches at once come from a disk, are storage's.
    stalls = [stall for stall in profile.stalls if stall.stage != "read" or not stored]
    high = stalled(parts.sum(1)) if stalls and stalls[0].kind == "periodic" else np.zeros(len(parts), bool)
    mean = parts[~high].mean(0)
    usual_s = mean.sum()
    part = dict(zip(PARTS, mean / usual_s, strict=True))

    # Waiting for the interpreter's lock, or for a processor that another program has, lengthens every part alike. A program's
    # own threads wait for each other too, so neither the others' share nor the waiting alone says what others cost.
    lock = saved(fixes.SHORT_SWITCH)
    claims = {"interpreter lock": lock if lock_held(evidence) else 0.0}
    held = (evidence.throttled_share or 0) if evidence.cpu_quota else 0.0  # a quota makes threads wait as a neighbor does
    others = max(min(middle(evidence.others_share), middle(evidence.queued_share)) - held, 0.0)
    free = 1 - max(others + held, claims["interpreter lock"])
    for stall in stalls:
        claims[f"{stall.kind} stall"] = stall.share
        if stall.kind == "late":  # a neighbor that arrives looks like one; what it takes of the steps since it began
            claims["late stall"] = stall.seconds / float(np.median(parts[stall.first_step :].sum(1))) * free
            part[stall.stage] = max(part[stall.stage] - stall.share, 0.0)

    from_memory = (evidence.read_s or 0) / usual_s
    unchecked = settings.verify_checksums is False  # then nothing touches the bytes before the decoder does
    storage = 0.0
    if stored:
        decoding = min(part["decode"], (profile.stalls_s[1] or 0.0) / usual_s) if unchecked else 0.0
        storage = max(part["read"] - from_memory, decoding, 0.0)
    claims[storage_cause(evidence)] = storage
    claims["checksums and Python of reading"] = min(part["read"], from_memory) * free

    # A crop that takes longer than alone waits for processors that the decoder's threads have: that time is decoding's.
    crop, cropping = profile.stage("crop"), part["crop"]
    if crop and crop.alone and not settings.cuda:
        cropping = min(cropping, settings.batch_size / crop.alone.median / usual_s)
    waiting = (max(part["decode"] - (storage if unchecked else 0.0), 0.0) + part["crop"] - cropping) * free
    tried = [remedy for remedy in fixes.remedies(settings, evidence) if remedy.part == "decode" and remedy.cause != "decode"]
    explained = {remedy.cause: saved(remedy.option) for remedy in tried}
    pixels = settings.pixels_per_image or fixes.USUAL_PIXELS
    if pixels > 1.5 * fixes.USUAL_PIXELS:
        explained["image size"] = part["decode"] * (1 - fixes.USUAL_PIXELS / pixels)
    best = max(explained, key=explained.__getitem__, default=None)
    ceiling, loader = (middle(profile.rates[n].windows) if n in profile.rates else None for n in ("training", "loader warm"))
    unexplained = sum(part[name] for name in CPU_BOUND)
    enough = (AUGMENTED if best == "augmentation" else EXPLAINS) * waiting
    if best and explained[best] > enough:  # a trial shows what the option costs, whatever else goes on
        claims[best] = max(waiting, explained[best])
        unexplained -= part["decode"]
    elif ceiling and loader and loader > 1.25 * ceiling and not settings.cuda:
        claims["shared cores"] = waiting
    else:
        claims["decode"] = waiting
    claims["crop"] = cropping * free
    claims["upload"] = part["upload"] * free
    claims["loader"] = part["loading"] * free

    claims |= training_claims(profile, part, usual_s, middle(evidence.fixed_s), free)
    if ceiling and "shared cores" not in claims and not settings.cuda and settings.ours:
        inflated = sum(part[name] for name in TRAINING) - settings.batch_size / ceiling / usual_s - part["rest"]
        # The cores that training lacks are decoding's; if decoding alone is the slower of the two, that is what there is to gain.
        name = "decode" if loader and loader < ceiling and "decode" in claims else "shared cores"
        claims[name] = claims.get(name, 0.0) + (inflated * free if inflated * free > WORTH_SHARED else 0.0)
    unexplained = max(unexplained - claims["optimizer"] - storage, 0.0)
    claims |= {"busy neighbor": others * unexplained, "CPU quota": held * unexplained}
    usual_share = parts[~high].sum() / parts.sum()
    return ranked({name: share * (1 if name.endswith("stall") else usual_share) for name, share in claims.items()}, part)


def ranked(claims: dict[str, float], part: dict[str, float]) -> dict[str, float]:
    """The claims, largest first; what computing takes beyond them is training's, first if no other claim is worth naming."""
    in_order = dict(sorted(claims.items(), key=lambda claim: -claim[1]))
    taken = sum(claims[name] for name in ("small batch", "busy neighbor", "CPU quota", "interpreter lock"))
    left = {"training": max(sum(part[name] for name in COMPUTING) - taken, 0.0)}
    return left | in_order if next(iter(in_order.values())) < fixes.WORTH else in_order | left


def training_claims(profile: Profile, part: dict[str, float], usual_s: float, fixed_s: float, free: float) -> dict[str, float]:
    """What each part of training takes beyond the least that it must."""
    evidence = profile.evidence
    fixed = fixed_s / usual_s - part["optimizer"] - part["copy"] - part["rest"]
    fixed = min(fixed, sum(part[name] for name in COMPUTING))
    return {
        "host-to-device copy": max(part["copy"] - (evidence.copy_s or 0) / usual_s, 0.0),
        "optimizer": max(part["optimizer"] - (evidence.update_s or 0) / usual_s, 0.0),
        "small batch": fixed * free if fixed > fixes.WORTH_FIXED else 0.0,
        "rest of the loop": part["rest"],
    }


def lock_held(evidence: Evidence) -> bool:
    return np.count_nonzero(np.array(evidence.lock_latency_s) > LOCK_HELD_S) > OFTEN * len(evidence.lock_latency_s)


def storage_cause(evidence: Evidence) -> str:
    """Which fault of storage it would be: one that passes once the dataset is in memory, or one that stays."""
    if fixes.from_store(evidence):
        return "store"
    if (evidence.evicted_share or 0) > EVICTED:
        return "memory pressure"
    return "cold page cache" if (evidence.dataset_bytes or 0) < (evidence.available_bytes or 0) else "slow disk"
