"""The training loop: steps, epochs, checkpoints and evaluation until the recipe's epochs are over."""

import contextlib
import functools
import itertools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from imagefeed.dataset import console
from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.model.flops import count_flops
from imagefeed.model.graphed import GraphedStep, open_recorder
from imagefeed.model.step import train_step
from imagefeed.pipeline.arguments import trained_form
from imagefeed.pipeline.batch import Batch
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.limits import matrix_rate
from imagefeed.pipeline.profiler.measure import profile_of_run
from imagefeed.pipeline.profiler.report import render_json, verdict
from imagefeed.training.evaluation import VIEWS, Member, evaluate
from imagefeed.training.inputs import Inputs, Preprocessing
from imagefeed.training.options import AUGMENTS, KEEP, MAX_DROPS, PATIENCE_EPOCHS
from imagefeed.training.pictures import draw_pictures
from imagefeed.training.recipes import Recipe, jittered, learning_rate, set_learning_rates
from imagefeed.training.reporting import Meter, Metrics, StuckLoss, describe
from imagefeed.training.resume import Progress, Run
from imagefeed.training.summary import read_summary, show_summary, write_summary

LOG_EVERY = 20  # steps; on a GPU the line is written so much later, when the GPU has long come to its last step
AGREE_EVERY = 10  # steps of several ranks on GPUs, after which they ask each other whether to stop
MATRIX_S = 0.2  # of measuring what the device can do
STUCK_AFTER = 1000  # steps, or an epoch, until the loss should have left that of guessing


class Stopped(Exception):
    """SIGINT or SIGTERM asked for an end."""


@dataclass(frozen=True)
class Output:
    """What a run writes into its folder, and how often. `on_metrics` is called with each line of metrics.jsonl."""

    run_dir: Path
    checkpoint_every_s: float = 300
    keep: int = KEEP  # checkpoints
    tensorboard: bool = False
    profile: bool = False
    on_metrics: Callable[[dict[str, float]], object] | None = None


def train(run: Run, net: torch.nn.Module, inputs: Inputs, output: Output, by_graph: bool = False) -> None:
    """Trains until the recipe's epochs are over, then prints and writes a summary. `net` is the run's, compiled or not; with
    `by_graph` each step is one CUDA graph.

    Raises UserError if the run diverges, and KeyboardInterrupt, after writing a checkpoint, on SIGINT or SIGTERM. On SIGUSR1 it
    writes a checkpoint and goes on.
    """
    at, ranks, run_dir = run.at, inputs.ranks, output.run_dir
    with contextlib.ExitStack() as stack:
        trainer = Trainer(run, net, inputs, output, stack.enter_context(save_signal()), by_graph)
        stack.callback(lambda: trainer.loader.close())
        trainer.print_start()
        summary = read_summary(run_dir)
        if ranks.gathered(bool(summary and summary.step == at.step == trainer.total))[0]:
            print(f"{run_dir}: this run is over; to train longer, give more --epochs")
            if summary:
                show_summary(summary)
            return
        if at.step:
            print(f"{run_dir}: resuming after step {at.step:,}")
        trainer.open_reports(stack)
        ranks.average_gradients(run.model, run.optimizer)
        try:
            trainer.run_steps()
            trainer.save()
            profile = trainer.account and profile_of_run(trainer.account, trainer.loader, run.recipe.precision, run.recipe.model)
            if val := inputs.eval_split:
                images = plural(inputs.manifest.split(val).records, "image")
                trainer.display.say(f"training is over, checkpoint saved; measuring by {VIEWS['ten']}: {images} of split {val}")
            errors = trainer.evaluate("ten")
        except Stopped:
            trainer.save()
            ranks.barrier()  # torchrun ends all ranks as soon as one has ended, and the first is still writing
            raise KeyboardInterrupt from None
    if ranks.first:
        print(f"{run_dir}: drawing pictures", flush=True)
        draw_pictures(run_dir, inputs, replace(trainer.member, model=run.model))
        show_summary(write_summary(run_dir, run.recipe, inputs, at, errors))
        if profile:
            write_atomically(run_dir / "profile.json", (render_json(profile) + "\n").encode())
            print(verdict(profile))
    ranks.barrier()


class Trainer:
    """What the phases of `train` share: the loader, measurements and reports."""

    def __init__(
        self, run: Run, net: torch.nn.Module, inputs: Inputs, output: Output, save_now: threading.Event, by_graph: bool = False
    ):
        self.save_now = save_now
        self.train_step: Callable[..., torch.Tensor]
        self.train_step = functools.partial(train_step, net, optimizer=run.optimizer, precision=run.recipe.precision)
        if by_graph:
            self.train_step = GraphedStep(net, run.optimizer, run.recipe.precision, open_recorder(run.device))
        recipe = run.recipe
        self.run, self.at, self.recipe, self.net, self.inputs, self.output = run, run.at, recipe, net, inputs, output
        self.ranks, self.device = inputs.ranks, run.device
        self.member = Member(net, recipe.precision, Preprocessing(recipe.crop_size, recipe.mean, recipe.std))
        self.corrupt_ids: set[int] = set()
        self.open_loader(recipe.pca_jitter)
        self.epoch_steps = min(len(self.loader), recipe.limit_batches or len(self.loader))
        self.total = max(recipe.epochs * self.epoch_steps, self.at.step)
        self.status = ""
        self.writes_late = self.device.type == "cuda"
        # The next line of metrics.jsonl: what reads it from the device, and what else is in it.
        self.unwritten: tuple[Callable[[], dict[str, float]], dict[str, float]] | None = None
        self.traffic = self.loader.traffic

    def open_loader(self, pca_jitter: float) -> None:
        names = ("shuffle", *AUGMENTS, "seed")
        options = {name: getattr(self.recipe, name) for name in names} | {"pca_jitter": pca_jitter, "position": self.at.step}
        if not (pca_jitter and self.recipe.pixel_divisor != 1):  # which is by a division in float32
            options |= trained_form(self.device, self.recipe.precision)
        self.loader = self.inputs.training(self.recipe.batch_size, self.member.preprocessing, **options)
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.loader))
        self.jitters = pca_jitter > 0

    def print_start(self) -> None:
        """Prints what is trained on what."""
        recipe, manifest, ranks, val = self.recipe, self.inputs.manifest, self.ranks.count, self.inputs.eval_split

        def records(split: str) -> str:
            return f"{plural(manifest.split(split).records, 'record')} of split {split}"

        validates = f"validates on {records(val)}" if val else "no validation split"
        part = "" if self.inputs.subset is None else f"{self.inputs.train_records:,} of "
        print(f"{manifest.root}: trains on {part}{records(self.inputs.train_split)}, {validates}")
        print(
            f"{recipe.model}: {plural(recipe.batch_size * ranks, 'image')} a step{f' of {ranks} ranks' if ranks > 1 else ''}, "
            f"{plural(self.epoch_steps, 'step')} an epoch, {self.total:,} in all, {recipe.precision} on {self.device}; "
            f"run folder {self.output.run_dir}"
        )

    def open_reports(self, stack: contextlib.ExitStack) -> None:
        """Opens what a run writes; prints what the device could reach."""
        recipe, at, first = self.recipe, self.at, self.ranks.first
        self.stop = stack.enter_context(stop_signal(insist=self.ranks.count == 1))
        flops = sum(count_flops(self.run.model, recipe.crop_size))
        rate = matrix_rate(recipe.precision, MATRIX_S, self.device)
        ideal_rate = self.ranks.count * rate / flops
        print(
            f"{flops / 1e9:.3g} GFLOP an image, forward and backward; {rate / 1e12:.3g} TFLOP/s in {recipe.precision} matrix "
            f"products{' on each rank' if self.ranks.count > 1 else ''}: at most {ideal_rate:,.0f} images/s"
        )
        self.display = stack.enter_context(console.Progress(self.total, at.step, stream=sys.stdout))
        self.stuck = StuckLoss(len(self.inputs.manifest.classes), min(self.epoch_steps, STUCK_AFTER))
        if first:
            metrics = Metrics(self.output.run_dir, at.step, not at.loss_steps, self.output.tensorboard)
            self.metrics = stack.enter_context(metrics)
            for line in metrics.kept:
                self.stuck.check(line)
        self.meter = Meter(self.device, recipe.batch_size * self.ranks.count, ideal_rate)
        self.account = Account(self.device, self.loader, Sampler(5, 0.5)) if self.output.profile and first else None

    def run_steps(self) -> None:
        """Trains up to the last step; raises Stopped if a signal came."""
        at = self.at
        # Several ranks on GPUs do not ask each other after every step, because that takes time.
        agree_every = 1 if self.ranks.count == 1 or self.device.type == "cpu" else AGREE_EVERY
        saved_s = self.clock_s = time.monotonic()
        while True:
            epoch_ends = at.step == (at.epochs + 1) * self.epoch_steps
            if epoch_ends or (at.loss_steps and at.step % LOG_EVERY == 0):
                self.log(epoch_ends)
            if at.step == self.total:
                return
            if at.step % agree_every == 0:
                due = self.ranks.first and time.monotonic() - saved_s >= self.output.checkpoint_every_s
                stop, due, asked = self.agree(due, self.save_now.is_set())
                if stop:
                    raise Stopped
                if due or asked:
                    self.save_now.clear()
                    self.save()
                    if asked:
                        self.display.say(f"checkpoint at step {at.step:,}, on SIGUSR1")
                    saved_s = time.monotonic()
            self.step()
            self.count_seconds()
            if self.device.type == "cpu":
                self.status = describe(self.line()(), self.recipe.epochs)
            self.display.update(at.step, self.status)

    def count_seconds(self) -> None:
        self.at.seconds, self.clock_s = self.at.seconds + time.monotonic() - self.clock_s, time.monotonic()

    def step(self) -> None:
        recipe, at = self.recipe, self.at
        if self.jitters != jittered(recipe, at.step, self.epoch_steps):
            self.corrupt_ids |= self.loader.corrupt_ids
            self.loader.close()
            self.open_loader(0.0 if self.jitters else recipe.pca_jitter)
            if self.account:
                self.account.loader = self.loader
        batch = self.account.fetch(self.metered()) if self.account else next(self.metered())
        images = batch.images / recipe.pixel_divisor if self.jitters and recipe.pixel_divisor != 1 else batch.images
        self.ranks.seed_step(recipe.seed, at.step, self.device)
        set_learning_rates(self.run.optimizer, recipe, at.step, self.epoch_steps, at.drops)
        on_phase = self.account.phase if self.account else lambda phase: None
        loss = self.train_step(images, batch.labels, on_phase=on_phase)
        self.run.loss_sum += self.ranks.sum(loss) / self.ranks.count
        at.loss_steps += 1
        at.step += 1

    def metered(self) -> Iterator[Batch]:
        yield self.meter.fetch(self.batches)

    def line(self) -> Callable[[], dict[str, float]]:
        """Reads a line of metrics.jsonl, from the steps since the last one; waits for the device, but not for later steps."""
        at = self.at
        lr = learning_rate(self.recipe, max(at.step - 1, 0), self.epoch_steps, at.drops)
        step, epoch, interval = at.step, at.step / self.epoch_steps, self.meter.interval()
        loss = self.run.mean_loss()  # last: who has waited for it has waited for the interval
        return lambda: {"step": step, "epoch": epoch, "loss/train": loss(), "lr": lr, **interval()}

    def log(self, epoch_ends: bool) -> None:
        """Prepares a line of metrics.jsonl, and writes the one before. At the end of an epoch evaluates, and writes both."""
        line = self.line()  # first: what `--on-metrics` does with the one before is not part of a step
        self.write_line()
        self.corrupt_ids |= self.loader.corrupt_ids
        # In another epoch another rank may have found the same ones.
        corrupt = set().union(*self.ranks.gathered(sorted(self.corrupt_ids)))
        others: dict[str, float] = {"data/corrupt": len(corrupt)}
        if epoch_ends:
            self.status = describe(line(), self.recipe.epochs)
            if self.account:
                self.account.stop()  # evaluation is not part of a step
            errors = self.evaluate("center")
            accuracies = {f"top{k}": 100 - errors[f"top{k}_error"] for k in (1, 5) if f"top{k}_error" in errors}
            others |= {f"metrics/val/{name}": value for name, value in (errors | accuracies).items()}
            end_epoch(self.at, errors.get("top1_error"), self.recipe)
            self.display.say(describe(line() | others, self.recipe.epochs))
        self.count_seconds()
        if (traffic := self.loader.traffic) and self.traffic:
            others |= {f"store/{name}": value for name, value in traffic.since(self.traffic).items()}
            self.traffic = traffic
        others |= {"time/elapsed_s": round(self.at.seconds, 3), "timestamp": round(time.time(), 3)}
        self.unwritten = line, others
        self.run.loss_sum.zero_()
        self.at.loss_steps = 0
        if epoch_ends or not self.writes_late:
            self.write_line()
        self.meter.restart()

    def write_line(self) -> None:
        """Writes what `log` has prepared, if it has not been written."""
        if self.unwritten is None:
            return
        (line, others), self.unwritten = self.unwritten, None
        entry = line() | others
        self.status = describe(entry, self.recipe.epochs)
        if self.ranks.first:
            self.metrics.write(entry)
        warning = self.stuck.check(entry)
        if warning:
            self.display.say(warning)
        if self.ranks.first and self.output.on_metrics:
            self.hand_over(entry, self.output.on_metrics)

    def hand_over(self, entry: dict[str, float], on_metrics: Callable[[dict[str, float]], object]) -> None:
        """Calls the user's function; if it fails, the run ends with a checkpoint."""
        try:
            on_metrics(dict(entry))
        except Exception as error:
            self.save()
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"step {entry['step']}: `on_metrics` raised {error!r} in {place.filename}, line {place.lineno}; a checkpoint is "
                "saved, so correct it and run the same command again"
            ) from error

    def evaluate(self, views: str) -> dict[str, float]:
        """Validation errors; empty without a validation split."""
        if self.inputs.eval_split is None:
            return {}

        def on_progress(fraction: float) -> None:
            self.display.update(self.at.step, f"{VIEWS[views]} of the validation images: {fraction:.0%}")
            if self.agree()[0]:
                raise Stopped

        self.ranks.share_buffers(self.run.model)
        preprocessing = self.member.preprocessing
        form = trained_form(self.device, self.recipe.precision)
        with self.inputs.validation(views, self.recipe.batch_size, preprocessing, **form) as loader:
            errors = evaluate([self.member], {preprocessing: loader}, self.ranks, on_progress)
        self.run.check_finite("validation loss", errors["loss"])
        return errors

    def agree(self, *flags: bool) -> list[bool]:
        """Whether to stop, and `flags`, alike on all ranks: one rank's wish counts for all, after the same step."""
        mine = (self.stop.is_set(), *flags)
        return self.ranks.any(*mine) if self.ranks.count > 1 else list(mine)

    def save(self) -> None:
        self.write_line()
        if self.ranks.first:
            self.metrics.sync()
            self.run.save(self.output.run_dir, self.output.keep)


def end_epoch(at: Progress, top1_error: float | None, recipe: Recipe) -> None:
    """Counts the epoch, and a drop of the plateau schedule if one is due; `top1_error` is None without a validation split."""
    at.epochs += 1
    at.stale_epochs += 1
    if top1_error is not None and top1_error < at.best_error:
        at.best_error, at.stale_epochs = top1_error, 0
    due = recipe.schedule == "plateau" and at.stale_epochs == PATIENCE_EPOCHS and at.drops < MAX_DROPS
    if due and top1_error is not None:
        at.drops, at.stale_epochs = at.drops + 1, 0


@contextlib.contextmanager
def save_signal() -> Iterator[threading.Event]:
    """Turns SIGUSR1, which batch systems send as a warning before they end a job, into an event for the loop.

    Afterwards the signal is ignored: a late warning must not end a run that only has its pictures to draw.
    """
    save = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: save.set())
    try:
        yield save
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN if before == signal.SIG_DFL else before)


@contextlib.contextmanager
def stop_signal(insist: bool = True) -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into an event for the loop; with `insist` the second signal interrupts at once.

    torchrun forwards signals that its processes may have got already, and kills them if they do not end.
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
