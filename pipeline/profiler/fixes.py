"""What to do about each cause, as it is typed, and what it will gain."""

import dataclasses

from imagefeed.pipeline.profiler.causes import IN_MEMORY, LARGER_BATCH, USUAL_PIXELS, remedies
from imagefeed.pipeline.profiler.causes import WORTH as CLAIMED
from imagefeed.pipeline.profiler.findings import Cause, Fix, Profile

WORTH = 0.02  # a smaller gain is none
OTHERS = "others' CPU"
FIXED = "A step's fixed cost is shared by more images; the learning rate has to fit."


def explain(profile: Profile, causes: tuple[Cause, ...]) -> tuple[Cause, ...]:
    """The causes, each with its sentence: what the limit is, to follow "the limit is"."""
    return tuple(dataclasses.replace(cause, sentence=sentence(profile, cause.name)) for cause in causes)


def sentence(profile: Profile, cause: str) -> str:
    settings, evidence = profile.settings, profile.evidence
    threads = plural(settings.get("threads", 1), "CPU thread") if settings["device"] == "CPU" else settings["device"]
    if settings.get("threads", 0) < settings["cores"]:
        threads = f"{settings.get('threads')} of {settings['cores']} CPU threads"
    disk = ""
    if evidence.get("disk records/s"):
        disk = f", which gives {evidence['disk bytes/s'] / 1e6:,.0f} MB/s, {evidence['disk records/s']:,.0f} records/s"
    stall = next((stall for stall in profile.stalls if cause == f"{stall.kind} stall"), None)
    if stall:
        where = {"wait": "waiting for data", "loading": "waiting for data", "rest": "between the steps"}.get(
            stall.stage, stall.stage
        )
        if stall.kind == "late":
            return f"{where}, {stall.seconds * 1e3:,.0f} ms a step longer from step {stall.first_step} on"
        return f"a stall of {stall.seconds * 1e3:,.0f} ms every {stall.period:.0f} steps, {where}"
    return {
        "busy neighbor": f"other programs, which have {median(profile, OTHERS):.0%} of the processors",
        "interpreter lock": "Python's lock, which a thread holds: "
        f"{1e3 * median(profile, 'lock latency s'):.1f} ms until training has it back",
        "cold page cache": f"a cold page cache, until an epoch has been read from the disk{disk}",
        "slow disk": f"the disk{disk}, as memory cannot keep the dataset's {size(evidence.get('dataset bytes', 0))}",
        "memory pressure": f"memory: {evidence.get('gone pages', 0):.0%} of what was read has been put out of it again",
        "checksums and Python of reading": "reading from memory in one thread",
        "decode": f"JPEG decode on {threads}",
        "decode threads": f"JPEG decode on {threads}",
        "hardware decoder off": "JPEG decode, without the GPU's decoder",
        "image size": f"JPEG decode of {settings.get('pixels an image', 0) / 1e6:.1f} megapixels an image on {threads}",
        "augmentation": f"the augmentation (rescaling, colors) on {threads}",
        "prefetch": f"too few batches ahead (--prefetch {settings.get('prefetch')})",
        "shared cores": f"the {plural(settings['cores'], 'core')}, which decoding and training share",
        "crop": f"crop, flip and normalization on {threads}",
        "loader": f"the {settings['loader']}",
        "hand-over": "the hand-over of batches to training (copies, conversions)",
        "optimizer": "the optimizer's update",
        "small batch": f"a step's fixed cost, with batches of {settings['batch_size']}",
        "rest of the loop": "what the loop does between the steps",
        "training": "training itself",
    }[cause]


def find_fixes(profile: Profile) -> tuple[Fix, ...]:
    """What removes the first cause first, then by gain; what gains less than 2 % is left out."""
    before = profile.rates["together"].median
    settings, evidence = profile.settings, profile.evidence
    batch = settings["batch_size"]
    step_s = batch / before
    found: list[Fix] = []

    def add(cause: str, option: str, words: str, rate: float, changes: dict[str, object] | None = None) -> None:
        if rate / before - 1 > WORTH:
            found.append(Fix(cause, option, words, rate, rate / before - 1, changes or {}))

    claims = {cause.name: cause.share for cause in profile.causes}
    first = profile.causes[0].name
    if "threads" in settings:
        for remedy in remedies(settings, evidence):
            gains = profile.series.get(f"gain of {remedy.option}")
            if not gains:
                continue
            rate = before * (1 + sorted(gains)[len(gains) // 2])
            if remedy.changes == IN_MEMORY and first in ("memory pressure", "slow disk"):
                add(first, "", f"A faster disk, or memory for the dataset's {size(evidence['dataset bytes'])}.", rate)
            elif remedy.changes == IN_MEMORY:
                files = f"cat {settings['root']}/*.tfrecord > /dev/null"
                add(remedy.cause, files, "Read the dataset into memory first; or a faster disk.", rate, IN_MEMORY)
            elif remedy.cause == "small batch":
                add(remedy.cause, remedy.option, FIXED, rate, remedy.changes)
            elif remedy.cause == "augmentation":
                add(remedy.cause, remedy.option, "Leave it out; what the net learns changes.", rate, remedy.changes)
            elif remedy.option == "--cache host":
                words = f"Decode once: takes {size(settings['decoded bytes'])} of memory; from the second epoch on."
                add(remedy.cause, remedy.option, words, rate, remedy.changes)
            else:
                add(remedy.cause, remedy.option, "Tried for a moment.", rate, remedy.changes)
    if "image size" in claims:
        pixels = settings["pixels an image"]
        waiting_s = sum(span.seconds for step in profile.steps for span in step.spans if span.name == "decode")
        saved_s = waiting_s / len(profile.steps) * (1 - USUAL_PIXELS / pixels)
        rate = batch / (step_s - saved_s)
        if "training" in profile.rates:  # a run's own profile has no ceiling
            rate = min(rate, profile.rates["training"].median)
        add(
            "image size",
            "python -m preprocess build RAW OUT --size 256",
            f"Store smaller images than {pixels / 1e6:.1f} megapixels.",
            rate,
        )
    lock = profile.series.get("gain of sys.setswitchinterval(1e-4)")
    if lock and "interpreter lock" in claims:
        rate = before * (1 + sorted(lock)[len(lock) // 2])
        add("interpreter lock", "sys.setswitchinterval(1e-4)", "Better still: move the thread that computes to a process.", rate)
    for name, words in (
        ("busy neighbor", "Stop the other programs, or give each its own processors (taskset)."),
        ("hand-over", "Convert and copy once, from pinned memory, without waiting (pin_memory, non_blocking=True)."),
        ("optimizer", "Update all parameters in one pass (fused=True)."),
        ("periodic stall", "Do it less often, or in another thread."),
        ("late stall", "Find what begins there: memory, heat, another program."),
        ("rest of the loop", "Do less between the steps, or less often."),
    ):
        if claims.get(name, 0) > CLAIMED:
            add(name, "", words, before / (1 - min(claims[name], 0.95)))
    larger = profile.rates.get(f"training, {LARGER_BATCH} times the batch")
    if larger and "small batch" in claims and not any(fix.cause == "small batch" for fix in found):
        seconds = LARGER_BATCH * batch / larger.median + LARGER_BATCH * profile.data_wait * step_s
        add("small batch", f"--batch-size {LARGER_BATCH * batch}", FIXED, LARGER_BATCH * batch / seconds)
    if settings["loader"] == "DataLoader" and "loader" in claims and "loader warm" in profile.rates:
        workers = settings.get("workers", 0)
        if workers < settings["cores"]:
            rate = min(
                profile.rates["training"].median, profile.rates["loader warm"].median * settings["cores"] / max(workers, 1)
            )
            add("loader", f"num_workers={settings['cores']}", "More processes that load.", rate)
    return tuple(sorted(found, key=lambda fix: (fix.cause != first, -fix.gain)))


def median(profile: Profile, name: str) -> float:
    values = sorted(profile.series.get(name) or (0.0,))
    return values[len(values) // 2]


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
