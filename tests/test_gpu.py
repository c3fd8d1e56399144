"""What a GPU must do as the CPU does. Bodies that take `device` run on the CPU too, against the CPU's other way of doing it."""

import contextlib
import gc
import itertools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import train
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.model.graphed import WARM_UP, CudaRecorder, GraphedStep
from imagefeed.model.lrn import local_response_norm
from imagefeed.model.nets import build_net
from imagefeed.model.step import forward, train_step
from imagefeed.pipeline.cli import main as pipeline_command
from imagefeed.pipeline.graph import HW_DECODER_LOAD
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.plan import offset
from imagefeed.training.evaluation import Member, evaluate
from imagefeed.training.inputs import Preprocessing
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe, make_optimizer
from tests.conftest import crop, jpeg, pack, picture, replace_index, same
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal

# What the compiler advises of float32; and PyTorch, of `full_float32`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings"),
]
IMAGE = 256 * 256 * 3
SPUN_CYCLES = 20_000_000  # of a GPU's clock: 10 ms and more, in which the host runs several batches ahead


@pytest.fixture(scope="session")
def thousand(tmp_path_factory) -> Manifest:
    """1,000 train and 100 val records; not to be changed."""
    splits = {"train": range(1000), "val": range(1000, 1100)}
    jpegs = {split: [jpeg(picture(seed)) for seed in seeds] for split, seeds in splits.items()}
    return pack(tmp_path_factory.mktemp("thousand") / "data", jpegs, shards=4)


@pytest.fixture
def pictures(device, request) -> Manifest:
    """Many where the device is fast; train record n is picture n."""
    return request.getfixturevalue("thousand" if device == "cuda" else "tiny")


@contextlib.contextmanager
def by_the_cpus_graph(manifest: Manifest, split: str = "train", batch_size: int = 25, **options):
    """A loader on the CPU that crops in the graph, as one on a GPU does."""
    with ImageLoader(manifest, split, batch_size, decoder="dali", **options) as loader:
        loader._decode_only = False
        yield loader


def shown(batch: Batch, images: torch.Tensor) -> Batch:
    """The batch with other images."""
    return Batch((images, batch.labels), batch.ids, batch.valid)


def copied(batch: Batch) -> Batch:
    return Batch((batch.images.clone(), batch.labels.clone()), batch.ids.clone(), batch.valid.clone())


def differing(batch: Batch, right: Batch) -> list[int]:
    """The places in a batch whose record, label, validity or image is not that of `right`; images as `same` compares them."""
    wrong = (batch.ids != right.ids) | (batch.labels.cpu() != right.labels) | (batch.valid.cpu() != right.valid)
    images, wanted = batch.images.float().cpu().numpy(), right.images.float().numpy()
    return [n for n in range(len(wanted)) if wrong[n] or not same(images[n], wanted[n])]


def used_mb(device: str) -> float:
    """Memory taken, by DALI's pools too: of the GPU, or of this process."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e6
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def spin(device: str) -> None:
    """Holds up what is put on the stream after it."""
    if device == "cuda":
        torch.cuda._sleep(SPUN_CYCLES)


def test_a_wrong_a_stale_and_a_swapped_image_differ(tiny):
    with by_the_cpus_graph(tiny, batch_size=8) as loader:
        before, right, *_ = loader
        drawn = loader.plan.augmentation(1, right.ids.numpy())
    assert differing(right, right) == []
    rounded = shown(right, right.images + 0.4)
    assert differing(rounded, right) == []

    def with_image(place: int, image: torch.Tensor) -> Batch:
        images = right.images.clone()
        images[place] = image
        return shown(right, images)

    assert differing(with_image(3, before.images[3]), right) == [3]
    assert differing(shown(right, right.images[[0, 2, 1, 3, 4, 5, 6, 7]]), right) == [1, 2]
    assert differing(with_image(5, right.images[5].flip(2)), right) == [5]
    assert differing(with_image(5, right.images[5].flip(0)), right) == [5]
    assert differing(with_image(6, right.images[6] + torch.tensor([0.0, 0.0, 1.0])[:, None, None]), right) == [6]
    record = int(right.ids[7])
    place = offset(drawn.places[0, 7], 32)
    data, mean = (jpeg(picture(record)), right.images[7].numpy() - crop(jpeg(picture(record)), *place, drawn.mirrors[0, 7]))
    mean = np.median(mean, (1, 2), keepdims=True)
    beside = crop(data, place[0] + (1 if place[0] < 32 else -1), place[1], drawn.mirrors[0, 7]) + mean
    assert differing(with_image(7, torch.from_numpy(beside)), right) == [7]
    late = right.images[2].clone()
    late[:, 216:] = before.images[2, :, 216:]  # the last rows still of another image
    assert differing(with_image(2, late), right) == [2]
    assert differing(Batch(right, right.ids.flip(0), right.valid), right) == list(range(8))
    other_labels = Batch((right.images, right.labels + (torch.arange(8) == 4)), right.ids, right.valid)
    assert differing(other_labels, right) == [4]


@pytest.mark.parametrize("hw_decoder_load", [0.0, HW_DECODER_LOAD, 1.0])
def test_every_image_is_the_one_of_the_cpu(pictures, device, hw_decoder_load):
    """Order, crops, flips and colors of an epoch, whichever of the GPU's decoders does the work."""
    with (
        ImageLoader(pictures, "train", 25, device=device, hw_decoder_load=hw_decoder_load) as loader,
        by_the_cpus_graph(pictures) as right,
    ):
        for batch, wanted in zip(loader, right, strict=True):
            assert differing(batch, wanted) == []


@pytest.mark.parametrize("options", [{"decoder": "native"}, {"decoder": "both"}, {"decoder": "native", "cache": "host"}], ids=str)
def test_crops_of_the_cores_are_those_of_the_cpu(pictures, device, options):
    """Decoded in threads, copied on a side stream and normalized on the device, alone or beside DALI."""
    with ImageLoader(pictures, "train", 25, device=device, **options) as loader, by_the_cpus_graph(pictures) as right:
        for _ in range(2):
            for batch, wanted in zip(loader, right, strict=True):
                assert differing(batch, wanted) == []


@pytest.mark.parametrize("options", [{"shuffle": "blocks"}, {"pca_jitter": 0.4}, {"crop_size": 97, "mean": "image"}], ids=str)
def test_other_orders_colors_and_sizes_are_those_of_the_cpu(pictures, device, options):
    with ImageLoader(pictures, "train", 10, device=device, **options) as loader:
        with by_the_cpus_graph(pictures, batch_size=10, **options) as right:
            for _, batch, wanted in zip(range(2 * 5), repeated(loader), repeated(right), strict=False):
                assert differing(batch, wanted) == []


def repeated(loader):
    while True:
        yield from loader


@pytest.mark.parametrize("views", ["center", "ten"])
def test_evaluation_sees_what_the_cpu_sees(pictures, device, views):
    with (
        ImageLoader(pictures, "val", 7, views=views, device=device) as loader,
        by_the_cpus_graph(pictures, "val", 7, views=views) as right,
    ):
        for batch, wanted in zip(loader, right, strict=True):
            for view in range(10 if views == "ten" else 1):
                one, other = ((b.images[:, view] if views == "ten" else b.images) for b in (batch, wanted))
                assert differing(shown(batch, one), shown(wanted, other)) == []


@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_going_on_gives_the_next_batch_to_the_bit(tiny, device, hw_decoder_load):
    options = {"device": device, "hw_decoder_load": hw_decoder_load}
    with ImageLoader(tiny, "train", 8, **options) as loader:
        whole = [batch.to("cpu") for _ in range(2) for batch in loader]
    for stop in (1, 6, 9):
        with ImageLoader(tiny, "train", 8, **options) as loader:
            for _ in zip(range(stop), repeated(loader), strict=False):
                pass
            state = loader.state_dict()
        with ImageLoader(tiny, "train", 8, **options) as loader:
            loader.load_state_dict(state)
            batches = itertools.islice(repeated(loader), len(whole) - stop)
            rest = [batch.to("cpu") for batch in batches]
        assert equal(whole[stop:], rest)


@pytest.mark.parametrize("stream", ["the usual stream", "a stream of its own"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"dtype": "bfloat16"}, {"cache": "device"}, {"prefetch": 1}, {"decoder": "native"}, {"decoder": "both"},
        {"decoder": "native", "dtype": "bfloat16", "prefetch": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_late_consumer_that_overwrites_its_batch_disturbs_no_other(tiny, device, stream, options):
    """The host runs ahead while the stream is held up; each batch is copied late, poisoned, and let go at once."""
    with by_the_cpus_graph(tiny, batch_size=5) as right:
        wanted = [batch for _ in range(3) for batch in right]
    own = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" and "own" in stream else contextlib.nullcontext()
    found = []
    with own, ImageLoader(tiny, "train", 5, device=device, **options) as loader:
        for _ in range(3):
            for batch in loader:
                spin(device)
                found.append(copied(batch))
                batch.images.fill_(torch.nan)
                batch.labels.fill_(-7)
                del batch
    if device == "cuda":
        torch.cuda.synchronize()
    tolerated = same if not options.get("cache") else about_the_same
    for batch, right_batch in zip(found, wanted, strict=True):
        assert batch.ids.tolist() == right_batch.ids.tolist()
        assert batch.labels.tolist() == right_batch.labels.tolist()
        for image, right_image in zip(batch.images.float().cpu(), right_batch.images, strict=True):
            assert tolerated(image.numpy(), right_image.numpy())


def about_the_same(image: np.ndarray, right: np.ndarray) -> bool:
    """As the cache on the device may show it, whose chroma is coarser: luma is what tells pictures apart."""
    luma = np.tensordot((0.299, 0.587, 0.114), image - right, 1)
    return bool(np.isfinite(image).all() and np.abs(luma).mean() < 1)


@pytest.mark.parametrize("capacity", [0, 20 * IMAGE, 50 * IMAGE], ids=["nothing", "some", "all"])
def test_the_host_cache_shows_what_the_graph_shows(tiny, device, capacity):
    """The CPU crops what the device has decoded."""
    with ImageLoader(tiny, "train", 8, device=device) as loader:
        loader._decode_only = False
        decoded = [batch.to("cpu") for _ in range(3) for batch in loader]
    with ImageLoader(tiny, "train", 8, device=device, cache="host", cache_bytes=capacity) as loader:
        cached = [batch.to("cpu") for _ in range(3) for batch in loader]
    for one, other in zip(cached, decoded, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert (one.images - other.images).abs().max() < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["alexnet", "alexnet-code", "alexnet-owt"])
def test_outputs_and_gradients_are_those_in_float64(device, name, precision):
    """Of a net on the CPU; the difference is divided by the size of each tensor.

    bfloat16 has 8 bits, a rounding of 0.4 %; where it makes another pixel the largest of a pool, all of a gradient goes another
    way, on the CPU 28 % of conv1's.
    """
    torch.manual_seed(0)
    exact = build_net(name, 10, crop_size=96, dropout=0.0).double()
    net = build_net(name, 10, crop_size=96, dropout=0.0)
    net.load_state_dict({key: value.float() for key, value in exact.state_dict().items()})
    net.to(device, memory_format=torch.channels_last)
    images, labels = torch.randn(4, 3, 96, 96) * 60, torch.arange(4)
    wanted = exact(images.double())
    F.cross_entropy(wanted, labels).backward()
    with full_float32():
        found = forward(net, images.to(device), precision)
        F.cross_entropy(found, labels.to(device)).backward()
    tolerance, of_gradients = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.4)}[precision]
    assert apart(found, wanted) < tolerance
    gradients = zip(net.named_parameters(), exact.parameters(), strict=True)
    far = {key: apart(one.grad, other.grad) for (key, one), other in gradients}
    assert max(far.values()) < of_gradients, far


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = found.detach().cpu().double() - wanted.detach().cpu().double()
    return (difference.norm() / wanted.detach().cpu().double().norm()).item()


@contextlib.contextmanager
def full_float32():
    """Not TF32, which PyTorch allows convolutions by default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("towers", "shape"), [(1, (2, 12, 5, 7)), (2, (3, 96, 9, 9)), (2, (2, 256, 27, 27))])
def test_normalization_in_one_pass_is_the_literal_formula(device, towers, shape, dtype, layout):
    """b_i = a_i / (2 + 1e-4 * sum over j from i - 2 to i + 2 of a_j^2)^.75, channel by channel in float64."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 100).to(dtype)
    grad = torch.randn(shape).to(dtype)
    exact = x.double().requires_grad_()
    parts = []
    for tower in exact.chunk(towers, 1):
        last = tower.shape[1] - 1
        for i in range(last + 1):
            window = tower[:, max(0, i - 2) : min(last, i + 2) + 1]
            parts.append(tower[:, i] / (2 + 1e-4 * (window**2).sum(1)) ** 0.75)
    wanted = torch.stack(parts, 1)
    wanted.backward(grad.double())
    mine = x.to(device).contiguous(memory_format=layout).requires_grad_()
    found = local_response_norm(mine, towers)
    found.backward(grad.to(device))
    assert found.dtype == mine.grad.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for one, other in ((found, wanted), (mine.grad, exact.grad)):
        assert (one.detach().cpu().double() - other).abs().max() < tolerance * other.abs().max()


def losses_and_moves(device: str, compiled: str | None, steps: int = 4) -> tuple[list[float], list[torch.Tensor]]:
    """Losses, and by how much weights moved, of some steps of the paper's net on batches at changing addresses; without dropout,
    whose draws differ between kernels."""
    torch.manual_seed(0)
    net = build_net("alexnet", 10, crop_size=96, dropout=0.0, bias=0.1).to(device, memory_format=torch.channels_last)
    before = [weight.detach().cpu().clone() for weight in net.parameters()]
    if compiled:
        net.compile(mode=compiled)
    optimizer = make_optimizer(net, Recipe(lr=0.001))
    batches = [(torch.randn(8, 3, 96, 96) * 60, torch.randint(10, (8,))) for _ in range(steps)]
    with full_float32():
        losses = [train_step(net, *(t.to(device) for t in batch), optimizer, "float32") for batch in batches]
    moves = [weight.detach().cpu() - start for weight, start in zip(net.parameters(), before, strict=True)]
    return [loss.item() for loss in losses], moves


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_and_graphed_steps_are_those_of_the_eager_net(mode):
    losses, moves = losses_and_moves("cuda", None)
    found, moved = losses_and_moves("cuda", mode)
    assert found == pytest.approx(losses, rel=1e-3)
    assert max(map(apart, moved, moves)) < 0.02


@pytest.mark.gpu
def test_a_step_becomes_a_graph_while_other_threads_use_the_gpu(caplog):
    """As DALI's do: they take and free memory, of the GPU and pinned, copy, and wait for events and streams."""
    ended = threading.Event()

    def use() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not ended.is_set():
                pinned = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
                torch.empty(1 << 26, dtype=torch.uint8, device="cuda")[: 1 << 20].copy_(pinned, non_blocking=True)
                event = torch.cuda.current_stream().record_event()
                event.query()
                event.synchronize()
                torch.cuda.current_stream().synchronize()

    torch.manual_seed(0)
    net = build_net("alexnet", 10, crop_size=96, bias=0.1).to("cuda", memory_format=torch.channels_last)
    step = GraphedStep(net, make_optimizer(net, Recipe(lr=0.01)), "bfloat16", CudaRecorder(torch.device("cuda")))
    images, labels = (torch.randn(8, 3, 96, 96) * 60).cuda(), torch.arange(8, device="cuda")
    with ThreadPoolExecutor(3) as threads:
        uses = [threads.submit(use) for _ in range(3)]
        try:
            losses = [step(images, labels).item() for _ in range(WARM_UP + 20)]
        finally:
            ended.set()
    assert [one.result() for one in uses] == [None] * 3
    assert not step.failed and not caplog.records and np.isfinite(losses).all()
    assert sum(losses[-5:]) < sum(losses[:5])  # by 5 % on a CPU


@pytest.mark.gpu
def test_after_a_recording_that_failed_steps_go_on_as_usual(caplog):
    """With dropout, whose generator would take the recording for going on, in the stream that was current before."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10), torch.nn.Dropout(0.5), Waiting()).cuda()
    step = GraphedStep(net, make_optimizer(net, Recipe(lr=0.001)), "float32", CudaRecorder(torch.device("cuda")))
    before = torch.cuda.current_stream()
    for _ in range(WARM_UP + 3):
        loss = step(torch.randn(8, 3, 4, 4, device="cuda"), torch.arange(8, device="cuda"))
    assert step.failed and np.isfinite(loss.item()) and torch.cuda.current_stream() == before
    assert len(caplog.records) == 1 and "cannot become one CUDA graph" in caplog.text


class Waiting(torch.nn.Module):
    """Lets the host wait for the GPU, which a graph cannot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.isfinite().all().item())


@pytest.mark.gpu
def test_compile_auto_times_a_graph_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [tiny.root, "--device", "cuda", "--crop-size", "64", "--batch-size", "8", "--epochs", "1", "--lr", "0.001"]
    modes = []
    for number in range(2):
        result = CliRunner().invoke(train.main, list(map(str, [*command, "--run-dir", tmp_path / str(number)])))
        assert result.exit_code == 0, result.output
        modes.append(json.loads((tmp_path / str(number) / "recipe.json").read_text())["compile"])
    assert modes[0] == modes[1] and modes[0] in ("default", "graph")
    assert sum("stepform" in path.read_text() for path in (tmp_path / "cache").rglob("*.json")) == 1


@pytest.mark.parametrize("options", [{}, {"cache": "host"}, {"cache": "device"}], ids=str)
def test_three_epochs_take_no_more_memory_than_the_first(tiny, device, options):
    """A batch of 25 is 15 MB, so keeping any would show; DALI's own pools come and go."""
    with ImageLoader(tiny, "train", 25, device=device, **options) as loader:
        for _ in range(10):
            list(loader)
        before = used_mb(device)
        for _ in range(3 * 10):
            for _batch in loader:
                pass
        assert used_mb(device) - before < 150


def test_ten_times_open_and_close_take_no_memory(tiny, device):
    for cycle in range(12):
        with ImageLoader(tiny, "train", 25, device=device) as loader:
            next(iter(loader))
        if cycle == 1:
            before = used_mb(device)
    assert used_mb(device) - before < 150


def test_a_damaged_record_costs_one_image(tiny_copy, device):
    flip_bit(tiny_copy, "train", 20)
    with ImageLoader(tiny_copy, "train", 10, device=device) as loader, by_the_cpus_graph(tiny_copy, batch_size=10) as right:
        for batch, wanted in zip(loader, right, strict=True):
            assert 20 not in batch.ids and differing(batch, wanted) == []
        assert loader.corrupt == 1


def test_a_record_that_does_not_decode_is_an_error_and_the_next_loader_works(tiny, tiny_copy, device):
    index = tiny_copy.load_index("train").copy()
    index[4]["length"] = 100
    replace_index(tiny_copy, "train", index)
    with ImageLoader(tiny_copy, "train", 25, shuffle="none", device=device) as loader:
        loader.reader.verify_checksums = False
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be decoded"):
                next(iter(loader))
    with ImageLoader(tiny, "train", 10, device=device) as loader, by_the_cpus_graph(tiny, batch_size=10) as right:
        assert differing(next(iter(loader)), next(iter(right))) == []


@pytest.mark.parametrize("views", ["center", "ten"])
def test_evaluation_is_that_of_the_cpu_but_for_rounding(pictures, device, views):
    """Each record's logarithms of probabilities, and the errors, but for records between whose classes rounding may decide."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    found = []
    for number, where in enumerate(("cpu", device)):
        scores = {}

        def keep(batch, logs, scores=scores):
            for n in np.flatnonzero(batch.valid.cpu().numpy()):
                scores[int(batch.ids[n])] = logs[n].cpu()

        with ImageLoader(pictures, "val", 20, views=views, device=where, decoder="dali") as loader:
            loader._decode_only = loader._decode_only and number == 1  # the first is by the graph
            shown = Preprocessing(224)
            member = Member(net.to(where), "float32", shown)
            with full_float32():
                errors = evaluate([member], {shown: loader}, Ranks(), on_batch=keep)
        found.append((errors, scores))
    (errors, scores), (others, other_scores) = found
    assert scores.keys() == other_scores.keys() and len(scores) == errors["records"] == others["records"]
    apart_by = max((scores[n] - other_scores[n]).abs().max().item() for n in scores)
    assert apart_by < 0.25
    neighbors = [(scores[n] - scores[n + 1]).abs().max().item() for n in range(len(scores) - 1)]
    assert np.median(neighbors) > 1  # so that little is what 0.25 is
    undecided = sum(logs.topk(2).values.diff().abs().item() < 2 * apart_by for logs in scores.values())
    assert abs(errors["top1_error"] - others["top1_error"]) <= 100 * undecided / errors["records"] + 1e-9
    assert errors["loss"] == pytest.approx(others["loss"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        ("--compile", "graph"), ("--cache", "device", "--compile", "off"), ("--precision", "float32", "--compile", "off"),
        ("--decoder", "both", "--compile", "off"),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_trains_and_goes_on_after_its_end(tiny, tmp_path, options):
    command = [tiny.root, "--run-dir", tmp_path / "run", "--device", "cuda", "--crop-size", "64", "--batch-size", "8", "--epochs"]
    for epochs, said in ((1, "epoch 1"), (2, "resuming after step 6")):
        result = CliRunner().invoke(train.main, list(map(str, [*command, epochs, "--lr", "0.001", *options])))
        assert result.exit_code == 0, result.output
        assert "device: cuda" in result.output and said in result.output


@pytest.mark.gpu
def test_profile_says_what_limits_a_gpu(tiny):
    options = ["profile", str(tiny.root), "--device", "cuda", "--batch-size", "8", "--seconds", "3"]
    result = CliRunner().invoke(pipeline_command, options)
    assert result.exit_code == 0, result.output
    assert "waits for data" in result.stdout.splitlines()[0]
