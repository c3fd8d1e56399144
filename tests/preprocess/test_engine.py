"""Worker processes that work, fail, die and hang."""

import os
import signal
import time

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.engine import ProcessRunner


def square(task, report):
    report(task, 1)
    return task * task


def die_once(task, report):
    """Dies where its flag file is missing, having made it."""
    if not task.exists():
        task.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def die_always(task, report):
    os._exit(3)


def hang(task, report):
    time.sleep(600)


def fail(task, report):
    raise UserError(f"task {task} is impossible")


def test_every_task_is_done_once():
    seen = []
    results = ProcessRunner(2).map(square, range(20), lambda *values: seen.append(values))
    assert sorted(results) == [n * n for n in range(20)]
    assert sorted(seen) == [(n, 1) for n in range(20)]


def test_tasks_are_taken_only_when_a_worker_is_free():
    """A million tasks of a thousand paths each would not fit into memory."""
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    results = ProcessRunner(2).map(square, tasks())
    next(results)
    assert len(taken) <= 4
    results.close()


def test_a_worker_that_dies_is_replaced_and_its_task_done_again(tmp_path):
    tasks = [tmp_path / name for name in ("a", "b", "c")]
    assert sorted(ProcessRunner(2).map(die_once, tasks)) == ["a", "b", "c"]


def test_a_task_that_kills_two_workers_ends_the_run():
    with pytest.raises(UserError, match=r"a worker died \(exit code 3\), twice at the same task \(7\)"):
        list(ProcessRunner(2).map(die_always, [7]))


def test_a_worker_that_hangs_is_noticed():
    with pytest.raises(UserError, match="no sign of life for 0.5 s, twice at the same task"):
        list(ProcessRunner(1, timeout_s=0.5).map(hang, ["x"]))


def test_a_workers_exception_reaches_the_caller():
    with pytest.raises(UserError, match="task 1 is impossible"):
        list(ProcessRunner(1).map(fail, [1]))


def test_more_workers_than_tasks_start_no_more_than_there_are_tasks(tmp_path):
    started = list(ProcessRunner(50).map(process_id, range(2)))
    assert len(started) == 2


def process_id(task, report):
    return os.getpid()
