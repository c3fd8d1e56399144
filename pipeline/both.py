"""Two decoders for one batch: DALI's on its device, and ours on the CPU's cores beside it.

Which of them decodes a record is drawn from its id alone, so it is the same in every epoch, on every rank, and after a resume.
"""

import functools
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from imagefeed.pipeline.crops import graph_batches
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.handover import CropMemory
from imagefeed.pipeline.native import NativeBatches
from imagefeed.pipeline.plan import by_cores
from imagefeed.pipeline.source import InputBatch, Side, Source, graph_inputs


class BothBatches:
    """The cores' part of each batch goes through `memory`, DALI's through its graph; the same order and draws as either alone."""

    def __init__(
        self, source: Source, options: GraphOptions, device: torch.device, memory: CropMemory, share: float, as_bytes: bool
    ):
        self.source, self.options, self.device = source, options, device
        self._sides = Sides(source, share)
        self._native = NativeBatches(self._sides.native, options, memory)
        self._dali = graph_batches(self._sides.dali, options, device, as_bytes)

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        self._native.start()
        decoded, _ = self._dali.next()
        crops, _ = self._native.next()
        start_s = time.perf_counter()
        batch, by_dali, native = self._sides.taken()
        images = decoded[:1].movedim(-3, -1) if self.options.memory_format == "channels_last" else decoded[:1]
        images = images.new_empty((len(batch.ids), *images.shape[1:]))
        images = images.movedim(-1, -3) if self.options.memory_format == "channels_last" else images
        for places, part in ((by_dali, decoded), (native, crops)):
            images[torch.from_numpy(places).to(self.device, non_blocking=True)] = part
        self.source.spans.append(("crop", start_s, time.perf_counter() - start_s))
        return images, batch

    def close(self) -> None:
        self._native.close()
        self._dali.close()


class Sides:
    """One source as two, `native` and `dali`, each with its part of every batch. All calls come from one thread."""

    def __init__(self, source: Source, share: float):
        self.source, self.share = source, share
        self._coming: tuple[deque, deque] = deque(), deque()
        self._whole: deque[tuple[InputBatch, np.ndarray, np.ndarray]] = deque()
        self.native, self.dali = (Side(source, functools.partial(self._next, number)) for number in range(2))

    def _next(self, number: int) -> InputBatch:
        if not self._coming[number]:
            batch = self.source.next()
            cores = by_cores(batch.ids, self.share)
            # DALI takes no empty batch; the native crop of this record is written last.
            native, by_dali = np.flatnonzero(cores), np.flatnonzero(~cores) if not cores.all() else np.zeros(1, np.int64)
            parts = part_of(batch, native), part_of(batch, by_dali)
            for queue, part in zip(self._coming, parts, strict=True):
                queue.append(part)
            # The parts too: DALI does not copy its inputs, and the loader holds what it is handed until they are used.
            self._whole.append((batch._replace(parts=parts), by_dali, native))
        return self._coming[number].popleft()

    def taken(self) -> tuple[InputBatch, np.ndarray, np.ndarray]:
        """The oldest whole batch, and the places (M,) in it of either part."""
        return self._whole.popleft()


def part_of(batch: InputBatch, places: np.ndarray) -> InputBatch:
    """The batch with the records at `places` alone; its JPEGs are copied, unless they follow each other."""

    def of(values: np.ndarray | None, axis: int = 0) -> Any:
        return None if values is None else np.ascontiguousarray(values.take(places, axis))

    row_of = np.empty(len(batch.ids), np.int64)
    row_of[batch.missing] = np.arange(len(batch.missing))
    rows = row_of[places]
    follow = len(rows) and (np.diff(rows) == 1).all()
    jpegs = batch.inputs[0][rows[0] : rows[-1] + 1] if follow else batch.inputs[0][rows]
    drawn = batch.augmentation
    drawn = drawn._replace(places=of(drawn.places, 1), mirrors=of(drawn.mirrors, 1))
    part = batch._replace(
        ids=of(batch.ids), labels=of(batch.labels), valid=of(batch.valid), augmentation=drawn, means=of(batch.means, 1),
        missing=np.arange(len(places)), boxes=of(batch.boxes, 1), maps=of(batch.maps, 1), inputs=[jpegs],
    )  # fmt: skip
    return part._replace(inputs=[jpegs, *graph_inputs(part)])
