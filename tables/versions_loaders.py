"""The tables of docs/versions.md about loaders and augmentations."""

from tables.common import IMAGEFEED, INPUTS, Table

NUMPY = "numpy==2.4.6"
tables = []


def versions(name, package, rows, environments):
    """Decorates a function of the version that returns a cell for each of `rows`."""
    table = Table(name, [package], rows)
    tables.append(table)

    def register(run):
        for number, packages in environments.items():
            table.add(number, packages)(lambda number=number: run(number))
        return run

    return register


def joined(values):
    return ", ".join(map(str, values))


# 1.53.0 is that of CUDA 12, without the libraries of a GPU. Its CPU part is the same.
OLD_DALI = [
    "six==1.17.0", "astunparse==1.6.3", "gast==0.6.0", "packaging==25.0", "dm-tree==0.1.9", "makefun==1.16.0", NUMPY,
    "--no-deps nvidia-dali-cuda120==1.53.0 nvidia-nvimgcodec-cu12==0.7.0.11 nvtx==0.2.13",
]  # fmt: skip
DALI = ["random.uniform, seed 1", "random_resized_crop of a ramp, seed 1", "resize, rotate, color_twist"]
DALI += ["readers.file, random_shuffle, seed 1, first 8 of 40", "readers.file, shuffle_after_epoch, second epoch, first 8 of 40"]


@versions("dali", "DALI, CPU", DALI, {"1.53.0": OLD_DALI, "2.4.0": [IMAGEFEED]})
def dali(number):
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    from tables.versions import checksum, landscape

    files = [INPUTS / "dali" / f"{n:02d}" for n in range(40)]
    files[0].parent.mkdir(exist_ok=True)
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]))
    options = {"batch_size": 8, "num_threads": 1, "device_id": None, "seed": 1}

    def run(make, times=1):
        pipe = pipeline_def(**options)(make)()
        pipe.build()
        return [np.stack([np.array(each) for each in pipe.run()[0]]) for _ in range(times)]

    def image():
        return fn.external_source([[landscape()] * 8], batch=True, cycle=True, layout="HWC")

    def ops():
        turned = fn.rotate(fn.resize(image(), resize_x=100, resize_y=75), angle=17, size=(75, 100))
        return fn.color_twist(turned, hue=30, saturation=1.2, brightness=0.9, contrast=1.1)

    def read(**shuffle):
        return lambda: fn.readers.file(files=[str(file) for file in files], labels=list(range(40)), seed=1, **shuffle)[0]

    return [
        joined(f"{value:.3f}" for value in run(lambda: fn.random.uniform(range=[0.0, 1.0], seed=1))[0].ravel()[:4]),
        checksum(run(lambda: fn.random_resized_crop(image(), size=(64, 64), seed=1))[0]),
        checksum(run(ops)[0]),
        joined(run(read(random_shuffle=True))[0].ravel()),
        joined(run(read(shuffle_after_epoch=True), 6)[5].ravel()),
    ]


LITDATA = ["first 8 of 4 chunks of 500, shuffle=True", "largest less smallest number among the first 200"]
LITDATA += ["records lost by resuming 0.2.37's state after 36 of 2,000", "records read twice"]
LITDATA_NUMBERS = {n: [IMAGEFEED, f"litdata=={n}"] for n in ("0.2.37", "0.2.68", "0.2.76")}


@versions("litdata", "LitData", LITDATA, LITDATA_NUMBERS)
def litdata(number):
    import json
    import shutil

    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    folder = INPUTS / "litdata"  # written by the first, read by all
    if number == "0.2.37":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cache = Cache(str(folder), chunk_size=500)
        for n in range(2000):
            cache[n] = n
        cache.done()
        cache.merge()
    order = list(StreamingDataset(str(folder), shuffle=True, seed=1))

    def loader():
        return StreamingDataLoader(StreamingDataset(str(folder), shuffle=True, seed=1), batch_size=4, num_workers=0)

    whole = [int(n) for batch in loader() for n in batch]
    kept, begun = INPUTS / "litdata.json", loader()
    if number == "0.2.37":
        for count, _ in enumerate(begun, 1):
            if count == 9:
                break
        kept.write_text(json.dumps([whole[:36], begun.state_dict()]))
    seen, state = json.loads(kept.read_text())
    resumed = loader()
    try:
        resumed.load_state_dict(state)
        rest = [int(n) for batch in resumed for n in batch]
        outcome = [len(set(range(2000)) - set(seen) - set(rest)), len(set(seen) & set(rest))]
    except Exception as error:
        outcome = [type(error).__name__, "-"]
    return [joined(order[:8]), max(order[:200]) - min(order[:200]), *outcome]


ALBUMENTATIONS = ["RandomResizedCrop, seed 0", "CoarseDropout, seed 0"]
ALBUMENTATIONS += ["RandomBrightnessContrast: brightness_by_max", "GaussNoise: per_channel", "Affine: keep_ratio"]
OPENCV = "opencv-python-headless==4.11.0.86"
ALBUMENTATIONS_NUMBERS = {
    "albumentations 2.0.8": ["albumentations==2.0.8", NUMPY, OPENCV],
    "albumentationsx 2.5.1": [IMAGEFEED, "albumentationsx==2.5.1", OPENCV],
}


@versions("albumentations", "albumentations", ALBUMENTATIONS, ALBUMENTATIONS_NUMBERS)
def albumentations(number):
    import inspect

    import albumentations

    from tables.versions import checksum, landscape

    def made(*transforms):
        return checksum(albumentations.Compose(transforms, seed=0)(image=landscape())["image"])

    def default(of, name):
        found = inspect.signature(of.__init__).parameters.get(name)
        return found.default if found else "no such option"

    return [
        made(albumentations.RandomResizedCrop((64, 64), p=1)),
        made(albumentations.CoarseDropout(p=1)),
        default(albumentations.RandomBrightnessContrast, "brightness_by_max"),
        default(albumentations.GaussNoise, "per_channel"),
        default(albumentations.Affine, "keep_ratio"),
    ]
