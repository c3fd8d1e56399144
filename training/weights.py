"""Loads the weights that a run starts from, out of a checkpoint or another program's file."""

import json
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.model.nets import AUXILIARY, layer_of, load_all_but_last
from imagefeed.training.checkpoints import load_checkpoint, read_checkpoint

# Parts that DataParallel, torch.compile, FSDP and activation checkpointing insert into names, as in features.module.0.weight.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Keys of the weights in training files (PyTorch's examples, timm, Lightning; torchvision), and attributes of Lightning modules.
KEYS, OWNERS = ("state_dict", "model"), ("model.", "net.")
# https://github.com/huggingface/safetensors#format
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
READABLE = (
    "give a checkpoint of imagefeed train, a state dict saved by torch.save, a training file of torchvision, PyTorch's examples, "
    "timm or Lightning, or a .safetensors file"
)


def load_first_weights(net: torch.nn.Module, path: Path, last: Collection[str]) -> tuple[str, dict[str, Any]]:
    """Loads the weights of a file or run folder; those of the layers `last`, where the file has them for other classes, keep
    their own. Returns a line that says what was taken, and what a checkpoint of a run was made with.

    Raises UserError, and leaves `net` as it was, unless all other weights are there and no unknown ones.
    """
    state, place, made_with = read_weights(path)
    mine = net.state_dict()
    taken, owner, others = fit_names(state, list(mine), path)
    of_classes = [name for name in mine if layer_of(name) in last]
    same = all(name in taken and taken[name].shape == mine[name].shape for name in of_classes)
    loaded = load_all_but_last(net, taken, str(path), () if same else last)
    line = f"{path}: loaded {loaded} of {plural(len(mine), 'tensor')}"
    if place:
        line += f" from `{place}`"
    if owner:
        line += f", named {owner}* there"
    if others:
        line += f"; ignored {plural(len(others), 'tensor')} of other modules ({first_few(others)})"
    starting = f"; {' and '.join(last)} {'start' if len(last) > 1 else 'starts'} from random weights"
    return line if same else line + starting, made_with


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str, dict[str, Any]]:
    """A net's state dict, on the CPU, its key in the file, if any, and what a checkpoint of a run was made with."""
    if path.is_dir():
        return of_run(read_checkpoint(path))
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the header's length; files of torch.save begin with PK or a pickle's mark
        return read_safetensors(path), "", {}
    try:
        content, modules = unpickle(path)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # pickle, torch and zipfile raise their own
        raise UserError(f"{path}: no weights in it; {READABLE}") from error
    if isinstance(content, dict) and "version" in content and "made_with" in content:
        return of_run(load_checkpoint(path))  # which compares the checksums too
    if is_state(content):
        return content, "", {}
    inner = [key for key, value in content.items() if is_state(value)] if isinstance(content, dict) else []
    key = next((key for key in KEYS if key in inner), inner[0] if len(inner) == 1 else None)
    if key is not None:
        return content[key], str(key), {}
    if inner:
        raise UserError(f"{path}: holds several sets of weights, {', '.join(map(str, inner))}; save only one with torch.save")
    if modules:
        raise UserError(
            f"{path}: a whole pickled module, which may run code when it is loaded; save its weights alone, with "
            "torch.save(net.state_dict(), FILE)"
        )
    raise UserError(f"{path}: no weights in it; {READABLE}")


def of_run(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str, dict[str, Any]]:
    return state["model"], "", state["made_with"]


def is_state(content: object) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


class Blank:
    """Stands in for classes that torch does not load, such as argparse.Namespace, without running their code."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()  # torch fills it, and accepts nothing else for a subclass of dict


class BlankArray:
    """The same for numpy, whose objects have a state of their own."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def unpickle(path: Path) -> tuple[Any, bool]:
    """Reads what torch.save wrote. Also returns whether it contains modules, which stay blank."""
    zipped = zipfile.is_zipfile(path)
    names = ["argparse.Namespace"]  # of files before torch 1.6, which cannot be listed
    if zipped:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    blanks = [(BlankArray if name.startswith("numpy.") else Blank, name) for name in names]
    with torch.serialization.safe_globals(blanks):
        # Mapped if possible, so that a checkpoint is read only once, by the code that also compares its checksums.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    return content, any(name.startswith("torch.nn.modules.") for name in names)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file without its package: the length of a JSON header, the header, and the tensors' bytes."""
    size = path.stat().st_size
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)
    try:
        begin = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header = json.loads(data[8:begin].numpy().tobytes())
        header.pop("__metadata__", None)
        state = {}
        for name, entry in header.items():
            first, end = (begin + offset for offset in entry["data_offsets"])
            if not begin <= first <= end <= size:
                raise ValueError(f"{name} lies beyond the end of the file")
            if entry["dtype"] not in SAFETENSORS:
                raise UserError(f"{path}: {name} is of type {entry['dtype']}, which no net here has; save it as float32")
            state[name] = data[first:end].clone().view(SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: cut short or corrupt ({error}); copy it again") from error
    return state


def fit_names(state: Mapping[str, torch.Tensor], mine: list[str], path: Path) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """Renames a state dict as the net has it: without wrappers, and without the name of the module that owned the net.

    Returns it, that name with a dot, and the names of tensors of other modules, such as a loss's. Names that the net does not
    have stay as they are.
    """
    own = {bare(name): name for name in mine}
    theirs = {bare(name): value for name, value in state.items()}
    if len(theirs) < len(state):
        raise UserError(f"{path}: has some weights twice, with and without a wrapper's name; save only net.state_dict()")
    owners: Counter[str] = Counter()
    for name in theirs:
        parts = name.split(".")
        owners.update(".".join([*parts[:n], ""]) for n in range(len(parts)) if ".".join(parts[n:]) in own)
    most = max(owners.values(), default=0)
    best = [owner for owner, count in owners.items() if count == most and 2 * count > len(mine)]
    if "" in best or not best:
        owner = ""
    else:
        owner = next((owner for owner in OWNERS if owner in best), best[0])
        if owner not in OWNERS and len(best) > 1:
            raise UserError(f"{path}: holds several nets of this kind, {', '.join(best)}; save the state dict of only one")
    found, others = {}, []
    for name, value in theirs.items():
        inner = name.removeprefix(owner)
        if name.startswith(owner) and (inner in own or inner.partition(".")[0] not in AUXILIARY):
            found[own.get(inner, inner)] = value
        else:
            others.append(name)
    return found, owner, others


def bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
