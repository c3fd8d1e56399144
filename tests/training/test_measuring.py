"""Errors of checkpoints."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from imagefeed.dataset.manifest import Manifest
from imagefeed.model.alexnet import AlexNet
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.training.checkpoints import load_latest, newest_first, save_checkpoint
from imagefeed.training.evaluation import Member, evaluate
from imagefeed.training.inputs import Preprocessing
from imagefeed.training.measuring import write_predictions
from imagefeed.training.parallel import Ranks
from tests.conftest import CLASSES, jpeg, pack, picture
from tests.training.runs import ONE_STEP, call, run

CPU = ("--device", "cpu", "--threads", "1")


def check_errors(output: str, errors: dict[str, dict[str, float]]) -> None:
    for views in ("center crop", "ten views"):
        assert re.search(rf"{views}, 23 images +│ +{errors[views]['top1_error']:.2f} %", output)


@pytest.fixture(scope="module")
def measured(finished, owt, tiny, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of predictions and pictures of two nets for crops of two sizes, and of both, with what was printed."""
    folder = tmp_path_factory.mktemp("measured")
    outputs = []
    for checkpoints, options in (
        ([finished[0]], ["--predictions", folder / "a.npz", "--pictures", folder / "new" / "pictures"]),
        (newest_first(owt[0])[:1], ["--predictions", folder / "b.npz"]),
        ([finished[0], owt[0]], ["--predictions", folder / "both.csv"]),
    ):
        result = call(tiny.root, *CPU, "--evaluate", *checkpoints, *options)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    return folder, outputs


def test_evaluate_repeats_the_errors_of_the_run(finished, owt, measured):
    """For a run folder and for a file, with the crops, mean and standard deviation of training."""
    for (folder, _), output in zip((finished, owt), measured[1], strict=False):
        check_errors(output, json.loads((folder / "summary.json").read_text())["errors"])


def test_evaluate_draws_the_pictures_that_the_run_drew(finished, measured):
    for name in ("filters.png", "guesses.png", "nearest.png"):
        assert (measured[0] / "new" / "pictures" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_predictions_of_several_checkpoints_are_averaged(measured):
    folder, outputs = measured
    probabilities = []
    for name in ("a", "b"):
        table = np.load(folder / f"{name}.npz")
        assert table["ids"].tolist() == list(range(23)) and (table["labels"] == np.arange(23) % 3).all()
        assert (np.diff(table["probabilities"]) <= 0).all() and table["names"].tolist() == list(CLASSES)
        assert table["files"].tolist() == [f"{n}.jpg" for n in range(23)]
        probabilities.append(np.take_along_axis(table["probabilities"], table["classes"].argsort(1), 1))
    head, *lines = csv.reader((folder / "both.csv").read_text().splitlines())
    assert ",".join(head[:8]) == "id,label,class1,class2,class3,probability1,probability2,probability3" and len(lines) == 23
    assert ",".join(head[8:]) == "file,class,predicted,predicted2,predicted3"
    for line in lines:
        assert line[8:] == [f"{line[0]}.jpg", *(CLASSES[int(number)] for number in line[1:5])]
    both = np.array([[float(cell) for cell in line[:8]] for line in lines])
    ids, labels, classes = both[:, 0].astype(int), both[:, 1].astype(int), both[:, 2:5].astype(int)
    assert ids.tolist() == list(range(23)) and (labels == ids % 3).all() and (np.diff(both[:, 5:]) <= 0).all()
    averaged = np.take_along_axis(both[:, 5:], classes.argsort(1), 1)
    np.testing.assert_allclose(averaged, (probabilities[0] + probabilities[1]) / 2, atol=2e-6)
    wrong = 100 * (classes[:, 0] != labels).mean()
    assert re.search(rf"ten views, 23 images +│ +{wrong:.2f} %", outputs[2])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Manifest:
    """Splits to evaluate on alone: `val`, and `test` without labels, in more than one shard."""
    jpegs = [jpeg(picture(seed)) for seed in range(100, 105)]
    return pack(tmp_path_factory.mktemp("alone") / "data", {"test": jpegs, "val": jpegs}, unlabeled="test")


def test_a_dataset_of_evaluation_splits_alone_is_measured_and_not_trained_on(finished, alone, tmp_path):
    result = call(alone.root, *CPU, "--evaluate", finished[0], "--pictures", tmp_path)
    assert result.exit_code == 0, result.output
    assert f", on split val of {alone.root}\n" in result.output and "5 images" in result.output
    assert "has changed; normalizing by the latter's statistics" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filters.png", "guesses.png"]
    result = run(alone.root, tmp_path / "run")
    assert result.exit_code == 1 and result.output.splitlines()[-1] == (
        f"Error: {alone.root}: no split to train on, only test, val, which are only for --evaluate; build the dataset with a "
        "training split, or with --train-split test to train on that one"
    )
    assert not (tmp_path / "run").exists()


def test_a_split_without_labels_is_predicted_by_name(finished, alone, tmp_path):
    file = tmp_path / "test.csv"
    result = call(alone.root, *CPU, "--evaluate", finished[0], "--split", "test", "--predictions", file, "--pictures", tmp_path)
    assert result.exit_code == 0, result.output
    assert "5 images of test without labels not counted" in result.output and "top-1" not in result.output
    assert not (tmp_path / "guesses.png").exists()
    lines = list(csv.DictReader(file.read_text().splitlines()))
    assert [(line["file"], line["label"], line["class"]) for line in lines] == [(f"{n}.jpg", "-1", "") for n in range(5)]
    assert all(line["predicted"] == CLASSES[int(line["class1"])] for line in lines)
    for options, said in (
        (["--split", "test"], "the images of split test have no labels to measure errors; give --predictions FILE"),
        (["--split", "tset"], "no split named 'tset'; it has test, val"),
    ):
        result = call(alone.root, *CPU, "--evaluate", finished[0], *options)
        assert result.exit_code == 1 and said in result.output.splitlines()[-1]


def test_predictions_keep_file_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xe9, 1.jpg")
    columns = np.array([0]), np.array([1]), np.array([[1, 0]]), np.array([[0.75, 0.25]])
    write_predictions(tmp_path / "a.csv", [name], ["ant", "b,e"], *columns)
    assert (tmp_path / "a.csv").read_bytes().splitlines()[1] == b'0,1,1,0,0.75,0.25,"\xe9, 1.jpg","b,e","b,e",ant'


def test_a_net_without_normalization_and_overlap_is_measured_as_it_was_trained(tiny, run_dir):
    """On resized and jittered crops too."""
    options = "--model alexnet-one-gpu --no-lrn --no-overlapping --random-resized-crop --color-jitter 0.4,0.4,0.4,0.1".split()
    result = run(tiny.root, run_dir, *ONE_STEP, *options)
    assert result.exit_code == 0, result.output
    assert "alexnet-one-gpu: 8 images a step" in result.output
    output = run(tiny.root, run_dir, "--evaluate", run_dir).output
    check_errors(output, json.loads((run_dir / "summary.json").read_text())["errors"])


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("classes", 4, "the checkpoint has 4 classes, this dataset 3;"),
        ("class names", "0123456789abcdef", "the checkpoint has as many classes as this dataset, but of other names;"),
    ],
)
def test_evaluate_refuses_other_classes(finished, tiny, run_dir, name, value, said):
    run_dir.mkdir()
    state = load_latest(finished[0])
    state["made_with"] |= {"dataset": "another", name: value}
    save_checkpoint(run_dir, 1, {key: state[key] for key in ("made_with", "progress", "model")})
    result = run(tiny.root, run_dir, "--evaluate", run_dir)
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert said in last
    assert last.endswith("; measure it on a dataset with the same classes")


def test_evaluation_counts_each_record_once_and_averages_probabilities(tiny):
    """Against numpy over one record at a time; 23 records in batches of 5 leave two places empty."""
    torch.manual_seed(0)
    model = AlexNet(num_classes=12, crop_size=64).eval()
    torch.nn.init.normal_(model.fc8.weight, std=0.5)
    shown = Preprocessing(64)
    for views in ("center", "ten"):
        with ImageLoader(tiny, "val", 5, views=views, crop_size=64) as loader:
            found = evaluate([Member(model, "float32", shown)], {shown: loader}, Ranks())
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
        assert found["top5_error"] == pytest.approx(100 - 100 * top5 / 23)  # of twelve classes
        assert found["loss"] == pytest.approx(loss / 23, rel=1e-4)
