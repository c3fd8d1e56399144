"""Which records a client's model saw, in this process or in others.

In the clients' dataset, each record is of a class of its own, so that the labels that reach a loss function are record ids,
whatever the client did with the batch before.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).parents[2]
TRAIN, VAL = 100, 42  # records
BATCH = 16  # of all ranks; neither split fills its last batch
STEPS, VAL_STEPS = 6, 3
SIZE = 32  # of crops
cross_entropy = functional.cross_entropy


def record(phase: str, labels: torch.Tensor) -> None:
    """Notes a batch that the model saw, in the file that the environment variable SEEN names."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps([phase, rank, labels.tolist()]) + "\n")


def loss(logits: torch.Tensor, labels: torch.Tensor, phase: str = "") -> torch.Tensor:
    """Cross entropy, which notes its batch: with gradients it is training."""
    record(phase or ("train" if torch.is_grad_enabled() else "val"), labels)
    return cross_entropy(logits, labels)


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * (SIZE // 4) ** 2, TRAIN))


class Seen:
    """The batches that were noted."""

    def __init__(self, path: Path):
        self.path, self.skipped = path, 0

    def batches(self, phase: str) -> list[list[int]]:
        """The record ids of each global batch in a phase, since the last `skip`."""
        notes = [json.loads(line) for line in self.path.read_text().splitlines()[self.skipped :]] if self.path.exists() else []
        ranks: dict[int, list[list[int]]] = {}
        for noted, rank, ids in notes:
            if noted == phase:
                ranks.setdefault(rank, []).append(ids)
        assert len({len(batches) for batches in ranks.values()}) <= 1, "ranks took different numbers of steps"
        return [flat(parts) for parts in zip(*(ranks[rank] for rank in sorted(ranks)), strict=True)]

    def skip(self) -> None:
        self.skipped = len(self.path.read_text().splitlines()) if self.path.exists() else 0

    def check_training(self, epochs: int) -> list[list[int]]:
        """Each epoch saw full global batches of different records, and another order than the epoch before."""
        batches = self.batches("train")
        assert len(batches) == epochs * STEPS and {len(batch) for batch in batches} == {BATCH}
        for epoch in range(epochs):
            assert len(set(flat(batches[epoch * STEPS : (epoch + 1) * STEPS]))) == STEPS * BATCH
        assert len({tuple(batches[epoch * STEPS]) for epoch in range(epochs)}) == epochs
        return batches

    def check_evaluation(self, times: int = 1, phase: str = "val") -> None:
        """Each evaluation saw every record once."""
        seen = flat(self.batches(phase))
        assert len(seen) == times * VAL
        for begin in range(0, len(seen), VAL):
            assert sorted(seen[begin : begin + VAL]) == list(range(VAL))


def planned(root: Path, epochs: int = 1) -> list[list[int]]:
    """The global batches of the first epochs of training, as a loader alone yields them."""
    from imagefeed import ImageLoader

    with ImageLoader(root, "train", BATCH, crop_size=SIZE, rank=0, world_size=1) as loader:
        return [batch.ids.tolist() for _ in range(epochs) for batch in loader]


def page(title: str, root: Path, ranks: int = 1) -> str:
    """The code of a chapter of docs/pytorch.md, for the small dataset."""
    head, *chapters = (ROOT / "docs" / "pytorch.md").read_text().split("\n## ")
    (chapter,) = (chapter for chapter in chapters if chapter.startswith(title + "\n"))
    text = head + chapter
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line.strip())
    code = code.replace("/data/imagenet-256", str(root))
    code = code.replace("num_classes=1000", f"num_classes={TRAIN}")
    return re.sub(r"batch_size=128", f"batch_size={BATCH // ranks}, crop_size={SIZE}", code)


PRELUDE = """
from torch.nn import functional
from tests.clients.records import Net, cross_entropy, loss, record
functional.cross_entropy = loss
net = Net()
"""


def run(code: str, folder: Path, ranks: int = 1) -> str:
    """Runs a program, by torchrun if there are several ranks, and returns what it printed."""
    script = folder / "program.py"
    script.write_text(PRELUDE + code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *torchrun, script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr
