"""DALI graphs, for CPU and GPU: JPEG bytes to decoded images, or to normalized crops."""

import ctypes
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.plan import PLACE_BITS

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from torch import Tensor

HW_DECODER_LOAD = OPTIONS["hw_decoder_load"].default  # docs/log.md compares this and the next
# Batches ahead, by decoder. With DALI the calling thread crops and needs more; with ours it only waits, and a batch may be 77 MB.
PREFETCH = {"native": 2, "dali": 4, "both": 3}
# Gives the inputs of batch i, which must live until the batch is out: DALI does not copy them.
Feed = Callable[[int], list]


@dataclass(frozen=True)
class GraphOptions:
    """How images are decoded and cropped.

    `views` is the number of crops of an image, and `crops` how many of them have colors of their own. `scale` multiplies each
    channel after the mean is subtracted; `mean_image` (height, width, 3), if given, is subtracted before the crop. `boxes`: a
    rectangle of the image is resized to the crop.
    `jitter`: colors go through an affine map. `device_id` None is the CPU.
    """

    crop_size: int
    views: int = 1
    crops: int = 1
    dtype: str = "float32"
    memory_format: str = "contiguous"
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mean_image: np.ndarray | None = field(default=None, compare=False)
    boxes: bool = False
    jitter: bool = False
    device_id: int | None = None
    num_threads: int = 1
    prefetch: int = PREFETCH["dali"]
    hw_decoder_load: float = HW_DECODER_LOAD

    def by_image(self, crops: "Tensor") -> "Tensor":
        """Crops (N * views, ...) as (N, views, ...); of one view as they are."""
        return crops.unflatten(0, (-1, self.views)) if self.views > 1 else crops


def import_dali() -> ModuleType:
    """DALI, loaded when the first graph is built: it takes a second."""
    try:
        from nvidia import dali
    except ImportError as error:
        raise UserError(
            f"DALI decodes the images, but cannot be imported ({error}); install it from a clone of imagefeed: "
            "pip install '.[dali13]' for CUDA 13 or pip install '.[dali12]' for CUDA 12 (on a CPU either works)"
        ) from None
    return dali


def image_pipeline(feed: Feed, batch_size: int, options: GraphOptions) -> "Pipeline":
    """Normalized crops: (N, 3, crop_size, crop_size), or (N, views, 3, crop_size, crop_size) for several views; channels come
    last for memory format channels_last, and bfloat16 is float32 here.

    `feed` gives the JPEGs and, for each of options.crops, means (N, 3) float32, then boxes (N, 4) float32 (top, left, height,
    width in pixels) and color maps (N, 2, 3, 3) float32 (`Plan.jitter`) if options ask for them, then places (N, 2) int64 and
    mirrors (N,) int32 of each of its views.
    """
    dali = import_dali()
    fn, math, types = dali.fn, dali.math, dali.types
    dtypes = {"float32": types.FLOAT, "bfloat16": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}
    crop_size = options.crop_size
    with _pipeline(batch_size, options) as pipeline:
        count = 1 + options.crops * (1 + options.boxes + options.jitter) + 2 * options.views
        jpegs, *rest = fn.external_source(feed, num_outputs=count, batch=True, no_copy=True)
        given = iter(rest)
        whole = _decode(jpegs, options)
        if options.mean_image is not None:
            device = "cpu" if options.device_id is None else "gpu"
            whole = whole - types.Constant(options.mean_image.astype(np.float32), device=device)
        crops = []
        for view in range(options.views):
            if view % (options.views // options.crops) == 0:
                images, mean = whole, next(given)
                if options.boxes:
                    box = next(given)
                    images = fn.slice(images, box[0:2], box[2:4], axes=[0, 1], normalized_anchor=False, normalized_shape=False)
                    linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
                    images = fn.resize(images, resize_x=crop_size, resize_y=crop_size, **linear)
                maps = next(given) if options.jitter else None
            # The plan's crop positions are integers. DALI takes fractions of the room and rounds fraction * room, which gives the
            # integer back. The room comes from the image: with `build --fit short` sizes differ.
            room = images.shape(device="cpu")[:2] - crop_size
            offset = next(given) * (room + 1) // (1 << PLACE_BITS)
            fraction = offset / math.max(room, 1)
            window = {"crop": (crop_size, crop_size), "crop_pos_y": fraction[0], "crop_pos_x": fraction[1]}
            pixels = images
            if maps is not None:
                if not options.boxes:
                    pixels, window = fn.crop(pixels, **window), {}
                average = fn.reshape(fn.reductions.mean(pixels, axes=[0, 1]), shape=[1, 1, 3])
                # Not as the argument T: on a GPU arguments must be known on the CPU, and this one comes from the pixels.
                shift = fn.coord_transform(average, M=maps[1], dtype=types.FLOAT)
                pixels = fn.coord_transform(pixels, M=maps[0], dtype=types.FLOAT) + shift
                pixels = math.clamp(pixels, 0.0, 255.0)
            crops.append(
                fn.crop_mirror_normalize(
                    pixels,
                    **window,
                    mirror=next(given),
                    mean=mean,
                    std=[1 / scale for scale in options.scale],
                    dtype=dtypes[options.dtype],
                    output_layout="CHW" if options.memory_format == "contiguous" else "HWC",
                )
            )
        pipeline.set_outputs(crops[0] if options.views == 1 else fn.stack(*crops))
    return pipeline


def decode_pipeline(feed: Feed, batch_size: int, options: GraphOptions) -> "Pipeline":
    """Whole images, uint8; `feed` gives [JPEGs]."""
    with _pipeline(batch_size, options) as pipeline:
        (jpegs,) = import_dali().fn.external_source(feed, num_outputs=1, batch=True, no_copy=True)
        pipeline.set_outputs(_decode(jpegs, options))
    return pipeline


def _pipeline(batch_size: int, options: GraphOptions) -> "Pipeline":
    dali = import_dali()
    pipeline = dali.Pipeline(batch_size, options.num_threads, options.device_id, prefetch_queue_depth=options.prefetch)
    _made.add(pipeline)
    return pipeline


_made: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()


def _keep_after_fork() -> None:
    """Destroying a pipeline waits for its threads, which a forked process does not have: it hangs or crashes. So none is
    destroyed there, not even those of loaders that the parent dropped and the garbage collector has not found yet."""
    for pipeline in _made:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))


os.register_at_fork(after_in_child=_keep_after_fork)


def _decode(jpegs, options: GraphOptions):
    """Decodes whole images: a region of interest on the GPU crashes in nvImageCodec 0.9 (nvImageCodec issue 55)."""
    dali = import_dali()
    where = {"device": "cpu"} if options.device_id is None else {"device": "mixed", "hw_decoder_load": options.hw_decoder_load}
    return dali.fn.decoders.image(jpegs, output_type=dali.types.RGB, adjust_orientation=False, **where)
