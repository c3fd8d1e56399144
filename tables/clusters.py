"""docs/clusters.md: Slurm, Ray, torchrun, containers with a CPU quota, and shared file systems."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from tables import clusters_mounts, clusters_reading, clusters_slurm
from tables.common import IMAGEFEED, ROOT, Page

page = Page("clusters", [])
page.tables += [clusters_slurm.signals, clusters_slurm.ranks]
# The questions of the quota table, each in a process of its own that has the affinity and sees the quota.
COUNTS = {
    "`len(os.sched_getaffinity(0))`": "import os; print(len(os.sched_getaffinity(0)))",
    "torch 2.13.0, `get_num_threads()`": "import torch; print(torch.get_num_threads())",
    "torch 2.13.0, most workers that a `DataLoader` does not warn of": (
        "import warnings, torch\n"
        "warnings.simplefilter('error')\n"
        "for number in range(1, 9):\n"
        "    try: torch.utils.data.DataLoader([0], num_workers=number)\n"
        "    except UserWarning: break\n"
        "print(number - 1)"
    ),
    "OpenCV 5.0.0.93, `getNumThreads()`": "import cv2; print(cv2.getNumThreads())",
    "pyarrow 26.0.1, `cpu_count()`": "import pyarrow; print(pyarrow.cpu_count())",
    "polars 2.1.0, `thread_pool_size()`": "import polars; print(polars.thread_pool_size())",
    "joblib 1.6.0, `cpu_count()`": "import joblib; print(joblib.cpu_count())",
    "dask 2026.8.0, `CPU_COUNT`": "from dask.system import CPU_COUNT; print(CPU_COUNT)",
    "Ray 2.60.0, `cluster_resources()['CPU']`": (
        "import os, ray\n"
        "ray.init(address='local', include_dashboard=False, log_to_driver=False, _temp_dir=os.getcwd() + '/ray')\n"
        "print(ray.cluster_resources().get('CPU', 'no such key'))"
    ),
    "imagefeed, `num_threads` and `workers` by default": (
        f"import sys; sys.path.append({str(ROOT)!r})\nfrom imagefeed.codec.cores import usable_cores; print(usable_cores())"
    ),
}
COUNTERS = [IMAGEFEED, "joblib==1.6.0", "dask==2026.8.0", "opencv-python-headless==5.0.0.93", "polars==2.1.0", "numpy==2.4.6"]
quotas = page.table("quotas", ["Who counts"], list(COUNTS))
BIND, NEW_MOUNTS = 4096, 0x20000


def limit(quota):
    """Gives this process the first two of its cores and, from a mount namespace of its own, the view of a container whose cpu.max
    is `quota` of 100,000; nothing enforces it."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    if not quota:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    private = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC
    Path("cgroup").mkdir(exist_ok=True)
    for name, text in {"cpu.max": f"{quota} 100000\n", "cgroup.controllers": "cpu memory\n", "memory.max": "max\n"}.items():
        Path("cgroup", name).write_text(text)
    Path("of-process").write_text("0::/\n")
    for call in (
        lambda: libc.unshare(NEW_MOUNTS),
        lambda: libc.mount(b"none", b"/", None, private, None),
        lambda: libc.mount(b"cgroup", b"/sys/fs/cgroup", None, BIND, None),
        lambda: libc.mount(b"of-process", f"/proc/{os.getpid()}/cgroup".encode(), None, BIND, None),
    ):
        if call():
            raise OSError(ctypes.get_errno(), "cannot show this process a control group of its own")


def counted(cores, quota):
    if len(os.sched_getaffinity(0)) < 2 or (quota and os.getuid()):
        print("needs two cores, and root for a mount namespace")
        return []
    launch = (
        f"import sys; sys.path.append({str(ROOT)!r}); from tables import clusters; clusters.limit({quota}); exec(sys.argv[1])"
    )
    if cores == 1:
        launch = launch.replace("exec(", f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); exec(")
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cells = []
    for code in COUNTS.values():
        done = subprocess.run([sys.executable, "-c", launch, code], env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        cells.append(done.stdout.strip().splitlines()[-1].removesuffix(".0"))
    return cells


quotas.add("2 cores, no quota", COUNTERS)(lambda: counted(2, 0))
quotas.add("1 core (`taskset -c 0`)", COUNTERS)(lambda: counted(1, 0))
quotas.add("2 cores, quota of 1.5", COUNTERS)(lambda: counted(2, 150000))
quotas.add("2 cores, quota of 0.5", COUNTERS)(lambda: counted(2, 50000))

launchers = page.table("launchers", ["What is done", "what happens"])
launchers.add("Slurm 22.05.8: `sbatch --array=1-4`", [])(lambda: clusters_slurm.elements("1-4"))
launchers.add("`sbatch --array=3,5`, to run two of them again", [])(lambda: clusters_slurm.elements("3,5"))


def launch(*options, script, prefix=(), **popen):
    Path("worker.py").write_text(script)
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--standalone", *options, "worker.py"]
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **popen)


@launchers.add("torch 2.13.0: `taskset -c 0 torchrun --nproc-per-node=auto`", [IMAGEFEED])
def auto():
    core = str(min(os.sched_getaffinity(0)))
    shown = launch("--nproc-per-node=auto", script="print('here', flush=True)", prefix=["taskset", "-c", core]).communicate()[0]
    return [f"{shown.count('here')} worker: the affinity counts"]


@launchers.add("`OMP_NUM_THREADS` in torchrun's workers, if it is not set", [IMAGEFEED])
def threads():
    script = "import os; print('<', os.environ.get('OMP_NUM_THREADS', 'unset'), '>', flush=True)"
    seen = [launch(f"--nproc-per-node={n}", script=script).communicate()[0].split("<")[1].split(">")[0].strip() for n in (1, 2)]
    return [f"{seen[0]} with one worker, {seen[1]} with two"]


@launchers.add("SIGTERM to torchrun; a worker that needs 45 s to write its checkpoint", [IMAGEFEED])
def patience():
    script = (
        "import signal, time\n"
        "def stop(*_):\n"
        "    for second in range(45):\n"
        "        print('second', second, flush=True)\n"
        "        time.sleep(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    started = launch("--nproc-per-node=1", script=script)
    while "ready" not in started.stdout.readline():
        pass
    started.send_signal(signal.SIGTERM)
    shown = started.communicate()[0]
    seconds = len(shown.split("second ")) - 1
    return [
        f"the worker gets SIGTERM, and SIGKILL after {5 * round(seconds / 5)} s; torchrun's exit code is {started.returncode}"
    ]


def with_ray(label):
    """Adds a row whose function gets a running Ray of two cores."""

    def register(run):
        def measured():
            import ray

            os.environ.pop("OMP_NUM_THREADS", None)
            options = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": f"{os.getcwd()}/ray"}
            ray.init(address="local", num_cpus=2, **options)
            try:
                return [run(ray)]
            finally:
                ray.shutdown()

        launchers.add(label, [IMAGEFEED])(measured)
        return run

    return register


@with_ray("Ray 2.60.0: a task that ends by `os._exit(0)`, `sys.exit(0)` or `raise RuntimeError`, with the default of 3 retries")
def retried(ray):
    @ray.remote
    def task(how, path):
        with open(path, "a") as file:
            file.write("run\n")
        if how == "RuntimeError":
            raise RuntimeError
        getattr(os if how == "_exit" else sys, "_exit" if how == "_exit" else "exit")(0)

    said = []
    for how in ("_exit", "exit", "RuntimeError"):
        path = Path(f"runs-{how}").absolute()
        try:
            ray.get(task.remote(how, str(path)))
            error = "no error"
        except Exception as caught:  # whichever comes is the finding
            error = type(caught).__name__
        said.append(f"run {len(path.read_text().splitlines())} x, {error}")
    return "; ".join(said)


@with_ray("`torch.from_numpy(a).add_(1)` in two tasks, `a` an argument that was put into the store as 1.0")
def shared(ray):
    import numpy as np

    @ray.remote
    def refused(a):
        try:
            a[0] = 0
        except ValueError:
            return "`a[0] = 0` is refused"
        return "`a[0] = 0` is taken"

    @ray.remote
    def add(a):
        import torch

        return float(torch.from_numpy(a).add_(1)[0])

    reference = ray.put(np.ones(1_000_000))
    first = ray.get(refused.remote(reference))
    values = [ray.get(add.remote(reference)) for _ in range(2)]
    return f"{first}; `add_` gives {values[0]} and {values[1]}, and the object in the store is now {ray.get(reference)[0]}"


@with_ray("threads of torch in a task, then in another one with `.options(num_cpus=2)`, then in a new actor with it")
def threads_of_tasks(ray):
    def count():
        import torch

        return os.getpid(), os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()

    class Actor:
        def count(self):
            return count()

    task = ray.remote(count)
    one, two = ray.get(task.options(num_cpus=1).remote()), ray.get(task.options(num_cpus=2).remote())
    actor = ray.get(ray.remote(Actor).options(num_cpus=2).remote().count.remote())
    worker = "the same worker" if one[0] == two[0] else "another worker"
    return f"{one[2]}; {two[2]}, {worker}, with OMP_NUM_THREADS={two[1]}; {actor[2]}"


@launchers.add("`ray.init()` as a user without a name and without HOME, as in many containers", [IMAGEFEED])
def nameless():
    code = (
        "import sys, ray; ray.init(address='local', include_dashboard=False, num_cpus=1, _temp_dir=sys.argv[1]); print('works')"
    )
    said = []
    become = "unshare --user --map-user=12345 --map-group=12345".split()
    for extra in ({}, {"RAY_AUTH_MODE": "disabled"}):
        environ = {"PATH": os.environ["PATH"], **extra}
        command = [*become, sys.executable, "-c", code, f"{os.getcwd()}/ray"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        said.append("works" if "works" in done.stdout else done.stderr.strip().splitlines()[-1])
    return [f"{said[0].replace('RuntimeError: ', '')}; with `RAY_AUTH_MODE=disabled`: {said[1]}"]


page.tables += [clusters_mounts.mounts, clusters_reading.requests, clusters_reading.failed]
