"""Does imagefeed learn as a plain PyTorch loop does, from the same photos with the same net, and in what time?

    python -m benchmarks.learning RAW --folder WORK [--epochs 12] [--seeds 5]     # results under "learning-RAW"
    python -m benchmarks.learning cifar10.tar.gz --folder WORK --device cuda --size 72 --crop-size 64

RAW is a folder or tar of SPLIT/CLASS/IMAGE. The plain loop is what people write first: a DataLoader whose workers open the photos
with Pillow, rescale, crop, flip, jitter. On a CPU it trains for as many epochs as train.py by the same recipe; on a GPU for as
many seconds as train.py by the recipe "fast". Seconds include the validation after each epoch. On a CPU the first seeds run on
libjpeg-turbo's pixels too (`--decoder dali`), and must end with the same losses and weights to the bit. Each run is written to
WORK/runs when it ends, and is not run again.
"""

import functools
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import harness
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.alexnet import AlexNet
from imagefeed.model.step import keep_memory
from imagefeed.pipeline.arguments import choose_device
from imagefeed.training.reporting import read_metrics
from imagefeed.training.weights import read_weights

BIAS = 0.1  # with the paper's biases of 1 the loss may not leave ln(classes)
PLAIN = "plain DataLoader"
CPU_RECIPE = "--batch-size {batch} --lr {lr} --lr-milestones {last} --precision float32"
CPU_RECIPES = {"imagefeed": CPU_RECIPE, "imagefeed, libjpeg-turbo": f"{CPU_RECIPE} --decoder dali"}
CUDA_RECIPES = {
    "fast": "--recipe fast --batch-size {batch} --lr {lr} --warmup-epochs {warmup} --cache device",
    "paper-like": "--recipe paper --lr-milestones {first},{last} --precision bfloat16 --cache device",
}


class Photos(torch.utils.data.Dataset):
    """Photos of FOLDER/CLASS: shorter side to `size`, then a random or the center crop; float32 minus the mean, jittered."""

    def __init__(self, folder: Path, manifest: Manifest, size: int, crop_size: int, training: bool):
        self.samples = [
            (path, label) for label, name in enumerate(manifest.classes) for path in sorted((folder / name).iterdir())
        ]
        found = manifest.load_statistics()
        self.mean = torch.tensor(found["channel_mean"], dtype=torch.float32)[:, None, None]
        self.jitter = torch.tensor(0.1 * found["eigenvectors"] * np.sqrt(found["eigenvalues"]), dtype=torch.float32)
        self.size, self.crop_size, self.training = size, crop_size, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[at]
        image = Image.open(path).convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        room = (image.width - self.crop_size, image.height - self.crop_size)
        left, top = (int(torch.randint(side + 1, ())) if self.training else side // 2 for side in room)
        image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - self.mean
        if self.training:
            pixels += (self.jitter @ torch.randn(3))[:, None, None]
            pixels = pixels.flip(2) if torch.rand(()) < 0.5 else pixels
        return pixels, label


def train_plainly(photos: list[Photos], classes: int, batch: int, device: torch.device, share_over, lr_at, seed: int) -> dict:
    """Forward, backward and SGD at `lr_at(share)` until the `share_over(steps, seconds)` is 1. Channels-last, and on a GPU in
    bfloat16, as train.py."""
    keep_memory()  # the same settings of the allocator, worth a factor of two on a CPU
    torch.manual_seed(seed)
    options = {"num_workers": min(harness.cores(), 16), "pin_memory": device.type == "cuda"}
    training, validation = (
        torch.utils.data.DataLoader(part, batch, shuffle=part.training, drop_last=part.training, **options) for part in photos
    )
    net = AlexNet(classes, crop_size=photos[0].crop_size, bias=BIAS).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr_at(0.0), momentum=0.9, weight_decay=5e-4, fused=True)

    def scores(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return net(images).float()

    def validate() -> dict[str, float]:
        net.eval()
        with torch.inference_mode():
            found = [(scores(images).cpu(), labels) for images, labels in validation]
        net.train()
        logits, labels = map(torch.cat, zip(*found))
        hits = (logits.topk(min(5, classes)).indices == labels[:, None]).float()
        errors = {"top1_error": 100 * (1 - hits[:, 0].mean().item()), "top5_error": 100 * (1 - hits.sum(1).mean().item())}
        return errors | {"loss": F.cross_entropy(logits, labels).item()}

    start_s, steps, share, curve = time.monotonic(), 0, 0.0, []
    while share < 1:
        for images, labels in training:
            optimizer.param_groups[0]["lr"] = lr_at(share)
            loss = F.cross_entropy(scores(images), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if (share := share_over(steps, time.monotonic() - start_s)) >= 1:
                break
        curve.append(validate())
    errors = {name: curve[-1][name] for name in ("top1_error", "top5_error")}
    return errors | {"seconds": time.monotonic() - start_s, "epochs": steps / len(training), "curve": curve}


def train(dataset: Path, run_dir: Path, options: list[object]) -> dict:
    """train.py to its end."""
    command = [sys.executable, harness.ROOT / "train.py", dataset, "--run-dir", run_dir, "--bias", BIAS, "--compile", "off"]
    shutil.rmtree(run_dir, ignore_errors=True)  # a run that is over would not be run again
    start_s = time.perf_counter()
    subprocess.run(list(map(str, [*command, *options])), cwd=harness.ROOT, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((run_dir / "summary.json").read_text()) | {"wall_s": time.perf_counter() - start_s}
    lines = read_metrics(run_dir)
    epochs = [line for line in lines if "metrics/val/loss" in line]
    curve = [{name: line[f"metrics/val/{name}"] for name in ("top1_error", "top5_error", "loss")} for line in epochs]
    weights, _, _ = read_weights(run_dir)
    digest = hashlib.sha256(json.dumps([line["loss/train"] for line in lines]).encode())
    for name in sorted(weights):
        digest.update(weights[name].contiguous().cpu().numpy())
    shutil.rmtree(run_dir)  # its checkpoints are large
    found = {f"top{k}_error": summary["errors"]["center crop"][f"top{k}_error"] for k in (1, 5)}
    found["ten views, top1_error"] = summary["errors"]["ten views"]["top1_error"]
    found |= {name: summary[name] for name in ("seconds", "wall_s", "epochs", "data_wait_pct")}
    return found | {"curve": curve, "losses and weights": digest.hexdigest()[:16]}


def unpacked(raw: Path, folder: Path) -> Path:
    if raw.is_dir():
        return raw
    if not folder.exists():
        with tarfile.open(raw) as archive:
            archive.extractall(folder.with_suffix(".tmp"), filter="data")
        folder.with_suffix(".tmp").rename(folder)
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return inside[0] if len(inside) == 1 else folder


def means(runs: list[dict]) -> dict:
    """The mean of each figure over the seeds, and the runs themselves."""
    figures = [name for name, value in runs[0].items() if isinstance(value, float | int)]
    return {name: statistics.mean(run[name] for run in runs) for name in figures} | {"seeds": runs}


def once(path: Path, run: Callable[[], dict]) -> dict:
    """The result of `run`, from the file if an earlier process wrote it."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(run()))
        path.with_suffix(".tmp").rename(path)
    return json.loads(path.read_text())


@click.command()
@harness.RAW
@harness.FOLDER
@harness.DEVICE
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch-size", "batch", type=click.IntRange(1), show_default="32, on a GPU 512")
@click.option("--size", default=256, show_default=True, help="Pixels of the shorter side as stored.")
@click.option("--crop-size", default=224, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Runs of each.")
@click.option("--libjpeg-seeds", default=2, show_default=True, help="On a CPU, the runs to repeat on libjpeg-turbo's pixels.")
@harness.seconds_option(math.inf, "Budget; seeds that do not fit are left out.")
@click.option("--limit-batches", type=int, help="Steps per epoch, to check that everything runs.")
def main(
    raw: Path, folder: Path | None, device: str, epochs: int, batch: int | None, size: int, crop_size: int, seeds: int,
    libjpeg_seeds: int, seconds: float, limit_batches: int | None,
) -> None:  # fmt: skip
    """Train on RAW by train.py and by a plain loop."""
    device = choose_device(device)
    cuda = device.type == "cuda"
    batch, lr, last = batch or (512 if cuda else 32), 0.04 if cuda else 0.01, math.ceil(epochs * 0.8)
    values = {"batch": batch, "lr": lr, "first": math.ceil(epochs * 0.6), "last": last, "warmup": min(2, epochs / 4)}
    common = ["--device", device.type, "--crop-size", crop_size, "--epochs", epochs]
    common += ["--limit-batches", limit_batches] if limit_batches else []
    recipes = CUDA_RECIPES if cuda else CPU_RECIPES
    runs: dict[str, list[dict]] = {name: [] for name in (*recipes, PLAIN)}
    notes = harness.Notes(f"learning-{raw.name.partition('.')[0]}", "torch", seconds=seconds)
    with harness.working_folder(folder) as work:
        raw, dataset = unpacked(raw, work / "unpacked"), work / f"learning-{size}"
        harness.call("preprocess", "build", raw, dataset, "--size", size)
        manifest = Manifest.load(dataset)
        records = {split: manifest.split(split).records for split in (manifest.train_split, manifest.eval_split)}
        notes["dataset"] = f"{raw.name}: {records}, {len(manifest.classes)} classes"
        notes["options"] = values | {"epochs": epochs, "size": size, "crop_size": crop_size}
        photos = [Photos(raw / split, manifest, size, crop_size, split == manifest.train_split) for split in records]
        steps = epochs * (limit_batches or records[manifest.train_split] // batch)
        for seed in range(seeds):
            start_s = time.perf_counter()

            def share_over(done: int, spent_s: float) -> float:
                return spent_s / runs["fast"][-1]["seconds"] if cuda else done / steps

            def lr_at(share: float) -> float:
                cosine = (1 + math.cos(math.pi * share)) / 2 * min(1.0, share / 0.07 + 0.01)
                return lr * (cosine if cuda else 0.1 if share >= last / epochs else 1)

            ways: dict[str, Callable[[], dict]] = {}
            for name, recipe in recipes.items():
                options = [*common, *recipe.format(**values).split(), "--seed", seed]
                ways[name] = functools.partial(train, dataset, work / f"run-{name}-{seed}", options)
            plainly = (photos, len(manifest.classes), batch, device, share_over, lr_at, seed)
            ways[PLAIN] = functools.partial(train_plainly, *plainly)
            for name, way in ways.items():
                if seed < libjpeg_seeds or "libjpeg" not in name:
                    runs[name].append(once(work / "runs" / f"{harness.slug(name)}-{size}-{seed}.json", way))
                    notes[name] = means(runs[name])
            if notes.left_s < 1.1 * (time.perf_counter() - start_s):
                break
        if not cuda and libjpeg_seeds:
            pairs = list(zip(*(runs[name] for name in CPU_RECIPES)))
            equal = [ours["losses and weights"] == libjpeg["losses and weights"] for ours, libjpeg in pairs]
            notes["equal to the bit on libjpeg-turbo's pixels"] = f"{sum(equal)} of {len(equal)} seeds"


if __name__ == "__main__":
    main()
