"""What is timed once for a GPU: a net's arrangement, and the form of its steps. test_tune.py has the loader's settings."""

import json

import pytest

from imagefeed.model.arrangement import Arrangement
from imagefeed.model.graphed import StepForm
from imagefeed.pipeline.tuner.saved import settings_path, timed_once

KEY = {"net": "alexnet", "gpu": "a GPU"}
FOUND = Arrangement(apart=True, folded=False, pooled=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def never() -> Arrangement:
    raise AssertionError("timed again")


def test_an_arrangement_is_timed_once_for_each_key():
    assert timed_once(KEY, Arrangement, lambda: FOUND) == timed_once(KEY, Arrangement, never) == FOUND
    other = Arrangement(pooled=False)
    assert (
        timed_once(KEY | {"gpu": "another"}, Arrangement, lambda: other) == other and timed_once(KEY, Arrangement, never) == FOUND
    )


@pytest.mark.parametrize("arrangement", [{"apart": True}, {"apart": 1, "folded": 0, "pooled": 1}, {"else": True}, 7])
def test_a_corrupt_file_is_named_and_replaced(arrangement, caplog):
    timed_once(KEY, Arrangement, lambda: FOUND)
    file = json.loads(settings_path(KEY).read_text())
    settings_path(KEY).write_text(json.dumps(file | {"arrangement": arrangement}))
    expected = Arrangement(apart=True) if arrangement == {"apart": True} else FOUND  # what is not named has its default
    assert timed_once(KEY, Arrangement, never if arrangement == {"apart": True} else lambda: FOUND) == expected
    assert ("corrupt" in caplog.text) == (arrangement != {"apart": True})
    assert timed_once(KEY, Arrangement, never) == expected


def test_without_a_folder_it_is_timed_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert timed_once(KEY, Arrangement, lambda: FOUND) == FOUND
    with pytest.raises(AssertionError, match="timed again"):
        timed_once(KEY, Arrangement, never)


def test_the_form_of_a_step_is_kept_beside_it():
    assert timed_once(KEY | {"step of": 128}, StepForm, lambda: StepForm(graphed=True)) == StepForm(graphed=True)
    assert timed_once(KEY, Arrangement, lambda: FOUND) == FOUND
    assert timed_once(KEY | {"step of": 128}, StepForm, never) == StepForm(graphed=True)
