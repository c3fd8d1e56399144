"""The causes in words, the options that would remove each, and what a fix will gain."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imagefeed.dataset.console import plural
from imagefeed.pipeline.graph import PREFETCH
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.profiler.findings import LARGER, LARGER_BATCH, UNSET, Evidence, Fix, Profile, Settings

WORTH = 0.05  # a smaller claim is no cause
WORTH_FIXED = 0.2  # every training has a fixed cost of a step, so its claim must be larger
WORTH_GAIN = 0.02  # a fix that gains less is not listed
FROM_DISK = 0.02  # of the bytes
USUAL_PIXELS = 256 * 256  # that `build` stores by default
TRIED = "Measured in a short trial."
OTHER_DECODER = "Pixels of the decoders differ a little, so decide it before a run begins."
SHARED = "More images share a step's fixed cost; adapt the learning rate."
SHORT_SWITCH = "sys.setswitchinterval(1e-4)"
# What follows "the limit is" for each cause.
CAUSES = {
    "busy neighbor": "other programs, which use {others:.0%} of the processors",
    "CPU quota": "the CPU quota of {quota:g} {quota_cores}, which holds this program back {throttled:.0%} of the time",
    "interpreter lock": "Python's interpreter lock: training waits {lock_ms:.1f} ms for the thread that holds it",
    "cold page cache": "a cold page cache, until an epoch has been read from the disk{disk}",
    "slow disk": "the disk{disk}; the dataset's {dataset} do not fit in memory",
    "store": "storage: {request_ms:,.0f} ms a request, {in_flight:.0f} in flight, {store_mb:,.0f} MB/s{retried}",
    "memory pressure": "memory: {evicted:.0%} of the pages read have been evicted again",
    "checksums and Python of reading": "reading from memory in one thread",
    "decode": "JPEG decode on {threads}{uncached}",
    "decode threads": "JPEG decode on {threads}",
    "DALI's decoder": "JPEG decode by DALI on {threads}",
    "hardware decoder off": "JPEG decode without the GPU's hardware decoder",
    "image size": "JPEG decode of {megapixels:.1f} megapixels per image on {threads}",
    "augmentation": "augmentation (rescaling, colors) on {threads}",
    "prefetch": "too few batches prefetched (--prefetch {prefetch})",
    "shared cores": "the {cores}, which decoding and training share",
    "crop": "crop, flip and normalization on {threads}",
    "upload": "the copy of crops to the device",
    "loader": "the {loader}",
    "host-to-device copy": "the host-to-device copy of batches, with their conversions",
    "optimizer": "the optimizer's update",
    "small batch": "a step's fixed cost, with batches of {batch_size}",
    "rest of the loop": "what the loop does between the steps",
    "periodic stall": "a stall of {stall_ms:,.0f} ms every {period:.0f} steps, {where}",
    "late stall": "{where}, {stall_ms:,.0f} ms a step longer from step {first_step} on",
    "training": "training itself",
}
# What to do against a cause that no option of the loader removes.
ADVICE = {
    "busy neighbor": "Stop the other programs, or give each its own processors (taskset).",
    "CPU quota": "Raise the quota (docker --cpus, Kubernetes resources.limits.cpu), or run no more threads than it has cores.",
    "host-to-device copy": "Convert and copy once, from pinned memory, without waiting (pin_memory, non_blocking=True).",
    "optimizer": "Update all parameters in one pass (fused=True).",
    "rest of the loop": "Do less between the steps, or do it less often.",
    "periodic stall": "Do it less often, or in another thread.",
    "store": "Move the dataset nearer, or the machine; a store gives each machine only so much.",
    "late stall": "Find what begins there: memory, heat, another program.",
}
PLACES = {"wait": "waiting for data", "loading": "waiting for data", "rest": "between the steps", "copy": "copying to the device"}


@dataclass(frozen=True)
class Remedy:
    """An option of the loader against `cause`; it is tried if `part` takes much of a step. `changes` are the loader's arguments;
    without any the trial reads the dataset from memory."""

    cause: str
    option: str
    part: str
    changes: dict[str, Any] = field(default_factory=dict)
    advice: str = TRIED


IN_MEMORY = Remedy("cold page cache", "dataset in memory", "read")


def remedies(settings: Settings, evidence: Evidence) -> list[Remedy]:
    """The options that are not yet as they should be."""
    if not settings.ours:
        return []
    found = []

    def option(cause: str, name: str, value: object, part: str = "decode", advice: str = TRIED) -> None:
        found.append(Remedy(cause, f"{OPTIONS[name].flag} {value}", part, {name: value}, advice))

    if settings.threads < settings.cores:
        option("decode threads", "num_threads", settings.cores)
    if settings.prefetch < (PREFETCH[settings.decoder] if settings.cuda else 2):
        option("prefetch", "prefetch", 4)
    if settings.decoder == "dali" and not settings.cuda and settings.cache != "device":
        option("DALI's decoder", "decoder", "native")
    if settings.cuda and settings.cache == "none":
        for other in {"dali": ("native", "both"), "native": ("both",)}.get(settings.decoder, ()):
            option("decode", "decoder", other, advice=OTHER_DECODER)
    if settings.cuda and settings.decoder != "native" and settings.hw_decoder_load < 0.05:
        option("hardware decoder off", "hw_decoder_load", 0.65)
    plain = {"random_resized_crop": False, "color_jitter": (0, 0, 0, 0)}
    used = [f"no {OPTIONS[name].flag}" for name in plain if np.any(getattr(settings, name))]
    decoded_bytes = 3 * settings.pixels_per_image * settings.records  # RGB
    if used:
        words = "Leave it out; this changes what the net learns."
        found.append(Remedy("augmentation", ", ".join(used), "decode", plain, words))
    cacheable = settings.decoder == "native" or not used  # DALI makes only plain crops from a cache
    if settings.cache == "none" and cacheable and decoded_bytes < evidence.available_bytes / 2:
        words = f"Decode once: takes {size(decoded_bytes)} of memory, and gains from the second epoch on."
        option("decode", "cache", "host", advice=words)
    if from_disk(settings, evidence):
        found.append(IN_MEMORY)
        if settings.read_ahead < 8:
            option("cold page cache", "read_ahead", 8, "read")
    larger = LARGER_BATCH * settings.batch_size
    if (evidence.fixed_share or 0) > WORTH_FIXED and larger <= settings.records:
        option("small batch", "batch_size", larger, "forward", SHARED)
    return found


def from_disk(settings: Settings, evidence: Evidence) -> bool:
    """Whether an ImageLoader's bytes came from a disk, so that storage can be what is slow."""
    return (
        settings.ours
        and not from_store(evidence)
        and (evidence.read_bytes_per_step or 0) > FROM_DISK * settings.record_bytes_per_step
    )


def from_store(evidence: Evidence) -> bool:
    """Whether an ImageLoader asked a store for its records."""
    return evidence.store_requests_per_step is not None


def sentence(profile: Profile, cause: str) -> str:
    """What the limit is, to follow "the limit is"."""
    settings, evidence = profile.settings, profile.evidence
    threads = plural(settings.threads or 1, "CPU thread")
    if settings.ours and settings.threads < settings.cores:
        threads = f"{settings.threads} of {settings.cores} CPU threads"
    if settings.cuda and not on_cores(settings, evidence):
        threads = settings.device + ("" if settings.hardware_decoder is not False else ", without its hardware decoder")
    facts = vars(settings) | {
        "threads": threads,
        "cores": plural(settings.cores, "core"),
        "others": high_median(evidence.others_share),
        "quota": evidence.cpu_quota or 0,
        "quota_cores": "core" if evidence.cpu_quota == 1 else "cores",
        "throttled": evidence.throttled_share or 0,
        "lock_ms": 1e3 * high_median(evidence.lock_latency_s),
        "disk": "",
        "uncached": "" if settings.cache in (UNSET, "none") else ", of images that the cache does not hold",
        "dataset": size(evidence.dataset_bytes or 0),
        "evicted": evidence.evicted_share or 0,
        "megapixels": (settings.pixels_per_image or 0) / 1e6,
    }
    if from_store(evidence):
        facts |= {"request_ms": 1e3 * evidence.store_request_s, "in_flight": evidence.store_in_flight}
        facts |= {"store_mb": evidence.store_bytes_per_s / 1e6, "retried": ""}
        if evidence.store_retries:
            facts["retried"] = f", {plural(int(evidence.store_retries), 'request')} repeated"
    if evidence.disk_records_per_s:
        facts["disk"] = f" at {evidence.disk_bytes_per_s / 1e6:,.0f} MB/s, {evidence.disk_records_per_s:,.0f} records/s"
    for stall in profile.stalls:
        if cause == f"{stall.kind} stall":
            facts |= {"period": stall.period, "first_step": stall.first_step, "stall_ms": 1e3 * stall.seconds}
            facts["where"] = PLACES.get(stall.stage, stall.stage)
    return CAUSES[cause].format(**facts)


def on_cores(settings: Settings, evidence: Evidence) -> bool:
    """Whether the CPU's cores are the decoder in use, or the slower one of the two."""
    if settings.decoder != "both":
        return settings.decoder == "native"
    if not evidence.cores_images_per_s:
        return False
    share = settings.native_share
    return evidence.cores_images_per_s * (1 - share) < evidence.dali_images_per_s * share


def find_fixes(profile: Profile) -> tuple[Fix, ...]:
    """The fixes of the first cause, then the others, each by its gain."""
    settings, evidence, rates = profile.settings, profile.evidence, profile.rates
    before, batch = rates["together"].median, settings.batch_size
    claims = {cause.name: cause.share for cause in profile.causes}
    first = profile.causes[0].name
    found: list[Fix] = []

    def add(cause: str, option: str, words: str, rate: float, changes: dict[str, object] | None = None) -> None:
        if rate / before - 1 > WORTH_GAIN:
            found.append(Fix(cause, option, words, rate, rate / before - 1, changes or {}))

    def predicted(option: str) -> float:
        return before * (1 + high_median(profile.gains[option]))

    for remedy in remedies(settings, evidence):
        if remedy.option not in profile.gains:
            continue
        rate = predicted(remedy.option)
        if remedy is not IN_MEMORY:
            add(remedy.cause, remedy.option, remedy.advice, rate, remedy.changes)
        elif first in ("memory pressure", "slow disk"):
            add(first, "", f"A faster disk, or memory for the dataset's {size(evidence.dataset_bytes)}.", rate)
        else:
            files = f"cat {settings.root}/*.tfrecord > /dev/null"
            add(remedy.cause, files, "Read the dataset into memory first, or use a faster disk.", rate)
    if claims.get("store", 0) > WORTH:
        rate = before / (1 - min(claims["store"], 0.95))
        if settings.shuffle == "global":
            words = "Reads hundreds of records by a request; this changes the order of training."
            add("store", "--shuffle blocks", words, rate, {"shuffle": "blocks"})
        if settings.cache_dir is UNSET:
            words = f"Keep the dataset's {size(evidence.dataset_bytes or 0)} on a local disk; gains from the second epoch on."
            add("store", "--cache-dir FOLDER", words, rate)
    if "image size" in claims:
        pixels = settings.pixels_per_image
        waiting_s = statistics.fmean(sum(span.seconds for span in step.spans if span.name == "decode") for step in profile.steps)
        rate = batch / (batch / before - waiting_s * (1 - USUAL_PIXELS / pixels))
        if "training" in rates:  # a training run's own profile has no ceiling
            rate = min(rate, rates["training"].median)
        words = f"Store smaller images than {pixels / 1e6:.1f} megapixels."
        add("image size", "imagefeed build RAW OUT --size 256", words, rate)
    if SHORT_SWITCH in profile.gains and "interpreter lock" in claims:
        words = "Better still: move the thread that computes to a process."
        add("interpreter lock", SHORT_SWITCH, words, predicted(SHORT_SWITCH))
    for name, advice in ADVICE.items():
        if claims.get(name, 0) > WORTH:
            add(name, "", advice, before / (1 - min(claims[name], 0.95)))
    fits = settings.records is UNSET or LARGER_BATCH * batch <= settings.records
    if LARGER in rates and "small batch" in claims and fits and not any(fix.cause == "small batch" for fix in found):
        seconds = batch / rates[LARGER].median + profile.data_wait * batch / before
        add("small batch", f"--batch-size {LARGER_BATCH * batch}", SHARED, batch / seconds)
    workers = settings.workers or 0
    if settings.loader == "DataLoader" and "loader" in claims and "loader warm" in rates and workers < settings.cores:
        rate = min(rates["training"].median, rates["loader warm"].median * settings.cores / max(workers, 1))
        add("loader", f"num_workers={settings.cores}", "More processes that load.", rate)
    return tuple(sorted(found, key=lambda fix: (fix.cause != first, -fix.gain)))


def high_median(values: tuple[float, ...]) -> float:
    return statistics.median_high(values) if values else 0.0


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
