"""The results of a run."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from imagefeed.dataset.manifest import Manifest, Shard, Split
from imagefeed.training import summary
from imagefeed.training.inputs import Inputs
from imagefeed.training.recipes import Recipe
from imagefeed.training.resume import Progress
from imagefeed.training.summary import draw_curves, published, read_summary, show_errors, show_summary, write_summary
from tests.training.runs import CPU
from tests.training.test_reporting import LINE

TEN = {"top1_error": 40.66, "top5_error": 18.21, "loss": 1.7, "records": 50_000}
IMAGENET = tuple(f"n{number:08d}" for number in range(1000))


def rows(shown: str) -> list[list[str]]:
    """The cells of the tables that rich has drawn."""
    return [[cell.strip() for cell in row.split("│")[1:-1]] for row in shown.splitlines() if row.startswith("│")]


@pytest.fixture(autouse=True)
def made_up_names(monkeypatch):
    """ImageNet's own are not here; whether the constant is theirs, another test asks where they are."""
    names = hashlib.sha256("\n".join(IMAGENET).encode()).hexdigest()
    monkeypatch.setattr(summary, "CLASSES_SHA256", names)


def manifest(root, classes=IMAGENET, validation=50_000) -> Manifest:
    shards = Shard("val-00000-of-00001.tfrecord", validation, 1, "")
    counts = (validation, *(len(classes) - 1) * (0,))
    return Manifest(root, classes, {"train": Split((), counts), "val": Split((shards,), counts)}, {}, {})


def write_lines(run_dir, rates: list[int], errors: dict[str, float] = TEN) -> None:
    lines = [LINE | {"step": n, "throughput/samples_per_sec": rate} for n, rate in enumerate(rates, 1)]
    lines[-1] |= {f"metrics/val/{name}": value for name, value in errors.items()}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_summary_has_the_median_and_the_slowest_twentieth_of_the_rates(tmp_path, capsys):
    """Of 101 rates 100, 101 .. 200 five are below 105; the table stands beside what the paper and others have."""
    write_lines(tmp_path, [100 + 37 * n % 101 for n in range(101)])
    progress = Progress(step=101, epochs=1, seconds=3600.0)
    written = write_summary(tmp_path, Recipe(), Inputs(manifest(tmp_path), CPU), progress, TEN)
    assert (written.samples_per_sec, written.samples_per_sec_p5) == (150, 105)
    assert (written.mfu, written.data_wait_pct) == (0.41, 3.2)
    found = read_summary(tmp_path)
    assert vars(found).keys() == vars(written).keys() and found.errors["ten views"] == TEN
    show_summary(found)
    shown = capsys.readouterr().out
    assert shown.startswith(f"alexnet on {tmp_path} after 1 epoch, trained on split train, validated on val\n")
    assert rows(shown) == [
        ["center crop, 50,000 images", "40.66 %", "18.21 %"],
        ["ten views, 50,000 images", "40.66 %", "18.21 %"],
        ["the paper, ten views", "40.7 %", "18.2 %"],
        ["AlexNets of others, center crop", "42.3-42.9 %", "19.6-19.8 %"],
        ["guessing", "99.90 %", "99.50 %"],
        ["images/s, median", "150"],
        ["images/s, slowest 5 %", "105"],
        ["time waiting for data", "3.2 %"],
        ["arithmetic used (MFU)", "41.0 %"],
    ]
    assert shown.splitlines()[-1].startswith("1 epoch in 1 h 0 min, 150 images/s, 3.2 % waiting for data, center crop:")


def test_a_run_without_measurements_has_a_summary(tmp_path, capsys):
    """No line of metrics at all, or lines of a version without MFU."""
    progress = Progress()
    written = write_summary(tmp_path, Recipe(), Inputs(manifest(tmp_path), CPU), progress, {})
    assert {written.samples_per_sec, written.samples_per_sec_p5, written.data_wait_pct, written.mfu} == {None}
    show_summary(written)
    write_lines(tmp_path, [100, 100])
    text = (tmp_path / "metrics.jsonl").read_text().replace('"throughput/device/mfu": 0.41, ', "")
    (tmp_path / "metrics.jsonl").write_text(text)
    written = write_summary(tmp_path, Recipe(), Inputs(manifest(tmp_path), CPU), progress, TEN)
    assert written.mfu is None and written.samples_per_sec == 100
    show_summary(written)
    assert "MFU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({}, IMAGENET[:999]),
        ({}, tuple(map(str, range(1000)))),
        ({"model": "alexnet-one-gpu"}, IMAGENET),
        ({"lrn": False}, IMAGENET),
        ({"overlapping": False}, IMAGENET),
    ],
)
def test_only_the_papers_net_on_its_classes_stands_beside_the_paper(tmp_path, changes, classes):
    def others(recipe, classes):
        return published(manifest(tmp_path, classes), recipe, "val")

    assert others(Recipe(), IMAGENET) and others(Recipe(model="alexnet-code"), IMAGENET)
    assert others(dataclasses.replace(Recipe(), **changes), classes) == {}
    assert published(manifest(tmp_path, validation=49_999), Recipe(), "val") == {}


def test_the_classes_of_2012_are_known():
    folder = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip("there are no ImageNet images beside the project")
    names = sorted(path.name for path in folder.iterdir())
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith("385e0240499426c0")


@pytest.mark.parametrize("data", [b"", b"\xff\x00", b"null", b"5", b"{}", b'{"step": 12}'])
def test_a_corrupt_summary_is_ignored(tmp_path, data):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_bytes(data)
    assert read_summary(tmp_path) is None


def test_errors_stand_beside_those_of_guessing(capsys):
    show_errors({"ten views": TEN}, classes=1000)
    assert rows(capsys.readouterr().out) == [
        ["ten views, 50,000 images", "40.66 %", "18.21 %"],
        ["guessing", "99.90 %", "99.50 %"],
    ]


def test_of_five_classes_or_fewer_no_top_5_error_is_shown(tmp_path, capsys):
    """It is 0 % whatever a net says."""
    few = {name: value for name, value in TEN.items() if name != "top5_error"}
    write_lines(tmp_path, [100], few)
    show_summary(write_summary(tmp_path, Recipe(), Inputs(manifest(tmp_path, IMAGENET[:5]), CPU), Progress(step=1), few))
    shown = capsys.readouterr().out
    assert rows(shown)[:3] == [
        ["center crop, 50,000 images", "40.66 %"],
        ["ten views, 50,000 images", "40.66 %"],
        ["guessing", "80.00 %"],
    ]
    assert "top-5" not in shown and "ten views: top-1 error 40.7 %" in shown.splitlines()[-1]


@pytest.mark.parametrize("validation", [True, False])
def test_curves_are_a_picture_with_and_without_a_validation_split(tmp_path, validation):
    lines = [LINE | {"step": step, "epoch": step / 20, "lr": 0.01 if step < 60 else 0.001} for step in range(20, 120, 20)]
    if validation:
        lines[-1] |= {"metrics/val/top1_error": 40.0, "metrics/val/top5_error": 18.0, "metrics/val/loss": 2.0}
    draw_curves(tmp_path / "curves.png", "AlexNet on something", lines, classes=10)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480) and len(image.convert("L").getcolors()) > 20


def test_curves_are_written_whole_and_a_name_with_dollars_is_no_formula(tmp_path):
    """Matplotlib refuses `$\\frac$` as a formula; a folder in the place of the picture stands for a write that fails."""
    (tmp_path / "whole").mkdir()
    draw_curves(tmp_path / "whole" / "curves.png", r"AlexNet on $\frac$", [LINE], classes=10)
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["curves.png"]
    (tmp_path / "failed" / "curves.png").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        draw_curves(tmp_path / "failed" / "curves.png", "AlexNet", [LINE], classes=10)
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["curves.png"]
