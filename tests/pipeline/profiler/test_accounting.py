import dataclasses
import json
import time

import pytest
import torch
from click.testing import CliRunner

import train
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.measure import profile_of_run
from imagefeed.pipeline.profiler.report import verdict

CPU = torch.device("cpu")
PHASES = ("forward", "backward", "optimizer", "end")


def counting(seconds: float):
    for number in range(100):
        time.sleep(seconds)
        yield number


def test_parts_of_a_step_add_up_to_the_time_from_one_fetch_to_the_next():
    account = Account(CPU)
    batches = counting(0.001)
    start_s = time.perf_counter()
    for _ in range(5):
        account.fetch(batches)
        for phase in PHASES:
            account.phase(phase)
    account.stop()
    spent_s = time.perf_counter() - start_s
    steps = account.steps()
    assert len(steps) == 5
    assert all(list(step.phases) == ["copy", "forward", "backward", "optimizer", "rest"] for step in steps)
    assert 0.005 <= sum(step.seconds for step in steps) <= spent_s
    assert [step.start_s for step in steps[1:]] == pytest.approx([step.start_s + step.seconds for step in steps[:-1]], abs=1e-9)
    assert all(step.wait_s >= 0.001 for step in steps)


def test_loop_without_phases_has_one():
    account = Account(CPU)
    batches = counting(0)
    for _ in range(3):
        account.fetch(batches)
    account.stop()
    assert [list(step.phases) for step in account.steps()] == [["step"]] * 3


def test_a_step_that_is_not_over_is_left_out():
    account = Account(CPU)
    batches = counting(0)
    account.fetch(batches)
    assert account.steps() == ()
    account.fetch(batches)
    assert len(account.steps()) == 1 and account.count == 2


@pytest.mark.parametrize(("decoder", "crop"), [("native", []), ("dali", ["crop"])])
def test_stages_of_the_loader_are_noted_with_each_step(tiny, decoder, crop):
    with ImageLoader(tiny, "train", 8, num_threads=1, decoder=decoder) as loader:
        account = Account(CPU, loader)
        batches = iter(loader)
        for _ in range(4):
            account.fetch(batches)
        account.stop()
        steps = account.steps()
    for step in steps[1:]:  # the first one fills the queue, and reads for every place in it
        assert [span.name for span in step.spans] == ["read", "decode", *crop]
        begins = [span.start_s for span in step.spans]
        assert begins == sorted(begins) and all(span.seconds >= 0 for span in step.spans)
        assert sum(span.seconds for span in step.spans) <= step.wait_s


def test_nothing_is_decoded_in_a_cached_epoch(tiny):
    """In the third: some of the second's batches are read before the first is over."""
    with ImageLoader(tiny, "train", 10, num_threads=1, cache="host") as loader:
        for _ in range(3):
            for _ in loader:
                pass
        names = [name for name, _, _ in loader.spans]
        assert names[-1] == "crop" and "decode" not in names


def test_run_names_what_it_spent_its_time_on(tiny):
    """Of a run that waits for data in most of its time, though nothing else was measured."""
    with ImageLoader(tiny, "train", 10, num_threads=1) as loader:
        account = Account(CPU, loader, Sampler(0.05, 0.01))
        for _ in range(6):
            batches = iter(loader)
            for _ in range(5):
                account.fetch(batches)
                for phase in PHASES:
                    account.phase(phase)
        found = profile_of_run(account, loader, "float32", "alexnet")
    assert found.settings.records == 50 and found.settings.batch_size == 10
    assert len(found.steps) == 30 and found.data_wait > 0.5
    assert {stage.name for stage in found.stages} >= {"read", "decode", "forward"}
    assert verdict(found).startswith("Input-bound: ")
    assert found.evidence.lock_latency_s and found.evidence.dataset_bytes > 0
    few = dataclasses.replace(found, steps=found.steps[:1])
    assert verdict(few) == "1 step is too few to tell what limits the run; train for at least 10."


def test_run_without_a_step_has_no_profile(tiny):
    with ImageLoader(tiny, "train", 10) as loader:
        assert profile_of_run(Account(CPU, loader), loader, "float32") is None


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_stream():
    """The host has asked for all of it long before it is done."""
    device = torch.device("cuda")
    account = Account(device)
    batches = counting(0)
    for _ in range(4):
        account.fetch(batches)
        account.phase("forward")
        torch.cuda._sleep(20_000_000)
        account.phase("backward")
        account.phase("optimizer")
        account.phase("end")
    account.stop()
    steps = account.steps()
    assert len(steps) == 4 and all(step.phases["forward"] > 0.005 for step in steps)


def test_training_closes_with_what_limited_it(tiny, tmp_path):
    options = "--device cpu --precision float32 --crop-size 64 --batch-size 8 --threads 1 --epochs 2 --profile".split()
    result = CliRunner().invoke(train.main, [str(tiny.root), "--run-dir", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert last == found["verdict"] and "of each step waits for data; the limit is " in last
    assert len(found["steps"]["forward"]) == 12
    assert found["settings"]["model"] == "alexnet" and found["settings"]["batch_size"] == 8
