"""The command `imagefeed train`, which is also train.py. Libraries that take long to load are imported when it runs."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.options import PlaceType
from imagefeed.dataset.storage import Url
from imagefeed.model import VARIANTS
from imagefeed.pipeline.options import DEVICE, READING, TUNED, Command, Flag, Number, OneOf, Option, add_options
from imagefeed.training.config import FILES, read_config
from imagefeed.training.options import COMPILE, KEEP, RECIPE, SECTIONS, Epochs, Hook, Name
from imagefeed.training.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import torch

    from imagefeed.training.inputs import Inputs
    from imagefeed.training.parallel import Ranks

CHECKPOINT = click.Path(path_type=Path, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False)
INPUT = click.Path(path_type=Path, dir_okay=False, exists=True)
FOLDER = click.Path(path_type=Path, file_okay=False)
CONFIG = "imagefeed.training.config"  # where click keeps the values of --config
COMPILE_HELP = (
    "Mode of torch.compile; graph: default, each step as one CUDA graph; auto: off on CPUs, on a GPU the faster of these."
)
# Besides those that decide the weights.
RUN = {
    "Options": (
        Option("run_dir", None, FOLDER, "Folder of the run.", "cost", "runs/NAME-OF-OUT"),
        Option(
            "weights",
            None,
            CHECKPOINT,
            "Start from the weights in a checkpoint, run folder, torch.save file or .safetensors file.",
        ),
        Option("subset", None, INPUT, "Train on the records in this file only: ids, classes or raw files, one a line; or .npy."),
        Option("evaluate", None, CHECKPOINT, "Measure a checkpoint or run folder instead of training; average several.", "cost"),
        Option("export", None, CHECKPOINT, "Export a checkpoint or run folder for torch.export and ONNX.", "cost"),
        Option("export_preprocessing", False, Flag(), "With --export, let the net normalize uint8 pixels.", "cost"),
        Option("profile", False, Flag(), "Record where each step's time goes, and say what limited the run.", "cost"),
    ),
    "Optimization": (Option("lr_milestones", None, Epochs(), "Epochs after which --lr is divided by 10; sets --schedule."),),
    "Speed and memory": (*READING, Option("compile", "auto", COMPILE, COMPILE_HELP), TUNED),
    "Output": (
        Option("checkpoint_every", 300, Number(0), "Seconds between checkpoints.", "cost"),
        Option("keep", KEEP, Number(1, whole=True), "Checkpoints to keep.", "cost"),
        Option("tensorboard", False, Flag(), "Also write metrics for TensorBoard.", "cost"),
        Option("on_metrics", None, Hook(), "Call a function of yours with each line of metrics.jsonl.", "cost"),
        Option("split", None, Name(), "With --evaluate, the split to measure on.", "cost", "the validation split"),
        Option("predictions", None, FILE, "With --evaluate, write each record's likeliest classes, as .csv or .npz.", "cost"),
        Option("pictures", None, FOLDER, "With --evaluate of one checkpoint, draw what it has learned.", "cost"),
    ),
}


def take_recipe(context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """Makes a recipe's values the defaults of the other options; those of --config come first."""
    values = vars(RECIPES[name])
    recipe = {key: values[key] for key, option in RECIPE.items() if values[key] != option.default}
    context.default_map = recipe | defaults_of(context)
    return name


def take_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Makes a file's values the defaults of the arguments and options."""
    if path:
        try:
            context.meta[CONFIG] = read_config(path)
        except UserError as error:
            raise click.UsageError(error.of_command()) from None
        context.default_map = {**(context.default_map or {}), **defaults_of(context)}
    return path


def config_of(context: click.Context) -> dict[str, Any]:
    """The values of --config; none without it."""
    return context.meta.get(CONFIG, {})


def defaults_of(context: click.Context) -> dict[str, Any]:
    """What --config gives, by the names of arguments and options. Files that are gone are left to `main`."""
    config = config_of(context)
    values = {name: config[name] for name in ("recipe", "compile", *RECIPE) if name in config}
    if "dataset_path" in config:
        values["out"] = config["dataset_path"]
    if config.get("cache_device"):
        values["cache"] = "device"
    return values | {name: config[name] for name in FILES if config.get(name) and Path(config[name]).exists()}


@click.command(cls=Command)
@click.argument("out", type=PlaceType(folder=False))
@click.argument("more", nargs=-1, metavar="[CKPT]...", type=CHECKPOINT)
@click.option(
    "--recipe", type=OneOf(*RECIPES), default="paper", show_default=True, is_eager=True, callback=take_recipe,
    help="Defaults of the other options; those shown are the paper's.",
)  # fmt: skip
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), is_eager=True, callback=take_config,
    help="Repeat the run of this recipe.json, or of a file with some of its keys; options given here win.",
)  # fmt: skip
@DEVICE
@add_options(SECTIONS)
@add_options(RUN)
@click.pass_context
def main(context: click.Context, out: Path | Url, more: tuple[Path, ...], device: str, **settings) -> None:
    """Train AlexNet, or another network, on the dataset OUT. Run the same command again to resume.

    CKPT are further checkpoints or run folders for --evaluate, which averages them.
    """
    config = config_of(context)
    evaluate, export, predictions, pictures = (settings[name] for name in ("evaluate", "export", "predictions", "pictures"))
    for wrong, message in (
        (more and not evaluate, f"{' '.join(map(str, more))}: training takes one dataset; checkpoints follow --evaluate"),
        (predictions and not evaluate, "--predictions needs --evaluate"),
        (settings["split"] and not evaluate, "--split needs --evaluate"),
        (predictions and predictions.suffix not in (".csv", ".npz"), "--predictions: choose a name that ends in .csv or .npz"),
        (pictures and (not evaluate or more), "--pictures needs --evaluate with one checkpoint"),
        (settings["weights"] and (evaluate or export), "--weights is for training; leave out --evaluate and --export"),
        (settings["subset"] and (evaluate or export), "--subset is for training; leave out --evaluate and --export"),
        (export and evaluate, "--export and --evaluate cannot be used together"),
        (settings["lr_milestones"] and given(context, "schedule"), "--lr-milestones and --schedule cannot be used together"),
        (settings["export_preprocessing"] and not export, "--export-preprocessing needs --export"),
        (settings["config"] and (evaluate or export), "--config is for training; leave out --evaluate and --export"),
        (
            settings["recipe"] != config.get("recipe", settings["recipe"]),
            f"--recipe {settings['recipe']}: {settings['config']} is of recipe {config.get('recipe')}; leave out one of the two",
        ),
        *(
            (
                config.get(name) and not settings[name],
                f"{settings['config']}: its {name} {config.get(name)} is gone; if it has moved, give --{name}",
            )
            for name in FILES
        ),
        (
            config.get("dataset_path") == str(out) and isinstance(out, Path) and not out.exists(),
            f"{settings['config']}: its dataset {out} is gone; if it has moved, give its folder, as in: OUT --config "
            f"{settings['config']}",
        ),
    ):
        if wrong:
            raise click.UsageError(message)
    with one_sentence():
        from imagefeed.training.inputs import Inputs
        from imagefeed.training.parallel import joined
        from imagefeed.training.reporting import check_tensorboard, load_hook

        if settings["tensorboard"]:
            check_tensorboard()
        with joined(device) as ranks:
            manifest = Manifest.load(out)
            if export:
                from imagefeed.training.export import export_checkpoint

                if ranks.first:
                    export_checkpoint(manifest, export, settings["export_preprocessing"])
                return
            if settings["on_metrics"]:
                settings["on_metrics"] = load_hook(settings["on_metrics"]) if ranks.first else None
            reading = {option.name: settings[option.name] for option in READING}
            inputs = Inputs(manifest, choose_device(device, ranks), reading, ranks, settings["split"])
            if evaluate:
                from imagefeed.training.measuring import measure

                measure(inputs, [evaluate, *more], predictions, pictures)
            else:
                start(context, inputs, settings)


def start(context: click.Context, inputs: "Inputs", settings: dict[str, Any]) -> None:
    """Trains as the command line says."""
    from imagefeed.model.step import compiled
    from imagefeed.pipeline.arguments import check_combination
    from imagefeed.pipeline.selection import in_short
    from imagefeed.training.checkpoints import run_folder
    from imagefeed.training.loop import Output, train
    from imagefeed.training.resume import note_recipe, open_run
    from imagefeed.training.timing import steps_form

    manifest, ranks = inputs.manifest, inputs.ranks
    inputs = inputs.choose(settings["subset"])
    if config_of(context).get("dataset", manifest.fingerprint[:16]) != manifest.fingerprint[:16]:
        click.echo(f"warning: {settings['config']} was written for another dataset than {manifest.root}, so the run will differ")
    meant, named = config_of(context).get("subset_records"), in_short(inputs.subset) or "all"
    if meant and meant != named:
        click.echo(
            f"warning: {settings['config']} was written for a subset {meant}, which is {named} now, so the run will differ"
        )
    recipe = choose_recipe(context, inputs, settings)
    if settings["tuned"] and ranks.count == 1:  # each of several ranks has only a part of the machine's cores and memory
        from imagefeed.pipeline.cli import take_tuned
        from imagefeed.pipeline.tuner.saved import key_of

        key = key_of(manifest, device=inputs.device, **vars(recipe))
        inputs = dataclasses.replace(inputs, reading=take_tuned(context, inputs.reading, key))
    run_dir = settings["run_dir"] or Path("runs") / manifest.root.resolve().name
    names = ("checkpoint_every", "keep", "tensorboard", "profile", "on_metrics")
    output = Output(run_dir, *(settings[name] for name in names))
    changes_images = recipe.random_resized_crop or any(recipe.color_jitter)
    # Before there is a folder.
    check_combination(manifest, recipe.crop_size, recipe.mean, inputs.reading["cache"], changes_images, inputs.decoder)
    with run_folder(run_dir) if ranks.first else contextlib.nullcontext():
        run = open_run(inputs, recipe, run_dir, settings["weights"])
        wanted = settings["compile"]
        if wanted == "graph" and not given(context, "compile") and (inputs.device.type != "cuda" or ranks.count > 1):
            wanted = "auto"  # in the run of --config, on one GPU, it may have been the faster one
        mode = compile_mode(wanted, inputs.device, ranks.count)
        if wanted == "auto" and mode == "default" and ranks.count == 1:
            mode = "graph" if steps_form(run, mode).graphed else mode
        if ranks.first:
            note_recipe(run_dir, settings["recipe"], run, manifest.root, ranks, mode, settings["subset"])
        # Not in place: pictures.py hooks layers of the net, which a compiled one may not call.
        by_graph = mode == "graph"
        net = run.model if mode == "off" else compiled(run.model, "default" if by_graph else mode, in_parts=ranks.count > 1)
        train(run, net, inputs, output, by_graph)


def given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def chosen(context: click.Context, name: str) -> bool:
    """Whether the user gave the option, or the file of --config."""
    return given(context, name) or name in config_of(context)


def choose_recipe(context: click.Context, inputs: "Inputs", settings: dict[str, Any]) -> Recipe:
    """The recipe, with the pixels that its net expects and a batch size that the training split fills."""
    from imagefeed.model.nets import own_input
    from imagefeed.pipeline.arguments import default_shuffle
    from imagefeed.pipeline.plan import fill_batch

    values = {name: settings[name] for name in RECIPE}
    ranks = inputs.ranks
    if not given(context, "batch_size"):  # a recipe's is of all ranks
        values["batch_size"] = divide_batch(values["batch_size"], ranks.count)
    if not chosen(context, "shuffle"):
        values["shuffle"] = default_shuffle(inputs.manifest)
    if not chosen(context, "bias") and values["model"] not in VARIANTS:
        values["bias"] = None  # a recipe's is for AlexNet
    own = own_input(values["model"])
    if own:
        of_net = {"mean": own.mean, "std": own.std}
        # Weights of a net without a fixed size work best at the size that they were trained for.
        if own.crop_size and (own.fixed or settings["weights"]):
            of_net["crop_size"] = own.crop_size
        values |= {name: value for name, value in of_net.items() if not chosen(context, name)}
    if settings["lr_milestones"]:
        values["schedule"] = settings["lr_milestones"]
    values["batch_size"], lowered = fill_batch(inputs.train_split, inputs.train_records, values["batch_size"], ranks.count)
    if lowered:
        click.echo(lowered)
    return Recipe(**values)


def divide_batch(batch_size: int, ranks: int) -> int:
    if batch_size % ranks:
        raise UserError(f"the recipe's {batch_size} images a step cannot be divided among {ranks} ranks; give --batch-size")
    return batch_size // ranks


def choose_device(name: str, ranks: "Ranks") -> "torch.device":
    """Chooses the device to train on, prints it and sets it up."""
    import torch

    from imagefeed.model.step import keep_memory, prepare_gpu
    from imagefeed.pipeline.gpu import why_unusable

    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise UserError(f"device cuda: {why_unusable()}")
    if name == "cpu" or not usable:
        click.echo("device: cpu" + ("" if usable or name == "cpu" else " (no usable GPU)"))
        keep_memory()
        return torch.device("cpu")
    if ranks.local >= torch.cuda.device_count():
        raise UserError(f"rank {ranks.rank}: this machine has only {torch.cuda.device_count()} GPUs; start as many ranks")
    prepare_gpu()
    click.echo(f"device: cuda ({torch.cuda.get_device_name()})")
    return torch.device("cuda", torch.cuda.current_device())


def compile_mode(mode: str, device: "torch.device", ranks: int = 1) -> str:
    from imagefeed.model.step import can_compile

    if mode == "graph" and (device.type != "cuda" or ranks > 1):
        raise UserError("--compile graph: a step can be one CUDA graph on one GPU alone; leave out --compile")

    if mode == "auto":
        return "default" if device.type == "cuda" and can_compile(device) else "off"
    if mode != "off" and not can_compile(device):
        missing = "Triton, a C compiler or Python.h" if device.type == "cuda" else "a C++ compiler"
        packages = "triton, gcc and python3-dev" if device.type == "cuda" else "g++"
        raise UserError(f"--compile {mode}: {missing} is missing; install {packages}, or leave out --compile")
    return mode
