"""A batch as PyTorch programs take it: a tuple of images and labels, which also knows its records."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed
from torch.utils import _pytree

from imagefeed.dataset.columns import NUMBERS, TEXT, Column


class Batch(tuple):
    """(images, labels) of N images: `images, labels = batch`.

    images: (N, 3, crop_size, crop_size), on the loader's device; (N, V, 3, ...) for V crops of each, as with `views="ten"`.
    labels: int64 (N,), on the same device; -1 if unknown. With mixup or cutmix float32 (N, classes), which add up to 1.
    ids: int64 (N,), record ids, on the CPU.
    valid: bool (N,), on the loader's device; False marks padding, which only evaluation over several ranks has.
    columns: a dict of the loader's `columns`. Numbers are tensors on its device, (N,) or (N, width), int64 or float32; text is a
        list of N str, and lists of different lengths are a list of N tensors on the CPU.

    Programs that rebuild a batch by `type(batch)(values)` get one whose `ids`, `valid` and `columns` are None.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    columns: dict[str, torch.Tensor | list]

    def __new__(
        cls,
        values: Iterable,
        ids: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        columns: dict[str, torch.Tensor | list] | None = None,
    ) -> "Batch":
        batch = super().__new__(cls, values)
        batch.ids, batch.valid, batch.columns = ids, valid, columns  # type: ignore[assignment]
        return batch

    @property
    def images(self) -> torch.Tensor:
        return self[0]

    @property
    def labels(self) -> torch.Tensor:
        return self[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with images, labels, `valid` and columns of numbers on `device`."""

        def move(values: object) -> object:
            return values.to(device, non_blocking=non_blocking) if isinstance(values, torch.Tensor) else values

        columns = self.columns and {name: move(values) for name, values in self.columns.items()}
        return Batch(map(move, self), self.ids, move(self.valid), columns)

    def __reduce__(self) -> tuple:
        return Batch, (tuple(self), self.ids, self.valid, self.columns)


def _leaves(batch: Batch) -> tuple[list, None]:
    """All that a batch has: without columns, no program shall meet None among its tensors."""
    return [*batch, *(part for part in (batch.ids, batch.valid, batch.columns or None) if part is not None)], None


_pytree.register_pytree_node(Batch, _leaves, lambda leaves, _: Batch(leaves[:2], *leaves[2:]))


def column_values(column: Column, ids: np.ndarray, device: torch.device) -> torch.Tensor | list:
    """The values of records (N,) as a Batch has them."""
    found = column.take(ids)
    if found.kind == TEXT:
        return list(found)
    if found.kind != NUMBERS:
        return [_tensor(values) for values in found]
    return _tensor(found.values).to(device, non_blocking=True)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64 if values.dtype == np.int64 else np.float32))


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
