"""How near does `imagefeed tune` come to an exhaustive sweep, and in what time?

    python -m benchmarks.tune DATASET [--rounds 7] [--tunings 3] [--seconds 60]     # results under "tune" or "tune-cuda"

DATASET holds 256x256 images and fits into memory. The sweep measures every setting of the tuner's own space in turns, in
alternating order. Then the tuner runs `--tunings` times without knowing the outcome. At the end its choices, the sweep's best and
the defaults are measured in turns, twice as often: the best of many settings is partly the luckiest one.
"""

import itertools
from pathlib import Path

import click

from benchmarks import harness
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.profiler.windows import Bench, room_of
from imagefeed.pipeline.tuner.search import Round, Setting, noise, score
from imagefeed.pipeline.tuner.tune import WINDOWS, axes_of, tune

WITHIN = 0.97  # of the best: the goal


def turns(bench: Bench, settings: list[Setting], rounds: int) -> list[Round]:
    """Measures each setting once per round, after a round that does not count."""
    found: list[Round] = []
    for number in range(rounds + 1):
        found.append({setting: bench.rate(setting) for setting in (settings if number % 2 else settings[::-1])})
        print(f"round {number} of {rounds}, {len(settings)} settings", flush=True)
    return found[1:]


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
    manifest, device = Manifest.load(dataset), choose_device(device)
    records = manifest.split(manifest.train_split).records

    def open_loader(**options) -> ImageLoader:
        return ImageLoader(manifest, manifest.train_split, batch_size, device=device, **options)

    def measure(settings: list[Setting], rounds: int) -> list[Round]:
        with Bench(open_loader, seconds / WINDOWS / 2, records, False, room_of(device)) as bench:
            return turns(bench, settings, rounds)

    with open_loader() as loader:
        options = loader.options
        start = Setting(options.num_threads, options.prefetch, loader.read_ahead, options.hw_decoder_load)
    axes = axes_of(start.num_threads, device, cold=False)
    swept_axes = [found[:: -(-len(found) // values)] if values else found for found in axes.values()]
    space = [start._replace(**dict(zip(axes, point))) for point in itertools.product(*swept_axes)]

    def named(setting: Setting) -> str:
        return ", ".join(f"{axis} {getattr(setting, axis)}" for axis in axes)

    begin_s = harness.spent_s()
    swept = measure(space, rounds)
    sweep_s, known = harness.spent_s() - begin_s, score(swept)
    best = max(known, key=known.__getitem__)
    notes = harness.Notes(harness.named("tune", device), "numpy", "torch", "nvidia-dali-cuda130")
    notes.update({"records": records, "batch_size": batch_size, "rounds": rounds, "sweep_s": sweep_s})
    notes.update({"noise_of_a_window": noise(swept), "best_settings": {axis: getattr(best, axis) for axis in axes}})
    notes["swept"] = {named(setting): [measured[setting] for measured in swept] for setting in space}
    notes["best_of_sweep"] = named(best)
    tunings = [tune(manifest, None, batch_size, device=device, seconds=seconds, cold=False) for _ in range(count)]
    picked = list(dict.fromkeys([best, start, *(tuned.chosen for tuned in tunings)]))
    last = measure(picked, 2 * rounds)
    rates = {setting: [found[setting] for found in last] for setting in picked}
    notes["compared"] = {named(setting): values for setting, values in rates.items()}
    notes["defaults_of_best"] = harness.ratio(rates, start, best)
    notes["tunings"] = [
        {"chosen": named(tuned.chosen), "seconds": tuned.seconds, "settings_tried": len(score(tuned.rounds))}
        | {"windows": sum(map(len, tuned.rounds)), "of_best": harness.ratio(rates, tuned.chosen, best)}
        | {"within_3_percent": harness.ratio(rates, tuned.chosen, best) >= WITHIN, "notes": list(tuned.notes)}
        for tuned in tunings
    ]


if __name__ == "__main__":
    main()
