"""What a run may be resumed with, and the weights it may start from."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.model.alexnet import AlexNet
from imagefeed.model.step import can_compile, choose_precision
from imagefeed.pipeline.options import IMAGENET_MEAN, IMAGENET_STD
from imagefeed.training.checkpoints import load_latest, save_checkpoint
from imagefeed.training.cli import compile_mode
from imagefeed.training.resume import Progress, open_run, warn_of_other_pixels
from tests.training.conftest import OWT
from tests.training.runs import CPU, inputs, metrics, recipe, run, same

# As commits of version 0.1 wrote them; without what depends on the dataset.
MADE_WITH_OLD_NAMES = {
    "images a step": 8,
    "--model": "alexnet",
    "--lrn": True,
    "--overlapping": True,
    "--dropout": None,
    "--bias": None,
    "--lr": 0.001,
    "--momentum": 0.9,
    "--decay": 0.0005,
    "--schedule": "plateau",
    "--warmup-epochs": 0.0,
    "--bias-lr": None,
    "--first-layer-epochs": None,
    "--size": 64,
    "--colour": True,
    "--colour-epochs": None,
    "--colour-divisor": 1.0,
    "--shuffle": "global",
    "--mean": "channel",
    "--deviation": False,
    "--random-resized": False,
    "--color-jitter": (0.0, 0.0, 0.0, 0.0),
    "--precision": "float32",
    "--limit-batches": None,
    "--seed": 0,
    "--cache device": False,
}


@pytest.fixture(scope="module")
def begun(tiny) -> dict:
    """The checkpoint of a run before its first step."""
    run = open_run(inputs(tiny), recipe(), tiny.root / "absent")
    state = {"made_with": run.made_with, "progress": dataclasses.asdict(run.at), "loss_sum": 0.0}
    return state | {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


@pytest.mark.parametrize(
    "options, difference",
    [
        (["--batch-size", "4"], "8 images a step, this call has 4 images a step"),
        (["--seed", "1"], "--seed 0, this call has --seed 1"),
        (["--bias", "0.1"], "the default --bias, this call has --bias 0.1"),
        (["--model", "alexnet-owt"], "--model alexnet, this call has --model alexnet-owt"),
        (["--no-lrn"], "--lrn, this call has --no-lrn"),
        (["--momentum", "0.8"], "--momentum 0.9, this call has --momentum 0.8"),
        (["--pca-jitter", "0"], "--pca-jitter 0.1, this call has --pca-jitter 0.0"),
        (["--crop-size", "96"], "--crop-size 64, this call has --crop-size 96"),
        (["--std", "dataset"], "--std none, this call has --std dataset"),
        (["--cache", "device"], "another --cache, this call has --cache device"),
    ],
)
def test_a_run_resumes_only_with_the_options_it_started_with(finished, tiny, options, difference):
    result = run(tiny.root, finished[0], *options)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: {finished[0]}: the checkpoint was made with {difference}; use the same, or another --run-dir, where --weights "
        f"{finished[0]} would start from this run's weights"
    )


@pytest.mark.parametrize("options, said", [(["--mean", "channel"], "--mean image"), (["--cache", "device"], "another --cache")])
def test_augmentation_is_part_of_a_run(owt, tiny, options, said):
    result = run(tiny.root, owt[0], *OWT, *options)
    assert result.exit_code == 1 and f"was made with {said}" in result.output


@pytest.mark.parametrize("changes", [{"random_resized_crop": True}, {"color_jitter": (0.4, 0.4, 0.4, 0.1)}], ids=str)
def test_a_resized_or_jittered_run_goes_on_with_the_decoder_that_it_began_with(tiny, run_dir, begun, changes):
    """Where the checkpoint does not say, it was DALI's."""
    run_dir.mkdir()
    made_with = begun["made_with"] | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    save_checkpoint(run_dir, 1, begun | {"made_with": made_with})
    with pytest.raises(UserError, match="was made with --decoder dali, this call has --decoder native; use the same"):
        open_run(inputs(tiny), recipe(**changes), run_dir)
    assert open_run(inputs(tiny, decoder="dali"), recipe(**changes), run_dir).made_with["--decoder"] == "dali"


def test_a_checkpoint_of_version_0_1_is_resumed(tiny, run_dir, begun):
    run_dir.mkdir()
    mine = {name: begun["made_with"][name] for name in ("classes", "class names", "dataset")}
    save_checkpoint(run_dir, 4, begun | {"made_with": mine | MADE_WITH_OLD_NAMES, "progress": vars(Progress(epochs=1))})
    resumed = open_run(inputs(tiny), recipe(), run_dir)
    assert resumed.made_with == begun["made_with"] and resumed.at.epochs == 1
    for name, changes, value in (("--size", {"crop_size": 96}, 96), ("--colour", {"pca_jitter": 0.0}, 0.0)):
        old = {"--size": "--crop-size 64", "--colour": "--pca-jitter 0.1"}[name]
        with pytest.raises(UserError, match=f"was made with {old}, this call has {old.split()[0]} {value}"):
            open_run(inputs(tiny), recipe(**changes), run_dir)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("classes", 1000, "has 1,000 classes, this dataset 3;"),
        ("dataset", "0123456789abcdef", "is from training on another dataset (0123456789abcdef, this one is "),
    ],
)
def test_a_checkpoint_of_another_dataset_is_refused(tiny, run_dir, name, value, said):
    run_dir.mkdir()
    mine = {"classes": 3, "dataset": tiny.fingerprint[:16]}
    save_checkpoint(run_dir, 1, {"made_with": mine | {name: value}, "progress": {}, "model": {}})
    result = run(tiny.root, run_dir)
    assert result.exit_code == 1
    assert f"the checkpoint {said}" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"made_with": {}},
        {"progress": {}},
        {"progress": {"step": "6"}},
        {"model": {}},
        {"model": {"conv1.weight": torch.zeros(1)}},
    ],
)
def test_a_malformed_checkpoint_is_one_sentence(tiny, run_dir, begun, changes):
    """Both to resume from and to measure."""
    run_dir.mkdir()
    save_checkpoint(run_dir, 1, begun | {key: value and begun[key] | value for key, value in changes.items()})
    said = f"Error: {run_dir}: not a checkpoint that imagefeed train can use; choose one that it wrote"
    assert run(tiny.root, run_dir).output.splitlines()[-1] == said
    if changes != {"progress": {"step": "6"}}:
        assert run(tiny.root, run_dir, "--evaluate", run_dir).output.splitlines()[-1] == said


@pytest.mark.parametrize("key", ["optimizer", "loss_sum"])
def test_a_run_does_not_resume_from_a_part_of_a_checkpoint(tiny, run_dir, begun, key):
    run_dir.mkdir()
    save_checkpoint(run_dir, 1, {name: value for name, value in begun.items() if name != key})
    result = run(tiny.root, run_dir)
    assert result.exit_code == 1 and "not a checkpoint that imagefeed train can use" in result.output


def test_precision_auto_keeps_the_precision_that_the_run_started_with(tiny, run_dir):
    """Another machine may find the other one faster."""
    run_dir.mkdir()
    open_run(inputs(tiny), recipe(precision="bfloat16"), run_dir).save(run_dir)
    assert open_run(inputs(tiny), recipe(precision="auto"), run_dir).recipe.precision == "bfloat16"
    assert choose_precision(CPU) in ("float32", "bfloat16")


def test_weights_of_other_classes_are_fine_tuned(unvalidated, tmp_path, run_dir):
    """All but the last layer; in bfloat16, without a validation split, and in batches as large as the split, which does not fill
    those of 17. A resumed run remembers its first weights."""
    torch.manual_seed(9)
    theirs = AlexNet(num_classes=7, crop_size=64).state_dict()
    file = tmp_path / "seven.pt"
    torch.save(theirs, file)
    options = "--limit-batches 1 --epochs 2 --lr 1e-9 --precision bfloat16 --batch-size 17 --lr-milestones 9".split()
    result = run(unvalidated.root, run_dir, "--weights", file, *options)
    assert result.exit_code == 0, result.output
    assert f"{file}: loaded 14 of 16 tensors; fc8 starts from random weights\n" in result.output
    assert "batch size 16: the 16 records of split train do not fill one of 17" in result.output
    assert f"{unvalidated.root}: trains on 16 records of split train, no validation split" in result.output
    assert [(line["step"], line["epoch"]) for line in metrics(run_dir)] == [(1, 1.0), (2, 2.0)]
    assert json.loads((run_dir / "summary.json").read_text())["errors"] == {}
    noted = json.loads((run_dir / "recipe.json").read_text())
    assert (noted["weights"], noted["batch_size"]) == (str(file), 16)
    mine = load_latest(run_dir)["model"]
    last = list(theirs)[-2:]
    assert [mine[name].shape[0] for name in last] == [3, 3]
    for name in set(theirs) - set(last):
        assert torch.allclose(mine[name], theirs[name], atol=1e-6)
    as_before = recipe(limit_batches=1, lr=1e-9, precision="bfloat16", batch_size=16, schedule="9")
    again = open_run(inputs(unvalidated), as_before, run_dir)
    assert again.at.step == 2 and again.made_with["--weights"] == str(file)
    file.rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match="was made with --weights .*; use the same, or another --run-dir"):
        open_run(inputs(unvalidated), as_before, run_dir, tmp_path / "other.pt")
    result = run(unvalidated.root, run_dir, "--evaluate", run_dir)
    assert result.exit_code == 1 and "no validation split to measure on" in result.output


def test_a_run_starts_from_all_weights_of_a_net_with_as_many_classes(finished, tiny, run_dir, capsys):
    folder, _ = finished
    started = open_run(inputs(tiny), recipe(), run_dir, folder)
    assert f"{folder}: loaded 16 of 16 tensors\n" in capsys.readouterr().out and started.at.step == 0
    assert same(dict(started.model.state_dict()), dict(load_latest(folder)["model"]))
    with pytest.raises(UserError, match="was made with no --weights"):
        open_run(inputs(tiny), recipe(), folder, folder)


def test_a_subset_is_part_of_a_run(tiny, tmp_path, run_dir):
    (tmp_path / "some.txt").write_text("\n".join(map(str, range(20))))
    (tmp_path / "others.txt").write_text("bee")
    result = run(tiny.root, run_dir, "--subset", tmp_path / "some.txt", "--epochs", 1, "--no-tuned")
    assert result.exit_code == 0, result.output
    assert "trains on 20 of 50 records of split train, validates on 23 records of split val" in result.output
    assert metrics(run_dir)[-1]["step"] == 2
    assert json.loads((run_dir / "recipe.json").read_text())["subset"] == str(tmp_path / "some.txt")
    (tmp_path / "some.txt").write_text("\n".join(map(str, range(30))))
    result = run(tiny.root, tmp_path / "again", "--config", run_dir / "recipe.json", "--no-tuned")
    assert result.exit_code == 0 and "was written for a subset of 20 records (" in result.output, result.output
    for options, said in ((["--subset", tmp_path / "others.txt"], "a --subset of 17 records"), ([], "no --subset")):
        result = run(tiny.root, run_dir, *options, "--epochs", 2)
        assert result.exit_code == 1 and "was made with a --subset of 20 records (" in result.output
        assert f"this call has {said}" in result.output


@pytest.mark.parametrize(
    "origin, changes, expected",
    [
        ({"--mean": "channel", "--std": "none"}, {}, None),
        ({"--mean": "channel", "--std": "none"}, {"std": "dataset"}, "--mean channel --std none"),
        ({"--mean": "imagenet", "--std": "imagenet"}, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}, None),
        ({"--mean": "image", "--std": "none"}, {}, "--mean image --std none"),
        ({}, {}, None),  # the paper's net takes any mean
        ({}, {"model": "alexnet-owt"}, "--mean 123.675,116.28,103.53 --std 58.395,57.12,57.375"),
        ({}, {"model": "alexnet-owt", "mean": "imagenet", "std": "imagenet"}, None),
    ],
)
def test_weights_that_expect_other_pixels_get_a_warning(tiny, capsys, origin, changes, expected):
    """As the run that they come from, or else torchvision, had them."""
    warn_of_other_pixels(Path("old.pt"), origin, recipe(**changes), tiny)
    said = capsys.readouterr().out
    assert (
        said == ""
        if expected is None
        else said.startswith(
            f"warning: old.pt: these weights expect pixels normalized with {expected}, but this run has --mean channel --std "
        )
    )


def test_a_gpu_that_emulates_bfloat16_trains_in_float32(monkeypatch):
    """As PyTorch answers on a T4: yes, unless emulation is left out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision(torch.device("cuda")) == "float32"


def test_a_gpu_compiles_only_with_a_c_compiler_and_pythons_headers(tmp_path, monkeypatch):
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    cuda = torch.device("cuda")
    assert not can_compile(cuda) and compile_mode("auto", cuda) == "off"
    with pytest.raises(UserError, match="Python.h is missing; install triton, gcc and python3-dev"):
        compile_mode("default", cuda)
    (tmp_path / "Python.h").touch()
    assert can_compile(cuda) and compile_mode("auto", cuda) == "default"
    (tmp_path / "gcc").unlink()
    assert not can_compile(cuda)


def test_a_run_fed_by_both_decoders_goes_on_with_the_same_share_only(tiny, run_dir):
    run_dir.mkdir()
    both = dataclasses.replace(inputs(tiny), reading={"decoder": "both", "native_share": 0.3})
    open_run(both, recipe(), run_dir).save(run_dir)
    open_run(both, recipe(), run_dir)
    for reading, sentence in (
        ({"decoder": "both"}, "was made with --native-share 0.3, this call has --native-share 0.5"),
        ({"decoder": "dali"}, "was made with --decoder both, this call has --decoder dali"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_run(dataclasses.replace(both, reading=reading), recipe(), run_dir)
