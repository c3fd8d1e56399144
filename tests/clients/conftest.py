"""The dataset that the clients read, and the notes of what they saw."""

import pytest

from tests.clients.records import TRAIN, VAL, Seen
from tests.conftest import jpeg, pack, picture


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A dataset in which each record is of a class of its own."""
    splits = {"train": range(TRAIN), "val": range(1000, 1000 + VAL)}
    jpegs = {split: [jpeg(picture(seed, 64, 64)) for seed in seeds] for split, seeds in splits.items()}
    classes = tuple(f"class {number:03}" for number in range(TRAIN))
    return pack(tmp_path_factory.mktemp("clients") / "data", jpegs, size=64, classes=classes).root


@pytest.fixture
def seen(tmp_path, monkeypatch) -> Seen:
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    return Seen(tmp_path / "seen.jsonl")
