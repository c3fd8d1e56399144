"""How near does `imagefeed tune` come to an exhaustive sweep, and in what time?

    python -m benchmarks.tune DATASET [--rounds 7] [--tunings 3] [--seconds 60]     # results under "tune" or "tune-cuda"

DATASET holds 256x256 images and fits into memory. The sweep measures every setting of the tuner's own space in turns, `--rounds`
times, in alternating order. Then the tuner runs `--tunings` times without knowing the outcome. At the end each of its choices,
the sweep's best and the defaults are measured in turns, twice as often: the best of many settings is partly the luckiest one, so
only this tells how much slower a choice is. Ratios are medians of the ratios within a round.
"""

import itertools
import statistics
import time
from pathlib import Path

import click

from benchmarks import harness
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader, choose_device
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.profiler.windows import Bench, room_of
from imagefeed.pipeline.tuner.search import Round, Setting, noise, score
from imagefeed.pipeline.tuner.tune import WINDOWS, axes_of, tune

WITHIN = 0.97  # of the best: the goal


def turns(bench: Bench, settings: list[Setting], rounds: int) -> list[Round]:
    """Measures each setting once per round, after a round that does not count."""
    found: list[Round] = []
    for number in range(rounds + 1):
        order = settings if number % 2 else settings[::-1]
        found.append({setting: bench.rate(setting) for setting in order})
        print(f"round {number} of {rounds}, {len(settings)} settings", flush=True)
    return found[1:]


def ratio(rounds: list[Round], one: Setting, other: Setting) -> float:
    return 1.0 if one == other else statistics.median(found[one] / found[other] for found in rounds)


@click.command()
@harness.DATASET
@harness.rounds_option(7)
@click.option("--tunings", "count", default=3, show_default=True, help="Runs of the tuner.")
@harness.seconds_option(60.0, "Time for one run of the tuner.")
@click.option("--batch-size", default=OPTIONS["batch_size"].default, show_default=True)
@click.option("--values", type=click.IntRange(1), help="Values per option in the sweep, at most; default: all.")
@harness.DEVICE
def main(dataset: Path, rounds: int, count: int, seconds: float, batch_size: int, values: int | None, device: str) -> None:
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
    swept_axes = [found[:: -(-len(found) // values)] if values else found for found in axes.values()]
    space = [start._replace(**dict(zip(axes, point))) for point in itertools.product(*swept_axes)]
    begin_s = time.perf_counter()
    with new_bench() as bench:
        swept = turns(bench, space, rounds)
    sweep_s = time.perf_counter() - begin_s
    known = score(swept)
    best = max(known, key=known.__getitem__)

    def named(setting: Setting) -> str:
        return ", ".join(f"{axis} {getattr(setting, axis)}" for axis in axes)

    print(f"sweep: {len(space)} settings in {sweep_s:.0f} s; best {named(best)}", flush=True)
    tunings = [tune(manifest, None, batch_size, device=chosen_device, seconds=seconds, cold=False) for _ in range(count)]
    with new_bench() as bench:
        last = turns(bench, list(dict.fromkeys([best, start, *(tuned.chosen for tuned in tunings)])), 2 * rounds)
    rows = []
    for tuned in tunings:
        share = ratio(last, tuned.chosen, best)
        rows.append({"chosen": named(tuned.chosen), "seconds": tuned.seconds, "settings_tried": len(score(tuned.rounds))})
        rows[-1] |= {"windows": sum(map(len, tuned.rounds)), "of_best": share, "within_3_percent": share >= WITHIN}
        rows[-1] |= {"notes": list(tuned.notes)}
        print(f"tuned: {named(tuned.chosen)} in {tuned.seconds:.0f} s: {share:.3f} of the best")
    result = {
        "records": manifest.split(manifest.train_split).records,
        "batch_size": batch_size,
        "axes": {axis: list(values) for axis, values in axes.items()},
        "rounds": rounds,
        "sweep_s": sweep_s,
        "noise_of_a_window": noise(swept),
        "swept": {named(setting): [measured[setting] for measured in swept] for setting in space},
        "best_of_sweep": named(best),
        "best_settings": {axis: getattr(best, axis) for axis in axes},
        "defaults_of_best": ratio(last, start, best),
        "tunings": rows,
        "compared": {named(setting): [measured[setting] for measured in last] for setting in last[0]},
    }
    harness.save(harness.named("tune", chosen_device), result, "numpy", "torch", "nvidia-dali-cuda130")


if __name__ == "__main__":
    main()
