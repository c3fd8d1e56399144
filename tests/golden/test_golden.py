"""What the code stored, planned and fed before it became the package imagefeed (commit 045991c), it does today.

golden.json holds the hashes, which recorded.py defines. Where a value is marked as not portable, other processors may round
otherwise; it is compared only on the kind of machine, and with the versions, that it was recorded with.
"""

import functools
import json
import os
from pathlib import Path

import pytest

from tests.golden.recorded import (
    build,
    build_by_command,
    of_batches,
    of_dataset,
    of_order,
    of_plan,
    of_tree,
    open_loader,
    stored,
    versions,
    write_raw,
)

DATA = Path(__file__).parent
GOLDEN = json.loads((DATA / "golden.json").read_text())
TINY = DATA / "dataset-v1"
BESIDE = [up / "shared" / "data" for up in Path(__file__).resolve().parents[2:4]]
SHARED = Path(os.environ.get("IMAGEFEED_SHARED") or next(filter(Path.is_dir, BESIDE), BESIDE[0]))


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    mine, theirs = versions(), GOLDEN["versions"]
    others = [name for name in mine.keys() | theirs if "libjpeg" in name or "pillow" in name or name == "numpy"]
    if any(mine.get(name) != theirs.get(name) for name in others):
        pytest.skip("another numpy or Pillow than the sample was drawn with")
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Gives the dataset of a folder of photos beside the project."""

    @functools.cache
    def built(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"{name} is not beside the project")
        return build_by_command(SHARED / name, tmp_path_factory.mktemp(name) / "out", *GOLDEN["datasets"][name]["build"])

    return built


@pytest.fixture(scope="session")
def oblong(raw, tmp_path_factory) -> Path:
    golden = GOLDEN["datasets"]["short"]
    return build(raw / golden["raw"], tmp_path_factory.mktemp("oblong") / "out", **golden["build"])


def same_machine() -> bool:
    return versions().items() >= GOLDEN["versions"].items()  # builds name more libraries now


def check_dataset(root: Path, name: str) -> None:
    golden = GOLDEN["datasets"][name]
    found, expected = of_dataset(root), {key: golden[key] for key in ("files", "statistics", "manifest")}
    expected["files"] = expected["files"] | {"dataset.json": "present"}
    if not same_machine():  # statistics.npz holds eigenvectors
        for part in (found, expected):
            part["files"] = part["files"] | {"statistics.npz": "present"}
            part["statistics"] = part["statistics"] | dict.fromkeys(("eigenvalues", "eigenvectors"), "present")
    assert found == expected


def check_batches(root: Path, golden: dict, state: dict | None = None) -> None:
    with open_loader(root, golden["arguments"]) as loader:
        if state:
            loader.load_state_dict(state)
        found = of_batches(loader, golden["steps"])
    assert found["order"] == golden["order"]
    assert found["pixels"] == golden["pixels"] or not (golden["portable"] or same_machine())


def named(cases: list[dict]) -> list:
    """Each with its arguments as its name."""
    return [pytest.param(case, id=" ".join(f"{key}={value}" for key, value in case["arguments"].items())) for case in cases]


def of(*datasets: str) -> list:
    return named([case for case in GOLDEN["batches"] if case["dataset"] in datasets])


def test_the_same_sample_is_drawn(raw):
    assert of_tree(raw / "drawn") == GOLDEN["sample"]


@pytest.mark.parametrize("name", ["plain", "short", "fine", "split", "tables", "tar"])
def test_the_same_images_and_options_give_the_same_dataset(raw, name, tmp_path):
    golden = GOLDEN["datasets"][name]
    check_dataset(build(raw / golden["raw"], tmp_path / "out", **golden["build"]), name)


@pytest.mark.parametrize("name", ["imagenet-sample", "clothing"])
def test_the_same_photos_give_the_same_dataset(shared, name):
    check_dataset(shared(name), name)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_of_version_1_is_read(split):
    assert list(stored(TINY, split)) == [GOLDEN["tiny"][split][key] for key in ("labels", "jpegs")]


@pytest.mark.parametrize("case", of("tiny"))
def test_the_same_seed_gives_the_same_batches(case):
    check_batches(TINY, case)


@pytest.mark.parametrize("case", of("short"))
def test_the_same_seed_gives_the_same_batches_of_oblong_images(oblong, case):
    check_batches(oblong, case)


@pytest.mark.parametrize("case", of("imagenet-sample", "clothing"))
def test_the_same_seed_gives_the_same_batches_of_photos(shared, case):
    check_batches(shared(case["dataset"]), case)


@pytest.mark.parametrize("saved", GOLDEN["states"])
def test_a_saved_position_goes_on_with_the_same_batches(saved):
    for case in saved["then"]:
        check_batches(TINY, case, saved["state"])


@pytest.mark.parametrize("case", named(GOLDEN["plans"]))
def test_the_plan_of_a_step_is_the_same(case):
    found = of_plan(case["arguments"], case["epoch"], case["step"])
    assert found == {key: case[key] for key in found}


@pytest.mark.parametrize("case", GOLDEN["orders"])
def test_the_order_of_an_epoch_is_the_same(case):
    assert of_order(case["arguments"]) == case["ids"]
