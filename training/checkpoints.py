"""Checkpoints of a run: written whole or not at all, and the newest whole one found again."""

import contextlib
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file, locked, remove_temporaries
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.options import renamed
from imagefeed.training.options import KEEP, RECIPE, SINCE_0_1

VERSION = 2  # version 1 knew one net, and kept the state of random generators


class Corrupt(UserError):
    """A checkpoint whose bytes are not those that were written."""


@contextlib.contextmanager
def run_folder(path: Path) -> Iterator[None]:
    """Creates a run folder, keeps other trainings out of it, and deletes what a killed one left half written.

    A training that ends before it has written anything leaves no folder that was not there.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = path / ".lock"
    with locked(lock, f"{path}: another training is writing into it; wait, or choose another --run-dir"):
        remove_temporaries(path)
        try:
            yield
        except BaseException:
            if made and [*path.iterdir()] == [lock]:
                lock.unlink()
                with contextlib.suppress(OSError):  # of a parent that others have begun to use
                    for folder in made:
                        folder.rmdir()
            raise


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


def load_latest(run_dir: Path, set_aside: bool = False) -> dict[str, Any] | None:
    """Loads the newest whole checkpoint, None if the folder has none; a line names each corrupt one that is skipped.

    `set_aside` renames the corrupt ones, so that they do not stand before those to come. Raises UserError if all are corrupt:
    starting over would lose the run without a word.
    """
    corrupt: dict[Path, Corrupt] = {}
    for path in newest_first(run_dir):
        try:
            state = load_checkpoint(path)
            break
        except Corrupt as error:
            corrupt[path] = error
    else:
        state = None
    for path, error in corrupt.items():
        renamed_to = ""
        if set_aside and state is not None:
            renamed_to = f" and renamed to {path.name}.corrupt"
            path.rename(f"{path}.corrupt")
        print(f"{error}; skipped{renamed_to}", file=sys.stderr)
    if corrupt and state is None:
        raise UserError(f"{run_dir}: all of its checkpoints are corrupt; restore one, or delete them to start over")
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote onto the CPU; raises Corrupt if a checksum differs, UserError for other files."""
    try:
        # torch.load does not compare the CRCs, one for each tensor, that the zip file stores.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except PermissionError:
        raise
    except Exception as error:  # zipfile raises many kinds for corrupt headers
        raise Corrupt(f"{path}: corrupt ({error})") from error
    if bad:
        raise Corrupt(f"{path}: corrupt ({bad} fails its checksum)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
        state["progress"], state["model"]
        state["made_with"] = present(state["made_with"])
    except Exception as error:  # pickle, torch and the lookups raise their own
        raise UserError(f"{path}: not a checkpoint of imagefeed train; choose one that it wrote") from error
    if version != VERSION:
        raise UserError(f"{path}: checkpoint version {version}, but this program reads version {VERSION}; start a new run")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint, or the newest of a run folder; raises UserError if it has none."""
    state = load_latest(path) if path.is_dir() else load_checkpoint(path)
    if state is None:
        raise UserError(f"{path}: this folder has no checkpoint; choose the folder of a run that wrote one")
    return state


def present(made_with: dict[str, object]) -> dict[str, object]:
    """A run's identity under today's option names; version 0.1 had others, such as --size and --colour, and lacked some."""
    translated = {RECIPE[name].flag: RECIPE[name].default for name in SINCE_0_1}
    for key, old in made_with.items():
        name, value = renamed(key.removeprefix("--").replace("-", "_"), old)
        translated[RECIPE[name].flag if name in RECIPE else key] = value
    return translated


def identity(manifest: Manifest) -> dict[str, object]:
    """What a run depends on besides its recipe."""
    names = hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()[:16]
    return {"classes": len(manifest.classes), "class names": names, "dataset": manifest.fingerprint[:16]}


def refuse_difference(theirs: dict[str, object], mine: dict[str, object], where: Path, remedy: str) -> None:
    """Raises UserError for the first of `mine` that differs in `theirs`, KeyError for one that is missing there."""
    for name, value in mine.items():
        before = theirs[name]
        if before == value:
            continue
        if name == "classes":
            difference = f"has {plural(before, 'class', 'classes')}, this dataset {value:,}"
        elif name == "class names":
            difference = "has as many classes as this dataset, but of other names"
        elif name == "dataset":
            difference = f"is from training on another dataset ({before}, this one is {value})"
        else:
            difference = f"was made with {_in_words(name, before)}, this call has {_in_words(name, value)}"
        raise UserError(f"{where}: the checkpoint {difference}; {remedy}")


def _in_words(name: str, value: Any) -> str:
    """A value of a run's identity as it is given to a command: "--seed 1", "--no-lrn", "no --weights"."""
    if name == "images a step":
        return f"{plural(value, 'image')} a step"
    if name == "--cache device":
        return name if value else "another --cache"
    if (name, value) in (("--subset", "all"), ("--weights", "none")):
        return f"no {name}"
    if isinstance(value, bool):
        return name if value else name.replace("--", "--no-", 1)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"the default {name}" if value is None else f"{'a ' if name == '--subset' else ''}{name} {value}"


@contextlib.contextmanager
def readable(where: Path) -> Iterator[None]:
    """Re-raises errors from malformed checkpoints as UserError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a checkpoint that imagefeed train can use; choose one that it wrote") from error
