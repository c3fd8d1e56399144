"""Several processes, started by torchrun as a user starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from imagefeed.dataset.errors import UserError
from imagefeed.model.nets import build_net
from imagefeed.model.step import compiled
from imagefeed.pipeline.plan import Plan
from imagefeed.training.checkpoints import load_latest, newest_first
from imagefeed.training.parallel import Ranks, buckets_of, joined, own_gpu
from tests.dataset.test_reader import flip_bit
from tests.training.runs import QUICK, metrics, run, same, wait_for

# An epoch of 4 steps, without dropout, whose streams differ from those of one process.
OPTIONS = "--epochs 1 --limit-batches 4 --bias 0.1 --dropout 0".split()


def start(out: Path, run_dir: Path, *options: str) -> subprocess.Popen:
    """Two ranks, with the options of QUICK and OPTIONS, and the output of all in one pipe."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [train.__file__, str(out), "--run-dir", str(run_dir), *QUICK, "--batch-size", "4", *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*torchrun, *command], env=environment, **streams)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by their ids, in the order of their ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
            if parent == process.pid and b"train.py" in command:
                environment = (path.parent / "environ").read_bytes().split(b"\0")
                found.append((b"RANK=1" in environment, int(path.parent.name)))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for _, pid in sorted(found)]


def weights(run_dir: Path) -> tuple[dict, dict]:
    state = load_latest(run_dir)
    return state["model"], state["optimizer"]


@pytest.fixture
def folder(tmp_path):
    """Emptied at the end: a checkpoint is 160 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """What two ranks make without interruption."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    process = start(tiny.root, folder)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    yield folder, output
    shutil.rmtree(folder)


def test_one_rank_prints_and_writes(pair):
    folder, output = pair
    assert output.count("8 images a step of 2 ranks, 4 steps an epoch, 4 in all") == 1
    assert output.count("ten views: top-1 error") == 1
    assert json.loads((folder / "recipe.json").read_text())["ranks"] == 2
    (line,) = metrics(folder)
    assert line["step"] == 4 and line["metrics/val/records"] == 23
    assert json.loads((folder / "summary.json").read_text())["errors"]["ten views"]["records"] == 23


def test_two_ranks_learn_the_same_as_one(tiny, folder, pair):
    """At the same global batch; the same loss, weights and validation errors but for the order of sums."""
    assert run(tiny.root, folder / "one", *OPTIONS).exit_code == 0
    lines = [metrics(run_dir)[0] for run_dir in (folder / "one", pair[0])]
    states = [weights(run_dir)[0] for run_dir in (folder / "one", pair[0])]
    for name in ("loss/train", "metrics/val/loss", "metrics/val/top1_error"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-5), name
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_rank_that_dies_ends_the_others_and_the_run_resumes_to_the_bit(tiny, folder, pair):
    """SIGTERM to all is one checkpoint; then the rank that writes them is killed, which ends the other."""
    run_dir = folder / "run"
    process = start(tiny.root, run_dir)
    wait_for((run_dir / "metrics.jsonl").exists, process)
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "run the same command again to continue" in output, output
    assert len(newest_first(run_dir)) == 1
    assert load_latest(run_dir)["progress"]["step"] < 4

    process = start(tiny.root, run_dir, "--checkpoint-every", "0")
    wait_for(lambda: newest_first(run_dir)[0].name >= "checkpoint-00000002.pt", process)
    pids = ranks_of(process)
    os.kill(pids[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    # Whichever rank 1 notices first: the lost connection, or torchrun, which ends all ranks when one has died.
    assert "rank 1 of 2: another rank ended or cannot be reached" in output or "ended by SIGTERM" in output, output
    assert process.returncode != 0
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert 2 <= load_latest(run_dir)["progress"]["step"] < 4

    process = start(tiny.root, run_dir)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "resuming after step" in output, output
    assert all(same(here, there) for here, there in zip(weights(run_dir), weights(pair[0]), strict=True))
    assert metrics(run_dir)[-1]["loss/train"] == metrics(pair[0])[-1]["loss/train"]


def test_a_corrupt_record_that_several_ranks_and_loaders_find_counts_once(tiny_copy, folder):
    """Two records, each of which one rank has in the first epoch and the other in the second; colors end between them, so
    that each rank opens a second loader."""
    epochs = [[set(ids_of(tiny_copy, epoch, rank)) for rank in (0, 1)] for epoch in (0, 1)]
    one, other = (min(epochs[0][rank] & epochs[1][1 - rank]) for rank in (0, 1))
    for record_id in (one, other):
        flip_bit(tiny_copy, "train", record_id)
    process = start(tiny_copy.root, folder / "run", *"--epochs 2 --limit-batches 6 --pca-jitter-epochs 1".split())
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert [line["data/corrupt"] for line in metrics(folder / "run")] == [2, 2]
    assert output.count("fails its checksum") >= 4  # each by both


def ids_of(manifest, epoch: int, rank: int) -> list[int]:
    """The records that a rank takes in an epoch of six steps."""
    plan = Plan(manifest.split("train").records, 4, "random", 0, rank, 2, "global")
    return [n for step in range(6) for n in plan.ids(6 * epoch + step)[0].tolist()]


def test_each_rank_and_step_has_a_stream_of_its_own():
    def drawn(rank: int, step: int, seed: int = 0) -> float:
        Ranks(rank, 2).seed_step(seed, step, torch.device("cpu"))
        return torch.rand(()).item()

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(rank, step, seed) for rank in (0, 1) for step in range(10) for seed in (0, 1)}) == 40


def test_a_process_alone_is_the_only_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks == Ranks(0, 1, 0) and ranks.first
        assert ranks.any(True, False) == [True, False] and ranks.gathered("a") == ["a"]
        assert ranks.sum(torch.tensor(3)).item() == 3


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 8, "cuda:3"), ("cuda", 8, "cuda:3"), ("cpu", 8, None), ("auto", 3, None), ("auto", 0, None)],
)
def test_each_rank_has_a_gpu_of_its_own(monkeypatch, device, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = own_gpu(Ranks(3, 8, 3), device)
    assert found == (torch.device(expected) if expected else None)


def test_ranks_that_nobody_counted_on_this_machine_are_refused(monkeypatch):
    """As by srun with RANK and WORLD_SIZE from Slurm's variables."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, without LOCAL_RANK; start all ranks with torchrun"), joined():
        pass


def test_tasks_of_srun_without_torchrun_are_refused(monkeypatch):
    """Each would be the same run, into the same folder. WORLD_SIZE=1 says that each is one of its own, such as of a sweep."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="^srun started this command 2 times without torchrun.*; start one task"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks == Ranks()


@pytest.mark.parametrize("variables", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_one_task_of_slurm_is_alone(monkeypatch, variables):
    """A step of one task, and a batch script of a job that asked for eight."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with joined() as ranks:
        assert ranks == Ranks()


def test_buckets_follow_from_the_parameters():
    """The last first; one as large as a message goes by itself, and small ones wait for the next until they fill one."""
    sizes = {"a": 2, "b": 30, "c": 4, "d": 100, "e": 6, "f": 40, "g": 3}
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    parameters["h"] = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    names = {parameter: name for name, parameter in parameters.items()}
    found = [[names[p] for p in bucket] for bucket in buckets_of(list(parameters.values()), least_bytes=160)]
    assert found == [["h"], ["g", "e", "c", "b"], ["f"], ["d"], ["a"]]


AVERAGING = """
from pathlib import Path

import torch
from imagefeed.training.parallel import joined

with joined() as ranks:
    torch.manual_seed(0)
    net = torch.nn.ModuleList([torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)])
    alone = {}  # the gradients of each rank's batch, by themselves
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    for averaged in (False, True):
        if averaged:
            ranks.average_gradients(net, optimizer)
        for used in (3, 2, 3):  # in the second step the last layer takes no part
            for rank in (ranks.rank,) if averaged else range(ranks.count):
                optimizer.zero_grad()
                x = torch.full((1, 5), float(rank + 1))
                for layer in net[:used]:
                    x = layer(x)
                x.sum().backward()
                if not averaged:
                    alone[rank, used] = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            if averaged:
                optimizer.step()
                for p, one, other in zip(net.parameters(), alone[0, used], alone[1, used], strict=True):
                    assert (p.grad is None) == (one is None)
                    assert one is None or torch.allclose(p.grad, (one + other) / 2, rtol=1e-6)
                assert not torch.equal(alone[0, used][0], alone[1, used][0])
    print("averaged")
# A thread of gloo that still runs may abort the process as it ends.
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
"""


def test_gradients_are_averaged_also_if_a_layer_takes_no_part(folder):
    script = folder / "script.py"
    script.write_text(AVERAGING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(torchrun, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("averaged") == 1, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method", "ignore:The .grad attribute")  # within the compiler
def test_compiled_in_parts_the_full_layers_gradients_come_first():
    """They are 96 % of the bytes, and are sent while the convolutional layers' are computed."""
    torch.manual_seed(0)
    net = build_net("alexnet", 3, crop_size=64, dropout=0.0)
    images = torch.randn(2, 3, 64, 64)
    wanted, seen = net(images), []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append((name, net.conv1.weight.grad is not None)))
    parts = compiled(net, "default", in_parts=True)
    parts.parts = [
        torch.compile(part, backend="aot_eager") for part in (net.features, net.classify)
    ]  # the usual one takes a minute
    found = parts(images)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert {name for name, _ in seen[:6]} == {f"fc{n}.{kind}" for n in (6, 7, 8) for kind in ("weight", "bias")}
    assert not any(known for _, known in seen[:6]) and len(seen) == 16
    assert not parts.eval().net.training and list(dict(parts.named_parameters())) == [
        f"net.{n}" for n, _ in net.named_parameters()
    ]
