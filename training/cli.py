"""The command `imagefeed train`, which is also train.py."""

import contextlib
from pathlib import Path

import click
import torch

from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.nets import VARIANTS
from imagefeed.model.step import can_compile, keep_memory
from imagefeed.pipeline.cli import take_tuned
from imagefeed.pipeline.options import loader_options
from imagefeed.pipeline.tuner.saved import key_of
from imagefeed.training.checkpoints import KEEP, locked
from imagefeed.training.export import export_checkpoint
from imagefeed.training.loop import train
from imagefeed.training.measuring import measure
from imagefeed.training.options import FIELDS, check_finite, recipe_options
from imagefeed.training.parallel import Ranks, joined
from imagefeed.training.recipes import Recipe, check
from imagefeed.training.resume import note_recipe, open_run


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, metavar="[CKPT]...", type=click.Path(path_type=Path, exists=True))
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="auto: CUDA where usable.")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="[default: runs/NAME-OF-OUT]")
@recipe_options
@loader_options
@click.option(
    "--checkpoint-every", type=click.FloatRange(0), default=300, callback=check_finite, help="Seconds from one to the next."
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
        if context.get_parameter_source("bias") is not click.core.ParameterSource.COMMANDLINE and not has_bias(options["model"]):
            options["bias"] = None  # what a recipe says of biases is for AlexNet's
        resolved = Recipe(**options)
        check(resolved)
        if tuned:
            looks = {"random_resized_crop": resolved.random_resized_crop, "color_jitter": resolved.color_jitter}
            key = key_of(manifest, None, resolved.batch_size, crop_size=resolved.crop_size, device=chosen, **looks)
            reading = take_tuned(context, reading, key)
        run_dir = run_dir or Path("runs") / out.resolve().name
        with locked(run_dir) if ranks.first else contextlib.nullcontext():
            run = open_run(manifest, resolved, run_dir, chosen, ranks, reading["cache"], weights)
            if compiled == "auto":
                compiled = "default" if chosen.type == "cuda" and can_compile(chosen) else "off"
            elif compiled != "off" and not can_compile(chosen):
                raise UserError(f"--compile {compiled}: there is no C++ compiler here; install g++, or leave --compile out")
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
