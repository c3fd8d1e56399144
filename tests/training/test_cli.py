"""The command line of training: what it takes, and what it refuses."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.model.nets import build_net
from imagefeed.training import cli
from imagefeed.training.checkpoints import load_latest, newest_first, run_folder
from imagefeed.training.options import RECIPE
from imagefeed.training.recipes import Recipe
from tests.model.test_nets import package  # noqa: F401
from tests.training.runs import ONE_STEP, call, metrics, run

USAGE, FAILED = 2, 1


def test_the_recipe_and_the_table_of_options_agree():
    local = {"shuffle": "global"}  # None on the command line: blocks for a URL
    assert dataclasses.asdict(Recipe()) == {name: option.default for name, option in RECIPE.items()} | local


def test_help_is_in_sections_and_loads_no_torch():
    program = "import sys, train; train.main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    sections = re.split(r"^(\S.*):$", result.stdout, flags=re.M)[1:]
    headings, listed = sections[::2], [len(re.findall("^  -", text, re.M)) for text in sections[1::2]]
    assert headings == ["Options", "Network", "Optimization", "Images", "Speed and memory", "Output"]
    assert listed[0] <= 25 and sum(listed) == len(cli.main.params) - 2 + 1


@pytest.mark.parametrize(
    "options, code, said",
    [
        ("--lr-milestones soon", USAGE, "'soon' is not numbers of epochs such as 25,51,79"),
        ("--lr-milestones 1,2 --schedule cosine", USAGE, "--lr-milestones and --schedule cannot be used together"),
        ("--subset {tmp}/notes.pt", FAILED, "notes.pt, line 1: not a checkpoint is neither a class nor"),
        ("--subset {tmp}/notes.pt --evaluate {tmp}/notes.pt", USAGE, "--subset is for training"),
        ("--schedule soon", USAGE, "'soon' is not plateau, cosine, linear, or numbers of epochs such as 25,51,79"),
        ("--crop-size 63", USAGE, "'63' is not a whole number of at least 64"),
        ("--lr nan", USAGE, "'nan' is not a number above 0"),
        ("--lr inf", USAGE, "'inf' is not a number above 0"),
        ("--bias nan", USAGE, "'nan' is not a number"),
        ("--bias inf", USAGE, "'inf' is not a number"),
        ("--checkpoint-every nan", USAGE, "'nan' is not a number of at least 0"),
        ("--checkpoint-every inf", USAGE, "'inf' is not a number of at least 0"),
        ("--dropout 1", USAGE, "'1' is not a number of at least 0 and below 1"),
        ("--momentum 1", USAGE, "'1' is not a number above 0 and below 1"),
        ("--color-jitter 1,2,3", USAGE, "is not four numbers"),
        ("--color-jitter 0,0,0,0.6", USAGE, "is not four numbers"),
        ("--cache-bytes much", USAGE, "is not a number of bytes"),
        ("--size 64", USAGE, "--size is now --crop-size"),
        ("--decay 0", USAGE, "--decay is now --weight-decay"),
        ("--no-colour", USAGE, "--no-colour is now --pca-jitter 0"),
        ("--deviation", USAGE, "--deviation is now --std dataset"),
        ("--lr-drops 1", USAGE, "--lr-drops is now --lr-milestones"),
        ("{tmp}", USAGE, "training takes one dataset; checkpoints follow --evaluate"),
        ("--predictions a.csv", USAGE, "--predictions needs --evaluate"),
        ("--evaluate {tmp} --predictions a.txt", USAGE, "a name that ends in .csv or .npz"),
        ("--split val", USAGE, "--split needs --evaluate"),
        ("--pictures {tmp}", USAGE, "--pictures needs --evaluate with one checkpoint"),
        ("--evaluate {tmp} {tmp} --pictures {tmp}", USAGE, "--pictures needs --evaluate with one checkpoint"),
        ("--weights {tmp} --evaluate {tmp}", USAGE, "--weights is for training"),
        ("--export {tmp} --evaluate {tmp}", USAGE, "--export and --evaluate cannot be used together"),
        ("--evaluate {tmp}/absent.pt", USAGE, "does not exist"),
        ("--evaluate {tmp}/notes.pt", FAILED, "notes.pt: corrupt"),
        ("--evaluate {tmp}", FAILED, "this folder has no checkpoint"),
        ("--export {tmp}/notes.pt", FAILED, "notes.pt: corrupt"),
        ("--export {tmp}", FAILED, "this folder has no checkpoint"),
        ("--model alexnot", FAILED, "alexnot: no network has this name; choose one of alexnet,"),
        ("--model alexnet-owt --bias 0.1", FAILED, "bias is not for this net"),
        ("--schedule cosine --warmup-epochs 2", FAILED, "--warmup-epochs 2 of 2 epochs leaves none"),
        ("--crop-size 300", FAILED, "crops of 300 pixels do not fit its images of 256; lower --crop-size, or build"),
        ("--cache device --random-resized-crop", FAILED, "use --cache none with --random-resized-crop or --color-jitter"),
        ("--model alexnet-owt --no-lrn", FAILED, "--no-lrn is not for this net; leave it out"),
        ("--export-preprocessing", USAGE, "--export-preprocessing needs --export"),
        ("--on-metrics json", USAGE, "'json' is not the name of a module and of a function in it"),
        ("--on-metrics nonesuch_of_imagefeed:log", FAILED, "cannot be imported (No module named 'nonesuch_of_imagefeed')"),
        ("--on-metrics json:log", FAILED, "cannot be imported (module 'json' has no attribute 'log')"),
        ("--on-metrics json:decoder", FAILED, "not a function; give one that takes a line of metrics.jsonl"),
        ("--config {tmp}/notes.pt", USAGE, "notes.pt: not a JSON object; give the recipe.json of a run folder"),
    ],
)
def test_wrong_calls_are_refused(tiny, tmp_path, options, code, said):
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    result = run(tiny.root, tmp_path / "run", *options.format(tmp=tmp_path).split())
    assert result.exit_code == code and said in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, options, said",
    [
        ({"warm_epochs": 1}, "", "warm_epochs is no key of recipe.json; the nearest is warmup_epochs"),
        ({"lerning_rate": 1}, "", "lerning_rate is no key of recipe.json; keys are options of train, as in lr and batch_size"),
        ({"lr": "0.1"}, "", 'lr must be a number above 0, not "0.1"; correct it'),
        ({"epochs": None}, "", "epochs must be a whole number of at least 1, not null"),
        ({"decay": -1}, "", "decay must be a number of at least 0, not -1"),
        ({"mean": [0.5, 0.5, 0.5]}, "", "mean must be one of channel, image, imagenet, or three numbers"),
        ({"batch_size": 4, "images_a_step": 16}, "", "batch_size 4 on 1 rank is 4 images a step, but images_a_step is 16"),
        ({"recipe": "code"}, "--recipe fast", "is of recipe code; leave out one of the two"),
        ({"weights": "/nowhere.pt"}, "", "its weights /nowhere.pt is gone; if it has moved, give --weights"),
        ({"dataset_path": "/nowhere"}, "", "its dataset /nowhere is gone; if it has moved, give its folder, as in: OUT --config"),
        ({}, "", "Missing argument 'OUT'"),
        ({}, "--evaluate {tmp}", "--config is for training; leave out --evaluate and --export"),
    ],
)
def test_a_wrong_config_is_refused(tiny, tmp_path, content, options, said):
    """Without OUT where the file is to give it."""
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    out = [] if "OUT" in said else [tiny.root]
    result = call(*out, "--config", tmp_path / "recipe.json", *options.format(tmp=tmp_path).split())
    assert result.exit_code == USAGE and said in " ".join(result.output.split()), result.output


def test_a_run_is_repeated_by_its_file(owt, tiny_copy, run_dir):
    """On a copy of the dataset: the same losses, and the same file but for the folder; also of another number of ranks, and with
    an option that wins."""
    there = json.loads((owt[0] / "recipe.json").read_text())
    assert there["dataset_path"] == str(Path(there["dataset_path"]).resolve())
    four = run_dir.parent / "four.json"
    four.write_text(json.dumps(there | {"ranks": 4, "batch_size": 2}))
    result = call(tiny_copy.root, "--config", four, "--run-dir", run_dir, "--threads", "1", "--device", "cpu")
    assert result.exit_code == 0 and "warning" not in result.output, result.output
    here = json.loads((run_dir / "recipe.json").read_text())
    assert here == there | {"dataset_path": str(tiny_copy.root)}
    losses = [[(line["loss/train"], line["metrics/val/loss"]) for line in metrics(folder)] for folder in (owt[0], run_dir)]
    assert losses[0] == losses[1]
    another = run_dir.parent / "another.json"
    another.write_text(json.dumps(there | {"dataset": "0123456789abcdef"}))
    result = call("--config", another, "--run-dir", run_dir, "--seed", "2", "--device", "cpu")
    assert f"another.json was written for another dataset than {there['dataset_path']}, so the run will differ" in result.output
    assert result.output.splitlines()[-1].startswith(f"Error: {run_dir}: the checkpoint was made with --seed 1, this call")


def test_a_run_by_cuda_graphs_is_repeated_without_them_where_there_are_none(tiny, tmp_path, run_dir):
    (tmp_path / "graphed.json").write_text('{"compile": "graph", "limit_batches": 1}')
    result = run(tiny.root, run_dir, "--config", tmp_path / "graphed.json", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert json.loads((run_dir / "recipe.json").read_text())["compile"] == "off"
    result = run(tiny.root, tmp_path / "other", "--compile", "graph")
    assert result.exit_code == 1 and "on one GPU alone" in result.output


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("package", ["timm"], indirect=True)
def test_a_packages_net_gets_the_pixels_that_it_expects(tiny, run_dir):
    """Unless told otherwise, which weights do not go without a warning for. Its crops have one size, and the code's recipe
    another mean."""
    net, file = run_dir.parent / "net.pt", run_dir / "recipe.json"
    torch.save(build_net("timm:tiny", 3).state_dict(), net)
    options = [
        "--recipe",
        "code",
        "--model",
        "timm:tiny",
        "--weights",
        net,
        "--device",
        "cpu",
        "--precision",
        "float32",
        *ONE_STEP,
    ]
    result = call(tiny.root, "--run-dir", run_dir, *options)
    assert result.exit_code == 0 and "warning" not in result.output, result.output
    half = [127.5] * 3
    assert json.loads(file.read_text()).items() >= {"mean": half, "std": half, "crop_size": 96, "model": "timm:tiny"}.items()
    assert "this run is over" in call(tiny.root, "--run-dir", run_dir, *options).output
    shutil.rmtree(run_dir)
    result = call(tiny.root, "--run-dir", run_dir, *options, "--std", "none", "--crop-size", "64")
    assert (
        f"warning: {net}: these weights expect pixels normalized with --mean 127.5,127.5,127.5 --std 127.5,127.5,127.5, but this "
        "run has --mean 127.5,127.5,127.5 --std none; unless you mean that, start over with the former and another --run-dir\n"
    ) in result.output
    assert json.loads(file.read_text()).items() >= {"mean": half, "std": "none", "crop_size": 64}.items()
    measured = call(tiny.root, "--evaluate", run_dir, "--device", "cpu")
    assert measured.exit_code == 0, measured.output


def test_a_function_gets_each_line_and_if_it_fails_the_run_can_go_on(tiny, run_dir, monkeypatch):
    monkeypatch.syspath_prepend(run_dir.parent)
    (run_dir.parent / "hook_of_test.py").write_text(
        "lines = []\n\ndef log(line):\n    lines.append(line)\n    if line['step'] == 2:\n        raise OSError('no network')\n"
    )
    options = "--limit-batches 2 --on-metrics hook_of_test:log".split()
    failed = run(tiny.root, run_dir, *options)
    assert failed.exit_code == FAILED and failed.output.splitlines()[-1] == (
        f"Error: step 2: --on-metrics raised OSError('no network') in {run_dir.parent}/hook_of_test.py, line 6; a checkpoint is "
        "saved, so correct it and run the same command again"
    )
    again = run(tiny.root, run_dir, *options)
    assert again.exit_code == 0 and "resuming after step 2" in again.output
    assert sys.modules["hook_of_test"].lines == metrics(run_dir)


def test_plateau_without_a_validation_split_is_refused(unvalidated, run_dir):
    """The learning rate would never fall."""
    result = run(unvalidated.root, run_dir)
    assert not run_dir.exists()
    assert result.exit_code == FAILED and result.output.splitlines()[-1] == (
        f"Error: {unvalidated.root}: no validation split, so --schedule plateau would never lower the learning rate; give "
        "--schedule cosine or --lr-milestones, or build with a validation split or --validation-fraction 0.1"
    )


def test_a_dataset_that_cannot_be_read_does_not_touch_the_run_folder(tiny_copy, tmp_path, run_dir):
    absent = run(tmp_path / "absent", run_dir)
    assert absent.exit_code == FAILED and "there is no such folder" in absent.output
    (tiny_copy.root / "statistics.npz").unlink()
    result = run(tiny_copy.root, run_dir)
    assert result.exit_code == FAILED and "statistics.npz: the file is missing" in result.output
    assert newest_first(run_dir) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_sentence(tiny, run_dir):
    result = run(tiny.root, run_dir, "--device", "cuda")
    assert result.exit_code == FAILED and not run_dir.exists()
    assert re.fullmatch("Error: device cuda: [^\n]+; [^\n]+ use --device cpu\n", result.output)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_missing_tensorboard_is_one_sentence_before_anything_is_measured(tiny, run_dir):
    result = run(tiny.root, run_dir, *ONE_STEP, "--tensorboard")
    assert result.exit_code == FAILED and not run_dir.exists()
    assert result.output == "Error: --tensorboard: TensorBoard is not installed; run: pip install '.[tensorboard]'\n"


def test_two_trainings_do_not_write_into_one_run_folder(tiny, run_dir):
    with run_folder(run_dir):
        result = run(tiny.root, run_dir)
    assert result.exit_code == FAILED and "another training is writing into it" in result.output.splitlines()[-1]


def test_ranks_share_a_recipes_images():
    assert cli.divide_batch(128, 8) == 16
    with pytest.raises(UserError, match="the recipe's 128 images a step cannot be divided among 3 ranks; give --batch-size"):
        cli.divide_batch(128, 3)


def test_a_recipes_biases_are_only_for_alexnets(owt):
    assert json.loads((owt[0] / "recipe.json").read_text())["bias"] is None


def test_a_recipe_fills_in_options_that_are_not_given(tiny, run_dir):
    """recipe.json holds what was trained with: the code's recipe, with the ends of color jitter and of conv1 within reach."""
    options = "--recipe code --epochs 3 --pca-jitter-epochs 1 --first-layer-epochs 1,2 --limit-batches 1".split()
    result = run(tiny.root, run_dir, *options)
    assert result.exit_code == 0, result.output
    assert f"{tiny.root}: trains on 50 records of split train, validates on 23 records of split val" in result.output
    written = json.loads((run_dir / "recipe.json").read_text())
    mine = {"recipe": "code", "model": "alexnet-code", "bias_lr": 0.02, "pixel_divisor": 1.1, "schedule": "25,51,79"}
    mine |= {"mean": "image", "epochs": 3, "lr": 0.001, "pca_jitter_epochs": 1, "momentum": 0.9, "batch_size": 8, "ranks": 1}
    mine |= {"images_a_step": 8}
    # The values that None stands for, and those that no option sets.
    mine |= {"bias": 1.0, "dropout": 0.5, "cache_device": False, "precision": "float32"}
    assert written.items() >= mine.items() and written["dataset"] == tiny.fingerprint[:16]
    assert written.keys() >= {field.name for field in dataclasses.fields(Recipe)}
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]
    state = load_latest(run_dir)
    rates = sorted((group["bias"], group["first"], group["lr"]) for group in state["optimizer"]["param_groups"])
    assert rates == [(False, False, 0.001), (False, True, 0.0), (True, False, 0.02), (True, True, 0.0)]
