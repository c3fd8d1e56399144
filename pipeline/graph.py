"""The one DALI graph, for CPU and GPU: JPEG bytes to normalized crops."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from nvidia.dali import Pipeline, fn, math, types

from imagefeed.pipeline.plan import PLACE_BITS

DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}
# Where the hardware JPEG decoder shares the work with CUDA; DALI's own default.
HW_DECODER_LOAD = 0.65
PREFETCH = 4  # batches that are made ahead of time; docs/log.md has 2 and 3


@dataclass(frozen=True)
class GraphOptions:
    """What the graph makes of an image, and by what means.

    `crop_size` is a crop's side in pixels, `views` the crops of an image. `dtype` and `memory_format` ("contiguous", "channels_last") are those of the
    batch. `scale` (3,) multiplies each channel after the mean is subtracted; `mean_image` (height, width, 3) is subtracted
    before the crop where it is given. With `boxes` the source gives a rectangle of each image, which is rescaled to the
    crop; with `jitter` an affine map of its colors. `device_id` None is the CPU; `hw_decoder_load` is the share of the
    images that the GPU's JPEG decoder takes from CUDA's.
    """

    crop_size: int
    views: int = 1
    dtype: str = "float32"
    memory_format: str = "contiguous"
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mean_image: np.ndarray | None = field(default=None, compare=False)
    boxes: bool = False
    jitter: bool = False
    device_id: int | None = None
    num_threads: int = 1
    prefetch: int = PREFETCH
    hw_decoder_load: float = HW_DECODER_LOAD


def image_pipeline(source: Callable[[int], list], batch_size: int, options: GraphOptions) -> Pipeline:
    """Normalized crops: (N, 3, crop_size, crop_size), or (N, views, 3, crop_size, crop_size) for more views than one.

    `source(i)` gives batch i as [JPEGs, means (N, 3) float32], then boxes (N, 4) float32 (top, left, height, width in pixels)
    and color maps (N, 2, 3, 3) float32 (`Plan.jitter`) where they are asked for, and then, for each view, places (N, 2)
    int64 and mirrors (N,) int32. What it gives must live until the batch is out: the bytes are not copied.
    """
    pipeline = _pipeline(batch_size, options)
    crop_size = options.crop_size
    with pipeline:
        extra = options.boxes + options.jitter
        count = 2 + extra + 2 * options.views
        jpegs, mean, *rest = fn.external_source(source, num_outputs=count, batch=True, no_copy=True)
        look = rest[extra:]
        images = _decode(jpegs, options)
        if options.mean_image is not None:
            device = "cpu" if options.device_id is None else "gpu"
            images = images - types.Constant(options.mean_image.astype(np.float32), device=device)
        if options.boxes:
            box = rest[0]
            images = fn.slice(images, box[0:2], box[2:4], axes=[0, 1], normalized_anchor=False, normalized_shape=False)
            images = fn.resize(images, resize_x=crop_size, resize_y=crop_size, interp_type=types.INTERP_LINEAR, antialias=True)
        # Crop positions are integers of the plan; DALI takes shares of the room and rounds share * room, which gives
        # the integer back. The sizes come from the image: with `build --fit short` each has its own.
        room = images.shape(device="cpu")[:2] - crop_size
        crops = []
        for places, mirrors in zip(look[::2], look[1::2], strict=True):
            offset = places * (room + 1) // (1 << PLACE_BITS)
            share = offset / math.max(room, 1)
            where = {"crop": (crop_size, crop_size), "crop_pos_y": share[0], "crop_pos_x": share[1]}
            pixels = images
            if options.jitter:
                maps = rest[extra - 1]
                if not options.boxes:
                    pixels, where = fn.crop(pixels, **where), {}
                average = fn.reshape(fn.reductions.mean(pixels, axes=[0, 1]), shape=[1, 3])
                shift = fn.reshape(fn.coord_transform(average, M=maps[1], dtype=types.FLOAT), shape=[3])
                pixels = fn.coord_transform(pixels, M=maps[0], T=shift, dtype=types.FLOAT)
                pixels = math.clamp(pixels, 0.0, 255.0)
            crops.append(
                fn.crop_mirror_normalize(
                    pixels,
                    **where,
                    mirror=mirrors,
                    mean=mean,
                    std=[1 / scale for scale in options.scale],
                    dtype=DTYPES[options.dtype],
                    output_layout="CHW" if options.memory_format == "contiguous" else "HWC",
                )
            )
        pipeline.set_outputs(crops[0] if options.views == 1 else fn.stack(*crops))
    return pipeline


def decode_pipeline(source: Callable[[int], list], batch_size: int, options: GraphOptions) -> Pipeline:
    """Only the decoding of `image_pipeline`: whole images, uint8; `source(i)` gives [JPEGs] of batch i."""
    pipeline = _pipeline(batch_size, options)
    with pipeline:
        (jpegs,) = fn.external_source(source, num_outputs=1, batch=True, no_copy=True)
        pipeline.set_outputs(_decode(jpegs, options))
    return pipeline


def _pipeline(batch_size: int, options: GraphOptions) -> Pipeline:
    return Pipeline(batch_size, options.num_threads, options.device_id, prefetch_queue_depth=options.prefetch)


def _decode(jpegs, options: GraphOptions):
    """Decodes whole: a region of interest on the GPU crashes in nvImageCodec 0.9 (nvImageCodec issue 55)."""
    if options.device_id is None:
        return fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
    return fn.decoders.image(
        jpegs, device="mixed", output_type=types.RGB, adjust_orientation=False, hw_decoder_load=options.hw_decoder_load
    )
