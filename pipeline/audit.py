"""Checks that an epoch visits each record once, and measures how well its order is shuffled."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.console import plural
from imagefeed.dataset.records import NO_LABEL
from imagefeed.pipeline.plan import Plan

SEEDS = range(3)  # for the mean quality of other shuffles
DALI_FILL = 1024  # records in the buffer of DALI's random_shuffle, by default
ROWS = {
    "entropy of the classes in a batch, bits": "{:.3f}",
    "mean shuffle displacement, share of the epoch": "{:.4f}",
    "records whose stored successor is in the batch": "{:.3%}",
    "pairs that share a batch again next epoch": "{:.3%}",
}


class Quality(NamedTuple):
    """How well an order is shuffled, by its global batches."""

    class_entropy: float | None  # of the labels in a batch, bits, mean over batches; None without labels
    moved: float  # mean distance between a record's stored place and its turn, as a fraction of all records; shuffled: 1/3
    neighbors: float  # fraction of the visited records whose successor in storage is in the same batch
    overlap: float  # fraction of a record's batch mates that share its batch in the next epoch too, mean over records


@dataclass(frozen=True)
class Audit:
    """Counts over all ranks of an epoch, and the quality of its shuffle beside others."""

    records: int
    batch_size: int
    world_size: int
    seed: int
    epoch: int
    shuffle: str
    views: str
    steps: tuple[int, ...]  # of each rank
    taken_once: int
    missed: int
    repeated: int  # visited more than once
    padded: int  # places in batches without a record
    quality: Quality
    perfect: Quality  # of numpy's permutations
    buffer: Quality  # of DALI's random_shuffle
    by_class: Quality | None  # of records stored and visited by class; None without labels

    @property
    def wrong(self) -> bool:
        """More is left out or padded than the last batch explains, a record is repeated, or ranks differ in steps."""
        global_batch = self.batch_size * self.world_size
        missed, padded = self.records % global_batch, -self.records % global_batch
        expected = (missed, 0) if self.views == "random" else (0, padded)
        return (self.missed, self.padded, self.repeated, len(set(self.steps))) != (*expected, 0, 1)


def audit(
    records: int,
    batch_size: int,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: str = "global",
    views: str = "random",
    labels: np.ndarray | None = None,
) -> Audit:
    """Walks all steps of all ranks in an epoch and the next; 1.28 million records take 2.5 s.

    `labels` (records,) are optional, and ignored if some are NO_LABEL. Raises what Plan raises.
    """
    plans = [Plan(records, batch_size, views, seed, rank, world_size, shuffle) for rank in range(world_size)]
    order, padded = walk(plans, epoch)
    after, _ = walk(plans, epoch + 1)
    if labels is not None and np.any(labels == NO_LABEL):
        labels = None
    times = np.bincount(order, minlength=records)
    batch, taken = batch_size * world_size, len(order)
    stored = np.arange(taken)
    return Audit(
        **{name: value for name, value in vars(plans[0]).items() if name in Audit.__dataclass_fields__},
        epoch=epoch,
        steps=tuple(plan.steps for plan in plans),
        taken_once=int((times == 1).sum()),
        missed=int((times == 0).sum()),
        repeated=int((times > 1).sum()),
        padded=padded,
        quality=quality(order, after, batch, records, labels),
        perfect=mean_quality(lambda count, generator: generator.permutation(count), taken, batch, records, labels),
        buffer=mean_quality(buffer_order, taken, batch, records, labels),
        by_class=None if labels is None else quality(stored, stored, batch, records, np.sort(labels)),
    )


def walk(plans: Sequence[Plan], epoch: int) -> tuple[np.ndarray, int]:
    """The record ids of an epoch in the order in which the ranks' `plans` visit them, step by step, and the padded places."""
    steps = range(max(plan.steps for plan in plans))
    batches = [plan.ids(epoch * plan.steps + step) for step in steps for plan in plans if step < plan.steps]
    ids, valid = (np.concatenate(parts) for parts in zip(*batches))
    return ids[valid], int((~valid).sum())


def quality(order: np.ndarray, after: np.ndarray, batch: int, records: int, labels: np.ndarray | None = None) -> Quality:
    """Of an epoch that visits the record ids `order` in batches of `batch`, followed by an epoch `after`.

    Ids are places in storage, 0 to `records` - 1, with `labels` (records,); an order may leave some out.
    """
    now, then = np.full((2, records), -1)  # the number of each record's batch, -1 if it is left out
    for numbers, ids in ((now, order), (then, after)):
        numbers[ids] = np.arange(len(ids)) // batch
    return Quality(
        None if labels is None else class_entropy(labels[order], batch),
        float(np.abs(order - np.arange(len(order))).mean() / records),
        float((now == np.append(now[1:], -1))[order].mean()),
        overlap(now, then),
    )


def mean_quality(
    shuffle: Callable[[int, np.random.Generator], np.ndarray], taken: int, batch: int, records: int, labels: np.ndarray | None
) -> Quality:
    """Of the first `taken` records of a shuffle, the mean over SEEDS."""
    found = []
    for generator in map(np.random.default_rng, SEEDS):
        order, after = (shuffle(records, generator)[:taken] for _ in range(2))
        found.append(quality(order, after, batch, records, labels))
    return Quality(*(None if None in values else float(np.mean(values)) for values in zip(*found)))


def buffer_order(records: int, generator: np.random.Generator, fill: int = DALI_FILL) -> np.ndarray:
    """The order (records,) int64 of DALI's `random_shuffle`: it fills a buffer in stored order, visits a random record of it and
    puts the next one in its place, again and again, and at the end visits the rest in random order."""
    fill = min(fill, records)
    # The place in the buffer that each record is read into. The record before it in that place is visited then.
    place = np.concatenate((np.arange(fill), generator.integers(0, fill, records - fill)))
    by_place = np.argsort(place, kind="stable")
    pushes_out = np.append(by_place[1:] >= fill, False)
    order = np.empty(records, np.int64)
    order[by_place[1:][pushes_out[:-1]] - fill] = by_place[pushes_out]
    order[records - fill :] = generator.permutation(by_place[~pushes_out])
    return order


def class_entropy(labels: np.ndarray, batch: int) -> float:
    """Mean entropy of the labels in a batch, in bits; `labels` (N,) in the order of visits."""
    numbers = np.arange(len(labels)) // batch
    counts, of_batch = count_pairs(numbers, labels)
    share = counts / np.bincount(numbers)[of_batch]
    return float((share * -np.log2(share)).sum() / (numbers[-1] + 1)) + 0.0  # no -0


def overlap(now: np.ndarray, then: np.ndarray) -> float:
    """Mean share of a record's batch mates that share its batch again, by the numbers of each record's batch in two epochs."""
    sizes = np.bincount(now[now >= 0])
    both = (now >= 0) & (then >= 0)
    # Each record that two batches have in common meets all others of them again.
    common, of_batch = count_pairs(now[both], then[both])
    return float((common * (common - 1) / np.maximum(sizes - 1, 1)[of_batch]).sum() / sizes.sum())


def count_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each pair of numbers of 0 or more occurs, and the first number of each pair."""
    width = int(second.max(initial=0)) + 1
    pairs = np.sort(first * width + second)
    begin = np.flatnonzero(np.diff(pairs, prepend=-1))
    return np.diff(begin, append=len(pairs)), pairs[begin] // width


def render_text(found: Audit) -> str:
    """The verdict and a table of qualities."""
    shuffle = f"shuffle {found.shuffle}" if found.views == "random" else "as stored"
    columns = {shuffle: found.quality, "perfect": found.perfect, f"buffer {DALI_FILL:,}": found.buffer}
    columns |= {"by class": found.by_class} if found.by_class else {}
    lines = [verdict(found), "", f"{'':<46}" + "".join(f"{name:>16}" for name in columns)]
    for (name, form), values in zip(ROWS.items(), zip(*columns.values())):
        if None not in values:
            lines.append(f"{name:<46}" + "".join(f"{form.format(value):>16}" for value in values))
    return "\n".join(lines)


def verdict(found: Audit) -> str:
    """Whether each record is visited once, and what is left over."""
    ranks, records = plural(found.world_size, "rank"), plural(found.records, "record")
    if found.wrong:
        steps = " or ".join(f"{steps:,}" for steps in sorted(set(found.steps)))
        return (
            f"Epoch {found.epoch} is wrong: of {records}, {found.taken_once:,} are visited once, {found.repeated:,} more often "
            f"and {found.missed:,} never, with {plural(found.padded, 'padded place')}, by {ranks} in {steps} steps of "
            f"{found.batch_size:,}."
        )
    rest, visited = "none is left out", f"Each of {records} is visited once in epoch {found.epoch}"
    if found.missed:
        rest = f"the last {found.missed:,} {'do' if found.missed > 1 else 'does'} not fill another batch"
        visited = f"{found.taken_once:,} of {records} are visited once in epoch {found.epoch}, none twice"
    if found.padded:
        rest += f", and {plural(found.padded, 'place')} at the end {'are' if found.padded > 1 else 'is'} padding"
    return f"{visited}, by {ranks} in {plural(found.steps[0], 'step')} of {found.batch_size:,}; {rest}."


def render_json(found: Audit) -> str:
    """Everything that was counted, with the verdict."""
    values = {name: value._asdict() if isinstance(value, Quality) else value for name, value in vars(found).items()}
    return json.dumps({"verdict": verdict(found), "wrong": found.wrong} | values, indent=1)
