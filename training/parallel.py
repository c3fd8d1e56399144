"""Several processes that train one net together, as torchrun starts them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from imagefeed.dataset.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. Every rank must call each method. Raises UserError if another rank has ended."""

    rank: int = 0
    count: int = 1
    local: int = 0  # among those of this machine

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """Each rank's value, of plain types, in the order of the ranks."""
        values = [value] * self.count
        if self.count > 1:
            with self._connected():
                dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up the tensor over the ranks, in place."""
        if self.count > 1:
            with self._connected():
                dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether some rank has set it."""
        return [bool(number) for number in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist()]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.any(False)

    def average_gradients(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """From now on averages each gradient over the ranks, during the backward pass, before each update.

        Each gradient by itself, not in buckets as DistributedDataParallel does: its buckets in the first step after a start
        differ from later ones, and with them the order of sums, so a resumed run would not be the same to the bit.
        """
        if self.count == 1:
            return
        in_flight: list[dist.Work] = []

        def send(parameter: torch.nn.Parameter) -> None:
            parameter.grad.div_(self.count)
            with self._connected():
                in_flight.append(dist.all_reduce(parameter.grad, async_op=True))

        def wait(*_) -> None:
            with self._connected():
                for work in in_flight:
                    work.wait()
            in_flight.clear()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(send)
        optimizer.register_step_pre_hook(wait)

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Gives every rank the first one's buffers: each has running statistics of its own (batch normalization)."""
        if self.count > 1:
            with self._connected():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def seed_step(self, seed: int, step: int, device: torch.device) -> None:
        """Starts a stream of torch's generators for this step's dropout, so that no generator state has to be kept."""
        number = int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0])
        # 1 us; torch.manual_seed takes 100 us to look for all kinds of devices.
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.manual_seed(number)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL have no type of their own for a lost connection
            raise UserError(
                f"rank {self.rank} of {self.count}: another rank ended or cannot be reached; fix the error that it printed, then "
                "run the same command again"
            ) from error


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the ranks that torchrun's environment names; without one, this process is alone. Only the first prints to stdout."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, without {' and '.join(missing)}; start all ranks with torchrun (under "
            "Slurm: srun torchrun ...), or unset WORLD_SIZE"
        )
    ranks = Ranks(*(int(os.environ[name]) for name in needed))
    cuda = torch.cuda.is_available()
    if cuda and ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        where = f"rank {ranks.rank} of {ranks.count}"
        raise UserError(f"{where}: cannot reach the other ranks ({error}); start all of them with torchrun") from error
    with contextlib.ExitStack() as stack:
        if not ranks.first:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        yield ranks
        sys.stdout.flush()
    # Not after an error: it would wait for ranks that wait for this one. Connections end with the process.
    dist.destroy_process_group()
