"""Checkpoints of a run: written whole or not at all, and the newest whole one found again."""

import os
import sys
import zipfile
from pathlib import Path

import torch

from preprocess.errors import UserError
from preprocess.records import sync_folder

VERSION = 1
KEEP = 2


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written."""


def save_checkpoint(run_dir: Path, step: int, state: dict[str, object]) -> None:
    """Writes `state`, of tensors and plain values, as RUN_DIR/checkpoint-STEP.pt; deletes all but the last KEEP."""
    path = run_dir / f"checkpoint-{step:08d}.pt"
    temporary = run_dir / ".checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch hides a full disk behind a RuntimeError
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise
    sync_folder(run_dir)
    for old in newest_first(run_dir)[KEEP:]:
        old.unlink()


def newest_first(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("checkpoint-*.pt"), reverse=True)


def load_latest(run_dir: Path) -> dict | None:
    """The newest whole checkpoint, None where there is none at all; a damaged one is passed over with a sentence.

    Raises UserError where every one is damaged, because beginning again would then lose the run without a word.
    """
    paths = newest_first(run_dir)
    for path in paths:
        try:
            return load_checkpoint(path)
        except Damaged as error:
            print(f"{error}; passed over", file=sys.stderr)
    if paths:
        raise UserError(f"{run_dir}: none of its checkpoints is whole; restore one, or delete them to begin again")
    return None


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU; raises Damaged where its checksums differ, UserError for other files."""
    try:
        # torch.load does not compare the CRCs that it stores, one for each tensor, in the zip file.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # zipfile has many for damaged headers
        raise Damaged(f"{path}: damaged ({error})") from error
    if bad:
        raise Damaged(f"{path}: damaged ({bad} fails its checksum)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
        state["made_with"], state["progress"], state["model"]
    except Exception as error:  # pickle, torch and the lookups have theirs
        raise UserError(f"{path}: not a checkpoint of train.py; give one that it wrote") from error
    if version != VERSION:
        raise UserError(f"{path}: a checkpoint of version {version}, this program reads {VERSION}; begin a new run")
    return state


def refuse_another(theirs: dict[str, object], mine: dict[str, object], where: Path) -> None:
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{where}: the checkpoint was made with {name} {theirs.get(name)}, this call has {value}; "
                "use the same, or another --run-dir"
            )
