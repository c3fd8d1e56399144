"""The parts of the benchmarks that no measurement shows to be right."""

import json
import os
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks import against, harness
from benchmarks import all as all_benchmarks
from benchmarks.data import stretch
from benchmarks.train import CLASSES, Products, least_seconds
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.flops import count_flops
from imagefeed.model.nets import build_net
from imagefeed.pipeline.loader import ImageLoader
from tests.conftest import jpeg, picture


def test_a_repeated_dataset_is_whole_and_holds_each_record_so_often(tiny, tmp_path):
    stretch(tiny.root, tmp_path / "large", 3)
    large = Manifest.load(tmp_path / "large")
    assert large.split("train").records == 150 and large.classes == tiny.classes
    assert len(large.split("train").shards) == 6
    with ImageLoader(large, "train", 10, shuffle="none") as loader:
        seen = [record for batch in loader for record in batch.ids.tolist()]
        for copy in range(3):
            assert bytes(loader.reader.jpeg(copy * 50 + 7)) == jpeg(picture(7))
            assert loader.reader.labels[copy * 50 + 7] == 7 % 3
    assert seen == list(range(150)) and loader.corrupt == 0


@pytest.mark.parametrize("name", ["alexnet", "alexnet-owt"])
def test_products_are_all_that_mfu_counts(name):
    net = build_net(name, CLASSES, crop_size=64).to("meta", torch.float64).train()
    with Products() as products:
        net(torch.empty(2, 3, 64, 64, dtype=torch.float64, device="meta")).sum().backward()
    assert sum(flops for flops, _ in products.found) == 2 * sum(count_flops(build_net(name, CLASSES, crop_size=64), 64))
    assert len(products.found) == 8 + 5 + 6  # forward; backward of convolutions, and of full layers two each


def test_the_roofline_is_the_arithmetic_where_memory_is_fast_and_memory_where_arithmetic_is():
    flops = sum(count_flops(build_net("alexnet-owt", CLASSES), 224))
    assert least_seconds("alexnet-owt", 16, 224, 1e12, 1e30) == pytest.approx(16 * flops / 1e12)
    by_memory = least_seconds("alexnet-owt", 16, 224, 1e30, 1e12)
    # At the least weights are read forward, read and their gradients written backward, and updated.
    assert by_memory > 61_100_840 * (3 * 2 + 20) / 1e12
    both = least_seconds("alexnet-owt", 16, 224, 1e12, 1e12)
    assert max(by_memory, 16 * flops / 1e12) <= both <= by_memory + 16 * flops / 1e12


def test_a_script_that_fails_is_named_and_the_goals_are_shown(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "dataset.json").write_text("no JSON")
    options = ["--gpu", "--device", "cpu", "--quick", "--only", "ceilings", "--work", str(tmp_path), "--seconds", "200"]
    result = CliRunner().invoke(all_benchmarks.main, options)
    assert result.exit_code == 0, result.output
    assert "ceilings: " in result.output and "it ended with 1" in result.output
    assert "not readable as JSON" in (tmp_path / "ceilings.log").read_text()
    (found,) = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")]
    assert found["ceilings"]["matrix FLOP/s, bfloat16"] > 0  # what it had measured before


def test_a_script_that_takes_too_long_is_stopped(tmp_path):
    job = all_benchmarks.Job("shuffle", "", "", 1)
    assert all_benchmarks.run(job, [], tmp_path / "shuffle.log", tmp_path, 0.2) == "it took longer than 0 s"
    assert [path.name for path in tmp_path.iterdir()] == ["shuffle.log"]


def test_gpu_scripts_share_the_time_that_is_left(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(
        all_benchmarks, "run", lambda job, words, log, results, limit_s: limits.append((words, limit_s)) or "failed"
    )
    jobs = [all_benchmarks.Job("train", "--seconds SECONDS", "", 30), all_benchmarks.Job("loader", "LARGE", "", 10)]
    found = all_benchmarks.run_all(jobs, False, {"LARGE": tmp_path}, 405.0, tmp_path, tmp_path)
    assert found["not_run"] == {"train": "failed", "loader": "failed"}
    (train, train_s), (loader, loader_s) = limits
    assert train == ["--seconds", "300"] and train_s == pytest.approx(305, abs=1)
    assert loader == [str(tmp_path)] and loader_s == pytest.approx(405, abs=1)  # the first left it all of the time


def test_workers_stand_still_until_they_are_measured():
    code = "from benchmarks.harness import serve\nserve({'how': 'so'}, lambda steps: {'images': 2 * steps})"
    with harness.Workers() as workers:
        workers.start("right", [sys.executable, "-c", code])
        workers.start("wrong", [sys.executable, "-c", "raise SystemExit(1)"])
        told = workers.ready()
        assert told["right"] == {"how": "so"} and "it does not run here" in told["wrong"]["missing"]
        process = workers.processes["right"]
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # returns once it is stopped
        assert workers.measure("right", 3) == {"images": 6}
    assert process.returncode == 0


def test_ratios_are_medians_of_the_ratios_within_a_round():
    values = {"a": iter([9.0, 1.0, 2.0, 6.0]), "b": iter([9.0, 1.0, 1.0, 2.0])}
    rates = harness.interleave({name: series.__next__ for name, series in values.items()}, 3)
    assert rates == {"a": [1.0, 2.0, 6.0], "b": [1.0, 1.0, 2.0]}  # the first round fills caches
    assert harness.compared(rates, ("a",))["ratio"] == {"a / b": 2.0}


@pytest.mark.parametrize(("what", "option"), [("build", "--raw"), ("loader", "--dataset")])
def test_a_comparison_with_another_checkout_says_what_it_needs(what, option):
    result = CliRunner().invoke(against.main, [str(harness.ROOT), "--what", what])
    assert result.exit_code == 2 and f"--what {what} needs {option}" in result.output
