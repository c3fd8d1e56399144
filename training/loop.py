"""The training loop: steps, epochs, checkpoints and evaluation until the recipe's epochs are over."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.flops import count_flops
from imagefeed.model.step import train_step
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.limits import matrix_rate
from imagefeed.pipeline.profiler.measure import profile_of_run
from imagefeed.pipeline.profiler.report import render_json, verdict
from imagefeed.training.evaluation import LOOKS, VIEWS, Member, accuracy, evaluate, validation
from imagefeed.training.parallel import Ranks
from imagefeed.training.pictures import draw_pictures
from imagefeed.training.recipes import MAX_DROPS, PATIENCE_EPOCHS, Recipe, jittered, learning_rate, set_learning_rates
from imagefeed.training.reporting import CorruptRecords, Display, Meter, Metrics, StuckLoss, describe
from imagefeed.training.resume import Progress, Run, check_finite, mean_loss, save
from imagefeed.training.summary import read_summary, show_summary, write_summary

LOG_EVERY = 20  # steps; reading the loss makes host and GPU wait for each other
AGREE_EVERY = 10  # steps of several ranks on GPUs, after which they ask each other whether one is to stop
MATRIX_S = 0.2  # of measuring what the device can do
STUCK_AFTER = 1000  # steps, or an epoch, until the loss should have left that of guessing


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


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
            crop_size=recipe.crop_size,
            pca_jitter=recipe.pca_jitter if jitters else 0.0,
            shuffle=recipe.shuffle,
            mean=recipe.mean,
            std=recipe.std,
            random_resized_crop=recipe.random_resized_crop,
            color_jitter=recipe.color_jitter,
            seed=recipe.seed,
            rank=ranks.rank,
            world_size=ranks.count,
            device=device,
            position=at.step,
            **reading,
        )

    with contextlib.ExitStack() as stack:
        jitters = recipe.pca_jitter > 0
        loader = open_loader()
        corrupt = CorruptRecords()
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
        flops = sum(count_flops(run.model, recipe.crop_size))
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
            return {"step": at.step, "epoch": at.step / epoch_steps, "loss/train": mean_loss(run), "lr": lr, **meter.read()}

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
                display.show(at.step, f"{VIEWS[views]} of the validation images: {share:.0%}")
                if stopping()[0]:
                    raise Stopped

            if manifest.eval_split is None:
                return {}
            ranks.share_buffers(run.model)
            with validation(manifest, views, recipe.batch_size, device, reading, looks, ranks) as images:
                found = evaluate([member], {looks: images}, ranks, watch)
            check_finite(at.step, "validation loss", found["loss"])
            return found

        batches = endless(loader)
        metered = iter(lambda: meter.fetch(batches), None)
        text = ""
        saved_s = clock_s = time.monotonic()
        try:
            while True:
                epoch_ends = at.step == (at.epochs + 1) * epoch_steps
                if epoch_ends or (at.loss_steps and at.step % LOG_EVERY == 0):
                    entry = line() | {"data/corrupt": corrupt.count(ranks)}
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
                corrupt.note(loader, batch)
                images, labels = batch.images, batch.labels
                if jitters and recipe.pixel_divisor != 1:
                    images = images / recipe.pixel_divisor
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
    validation split."""
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
