import json
import re
import statistics
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import jpeg, pack, picture

from pipeline.cli import main
from pipeline.profile import DataWait, Profile, rates_of
from pipeline.report import NAMES, remedy, render_json, render_text, verdict

CPU = torch.device("cpu")


@pytest.fixture
def one_torch_thread():
    """On a busy machine threads that wait for each other take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(data_wait, num_threads=2, device="CPU", **rates) -> Profile:
    base = {"reading": 70_000, "decoding": 4_000, "pipeline": 3_000, "training": 35, "both": 34}
    windows = {stage: (rate * 0.9, rate, rate * 1.1) for stage, rate in (base | rates).items()}
    return Profile(device, "float32", 4, num_threads, 128, 224, "train", 1000, windows, data_wait)


def test_data_wait_is_the_share_of_time_that_batches_took():
    def slow_batches():
        while True:
            time.sleep(0.06)
            yield None

    wait = DataWait(slow_batches(), CPU)
    for _ in range(8):
        next(wait)
        time.sleep(0.02)
    assert 0.6 < wait.share() < 0.9


def test_rate_leaves_out_the_first_window():
    steps = []

    def step():
        time.sleep(0.01 if steps else 0.5)
        steps.append(0)

    rates = rates_of(step, 10, 0.6, CPU)
    assert len(rates) >= 3
    assert max(rates) < 1000 and min(rates) > 100


@pytest.mark.parametrize(
    ("profile", "limit", "sentence"),
    [
        (
            measured(0.01),
            "training",
            "Not input-bound: 1% of each step waits for data; the limit is training, the smallest rate",
        ),
        (measured(0.02, both=25), "competition", "Not input-bound: 2% .* the limit is the machine, which both share"),
        (measured(0.08), "competition", "Partly input-bound: 8% .* together they do 34"),
        (
            measured(0.1, training=3_100, both=2_700),
            "decoding",
            "Partly input-bound: .* decoding, 4,000 images/s on 2 CPU",
        ),
        (measured(0.6, training=9_000, both=2_900), "decoding", "Input-bound: 60% .* the limit is JPEG decoding"),
        (
            measured(0.6, training=9_000, decoding=8_000),
            "cropping",
            "Input-bound: .* what follows decoding .* on 2 CPU threads",
        ),
        (
            measured(0.9, training=9_000, reading=500, pipeline=480),
            "reading",
            "reading from storage, 500 images/s in one thread",
        ),
    ],
)
def test_verdict_names_the_limit_in_one_sentence(profile, limit, sentence):
    assert profile.limit == limit
    assert re.match(f".*{sentence}", verdict(profile))
    assert verdict(profile).count(". ") == 0 and verdict(profile).endswith(".")


def test_remedy_names_what_to_change():
    slow = {"training": 9_000, "both": 2_900}
    assert "raise --threads from 2 to 4, or decode on a GPU" in remedy(measured(0.6, **slow))
    assert "more cores" in remedy(measured(0.6, num_threads=4, **slow))
    assert "or decode on a GPU" not in remedy(measured(0.6, device="NVIDIA H200", **slow))
    assert "input pipeline would gain nothing" in remedy(measured(0.01))


def test_text_begins_with_the_verdict_and_shows_medians():
    text = render_text(measured(0.01)).splitlines()
    assert text[0] == verdict(measured(0.01))
    assert "decoding                       4,000   3,600 to 4,400" in text


def test_json_holds_all_figures():
    data = json.loads(render_json(measured(0.01)))
    assert data["limit"] == "training" and data["verdict"].startswith("Not input-bound")
    assert data["rates"]["both"] == pytest.approx([30.6, 34, 37.4])
    assert data["data_wait"] == 0.01


def test_command_measures_every_stage(tiny, one_torch_thread):
    """And finds, on the CPU, that AlexNet is the slow one by far."""
    options = [
        "profile",
        str(tiny.root),
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--seconds",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [f"measuring {stage}" for stage in NAMES]
    data = json.loads(result.stdout)
    rate = {stage: statistics.median(rates) for stage, rates in data["rates"].items()}
    assert list(rate) == list(NAMES)
    assert rate["training"] < rate["pipeline"] < rate["reading"] > rate["decoding"]
    assert data["data_wait"] < 0.2
    assert (data["batch_size"], data["num_threads"], data["records"]) == (2, 1, 50)


def test_command_says_in_one_sentence_what_is_wrong(tiny, tmp_path):
    def run(*options):
        result = CliRunner().invoke(main, ["profile", *options])
        return result.exit_code, result.stderr

    code, error = run(str(tmp_path))
    assert code == 1 and "no dataset.json" in error
    code, error = run(str(tiny.root), "--split", "test")
    assert code == 1 and "no split named 'test'; it has train, val" in error
    code, error = run(str(tiny.root), "--batch-size", "51")
    assert code == 1 and "50 records do not fill one global batch of 51; lower the batch size (--batch-size)" in error
    assert run(str(tiny.root), "--seconds", "0")[0] == 2
    unknown = pack(tmp_path / "data", {"test": [jpeg(picture(n)) for n in range(2)]}, unlabelled="test")
    code, error = run(str(unknown.root), "--split", "test")
    assert code == 1 and "2 of the 2 records of split test have no label" in error and error.count("\n") == 1


def test_small_dataset_is_profiled_at_its_size(tmp_path, one_torch_thread):
    """The default batch is all there is; the default crop does not fit, and what the error says to do does."""
    jpegs = [jpeg(picture(n, 64, 64)) for n in range(5)]
    manifest = pack(tmp_path / "data", {"train": jpegs}, size=64)
    options = ["profile", str(manifest.root), "--device", "cpu", "--threads", "1", "--seconds", "1", "--json"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 1 and "do not fit its images of 64; ask for smaller crops (--size)" in result.stderr
    result = CliRunner().invoke(main, [*options, "--size", "64"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["batch_size"], data["size"], data["records"]) == (5, 64, 5)
