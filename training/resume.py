"""A run in memory: started, saved as a checkpoint, and resumed from one."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.model import NETS, VARIANTS
from imagefeed.model.alexnet import BIAS, DROPOUT
from imagefeed.model.arrangement import Arrangement, arrange
from imagefeed.model.nets import class_layers, own_input
from imagefeed.model.step import choose_precision
from imagefeed.pipeline.arguments import normalization
from imagefeed.pipeline.options import IMAGENET_MEAN, IMAGENET_STD, OPTIONS
from imagefeed.pipeline.selection import in_short
from imagefeed.pipeline.tuner.saved import fastest_arrangement
from imagefeed.training.checkpoints import identity, load_latest, readable, refuse_difference, save_checkpoint
from imagefeed.training.evaluation import net_of
from imagefeed.training.inputs import Inputs
from imagefeed.training.options import KEEP, RECIPE
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe, make_optimizer
from imagefeed.training.reporting import Reading
from imagefeed.training.weights import load_first_weights


@dataclass
class Progress:
    """How far a run has come, apart from weights and momentum."""

    step: int = 0
    epochs: int = 0  # that ended and were evaluated
    drops: int = 0  # of the learning rate, by the plateau schedule
    best_error: float = math.inf  # validation top-1, percent
    stale_epochs: int = 0  # since the best error or the last drop
    loss_steps: int = 0  # since the last line of metrics.jsonl
    seconds: float = 0.0


@dataclass
class Run:
    """What a checkpoint keeps; a run can only be resumed with what it was `made_with`."""

    model: torch.nn.Module
    optimizer: torch.optim.SGD
    at: Progress
    loss_sum: torch.Tensor  # over at.loss_steps, the same on all ranks; on the device, so that no step waits for it
    made_with: dict[str, object]
    recipe: Recipe  # with its precision chosen
    device: torch.device

    def mean_loss(self) -> Callable[[], float]:
        """The mean since the last line of metrics.jsonl. What is returned waits until the device has come to this place, and
        raises UserError if the loss is not finite."""
        step, steps, total = self.at.step, max(self.at.loss_steps, 1), Reading(self.loss_sum)

        def read() -> float:
            loss = total.value() / steps
            self.check_finite("loss", loss, step)
            return loss

        return read

    def check_finite(self, what: str, value: float, step: int | None = None) -> None:
        if not math.isfinite(value):
            step = self.at.step if step is None else step
            raise UserError(f"step {step}: the {what} is {value}; start over with a lower --lr and another --run-dir")

    def save(self, run_dir: Path, keep: int = KEEP) -> None:
        """Writes a checkpoint, unless the run has diverged: it must not replace the last good one."""
        self.mean_loss()()
        # The last step may have made the weights infinite after its loss was computed.
        sums = torch.stack([parameter.detach().sum() for parameter in self.model.parameters()])
        self.check_finite("sum of the weights", sums.sum().item())
        state = {
            "made_with": self.made_with,
            "progress": dataclasses.asdict(self.at),
            "loss_sum": self.loss_sum.item(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(run_dir, self.at.step, state, keep)

    def restore(self, state: dict[str, Any]) -> None:
        """Loads a checkpoint; raises whatever torch and the lookups raise for a malformed one."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        fresh = dataclasses.asdict(self.at)
        if {name: type(value) for name, value in state["progress"].items()} != {n: type(v) for n, v in fresh.items()}:
            raise ValueError(f"progress is {state['progress']}")
        self.at = Progress(**state["progress"])
        for parameter in self.model.parameters() if self.at.step else ():  # torch does not compare these
            if self.optimizer.state[parameter]["momentum_buffer"].shape != parameter.shape:
                raise ValueError("momentum of other shapes")
        self.loss_sum += state["loss_sum"]


def open_run(inputs: Inputs, recipe: Recipe, run_dir: Path, weights: Path | None = None) -> Run:
    """Resumes the newest whole checkpoint of `run_dir`, or starts a run, from `weights` if given (weights.py).

    Raises UserError if that checkpoint is of another dataset, recipe or `weights`, if ranks find different ones, if `weights` are
    another net's, and if a new run's schedule needs a validation split. Of the loader's caches only that on the device changes
    pixels.
    """
    manifest, device, ranks = inputs.manifest, inputs.device, inputs.ranks
    state = load_latest(run_dir, set_aside=True) if ranks.first else None
    ranks.barrier()  # the first rank has renamed the corrupt ones
    if not ranks.first:
        state = load_latest(run_dir)
    precision = recipe.precision
    if precision == "auto":
        with readable(run_dir):
            precision = state["made_with"].get("--precision") if state else ranks.gathered(choose_precision(device))[0]
            recipe = dataclasses.replace(recipe, precision=precision)
    made_with = identity(manifest) | {"images a step": recipe.batch_size * ranks.count}
    made_with |= {option.flag: getattr(recipe, name) for name, option in RECIPE.items() if name != "batch_size"}
    if not recipe.smooth:
        del made_with["--epochs"]  # may be raised later
    made_with["--subset"] = in_short(inputs.subset) or "all"
    made_with["--cache device"] = inputs.reading.get("cache") == "device"
    if weights:
        made_with["--weights"] = str(weights.resolve())
    with readable(run_dir):
        both = "both" in (inputs.decoder, state["made_with"].get("--decoder") if state else None)
    if both or recipe.random_resized_crop or any(recipe.color_jitter):
        made_with["--decoder"] = inputs.decoder  # whose pixels differ
    if both:
        made_with["--native-share"] = inputs.reading.get("native_share", OPTIONS["native_share"].default)
    if state:
        with readable(run_dir):
            state["made_with"] = {"--subset": "all", "--decoder": "dali", "--native-share": 0.5} | state[
                "made_with"
            ]  # as in older versions
            if weights:
                state["made_with"].setdefault("--weights", "none")
            # The dataset's fingerprint covers the class names.
            mine = {k: v for k, v in made_with.items() if k != "class names"}
            remedy = f"use the same, or another --run-dir, where --weights {run_dir} would start from this run's weights"
            refuse_difference(state["made_with"], mine, run_dir, remedy)
            made_with |= {k: v for k, v in state["made_with"].items() if k == "--weights"}
    elif recipe.schedule == "plateau" and inputs.eval_split is None:
        raise UserError(
            f"{manifest.root}: no validation split, so --schedule plateau would never lower the learning rate; give --schedule "
            "cosine or --lr-milestones, or build with a validation split or --validation-fraction 0.1"
        )
    torch.manual_seed(recipe.seed)
    model = net_of(recipe, len(manifest.classes))
    if weights and not state:
        classes = len(manifest.classes)
        last = class_layers(model, functools.partial(net_of, recipe), classes)
        taken, origin = load_first_weights(model, weights, last)
        if ranks.first:
            print(taken)
            warn_of_other_pixels(weights, origin, recipe, manifest)
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and hasattr(model, "arrangement"):
        timed = fastest_arrangement(model, recipe.model, recipe.crop_size, precision, device) if ranks.first else Arrangement()
        arrange(model, ranks.gathered(timed)[0])  # all alike: their gradients are added
    run = Run(model, make_optimizer(model, recipe), Progress(), torch.zeros((), device=device), made_with, recipe, device)
    if state:
        with readable(run_dir):
            run.restore(state)
    if len(set(ranks.gathered(run.at.step))) > 1:
        raise UserError(f"{run_dir}: the ranks find different checkpoints; give a --run-dir on a disk that all of them share")
    return run


def warn_of_other_pixels(weights: Path, origin: dict[str, Any], recipe: Recipe, manifest: Manifest) -> None:
    """Prints a warning if the weights expect pixels that are normalized otherwise: as in the run that they come from, with
    `origin`, or, if they come from elsewhere, as their net's configuration says."""
    own = own_input(recipe.model)
    published = (own.mean, own.std) if own else (IMAGENET_MEAN, IMAGENET_STD) if recipe.model == "alexnet-owt" else None
    theirs = (origin["--mean"], origin["--std"]) if "--mean" in origin else published
    mine, statistics = (recipe.mean, recipe.std), manifest.load_statistics()
    if theirs is None or theirs == mine:
        return
    expected, used = (np.concatenate(normalization(statistics, *values)) for values in (theirs, mine))
    if "image" in (theirs[0], mine[0]) or not np.allclose(expected, used, rtol=1e-3):
        print(
            f"warning: {weights}: these weights expect pixels normalized with {in_words(*theirs)}, but this run has "
            f"{in_words(*mine)}; unless you mean that, start over with the former and another --run-dir"
        )


def in_words(mean: str | tuple[float, ...], std: str | tuple[float, ...]) -> str:
    words = (value if isinstance(value, str) else ",".join(f"{x:g}" for x in value) for value in (mean, std))
    return "--mean {} --std {}".format(*words)


def note_recipe(
    run_dir: Path, name: str, run: Run, dataset: Path, ranks: Ranks, compiled: str, subset: Path | None = None
) -> None:
    """Writes recipe.json, all that the weights follow from, if it is new; `compiled` is the compiler's mode, `subset` the file
    that names the records to train on. config.py reads it.
    """
    recipe = run.recipe
    settings = {key: getattr(recipe, key) for key in RECIPE}
    defaults = {"bias": BIAS, "dropout": DROPOUT} if recipe.model in VARIANTS else {"dropout": DROPOUT}
    if recipe.model in NETS:  # for nets of other packages, None means their own
        settings |= {key: value for key, value in defaults.items() if settings[key] is None}
    noted = {
        "recipe": name,
        "dataset_path": str(dataset.resolve()),
        "dataset": run.made_with["dataset"],
        "ranks": ranks.count,
        "images_a_step": recipe.batch_size * ranks.count,
        **settings,
        "compile": compiled,  # changes the last bits of sums
        "cache_device": run.made_with["--cache device"],
        "weights": run.made_with.get("--weights"),
        "subset": str(subset.resolve()) if subset else None,
        "subset_records": run.made_with["--subset"] if subset else None,
    }
    text = (json.dumps(noted, indent=1) + "\n").encode()
    path = run_dir / "recipe.json"
    if not path.exists() or path.read_bytes() != text:
        write_atomically(path, text)
