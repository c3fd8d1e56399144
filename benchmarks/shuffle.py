"""How well do the orders of an epoch shuffle, and how long does computing one take?

    python -m benchmarks.shuffle [--records 1281167]    # results under "shuffle"

As many records as ImageNet has, of 1,000 classes, stored as `build` stores them (shuffled by numpy.random.RandomState) and stored
by class. Nothing is read: an order is judged by the record ids alone (`pipeline.audit.Quality`).
"""

import statistics
import time
from collections.abc import Callable

import click
import numpy as np

from benchmarks.harness import save
from imagefeed.pipeline.audit import DALI_FILL, buffer_order, class_entropy, quality
from imagefeed.pipeline.plan import BLOCK, WINDOW, epoch_order

CLASSES = 1000
EPOCHS = 5


def shuffles(records: int, batch: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Functions that return the order of an epoch."""
    return {
        "global": lambda epoch: epoch_order(0, epoch, records, "global"),
        "blocks": lambda epoch: epoch_order(0, epoch, records, "blocks"),
        "node-blocks": lambda epoch: epoch_order(0, epoch, records, "node-blocks", batch),
        "none": lambda epoch: np.arange(records),
        "perfect": lambda epoch: np.random.default_rng(epoch).permutation(records),
        "dali buffer": lambda epoch: buffer_order(records, np.random.default_rng(epoch)),
    }


def judge(shuffle: Callable[[int], np.ndarray], batch: int, shuffled: np.ndarray, by_class: np.ndarray) -> dict:
    """Quality over EPOCHS pairs of epochs for both kinds of storage, and the seconds for one order."""
    found, entropies, seconds = [], [], []
    after = shuffle(0)
    for epoch in range(1, EPOCHS + 1):
        before, start_s = after, time.perf_counter()
        after = shuffle(epoch)
        seconds.append(time.perf_counter() - start_s)
        found.append(quality(before, after, batch, len(shuffled), shuffled))
        entropies.append(class_entropy(by_class[before], batch))
    mean = {name: statistics.mean(values) for name, values in zip(found[0]._fields, zip(*found))}
    return mean | {"class_entropy_stored_by_class": statistics.mean(entropies), "order_s": statistics.median(seconds)}


@click.command()
@click.option("--records", default=1_281_167, show_default=True)
def main(records: int) -> None:
    """Judge each shuffle at two batch sizes."""
    by_class = np.arange(records) * CLASSES // records
    shuffled = np.random.RandomState(0).permutation(by_class)
    batches = {}
    for batch in (256, 1024):
        epoch_order.cache_clear()
        batches[str(batch)] = {
            name: judge(shuffle, batch, shuffled, by_class) for name, shuffle in shuffles(records, batch).items()
        }
        for name, row in batches[str(batch)].items():
            print(batch, name, *(f"{key} {value:.5f}" for key, value in row.items()), flush=True)
    settings = {"records": records, "classes": CLASSES, "block": BLOCK, "window": WINDOW, "buffer": DALI_FILL}
    save("shuffle", settings | {"epochs": EPOCHS, "global_batch": batches}, "numpy")


if __name__ == "__main__":
    main()
