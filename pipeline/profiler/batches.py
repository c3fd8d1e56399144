"""Batches of any loader: how many images, how many bytes, and the same several times over."""

import torch


def images_in(batch: object, loader: object) -> int:
    """Images of a batch: the first length of its first tensor, else what the loader says, else 1."""
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim), getattr(loader, "batch_size", None) or 1)


def tensors(batch: object) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def bytes_of(batch: object) -> int:
    return sum(tensor.nbytes for tensor in tensors(batch))


def enlarged(batch: object, times: int) -> object | None:
    """The batch so many times over; None where it holds other things than tensors of one length."""
    found = tensors(batch)
    if not found or any(tensor.ndim == 0 or len(tensor) != len(found[0]) for tensor in found):
        return None
    if isinstance(batch, torch.Tensor):
        return torch.cat([batch] * times)
    if isinstance(batch, dict):
        parts = {name: enlarged(part, times) for name, part in batch.items()}
        return None if None in parts.values() else parts
    parts = [enlarged(part, times) for part in batch]
    if any(part is None for part in parts):
        return None
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
