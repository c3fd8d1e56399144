"""The form of a run's steps, timed on a CPU, where a graph is work that is repeated."""

import copy
import dataclasses

import pytest
import torch

from imagefeed.model.graphed import MAX_IMAGES, HostRecorder, StepForm
from imagefeed.training import timing
from imagefeed.training.resume import Run, open_run
from imagefeed.training.timing import steps_form, time_forms
from tests.training.runs import inputs, recipe, same


@pytest.fixture
def started(tiny, tmp_path, monkeypatch) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_run(inputs(tiny), recipe(batch_size=2), tmp_path / "run")


def test_timing_leaves_the_run_as_it_is(started):
    before = copy.deepcopy(started.model.state_dict())
    assert type(time_forms(started, "off").graphed) is bool
    assert same(started.model.state_dict(), before) and not started.optimizer.state
    assert all(parameter.grad is None for parameter in started.model.parameters())


def test_a_form_is_timed_once_for_a_batch_size(started, tmp_path):
    first = steps_form(started, "off")
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert steps_form(dataclasses.replace(started, model=torch.nn.Identity()), "off") == first  # which could not be timed


def test_large_batches_are_never_timed(started, tmp_path):
    large = dataclasses.replace(started, recipe=recipe(batch_size=MAX_IMAGES + 1))
    assert steps_form(large, "off") == StepForm(graphed=False) and not (tmp_path / "cache").exists()


class Full(HostRecorder):
    """As on a GPU without memory for a graph. CUDA may refuse to end a recording that failed."""

    def __init__(self, ends: bool):
        self.ends = ends

    def record(self, work):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if not self.ends:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("ends", [True, False])
def test_a_form_that_memory_was_too_short_to_time_is_timed_again(started, tmp_path, monkeypatch, ends):
    monkeypatch.setattr(timing, "open_recorder", lambda device: Full(ends))
    assert steps_form(started, "off") == StepForm(graphed=False)
    assert not list((tmp_path / "cache").rglob("*.json"))
