"""Trains AlexNet, or another net, on a packed dataset, or measures the error of checkpoints.

    python train.py OUT                           # the same command again goes on where it stopped
    python train.py OUT --evaluate runs/OUT       # centre crop and ten views; several checkpoints are averaged
    torchrun --nproc-per-node=8 train.py OUT      # on eight GPUs

recipes.py says what a training is made of, parallel.py what several processes agree in, evaluation.py what an error is.
The run folder gets recipe.json, checkpoint-STEP.pt (the last two) and what reporting.py writes: metrics.jsonl,
summary.json and curves.png.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Read by OpenMP when torch loads: how long a thread spins for the others before it sleeps. A step on the CPU has thousands
# of short parallel regions. By default (300,000) two busy neighbours on two cores brought training from 48 to 2 images/s;
# without spinning it was 16 to 20, but 31 alone on the machine; so: 39 to 49 alone, 11 to 19 with neighbours.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import click
import torch

from checkpoints import KEEP, identity, load_latest, locked, refuse_another, save_checkpoint, usable
from evaluation import LOOKS, VIEWS, Member, evaluate, held_out, measure, net_from
from model import NETS
from model.step import choose_precision, keep_memory, train_step
from parallel import Ranks, joined
from pipeline import Batch, ImageLoader
from pipeline.cli import augmentation_options, reading_options
from preprocess.errors import UserError, one_sentence
from preprocess.manifest import Manifest
from preprocess.records import write_atomically
from recipes import (
    MAX_DROPS,
    PATIENCE_EPOCHS,
    RECIPES,
    SCHEDULES,
    Recipe,
    check,
    jittered,
    learning_rate,
    make_optimizer,
    set_learning_rates,
)
from reporting import Display, Meter, Metrics, StuckLoss, describe, read_summary, show_summary, write_summary

COLOUR = 0.1  # section 4.1
LOG_EVERY = 20  # steps; reading the loss makes host and GPU wait for each other
AGREE_EVERY = 10  # steps of several ranks on GPUs, after which they ask each other whether one is to stop
STUCK_AFTER = 1000  # steps, or an epoch, until the loss should have left that of guessing
FIELDS = {field.name for field in dataclasses.fields(Recipe)}


@dataclass
class Progress:
    """Where a run is, apart from weights and momentum."""

    step: int = 0
    epochs: int = 0  # that ended and were evaluated
    drops: int = 0  # of the learning rate, by the plateau schedule
    best_error: float = math.inf  # held-out top-1, percent
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


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


def take_recipe(context: click.Context, _parameter, name: str) -> str:
    """Makes what differs from the paper's recipe the defaults of the other options."""
    paper = dataclasses.asdict(RECIPES["paper"])
    context.default_map = {
        key: value for key, value in dataclasses.asdict(RECIPES[name]).items() if value != paper[key]
    }
    return name


def check_epochs(_context, _parameter, value: str | None) -> str | None:
    if value is not None and not all(part.isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} are no epochs as in 25,51,79")
    return value


def check_schedule(_context, _parameter, value: str) -> str:
    value = "plateau" if value == "auto" else value
    if value not in SCHEDULES and not all(part.isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is neither {', '.join(SCHEDULES)} nor epochs as in 25,51,79")
    return value


def check_finite(_context, _parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def recipe_options(command):
    """Adds those that decide the weights, but for the loader's; --recipe fills what is not given."""
    paper = RECIPES["paper"]
    positive = click.FloatRange(0, min_open=True)
    for option in reversed((
        click.option(
            "--recipe", type=click.Choice(list(RECIPES)), default="paper", is_eager=True, callback=take_recipe,
            help="What the options below and some of the images' are if they are not given; shown are the paper's.",
        ),
        click.option(
            "--model", default=paper.model, metavar="NAME",
            help=f"The net: {', '.join(NETS)}. Those of torchvision and timm expect --deviation.",
        ),
        click.option("--lrn/--no-lrn", default=True, help="AlexNet's normalisation."),
        click.option("--overlapping/--no-overlapping", default=True, help="AlexNet's pools of 3 pixels, 2 apart, or of 2."),
        click.option(
            "--dropout", type=click.FloatRange(0, 1, max_open=True), show_default="the net's, 0.5 in AlexNet",
            help="Probability of a hidden unit to be left out.",
        ),
        click.option(
            "--bias", type=float, callback=check_finite, show_default="the net's, 1 in AlexNet",
            help="First value of the hidden layers' biases; 0.1 starts sooner on little data.",
        ),
        click.option(
            "--batch-size", type=click.IntRange(1), default=paper.batch_size,
            help="Images in a step, of each rank; a recipe's are shared out over the ranks.",
        ),
        click.option(
            "--epochs", type=click.IntRange(1), default=paper.epochs,
            help="Raise it later to go on, unless the schedule is smooth.",
        ),
        click.option("--lr", type=positive, default=paper.lr, callback=check_finite, help="Highest learning rate."),
        click.option(
            "--schedule", "--lr-drops", "schedule", default=paper.schedule, callback=check_schedule,
            help="cosine or linear: the learning rate falls to 0 at the end; 25,51,79: it is divided by 10 after these epochs; "
            f"plateau: when the held-out top-1 error was not lowered for {PATIENCE_EPOCHS} epochs, {MAX_DROPS} times at most.",
        ),
        click.option(
            "--warmup-epochs", type=click.FloatRange(0), default=paper.warmup_epochs, callback=check_finite,
            help="In which the learning rate rises from 0.",
        ),
        click.option(
            "--momentum", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=paper.momentum,
            callback=check_finite, help="Share of the last update in the next.",
        ),
        click.option(
            "--decay", type=click.FloatRange(0), default=paper.decay, callback=check_finite,
            help="Of weights, times the learning rate, in each step.",
        ),
        click.option(
            "--bias-lr", type=positive, callback=check_finite, show_default="that of weights",
            help="Learning rate of biases, which then neither falls nor lets them decay.",
        ),
        click.option(
            "--first-layer-epochs", callback=check_epochs, metavar="A,B",
            help="Epochs after which the first layer's learning rate is divided by 10, and after which it is 0.",
        ),
        click.option("--size", type=click.IntRange(64), default=paper.size, help="Pixels of a crop."),
        click.option("--colour/--no-colour", default=True, help="The paper's colour jitter."),
        click.option("--colour-epochs", type=click.IntRange(0), show_default="all", help="Epochs with colour jitter."),
        click.option(
            "--colour-divisor", type=positive, default=paper.colour_divisor, callback=check_finite,
            help="Divides pixels in training as long as their colours are jittered.",
        ),
        click.option(
            "--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default=paper.precision,
            help="auto: bfloat16 on CUDA, on a CPU what is faster there.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=paper.seed, help="Of all that is random."),
        click.option("--limit-batches", type=click.IntRange(1), help="Steps that count as an epoch, to try things."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, metavar="[CKPT]...", type=click.Path(path_type=Path, exists=True))
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="auto: CUDA where usable.")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/NAME-OF-OUT]")
@recipe_options
@augmentation_options
@reading_options
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(0),
    default=300,
    callback=check_finite,
    help="Seconds from one to the next.",
)
@click.option("--keep", type=click.IntRange(1), default=KEEP, help="Checkpoints that are kept, the newest.")
@click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too, into the run folder.")
@click.option(
    "--evaluate",
    "checkpoint",
    metavar="CKPT ...",
    type=click.Path(path_type=Path, exists=True),
    help="Train nothing; measure a checkpoint, or the newest of a run folder; of several the outputs are averaged.",
)
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --evaluate: a .csv or .npz of each record's five likeliest classes, by ten views.",
)
@click.pass_context
def main(
    context: click.Context,
    out: Path,
    more: tuple[Path, ...],
    device: str,
    run_dir: Path | None,
    recipe: str,
    checkpoint_every: float,
    keep: int,
    tensorboard: bool,
    checkpoint: Path | None,
    predictions: Path | None,
    **options,
) -> None:
    """Train AlexNet on the dataset OUT; to go on after an interruption, run the same command again."""
    if more and not checkpoint:
        raise click.UsageError(f"{more[0]}: one dataset is trained on; checkpoints come after --evaluate")
    if predictions and (not checkpoint or predictions.suffix not in (".csv", ".npz")):
        raise click.UsageError(f"--predictions {predictions}: give a name that ends in .csv or .npz, and --evaluate")
    with one_sentence(), joined() as ranks:
        manifest = Manifest.load(out)
        chosen = choose_device(device, ranks)
        reading = {name: options.pop(name) for name in list(options) if name not in FIELDS}
        if checkpoint:
            measure(manifest, [checkpoint, *more], chosen, reading, ranks, predictions)
            return
        if context.get_parameter_source("batch_size") is not click.core.ParameterSource.COMMANDLINE:
            options["batch_size"] = share_out(options["batch_size"], ranks)
        resolved = Recipe(**options)
        check(resolved)
        run_dir = run_dir or Path("runs") / out.resolve().name
        with locked(run_dir) if ranks.first else contextlib.nullcontext():
            run = open_run(manifest, resolved, run_dir, chosen, ranks, reading["cache"])
            if ranks.first:
                note_recipe(run_dir, recipe, run.recipe, ranks)
            train(manifest, run, run_dir, reading, ranks, checkpoint_every, keep, tensorboard)


def note_recipe(run_dir: Path, name: str, recipe: Recipe, ranks: Ranks) -> None:
    """Writes recipe.json, all that the weights follow from, unless that is what it says."""
    text = json.dumps({"recipe": name, "ranks": ranks.count, **dataclasses.asdict(recipe)}, indent=1) + "\n"
    path = run_dir / "recipe.json"
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text.encode())


def share_out(batch_size: int, ranks: Ranks) -> int:
    if batch_size % ranks.count:
        raise UserError(f"the recipe's {batch_size} images a step are not {ranks.count} equal parts; give --batch-size")
    return batch_size // ranks.count


def train(
    manifest: Manifest,
    run: Run,
    run_dir: Path,
    reading: dict[str, object],
    ranks: Ranks,
    checkpoint_every_s: float,
    keep: int,
    tensorboard: bool,
) -> None:
    """Trains until the recipe's epochs are over, and sums up; the first of the ranks writes.

    `reading` are the options of the loader that are about cost, `keep` is the number of checkpoints.

    Raises UserError where no number comes out, and KeyboardInterrupt where SIGINT or SIGTERM asked for an end, after
    writing a checkpoint.
    """
    recipe, at, device = run.recipe, run.at, run.device

    def open_loader() -> ImageLoader:
        return ImageLoader(
            manifest,
            manifest.train_split,
            recipe.batch_size,
            size=recipe.size,
            colour=COLOUR if jitters else 0.0,
            shuffle=recipe.shuffle,
            mean=recipe.mean,
            deviation=recipe.deviation,
            random_resized=recipe.random_resized,
            color_jitter=recipe.color_jitter,
            seed=recipe.seed,
            rank=ranks.rank,
            world_size=ranks.count,
            device=device,
            position=at.step,
            **reading,
        )

    with contextlib.ExitStack() as stack:
        jitters = recipe.colour
        loader = open_loader()
        damaged = 0  # records that the loader before it found
        stack.callback(lambda: loader.close())
        epoch_steps = min(len(loader), recipe.limit_batches or len(loader))
        total = max(recipe.epochs * epoch_steps, at.step)
        together = f" of {ranks.count} ranks" if ranks.count > 1 else ""
        click.echo(
            f"{recipe.model} on {manifest.root}: {recipe.batch_size * ranks.count} images a step{together}, {epoch_steps:,} "
            f"steps an epoch, {total:,} in all, {recipe.precision} on {device}; run folder {run_dir}"
        )
        summary = read_summary(run_dir)
        if ranks.shared(bool(summary and summary["step"] == at.step == total)):
            click.echo(f"{run_dir}: this run is over; to train on, give more --epochs")
            if summary:
                show_summary(summary)
            return
        if at.step:
            click.echo(f"{run_dir}: goes on after step {at.step:,}")
        stop = stack.enter_context(signals_noted(insist=ranks.count == 1))
        display = stack.enter_context(Display(total, at.step))
        stuck = StuckLoss(len(manifest.classes), min(epoch_steps, STUCK_AFTER))
        if ranks.first:
            metrics = stack.enter_context(Metrics(run_dir, at.step, not at.loss_steps, tensorboard))
            for earlier in metrics.kept:
                stuck.notices(earlier)
        meter = Meter(device, recipe.batch_size * ranks.count)
        ranks.average_gradients(run.model, run.optimizer)

        def line() -> dict[str, float]:
            lr = learning_rate(recipe, max(at.step - 1, 0), epoch_steps, at.drops)
            return {
                "step": at.step,
                "epoch": at.step / epoch_steps,
                "loss/train": mean_loss(run),
                "lr": lr,
                **meter.read(),
            }

        def stopping(*flags: bool) -> list[bool]:
            """Whether to stop, and `flags`: what one rank wants, all do, and after the same step."""
            return ranks.any(stop.is_set(), *flags) if ranks.count > 1 else [stop.is_set(), *flags]

        def keep_all() -> None:
            if ranks.first:
                metrics.sync()
                save(run, run_dir, keep)

        def errors(views: str) -> dict[str, float]:
            def watch(share: float) -> None:
                display.show(at.step, f"{VIEWS[views]} of the held-out images: {share:.0%}")
                if stopping()[0]:
                    raise Stopped

            if manifest.eval_split is None:
                return {}
            ranks.share_buffers(run.model)
            looks = tuple(getattr(recipe, name) for name in LOOKS)
            with held_out(manifest, views, recipe.batch_size, device, reading, looks, ranks) as images:
                found = evaluate([Member(run.model, recipe.precision, looks)], {looks: images}, ranks, watch)
            refuse_no_number(at.step, "held-out loss", found["loss"])
            return found

        batches = endless(loader)
        text = ""
        saved_s = clock_s = time.monotonic()
        try:
            while True:
                epoch_ends = at.step == (at.epochs + 1) * epoch_steps
                if epoch_ends or (at.loss_steps and at.step % LOG_EVERY == 0):
                    entry = line() | {"data/damaged": ranks.sum(torch.tensor(max(damaged, loader.damaged))).item()}
                    text = describe(entry, recipe.epochs)
                    if epoch_ends:
                        entry |= {f"metrics/val/{name}": value for name, value in errors("center").items()}
                        end_epoch(at, entry.get("metrics/val/top1_error"), recipe)
                        display.say(describe(entry, recipe.epochs))
                    if ranks.first:
                        metrics.write(entry)
                    if stuck.notices(entry):
                        display.say(stuck.describe(entry))
                    run.loss_sum.zero_()
                    at.loss_steps = 0
                    meter.restart()
                if at.step == total:
                    break
                # Between GPUs it is not free to ask the others.
                if ranks.count == 1 or device.type == "cpu" or at.step % AGREE_EVERY == 0:
                    ends, due = stopping(ranks.first and time.monotonic() - saved_s >= checkpoint_every_s)
                    if ends:
                        raise Stopped
                    if due:
                        keep_all()
                        saved_s = time.monotonic()
                if jitters != jittered(recipe, at.step, epoch_steps):
                    jitters = not jitters
                    damaged = loader.damaged
                    loader.close()
                    loader = open_loader()
                    batches = endless(loader)
                images, labels = meter.fetch(batches)[:2]
                if jitters and recipe.colour_divisor != 1:
                    images = images / recipe.colour_divisor
                ranks.seed_step(recipe.seed, at.step, device)
                set_learning_rates(run.optimizer, recipe, at.step, epoch_steps, at.drops)
                loss = train_step(run.model, images, labels, run.optimizer, recipe.precision)
                run.loss_sum += ranks.sum(loss) / ranks.count
                at.loss_steps += 1
                at.step += 1
                at.seconds, clock_s = at.seconds + time.monotonic() - clock_s, time.monotonic()
                if device.type == "cpu":
                    text = describe(line(), recipe.epochs)
                display.show(at.step, text)
            keep_all()
            ten = errors("ten")
        except Stopped:
            keep_all()
            ranks.barrier()  # torchrun ends all as soon as one has ended, and the first one is still writing
            raise KeyboardInterrupt from None
    if ranks.first:
        show_summary(write_summary(run_dir, recipe.model, manifest, dataclasses.asdict(at), ten))
    ranks.barrier()


def end_epoch(at: Progress, top1_error: float | None, recipe: Recipe) -> None:
    """Counts the epoch, and a drop of the learning rate where the plateau schedule has one; `top1_error` is None without a
    held-out split."""
    at.epochs += 1
    at.stale_epochs += 1
    if top1_error is not None and top1_error < at.best_error:
        at.best_error, at.stale_epochs = top1_error, 0
    if recipe.schedule != "plateau" or top1_error is None:
        return
    if at.stale_epochs == PATIENCE_EPOCHS and at.drops < MAX_DROPS:
        at.drops, at.stale_epochs = at.drops + 1, 0


def open_run(
    manifest: Manifest, recipe: Recipe, run_dir: Path, device: torch.device, ranks: Ranks, cache: str = "none"
) -> Run:
    """The newest whole checkpoint of `run_dir` in memory, or a new run. Of the loader's caches only that on the device shows
    other pixels.

    Raises UserError where that checkpoint is of another dataset or recipe, and where ranks find different ones.
    """
    state = load_latest(run_dir, set_aside=True) if ranks.first else None
    ranks.barrier()  # the first one has set aside what is damaged
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
    if state:
        with usable(run_dir):  # the dataset's fingerprint is also of the class names
            compared = {name: value for name, value in made_with.items() if name != "class names"}
            refuse_another(state["made_with"], compared, run_dir)
    torch.manual_seed(recipe.seed)
    model = net_from(dataclasses.asdict(recipe), len(manifest.classes))
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe)
    run = Run(model, optimizer, Progress(), torch.zeros((), device=device), made_with, recipe, device)
    if state:
        with usable(run_dir):
            restore(run, state)
    if len(set(ranks.gathered(run.at.step))) > 1:
        raise UserError(
            f"{run_dir}: ranks find checkpoints of different steps; give a --run-dir on a disk that all share"
        )
    return run


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
    refuse_no_number(run.at.step, "sum of the weights", weights.sum().item())
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
    refuse_no_number(run.at.step, "loss", loss)
    return loss


def refuse_no_number(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"step {step}: the {what} is {value}; begin again with a lower --lr and another --run-dir")


def endless(loader: ImageLoader) -> Iterator[Batch]:
    """One epoch after the other, from the loader's position on."""
    while True:
        yield from loader


@contextlib.contextmanager
def signals_noted(insist: bool = True) -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into an event that the loop looks at; the second one interrupts at once, if one may `insist`.

    torchrun passes on what its processes may have got already, and kills them if they do not end.
    """
    stop = threading.Event()

    def note(number, frame) -> None:
        if stop.is_set() and insist:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device to train on; says which it is and sets it up."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise UserError("--device cuda: PyTorch finds no usable CUDA device here; use --device cpu")
    if usable and name != "cpu":
        if ranks.local >= torch.cuda.device_count():
            raise UserError(f"rank {ranks.rank}: there are {torch.cuda.device_count()} GPUs here; start as many ranks")
        torch.backends.cudnn.benchmark = True
        click.echo(f"device: cuda ({torch.cuda.get_device_name()})")
        return torch.device("cuda", torch.cuda.current_device())
    click.echo("device: cpu" + ("" if usable or name == "cpu" else " (no usable CUDA device)"))
    keep_memory()
    return torch.device("cpu")


if __name__ == "__main__":
    main()
