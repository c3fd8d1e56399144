"""The tables of docs/clusters.md about Slurm: a cluster of one node, started here as root, whose jobs note what they receive.

Nothing is enforced that decides speed: the node pretends to have 16 cores, so that all jobs run at the same time.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tables.common import IMAGEFEED, ROOT, Table

CONFIGURATION = """
ClusterName=tables
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={next}
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes={host} State=UP PriorityTier=10 PreemptMode=OFF
"""
LASTS_S = 150
# Notes each signal and how many seconds after its start it came; ends by itself only long after the limit of its job.
NOTING = """
import os, signal, sys, time
started = time.time()
def note(text):
    with open(sys.argv[1], "a") as file:
        print(f"{time.time() - started:.1f} {text}", file=file)
for each in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):
    signal.signal(each, lambda number, _: note(signal.Signals(number).name))
note("start")
while time.time() < started + {lasts}:
    time.sleep(0.5)
    note("alive")
"""
NEEDED = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}


@contextlib.contextmanager
def cluster():
    """Starts Slurm in the working directory and sets SLURM_CONF; yields whether it could."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = sorted(package for program, package in NEEDED.items() if not shutil.which(program))
    if missing or os.getuid():
        print(f"Slurm's rows need root{', and missing here is: ' if missing else ''}{' '.join(missing)}")
        yield False
        return
    folder = Path.cwd() / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {"host": socket.gethostname().partition(".")[0], "folder": folder, "port": port, "next": port + 1, "grace": GRACE_S}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**names))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "munge.log", "seed-file": "seed"}
    servers = [["munged", "-F", "--force", *(f"--{option}={folder}/{name}" for option, name in files.items())]]
    servers += [["slurmctld", "-D"], ["slurmd", "-D"]]
    running = []
    try:
        for server in servers:
            running.append(subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        until = time.monotonic() + 60
        while "idle" not in output("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > until:
                raise RuntimeError("Slurm's node did not come up")
            time.sleep(0.5)
        yield True
    finally:
        subprocess.run(["scancel", "-u", "root", "--signal=KILL", "--full"], check=False)
        time.sleep(2)
        for server in reversed(running):
            server.terminate()
            server.wait()


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def submit(name, body, *options):
    Path(f"{name}.sh").write_text(f"#!/bin/bash\n{body}\n")
    output("sbatch", "-o", f"{name}.out", *options, f"{name}.sh")


def wait(condition, limit_s):
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(1)


def received(name, before, limit_s=55):
    """What the Python program of a job noted in its first run: signals, those of the first `limit_s` seconds as `before`."""
    path = Path(f"{name}.log")
    if not path.exists():
        return "Python never ran"
    lines = [line.split() for line in path.read_text().splitlines()]
    starts = [at for at, (_, what) in enumerate(lines) if what == "start"] + [len(lines)]
    seen = [(float(at) < limit_s, what) for at, what in lines[: starts[1]] if what.startswith("SIG")]
    parts = []
    for early, when in ((True, before), (False, "at the limit")):
        if names := sorted({what for soon, what in seen if soon == early}):
            parts.append(f"{' and '.join(names)} {when}")
    return ", then ".join(parts) or f"no signal, {'killed' if float(lines[-1][0]) < LASTS_S - 5 else 'ended by itself'}"


RANKS = {
    "srun -n 2 python": "srun -n 2 {python} {script}",
    "the same, RANK and WORLD_SIZE set": (
        "MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 srun -n 2 bash -c "
        "'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec {python} {script}'"
    ),
    "srun -n 1 torchrun": "srun -n 1 -c 2 {python} -m torch.distributed.run --standalone --nproc-per-node=2 {script}",
}
TYPED = {
    "`python train.py` in the script, `--signal=TERM@30`": ("{run}", "--signal=TERM@30"),
    "`python train.py` in the script, `--signal=B:TERM@30`": ("{run}", "--signal=B:TERM@30"),
    "`srun python train.py`, `--signal=TERM@30`": ("srun {run}", "--signal=TERM@30"),
    "`exec python train.py`, `--signal=B:TERM@30`": ("exec {run}", "--signal=B:TERM@30"),
    "`exec python train.py`, no `--signal`": ("exec {run}",),
}
GRACE_S = 20
PREEMPTED = {f"`{word}python train.py`, preempted": word + "{run}" for word in ("", "exec ", "srun ")}
signals = Table("slurm-signals", ["In the batch script, with `--time=1`"], [*TYPED, *PREEMPTED])
ranks = Table("slurm-ranks", ["What two tasks read of 40 records", *(f"`{how}`" for how in RANKS)])


@signals.add("What Python receives (Slurm 22.05.8, `proctrack/cgroup`)", [])
def what_arrives():
    with cluster() as started:
        if not started:
            return []
        Path("noting.py").write_text(NOTING.replace("{lasts}", str(LASTS_S)))

        def command(name):
            return f"{sys.executable} {os.getcwd()}/noting.py {os.getcwd()}/{name}.log"

        for number, (body, *options) in enumerate(TYPED.values()):
            submit(f"limit{number}", body.format(run=command(f"limit{number}")), "--time=1", *options)
        wait(lambda: not output("squeue", "-h"), 180)
        cells = [received(f"limit{number}", "before the limit") for number in range(len(TYPED))]
        for number, body in enumerate(PREEMPTED.values()):
            submit(f"low{number}", body.format(run=command(f"low{number}")), "--time=5", "-p", "low", "--requeue")
        wait(lambda: all(Path(f"low{number}.log").exists() for number in range(len(PREEMPTED))), 60)
        time.sleep(3)
        submit("high", "sleep 1", "-p", "high", "--time=5", "-n", "16")
        wait(lambda: Path("high.out").exists(), 120)
        return cells + [received(f"low{number}", f"{GRACE_S} s before the kill", 1000) for number in range(len(PREEMPTED))]


def elements(which):
    with cluster() as started:
        if not started:
            return []
        values = " ".join(f"$SLURM_ARRAY_TASK_{name}" for name in "ID COUNT MIN MAX".split())
        submit("array", f"echo {values} > {os.getcwd()}/element-$SLURM_ARRAY_TASK_ID", f"--array={which}", "--time=1")
        wait(lambda: Path("element-3").exists() and not output("squeue", "-h"), 60)
        task, count, low, high = Path("element-3").read_text().split()
        return [f"element {task} has COUNT {count}, MIN {low}, MAX {high}"]


def shares(script):
    """How many records each of two tasks reads, for each of RANKS; `script` prints it in one line."""
    with cluster() as started:
        if not started:
            return []
        Path("counting.py").write_text(script)
        cells = []
        for launcher in RANKS.values():
            command = launcher.format(python=sys.executable, script="counting.py")
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            counts = sorted(line for line in done.stdout.splitlines() if line.startswith("reads "))
            error = [line for line in done.stderr.splitlines() if "Error: " in line]
            cells.append(", ".join(line.removeprefix("reads ") for line in counts) or error[0].rpartition("Error: ")[2])
        return cells


WEBDATASET = [IMAGEFEED, "--no-deps webdataset==1.0.2", "braceexpand==0.1.7"]


@ranks.add("webdataset 1.0.2, `WebDataset(shardshuffle=False)`, 4 shards", WEBDATASET)
def webdataset_shares():
    for shard in range(4):
        with tarfile.open(f"shard-{shard}.tar", "w") as tar:
            for record in range(10):
                entry = tarfile.TarInfo(f"{shard}{record}.cls")
                entry.size = 1
                tar.addfile(entry, io.BytesIO(b"0"))
    return shares(
        "import webdataset\n"
        "dataset = webdataset.WebDataset('shard-{0..3}.tar', shardshuffle=False, nodesplitter=webdataset.split_by_node)\n"
        "print('reads', sum(1 for _ in dataset))\n"
    )


@ranks.add("torch 2.13.0, `DistributedSampler`, after `init_process_group`", [IMAGEFEED])
def sampler_shares():
    return shares(
        "import torch, torch.distributed\n"
        "torch.distributed.init_process_group('gloo')\n"
        "print('reads', len(torch.utils.data.DistributedSampler(torch.arange(40))))\n"
        "torch.distributed.barrier()\n"
    )


@ranks.add("imagefeed, `ImageLoader`", [IMAGEFEED])
def own_shares():
    import numpy as np
    from PIL import Image

    import imagefeed

    for number in range(40):
        folder = Path(f"raw/train/class{number % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(folder / f"{number}.png")
    imagefeed.build("raw", "packed", size=32, workers=1)
    return shares(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "import imagefeed\n"
        "with imagefeed.ImageLoader('packed', 'train', crop_size=32, batch_size=1, num_threads=1) as loader:\n"
        "    print('reads', sum(len(images) for images, _ in loader))\n"
    )
