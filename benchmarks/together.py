"""How much of the loader's rate and of training's is left when both run together: cold, warm, and with a full cache?

    python -m benchmarks.together DATASET [--device cuda] [--seconds 60]     # results under "together" or "together-cuda"

For each net: steps on one fixed batch ("synthetic"), then for each way of feeding the loader alone and the loader with training.
The loader has the settings that benchmarks.tune found best on this machine. The learning rate is 0; only time counts.
"""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks import harness
from benchmarks.data import endless, evict
from benchmarks.train import fixed_batch, step_of
from imagefeed.dataset.manifest import Manifest
from imagefeed.model import build_net
from imagefeed.model.step import keep_memory
from imagefeed.pipeline.loader import ImageLoader, choose_device
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account

NETS = ("alexnet-owt", "alexnet")
WAYS = {"warm": {}, "cold": {}, "cache device": {"cache": "device"}, "cache host": {"cache": "host"}}
LOOKED_AT = 1000  # records, to see how much of a cold dataset is in memory
ROW_S = {"cuda": 12, "cpu": 2}  # at least


def window(notes: harness.Notes, loader: ImageLoader, step: Callable | None, window_s: float, warm_up: int) -> dict[str, float]:
    """Rate of the loader with `step`, or alone; the shares of the time that waiting and reading take."""
    batches = endless(loader)
    found: dict[str, float] = {}
    if loader.arguments["cache"] != "none":  # filled by an epoch, or by half of the time that is left
        filled, until_s = 0, notes.left_s / 2
        while filled < len(loader) and notes.left_s > until_s:
            next(batches)
            filled += 1
        found["filled"] = filled / len(loader)
    account = Account(loader.device, loader)

    def both() -> None:
        batch = account.fetch(batches)
        if step is not None:
            step(batch.images, batch.labels, account.phase)

    batch_size = loader.plan.batch_size
    found["images_per_second"] = harness.window_rate(both, batch_size, window_s, loader.device, warm_up)
    account.stop()
    steps = account.steps()[warm_up:]
    whole_s = sum(step.seconds for step in steps)
    reading_s = sum(span.seconds for step in steps for span in step.spans if span.name == "read")
    found["reading us an image"] = 1e6 * reading_s / len(steps) / batch_size
    return found | {"waiting": sum(step.wait_s for step in steps) / whole_s, "reading": reading_s / whole_s}


def feed(notes: harness.Notes, dataset: Path, way: str, step: Callable, options: dict, window_s: float, synthetic: float) -> dict:
    """The loader alone, then with training, each from its first batch on if it is cold."""
    found: dict[str, object] = {}
    manifest = Manifest.load(dataset)
    for name, train in (("loader", None), ("together", step)):
        if way == "cold":
            evict(dataset)
            ids = np.arange(min(LOOKED_AT, manifest.split("train").records))
            found["resident before"] = machine.resident_share(manifest, "train", ids)
        with ImageLoader(manifest, "train", **options | WAYS[way]) as loader:
            found[name] = window(notes, loader, train, window_s, 0 if way == "cold" else loader.options.prefetch + 2)
    both, alone = found["together"]["images_per_second"], found["loader"]["images_per_second"]
    return found | {"of the smaller": both / min(alone, synthetic), "of synthetic": both / synthetic}


@click.command()
@harness.DATASET
@harness.DEVICE
@harness.seconds_option(60.0, "Budget; rows that do not fit are left out.")
@click.option("--small", is_flag=True, help="Tiny sizes, to check that everything runs.")
def main(dataset: Path, device: str, seconds: float, small: bool) -> None:
    """Train on DATASET, cold, warm and cached."""
    chosen = choose_device(device)
    cuda = chosen.type == "cuda"
    batch_size = 16 if small else 1024 if cuda else 32
    crop_size, window_s = (64, 0.4) if small else (224, 3.0 if cuda else 10.0)
    classes = len(Manifest.load(dataset).classes)
    name = harness.named("together", chosen)
    notes = harness.Notes(name, "torch", "nvidia-dali-cuda130", seconds=seconds)
    settings = {"batch_size": batch_size, "crop_size": crop_size, "num_threads": harness.cores()}
    settings |= harness.tuned_settings(chosen)
    settings |= {"dtype": "bfloat16", "memory_format": "channels_last"} if cuda else {}
    notes["settings"] = settings | {"compiled": cuda}
    for net in NETS[:1] if small else NETS:
        keep_memory()
        step = step_of(build_net(net, classes, crop_size=crop_size), chosen, mode="default" if cuda else None)
        images, labels = fixed_batch(batch_size, classes, chosen, crop_size)
        once = functools.partial(step, images.to(torch.bfloat16) if cuda else images, labels)
        rates = harness.window_rates(once, batch_size, window_s, chosen, 10 if cuda else 2)
        synthetic = statistics.median(rates)
        notes[f"{net}: synthetic"] = {"images_per_second": synthetic, "windows": rates}
        for way in WAYS if cuda else ("warm", "cold", "cache host"):
            row = f"{net}: {way}"
            if notes.left_s < ROW_S["cuda" if cuda else "cpu"]:
                notes[row] = f"left out: {notes.left_s:.0f} s of {seconds:.0f} were left"
            else:
                notes[row] = feed(notes, dataset, way, step, settings | {"device": chosen}, window_s, synthetic)


if __name__ == "__main__":
    main()
