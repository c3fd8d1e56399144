import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import train
from imagefeed.dataset.errors import UserError
from imagefeed.model import AlexNet
from imagefeed.model.step import choose_precision, train_step
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.training import cli, loop, reporting
from imagefeed.training.checkpoints import load_latest, locked, newest_first, save_checkpoint
from imagefeed.training.evaluation import Member, evaluate
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe, make_optimizer
from imagefeed.training.resume import Progress, begin_with, open_run, save
from tests.conftest import jpeg, pack, picture

# Crops of 64 pixels: 0.1 s a step. 50 records in batches of 8 are 6 steps an epoch.
QUICK = "--device cpu --precision float32 --crop-size 64 --batch-size 8 --threads 1 --epochs 2 --lr 0.001".split()


def run(out: Path, run_dir: Path, *options: str) -> Result:
    """train.py in this process, with the options of QUICK unless others are given."""
    return CliRunner().invoke(train.main, [str(out), "--run-dir", str(run_dir), *QUICK, *options])


def start(out: Path, run_dir: Path, *options: str) -> subprocess.Popen:
    """The same in a process of its own, to be killed."""
    command = [sys.executable, train.__file__, str(out), "--run-dir", str(run_dir), *QUICK, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until `condition()` holds; the process must not end before it."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    """Bitwise, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def recipe(**changes) -> Recipe:
    """That of QUICK."""
    return Recipe(**{"batch_size": 8, "lr": 0.001, "crop_size": 64, "precision": "float32", "epochs": 2} | changes)


def begun(manifest) -> dict:
    """The checkpoint of a run with the options of QUICK before its first step."""
    begun = open_run(manifest, recipe(), Path("/nonexistent"), torch.device("cpu"), Ranks())
    return {
        "made_with": begun.made_with,
        "progress": dataclasses.asdict(begun.at),
        "loss_sum": 0.0,
        "model": begun.model.state_dict(),
        "optimizer": begun.optimizer.state_dict(),
    }


@pytest.fixture
def run_dir(tmp_path):
    """Emptied at the end: a checkpoint is 160 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder and output of a run of two epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run(tiny.root, folder)
    assert result.exit_code == 0, result.output
    yield folder, result.output
    shutil.rmtree(folder)


def test_a_run_leaves_metrics_summary_curves_and_a_checkpoint(finished, tiny):
    folder, output = finished
    first, last = metrics(folder)
    assert (first["step"], first["epoch"], last["step"], last["epoch"]) == (6, 1.0, 12, 2.0)
    for line in (first, last):
        assert line["loss/train"] > 0 and line["lr"] == 0.001 and line["throughput/samples_per_sec"] > 0
        assert 0 <= line["time/data_wait_pct"] <= 100 and line["data/corrupt"] == 0
        assert line["metrics/val/records"] == 23 and line["metrics/val/top5_error"] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["step"], summary["epochs"], summary["classes"]) == (12, 2, 3)
    assert summary["errors"]["center crop"]["top1_error"] == last["metrics/val/top1_error"]
    assert last["metrics/val/top1"] + last["metrics/val/top1_error"] == pytest.approx(100)
    assert last["metrics/val/top5"] >= last["metrics/val/top1"]
    assert summary["errors"]["ten views"]["records"] == 23
    for name in ("curves", "filters", "guesses", "nearest"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all(0 < line["throughput/device/mfu"] for line in (first, last)) and 0 < summary["mfu"]
    assert summary["samples_per_sec_p5"] <= summary["samples_per_sec"] and summary["published"] == {}
    assert [path.name for path in newest_first(folder)] == ["checkpoint-00000012.pt"]
    assert "ten views: top-1 error" in output.splitlines()[-1] and "images/s" in output.splitlines()[-1]


def test_the_same_command_after_the_end_only_shows_the_summary(finished, tiny):
    folder, output = finished
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = run(tiny.root, folder)
    assert again.exit_code == 0 and f"{folder}: this run is over; to train on, give more --epochs" in again.output
    assert again.output.splitlines()[-1] == output.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_killed_and_started_again_the_weights_are_bitwise_the_same(finished, tiny, run_dir):
    """SIGTERM, then SIGKILL, both in the middle of an epoch; momentum and the metrics agree too."""
    process = start(tiny.root, run_dir)
    wait_for((run_dir / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert output.endswith("interrupted; run the same command again to continue\n")
    stopped = load_latest(run_dir)["progress"]["step"]
    assert 0 <= stopped < 6

    process = start(tiny.root, run_dir, "--checkpoint-every", "0")
    wait_for(lambda: newest_first(run_dir)[0].name >= "checkpoint-00000008.pt", process)
    process.kill()
    process.communicate()
    assert 8 <= load_latest(run_dir)["progress"]["step"] < 12

    assert run(tiny.root, run_dir).exit_code == 0
    there, here = load_latest(finished[0]), load_latest(run_dir)
    assert same(there["model"], here["model"])
    assert same(there["optimizer"], here["optimizer"])
    measured = ("throughput/samples_per_sec", "throughput/device/mfu", "time/data_wait_pct")
    without = [[{k: v for k, v in line.items() if k not in measured} for line in metrics(f)] for f in (finished[0], run_dir)]
    assert without[0] == without[1]


@pytest.mark.parametrize(
    "options, difference",
    [
        (["--batch-size", "4"], "images a step 8, this call has 4"),
        (["--seed", "1"], "--seed 0, this call has 1"),
        (["--bias", "0.1"], "--bias None, this call has 0.1"),
        (["--model", "alexnet-owt"], "--model alexnet, this call has alexnet-owt"),
        (["--no-lrn"], "--lrn True, this call has False"),
        (["--momentum", "0.8"], "--momentum 0.9, this call has 0.8"),
        (["--pca-jitter", "0"], "--pca-jitter 0.1, this call has 0.0"),
    ],
)
def test_a_run_goes_on_only_with_the_options_it_began_with(finished, tiny, options, difference):
    result = run(tiny.root, finished[0], *options)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: {finished[0]}: the checkpoint was made with {difference}; use the same, or another --run-dir"
    )


@pytest.mark.parametrize("name, value", [("classes", 1000), ("dataset", "0123456789abcdef")])
def test_checkpoints_of_another_dataset_are_refused(tiny, run_dir, name, value):
    run_dir.mkdir()
    mine = {"classes": 3, "dataset": tiny.fingerprint[:16]}
    save_checkpoint(run_dir, 1, {"made_with": mine | {name: value}, "progress": {}, "model": {}})
    result = run(tiny.root, run_dir)
    assert result.exit_code == 1
    assert f"the checkpoint was made with {name} {value}, this call has {mine[name]};" in result.output.splitlines()[-1]


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
def test_a_checkpoint_of_another_form_is_one_sentence(tiny, run_dir, changes):
    """Both to go on from and to measure."""
    run_dir.mkdir()
    whole = begun(tiny)
    save_checkpoint(run_dir, 1, whole | {key: value and whole[key] | value for key, value in changes.items()})
    said = f"Error: {run_dir}: not a checkpoint of train.py that this program can use; give one that it wrote"
    assert run(tiny.root, run_dir).output.splitlines()[-1] == said
    if changes != {"progress": {"step": "6"}}:
        assert run(tiny.root, run_dir, "--evaluate", str(run_dir)).output.splitlines()[-1] == said


@pytest.mark.parametrize("key", ["optimizer", "loss_sum"])
def test_a_run_does_not_go_on_from_a_part_of_a_checkpoint(tiny, run_dir, key):
    run_dir.mkdir()
    state = begun(tiny)
    del state[key]
    save_checkpoint(run_dir, 1, state)
    result = run(tiny.root, run_dir)
    assert result.exit_code == 1 and "not a checkpoint of train.py that this program can use" in result.output


@pytest.mark.parametrize("name, value", [("classes", 4), ("class names", "0123456789abcdef")])
def test_evaluate_refuses_other_classes(tiny, run_dir, name, value):
    run_dir.mkdir()
    state = begun(tiny)
    state["made_with"] |= {"dataset": "another", name: value}
    save_checkpoint(run_dir, 1, state)
    result = run(tiny.root, run_dir, "--evaluate", str(run_dir))
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert f"the checkpoint was made with {name} {value}, this call has" in last
    assert last.endswith("; measure it on a dataset of the same classes")


def test_two_trainings_do_not_write_into_one_run_folder(tiny, run_dir):
    with locked(run_dir):
        result = run(tiny.root, run_dir)
    assert result.exit_code == 1 and "another training is writing into it" in result.output.splitlines()[-1]


def test_evaluate_repeats_the_errors_of_the_run(finished, tiny):
    """On a run folder and on a file; the table has what the summary has."""
    folder, _ = finished
    errors = json.loads((folder / "summary.json").read_text())["errors"]
    for path in (folder, newest_first(folder)[0]):
        result = CliRunner().invoke(train.main, [str(tiny.root), "--device", "cpu", "--evaluate", str(path)])
        assert result.exit_code == 0, result.output
        for views in ("center crop", "ten views"):
            assert re.search(rf"{views}, 23 images +│ +{errors[views]['top1_error']:.2f} %", result.output)


def test_evaluate_draws_the_pictures_that_the_run_drew(finished, tiny, tmp_path):
    folder, _ = finished
    call = [str(tiny.root), "--device", "cpu", "--threads", "1", "--evaluate", str(folder)]
    result = CliRunner().invoke(train.main, [*call, "--pictures", str(tmp_path / "a" / "b")])
    assert result.exit_code == 0, result.output
    for name in ("filters.png", "guesses.png", "nearest.png"):
        assert (tmp_path / "a" / "b" / name).read_bytes() == (folder / name).read_bytes()
    assert CliRunner().invoke(train.main, [*call, str(folder), "--pictures", str(tmp_path)]).exit_code == 2
    assert CliRunner().invoke(train.main, [str(tiny.root), "--pictures", str(tmp_path)]).exit_code == 2


def test_evaluating_something_else_is_one_sentence(tiny, tmp_path):
    (tmp_path / "notes.pt").write_text("no checkpoint")
    calls = [("notes.pt", 1, "corrupt"), (".", 1, "there is no checkpoint in this folder"), ("absent.pt", 2, "not exist")]
    for name, code, said in calls:
        result = CliRunner().invoke(train.main, [str(tiny.root), "--evaluate", str(tmp_path / name)])
        assert result.exit_code == code and said in result.output and "Traceback" not in result.output


def test_evaluation_counts_each_record_once_and_averages_probabilities(tiny):
    """Against numpy over one record at a time; 23 records in batches of 5 leave two places empty."""
    torch.manual_seed(0)
    model = AlexNet(num_classes=12, crop_size=64).eval()
    torch.nn.init.normal_(model.fc8.weight, std=0.5)
    for views in ("center", "ten"):
        with ImageLoader(tiny, "val", 5, views=views, crop_size=64) as loader:
            found = evaluate([Member(model, "float32", ())], {(): loader}, Ranks())
        top1 = top5 = loss = 0
        with ImageLoader(tiny, "val", 1, views=views, crop_size=64) as singles, torch.no_grad():
            for batch in singles:
                logits = model.eval()(batch.images.reshape(-1, 3, 64, 64)).double().numpy()
                powers = np.exp(logits - logits.max(1, keepdims=True))
                probabilities = (powers / powers.sum(1, keepdims=True)).mean(0)
                rank = int((probabilities > probabilities[batch.labels.item()]).sum())
                top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
                loss -= np.log(probabilities[batch.labels.item()])
        assert found["records"] == 23
        assert found["top1_error"] == pytest.approx(100 - 100 * top1 / 23)
        assert found["top5_error"] == pytest.approx(100 - 100 * top5 / 23)
        assert found["loss"] == pytest.approx(loss / 23, rel=1e-4)


def drops_after(errors: list[float | None], **changes) -> list[int]:
    """How often the learning rate had been divided after each of the epochs with these validation errors."""
    at = Progress()
    found = []
    for error in errors:
        loop.end_epoch(at, error, recipe(**changes))
        found.append(at.drops)
    return found


def test_the_learning_rate_drops_when_the_error_stops_falling_three_times_at_most():
    assert drops_after([50, 40, 41, 42, 40, 43, 39, 40, 40, 40, 40, 40]) == [0] * 11 + [1]
    assert drops_after([50] * 25) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 10
    assert drops_after([None] * 8) == [0] * 8
    assert drops_after([50] * 25, schedule="cosine") == [0] * 25


def test_a_batch_that_is_repeated_is_learnt():
    """From larger weights than the paper's, which leave the start slowly on crops this small."""
    torch.manual_seed(0)
    model = AlexNet(num_classes=3, dropout=0.0, crop_size=64, bias=0.0).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    model.conv1.weight.data /= 70  # pixels, not deviations
    optimizer = make_optimizer(model, recipe(lr=1e-4))
    pixels = np.stack([picture(seed, 64, 64) for seed in range(6)]).transpose(0, 3, 1, 2).astype(np.float32) - 127
    labels = torch.arange(6) % 3
    batch = Batch(torch.from_numpy(pixels), labels, torch.arange(6), torch.ones(6, dtype=torch.bool))
    losses = [train_step(model, batch.images, batch.labels, optimizer, "float32").item() for _ in range(8)]
    assert losses[-1] < losses[0] / 10, losses


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tiny, run_dir):
    result = run(tiny.root, run_dir, "--lr", "1e9", "--checkpoint-every", "0")
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert "the loss is" in last and "begin again with a lower --lr and another --run-dir" in last
    state = load_latest(run_dir)
    assert state is None or np.isfinite(state["loss_sum"])


def test_weights_that_are_no_numbers_after_the_last_step_are_not_saved(tiny, tmp_path, run_dir):
    """The loss of the only step is that before it: validation images show it, or, without them, the weights."""
    options = "--lr 1e30 --epochs 1 --limit-batches 1".split()
    result = run(tiny.root, run_dir, *options)
    assert result.exit_code == 1 and "the validation loss is nan; begin again" in result.output.splitlines()[-1]
    assert newest_first(run_dir) == [] and metrics(run_dir) == []
    options[1] = "1e300"
    manifest = pack(tmp_path / "data", {"train": [jpeg(picture(seed)) for seed in range(8)]})
    result = run(manifest.root, run_dir, *options)
    assert result.exit_code == 1 and "the sum of the weights is" in result.output.splitlines()[-1]
    assert newest_first(run_dir) == []


def test_a_dataset_without_a_validation_split_is_trained_on(tmp_path, run_dir):
    """In bfloat16, with epochs cut to two steps."""
    manifest = pack(tmp_path / "data", {"train": [jpeg(picture(seed)) for seed in range(20)]})
    result = run(manifest.root, run_dir, "--precision", "bfloat16", "--limit-batches", "1")
    assert result.exit_code == 0, result.output
    assert [(line["step"], line["epoch"]) for line in metrics(run_dir)] == [(1, 1.0), (2, 2.0)]
    assert json.loads((run_dir / "summary.json").read_text())["errors"] == {}
    result = CliRunner().invoke(train.main, [str(manifest.root), "--device", "cpu", "--evaluate", str(run_dir)])
    assert result.exit_code == 1 and "no validation split to measure on" in result.output


def test_precision_auto_keeps_what_the_run_began_with(tiny, run_dir):
    """Another machine may find the other one faster."""
    begun = open_run(tiny, recipe(precision="bfloat16"), run_dir, torch.device("cpu"), Ranks())
    run_dir.mkdir()
    save(begun, run_dir)
    auto = open_run(tiny, recipe(precision="auto"), run_dir, torch.device("cpu"), Ranks())
    assert auto.recipe.precision == "bfloat16"
    assert choose_precision(torch.device("cpu")) in ("float32", "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_sentence(tiny, run_dir):
    result = run(tiny.root, run_dir, "--device", "cuda")
    assert result.exit_code == 1 and not run_dir.exists()
    assert result.output == "Error: --device cuda: PyTorch finds no usable CUDA device here; use --device cpu\n"


def test_wrong_calls_and_absent_data_have_their_exit_codes(tiny, tmp_path, run_dir):
    absent = run(tmp_path / "absent", run_dir)
    assert absent.exit_code == 1 and "there is no such folder" in absent.output
    large = run(tiny.root, run_dir, "--batch-size", "51")
    assert large.exit_code == 1 and "50" in large.output and "51" in large.output and "Traceback" not in large.output
    assert run(tiny.root, run_dir, "--lr-milestones", "soon").exit_code == 2
    assert run(tiny.root, run_dir, "--crop-size", "63").exit_code == 2
    for option in ("--lr", "--bias", "--checkpoint-every"):
        for value in ("nan", "inf"):
            result = run(tiny.root, run_dir, option, value)
            assert result.exit_code == 2 and f"{value} is not a finite number" in result.output


def test_the_second_signal_interrupts_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with loop.signals_noted() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unreadable_dataset_does_not_touch_the_run_folder(tiny_copy, run_dir):
    (tiny_copy.root / "statistics.npz").unlink()
    result = run(tiny_copy.root, run_dir)
    assert result.exit_code == 1 and "statistics.npz: the file is missing" in result.output
    assert newest_first(run_dir) == []


def test_a_cache_changes_no_loss(tiny, tmp_path):
    losses = []
    for cache in ("none", "host"):
        assert not run(tiny.root, tmp_path / cache, "--cache", cache, "--cache-bytes", "5M", "--mean", "image").exit_code
        losses.append([line["loss/train"] for line in metrics(tmp_path / cache)])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_augmentation_belongs_to_the_run(tiny, tmp_path):
    """What is asked for reaches the loader, and a checkpoint is measured with the same mean and deviation."""
    options = "--shuffle blocks --mean image --std dataset --limit-batches 1 --epochs 1 --lr 0.0001".split()
    assert not run(tiny.root, tmp_path / "a", *options).exit_code
    found = run(tiny.root, tmp_path / "a", *options, "--epochs", "2", "--mean", "channel")
    assert found.exit_code == 1 and "--mean" in found.output
    errors = json.loads((tmp_path / "a" / "summary.json").read_text())["errors"]
    output = run(tiny.root, tmp_path / "b", "--evaluate", str(tmp_path / "a")).output
    for views in ("center crop", "ten views"):
        assert re.search(rf"{views}, 23 images +│ +{errors[views]['top1_error']:.2f} %", output)
    found = run(tiny.root, tmp_path / "a", *options, "--epochs", "2", "--cache", "device")
    assert found.exit_code == 1 and "--cache device" in found.output
    options = "--random-resized-crop --color-jitter 0.4,0.4,0.4,0.1 --limit-batches 1 --epochs 1 --lr 0.0001".split()
    assert not run(tiny.root, tmp_path / "c", *options).exit_code


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--color-jitter", "1,2,3"], "is not four numbers"),
        (["--color-jitter", "0,0,0,0.6"], "is not four numbers"),
        (["--cache-bytes", "much"], "is no number of bytes"),
    ],
)
def test_what_is_no_value_is_refused(tiny, tmp_path, option, message):
    found = run(tiny.root, tmp_path / "run", *option)
    assert found.exit_code == 2 and message in found.output


QUICKEST = "--limit-batches 1 --epochs 1 --lr 0.0001".split()


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "alexnet-owt", "--crop-size", "96", "--std", "dataset", "--dropout", "0.2"],
        ["--model", "alexnet-one-gpu", "--no-lrn", "--no-overlapping"],
    ],
)
def test_other_nets_train_and_are_measured_as_they_were_trained(tiny, run_dir, options):
    result = run(tiny.root, run_dir, *QUICKEST, *options)
    assert result.exit_code == 0, result.output
    assert f"{options[1]} on {tiny.root}" in result.output
    errors = json.loads((run_dir / "summary.json").read_text())["errors"]["ten views"]
    output = run(tiny.root, run_dir, "--evaluate", str(run_dir)).output
    assert re.search(rf"ten views, 23 images +│ +{errors['top1_error']:.2f} %", output)


def test_a_recipes_images_are_shared_out_over_the_ranks():
    assert cli.share_out(128, Ranks(3, 8)) == 16
    with pytest.raises(UserError, match="the recipe's 128 images a step are not 3 equal parts; give --batch-size"):
        cli.share_out(128, Ranks(0, 3))


def test_a_net_that_there_is_not_is_one_sentence(tiny, run_dir):
    result = run(tiny.root, run_dir, "--model", "alexnot")
    assert result.exit_code == 1 and "alexnot: there is no net of this name; choose one of" in result.output


def test_what_a_recipe_says_of_biases_is_for_alexnets_alone(tiny, run_dir):
    options = "--recipe fast --model alexnet-owt --epochs 1 --warmup-epochs 0 --limit-batches 1 --crop-size 96".split()
    result = run(tiny.root, run_dir, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((run_dir / "recipe.json").read_text())["bias"] is None
    result = run(tiny.root, run_dir / "other", *options, "--bias", "0.1")
    assert result.exit_code == 1 and "bias is not for this net" in result.output


def test_a_recipe_fills_what_is_not_given(tiny, run_dir):
    """recipe.json is what was trained with; the code's, with the colors' end and conv1's in reach."""
    options = "--recipe code --epochs 3 --pca-jitter-epochs 1 --first-layer-epochs 1,2 --limit-batches 1".split()
    result = run(tiny.root, run_dir, *options)
    assert result.exit_code == 0, result.output
    written = json.loads((run_dir / "recipe.json").read_text())
    mine = {"recipe": "code", "model": "alexnet-code", "bias_lr": 0.02, "pixel_divisor": 1.1, "schedule": "25,51,79"}
    mine |= {
        "mean": "image",
        "epochs": 3,
        "lr": 0.001,
        "pca_jitter_epochs": 1,
        "momentum": 0.9,
        "batch_size": 8,
        "ranks": 1,
        "images_a_step": 8,
    }
    # What a None in the recipe stands for, and what no option says.
    mine |= {"bias": 1.0, "dropout": 0.5, "cache_device": False, "precision": "float32"}
    assert written.items() >= mine.items() and written["dataset"] == tiny.fingerprint[:16]
    assert written.keys() >= {field.name for field in dataclasses.fields(Recipe)}
    state = load_latest(run_dir)
    rates = sorted((group["bias"], group["first"], group["lr"]) for group in state["optimizer"]["param_groups"])
    assert rates == [(False, False, 0.001), (False, True, 0.0), (True, False, 0.02), (True, True, 0.0)]


def test_a_run_goes_on_bitwise_beyond_the_end_of_the_colors(tiny, tmp_path, run_dir):
    """In a smooth schedule, cut by SIGTERM's way out in the second of two epochs; colors and divisor end with the first."""
    options = "--schedule cosine --warmup-epochs 0.5 --pca-jitter-epochs 1 --pixel-divisor 1.1 --epochs 2 --limit-batches 2"
    assert run(tiny.root, run_dir, *options.split(), "--checkpoint-every", "0", "--keep", "4").exit_code == 0
    assert [int(path.stem[-8:]) for path in newest_first(run_dir)] == [4, 3, 2, 1]
    whole = load_latest(run_dir)
    for path in newest_first(run_dir)[:2]:
        path.unlink()
    (run_dir / "summary.json").unlink()
    result = run(tiny.root, run_dir, *options.split())
    assert result.exit_code == 0 and "goes on after step 2" in result.output
    again = load_latest(run_dir)
    assert same(whole["model"], again["model"]) and same(whole["optimizer"], again["optimizer"])
    more = run(tiny.root, run_dir, *options.split(), "--epochs", "3")
    assert more.exit_code == 1 and "made with --epochs 2, this call has 3" in more.output


def test_several_checkpoints_are_averaged_and_their_predictions_written(tiny, finished, run_dir, tmp_path):
    """Of two nets for crops of two sizes, against each one's own predictions."""
    assert run(tiny.root, run_dir, *QUICKEST, "--crop-size", "96", "--seed", "1").exit_code == 0
    tables = []
    for name, folders in (("a", [finished[0]]), ("b", [run_dir]), ("both", [finished[0], run_dir])):
        call = ["--evaluate", *map(str, folders), "--predictions", str(tmp_path / f"{name}.npz"), "--device", "cpu"]
        result = CliRunner().invoke(train.main, [str(tiny.root), *call])
        assert result.exit_code == 0, result.output
        tables.append(np.load(tmp_path / f"{name}.npz"))
    probabilities = []
    for table in tables:
        assert table["ids"].tolist() == list(range(23)) and (table["labels"] == np.arange(23) % 3).all()
        assert (np.diff(table["probabilities"]) <= 0).all()
        probabilities.append(np.take_along_axis(table["probabilities"], table["classes"].argsort(1), 1))
    np.testing.assert_allclose(probabilities[2], (probabilities[0] + probabilities[1]) / 2, atol=1e-6)
    wrong = 100 * (tables[2]["classes"][:, 0] != tables[2]["labels"]).mean()
    assert re.search(rf"ten views, 23 images +│ +{wrong:.2f} %", result.output)
    call[call.index("--predictions") + 1] = str(tmp_path / "both.csv")
    assert CliRunner().invoke(train.main, [str(tiny.root), *call]).exit_code == 0
    lines = (tmp_path / "both.csv").read_text().splitlines()
    assert lines[0] == "id,label,class1,class2,class3,probability1,probability2,probability3" and len(lines) == 24
    assert [int(cell) for cell in lines[5].split(",")[:3]] == [4, 1, tables[2]["classes"][4, 0]]


def test_checkpoints_and_predictions_without_evaluate_are_wrong_calls(tiny, run_dir, tmp_path):
    assert run(tiny.root, run_dir, str(tmp_path)).exit_code == 2
    assert run(tiny.root, run_dir, "--predictions", "a.csv").exit_code == 2
    result = run(tiny.root, run_dir, "--evaluate", str(tmp_path), "--predictions", "a.txt")
    assert result.exit_code == 2 and "a name that ends in .csv or .npz" in result.output


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_tensorboard_that_is_not_installed_is_one_sentence(tiny, run_dir):
    result = run(tiny.root, run_dir, *QUICKEST, "--tensorboard")
    assert result.exit_code == 1 and result.output.splitlines()[-1].endswith("pip install 'imagefeed[tensorboard]'")


def test_a_loss_that_stays_at_guessing_is_warned_of_once(tiny, run_dir, monkeypatch):
    """Updates too small to change anything; nine steps stand for five hundred."""
    monkeypatch.setattr(reporting, "STUCK_STEPS", 9)
    result = run(tiny.root, run_dir, "--lr", "1e-12", "--bias", "0", "--epochs", "4", "--limit-batches", "5")
    assert result.exit_code == 0 and result.output.count("warning: loss stuck at ln(classes): 1.09") == 1
    assert "lower --bias" in result.output


def test_weights_of_other_classes_are_fine_tuned(tiny, tmp_path, run_dir):
    """All but the last layer; a run that is gone on with remembers where it began."""
    torch.manual_seed(9)
    theirs = AlexNet(num_classes=7, crop_size=64).state_dict()
    torch.save(theirs, tmp_path / "seven.pt")
    options = ("--limit-batches", "1", "--epochs", "1", "--lr", "1e-9")
    result = run(tiny.root, run_dir, "--weights", str(tmp_path / "seven.pt"), *options)
    assert result.exit_code == 0, result.output
    assert "all but the last layer, which begins anew" in result.output
    assert json.loads((run_dir / "recipe.json").read_text())["weights"] == str(tmp_path / "seven.pt")
    mine = load_latest(run_dir)["model"]
    last = list(theirs)[-2:]
    assert [mine[name].shape[0] for name in last] == [3, 3]
    for name in set(theirs) - set(last):
        assert torch.allclose(mine[name], theirs[name], atol=1e-6)
    as_before = recipe(limit_batches=1, lr=1e-9)
    again = open_run(tiny, as_before, run_dir, torch.device("cpu"), Ranks())
    assert again.at.step == 1 and again.made_with["--weights"] == str(tmp_path / "seven.pt")
    (tmp_path / "seven.pt").rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match="was made with --weights .*; use the same, or another --run-dir"):
        open_run(tiny, as_before, run_dir, torch.device("cpu"), Ranks(), weights=tmp_path / "other.pt")


def test_a_run_begins_with_all_weights_of_one_of_as_many_classes(finished, tiny, run_dir, capsys):
    folder, _ = finished
    begun = open_run(tiny, recipe(), run_dir, torch.device("cpu"), Ranks(), weights=folder)
    assert "all its weights" in capsys.readouterr().out and begun.at.step == 0
    assert same(dict(begun.model.state_dict()), dict(load_latest(folder)["model"]))
    with pytest.raises(UserError, match="was made with --weights none"):
        open_run(tiny, recipe(), folder, torch.device("cpu"), Ranks(), weights=folder)


def test_weights_that_are_none_are_refused(tiny, tmp_path, run_dir):
    net = AlexNet(num_classes=3, crop_size=64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name, what, said in (
        ("text.pt", None, "holds no weights; give a checkpoint of train.py, or a file of torch.save"),
        ("number.pt", {"epoch": 3}, "holds no weights; give a checkpoint of train.py, or a file of torch.save"),
        ("other.pt", torch.nn.Linear(3, 3).state_dict(), "these are the weights of another net"),
    ):
        path = tmp_path / name
        path.write_text("weights") if what is None else torch.save(what, path)
        with pytest.raises(UserError, match=re.escape(f"{path}: {said}")):
            begin_with(net, path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="there is no checkpoint in this folder"):
        begin_with(net, empty)
    assert same(dict(net.state_dict()), before)
    both = run(tiny.root, run_dir, "--weights", str(empty), "--evaluate", str(empty))
    assert both.exit_code == 2 and "it goes with neither --evaluate nor --export" in both.stderr
