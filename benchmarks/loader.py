"""How fast is the input pipeline on CPUs beside its peers and its limit? Two workers or threads each, interleaved in one run.

    python -m benchmarks.loader DATASET [--rounds 5] [--peers PYTHON]     # results under "loader"

DATASET is a built one of 256x256 images (of 1,000 ImageNet JPEGs, say). Every row makes batches of 128 crops of 224x224 pixels,
random crop and flip; float32 is normalised too. The rows:

    decode only               the same engine, whole images from memory, nothing else: the limit of all that decodes each time
    float32, uint8            this loader: exact order, checksums, and for float32 the colour jitter, all on
    ... cached                the same from the second epoch on, with every decoded image in memory (cache="host")
    DALI                      its own TFRecord reader with its shuffle buffer, on the same shards
    FFCV float32, FFCV uint8  JPEG mode, quality 90, made from the same pixels, random order, the page cache; channels last
    DataLoader, ...           PyTorch's, on a folder of the same JPEGs, with three decoders
    WebDataset                on tar files of the same JPEGs
    LitData                   on its chunks of the same JPEGs, decoded by torchvision
    Streaming                 MosaicML's, on its shards of the same JPEGs, decoded by Pillow
    SPDL float32, uint8       threads, on a folder; decoded and cropped by FFmpeg
    SPDL, simplejpeg          its threads with another decoder

Each row is a process of loader_peers.py, which stands still (SIGSTOP) while another is measured: what it would prepare in the
meantime costs the others nothing. Rows whose package is missing are left out. The peers run in a Python of their own, because
plain Pillow cannot live beside Pillow-SIMD: --peers names one, as peers.py makes it.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click

from benchmarks import ROOT, save
from benchmarks.loader_images import BATCH_SIZE, WARM_UP, WORKERS
from benchmarks.peers import left_out as not_installed
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader

OURS = ("decode only", "float32", "uint8", "float32, cached", "uint8, cached", "DALI")  # run in this Python
PEERS = (
    "FFCV float32",
    "FFCV uint8",
    "DataLoader, Pillow",
    "DataLoader, simplejpeg",
    "DataLoader, torchcodec",
    "WebDataset",
    "LitData",
    "Streaming",
    "SPDL float32",
    "SPDL uint8",
    "SPDL, simplejpeg",
)
COMPARED = ("float32", "uint8")  # by these the others are divided
TAR_FILES = 16
END_S = 10  # so long a row may take to end


class Row:
    """One of loader_peers' rows, in a process group of its own, stopped but when it is measured."""

    def __init__(self, python: str, name: str, dataset: Path, work: Path):
        self.name = name
        self.errors = work / f"{name}.txt"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.loader_peers", name, dataset, work],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Not a session of its own: should this process be killed, the kernel then ends the stopped ones too.
                process_group=0,
            )
        self.about = self._read()
        self._signal(signal.SIGSTOP)

    def rate(self, steps: int) -> float:
        """Images per second over `steps` batches."""
        self._signal(signal.SIGCONT)
        self.process.stdin.write(f"go {steps}\n")
        self.process.stdin.flush()
        measured = self._read()
        self._signal(signal.SIGSTOP)
        return measured["images"] / measured["seconds"]

    def close(self) -> None:
        """Ends it: by itself, at the end of its input, for a killed DataLoader leaves what its workers share in memory."""
        self._signal(signal.SIGCONT)
        try:
            self.process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.communicate()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"row {self.name} ended:\n{self.errors.read_text()[-3000:]}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def unpack(dataset: Path, work: Path) -> None:
    """The train split's JPEGs as WORK/jpegs/LABEL/ID.jpg, and in WORK/tars as WebDataset wants them."""
    manifest = Manifest.load(dataset)
    records = RecordReader(manifest, manifest.train_split)
    (work / "tars").mkdir()
    tars = [tarfile.open(work / "tars" / f"{number:03d}.tar", "w") for number in range(TAR_FILES)]
    for record_id, label in enumerate(records.labels.tolist()):
        path = work / "jpegs" / str(label) / f"{record_id:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(records.jpeg(record_id))
        path.with_suffix(".cls").write_text(str(label))
        for file in (path, path.with_suffix(".cls")):
            tars[record_id % TAR_FILES].add(file, file.name)
    for tar in tars:
        tar.close()


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
@click.option("--peers", default=sys.executable, help="Python with the peers.")
@click.option("--images", default=4096, show_default=True, help="Images of a row in a round.")
def main(dataset: Path, rounds: int, peers: str, images: int) -> None:
    """Time the loader and its peers on DATASET."""
    rows: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    versions: dict[str, str] = {}
    how: dict[str, str] = {}
    reasons = not_installed(peers)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        unpack(dataset, work)
        try:
            for name in OURS + PEERS:
                row = rows[name] = Row(sys.executable if name in OURS else peers, name, dataset.resolve(), work)
                versions |= row.about.get("versions", {})
                how[name] = row.about.get("how", "")
                if "missing" in row.about:
                    package = row.about["missing"].rpartition("No module named ")[2].strip("'")
                    left_out[name] = reasons.get(package, row.about["missing"])
                    print(f"{name} is left out: {left_out[name]}", flush=True)
                    rows.pop(name).close()
            rates: dict[str, list[float]] = {name: [] for name in rows}
            for number in range(rounds + 1):
                for name, row in rows.items():
                    rate = row.rate(max(1, images // BATCH_SIZE))
                    if number:  # the first round fills caches
                        rates[name].append(rate)
                    print(f"round {number}: {name} {rate:,.0f} images/s", flush=True)
        finally:
            for row in rows.values():
                row.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Ratios within a round, because the machine's speed drifts between rounds.
    ratios = {
        f"{mine} / {name}": statistics.median(a / b for a, b in zip(rates[mine], rates[name], strict=True))
        for mine in COMPARED
        for name in rows
        if name != mine
    }
    result = {
        "workers": WORKERS,
        "batch_size": BATCH_SIZE,
        "images": max(1, images // BATCH_SIZE) * BATCH_SIZE,
        "warm_up_batches": WARM_UP,
        "rounds": rounds,
        "peers": versions,
        "left_out": left_out,
        "how": {name: how[name] for name in rates},
        "images_per_second": rates,
        "median": medians,
        "ratio": ratios,
    }
    save("loader", result, "numpy", "torch", "nvidia-dali-cuda130")
    print(f"{'images per second':<26}{'median':>8}   " + "".join(f"{mine + ' is':>16}" for mine in COMPARED))
    for name, rate in medians.items():
        shares = "".join(f"{ratios.get(f'{mine} / {name}', 1):>10.2f} times" for mine in COMPARED)
        print(f"{name:<26}{rate:>8,.0f}   {shares}")


if __name__ == "__main__":
    main()
