"""Parts "loader" and "tune" of gpu.py: the loader alone, by each of its settings, beside decoding alone and DALI's own reader."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import ROOT
from benchmarks.gpu_ceilings import some_jpegs
from benchmarks.gpu_work import Part, best, cores, interleaved, loader_rate, rate, repeated
from imagefeed.pipeline.graph import HW_DECODER_LOAD, PREFETCH, GraphOptions, decode_pipeline
from imagefeed.pipeline.loader import ImageLoader

DALI_PREFETCH = 2  # DALI's own defaults: prefetch_queue_depth, and of hw_decoder_load what HW_DECODER_LOAD is
COMPARING_S = 42  # kept for what comes last, and matters most
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def measure(part: Part) -> None:
    """A grid of hardware share and threads, then the other settings one by one at its best, then the best beside the others."""
    part.data().load_index("train")
    for shard in sorted((part.folder / "large").glob("*.tfrecord")):
        shard.read_bytes()  # into the page cache
    batch_size, seconds = (32, 0.2) if part.small else (512, 1.2)
    base = {"batch_size": batch_size, "prefetch": PREFETCH, "dtype": "float32"}
    grid: dict[str, dict] = {}
    for threads in sorted({max(cores() // 4, 1), max(cores() // 2, 1), cores()}, reverse=True):
        for load in (HW_DECODER_LOAD, 1.0, 0.8, 0.5, 0.25, 0.0) if part.cuda else (HW_DECODER_LOAD,):
            settings = base | {"num_threads": threads, "hw_decoder_load": load}
            if part.time_for(f"threads {threads}, hardware share {load}", COMPARING_S + 13 if part.cuda else 1):
                add(part, grid, settings, seconds)
    settings = grid[best(grid)]["settings"]
    others = [{"batch_size": batch_size * times // 4} for times in (1, 2, 8)]
    others += [{"prefetch": prefetch} for prefetch in (1, 2, 8)]
    for change in others:
        if part.time_for(str(change), COMPARING_S + 7 if part.cuda else 1):
            add(part, grid, settings | change, seconds)
    settings = grid[best(grid)]["settings"]
    part.note("best", grid[best(grid)])
    for dtype, layout in (("bfloat16", "NHWC"), ("float16", "NHWC"), ("uint8", "NCHW")):
        if part.time_for(dtype, COMPARING_S if part.cuda else 1):
            add(part, {}, settings | {"dtype": dtype, "layout": layout}, seconds)
    compare(part, settings, seconds)
    part.note("training thread", reading_share(part, settings))


def add(part: Part, rows: dict[str, dict], settings: dict, seconds: float) -> None:
    name = ", ".join(f"{key} {value}" for key, value in settings.items())
    found = loader_rate(part.data(), seconds=seconds, device=part.device, **settings)
    rows[name] = found | {"settings": settings}
    part.note(name, rows[name])


def compare(part: Part, settings: dict, seconds: float) -> None:
    """In turns: the best settings, decoding alone by the same engines, DALI's defaults here and with its own reader."""
    manifest, device = part.data(), part.device
    device_id = device.index or 0 if part.cuda else None
    count, threads, load = settings["batch_size"], settings["num_threads"], settings["hw_decoder_load"]
    jpegs = some_jpegs(part, count)

    def decode_only() -> dict[str, float]:
        options = GraphOptions(224, device_id=device_id, num_threads=threads, prefetch=settings["prefetch"], hw_decoder_load=load)
        decoder = decode_pipeline(lambda i: [jpegs[i % len(jpegs)]], count, options)
        return rate(decoder.run, count, seconds, device, options.prefetch + 2)

    def reader(**options) -> dict[str, float]:
        batches = dali_reader(part, count, device_id, **options)
        return rate(lambda: next(batches), count, seconds, device, 10)

    defaults = settings | {"num_threads": cores(), "prefetch": DALI_PREFETCH, "hw_decoder_load": HW_DECODER_LOAD}
    ours = functools.partial(loader_rate, manifest, seconds=seconds, device=device)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "best": lambda: ours(**settings),
        "decode only": decode_only,
        "this loader at DALI's defaults": lambda: ours(**defaults),
        "DALI's own reader, its defaults": lambda: reader(threads=cores(), prefetch=DALI_PREFETCH, load=HW_DECODER_LOAD),
        "DALI's own reader, the best settings": lambda: reader(threads=threads, prefetch=settings["prefetch"], load=load),
        "without colours": lambda: ours(**settings, pca_jitter=0.0),
    }
    found = interleaved(ways, 1 if part.small or part.left_s < 40 else 2)
    for name, row in found.items():
        part.note(f"compared: {name}", row)
    mine = found["best"]["images_per_second"]
    part.note("of decode only", mine / found["decode only"]["images_per_second"])
    for name in list(found)[2:5]:
        part.note(f"times {name}", mine / found[name]["images_per_second"])


def dali_reader(
    part: Part, batch_size: int, device_id: int | None, threads: int, prefetch: int, load: float
) -> Iterator[torch.Tensor]:
    """DALI's TFRecord reader with its shuffle buffer on the same shards, the same crop and flip, normalised."""
    from nvidia.dali import fn, pipeline_def, tfrecord, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    folder = part.folder / "large"
    decoder = {"device": "cpu"} if device_id is None else {"device": "mixed", "hw_decoder_load": load}

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)
    def graph():
        read = fn.readers.tfrecord(
            path=sorted(map(str, folder.glob("train-*.tfrecord"))),
            index_path=sorted(map(str, folder.glob("train-*.idx"))),
            features={
                "image/encoded": tfrecord.FixedLenFeature((), tfrecord.string, ""),
                "image/class/label": tfrecord.FixedLenFeature([1], tfrecord.int64, -1),
            },
            random_shuffle=True,
        )
        images = fn.crop_mirror_normalize(
            fn.decoders.image(read["image/encoded"], output_type=types.RGB, **decoder),
            crop=(224, 224),
            crop_pos_x=fn.random.uniform(range=(0, 1)),
            crop_pos_y=fn.random.uniform(range=(0, 1)),
            mirror=fn.random.coin_flip(),
            mean=list(MEAN),
            std=list(DEVIATION),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return images, read["image/class/label"]

    for batch in DALIGenericIterator(graph(), ["images", "labels"], size=-1):  # -1: without end
        yield batch[0]["images"]


def reading_share(part: Part, settings: dict) -> dict[str, float]:
    """What of the training thread's time feeding the graph takes, at the loader's own pace, and for one image."""
    options = {name: value for name, value in settings.items() if name != "batch_size"}
    reading_s, steps = 0.0, 8 if part.small else 200
    with ImageLoader(part.data(), "train", settings["batch_size"], device=part.device, **options) as loader:
        batches = repeated(loader)
        for _ in range(loader.options.prefetch + 2):
            next(batches)
        start_s = time.perf_counter()
        for _ in range(steps):
            next(batches)
            reading_s += sum(seconds for name, _, seconds in loader.spans if name == "read")
        whole_s = time.perf_counter() - start_s
    images = steps * settings["batch_size"]
    return {"share that reads": reading_s / whole_s, "microseconds an image": 1e6 * reading_s / images}


def tune(part: Part) -> None:
    """`python -m pipeline tune` for as long as it has, and what its settings give beside the sweep's best, in turns."""
    from imagefeed.pipeline.tuner.saved import tuned_settings

    swept = part.earlier("loader").get("best")
    batch_size = swept["settings"]["batch_size"] if swept else 32 if part.small else 512
    seconds = 6.0 if part.small else 60.0
    os.environ["XDG_CACHE_HOME"] = str(part.folder / "tuned")
    command = [sys.executable, "-m", "pipeline", "tune", part.folder / "large", "--device", part.device.type]
    command += ["--batch-size", batch_size, "--seconds", seconds]
    start_s = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    part.note("seconds", time.perf_counter() - start_s)
    found = tuned_settings(part.data(), batch_size, device=part.device)
    part.note("settings", found)
    if swept:
        ours = functools.partial(loader_rate, part.data(), seconds=0.3 if part.small else 1.5, device=part.device)
        decoding = {name: value for name, value in found.items() if name != "cache"}  # the sweep had none
        ways = {"tuned": lambda: ours(batch_size, **decoding), "swept": lambda: ours(**swept["settings"])}
        rows = interleaved(ways, 2)
        part.note("rates", rows)
        part.note("of the sweep", rows["tuned"]["images_per_second"] / rows["swept"]["images_per_second"])
