"""The parts of benchmarks/gpu.py that no measurement shows to be right."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu_table import rows
from benchmarks.gpu_training import CLASSES, Products, least_seconds
from benchmarks.stretched import stretch
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
            assert bytes(loader.dataset.jpeg(copy * 50 + 7)) == jpeg(picture(7))
            assert loader.dataset.labels[copy * 50 + 7] == 7 % 3
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


def test_the_table_shows_what_is_there_of_every_part():
    assert {words for _, words, _ in rows({})} == {"-"}
    row = {"images_per_second": 61_000.4, "mfu": 0.32, "of the roofline": 0.34}
    slower = row | {"images_per_second": 54_900.0}
    found = {
        "training": {"alexnet-owt, batch 1024, eager": row, "alexnet, batch 1024, graphed": slower},
        "verdicts": {"one thread": {"named": "decode threads", "right": True}, "a slow GPU": "failed: RuntimeError: no"},
    }  # fmt: skip
    table = {what: (words, goal) for what, words, goal in rows(found)}
    assert table["training, alexnet-owt, batch 1024, eager"] == ("61,000 images/s, MFU 0.32, 0.34 of the roofline", "60,000")
    assert table["training, alexnet of alexnet-owt"] == ("0.9", "0.85")
    assert table["verdict, one thread"] == ("decode threads (right)", "")
    assert table["verdict, a slow GPU"] == ("failed: RuntimeError: no", "")


def test_a_part_that_fails_is_named_and_what_it_noted_stays(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "dataset.json").write_text("no JSON")
    (tmp_path / "rescale.json").write_text(json.dumps({"build on 2 cores": {"images_per_second": 882.0}}))
    options = ["--device", "cpu", "--small", "--only", "ceilings", "--folder", str(tmp_path), "--seconds", "100"]
    result = CliRunner().invoke(gpu.main, options)
    assert result.exit_code == 0, result.output
    assert "ceilings: ended with 1" in result.output and "not readable as JSON" in result.output
    assert "matrix, bfloat16" in result.output and "882 images/s" in result.output


def test_a_part_that_takes_too_long_is_stopped(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    why = gpu.run("ceilings", tmp_path, "cpu", True, 0.2)
    assert why == "stopped after 1 s"
    assert np.all([path.suffix == ".log" for path in tmp_path.iterdir()])
