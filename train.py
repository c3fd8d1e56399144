"""Trains AlexNet on a packed dataset, or measures the error of a checkpoint.

    python train.py OUT                         # the same command again goes on where it stopped
    python train.py OUT --evaluate runs/OUT     # centre crop and ten views

The recipe is section 5 of the paper, which model/alexnet.py names. The run folder gets checkpoint-STEP.pt (the last
two) and what reporting.py writes: metrics.jsonl, summary.json and curves.png.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read by OpenMP when torch loads: how long a thread spins for the others before it sleeps. A step on the CPU has thousands
# of short parallel regions. By default (300,000) two busy neighbours on two cores brought training from 48 to 2 images/s;
# without spinning it was 16 to 20, but 31 alone on the machine; so: 39 to 49 alone, 11 to 19 with neighbours.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import click
import torch
import torch.nn.functional as F

from checkpoints import load_checkpoint, load_latest, locked, refuse_another, save_checkpoint, usable
from model import AlexNet
from model.step import choose_precision, forward, keep_memory, train_step
from pipeline import Batch, ImageLoader
from pipeline.cli import augmentation_options, reading_options
from preprocess.errors import UserError, one_sentence
from preprocess.manifest import Manifest
from reporting import Display, Meter, Metrics, describe, read_summary, show_errors, show_summary, write_summary

MOMENTUM, DECAY = 0.9, 0.0005  # section 5
COLOUR = 0.1  # section 4.1
MAX_DROPS = 3  # section 5: "reduced three times prior to termination"
PATIENCE_EPOCHS = 5  # section 5: "when the validation error rate stopped improving", without saying for how long
LOG_EVERY = 20  # steps; reading the loss makes host and GPU wait for each other


@dataclass(frozen=True)
class Options:
    """What decides the weights besides the dataset; a run goes on only with the same."""

    batch_size: int
    lr: float
    lr_drops: str
    limit_batches: int | None
    seed: int
    size: int
    colour: bool
    bias: float
    precision: str
    shuffle: str = "global"
    mean: str = "channel"
    deviation: bool = False
    random_resized: bool = False
    color_jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)


@dataclass
class Progress:
    """Where a run is, apart from weights, momentum and random state."""

    step: int = 0
    epochs: int = 0  # that ended and were evaluated
    drops: int = 0  # of the learning rate
    best_error: float = math.inf  # held-out top-1, percent
    stale_epochs: int = 0  # since that, or since the last drop
    loss_steps: int = 0  # since the last line of metrics.jsonl
    seconds: float = 0.0


@dataclass
class Run:
    """What a checkpoint keeps; it can only be resumed with what it was `made_with`."""

    model: AlexNet
    optimizer: torch.optim.SGD
    at: Progress
    loss_sum: torch.Tensor  # over at.loss_steps; on the device, so that no step waits for it
    made_with: dict[str, object]
    precision: str
    device: torch.device


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


def check_drops(_context, _parameter, value: str) -> str:
    if value != "auto" and not all(part.isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is neither 'auto' nor epochs as in 25,51,79")
    return value


def check_finite(_context, _parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="auto: CUDA where usable.")
@click.option("--batch-size", type=click.IntRange(1), default=128, help="Images in a step.")
@click.option("--epochs", type=click.IntRange(1), default=90, help="Raise it later to go on.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=0.01,
    callback=check_finite,
    help="Learning rate at the start.",
)
@click.option(
    "--lr-drops",
    default="auto",
    callback=check_drops,
    help="Epochs after which the learning rate is divided by 10, as in 25,51,79; auto: when the held-out top-1 error "
    f"was not lowered for {PATIENCE_EPOCHS} epochs, {MAX_DROPS} times at most.",
)
@click.option("--limit-batches", type=click.IntRange(1), help="Steps that count as an epoch, to try things.")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/NAME-OF-OUT]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of all that is random.")
@click.option("--size", type=click.IntRange(64), default=224, help="Pixels of a crop.")
@click.option("--colour/--no-colour", default=True, help="The paper's colour jitter.")
@augmentation_options
@click.option(
    "--bias",
    default=1.0,
    callback=check_finite,
    help="First value of the hidden layers' biases; 0.1 starts sooner on little data.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="auto: bfloat16 on CUDA, on a CPU what is faster there.",
)
@reading_options
@click.option(
    "--checkpoint-every",
    type=click.FloatRange(0),
    default=300,
    callback=check_finite,
    help="Seconds from one to the next.",
)
@click.option(
    "--evaluate",
    "checkpoint",
    type=click.Path(path_type=Path, exists=True),
    help="Train nothing; measure a checkpoint, or the newest of a run folder.",
)
def main(
    out: Path,
    device: str,
    epochs: int,
    run_dir: Path | None,
    checkpoint_every: float,
    checkpoint: Path | None,
    **options,
) -> None:
    """Train AlexNet on the dataset OUT; to go on after an interruption, run the same command again."""
    with one_sentence():
        # The one place that reads torchrun's environment.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("torchrun with several processes is not supported yet; start one with: python train.py")
        manifest = Manifest.load(out)
        chosen = choose_device(device)
        fields = {field.name for field in dataclasses.fields(Options)}
        reading = {name: options.pop(name) for name in list(options) if name not in fields}
        if checkpoint:
            measure(manifest, checkpoint, chosen, reading)
        else:
            run_dir = run_dir or Path("runs") / out.resolve().name
            with locked(run_dir):
                train(manifest, Options(**options), epochs, run_dir, chosen, reading, checkpoint_every)


def train(
    manifest: Manifest,
    options: Options,
    epochs: int,
    run_dir: Path,
    device: torch.device,
    reading: dict[str, object],
    checkpoint_every_s: float,
) -> None:
    """Trains from the newest whole checkpoint in `run_dir`, or from the start, until `epochs` are over, and sums up.

    `reading` are the options of the loader that do not change its batches.

    Raises UserError where that checkpoint is of another dataset, net or options, and KeyboardInterrupt where SIGINT or
    SIGTERM asked for an end, after writing a checkpoint.
    """
    run = open_run(manifest, options, run_dir, device)
    at = run.at
    with contextlib.ExitStack() as stack:
        loader = ImageLoader(
            manifest,
            manifest.train_split,
            options.batch_size,
            size=options.size,
            colour=COLOUR if options.colour else 0.0,
            shuffle=options.shuffle,
            mean=options.mean,
            deviation=options.deviation,
            random_resized=options.random_resized,
            color_jitter=options.color_jitter,
            seed=options.seed,
            device=device,
            position=at.step,
            **reading,
        )
        stack.enter_context(loader)
        epoch_steps = min(len(loader), options.limit_batches or len(loader))
        total = max(epochs * epoch_steps, at.step)
        click.echo(
            f"AlexNet on {manifest.root}: {options.batch_size} images a step, {epoch_steps:,} steps an epoch, "
            f"{total:,} in all, {run.precision} on {device}; run folder {run_dir}"
        )
        summary = read_summary(run_dir)
        if summary and summary["step"] == at.step == total:
            click.echo(f"{run_dir}: this run is over; to train on, give more --epochs")
            show_summary(summary)
            return
        if at.step:
            click.echo(f"{run_dir}: goes on after step {at.step:,}")
        stop = stack.enter_context(signals_noted())
        metrics = stack.enter_context(Metrics(run_dir, at.step, complete=not at.loss_steps))
        display = stack.enter_context(Display(total, at.step))
        meter = Meter(device, options.batch_size)

        def line() -> dict[str, float]:
            loss = {"loss/train": mean_loss(run), "lr": options.lr / 10**at.drops}
            return {"step": at.step, "epoch": at.step / epoch_steps, **loss, **meter.read()}

        def errors(views: str) -> dict[str, float]:
            def watch(share: float) -> None:
                display.show(at.step, f"{VIEWS[views]} of the held-out images: {share:.0%}")
                if stop.is_set():
                    raise Stopped

            if manifest.eval_split is None:
                return {}
            looks = (options.size, options.mean, options.deviation)
            with held_out(manifest, views, options.batch_size, device, reading, *looks) as images:
                found = evaluate(run.model, images, run.precision, watch)
            refuse_no_number(at.step, "held-out loss", found["loss"])
            return found

        batches = endless(loader)
        text = ""
        saved_s = clock_s = time.monotonic()
        try:
            while True:
                epoch_ends = at.step == (at.epochs + 1) * epoch_steps
                if epoch_ends or (at.loss_steps and at.step % LOG_EVERY == 0):
                    entry = line() | {"data/damaged": loader.damaged}
                    text = describe(entry, epochs)
                    if epoch_ends:
                        entry |= {f"metrics/val/{name}": value for name, value in errors("center").items()}
                        end_epoch(run, entry.get("metrics/val/top1_error"), options)
                        display.say(describe(entry, epochs))
                    metrics.write(entry)
                    run.loss_sum.zero_()
                    at.loss_steps = 0
                    meter.restart()
                if at.step == total:
                    break
                if stop.is_set():
                    raise Stopped
                if time.monotonic() - saved_s >= checkpoint_every_s:
                    metrics.sync()
                    save(run, run_dir)
                    saved_s = time.monotonic()
                run.loss_sum += train_step(run.model, *meter.fetch(batches)[:2], run.optimizer, run.precision)
                at.loss_steps += 1
                at.step += 1
                at.seconds, clock_s = at.seconds + time.monotonic() - clock_s, time.monotonic()
                if device.type == "cpu":
                    text = describe(line(), epochs)
                display.show(at.step, text)
            metrics.sync()
            save(run, run_dir)
            ten = errors("ten")
        except Stopped:
            metrics.sync()
            save(run, run_dir)
            raise KeyboardInterrupt from None
    show_summary(write_summary(run_dir, manifest, dataclasses.asdict(at), ten))


def set_learning_rate(optimizer: torch.optim.SGD, lr: float) -> None:
    """Changes it so that momentum goes on as in section 5, where the learning rate is inside it.

    The paper: v <- .9 v - .0005 lr w - lr g, w <- w + v. torch keeps b = -v / lr instead, so a drop of the learning
    rate would shrink the way already gathered as well.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None and lr != group["lr"]:
                momentum.mul_(group["lr"] / lr)
        group["lr"] = lr


def end_epoch(run: Run, top1_error: float | None, options: Options) -> None:
    """Counts the epoch and drops the learning rate where that is due; `top1_error` is None without a held-out split."""
    at = run.at
    at.epochs += 1
    at.stale_epochs += 1
    if top1_error is not None and top1_error < at.best_error:
        at.best_error, at.stale_epochs = top1_error, 0
    if options.lr_drops != "auto":
        at.drops = sum(at.epochs >= int(epoch) for epoch in options.lr_drops.split(","))
    elif top1_error is not None and at.stale_epochs == PATIENCE_EPOCHS and at.drops < MAX_DROPS:
        at.drops, at.stale_epochs = at.drops + 1, 0
    set_learning_rate(run.optimizer, options.lr / 10**at.drops)


VIEWS = {"center": "centre crop", "ten": "ten views"}


def held_out(
    manifest: Manifest,
    views: str,
    batch_size: int,
    device: torch.device,
    reading: dict[str, object],
    size: int,
    mean: str,
    deviation: bool,
) -> ImageLoader:
    """Each held-out record once, about `batch_size` crops at a time; no cache, which is for what is seen again."""
    return ImageLoader(
        manifest,
        manifest.eval_split,
        max(1, batch_size // 10) if views == "ten" else batch_size,
        views=views,
        size=size,
        mean=mean,
        deviation=deviation,
        device=device,
        **reading | {"cache": "none"},
    )


@torch.inference_mode()
def evaluate(
    model: AlexNet, loader: ImageLoader, precision: str, watch: Callable[[float], None] = lambda share: None
) -> dict[str, float]:
    """Top-1 and top-5 error in percent, the mean loss, and the number of records that count.

    Of ten views the softmax outputs are averaged (section 4.1). `watch` gets the share that is done, batch by batch.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=loader.device)
    for done, batch in enumerate(loader, 1):
        crops = batch.images.flatten(0, -4)
        logits = forward(model, crops, precision).unflatten(0, (len(batch.labels), -1))
        scores = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
        hits = scores.topk(min(5, scores.shape[1])).indices == batch.labels[:, None]
        loss = F.nll_loss(scores, batch.labels, reduction="none")
        counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)])
        sums += (counts * batch.valid).sum(1)
        watch(done / len(loader))
    model.train()
    top1, top5, loss, records = sums.tolist()
    return {
        "top1_error": 100 - 100 * top1 / records,
        "top5_error": 100 - 100 * top5 / records,
        "loss": loss / records,
        "records": int(records),
    }


def measure(manifest: Manifest, path: Path, device: torch.device, reading: dict[str, object]) -> None:
    """Prints the errors of a checkpoint, or of the newest in a folder, on the held-out split of the dataset."""
    state = load_latest(path) if path.is_dir() else load_checkpoint(path)
    if state is None:
        raise UserError(
            f"{path}: there is no checkpoint in this folder; train one with: python train.py {manifest.root}"
        )
    if manifest.eval_split is None:
        raise UserError(f"{manifest.root}: no held-out split to measure on; build the dataset with one, such as val")
    with usable(path):
        made_with, step = state["made_with"], state["progress"]["step"]
        mine = identity(manifest)
        if made_with["dataset"] == mine.pop("dataset"):
            del mine["class names"]  # the dataset's fingerprint is also of them
        refuse_another(made_with, mine, path, "measure it on a dataset of the same classes")
        size, precision = made_with["--size"], made_with["--precision"]
        mean, deviation = made_with["--mean"], made_with["--deviation"]
        model = AlexNet(len(manifest.classes), size=size)
        model.load_state_dict(state["model"])
    model.to(device, memory_format=torch.channels_last)
    with Display(1, 0) as display:
        found = {}
        for views, name in VIEWS.items():
            with held_out(manifest, views, 128, device, reading, size, mean, deviation) as loader:
                watch = lambda share, name=name: display.show(share, f"{name}: {share:.0%}")  # noqa: E731
                found[name] = evaluate(model, loader, precision, watch)
    title = f"{path}, step {step:,}, on {manifest.eval_split} of {manifest.root}"
    show_errors(title, found, len(manifest.classes))


def open_run(manifest: Manifest, options: Options, run_dir: Path, device: torch.device) -> Run:
    """The newest whole checkpoint of `run_dir` in memory, or a new run."""
    state = load_latest(run_dir, set_aside=True)
    precision = options.precision
    if precision == "auto":
        with usable(run_dir):
            precision = state["made_with"].get("--precision") if state else choose_precision(device)
    made_with = identity(manifest)
    for name, value in dataclasses.asdict(dataclasses.replace(options, precision=precision)).items():
        made_with["--" + name.replace("_", "-")] = value
    if state:
        with usable(run_dir):  # the dataset's fingerprint is also of the class names
            compared = {name: value for name, value in made_with.items() if name != "class names"}
            refuse_another(state["made_with"], compared, run_dir)
    torch.manual_seed(options.seed)
    model = AlexNet(len(manifest.classes), size=options.size, bias=options.bias).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), options.lr, MOMENTUM, weight_decay=DECAY, fused=True)
    run = Run(model, optimizer, Progress(), torch.zeros((), device=device), made_with, precision, device)
    if state:
        with usable(run_dir):
            restore(run, state)
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
    torch.set_rng_state(state["random"])
    if run.device.type == "cuda" and "random_cuda" in state:
        torch.cuda.set_rng_state(state["random_cuda"], run.device)


def identity(manifest: Manifest) -> dict[str, object]:
    """What a checkpoint must agree in, besides the options, to be of this net and dataset."""
    names = hashlib.sha256(json.dumps(manifest.classes).encode()).hexdigest()[:16]
    return {
        "net": "AlexNet",
        "classes": len(manifest.classes),
        "class names": names,
        "dataset": manifest.fingerprint[:16],
    }


def save(run: Run, run_dir: Path) -> None:
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
        "random": torch.get_rng_state(),
    }
    if run.device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(run.device)
    save_checkpoint(run_dir, run.at.step, state)


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
def signals_noted() -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into an event that the loop looks at; the second one interrupts at once."""
    stop = threading.Event()

    def note(number, frame) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_device(name: str) -> torch.device:
    """The device to train on; says which it is and sets it up."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise UserError("--device cuda: PyTorch finds no usable CUDA device here; use --device cpu")
    if usable and name != "cpu":
        torch.backends.cudnn.benchmark = True
        click.echo(f"device: cuda ({torch.cuda.get_device_name()})")
        return torch.device("cuda", torch.cuda.current_device())
    click.echo("device: cpu" + ("" if usable or name == "cpu" else " (no usable CUDA device)"))
    keep_memory()
    return torch.device("cpu")


if __name__ == "__main__":
    main()
