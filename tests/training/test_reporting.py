import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from imagefeed.training.reporting import Meter, Metrics, Reading, StuckLoss, describe, load_hook, read_metrics

LINE = {
    "epoch": 0.5,
    "loss/train": 2.25,
    "lr": 0.01,
    "throughput/samples_per_sec": 1234.5,
    "throughput/device/mfu": 0.41,
    "time/data_wait_pct": 3.2,
}


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


@pytest.mark.parametrize("complete, kept", [(True, [20, 40]), (False, [20])])
def test_resuming_drops_lines_written_after_the_checkpoint(tmp_path, complete, kept):
    """A checkpoint of step 40 knows whether the line of step 40 was written before it or is still to come."""
    (tmp_path / "metrics.jsonl").write_text(lines(20, 40, 60))
    with Metrics(tmp_path, 40, complete) as metrics:
        metrics.write({"step": 41})
    assert [line["step"] for line in read_metrics(tmp_path)] == [*kept, 41]


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(20, 40) + '{"step": 6')
    with Metrics(tmp_path, 60, True) as metrics:
        metrics.write({"step": 80})
    assert (tmp_path / "metrics.jsonl").read_text() == lines(20, 40, 80)


@pytest.mark.parametrize(
    "last", [b"null", b"5", b"{}", b'{"step": "a"}', b'{"step": 50, "lr": NaN}', b'{"step": 50, "lr": "\xff"}', b"[[1]]"]
)
def test_reading_ends_at_a_malformed_line(tmp_path, last):
    (tmp_path / "metrics.jsonl").write_bytes(lines(20, 40).encode() + last + b"\n")
    with Metrics(tmp_path, 60, True) as metrics:
        metrics.write({"step": 80})
    assert (tmp_path / "metrics.jsonl").read_text() == lines(20, 40, 80)


def test_nan_is_not_written(tmp_path):
    with Metrics(tmp_path, 0, True) as metrics, pytest.raises(ValueError):
        metrics.write({"step": 20, "loss/train": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_new_run_begins_with_no_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(20))
    with Metrics(tmp_path, 0, True):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with Metrics(tmp_path, 0, True) as metrics:
        metrics.write({"step": 20})
        assert read_metrics(tmp_path) == [{"step": 20}]


def test_the_meter_counts_the_steps_since_its_restart():
    meter = Meter(torch.device("cpu"), batch_size=4, ideal_rate=1e9)
    assert meter.interval()() == {}
    assert [meter.fetch(iter("ab")) for _ in range(3)] == ["a"] * 3
    interval = meter.interval()
    read = interval()
    assert read["throughput/samples_per_sec"] > 0 and 0 < read["time/data_wait_pct"] <= 100
    assert read["throughput/device/mfu"] == read["throughput/samples_per_sec"] / 1e9
    meter.restart()
    assert meter.interval()() == {} and interval() == read  # which may be read later


def test_a_number_is_that_of_the_moment_it_was_taken():
    total = torch.tensor(0.1)
    reading = Reading(total)
    total.zero_()
    assert reading.value() == torch.tensor(0.1).item()


def test_a_loss_at_guessing_is_noticed_once_even_if_the_run_is_resumed():
    """ln 1000 is 6.908; within a hundredth of it for 500 steps, of which the first 100 do not count."""
    lines = [{"step": step, "loss/train": 6.9} for step in range(0, 2000, 20)]
    stuck = StuckLoss(1000, after=100)
    warnings = {line["step"]: stuck.check(line) for line in lines}
    assert [step for step, warning in warnings.items() if warning] == [600]
    assert "6.900 for 500 steps, as by guessing (6.908)" in warnings[600]
    resumed = StuckLoss(1000, after=100)
    assert [line["step"] for line in lines[:20] if resumed.check(line)] == []
    assert [line["step"] for line in lines[20:] if resumed.check(line)] == [600]


@pytest.mark.parametrize("losses", [[6.9] * 20 + [6.8], [7.0, 6.9, 6.7], [7.2]])
def test_a_loss_that_moves_is_not_noticed(losses):
    stuck = StuckLoss(1000, after=100)
    steps = itertools.count(0, 20)
    assert not any(stuck.check({"step": next(steps), "loss/train": loss}) for loss in losses * 50)


def test_tensorboard_gets_the_same_names(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ([20, 40], [40]):  # the second time the first line of step 40 does not count
        with Metrics(tmp_path, steps[0], False, tensorboard=True) as metrics:
            for step in steps:
                metrics.write(LINE | {"step": step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(LINE)
    assert [event.step for event in events.Scalars("loss/train")] == [20, 40]


def test_a_line_in_words():
    assert describe(LINE, 90) == "epoch 0.50 of 90, loss 2.250, lr 0.01, 1,234 images/s, 3 % waiting for data"
    ended = LINE | {"metrics/val/top1_error": 40.66, "metrics/val/top5_error": 18.21}
    assert "loss 2.250, validation error top-1 40.7 %, top-5 18.2 %, lr 0.01" in describe(ended, 90)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_hooks_of_the_docs_run_as_they_stand(tmp_path, monkeypatch, name):
    """With a stand-in for the package, which notes what it gets."""
    (tmp_path / name).with_suffix(".py").write_text(
        "import sys\nself, got = sys.modules[__name__], []\ndef note(*a, **k): got.append((a, k)); return self\n"
        "init = log = start_run = log_params = log_metrics = note\n"
    )
    recipes = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    code = next(part for part in re.findall(r"\n((?:    .*\n|\n)+)", recipes) if f", {name}\n" in part)
    (tmp_path / f"hooks_{name}.py").write_text("\n".join(line[4:] for line in code.splitlines()))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "recipe.json").write_text('{"lr": 0.01}')
    monkeypatch.chdir(tmp_path)
    log = load_hook(f"hooks_{name}:log")
    monkeypatch.syspath_prepend(tmp_path)
    for step in (20, 40):
        log(LINE | {"step": step})
    got = sys.modules[name].got
    assert got[-2:] == [((LINE | {"step": step},), {"step": step}) for step in (20, 40)]
    assert {"lr": 0.01} in [value for arguments, options in got[:-2] for value in (*arguments, *options.values())]
