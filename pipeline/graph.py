"""The one DALI graph, for CPU and GPU: JPEG bytes to normalised crops."""

from collections.abc import Callable

from nvidia.dali import Pipeline, fn, math, types

from pipeline.plan import PLACE_BITS


def image_pipeline(
    source: Callable[[int], list],
    batch_size: int,
    size: int,
    views: int,
    device_id: int | None,
    num_threads: int,
    prefetch: int,
) -> Pipeline:
    """Normalised crops: float32 (N, 3, size, size), or (N, views, 3, size, size) for more views than one.

    `source(i)` gives batch i as [JPEGs, means (N, 3) float32] and then, for each view, places (N, 2) int64 and
    mirrors (N,) int32. What it gives must live until the batch is out: the bytes are not copied.
    `device_id` None decodes and normalises on the CPU, a number on that GPU.
    """
    pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=prefetch)
    with pipeline:
        jpegs, mean, *look = fn.external_source(source, num_outputs=2 + 2 * views, batch=True, no_copy=True)
        images = decode(jpegs, device_id)
        # Crop positions are integers of the plan; DALI takes shares of the room and rounds share * room, which gives
        # the integer back. The sizes come from the image: with `build --fit short` each has its own.
        room = images.shape(device="cpu")[:2] - size
        crops = []
        for places, mirrors in zip(look[::2], look[1::2], strict=True):
            share = (places * (room + 1) // (1 << PLACE_BITS)) / math.max(room, 1)
            crops.append(
                fn.crop_mirror_normalize(
                    images,
                    crop=(size, size),
                    crop_pos_y=share[0],
                    crop_pos_x=share[1],
                    mirror=mirrors,
                    mean=mean,
                    dtype=types.FLOAT,
                    output_layout="CHW",
                )
            )
        pipeline.set_outputs(crops[0] if views == 1 else fn.stack(*crops))
    return pipeline


def decode_pipeline(
    source: Callable[[int], list], batch_size: int, device_id: int | None, num_threads: int, prefetch: int
) -> Pipeline:
    """Only the decoding of `image_pipeline`: whole images, uint8; `source(i)` gives the JPEGs of batch i."""
    pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=prefetch)
    with pipeline:
        pipeline.set_outputs(decode(fn.external_source(source, batch=True, no_copy=True), device_id))
    return pipeline


def decode(jpegs, device_id: int | None):
    """Decodes whole: a region of interest on the GPU crashes in nvImageCodec 0.9 (nvImageCodec issue 55)."""
    device = "cpu" if device_id is None else "mixed"
    return fn.decoders.image(jpegs, device=device, output_type=types.RGB, adjust_orientation=False)
