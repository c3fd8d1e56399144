"""Installs what imagefeed is measured against into a virtual environment of its own, as far as it can be installed.

    python -m benchmarks.peers .venv-peers

Plain Pillow cannot live beside Pillow-SIMD, and mosaicml-streaming wants an older numpy: hence a place of their own. torch, and
whatever else need not differ, is taken from this environment, so that both sides run the same; but if that torch was built
without CUDA, torchvision's wheel cannot be loaded with it, and the same version with CUDA is installed too (4 GB). What cannot
be installed or imported is named in peers.json there, with the reason.
"""

import json
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import click

# By import name. Each is installed by itself, so that a failure leaves the others alone. FFCV is compiled here: it needs a C++
# compiler, pkg-config, and the headers of OpenCV and libjpeg-turbo; SPDL loads FFmpeg's libraries
# (apt-get install pkg-config libopencv-dev libturbojpeg0-dev ffmpeg libavdevice59, or another number).
PEERS = {
    "PIL": ["pillow==13.0.0"],
    "cv2": ["opencv-python-headless==4.14.0.94"],
    "ffcv": ["ffcv==1.0.2", "numba==0.68.1"],
    "webdataset": ["webdataset==0.2.111"],
    "litdata": ["litdata==0.2.76"],
    "streaming": ["mosaicml-streaming==0.13.0"],
    "spdl": ["spdl==0.8.0"],
    "img2dataset": ["img2dataset==1.47.0"],
    "kornia_rs": ["kornia-rs==0.2.0"],
    "imagecodecs": ["imagecodecs==2026.3.6"],
    "pyvips": ["pyvips[binary]==3.2.0"],
    "tensorflow": ["tensorflow-cpu==2.21.0"],
}
REPORT = "peers.json"


def why(output: str) -> str:
    """Why pip or Python failed: its last line about an error other than that a command failed."""
    if "NewConnectionError" in output:
        return "no package index can be reached"
    lines = [line.strip() for line in output.splitlines()]
    errors = [line for line in lines if "rror:" in line and "subprocess-exited" not in line and "Failed to build" not in line]
    return errors[-1][:200] if errors else "it fails without a reason"


def left_out(python: str) -> dict[str, str]:
    """The peers that could not be installed for that Python, and why; empty if it was not made here."""
    report = Path(python).parent.parent / REPORT
    return json.loads(report.read_text()) if report.exists() else {}


def why_missing(python: str, error: str) -> str:
    """Why a row cannot run with that Python: the error of its import, or why the package could not be installed."""
    return left_out(python).get(error.rpartition("No module named ")[2].strip("'"), error)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Install the peers into FOLDER."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Its own packages come first on the path; pip takes those of this environment as installed.
    (packages / "imagefeed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    release, _, build = metadata.version("torch").partition("+")
    wanted = {"torch": [f"torch==={release}"]} if build == "cpu" else {}
    pinned = f"torch==={release if wanted else metadata.version('torch')}"
    constraints = folder / "constraints.txt"
    constraints.write_text(f"numpy<2.2\n{pinned}\n")  # mosaicml-streaming 0.13.0 asks for the first
    failed = {}
    for name, requirements in (wanted | PEERS).items():
        pip = [python, "-m", "pip", "install", "-q", "-c", constraints, *requirements]
        for command in (pip, [python, "-c", f"import {name}"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                failed[name] = why(done.stdout)
                break
        print(f"{name}: {failed.get(name, 'installed')}", flush=True)
    (folder / REPORT).write_text(json.dumps(failed, indent=1) + "\n")


if __name__ == "__main__":
    main()
