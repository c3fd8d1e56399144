"""Runs tasks in worker processes; if a worker dies or hangs, another one gets its task, once."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any
from urllib.parse import urlsplit

from imagefeed.codec.cores import usable_cores
from imagefeed.dataset.errors import UserError

TRIES = 2  # a task that kills two workers is at fault itself
RAY_RETRIES = 3  # a node that fails takes its tasks with it, however good they are
ANSWER_TIMEOUT_S = 5  # to connect to a Ray cluster
HEARTBEAT_TIMEOUT_S = 600  # no single image takes minutes; a stuck network file system does
log = logging.getLogger("imagefeed")


class ProcessRunner:
    """`map` over a pool of `workers` processes.

    A worker calls function(task, report). The arguments of `report` reach `progress` in the caller, and count as a sign of
    life. An exception in the function ends the map and is raised in the caller.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = HEARTBEAT_TIMEOUT_S):
        self.workers = workers or usable_cores()
        self.timeout_s = timeout_s

    def map(self, function: Callable, tasks: Iterable, progress: Callable = lambda *_: None) -> Iterator:
        """Yields the results in order of completion. Takes a task from the iterable only when a worker is free."""
        tasks = iter(tasks)
        again: deque = deque()
        pool: list[_Worker] = []

        def feed(worker: _Worker) -> None:
            task, tries = again.popleft() if again else (next(tasks, None), 1)
            if task is None:
                worker.stop()
                pool.remove(worker)
            else:
                worker.give(task, tries)

        def replace(worker: _Worker, reason: str) -> None:
            if worker.tries >= TRIES:
                raise UserError(
                    f"{reason}, twice at the same task ({worker.task}); free memory, or use fewer `workers`; in a script, call "
                    'build only under `if __name__ == "__main__":`, because workers import the script'
                )
            again.append((worker.task, worker.tries + 1))
            worker.kill()
            pool.remove(worker)
            pool.append(_Worker(function))
            feed(pool[-1])

        try:
            for _ in range(self.workers):
                worker = _Worker(function)
                pool.append(worker)
                feed(worker)
                if worker not in pool:  # there are fewer tasks than workers
                    break
            while pool:
                by_pipe: dict[Any, _Worker] = {worker.pipe: worker for worker in pool}
                for pipe in connection.wait(list(by_pipe), timeout=1):
                    worker = by_pipe[pipe]
                    try:
                        kind, value = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        replace(worker, f"a worker died ({_ending(worker.process.exitcode)})")
                        continue
                    worker.last_sign_s = time.monotonic()
                    if kind == "progress":
                        progress(*value)
                    elif kind == "result":
                        feed(worker)
                        yield value
                    else:
                        error, trace = value
                        raise error from RuntimeError(f"in a worker:\n{trace}")
                for worker in list(pool):
                    if time.monotonic() - worker.last_sign_s > self.timeout_s:
                        replace(worker, f"a worker gave no sign of life for {self.timeout_s:g} s")
        finally:
            for worker in pool:
                worker.kill()


class RayRunner:
    """The same `map` over a Ray cluster, a task on each of its cores.

    The nodes must see the same files under the same paths and have this package installed. Ray repeats the tasks of a node or
    worker that died. Progress arrives when a task ends.
    """

    def __init__(self, address: str | None = None):
        try:
            import ray
        except ImportError:
            raise UserError("Ray is not installed; install it on every node with: pip install '.[ray]'") from None
        self.address = address
        self.ray: Any = ray

    def map(self, function: Callable, tasks: Iterable, progress: Callable = lambda *_: None) -> Iterator:
        ray = self.ray
        self._connect()
        try:
            remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_call)
            tasks = iter(tasks)
            running: dict = {}
            while True:
                # Two for each core, so that no core waits for the driver; cores may come and go.
                wanted = 2 * (self._cores() or 1)
                for task in itertools.islice(tasks, max(0, wanted - len(running))):
                    running[remote.remote(function, task)] = task
                if not running:
                    return
                (done, *_), _ = ray.wait(list(running))
                task = running.pop(done)
                try:
                    reports, result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from error
                except ray.exceptions.RayError as error:
                    reason = str(error).splitlines()[0]
                    raise UserError(f"{task}: lost with its Ray worker, even after retries ({reason}); run it again") from error
                for values in reports:
                    progress(*values)
                yield result
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        """Joins the cluster at the address, else the one that Ray would find; starts one here if that does not answer."""
        address = self.address or self._found()
        if address and not _answers(address):
            if self.address:
                raise UserError(f"no Ray cluster answers at {address}; start one with: ray start --head, or leave out `address`")
            log.warning(
                "no Ray cluster answers at %s, which RAY_ADDRESS or an earlier `ray start` names; starting one here", address
            )
            address = None
        self._init(address=address or "local")
        if not address and not self._cores():  # in a container of less than one core
            self.ray.shutdown()
            self._init(address="local", num_cpus=1)
        if not self._cores():
            log.warning("the Ray cluster at %s has no CPU; waiting until it gets one", address)

    def _found(self) -> str | None:
        from ray._private.services import find_bootstrap_address

        address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None)
        return None if address in ("local", "auto") else address

    def _init(self, **options: Any) -> None:
        try:
            self.ray.init(log_to_driver=False, logging_level="error", **options)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at {self.address}: {error}; start one with: ray start --head") from None
        except RuntimeError as error:
            if "home directory" not in str(error):
                raise
            raise UserError(
                "Ray keeps a token in the home folder, and this user has none; set RAY_AUTH_MODE to disabled, or HOME to a folder"
            ) from None

    def _cores(self) -> int:
        return int(self.ray.cluster_resources().get("CPU", 0))


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT or ray://HOST:PORT. Ray itself would try for a quarter of an hour."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    except (TypeError, ValueError):  # no such form; Ray says what is wrong
        return True
    return True


Runner = ProcessRunner | RayRunner


def _call(function: Callable, task: object) -> tuple[list[tuple], object]:
    reports: list[tuple] = []
    return reports, function(task, lambda *values: reports.append(values))


class _Worker:
    """A process and the pipe to it; `tries` counts the starts of its present task."""

    # spawn: a fork would copy locks of the caller's threads (progress bar, BLAS) in any state.
    context = multiprocessing.get_context("spawn")

    def __init__(self, function: Callable):
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_work, args=(theirs, function), daemon=True)
        # Ctrl-C reaches the whole process group, but ending workers is the caller's job. They inherit the mask until `_work`
        # ignores the signal.
        with _one_blas_thread():
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends with the process

    def give(self, task: object, tries: int) -> None:
        self.task, self.tries = task, tries
        self.last_sign_s = time.monotonic()
        with contextlib.suppress(OSError):  # if it died, reading from the pipe tells
            self.pipe.send(task)

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: connection.Connection, function: Callable) -> None:
    """A worker's life: takes tasks from the pipe until it closes, which it also does when the caller dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                result = function(task, lambda *values: pipe.send(("progress", values)))
            except BrokenPipeError:
                return
            except Exception as error:
                pipe.send(("error", (error, traceback.format_exc())))
            else:
                pipe.send(("result", result))


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """For processes started inside: each worker has one core, and more BLAS threads would take another worker's."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


def _ending(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
