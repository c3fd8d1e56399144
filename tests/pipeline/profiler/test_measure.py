import json
import statistics
import time

import numpy as np
import torch
from click.testing import CliRunner

from imagefeed.model.step import train_step
from imagefeed.pipeline.cli import main
from imagefeed.pipeline.handover import DeviceMemory
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.findings import LARGER
from imagefeed.pipeline.profiler.measure import profile
from imagefeed.pipeline.profiler.report import render_text, verdict
from imagefeed.pipeline.profiler.windows import bytes_of, enlarged, images_in
from imagefeed.pipeline.streams import HostStreams
from tests.conftest import jpeg, pack, picture


class Small:
    """A training step that costs next to nothing, on every 32nd pixel."""

    def __init__(self, before=lambda: None):
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 49, 3))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0, momentum=0.9, fused=True)
        self.before = before

    def __call__(self, batch, on_phase=lambda phase: None) -> None:
        self.before()
        train_step(self.net, batch.images[..., ::32, ::32], batch.labels, self.optimizer, "float32", on_phase)


def test_our_loader_has_every_stage_measured(tiny, one_torch_thread):
    train = Small()
    seen = []
    with ImageLoader(tiny, "train", 4, num_threads=1) as loader:
        found = profile(loader, train, seconds=1, model=train.net, on_stage=seen.append)
        assert loader.position == 0  # it was only looked at
    names = [stage.name for stage in found.stages if stage.alone]
    assert names == ["read", "checksum", "decode", "copy", "forward", "backward", "optimizer", "rest"]
    assert set(found.rates) >= {"together", "training", LARGER, "loader warm"}
    assert found.settings.records == 50 and found.settings.threads == 1
    assert found.settings.pixels_per_image == 256 * 256
    assert found.evidence.parameters == 3 * 3 * 49 + 3
    assert found.evidence.native_images_per_s and found.stage("decode").limit_name.startswith("imagefeed's decoder, ")
    rate = {name: samples.median for name, samples in found.rates.items()}
    assert rate["training"] > rate["together"] and found.data_wait > 0.2
    assert found.stage("decode").alone.median < found.stage("read").alone.median
    assert found.causes[0].name != "training" and 0 < found.causes[0].confidence <= 1
    assert seen[0] == "loader and training together"


def test_first_fix_is_applied_and_measured(tiny, one_torch_thread):
    """Deep queues and many threads help nobody here; decoding once does, and it is found to."""
    with ImageLoader(tiny, "train", 10, num_threads=2) as loader:
        found = profile(loader, Small(), seconds=2, attempt=True)
    text = render_text(found)
    if found.tried:
        assert f"Tried {found.tried.option}: " in text
        assert found.tried.option in [fix.option for fix in found.fixes if fix.changes]
        assert found.tried.achieved.median > 0
    else:
        assert not any(fix.changes and fix.cause == found.causes[0].name for fix in found.fixes)


def test_a_slow_copy_to_the_device_is_named(tiny, one_torch_thread, monkeypatch):
    """Through the pinned memory of a GPU's loader, and a side stream that takes 40 ms for each batch."""
    monkeypatch.setattr(
        ImageLoader, "open_memory", lambda self: DeviceMemory(self.options, self.plan.batch_size, HostStreams(0.04))
    )
    with ImageLoader(tiny, "train", 8, crop_size=64) as loader:
        found = profile(loader, lambda batch: None, seconds=4)
    assert found.causes[0].name == "upload"
    assert found.evidence.cores_images_per_s > 0
    upload = found.stage("upload")
    assert upload.p50_s > 0.01 and "upload" in str(found)


def test_any_loop_and_loader_can_be_profiled(one_torch_thread):
    """PyTorch's own loader, and a step that does not tell its phases apart."""

    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, number):
            time.sleep(0.002)
            return torch.full((3, 8, 8), float(number)), number

    loader = torch.utils.data.DataLoader(Squares(), 8)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64))

    def step(batch):
        images, labels = batch
        torch.nn.functional.cross_entropy(net(images), labels).backward()

    found = profile(loader, step, seconds=1, device="cpu")
    assert found.settings.loader == "DataLoader" and found.settings.workers == 0
    assert [stage.name for stage in found.stages] == ["loading", "step"]
    assert found.data_wait > 0.5
    assert verdict(found).startswith("Input-bound: ")
    assert found.causes[0].name in ("loader", "busy neighbor")
    assert found.rates["loader warm"].median < 600 < found.rates["training"].median


def test_batches_of_any_make_are_counted_and_enlarged():
    images, labels = torch.zeros(5, 3, 2, 2), torch.arange(5)
    ours = Batch((images, labels), labels, labels > 2)
    for batch in (ours, (images, labels), [images, labels], {"image": images, "label": labels}, images):
        assert images_in(batch, None) == 5
        assert images_in(enlarged(batch, 4), None) == 20
        assert type(enlarged(batch, 4)) is type(batch)
    assert bytes_of((images, labels)) == 5 * 12 * 4 + 5 * 8
    assert torch.equal(enlarged(ours, 2).labels, torch.cat([labels, labels]))
    assert enlarged((images, torch.tensor(3.0)), 4) is None  # a number has no second image
    assert enlarged(([], "names"), 4) is None
    assert images_in("names", None) == 1


def test_command_measures_alexnet_and_says_what_limits_it(tiny, one_torch_thread):
    options = ["profile", str(tiny.root), "--batch-size", "2", "--threads", "1", "--device", "cpu", "--seconds", "1"]
    result = CliRunner().invoke(main, [*options, "--crop-size", "64", "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[:2] == ["measuring loader and training together", "measuring training on one batch"]
    data = json.loads(result.stdout)
    rate = {name: statistics.median(samples["windows"]) for name, samples in data["rates"].items()}
    assert rate["training"] < rate["loader warm"]
    assert data["data_wait"] < 0.2
    assert data["settings"]["model"] == "alexnet" and data["settings"]["batch_size"] == 2
    steps = data["steps"]
    assert {"start", "wait", "read", "decode", "forward", "backward", "optimizer", "rest"} <= set(steps)
    assert len({len(column) for column in steps.values()}) == 1
    assert data["verdict"].endswith(".") and data["limit"] == data["causes"][0]["name"]


def test_verdict_is_the_first_line(tiny, one_torch_thread):
    options = ["profile", str(tiny.root), "--batch-size", "2", "--threads", "1", "--device", "cpu", "--seconds", "1"]
    result = CliRunner().invoke(main, [*options, "--crop-size", "64"])
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    assert "of each step waits for data; the limit is " in first and "(confidence " in first


def test_command_says_in_one_sentence_what_is_wrong(tiny, tmp_path):
    def run(*options):
        result = CliRunner().invoke(main, ["profile", *options])
        return result.exit_code, result.stderr

    code, error = run(str(tmp_path))
    assert code == 1 and "no dataset.json" in error
    code, error = run(str(tiny.root), "--split", "test")
    assert code == 1 and "no split named 'test'; it has train, val" in error
    code, error = run(str(tiny.root), "--batch-size", "2", "--model", "lenet")
    assert code == 1 and "lenet: no network has this name" in error
    assert run(str(tiny.root), "--seconds", "0")[0] == 2
    unknown = pack(tmp_path / "data", {"test": [jpeg(picture(n)) for n in range(2)]}, unlabeled="test")
    code, error = run(str(unknown.root), "--split", "test", "--batch-size", "2")
    assert code == 1 and "2 of the 2 records of split test have no label" in error and error.count("\n") == 1


def test_small_dataset_is_profiled_at_its_size(tmp_path, one_torch_thread):
    """The default batch is all there is; the default crop does not fit, and what the error says to do does."""
    jpegs = [jpeg(picture(n, 64, 64)) for n in range(5)]
    manifest = pack(tmp_path / "data", {"train": jpegs}, size=64)
    options = ["profile", str(manifest.root), "--device", "cpu", "--threads", "1", "--seconds", "1", "--json"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 1 and "do not fit its images of 64; lower --crop-size" in result.stderr
    result = CliRunner().invoke(main, [*options, "--crop-size", "64"])
    assert result.exit_code == 0, result.output
    assert "batch size 5: the 5 records of split train do not fill one of 128" in result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert (settings["batch_size"], settings["crop_size"], settings["records"]) == (5, 64, 5)
    assert np.isclose(settings["pixels_per_image"], 64 * 64)
