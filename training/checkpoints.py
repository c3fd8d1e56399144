"""Checkpoints of a run: written whole or not at all, and the newest whole one found again."""

import contextlib
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from imagefeed.dataset import files
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file
from imagefeed.dataset.manifest import Manifest

VERSION = 2  # 1 knew one net, and kept the state of random generators
KEEP = 2


class Corrupt(UserError):
    """A checkpoint whose bytes are not those that were written."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes `run_dir` and keeps other trainings out of it; clears what a killed one left half written.

    Raises UserError where another training holds it. The lock ends with the process, however that ends.
    """
    busy = f"{run_dir}: another training is writing into it; wait, or choose another --run-dir"
    with files.locked(run_dir / ".lock", busy):
        for left in run_dir.glob(".*.[0-9]*.tmp"):
            left.unlink()
        yield


def save_checkpoint(run_dir: Path, step: int, state: dict[str, object], keep: int = KEEP) -> None:
    """Writes `state`, of tensors and plain values, as RUN_DIR/checkpoint-STEP.pt; keeps `keep` - 1 older ones."""
    path = run_dir / f"checkpoint-{step:08d}.pt"
    try:
        with atomic_file(path) as file:
            torch.save({"version": VERSION, **state}, file)
    except BaseException as error:
        if isinstance(error.__context__, OSError):  # torch hides a full disk behind a RuntimeError
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise
    for old in [other for other in newest_first(run_dir) if other < path][keep - 1 :]:
        old.unlink()


def newest_first(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoint-*.pt"), reverse=True)


def load_latest(run_dir: Path, set_aside: bool = False) -> dict | None:
    """The newest whole checkpoint, None where there is none at all; a corrupt one is passed over with a sentence.

    With `set_aside` the corrupt ones get another name, so that they do not stand before those to come. Raises UserError
    where every one is corrupt, because beginning again would then lose the run without a word.
    """
    corrupt: dict[Path, Corrupt] = {}
    state = None
    for path in newest_first(run_dir):
        try:
            state = load_checkpoint(path)
            break
        except Corrupt as error:
            corrupt[path] = error
    for path, error in corrupt.items():
        renamed = ""
        if set_aside and state is not None:
            renamed = f" and renamed to {path.name}.corrupt"
            path.rename(f"{path}.corrupt")
        print(f"{error}; passed over{renamed}", file=sys.stderr)
    if corrupt and state is None:
        raise UserError(f"{run_dir}: none of its checkpoints is whole; restore one, or delete them to begin again")
    return state


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU; raises Corrupt where its checksums differ, UserError for other files."""
    try:
        # torch.load does not compare the CRCs that it stores, one for each tensor, in the zip file.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # zipfile has many for corrupt headers
        raise Corrupt(f"{path}: corrupt ({error})") from error
    if bad:
        raise Corrupt(f"{path}: corrupt ({bad} fails its checksum)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
        state["made_with"], state["progress"], state["model"]
    except Exception as error:  # pickle, torch and the lookups have theirs
        raise UserError(f"{path}: not a checkpoint of train.py; give one that it wrote") from error
    if version != VERSION:
        raise UserError(f"{path}: a checkpoint of version {version}, this program reads {VERSION}; begin a new run")
    return state


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """A net's state dict, on the CPU: of a checkpoint, the newest in a run folder, or a file that torch.save wrote of one.

    Raises UserError for other files.
    """
    if path.is_dir():
        state = load_latest(path)
        if state is None:
            raise UserError(f"{path}: there is no checkpoint in this folder; give a file of weights, or a run folder")
        return state["model"]
    try:
        # Mapped, where it can be, so that a checkpoint is read once, by what also compares its checksums.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if "version" in state and "made_with" in state:
            return load_checkpoint(path)["model"]
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("no state dict")
    except (UserError, PermissionError):
        raise
    except Exception as error:  # pickle, torch and the lookups have theirs
        raise UserError(
            f"{path}: holds no weights; give a checkpoint of train.py, or a file of torch.save(net.state_dict(), FILE)"
        ) from error
    return state


def identity(manifest: Manifest) -> dict[str, object]:
    """What a checkpoint must agree in, besides the recipe, to be of this dataset."""
    names = hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()[:16]
    return {"classes": len(manifest.classes), "class names": names, "dataset": manifest.fingerprint[:16]}


def refuse_another(
    theirs: dict[str, object], mine: dict[str, object], where: Path, remedy: str = "use the same, or another --run-dir"
) -> None:
    """Raises UserError where one of `mine` is another value in `theirs`, KeyError where it is not in them."""
    for name, value in mine.items():
        if theirs[name] != value:
            raise UserError(f"{where}: the checkpoint was made with {name} {theirs[name]}, this call has {value}; {remedy}")


@contextlib.contextmanager
def usable(where: Path) -> Iterator[None]:
    """Turns what fails in taking a checkpoint's values, which may be anything, into one sentence."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a checkpoint of train.py that this program can use; give one that it wrote") from error
