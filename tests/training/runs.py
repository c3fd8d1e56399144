"""Small trainings, as a user starts them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from click.testing import CliRunner, Result

import train
from imagefeed.dataset.manifest import Manifest
from imagefeed.training.inputs import Inputs
from imagefeed.training.recipes import Recipe

CPU = torch.device("cpu")
# Crops of 64 pixels: 0.1 s a step. 50 records in batches of 8 are 6 steps an epoch.
QUICK = "--device cpu --precision float32 --crop-size 64 --batch-size 8 --threads 1 --epochs 2 --lr 0.001".split()
ONE_STEP = "--limit-batches 1 --epochs 1 --lr 0.0001".split()


def call(*arguments: object) -> Result:
    """train.py in this process."""
    return CliRunner().invoke(train.main, list(map(str, arguments)))


def run(out: Path, run_dir: Path, *options: object) -> Result:
    """The same with the options of QUICK, unless others are given."""
    return call(out, "--run-dir", run_dir, *QUICK, *options)


def start(out: Path, run_dir: Path, *options: str) -> subprocess.Popen:
    """The same in a process of its own, to be killed."""
    command = [sys.executable, train.__file__, str(out), "--run-dir", str(run_dir), *QUICK, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Waits until `condition()` holds; the process must not end before."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    """Whether two nested dictionaries and lists of tensors are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def recipe(**changes) -> Recipe:
    """The recipe of QUICK."""
    return Recipe(**{"batch_size": 8, "lr": 0.001, "crop_size": 64, "precision": "float32", "epochs": 2} | changes)


def inputs(manifest: Manifest, **reading) -> Inputs:
    return Inputs(manifest, CPU, {"num_threads": 1} | reading)
