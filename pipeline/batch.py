"""A batch as PyTorch programs take it: a tuple of images and labels, which also knows its records."""

from collections.abc import Iterable

import torch
import torch.distributed
from torch.utils import _pytree


class Batch(tuple):
    """(images, labels) of N images: `images, labels = batch`.

    images: (N, 3, crop_size, crop_size), or (N, 10, 3, crop_size, crop_size) with `views="ten"`; on the loader's device.
    labels: int64 (N,), on the same device; -1 if unknown.
    ids: int64 (N,), record ids, on the CPU.
    valid: bool (N,), on the loader's device; False marks padding, which only evaluation over several ranks has.

    Programs that rebuild a batch by `type(batch)(values)` get one whose `ids` and `valid` are None.
    """

    ids: torch.Tensor
    valid: torch.Tensor

    def __new__(cls, values: Iterable, ids: torch.Tensor | None = None, valid: torch.Tensor | None = None) -> "Batch":
        batch = super().__new__(cls, values)
        batch.ids, batch.valid = ids, valid
        return batch

    @property
    def images(self) -> torch.Tensor:
        return self[0]

    @property
    def labels(self) -> torch.Tensor:
        return self[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with images, labels and `valid` on `device`."""
        images, labels = (values.to(device, non_blocking=non_blocking) for values in self)
        valid = self.valid if self.valid is None else self.valid.to(device, non_blocking=non_blocking)
        return Batch((images, labels), self.ids, valid)

    def __reduce__(self) -> tuple:
        return Batch, (tuple(self), self.ids, self.valid)


_pytree.register_pytree_node(
    Batch, lambda batch: ([*batch, batch.ids, batch.valid], None), lambda leaves, _: Batch(leaves[:2], *leaves[2:])
)


def gather(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The rows of `values` (N, ...) that are not padding, of all ranks: each record once, in the order of the ranks.

        predictions = gather(model(batch.images).argmax(1), batch.valid)

    To be called on every rank with its part of a batch. Without torch.distributed, the valid rows of `values`.
    """
    if valid is None:
        raise ValueError("valid is None, because another program rebuilt the batch; pass the `valid` of the loader's own batch")
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values[valid]
    parts = []
    for part in (values.to(valid.device).contiguous(), valid):  # ids are on the CPU
        parts.append([torch.empty_like(part) for _ in range(distributed.get_world_size())])
        distributed.all_gather(parts[-1], part)
    return torch.cat(parts[0])[torch.cat(parts[1])]
