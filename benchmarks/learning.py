"""Does imagefeed learn as a plain PyTorch loop does, from the same photos with the same net, and in what time?

    python -m benchmarks.learning RAW --folder WORK [--epochs 12]            # results under "learning-RAW"
    python -m benchmarks.learning cifar10.tar.gz --folder WORK --device cuda --size 72 --crop-size 64

RAW is a folder or tar of SPLIT/CLASS/IMAGE. The plain loop is what people write first: a DataLoader whose workers open the photos
with Pillow, rescale, crop, flip, jitter. On a CPU it trains for as many epochs as train.py by the same recipe; on a GPU for as
many seconds as train.py by the recipe "fast". Our seconds include the validation after each epoch, the plain loop's do not.
"""

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
from imagefeed.pipeline.loader import choose_device

BIAS = 0.1  # with the paper's biases of 1 the loss may not leave ln(classes)
CPU_RECIPES = {"imagefeed": "--batch-size {batch} --lr {lr} --lr-milestones {last} --precision float32"}
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


def train_plainly(
    photos: list[Photos],
    classes: int,
    batch_size: int,
    device: torch.device,
    share_over: Callable[[int, float], float],
    lr_at: Callable[[float], float],
    seed: int,
) -> dict[str, float]:
    """Forward, backward and SGD until `share_over(steps, seconds)` is 1. On a GPU in bfloat16, and channels-last as train.py."""
    keep_memory()  # the same settings of the allocator, worth a factor of two on a CPU
    torch.manual_seed(seed)
    cuda = device.type == "cuda"
    options = {"num_workers": min(harness.cores(), 16), "pin_memory": cuda}
    training, validation = (
        torch.utils.data.DataLoader(part, batch_size, shuffle=part.training, drop_last=part.training, **options)
        for part in photos
    )
    net = AlexNet(classes, crop_size=photos[0].crop_size, bias=BIAS).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr_at(0.0), momentum=0.9, weight_decay=5e-4, fused=True)

    def scores(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return net(images).float()

    start_s, steps, share = time.monotonic(), 0, 0.0
    while share < 1:
        for images, labels in training:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(share)
            loss = F.cross_entropy(scores(images), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            share = share_over(steps, time.monotonic() - start_s)
            if share >= 1:
                break
    seconds = time.monotonic() - start_s
    net.eval()
    with torch.inference_mode():
        hits = [scores(images).topk(min(5, classes)).indices.cpu() == labels[:, None] for images, labels in validation]
    found = torch.cat(hits).float()
    errors = {"top1_error": 100 * (1 - found[:, 0].mean().item()), "top5_error": 100 * (1 - found.sum(1).mean().item())}
    return errors | {"seconds": seconds, "epochs": steps / len(training)}


def train(dataset: Path, run_dir: Path, options: list[object]) -> dict[str, float]:
    """train.py to its end; a run that is over already is read."""
    command = [sys.executable, harness.ROOT / "train.py", dataset, "--run-dir", run_dir, "--bias", BIAS, "--compile", "off"]
    start_s = time.perf_counter()
    subprocess.run(list(map(str, [*command, *options])), cwd=harness.ROOT, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - start_s
    summary = json.loads((run_dir / "summary.json").read_text())
    shutil.rmtree(run_dir)  # its checkpoints are large
    found = {f"top{k}_error": summary["errors"]["center crop"][f"top{k}_error"] for k in (1, 5)}
    found |= {"ten views, top1_error": summary["errors"]["ten views"]["top1_error"], "seconds": summary["seconds"]}
    return found | {"wall s": wall_s, "epochs": summary["epochs"], "data_wait_pct": summary["data_wait_pct"]}


def unpacked(raw: Path, folder: Path) -> Path:
    if raw.is_dir():
        return raw
    if not folder.exists():
        with tarfile.open(raw) as archive:
            archive.extractall(folder.with_suffix(".tmp"), filter="data")
        folder.with_suffix(".tmp").rename(folder)
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return inside[0] if len(inside) == 1 else folder


@click.command()
@harness.RAW
@harness.FOLDER
@harness.DEVICE
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), show_default="32, on a GPU 512")
@click.option("--size", default=256, show_default=True, help="Pixels of the shorter side as stored.")
@click.option("--crop-size", default=224, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Runs of each.")
@harness.seconds_option(math.inf, "Budget; seeds that do not fit are left out.")
@click.option("--limit-batches", type=int, help="Steps per epoch, to check that everything runs.")
def main(
    raw: Path, folder: Path | None, device: str, epochs: int, batch_size: int | None, size: int, crop_size: int,
    seeds: int, seconds: float, limit_batches: int | None,
) -> None:  # fmt: skip
    """Train on RAW by train.py and by a plain loop."""
    chosen = choose_device(device)
    cuda = chosen.type == "cuda"
    batch_size, lr = batch_size or (512 if cuda else 32), 0.04 if cuda else 0.01
    first, last, warmup = max(1, int(epochs * 0.7)), max(2 if epochs > 1 else 1, int(epochs * 0.8)), min(2, epochs / 4)
    values = {"batch": batch_size, "lr": lr, "first": first, "last": last, "warmup": warmup}
    common = ["--device", chosen.type, "--crop-size", crop_size, "--epochs", epochs]
    common += ["--limit-batches", limit_batches] if limit_batches else []
    recipes = CUDA_RECIPES if cuda else CPU_RECIPES
    found: dict[str, list[dict]] = {name: [] for name in (*recipes, "plain DataLoader")}
    notes = harness.Notes(f"learning-{raw.name.partition('.')[0]}", "torch", seconds=seconds)
    with harness.working_folder(folder) as work:
        raw, dataset = unpacked(raw, work / "unpacked"), work / f"learning-{size}"
        harness.call("preprocess", "build", raw, dataset, "--size", size)
        manifest = Manifest.load(dataset)
        splits = {True: manifest.train_split, False: manifest.eval_split}
        counts = f"{manifest.split(splits[True]).records} for training, {manifest.split(splits[False]).records} for validation"
        notes["dataset"] = f"{raw.name}: {counts}, {len(manifest.classes)} classes"
        notes["options"] = values | {"epochs": epochs, "size": size, "crop_size": crop_size}
        steps = limit_batches or manifest.split(splits[True]).records // batch_size
        for seed in range(seeds):
            start_s = time.perf_counter()
            for name, recipe in recipes.items():
                options = [*common, *recipe.format(**values).split(), "--seed", seed]
                found[name].append(train(dataset, work / f"run-{name}-{seed}", options))
                notes[name] = means(found[name])
            photos = [Photos(raw / split, manifest, size, crop_size, training) for training, split in splits.items()]
            if cuda:
                limit_s = found["fast"][-1]["seconds"]
                schedule = (
                    lambda _, spent_s, limit_s=limit_s: spent_s / limit_s,
                    lambda share: lr * (1 + math.cos(math.pi * share)) / 2 * min(1.0, share / 0.07 + 0.01),
                )
            else:
                schedule = lambda done, _: done / (epochs * steps), lambda share: lr * (0.1 if share >= last / epochs else 1)
            found["plain DataLoader"].append(train_plainly(photos, len(manifest.classes), batch_size, chosen, *schedule, seed))
            notes["plain DataLoader"] = means(found["plain DataLoader"])
            if notes.left_s < 1.1 * (time.perf_counter() - start_s):
                break


def means(runs: list[dict[str, float]]) -> dict:
    """The mean of each figure over the seeds, and the runs themselves."""
    return {name: statistics.mean(run[name] for run in runs) for name in runs[0]} | {"seeds": runs}


if __name__ == "__main__":
    main()
