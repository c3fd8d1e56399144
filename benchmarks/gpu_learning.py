"""Part "learning" of gpu.py: CIFAR-10 from JPEG files, trained to the end by two recipes, beside a plain PyTorch loop."""

import json
import math
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import ROOT
from benchmarks.gpu_work import Part, cores
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.nets import build_net

STORED, SIZE = 72, 64  # the smallest crops that AlexNet takes are 64 pixels
NET, BIAS = "alexnet", 0.1  # with the paper's biases of 1 the loss may not leave ln(10)
RECIPES = {
    "fast": f"--recipe fast --batch-size 512 --lr 0.04 --warmup-epochs 2 --model {NET} --bias {BIAS}",
    "paper-like": f"--recipe paper --lr-milestones {{a}},{{b}} --precision bfloat16 --model {NET} --bias {BIAS}",
}
BATCH_SIZE, LR = 512, 0.04  # of the plain loop, those of "fast"


def measure(part: Part) -> None:
    raw = images(part)
    start_s = time.perf_counter()
    out = part.folder / "small-images"
    if not (out / "dataset.json").exists():
        call("-m", "preprocess", "build", raw, out, "--size", STORED, log=part.folder / "learning-build.txt")
    manifest = Manifest.load(out)
    counts = {name: split.records for name, split in manifest.splits.items()}
    part.note(
        "images", {"from": raw.name, **counts, "classes": len(manifest.classes), "built in s": time.perf_counter() - start_s}
    )
    epochs = 1 if part.small else 15
    for seed in range(3):
        for name in RECIPES:
            row = f"{name}, seed {seed}"
            needed_s = part.notes[f"{name}, seed 0"]["wall s"] * 1.1 if seed else 5
            if part.time_for(row, 1 if part.small else needed_s):
                part.note(row, train(part, out, name, epochs, seed))
            if row == "fast, seed 0":
                part.note("plain loop, seed 0", train_plainly(part, raw, manifest, part.notes[row]["seconds"]))
        if part.small:
            break


def images(part: Part) -> Path:
    """CIFAR-10 as folders where it was given, else the drawn pictures; some of each class for a small run."""
    raw = (part.folder / "cifar").resolve() if (part.folder / "cifar").exists() else (part.folder / "raw").resolve()
    if raw.is_file():
        unpacked = part.folder / "cifar-files"
        if not unpacked.exists():
            with tarfile.open(raw) as archive:
                archive.extractall(unpacked.with_suffix(".tmp"), filter="data")
            unpacked.with_suffix(".tmp").rename(unpacked)
        inside = [path for path in unpacked.iterdir() if path.is_dir()]
        raw = inside[0] if len(inside) == 1 else unpacked
    if not part.small:
        return raw
    few = part.folder / "few"
    shutil.rmtree(few, ignore_errors=True)
    for folder in raw.glob("*/*"):
        (few / folder.relative_to(raw)).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:20]:
            (few / path.relative_to(raw)).symlink_to(path)
    return few


def call(*arguments: object, log: Path) -> None:
    """Runs Python with its output in `log`; raises RuntimeError with the last line of it where it fails."""
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = log.read_text().strip().splitlines() or ["no output"]
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {lines[-1][:200]}")


def train(part: Part, out: Path, recipe: str, epochs: int, seed: int) -> dict[str, object]:
    """train.py to the end; the errors are in percent, with all that its summary says of the time."""
    run_dir = part.folder / "runs" / f"{recipe}-{seed}"
    options = RECIPES[recipe].format(a=max(int(epochs * 0.7), 1), b=max(int(epochs * 0.9), 2)).split()
    if part.small:
        options += ["--limit-batches", "2", "--batch-size", "16"]
    options += [
        "--crop-size",
        SIZE,
        "--epochs",
        epochs,
        "--seed",
        seed,
        "--device",
        part.device.type,
        "--compile",
        "off",
        "--run-dir",
        run_dir,
    ]
    if part.small and recipe == "fast":
        options[options.index("--warmup-epochs") + 1] = "0"
    if part.cuda:
        options += ["--cache", "device"]
    start_s = time.perf_counter()
    call("train.py", out, *options, log=part.folder / f"learning-{recipe}-{seed}.txt")
    wall_s = time.perf_counter() - start_s
    summary = json.loads((run_dir / "summary.json").read_text())
    shutil.rmtree(run_dir)  # its checkpoints are large
    kept = {name: value for name, value in summary.items() if isinstance(value, float | int | dict) and name != "recipe"}
    return {"wall s": wall_s, "epochs": epochs} | kept


class Files(torch.utils.data.Dataset):
    """RAW/SPLIT/CLASS/IMAGE opened by Pillow, enlarged, cropped at random and flipped, or the centre; uint8 (3, SIZE, SIZE)."""

    def __init__(self, folder: Path, classes: tuple[str, ...], training: bool):
        self.samples = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
        self.training = training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        path, label = self.samples[at]
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((STORED, STORED), Image.Resampling.BICUBIC))
        room = STORED - SIZE
        top, left = np.random.randint(0, room + 1, 2) if self.training else (room // 2, room // 2)
        pixels = pixels[top : top + SIZE, left : left + SIZE]
        if self.training and np.random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), label


def train_plainly(part: Part, raw: Path, manifest: Manifest, seconds: float) -> dict[str, object]:
    """What people write first, with the same net, batch and optimizer as "fast", for as many seconds; its learning rate falls by
    the share of them that is over."""
    torch.manual_seed(0)
    splits = {True: manifest.train_split, False: manifest.eval_split}
    folders = {training: Files(raw / split, manifest.classes, training) for training, split in splits.items()}
    batch_size = 16 if part.small else BATCH_SIZE
    workers = min(cores(), 16)
    options = {"num_workers": workers, "pin_memory": part.cuda}
    batches = torch.utils.data.DataLoader(
        folders[True], batch_size, shuffle=True, drop_last=True, persistent_workers=True, **options
    )
    net = build_net(NET, len(manifest.classes), crop_size=SIZE, bias=BIAS).to(part.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=5e-4, fused=True)
    mean = torch.tensor(manifest.load_statistics()["channel_mean"], dtype=torch.float32, device=part.device)[:, None, None]

    def prepared(pixels: torch.Tensor) -> torch.Tensor:
        floats = pixels.to(part.device, non_blocking=True).float() - mean
        return floats.contiguous(memory_format=torch.channels_last)

    start_s, steps = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        for pixels, labels in batches:
            share = min((time.perf_counter() - start_s) / seconds, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * share)) / 2 * min(1.0, share / 0.07 + 0.01)
            with torch.autocast(part.device.type, torch.bfloat16):
                loss = F.cross_entropy(net(prepared(pixels)).float(), labels.to(part.device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if share >= 1 or (part.small and steps > 4):
                break
        if part.small:
            break
    spent_s = time.perf_counter() - start_s
    net.eval()
    hits = []
    with torch.inference_mode(), torch.autocast(part.device.type, torch.bfloat16):
        for pixels, labels in torch.utils.data.DataLoader(folders[False], batch_size, **options):
            hits.append((net(prepared(pixels)).argmax(1).cpu() == labels).float())
    images_seen = steps * batch_size
    return {
        "seconds": spent_s,
        "epochs": images_seen / len(folders[True]),
        "images_per_second": images_seen / spent_s,
        "errors": {"centre crop": {"top1_error": 100 * (1 - torch.cat(hits).mean().item())}},
        "workers": workers,
    }
