"""Runs tasks in worker processes, notices workers that die or hang, and gives their task to another one once."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection

from imagefeed.dataset.errors import UserError

TRIES = 2  # a task that took two workers with it is at fault itself
RAY_RETRIES = 3  # a node that goes takes its tasks with it, however good they are
HEARTBEAT_TIMEOUT_S = 600  # no single image takes minutes; a stuck network file system does


def usable_cores() -> int:
    """The cores that this process may use, which in a container or batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


class ProcessRunner:
    """`map` over a pool of `workers` processes.

    The function is called as function(task, report) in a worker; what it passes to `report` reaches `progress` in the
    caller, and counts as a sign of life. Its exceptions end the map and reach the caller.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = HEARTBEAT_TIMEOUT_S):
        self.workers = workers or usable_cores()
        self.timeout_s = timeout_s

    def map(self, function: Callable, tasks: Iterable, progress: Callable = lambda *_: None) -> Iterator:
        """Yields the results as they come, in no fixed order. Tasks are taken from the iterable only when needed."""
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

        def replace(worker: _Worker, what: str) -> None:
            if worker.tries >= TRIES:
                raise UserError(f"{what}, twice at the same task ({worker.task}); free memory, or use fewer --workers")
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
                by_pipe = {worker.pipe: worker for worker in pool}
                for pipe in connection.wait(list(by_pipe), timeout=1):
                    worker = by_pipe[pipe]
                    try:
                        kind, value = pipe.recv()
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
    """The same `map` over a Ray cluster: each task on one of its cores, on whatever machine.

    The nodes must see the same files under the same paths, and have this package installed. Ray gives the tasks of a node
    or worker that died to others. Progress comes task by task.
    """

    def __init__(self, address: str | None = None):
        try:
            import ray
        except ImportError:
            raise UserError("Ray is not installed here; install it on every node with: pip install 'imagefeed[ray]'") from None
        self.address = address
        self.ray = ray

    def map(self, function: Callable, tasks: Iterable, progress: Callable = lambda *_: None) -> Iterator:
        ray = self.ray
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at {self.address}: {error}; start one with: ray start --head") from None
        try:
            remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_call)
            tasks = iter(tasks)
            running: dict = {}
            while True:
                # Two for each core, so that none waits for the driver; cores may come and go.
                wanted = 2 * int(ray.cluster_resources().get("CPU", 1))
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
                    what = str(error).splitlines()[0]
                    raise UserError(f"{task}: lost with its Ray worker, also when tried again ({what}); run it again") from error
                for values in reports:
                    progress(*values)
                yield result
        finally:
            ray.shutdown()


def _call(function: Callable, task: object) -> tuple[list[tuple], object]:
    reports: list[tuple] = []
    return reports, function(task, lambda *values: reports.append(values))


class _Worker:
    """One process and the pipe to it; `tries` counts how often its present task was begun."""

    # spawn: a fork would copy the caller's threads' locks (progress bar, BLAS) in whatever state they are.
    context = multiprocessing.get_context("spawn")

    def __init__(self, function: Callable):
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_work, args=(theirs, function), daemon=True)
        # Ctrl-C reaches the whole group; the caller ends the workers. They inherit the mask until `_work` ignores it.
        with _one_blas_thread():
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the end of the process is the end of the pipe

    def give(self, task: object, tries: int) -> None:
        self.task, self.tries = task, tries
        self.last_sign_s = time.monotonic()
        try:
            self.pipe.send(task)
        except OSError:
            pass  # it died; reading from the pipe says so

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: connection.Connection, function: Callable) -> None:
    """A worker's life: tasks come through the pipe until it closes, which it also does when the caller dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
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
    except (EOFError, OSError):
        return


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Workers inherit it: each has a core to itself, and threads of its own for matrix products would take another's."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"
