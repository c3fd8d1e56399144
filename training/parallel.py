"""Several processes that train one net together, as torchrun starts them."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from imagefeed.dataset.errors import UserError

T = TypeVar("T")
BUCKET_BYTES = 4 << 20  # of gradients: a message so large takes longer than its latency


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
        """From now on averages gradients over the ranks, in buckets, during the backward pass, before each update.

        Not by DistributedDataParallel: its buckets in the first step after a start differ from later ones, and with them the
        order of sums, so a resumed run would not be the same to the bit. These follow from the parameters alone.
        """
        if self.count == 1:
            return
        buckets = buckets_of([parameter for parameter in model.parameters() if parameter.requires_grad])
        bucket_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        ready = [0] * len(buckets)
        in_flight: list[Callable[[], None]] = []

        def note(parameter: torch.nn.Parameter) -> None:
            number = bucket_of[parameter]
            ready[number] += 1
            if ready[number] == len(buckets[number]):
                in_flight.append(self._average([parameter.grad for parameter in buckets[number]]))

        def wait(*_) -> None:
            for number, bucket in enumerate(buckets):
                if 0 < ready[number] < len(bucket):  # some parameters took no part in this step
                    in_flight.append(self._average([parameter.grad for parameter in bucket if parameter.grad is not None]))
                ready[number] = 0
            for finish in in_flight:
                finish()
            in_flight.clear()

        for parameter in bucket_of:
            parameter.register_post_accumulate_grad_hook(note)
        optimizer.register_step_pre_hook(wait)

    def _average(self, gradients: list[torch.Tensor]) -> Callable[[], None]:
        """Begins to average gradients over the ranks, as one message; the result waits for it and puts them into place."""
        alone = len(gradients) == 1
        flat = gradients[0] if alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
        by_nccl = flat.is_cuda  # gloo cannot average
        if not by_nccl:
            flat.div_(self.count)
        with self._connected():
            work = dist.all_reduce(flat, dist.ReduceOp.AVG if by_nccl else dist.ReduceOp.SUM, async_op=True)

        def finish() -> None:
            with self._connected():
                work.wait()
            if not alone:
                parts = flat.split([gradient.numel() for gradient in gradients])
                averages = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
                torch._foreach_copy_(gradients, averages)

        return finish

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


def buckets_of(parameters: Sequence[torch.nn.Parameter], least_bytes: int = BUCKET_BYTES) -> list[list[torch.nn.Parameter]]:
    """Parameters whose gradients are sent together, in the order in which a backward pass makes them: the last first.

    Small ones are joined until they are `least_bytes`; one as large as that is sent by itself, without a copy.
    """
    buckets: list[list[torch.nn.Parameter]] = []
    small: list[torch.nn.Parameter] = []
    for parameter in reversed(parameters):
        if parameter.nbytes >= least_bytes:
            buckets.append([parameter])
            continue
        if not small or parameter.dtype != small[-1].dtype or sum(one.nbytes for one in small) >= least_bytes:
            small = []
            buckets.append(small)
        small.append(parameter)
    return buckets


def own_gpu(ranks: Ranks, device: str) -> torch.device | None:
    """The GPU of this rank by the `--device` given; None if it is to use none, or the machine has fewer GPUs than ranks."""
    if device == "cpu" or not torch.cuda.is_available() or ranks.local >= torch.cuda.device_count():
        return None
    return torch.device("cuda", ranks.local)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Joins the ranks that torchrun's environment names; without one, this process is alone. Only the first prints to stdout.

    If each has a GPU, by the `--device` given, they are connected over NCCL at once, so that what keeps them apart is an error at
    the start, not in the first step. Raises UserError for one of several tasks of a Slurm step that are alone: each would train
    the same net in the same folder.
    """
    # Not SLURM_NTASKS, which is that of the job: a batch script with --ntasks=8 is one process too, and may train alone.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"srun started this command {tasks} times without torchrun, so each would do all of the work; start one task per "
            "machine, with torchrun in it (srun torchrun ..., docs/clusters.md), or set WORLD_SIZE=1 if each is a run of its own"
        )
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
    gpu = own_gpu(ranks, device)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    # Before the group is there. Default arguments of its functions are the group at the time of the import, which otherwise comes
    # with the first optimizer; then destroying the group leaves gloo's threads running, and the process may abort as it ends
    # (torch 2.11, 2.13).
    from torch.distributed import nn  # noqa: F401

    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        where = f"rank {ranks.rank} of {ranks.count}"
        raise UserError(f"{where}: cannot reach the other ranks ({error}); start all of them with torchrun") from error
    # Asked over gloo: NCCL would wait forever for a rank whose machine has fewer GPUs than ranks.
    if not any(ranks.any(gpu is None)):
        ranks.sum(torch.zeros((), device=gpu))
    with contextlib.ExitStack() as stack:
        if not ranks.first:
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        yield ranks
        sys.stdout.flush()
    # Not after an error: it would wait for ranks that wait for this one. Connections end with the process.
    dist.destroy_process_group()
