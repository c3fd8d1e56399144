"""Three ways from input batches to crops: DALI's graph makes them, our kernel crops what DALI decodes, or a cache has the images.

Each way has `next() -> (images, input batch)`, in the calling thread, and `close()`.
"""

import time
from collections import deque
from collections.abc import Callable

import torch

from imagefeed.pipeline.crops import DeviceCropper, HostCropper
from imagefeed.pipeline.graph import GraphOptions, decode_pipeline, image_pipeline
from imagefeed.pipeline.source import InputBatch, Source

# Batches without a record to decode, after which the decoder is stopped; it restarts in 50 ms.
MAX_IDLE_STEPS = 256
Cropper = HostCropper | DeviceCropper


class GraphBatches:
    """DALI decodes and crops."""

    def __init__(self, source: Source, options: GraphOptions, device: torch.device):
        self.source, self.options, self.device = source, options, device
        self._pipeline = None
        self._pending: deque[InputBatch] = deque()  # in the pipeline, or not yet handed out

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        images = torch.from_dlpack(self._run(image_pipeline).as_tensor())
        if self.options.memory_format == "channels_last":
            images = images.movedim(-1, -3)  # the shape of NCHW; the strides are PyTorch's channels_last
        if self.options.dtype == "bfloat16":
            images = images.to(torch.bfloat16)
        return images, self._pending.popleft()

    def close(self) -> None:
        self._pipeline = None

    def _run(self, build: Callable):
        """DALI's next output. On a GPU it is ready in the order of the current stream; the host does not wait for it."""
        if self._pipeline is None:
            self._pipeline = build(self._feed, self.source.plan.batch_size, self.options)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        spans, start_s = self.source.spans, time.perf_counter()
        before = len(spans)
        (output,) = self._pipeline.run(stream)
        # DALI first requests a later batch, in this thread, and then waits for the current one.
        for _, read_s, seconds in spans[before:]:
            start_s = read_s + seconds
        spans.append(("decode", start_s, time.perf_counter() - start_s))
        return output

    def _feed(self, _: int) -> list:
        self._pending.append(self.source.next())
        return self._pending[-1].inputs


class DecodedBatches(GraphBatches):
    """DALI decodes and `cropper` crops. On a CPU, kernels.c takes a quarter of the time of DALI's crop_mirror_normalize (uint8: a
    tenth), with the same result (docs/log.md)."""

    def __init__(self, source: Source, options: GraphOptions, device: torch.device, cropper: Cropper):
        super().__init__(source, options, device)
        self.cropper = cropper

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        decoded = self._run(decode_pipeline)
        return self._crop(decoded), self._pending.popleft()

    def close(self) -> None:
        super().close()
        self.cropper.close()

    def _feed(self, _: int) -> list:
        return super()._feed(_)[:1]

    def _crop(self, decoded) -> torch.Tensor:
        start_s = time.perf_counter()
        images = self.cropper(self._pending[0], decoded).to(self.device, non_blocking=True)
        if self.options.views > 1:
            images = images.unflatten(0, (-1, self.options.views))
        images = images.to(getattr(torch, self.options.dtype))
        if self.options.memory_format == "channels_last":
            images = images.movedim(-3, -1).contiguous().movedim(-1, -3)
        self.source.spans.append(("crop", start_s, time.perf_counter() - start_s))
        return images


class CachedBatches(DecodedBatches):
    """The cache of `cropper` has the images; DALI decodes only what it lacks, and rests when it lacks nothing for a while."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._peeked: InputBatch | None = None  # the batch for which the pipeline is started
        self._decoded: deque = deque()  # for pending batches, in order

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        while not self._pending:
            if self._pipeline is None:
                batch = self.source.next()
                if not len(batch.missing):
                    self._pending.append(batch)
                    break
                self._peeked = batch
            self._decode()
        needed = len(self._pending[0].missing) > 0
        if needed and not self._decoded:
            self._decode()
        return self._crop(self._decoded.popleft() if needed else None), self._pending.popleft()

    def _decode(self) -> None:
        try:
            self._decoded.append(self._run(decode_pipeline))
        except StopIteration:  # no batch for a long while had anything to decode, and the outputs are used up
            self._pipeline = None

    def _feed(self, _: int) -> list:
        for _ in range(MAX_IDLE_STEPS):
            batch, self._peeked = self._peeked or self.source.next(), None
            self._pending.append(batch)
            if len(batch.missing):
                return batch.inputs[:1]
        raise StopIteration
