"""Trains AlexNet, or another net, on a packed dataset, or measures the error of checkpoints.

    python train.py OUT                           # the same command again goes on where it stopped
    python train.py OUT --evaluate runs/OUT       # centre crop and ten views; several checkpoints are averaged
    python train.py OUT --export runs/OUT         # for programs without this one: torch.export and ONNX
    torchrun --nproc-per-node=8 train.py OUT      # on eight GPUs

In training/, recipes.py says what a training is made of, parallel.py what several processes agree in, resume.py what a checkpoint
keeps, evaluation.py what an error is. The run folder gets recipe.json, checkpoint-STEP.pt (the last two), metrics.jsonl
(reporting.py), and at the end summary.json, curves.png (summary.py), filters.png, guesses.png and nearest.png (pictures.py).
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Read by OpenMP when torch loads: how long a thread spins for the others before it sleeps. A step on the CPU has thousands
# of short parallel regions. By default (300,000) two busy neighbours on two cores brought training from 48 to 2 images/s;
# without spinning it was 16 to 20, but 31 alone on the machine; so: 39 to 49 alone, 11 to 19 with neighbours.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import click
import torch

from model.flops import count_flops
from model.nets import VARIANTS
from model.step import can_compile, keep_memory, train_step
from pipeline import Batch, ImageLoader
from pipeline.accounting import Account, Sampler
from pipeline.cli import augmentation_options, reading_options, take_tuned
from pipeline.inplace import profile_of_run
from pipeline.limits import matrix_rate
from pipeline.report import render_json, verdict
from pipeline.settings import key_of
from preprocess.errors import UserError, one_sentence
from preprocess.manifest import Manifest
from preprocess.records import write_atomically
from training.checkpoints import KEEP, locked
from training.evaluation import LOOKS, VIEWS, Member, accuracy, evaluate, held_out
from training.export import export_checkpoint
from training.measuring import measure
from training.options import FIELDS, check_finite, recipe_options
from training.parallel import Ranks, joined
from training.pictures import draw_pictures
from training.recipes import (
    COLOUR,
    MAX_DROPS,
    PATIENCE_EPOCHS,
    Recipe,
    check,
    jittered,
    learning_rate,
    set_learning_rates,
)
from training.reporting import DamagedRecords, Display, Meter, Metrics, StuckLoss, describe
from training.resume import Progress, Run, mean_loss, note_recipe, open_run, refuse_no_number, save
from training.summary import read_summary, show_summary, write_summary

LOG_EVERY = 20  # steps; reading the loss makes host and GPU wait for each other
AGREE_EVERY = 10  # steps of several ranks on GPUs, after which they ask each other whether one is to stop
MATRIX_S = 0.2  # of measuring what the device can do
STUCK_AFTER = 1000  # steps, or an epoch, until the loss should have left that of guessing


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


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
@click.option(
    "--compile",
    "compiled",
    type=click.Choice(["auto", "off", "default", "reduce-overhead"]),
    default="auto",
    help="The net by torch.compile; auto: default on CUDA, off on a CPU, where it is slower. reduce-overhead: CUDA graphs.",
)
@click.option("--keep", type=click.IntRange(1), default=KEEP, help="Checkpoints that are kept, the newest.")
@click.option(
    "--profile",
    "profiled",
    is_flag=True,
    help="Note where each step's time goes, into profile.json, and close with what limited the run; costs under 1 %.",
)
@click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too, into the run folder.")
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True),
    help="Begin with those of a checkpoint, a run folder's newest, or a PyTorch state dict; where it has other classes, the last "
    "layer begins anew.",
)
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
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --evaluate of one checkpoint: a folder for pictures of what it has learnt, as a run's end leaves them.",
)
@click.option(
    "--export",
    "exported",
    metavar="CKPT",
    type=click.Path(path_type=Path, exists=True),
    help="Train nothing; write a checkpoint, or the newest of a run folder, beside it for torch.export (.pt2) and as ONNX.",
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
    compiled: str,
    keep: int,
    profiled: bool,
    tensorboard: bool,
    weights: Path | None,
    checkpoint: Path | None,
    predictions: Path | None,
    pictures: Path | None,
    exported: Path | None,
    **options,
) -> None:
    """Train AlexNet on the dataset OUT; to go on after an interruption, run the same command again."""
    if more and not checkpoint:
        raise click.UsageError(f"{more[0]}: one dataset is trained on; checkpoints come after --evaluate")
    if predictions and (not checkpoint or predictions.suffix not in (".csv", ".npz")):
        raise click.UsageError(f"--predictions {predictions}: give a name that ends in .csv or .npz, and --evaluate")
    if pictures and (not checkpoint or more):
        raise click.UsageError(f"--pictures {pictures}: they are of one net; give --evaluate and one checkpoint")
    if weights and (checkpoint or exported):
        raise click.UsageError(f"--weights {weights}: for training; it goes with neither --evaluate nor --export")
    if exported and checkpoint:
        raise click.UsageError("--export and --evaluate: one at a time")
    with one_sentence(), joined() as ranks:
        manifest = Manifest.load(out)
        if exported:
            if ranks.first:
                export_checkpoint(manifest, exported)
            return
        chosen = choose_device(device, ranks)
        reading = {name: options.pop(name) for name in list(options) if name not in FIELDS}
        tuned = reading.pop("tuned") and ranks.count == 1  # several on one machine have its cores and memory in parts
        if checkpoint:
            measure(manifest, [checkpoint, *more], chosen, reading, ranks, predictions, pictures)
            return
        if context.get_parameter_source("batch_size") is not click.core.ParameterSource.COMMANDLINE:
            options["batch_size"] = share_out(options["batch_size"], ranks)
        if context.get_parameter_source("bias") is not click.core.ParameterSource.COMMANDLINE and not has_bias(
            options["model"]
        ):
            options["bias"] = None  # what a recipe says of biases is for AlexNet's
        resolved = Recipe(**options)
        check(resolved)
        if tuned:
            looks = {"random_resized": resolved.random_resized, "color_jitter": resolved.color_jitter}
            key = key_of(manifest, None, resolved.batch_size, size=resolved.size, device=chosen, **looks)
            reading = take_tuned(context, reading, key)
        run_dir = run_dir or Path("runs") / out.resolve().name
        with locked(run_dir) if ranks.first else contextlib.nullcontext():
            run = open_run(manifest, resolved, run_dir, chosen, ranks, reading["cache"], weights)
            if compiled == "auto":
                compiled = "default" if chosen.type == "cuda" and can_compile(chosen) else "off"
            elif compiled != "off" and not can_compile(chosen):
                raise UserError(
                    f"--compile {compiled}: there is no C++ compiler here; install g++, or leave --compile out"
                )
            if ranks.first:
                note_recipe(run_dir, recipe, run, ranks, compiled)
            # Not in place: what looks into the net as it is (pictures.py) hooks layers that a compiled one may not call.
            net = run.model if compiled == "off" else torch.compile(run.model, mode=compiled)
            train(manifest, run, net, run_dir, reading, ranks, checkpoint_every, keep, tensorboard, profiled)


def has_bias(model: str) -> bool:
    """Whether the net takes the option of where biases start."""
    return model in VARIANTS


def share_out(batch_size: int, ranks: Ranks) -> int:
    if batch_size % ranks.count:
        raise UserError(f"the recipe's {batch_size} images a step are not {ranks.count} equal parts; give --batch-size")
    return batch_size // ranks.count


def train(
    manifest: Manifest,
    run: Run,
    net: torch.nn.Module,
    run_dir: Path,
    reading: dict[str, object],
    ranks: Ranks,
    checkpoint_every_s: float,
    keep: int,
    tensorboard: bool,
    profiled: bool = False,
) -> None:
    """Trains until the recipe's epochs are over, and sums up; the first of the ranks writes.

    `net` is the run's, as it is or compiled, `reading` are the options of the loader that are about cost, `keep` is the number of
    checkpoints.

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
        damaged = DamagedRecords()
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
        flops = sum(count_flops(run.model, recipe.size))
        rate = matrix_rate(recipe.precision, MATRIX_S, device)
        ideal_rate = ranks.count * rate / flops
        click.echo(
            f"{flops / 1e9:.3g} GFLOP an image, forward and backward; {rate / 1e12:.3g} TFLOP/s in {recipe.precision} by matrix "
            f"products{' on each rank' if ranks.count > 1 else ''}: {ideal_rate:,.0f} images/s at an MFU of 100 %"
        )
        display = stack.enter_context(Display(total, at.step))
        stuck = StuckLoss(len(manifest.classes), min(epoch_steps, STUCK_AFTER))
        if ranks.first:
            metrics = stack.enter_context(Metrics(run_dir, at.step, not at.loss_steps, tensorboard))
            for earlier in metrics.kept:
                stuck.notices(earlier)
        meter = Meter(device, recipe.batch_size * ranks.count, ideal_rate)
        account = Account(device, loader, Sampler(5, 0.5)) if profiled and ranks.first else None
        on_phase = account.phase if account else lambda phase: None
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

        looks = tuple(getattr(recipe, name) for name in LOOKS)
        member = Member(net, recipe.precision, looks)

        def errors(views: str) -> dict[str, float]:
            def watch(share: float) -> None:
                display.show(at.step, f"{VIEWS[views]} of the held-out images: {share:.0%}")
                if stopping()[0]:
                    raise Stopped

            if manifest.eval_split is None:
                return {}
            ranks.share_buffers(run.model)
            with held_out(manifest, views, recipe.batch_size, device, reading, looks, ranks) as images:
                found = evaluate([member], {looks: images}, ranks, watch)
            refuse_no_number(at.step, "held-out loss", found["loss"])
            return found

        batches = endless(loader)
        metered = iter(lambda: meter.fetch(batches), None)
        text = ""
        saved_s = clock_s = time.monotonic()
        try:
            while True:
                epoch_ends = at.step == (at.epochs + 1) * epoch_steps
                if epoch_ends or (at.loss_steps and at.step % LOG_EVERY == 0):
                    entry = line() | {"data/damaged": damaged.count(ranks)}
                    text = describe(entry, recipe.epochs)
                    if epoch_ends:
                        if account:
                            account.stop()  # evaluating is no part of a step
                        found = errors("center")
                        entry |= {f"metrics/val/{name}": value for name, value in (found | accuracy(found)).items()}
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
                    loader.close()
                    loader = open_loader()
                    batches = endless(loader)
                    if account:
                        account.loader = loader
                batch = account.fetch(metered) if account else meter.fetch(batches)
                damaged.note(loader, batch)
                images, labels = batch.images, batch.labels
                if jitters and recipe.colour_divisor != 1:
                    images = images / recipe.colour_divisor
                ranks.seed_step(recipe.seed, at.step, device)
                set_learning_rates(run.optimizer, recipe, at.step, epoch_steps, at.drops)
                loss = train_step(net, images, labels, run.optimizer, recipe.precision, on_phase)
                run.loss_sum += ranks.sum(loss) / ranks.count
                at.loss_steps += 1
                at.step += 1
                at.seconds, clock_s = at.seconds + time.monotonic() - clock_s, time.monotonic()
                if device.type == "cpu":
                    text = describe(line(), recipe.epochs)
                display.show(at.step, text)
            keep_all()
            found = profile_of_run(account, loader, recipe.precision, recipe.model) if account else None
            ten = errors("ten")
        except Stopped:
            keep_all()
            ranks.barrier()  # torchrun ends all as soon as one has ended, and the first one is still writing
            raise KeyboardInterrupt from None
    if ranks.first:
        draw_pictures(run_dir, manifest, member._replace(model=run.model), device, reading)
        show_summary(write_summary(run_dir, recipe, manifest, dataclasses.asdict(at), ten))
        if found:
            write_atomically(run_dir / "profile.json", (render_json(found) + "\n").encode())
            click.echo(verdict(found))
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
