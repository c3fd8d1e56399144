"""Training runs from start to end."""

import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from imagefeed.model.alexnet import AlexNet
from imagefeed.model.step import train_step
from imagefeed.training import loop, reporting
from imagefeed.training.checkpoints import load_latest, newest_first
from imagefeed.training.recipes import make_optimizer
from imagefeed.training.resume import Progress
from tests.conftest import picture
from tests.training.conftest import OWT
from tests.training.runs import metrics, recipe, run, same, start, wait_for


def test_a_run_leaves_metrics_summary_curves_and_a_checkpoint(finished):
    folder, output = finished
    first, last = metrics(folder)
    assert (first["step"], first["epoch"], last["step"], last["epoch"]) == (6, 1.0, 12, 2.0)
    for line in (first, last):
        assert line["loss/train"] > 0 and line["lr"] == 0.001 and line["throughput/samples_per_sec"] > 0
        assert 0 <= line["time/data_wait_pct"] <= 100 and line["data/corrupt"] == 0
        assert line["metrics/val/records"] == 23 and "metrics/val/top5_error" not in line  # of three classes
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["step"], summary["epochs"], summary["classes"]) == (12, 2, 3)
    assert summary["errors"]["center crop"]["top1_error"] == last["metrics/val/top1_error"]
    assert last["metrics/val/top1"] + last["metrics/val/top1_error"] == pytest.approx(100)
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
    assert again.exit_code == 0 and f"{folder}: this run is over; to train longer, give more --epochs" in again.output
    assert again.output.splitlines()[-1] == output.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_killed_run_resumes_to_the_same_weights_to_the_bit(finished, tiny, run_dir):
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
    measured = ("throughput/samples_per_sec", "throughput/device/mfu", "time/data_wait_pct", "time/elapsed_s", "timestamp")
    without = [[{k: v for k, v in line.items() if k not in measured} for line in metrics(f)] for f in (finished[0], run_dir)]
    assert without[0] == without[1]
    first, last = metrics(run_dir)
    assert 0 < first["time/elapsed_s"] < last["time/elapsed_s"] < here["progress"]["seconds"] + 0.01
    assert first["timestamp"] < last["timestamp"] <= time.time()


def test_an_augmented_run_resumes_to_the_bit_after_the_end_of_color_jitter(tiny, run_dir):
    """In a smooth schedule, cut in the second of two epochs; jitter and divisor end with the first."""
    options = "--schedule cosine --warmup-epochs 0.5 --pca-jitter-epochs 1 --pixel-divisor 1.1 --epochs 2 --limit-batches 2"
    options += " --auto-augment rand --random-erasing 0.25 --mixup 0.2 --cutmix 1"
    assert run(tiny.root, run_dir, *options.split(), "--checkpoint-every", "0", "--keep", "4").exit_code == 0
    assert [int(path.stem[-8:]) for path in newest_first(run_dir)] == [4, 3, 2, 1]
    whole = load_latest(run_dir)
    for path in newest_first(run_dir)[:2]:
        path.unlink()
    (run_dir / "summary.json").unlink()
    result = run(tiny.root, run_dir, *options.split())
    assert result.exit_code == 0 and "resuming after step 2" in result.output
    again = load_latest(run_dir)
    assert same(whole["model"], again["model"]) and same(whole["optimizer"], again["optimizer"])
    more = run(tiny.root, run_dir, *options.split(), "--epochs", "3")
    assert more.exit_code == 1 and "made with --epochs 2, this call has --epochs 3" in more.output


def test_a_cache_changes_no_loss(finished, tiny, run_dir):
    assert run(tiny.root, run_dir, "--cache", "host", "--cache-bytes", "5M").exit_code == 0
    losses = [[line["loss/train"] for line in metrics(folder)] for folder in (finished[0], run_dir)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


class LateTrainer(loop.Trainer):
    """Writes lines late, as on a GPU."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.writes_late = True


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(loop, "Trainer", LateTrainer)


def untimed(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if not name.startswith(("time", "throughput"))} for line in lines]


def test_lines_that_are_written_late_are_the_same(tiny, run_dir, tmp_path, late, monkeypatch):
    assert run(tiny.root, run_dir, "--epochs", "1").exit_code == 0
    monkeypatch.setattr(loop, "Trainer", LateTrainer.__base__)
    assert run(tiny.root, tmp_path / "at once", "--epochs", "1").exit_code == 0
    found, wanted = metrics(run_dir), metrics(tmp_path / "at once")
    assert untimed(found) == untimed(wanted) and [line["step"] for line in found] == [2, 4, 6]
    assert all(0 < line["throughput/samples_per_sec"] and 0 <= line["time/data_wait_pct"] <= 100 for line in found)
    elapsed = [line["time/elapsed_s"] for line in found]
    assert elapsed == sorted(elapsed) and "metrics/val/top1" in found[-1]


def test_a_late_line_is_written_before_a_checkpoint_and_once_in_a_run_that_goes_on(tiny, run_dir, late, monkeypatch):
    """The function fails with the line of step 2 when step 4 is over; then with that of step 10, before its checkpoint."""
    monkeypatch.syspath_prepend(run_dir.parent)
    (run_dir.parent / "hook_of_late.py").write_text(
        "lines = []\n\ndef log(line):\n    lines.append(line)\n    if len(lines) in (1, 5):\n        raise OSError\n"
    )
    options = ["--on-metrics", "hook_of_late:log"]
    first = run(tiny.root, run_dir, *options)
    assert first.exit_code == 1 and "step 2: --on-metrics raised OSError()" in first.output
    second = run(tiny.root, run_dir, "--checkpoint-every", "0", *options)
    assert second.exit_code == 1 and "resuming after step 4" in second.output and "step 10: --on-metrics" in second.output
    last = run(tiny.root, run_dir, *options)
    assert last.exit_code == 0 and "resuming after step 10" in last.output
    assert [line["step"] for line in metrics(run_dir)] == [2, 4, 6, 8, 10, 12]
    assert sys.modules["hook_of_late"].lines == metrics(run_dir)


def test_a_function_that_takes_its_time_over_a_late_line_slows_no_step(tiny, run_dir, late, monkeypatch):
    """It gets the line of step 2 when step 4 is over. All other time between the two lines is that of steps 3 and 4."""
    monkeypatch.syspath_prepend(run_dir.parent)
    (run_dir.parent / "slow_hook.py").write_text("import time\n\ndef log(line):\n    time.sleep(1 if line['step'] == 2 else 0)\n")
    assert run(tiny.root, run_dir, "--epochs", "1", "--on-metrics", "slow_hook:log").exit_code == 0
    first, second, _ = metrics(run_dir)
    steps_s = 2 * 8 / second["throughput/samples_per_sec"]
    assert second["time/elapsed_s"] - first["time/elapsed_s"] - steps_s > 0.9


def test_another_net_trains_with_its_own_crops_and_images(owt, tiny):
    assert f"{OWT[OWT.index('--model') + 1]}: 8 images a step" in owt[1] and f"{tiny.root}: trains on 50 records" in owt[1]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tiny, run_dir):
    result = run(tiny.root, run_dir, "--lr", "1e9", "--checkpoint-every", "0")
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert "the loss is" in last and "start over with a lower --lr and another --run-dir" in last
    state = load_latest(run_dir)
    assert state is None or np.isfinite(state["loss_sum"])


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(tiny, unvalidated, run_dir):
    """The loss of the only step is that before it: validation shows it, or, without a validation split, the weights."""
    options = "--lr 1e30 --epochs 1 --limit-batches 1 --lr-milestones 9".split()
    result = run(tiny.root, run_dir, *options)
    assert result.exit_code == 1 and "the validation loss is nan; start over" in result.output.splitlines()[-1]
    assert newest_first(run_dir) == [] and metrics(run_dir) == []
    options[1] = "1e300"
    result = run(unvalidated.root, run_dir, *options)
    assert result.exit_code == 1 and "the sum of the weights is" in result.output.splitlines()[-1]
    assert newest_first(run_dir) == []


def test_a_loss_that_stays_at_guessing_is_warned_of_once(unvalidated, run_dir, monkeypatch):
    """Updates too small to change anything; nine steps stand for five hundred."""
    monkeypatch.setattr(reporting, "STUCK_STEPS", 9)
    result = run(unvalidated.root, run_dir, *"--lr 1e-12 --bias 0 --epochs 10 --lr-milestones 99".split())
    assert result.exit_code == 0 and result.output.count("warning: loss stuck at ln(classes): 1.09") == 1
    assert "lower --bias" in result.output


def test_a_batch_that_is_repeated_is_learned():
    """From larger weights than the paper's, which start slowly on crops this small."""
    torch.manual_seed(0)
    model = AlexNet(num_classes=3, dropout=0.0, crop_size=64, bias=0.0).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    model.conv1.weight.data /= 70  # pixels, not standard deviations
    optimizer = make_optimizer(model, recipe(lr=1e-4))
    pixels = np.stack([picture(seed, 64, 64) for seed in range(6)]).transpose(0, 3, 1, 2).astype(np.float32) - 127
    images, labels = torch.from_numpy(pixels), torch.arange(6) % 3
    losses = [train_step(model, images, labels, optimizer, "float32").item() for _ in range(8)]
    assert losses[-1] < losses[0] / 10, losses


def drops_after(errors: list[float | None], **changes) -> list[int]:
    """How often the learning rate had dropped after each of the epochs with these validation errors."""
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


def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on(finished, tiny, run_dir):
    def warn() -> None:
        while not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    threading.Thread(target=warn, daemon=True).start()
    result = run(tiny.root, run_dir, "--keep", "9")
    signal.signal(signal.SIGUSR1, before)
    assert result.exit_code == 0 and "on SIGUSR1" in result.output
    written = [int(path.stem[-8:]) for path in newest_first(run_dir)]
    assert len(written) == 2 and written[0] == 12
    assert same(load_latest(run_dir)["model"], load_latest(finished[0])["model"])


def test_the_second_signal_interrupts_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with loop.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before
