"""How much of the loader's rate and of training's is left when both run together: cold, warm, and with a full cache?

    python -m benchmarks.together DATASET [--device cuda] [--seconds 60]     # results under "together" or "together-cuda"

For each net: steps on one fixed batch ("synthetic"), then for each way of feeding the loader alone and the loader with training.
The loader has the settings that benchmarks.tune found best on this machine. The learning rate is 0; only time counts.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks import harness
from benchmarks.data import endless, evict
from benchmarks.train import fixed_batch, step_of
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.nets import build_net
from imagefeed.model.step import keep_memory
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account

NETS = ("alexnet-owt", "alexnet")
# Caches are filled by the decoder that suits them.
CACHES = {f"cache {kind}": {"cache": kind, "decoder": "auto"} for kind in ("device", "host")}
WAYS = {"warm": {}, "cache device": CACHES["cache device"], "cold": {}, "cache host": CACHES["cache host"]}
EXAMINED = 1000  # records, to see how much of a cold dataset is in memory
NEEDS_S = 12  # for a row


def measure(loader: ImageLoader, step: Callable | None, window_s: float, fill_s: float, cold: bool) -> dict[str, float]:
    """Rate of the loader with `step`, or alone, and what a step waits and reads; fills a cache first, for `fill_s` at most."""
    batches, found, filled = endless(loader), {}, 0
    if loader.arguments["cache"] != "none":
        end_s = harness.spent_s() + fill_s
        while filled < len(loader) and harness.spent_s() < end_s:
            next(batches)
            filled += 1
        found["filled"] = filled / len(loader)
    account = Account(loader.device, loader)

    def both() -> None:
        batch = account.fetch(batches)
        if step is not None:
            step(batch.images, batch.labels, account.phase)

    batch_size, warm_up = loader.plan.batch_size, 0 if cold else loader.options.prefetch + 2
    found["together" if step else "loader"] = harness.window_rate(both, batch_size, window_s, loader.device, warm_up)
    account.stop()
    steps = account.steps()[warm_up:]
    found["waiting"] = sum(step.wait_s for step in steps) / sum(step.seconds for step in steps)
    reading_s = sum(span.seconds for step in steps for span in step.spans if span.name == "read")
    return found | {"reading, us an image": 1e6 * reading_s / len(steps) / batch_size}


@click.command()
@harness.DATASET
@harness.DEVICE
@harness.seconds_option(60.0, "Budget; rows that do not fit are left out.")
@click.option("--small", is_flag=True, help="Tiny sizes, to check that everything runs.")
def main(dataset: Path, device: str, seconds: float, small: bool) -> None:
    """Train on DATASET, cold, warm and cached."""
    device, manifest, rows = choose_device(device), Manifest.load(dataset), {}
    cuda, classes = device.type == "cuda", len(manifest.classes)
    batch_size, crop_size, window_s = (16, 64, 0.2) if small else (1024, 224, 3.0) if cuda else (32, 224, 10.0)
    notes = harness.Notes(harness.named("together", device), "torch", "nvidia-dali-cuda130", seconds=seconds)
    settings = {"batch_size": batch_size, "crop_size": crop_size, "num_threads": harness.cores()} | harness.tuned_settings(device)
    settings |= {"dtype": "bfloat16", "memory_format": "channels_last"} if cuda else {}
    notes["settings"] = settings | {"compiled": cuda}
    keep_memory()
    for net in NETS[:1] if small else NETS:
        step = step_of(build_net(net, classes, crop_size=crop_size), device, mode="default" if cuda else None)
        images, labels = fixed_batch(batch_size, classes, device, crop_size)
        once = functools.partial(step, images.to(torch.bfloat16) if cuda else images, labels)
        synthetic = harness.window_rate(once, batch_size, window_s, device, 10 if cuda else 2)
        for way, options in WAYS.items():
            if way == "cache device" and not cuda:
                continue
            row = rows[f"{net}: {way}"] = {"synthetic": synthetic}
            if notes.left_s < NEEDS_S:
                row["left out"] = f"{notes.left_s:.0f} s of {seconds:.0f} were left"
            else:
                for train in (None, step):
                    if way == "cold":
                        evict(dataset)
                        ids = np.arange(min(EXAMINED, manifest.split("train").records))
                        row["resident before"] = machine.resident_share(manifest, "train", ids)
                    with ImageLoader(manifest, "train", device=device, **settings | options) as loader:
                        row.update(measure(loader, train, window_s, notes.left_s / 3, way == "cold"))
                row["of the smaller"] = row["together"] / min(row["loader"], synthetic)
                row["of synthetic"] = row["together"] / synthetic
            notes["rows"] = rows


if __name__ == "__main__":
    main()
