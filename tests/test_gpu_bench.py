"""The parts of the benchmarks that no measurement shows to be right."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import against, gpu_first, harness
from benchmarks import all as all_benchmarks
from benchmarks.data import stretch
from benchmarks.train import CLASSES, Products, least_seconds
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.flops import count_flops
from imagefeed.model.nets import build_net
from imagefeed.pipeline.loader import ImageLoader
from tests.conftest import jpeg, picture

ROOT = Path(__file__).parent.parent


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


def test_a_script_that_takes_too_long_is_stopped(tmp_path):
    job = all_benchmarks.Job("shuffle", "", "", 1)
    assert all_benchmarks.run(job, [], tmp_path / "shuffle.log", tmp_path, 0.2) == "it took longer than 0 s"
    assert [path.name for path in tmp_path.iterdir()] == ["shuffle.log"]


@pytest.fixture
def setup(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first, "OUT", tmp_path)
    return gpu_first.Setup("cpu", True, tiny.root, tiny.root, tmp_path)


def test_a_part_that_fails_hangs_or_dies_is_named_and_the_next_one_runs(setup, tmp_path):
    def fail(_: gpu_first.Setup) -> None:
        raise UserError("no such decoder")

    def hang(_: gpu_first.Setup) -> None:
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)

    def outcome(run, limit_s: float = 30) -> str:
        return gpu_first.stopped_in(gpu_first.Part("part", limit_s, run), setup, 60)

    assert outcome(fail) == "ended with 1: UserError: no such decoder"
    assert outcome(hang, 0.5) == "stopped after 0 s"
    assert outcome(lambda _: os.kill(os.getpid(), signal.SIGKILL)) == f"ended with -{signal.SIGKILL}: no output"
    assert outcome(lambda _: print("fine")) == ""
    assert gpu_first.stopped_in(gpu_first.Part("part", 30, fail), setup, 2) == "no time was left"
    outputs = (tmp_path / "parts.log").read_text().split("== part\n")
    assert len(outputs) == 5 and outputs[1].endswith("UserError: no such decoder\n") and outputs[4] == "fine\n"


def test_a_carried_dataset_is_found_at_any_depth(tiny, tmp_path):
    shutil.copytree(tiny.root, tmp_path / "carried" / "some" / "data")
    assert gpu_first.dataset_in(tmp_path / "carried", tmp_path / "work", True) == tmp_path / "carried" / "some" / "data"


def test_parts_fit_the_time_and_name_tests_that_there_are():
    """Each expression chooses tests on a GPU."""
    parts = gpu_first.parts_of(False)
    assert sum(part.limit_s for part in parts) < 620  # some end early
    for part in parts:
        if "tests" in part.name:
            words = part.run.args[0].split(" or ")
            names = "".join((ROOT / name).read_text() for name in gpu_first.TESTS)
            assert [word for word in words if not re.search(f"def test_\\w*{word}", names)] == []


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
