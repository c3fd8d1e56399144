"""This process's place among the ranks, as PyTorch knows it."""

import logging
import os
import time
from typing import NamedTuple

import torch.distributed

log = logging.getLogger("imagefeed")
PATIENCE_S = 5  # a rank with one batch to evaluate may end before another has started


class Ranks(NamedTuple):
    rank: int
    world_size: int
    source: str = ""  # who said so; empty if there is one process


def ranks_here() -> Ranks:
    """Rank and world size of torch.distributed where it is initialized, of torchrun where it is not yet, else 0 of 1."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size(), "torch.distributed")
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
        return Ranks(int(rank), int(world_size), "torchrun")
    return Ranks(0, 1)


class Attendance:
    """Notices that only some ranks evaluate, through the store that torch.distributed was initialized with."""

    def __init__(self, name: str, ranks: Ranks):
        self.key, self.ranks, self.warned = f"imagefeed/{name}", ranks, False

    def arrive(self, epoch: int) -> None:
        if self.ranks.source == "torch.distributed":
            _store().add(f"{self.key}/{epoch}", 1)

    def leave(self, epoch: int) -> None:
        """Warns once if a rank has ended this evaluation, and PATIENCE_S later others have not begun it."""
        if self.ranks.source != "torch.distributed" or self.warned:
            return
        until = time.monotonic() + PATIENCE_S
        while (begun := _store().add(f"{self.key}/{epoch}", 0)) < self.ranks.world_size and time.monotonic() < until:
            time.sleep(0.05)
        if begun < self.ranks.world_size:
            self.warned = True
            log.warning(
                "%d of %d ranks evaluated %s, and each sees 1/%d of its records; evaluate on every rank and gather the results "
                "(imagefeed.gather), or give this loader rank=0, world_size=1",
                begun, self.ranks.world_size, self.key.rpartition("/")[2], self.ranks.world_size,
            )  # fmt: skip


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
