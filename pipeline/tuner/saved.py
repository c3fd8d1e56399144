"""Settings of the loader that `python -m pipeline tune` found, kept for this machine and dataset, and found again."""

import hashlib
import json
import logging
import os
import platform
from datetime import date
from pathlib import Path

import torch

from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import choose_device
from imagefeed.pipeline.profiler.windows import free_bytes
from imagefeed.pipeline.tuner.tune import BATCH_SIZE, Tuned

VERSION = 1
# The share of the processors that other programs have from which on nothing is kept. With one of two cores taken one thread is
# as good as two; kept, it would be half as fast when the neighbor is gone (0.56 of the best was measured).
TOO_BUSY = 0.25
# What may stand in a file. No "device" among the caches: its pixels are coarser, so it decides what a net learns.
ALLOWED = {
    "num_threads": lambda value: type(value) is int and value >= 1,
    "prefetch": lambda value: type(value) is int and value >= 1,
    "read_ahead": lambda value: type(value) is int and value >= 0,
    "hw_decoder_load": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "cache": lambda value: value in ("none", "host"),
}
log = logging.getLogger("imagefeed")


def tuned_settings(
    manifest: Manifest,
    batch_size: int,
    *,
    split: str | None = None,
    crop_size: int = 224,
    device: torch.device | str = "auto",
    random_resized_crop: bool = False,
    color_jitter: tuple[float, ...] = (0, 0, 0, 0),
) -> dict[str, object]:
    """Arguments of ImageLoader that `tune` found for this machine, dataset and batch; none where it was not run for them.

        settings = tuned_settings(manifest, 128)
        with ImageLoader(manifest, "train", 128, device="auto", **settings) as loader:
            ...

    They decide only what the batches cost, not what they are. `split` None is the training split. A cache that was found to
    pay is left out where there is no longer memory for it.
    """
    looks = {"random_resized_crop": random_resized_crop, "color_jitter": color_jitter}
    return kept(key_of(manifest, split, batch_size, crop_size=crop_size, device=device, **looks))[0]


def kept(key: dict[str, object]) -> tuple[dict[str, object], str]:
    """The settings that were kept under a key, and words that say since when; both empty where there are none.

    A file that cannot be read, or holds anything but settings, is passed over with a warning.
    """
    path = settings_path(key)
    try:
        file = json.loads(path.read_bytes())
        if file["version"] != VERSION or file["key"] != key:
            return {}, ""
        settings, needed = file["settings"], int(file["cache bytes"])
        if not all(ALLOWED[name](value) for name, value in settings.items()):
            raise ValueError("these are no settings")
        since = f"tuned settings of {date.fromisoformat(file['tuned'])} for this machine"
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: corrupt (%r), so its tuned settings are passed over; run python -m pipeline tune again", path, error)
        return {}, ""
    if settings.get("cache") == "host" and needed > free_bytes():
        del settings["cache"]
        since += f", without the cache, whose {needed / 1e9:,.1f} GB are no longer free"
    return settings, since


def keep(key: dict[str, object], tuned: Tuned) -> Path | None:
    """Writes what was found under its key, for `kept`, and returns where; None where other programs had too much of the
    processors for it to hold without them, and then what was kept before stays."""
    if tuned.others > TOO_BUSY:
        return None
    path = settings_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    today = date.today().isoformat()
    file = {"version": VERSION, "tuned": today, "settings": tuned.settings, "cache bytes": tuned.cache_bytes, "key": key}
    write_atomically(path, (json.dumps(file, indent=1) + "\n").encode())
    return path


def key_of(
    manifest: Manifest,
    split: str | None = None,
    batch_size: int | None = None,
    *,
    crop_size: int = 224,
    device: torch.device | str = "auto",
    random_resized_crop: bool = False,
    color_jitter: tuple[float, ...] = (0, 0, 0, 0),
    **_,
) -> dict[str, object]:
    """What settings are good for: the machine, the dataset, and what is made of its images. Options that cost nothing are passed
    over."""
    device = choose_device(device)
    split = split or manifest.train_split
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dataset": manifest.fingerprint,
        "split": split,
        "batch size": batch_size or min(BATCH_SIZE, manifest.split(split).records),
        "crop_size": crop_size,
        "random resized": bool(random_resized_crop),
        "color jitter": any(color_jitter),
    }


def settings_path(key: dict[str, object]) -> Path:
    """Under the user's cache folder (XDG Base Directory Specification 0.8), not in the dataset's: that may be read-only, and used
    by other machines."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    return root / "imagefeed" / "tune" / f"{name}.json"


def in_words(name: str, value: object) -> str:
    """As on the command line: "threads 2", "hw-decoder-load 0.65"."""
    return f"{'threads' if name == 'num_threads' else name.replace('_', '-')} {value}"


def processor() -> str:
    """Its model, as Linux names it, with what tells apart generations of one name."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    parts = [facts.get("model name", platform.machine()), facts.get("cpu family"), facts.get("model"), facts.get("stepping")]
    return " ".join(part for part in parts if part)
