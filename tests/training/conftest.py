"""Finished runs that several tests look at: training takes most of their time."""

import shutil
from pathlib import Path

import pytest

from imagefeed.dataset.manifest import Manifest
from tests.conftest import jpeg, pack, picture
from tests.training.runs import ONE_STEP, run


@pytest.fixture
def run_dir(tmp_path):
    """Emptied at the end: a checkpoint is 160 MB."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def trained(out: Path, folder: Path, *options: object):
    result = run(out, folder, *options)
    assert result.exit_code == 0, result.output
    yield folder, result.output
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Folder and output of an uninterrupted run of two epochs."""
    yield from trained(tiny.root, tmp_path_factory.mktemp("finished") / "run")


OWT = "--recipe fast --warmup-epochs 0 --model alexnet-owt --crop-size 96 --dropout 0.2 --mean image --std dataset".split()
OWT += ["--shuffle", "blocks", "--seed", "1", *ONE_STEP]


@pytest.fixture(scope="session")
def owt(tiny, tmp_path_factory):
    """Folder and output of a run of one step of another net, on other crops, with other images."""
    yield from trained(tiny.root, tmp_path_factory.mktemp("owt") / "run", *OWT)


@pytest.fixture(scope="session")
def unvalidated(tmp_path_factory) -> Manifest:
    """16 records without a validation split."""
    return pack(tmp_path_factory.mktemp("unvalidated") / "data", {"train": [jpeg(picture(seed)) for seed in range(16)]})
