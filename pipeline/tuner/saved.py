"""What is timed once for a machine: the loader settings that `imagefeed tune` saves for a dataset, a net's arrangement, and
whether its steps are faster as CUDA graphs."""

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

from imagefeed.codec.cores import usable_cores
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.arrangement import Arrangement, fastest, seconds_on_gpu
from imagefeed.model.graphed import StepForm
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.profiler.windows import free_bytes
from imagefeed.pipeline.tuner.search import Setting
from imagefeed.pipeline.tuner.tune import Tuned

VERSION = 2
# If other programs take a larger share of the processors, nothing is saved. With one of two cores taken, one thread is as good as
# two, but has half the speed when the neighbor is gone (0.56 of the best was measured).
TOO_BUSY = 0.25
NUMBERS = ("cpu family", "model", "stepping")  # tell generations of one name apart
log = logging.getLogger("imagefeed")
Choice = TypeVar("Choice", Arrangement, StepForm)  # named tuples of bools


def tuned_settings(
    manifest: Manifest, batch_size: int, *, split: str | None = None, device: torch.device | str = "auto", **images
) -> dict[str, object]:
    """Further arguments for `ImageLoader(manifest, split, batch_size)` that `tune` found for this machine, dataset and batch;
    empty if it was not run for them.

    They change only the cost of the batches. `split` None is the training split; `images` are further arguments of ImageLoader. A
    cache is left out if there is no longer enough memory for it.
    """
    return load(key_of(manifest, split, batch_size, device=device, **images))[0]


def load(key: dict[str, object]) -> tuple[dict[str, object], str]:
    """The settings saved under a key, and words that say since when; both empty if there are none.

    Warns about a file that cannot be read or holds anything else, and ignores it.
    """
    try:
        path = settings_path(key)
        file = json.loads(path.read_bytes())
        if file["version"] != VERSION or file["key"] != key:
            return {}, ""
        settings, needed = file["settings"], int(file["cache bytes"])
        for name, value in settings.items():
            # The cache on the device decides pixels, not only costs.
            if name not in (*Setting._fields, "cache") or not OPTIONS[name].kind.valid(value) or value == "device":
                raise ValueError(f"{name} {value} is not a setting")
        since = f"tuned settings of {date.fromisoformat(file['tuned'])} for this machine"
    except (UserError, FileNotFoundError, NotADirectoryError, PermissionError):  # a user without a folder for them has none
        return {}, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: corrupt (%r), so its tuned settings are ignored; run imagefeed tune again", path, error)
        return {}, ""
    if settings.get("cache") == "host" and needed > free_bytes():
        del settings["cache"]
        since += f", without the cache: its {needed / 1e9:,.1f} GB are no longer free"
    return settings, since


def save(key: dict[str, object], tuned: Tuned) -> Path | None:
    """Saves settings under their key and returns the file; None, without changing it, if other programs took too much of the
    processors to trust them. Raises UserError if there is no folder for it."""
    if tuned.others > TOO_BUSY:
        return None
    path = settings_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = str(error.strerror).lower()
        raise UserError(f"{path.parent}: {reason}; set XDG_CACHE_HOME to a folder that can be written to") from None
    today = date.today().isoformat()
    file = {"version": VERSION, "tuned": today, "settings": tuned.settings, "cache bytes": tuned.cache_bytes, "key": key}
    write_atomically(path, (json.dumps(file, indent=1) + "\n").encode())
    return path


def fastest_arrangement(net: torch.nn.Module, name: str, crop_size: int, precision: str, device: torch.device) -> Arrangement:
    """How net `name` is fastest on this GPU: as timed before with these libraries, or else timed now, in seconds, and saved."""
    key = gpu_key(name, crop_size, precision, device)
    return timed_once(key, Arrangement, lambda: fastest(net, lambda way: seconds_on_gpu(net, way, precision, crop_size)))


def gpu_key(name: str, crop_size: int, precision: str, device: torch.device) -> dict[str, object]:
    """What the speed of net `name` depends on: the GPU, its libraries, and what it computes."""
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "driver": torch.version.cuda}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"net": name, "gpu": gpu, "crop_size": crop_size, "precision": precision, **versions}


def timed_once(key: dict[str, object], kind: type[Choice], time_all: Callable[[], Choice]) -> Choice:
    """The choice saved under a key; or else what `time_all` returns, which is saved if there is a folder for it."""
    path, name = None, kind.__name__.lower()
    try:
        path = settings_path(key)
        file = json.loads(path.read_bytes())
        if file["version"] == VERSION and file["key"] == key:
            found = kind(**file[name])
            if any(type(value) is not bool for value in found):
                raise ValueError(f"{file[name]} is no {name}")
            return found
    except (UserError, FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: corrupt (%r), so the net is timed again", path, error)
    found = time_all()
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = {"version": VERSION, "tuned": date.today().isoformat(), name: found._asdict(), "key": key}
            write_atomically(path, (json.dumps(file, indent=1) + "\n").encode())
    return found


def key_of(
    manifest: Manifest,
    split: str | None = None,
    batch_size: int = OPTIONS["batch_size"].default,
    *,
    crop_size: int = OPTIONS["crop_size"].default,
    device: torch.device | str = "auto",
    random_resized_crop: bool = False,
    color_jitter: tuple[float, ...] = (0, 0, 0, 0),
    auto_augment: str = "none",
    **_,
) -> dict[str, object]:
    """What settings depend on: machine, dataset, and what is done to its images. Ignores options that cost nothing."""
    device = choose_device(device)
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dataset": manifest.fingerprint,
        "split": split or manifest.train_split,
        "batch_size": batch_size,
        "crop_size": crop_size,
        "random_resized_crop": bool(random_resized_crop),
        "color_jitter": any(color_jitter),
    } | ({} if auto_augment == "none" else {"auto_augment": auto_augment})  # as saved before there was one


def settings_path(key: dict[str, object]) -> Path:
    """In the user's cache folder (XDG Base Directory Specification 0.8): the dataset may be read-only, or shared by machines.

    Raises UserError if the user has none, as in containers without HOME whose user has no entry in /etc/passwd.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    except RuntimeError:
        raise UserError("this user has no home folder; set XDG_CACHE_HOME to a folder for tuned settings") from None
    return root / "imagefeed" / "tune" / f"{name}.json"


def in_words(name: str, value: object) -> str:
    """As on the command line: "threads 2", "hw-decoder-load 0.65"."""
    return f"{OPTIONS[name].flag[2:]} {value}"


def processor() -> str:
    """Its model, as Linux names it."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return " ".join([facts.get("model name", platform.machine()), *(facts[name] for name in NUMBERS if facts.get(name))])
