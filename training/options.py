"""The options of train.py that decide the weights: those of recipes.py on a command line."""

import dataclasses
import math

import click

from imagefeed.model import NETS
from imagefeed.training.recipes import MAX_DROPS, PATIENCE_EPOCHS, RECIPES, SCHEDULES, Recipe

FIELDS = {field.name for field in dataclasses.fields(Recipe)}


def recipe_options(command):
    """Adds those that decide the weights, but for the loader's; --recipe fills what is not given."""
    paper = RECIPES["paper"]
    positive = click.FloatRange(0, min_open=True)
    for option in reversed((
        click.option(
            "--recipe", type=click.Choice(list(RECIPES)), default="paper", is_eager=True, callback=take_recipe,
            help="Defaults of the options below and of some on images; shown are the paper's.",
        ),
        click.option(
            "--model", default=paper.model, metavar="NAME",
            help=f"The net: {', '.join(NETS)}. Those of torchvision and timm expect --std dataset.",
        ),
        click.option("--lrn/--no-lrn", default=True, help="AlexNet's normalization."),
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
            "--schedule", "--lr-milestones", "schedule", default=paper.schedule, callback=check_schedule,
            help="cosine or linear: the learning rate falls to 0 at the end; 25,51,79: it is divided by 10 after these epochs; "
            f"plateau: when the validation top-1 error was not lowered for {PATIENCE_EPOCHS} epochs, {MAX_DROPS} times at most.",
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
            "--weight-decay", type=click.FloatRange(0), default=paper.weight_decay, callback=check_finite,
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
        click.option("--pca-jitter-epochs", type=click.IntRange(0), show_default="all", help="Epochs with color jitter."),
        click.option(
            "--pixel-divisor", type=positive, default=paper.pixel_divisor, callback=check_finite,
            help="Divides pixels in training as long as their colors are jittered.",
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


def take_recipe(context: click.Context, _parameter, name: str) -> str:
    """Makes what differs from the paper's recipe the defaults of the other options."""
    paper = dataclasses.asdict(RECIPES["paper"])
    context.default_map = {key: value for key, value in dataclasses.asdict(RECIPES[name]).items() if value != paper[key]}
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
