"""Part "together" of gpu.py: loader and training, cold, warm and with the cache full, beside each alone in the same process."""

import functools

import numpy as np
import torch

from benchmarks.cold import evict
from benchmarks.gpu_work import Part, cores, fixed_batch, net_and_step, rate, repeated
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account

NETS = ("alexnet-owt", "alexnet")
MODE = "default"


def measure(part: Part) -> None:
    manifest = part.data()
    settings = dict((part.earlier("loader").get("best") or {}).get("settings", {})) or {"num_threads": cores()}
    batch_size = 16 if part.small else 1024
    settings.pop("batch_size", None)
    if part.cuda:
        settings |= {"dtype": "bfloat16", "memory_format": "channels_last"}
    part.note("settings", settings | {"batch_size": batch_size, "compiled": MODE if part.cuda else "no"})
    seconds = 0.4 if part.small else 3.0
    for net in NETS[:1] if part.small else NETS:
        _, train = net_and_step(net, len(manifest.classes), part.device, MODE if part.cuda else None, part.size)
        images, labels = fixed_batch(batch_size, len(manifest.classes), part.device, part.size)
        if settings.get("layout") == "NHWC":
            images = images.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        once = functools.partial(train, images, labels)
        synthetic = rate(once, batch_size, seconds, part.device, 2 if part.small else 10)
        part.note(f"{net}: synthetic", synthetic)
        del images, labels, once
        for name, options, cold in (
            ("warm", {}, False),
            ("cold", {}, True),
            ("cache device", {"cache": "device"}, False),
            ("cache host", {"cache": "host"}, False),
        ):
            row = f"{net}: {name}"
            if part.time_for(row, 2 if part.small else 12):
                measured = together(part, manifest, batch_size, settings | options, train, seconds, cold)
                part.note(row, shares(measured, synthetic["images_per_second"]))


def together(
    part: Part, manifest: Manifest, batch_size: int, settings: dict, train, seconds: float, cold: bool
) -> dict[str, object]:
    """The loader alone and then with training, each from its first batch on where it is `cold`, else warmed up. A cache is filled
    first, by an epoch, or as much of one as half of the time that is left allows."""
    found: dict[str, object] = {}
    cached = settings.get("cache", "none") != "none"
    for name, step in (("loader", None), ("together", train)):
        if cold:
            evict(manifest.root)
            ids = manifest.load_index("train")[:1000]
            found["resident before"] = machine.resident_share(manifest, "train", np.arange(len(ids)))
        with ImageLoader(manifest, "train", batch_size, crop_size=part.size, device=part.device, **settings) as loader:
            batches = repeated(loader)
            if cached:
                fill_s, filled = part.left_s / 2, 0
                begin_s = part.left_s
                while filled < len(loader) and begin_s - part.left_s < fill_s:
                    next(batches)
                    filled += 1
                found["filled"] = filled / len(loader)
            account = Account(part.device, loader)

            def both(step=step, account=account, batches=batches) -> None:
                batch = account.fetch(batches)
                if step is not None:
                    step(batch.images, batch.labels, on_phase=account.phase)

            warm_up = 0 if cold else loader.options.prefetch + 2
            found[name] = rate(both, batch_size, seconds, part.device, warm_up)
            account.stop()
            if step is not None:
                steps = account.steps()[warm_up:]
                found["data wait"] = sum(s.wait_s for s in steps) / sum(s.seconds for s in steps)
    return found


def shares(found: dict, synthetic: float) -> dict[str, object]:
    both, alone = found["together"]["images_per_second"], found["loader"]["images_per_second"]
    return found | {"of the smaller": both / min(alone, synthetic), "of synthetic": both / synthetic}
