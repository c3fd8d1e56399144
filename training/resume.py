"""A run in memory: begun, written as a checkpoint, and gone on with from one."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.model import NETS
from imagefeed.model.alexnet import BIAS, DROPOUT
from imagefeed.model.nets import VARIANTS, load_all_but_last
from imagefeed.model.step import choose_precision
from imagefeed.training.checkpoints import KEEP, identity, load_latest, load_weights, refuse_another, save_checkpoint, usable
from imagefeed.training.evaluation import net_from
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe, make_optimizer


@dataclass
class Progress:
    """Where a run is, apart from weights and momentum."""

    step: int = 0
    epochs: int = 0  # that ended and were evaluated
    drops: int = 0  # of the learning rate, by the plateau schedule
    best_error: float = math.inf  # validation top-1, percent
    stale_epochs: int = 0  # since that, or since the last drop
    loss_steps: int = 0  # since the last line of metrics.jsonl
    seconds: float = 0.0


@dataclass
class Run:
    """What a checkpoint keeps; it can only be resumed with what it was `made_with`."""

    model: torch.nn.Module
    optimizer: torch.optim.SGD
    at: Progress
    loss_sum: torch.Tensor  # over at.loss_steps, the same on all ranks; on the device, so that no step waits for it
    made_with: dict[str, object]
    recipe: Recipe  # with its precision decided
    device: torch.device


def open_run(
    manifest: Manifest,
    recipe: Recipe,
    run_dir: Path,
    device: torch.device,
    ranks: Ranks,
    cache: str = "none",
    weights: Path | None = None,
) -> Run:
    """The newest whole checkpoint of `run_dir` in memory, or a new run, which begins with `weights` (training/checkpoints.py).
    Of the loader's caches only that on the device shows other pixels.

    Raises UserError where that checkpoint is of another dataset, recipe or other first weights, where ranks find different ones,
    and where weights are another net's.
    """
    state = load_latest(run_dir, set_aside=True) if ranks.first else None
    ranks.barrier()  # the first one has set aside what is corrupt
    if not ranks.first:
        state = load_latest(run_dir)
    precision = recipe.precision
    if precision == "auto":
        with usable(run_dir):
            precision = state["made_with"].get("--precision") if state else ranks.shared(choose_precision(device))
    recipe = dataclasses.replace(recipe, precision=precision)
    settings = dataclasses.asdict(recipe)
    made_with = identity(manifest) | {"images a step": settings.pop("batch_size") * ranks.count}
    if not recipe.smooth:
        del settings["epochs"]  # may be raised later
    made_with |= {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    made_with["--cache device"] = cache == "device"
    if weights:
        made_with["--weights"] = str(weights.resolve())
    if state:
        with usable(run_dir):  # the dataset's fingerprint is also of the class names
            if weights:
                state["made_with"].setdefault("--weights", "none")
            compared = {name: value for name, value in made_with.items() if name != "class names"}
            refuse_another(state["made_with"], compared, run_dir)
    torch.manual_seed(recipe.seed)
    model = net_from(dataclasses.asdict(recipe), len(manifest.classes))
    if state and "--weights" in state["made_with"]:
        made_with["--weights"] = state["made_with"]["--weights"]
    elif weights:
        whole = begin_with(model, weights)
        if ranks.first:
            print(f"{weights}: {'all its weights' if whole else 'all but the last layer, which begins anew'}")
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe)
    run = Run(model, optimizer, Progress(), torch.zeros((), device=device), made_with, recipe, device)
    if state:
        with usable(run_dir):
            restore(run, state)
    if len(set(ranks.gathered(run.at.step))) > 1:
        raise UserError(f"{run_dir}: ranks find checkpoints of different steps; give a --run-dir on a disk that all share")
    return run


def begin_with(model: torch.nn.Module, path: Path) -> bool:
    """Whether all weights were taken from a file: where its net has as many classes. Else all but the last layer's were."""
    weights = load_weights(path)
    mine = model.state_dict()
    if {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in mine.items()}:
        model.load_state_dict(weights)
        return True
    load_all_but_last(model, weights, str(path))
    return False


def note_recipe(run_dir: Path, name: str, run: Run, ranks: Ranks, compiled: str) -> None:
    """Writes recipe.json, all that the weights follow from, unless that is what it says; `compiled` is the compiler's mode."""
    settings = dataclasses.asdict(run.recipe)
    own = {"bias": BIAS, "dropout": DROPOUT} if run.recipe.model in VARIANTS else {"dropout": DROPOUT}
    if run.recipe.model in NETS:  # of those in other packages None stays, their own
        settings |= {key: value for key, value in own.items() if settings[key] is None}
    noted = {
        "recipe": name,
        "dataset": run.made_with["dataset"],
        "ranks": ranks.count,
        "images_a_step": run.recipe.batch_size * ranks.count,
        **settings,
        "compile": compiled,  # moves the last bits of sums
        "cache_device": run.made_with["--cache device"],
        "weights": run.made_with.get("--weights"),
    }
    text = json.dumps(noted, indent=1) + "\n"
    path = run_dir / "recipe.json"
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text.encode())


def restore(run: Run, state: dict) -> None:
    """Puts what `save` wrote into a new run; raises whatever torch and the lookups do where that is not what it is."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    fresh = dataclasses.asdict(run.at)
    if {name: type(value) for name, value in state["progress"].items()} != {n: type(v) for n, v in fresh.items()}:
        raise ValueError(f"progress is {state['progress']}")
    run.at = Progress(**state["progress"])
    for parameter in run.model.parameters() if run.at.step else ():  # torch does not compare these
        if run.optimizer.state[parameter]["momentum_buffer"].shape != parameter.shape:
            raise ValueError("momentum of other shapes")
    run.loss_sum += state["loss_sum"]


def save(run: Run, run_dir: Path, keep: int = KEEP) -> None:
    # A run that went to where no numbers are must not replace the last good checkpoint; the last step may have brought
    # the weights there after its loss was taken.
    mean_loss(run)
    weights = torch.stack([parameter.detach().sum() for parameter in run.model.parameters()])
    check_finite(run.at.step, "sum of the weights", weights.sum().item())
    state = {
        "made_with": run.made_with,
        "progress": dataclasses.asdict(run.at),
        "loss_sum": run.loss_sum.item(),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    save_checkpoint(run_dir, run.at.step, state, keep)


def mean_loss(run: Run) -> float:
    """Since the last line of metrics.jsonl; raises UserError where it is no number. Waits for the device."""
    loss = run.loss_sum.item() / max(run.at.loss_steps, 1)
    check_finite(run.at.step, "loss", loss)
    return loss


def check_finite(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"step {step}: the {what} is {value}; begin again with a lower --lr and another --run-dir")
