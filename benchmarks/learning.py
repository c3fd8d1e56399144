"""Does imagefeed learn as a plain PyTorch loop does? The same net, recipe and number of epochs on the same photos.

    python -m benchmarks.learning RAW DATASET --epochs 15     # results under "learning-NAME"

RAW is the raw tree that DATASET was built from. The plain loop is what people write first: a torch DataLoader whose workers
open the raw photos with Pillow, rescale, crop, flip, jitter. The two run one after the other. Ours counts
the validation images after each epoch in its seconds, the plain loop does not.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import ROOT, save
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.alexnet import AlexNet
from imagefeed.model.step import keep_memory


class Photos(torch.utils.data.Dataset):
    """Photos of RAW/SPLIT/CLASS: shorter side to 256, then a random or the centre crop of 224."""

    def __init__(self, folder: Path, classes: tuple[str, ...], statistics: dict[str, np.ndarray], training: bool):
        self.samples = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
        self.mean = torch.tensor(statistics["channel_mean"], dtype=torch.float32)[:, None, None]
        deviations = np.sqrt(statistics["eigenvalues"])
        self.jitter = torch.tensor(0.1 * statistics["eigenvectors"] * deviations, dtype=torch.float32)
        self.training = training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[at]
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        room = (image.width - 224, image.height - 224)
        left, top = (int(torch.randint(side + 1, ())) if self.training else side // 2 for side in room)
        image = image.crop((left, top, left + 224, top + 224))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - self.mean
        if self.training:
            pixels += (self.jitter @ torch.randn(3))[:, None, None]
            if torch.rand(()) < 0.5:
                pixels = pixels.flip(2)
        return pixels, label


def train_plainly(raw: Path, manifest: Manifest, options: dict) -> dict:
    """A loop of forward, backward and SGD; bfloat16 and channels-last as train.py, or it would be no match of loaders."""
    keep_memory()  # the same settings of the allocator, worth a factor of two on a CPU
    torch.manual_seed(options["seed"])
    statistics = manifest.load_statistics()
    photos = [Photos(raw / split, manifest.classes, statistics, training)
              for split, training in ((manifest.train_split, True), (manifest.eval_split, False))]  # fmt: skip
    training = torch.utils.data.DataLoader(
        photos[0], options["batch_size"], shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    validation = torch.utils.data.DataLoader(photos[1], options["batch_size"], num_workers=2)
    net = AlexNet(len(manifest.classes), bias=options["bias"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), options["lr"], momentum=0.9, weight_decay=5e-4, fused=True)
    drops = [int(epoch) for epoch in options["lr_drops"].split(",")]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    start_s = time.monotonic()
    seconds = 0.0
    for epoch in range(options["epochs"]):
        for images, labels in training:
            with torch.autocast("cpu", torch.bfloat16, enabled=options["precision"] == "bfloat16"):
                loss = F.cross_entropy(net(images.contiguous(memory_format=torch.channels_last)).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        seconds = time.monotonic() - start_s
        print(f"plain loop, epoch {epoch + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    net.eval()
    hits = []
    with torch.inference_mode():
        for images, labels in validation:
            with torch.autocast("cpu", torch.bfloat16, enabled=options["precision"] == "bfloat16"):
                scores = net(images.contiguous(memory_format=torch.channels_last))
            hits.append(scores.topk(5).indices == labels[:, None])
    found = torch.cat(hits).float()
    return {
        "top1_error": 100 * (1 - found[:, 0].mean().item()),
        "top5_error": 100 * (1 - found.sum(1).mean().item()),
        "seconds": seconds,
    }


def means(runs: list[dict[str, float]]) -> dict:
    """Of each figure over the seeds, with the runs themselves."""
    return {name: statistics.mean(run[name] for run in runs) for name in runs[0]} | {"seeds": runs}


@click.command(context_settings={"show_default": True})
@click.argument("raw", type=click.Path(path_type=Path, exists=True))
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--epochs", default=12)
@click.option("--batch-size", default=32)
@click.option("--lr", default=0.01)
@click.option("--bias", default=0.1)
@click.option("--lr-milestones", default="9", help="Epochs after which the learning rate is divided by 10.")
@click.option("--precision", default="float32")
@click.option("--seeds", default=1, help="Runs of each, whose means are written down.")
@click.option("--run-dir", type=click.Path(path_type=Path), required=True, help="Of train.py, a folder for each seed in it.")
def main(raw: Path, dataset: Path, run_dir: Path, seeds: int, **options) -> None:
    """Train on DATASET by train.py and on RAW by a plain loop, and write both results down."""
    manifest = Manifest.load(dataset)
    ours, plain = [], []
    for seed in range(seeds):
        options["seed"] = seed
        folder = run_dir / f"seed-{seed}"
        command = [sys.executable, ROOT / "train.py", dataset, "--device", "cpu", "--run-dir", folder]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", value]
        subprocess.run(list(map(str, command)), check=True)  # one that is over says so and is left as it is
        summary = json.loads((folder / "summary.json").read_text())
        ours.append(
            {f"top{k}_error": summary["errors"]["centre crop"][f"top{k}_error"] for k in (1, 5)}
            | {"ten views, top1_error": summary["errors"]["ten views"]["top1_error"], "seconds": summary["seconds"]}
            | {"data_wait_pct": summary["data_wait_pct"]}
        )
        plain.append(train_plainly(raw, manifest, options))
    del options["seed"]
    result = {
        "dataset": f"{dataset.resolve().name}: {manifest.split(manifest.train_split).records} for training, "
        f"{manifest.split(manifest.eval_split).records} held out, {len(manifest.classes)} classes",
        "options": options,
        "imagefeed": means(ours),
        "plain DataLoader": means(plain),
    }
    save(f"learning-{dataset.resolve().name}", result, "torch")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
