"""How near does `python -m pipeline tune` come to an exhaustive sweep, and in what time?

    python -m benchmarks.tune DATASET [--rounds 7] [--tunings 3] [--seconds 60]     # results under "tune"

DATASET is a built one of 256x256 images that fits into memory. The sweep measures every setting of the tuner's own space in
turns, `--rounds` times, the order turned round each time. Then the tuner runs `--tunings` times, knowing nothing of that. At the
end each of its choices, the sweep's best and the defaults are measured in turns, twice as often: the best of many is partly the
luckiest one, so only this tells how much slower a choice is. Ratios are medians of the ratios within a round.
"""

import itertools
import statistics
import time
from pathlib import Path

import click
import torch

from benchmarks import save
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader, choose_device
from imagefeed.pipeline.profiler.windows import Bench, room_of
from imagefeed.pipeline.tuner.search import Round, Setting, noise, score
from imagefeed.pipeline.tuner.tune import BATCH_SIZE, WINDOWS, Tuned, axes_of, tune

WITHIN = 0.97  # of the best, which is to be reached


def turns(bench: Bench, settings: list[Setting], rounds: int, what: str) -> list[Round]:
    """Each setting once in each round; a round before the first is left out."""
    found: list[Round] = []
    for number in range(rounds + 1):
        order = settings if number % 2 else settings[::-1]
        found.append({setting: bench.rate(setting) for setting in order})
        print(f"{what}: round {number} of {rounds}", flush=True)
    return found[1:]


def tunings(manifest: Manifest, count: int, seconds: float, batch_size: int, device: torch.device) -> list[Tuned]:
    found = []
    for number in range(count):
        found.append(tune(manifest, None, batch_size, device=device, seconds=seconds, cold=False))
        print(f"tuning {number + 1}: {found[-1].chosen} in {found[-1].seconds:.0f} s", flush=True)
    return found


def ratio(rounds: list[Round], one: Setting, other: Setting) -> float:
    return statistics.median(found[one] / found[other] for found in rounds)


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=7, show_default=True, help="Of the sweep.")
@click.option("--tunings", "count", default=3, show_default=True, help="How often the tuner runs.")
@click.option("--seconds", default=60.0, show_default=True, help="Of a tuning.")
@click.option("--batch-size", default=BATCH_SIZE, show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(dataset: Path, rounds: int, count: int, seconds: float, batch_size: int, device: str) -> None:
    """Sweep all settings on DATASET, tune, and compare."""
    manifest, chosen_device = Manifest.load(dataset), choose_device(device)

    def open_loader(**options) -> ImageLoader:
        return ImageLoader(manifest, manifest.train_split, batch_size, device=chosen_device, **options)

    def new_bench() -> Bench:
        stretch = manifest.split(manifest.train_split).records  # all of it
        return Bench(open_loader, seconds / WINDOWS / 2, stretch, False, room_of(chosen_device))

    with open_loader() as loader:
        options = loader.options
        start = Setting(options.num_threads, options.prefetch, loader.read_ahead, options.hw_decoder_load)
    axes = axes_of(start.num_threads, chosen_device, cold=False)
    space = [start._replace(**dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    begin_s = time.perf_counter()
    with new_bench() as bench:
        swept = turns(bench, space, rounds, f"sweep of {len(space)} settings")
    sweep_s = time.perf_counter() - begin_s
    known = score(swept)
    best = max(known, key=known.__getitem__)
    found = tunings(manifest, count, seconds, batch_size, chosen_device)
    picked = list(dict.fromkeys([best, start, *(tuned.chosen for tuned in found)]))
    with new_bench() as bench:
        last = turns(bench, picked, 2 * rounds, "the choices beside the sweep's best")
    shares = [1.0 if tuned.chosen == best else ratio(last, tuned.chosen, best) for tuned in found]

    def named(setting: Setting) -> str:
        return ", ".join(f"{axis} {getattr(setting, axis)}" for axis in axes)

    result = {
        "records": manifest.split(manifest.train_split).records,
        "batch_size": batch_size,
        "axes": {axis: list(values) for axis, values in axes.items()},
        "rounds": rounds,
        "sweep_s": sweep_s,
        "noise_of_a_window": noise(swept),
        "swept": {named(setting): [measured[setting] for measured in swept] for setting in space},
        "best_of_sweep": named(best),
        "defaults_of_best": 1.0 if start == best else ratio(last, start, best),
        "tunings": [
            {
                "chosen": named(tuned.chosen),
                "seconds": tuned.seconds,
                "settings_tried": len(score(tuned.rounds)),
                "windows": sum(map(len, tuned.rounds)),
                "of_best": share,
                "within_3_percent": share >= WITHIN,
                "notes": list(tuned.notes),
            }
            for tuned, share in zip(found, shares, strict=True)
        ],
        "compared": {named(setting): [measured[setting] for measured in last] for setting in picked},
    }
    save("tune" if chosen_device.type == "cpu" else "tune-cuda", result, "numpy", "torch", "nvidia-dali-cuda130")
    print(f"sweep: {len(space)} settings in {sweep_s:.0f} s; best {named(best)}")
    print(f"defaults: {result['defaults_of_best']:.3f} of the best")
    for row in result["tunings"]:
        print(f"tuned: {row['chosen']} in {row['seconds']:.0f} s: {row['of_best']:.3f} of the best")


if __name__ == "__main__":
    main()
