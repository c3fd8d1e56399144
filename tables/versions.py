"""docs/versions.md: what changed between versions of the field's libraries, and what differs between libraries in training.

Pixels and orders are shown by a checksum of four digits: equal ones are equal bits.
"""

import json
import zlib

from tables import versions_loaders, versions_training
from tables.common import INPUTS, Page

page = Page("versions")


def checksum(array):
    import numpy as np

    data = array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes()
    return f"{zlib.crc32(data) & 0xFFFF:04x}"


def landscape(height=300, width=400):
    """(height, width, 3) uint8: waves, noise and an edge, the same in all versions of numpy."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    noise = (np.arange(height * width * 3, dtype=np.uint64) * 2654435761 % 4294967296 >> 26).reshape(height, width, 3)
    waves = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    pixels = (waves * 3 // 4 + noise.astype(int)) % 256
    pixels[(x > width // 2) & (y < height // 2)] = (230, 40, 20)
    return pixels.astype(np.uint8)


def versions(name, package, numbers, rows, *others):
    """Decorates a function that returns a cell for each of `rows`, run with each version of the package."""
    table = page.table(name, [package], rows)

    def register(run):
        for number in numbers:
            table.add(number, [f"{package}=={number}", *others])(lambda number=number: run(number))
        return run

    return register


PILLOW = [
    "decode of a 4:2:0 JPEG",
    "resize to 100x75, bicubic",
    "resize of 16-bit gray (I;16) of 0 and 65535, bicubic",
    "bytes of a JPEG, quality 90",
]
PILLOW += ["bytes of a lossless WebP"]


@versions("pillow", "pillow", ["11.1.0", "12.1.1", "13.0.0"], PILLOW, "numpy==2.4.6")
def pillow(number):
    import io

    import numpy as np
    from PIL import Image

    image = Image.fromarray(landscape())

    def saved(format, **options):
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    jpeg = saved("JPEG", quality=90, subsampling=2)
    y, x = np.mgrid[:300, :400]
    edges = Image.fromarray(np.where((x // 7 + y // 5) % 2, 65535, 0).astype(np.uint16))
    large = edges.resize((777, 601), Image.Resampling.BICUBIC)
    small = image.resize((100, 75), Image.Resampling.BICUBIC)
    return [checksum(each) for each in (Image.open(io.BytesIO(jpeg)), small, large, jpeg, saved("WEBP", lossless=True))]


OPENCV = [
    "decode of a JPEG (imdecode)",
    "resize to 100x75, INTER_AREA",
    "resize to 777x601, INTER_CUBIC",
    "warpAffine, INTER_LINEAR",
]
OPENCV += ["warpAffine, INTER_NEAREST", "warpAffine, INTER_LANCZOS4", "remap, INTER_CUBIC", "shape of calcHist"]


@versions("opencv", "opencv-python-headless", ["4.11.0.86", "4.14.0.94", "5.0.0.93"], OPENCV, "numpy==2.2.6")
def opencv(number):
    import cv2
    import numpy as np

    image = landscape()
    matrix = cv2.getRotationMatrix2D((200, 150), 17, 0.9)
    y, x = np.mgrid[:300, :400].astype(np.float32)
    jpeg = cv2.imencode(".jpg", image)[1]
    warped = [
        cv2.warpAffine(image, matrix, (400, 300), flags=flag)
        for flag in (cv2.INTER_LINEAR, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4)
    ]
    made = [
        cv2.imdecode(jpeg, 1),
        cv2.resize(image, (100, 75), interpolation=cv2.INTER_AREA),
        cv2.resize(image, (777, 601), interpolation=cv2.INTER_CUBIC),
        *warped,
        cv2.remap(image, x * 0.9 + 3.3, y * 0.9 + 5.7, cv2.INTER_CUBIC),
    ]
    return [*map(checksum, made), cv2.calcHist([image], [0], None, [256], [0, 256]).shape]


DUCKDB = ["hash('n01440764')", "share of md5_number(name) % 10 = 0", "share of md5_number(name) % 10 < 1"]
DUCKDB += ["first rows of USING SAMPLE reservoir(5 ROWS) REPEATABLE (1)", "setseed(0.5); random()"]


@versions("duckdb", "duckdb", ["1.1.3", "1.2.2", "1.3.2", "2.0.0"], DUCKDB)
def duckdb(number):
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET threads = 1")

    def one(query):
        return connection.execute(query).fetchall()

    names = "SELECT 'image' || range AS name FROM range(10000)"
    shares = [one(f"SELECT avg((md5_number(name) % 10 {test})::INT) FROM ({names})")[0][0] for test in ("= 0", "< 1")]
    sample = one("SELECT range FROM range(10000) USING SAMPLE reservoir(5 ROWS) REPEATABLE (1)")
    one("SELECT setseed(0.5)")
    draw = one("SELECT random()")[0][0]
    return [
        one("SELECT hash('n01440764')")[0][0],
        *(f"{share:.1%}" for share in shares),
        ", ".join(str(row[0]) for row in sample),
        f"{draw:.4f}",
    ]


DATASETS = ["first 8 of a shuffled stream of 4 shards of 10, buffer 4", "shards among them", "first 8 of the next epoch"]
DATASETS += ["map-style shuffle(seed=0), first 8", "a state of 4.8.5 after 10 records, resumed"]


@versions("datasets", "datasets", ["3.2.0", "4.8.5", "5.2.0"], DATASETS, "numpy==2.4.6")
def datasets(number):
    import datasets

    whole = datasets.Dataset.from_dict({"n": list(range(40))})

    def stream():
        return whole.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=4)

    def first(rows, count=8):
        return [row["n"] for _, row in zip(range(count), rows)]

    epoch, later, kept = first(stream()), stream(), INPUTS / "datasets.json"
    later.set_epoch(1)
    resumed = stream()
    if number == "4.8.5":
        state = stream()
        begun = iter(state)
        first(begun, 10)
        kept.write_text(json.dumps(state.state_dict()))
    try:
        resumed.load_state_dict(json.loads(kept.read_text()))
        rest = first(resumed, 40)
        went_on = f"goes on with {', '.join(map(str, rest[:4]))}, {len(rest)} records"
    except FileNotFoundError:
        went_on = "-"
    except Exception as error:
        went_on = f"{type(error).__name__}: {error}"
    shown = [", ".join(map(str, order)) for order in (epoch, first(later), first(whole.shuffle(seed=0)))]
    return [shown[0], len({n // 10 for n in epoch}), shown[1], shown[2], went_on]


NUMPY = ["default_rng(0): integers, normal, permutation, choice", "RandomState(0): the same", "argsort of float32 with ties"]
NUMPY += ["dtype of fft of float32", "dtype of float32 array * np.float64(2)"]


@versions("numpy", "numpy", ["1.26.4", "2.2.6", "2.4.6"], NUMPY)
def numpy(number):
    import numpy as np

    def draws(rng, integers):
        return checksum(b"".join(np.asarray(each).tobytes() for each in (
            integers(0, 2**31, 99), rng.normal(size=99), rng.permutation(99), rng.choice(99, 20, replace=False),
        )))  # fmt: skip

    old = np.random.RandomState(0)
    ties = (np.arange(1000) * 7919 % 13).astype(np.float32)
    rng = np.random.default_rng(0)
    return [
        draws(rng, rng.integers),
        draws(old, old.randint),
        checksum(ties.argsort()),
        np.fft.fft(ties).dtype,
        (ties * np.float64(2)).dtype,
    ]


page.tables += [*versions_loaders.tables, versions_training.optimizers, versions_training.ties]
