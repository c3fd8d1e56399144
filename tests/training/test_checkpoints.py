import random
import resource
import shutil
import signal

import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import owner
from imagefeed.training.checkpoints import (
    Corrupt,
    load_checkpoint,
    load_latest,
    newest_first,
    readable,
    refuse_difference,
    run_folder,
    save_checkpoint,
)


def state(step: int) -> dict[str, object]:
    weights = torch.arange(5000.0) + step
    return {"made_with": {"net": "AlexNet"}, "progress": {"step": step}, "model": {"weights": weights}}


def test_the_newest_checkpoint_is_found_with_its_contents(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, state(step))
    found = load_latest(tmp_path)
    assert found["progress"] == {"step": 100} and torch.equal(found["model"]["weights"], state(100)["model"]["weights"])


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]


def test_another_number_can_be_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    assert [path.name[-4:-3] for path in newest_first(tmp_path)] == ["5", "4", "3"]
    save_checkpoint(tmp_path, 6, state(6), keep=1)
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-00000006.pt"]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert load_latest(tmp_path) is None


def test_half_a_checkpoint_never_carries_a_final_name(tmp_path):
    """Pickling fails in the middle of the file; the checkpoint before stays the newest."""
    save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, 2, state(2) | {"random": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_corrupt_checkpoint_is_skipped_with_a_sentence(tmp_path, capsys, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step))
    newest = newest_first(tmp_path)[0]
    data = newest.read_bytes()
    newest.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": bytes(1000)}[damage])
    assert load_latest(tmp_path)["progress"] == {"step": 1}
    said = capsys.readouterr().err
    assert said.startswith(f"{newest}: corrupt (") and said.endswith("); skipped\n") and said.count("\n") == 1


@pytest.mark.parametrize("set_aside", [True, False])
def test_corrupt_newer_checkpoints_do_not_displace_whole_ones(tmp_path, capsys, set_aside):
    """A run that resumes from step 3 writes step 4 beside corrupt ones of steps 5 and 6."""
    for step in (2, 3):
        save_checkpoint(tmp_path, step, state(step))
    for step in (5, 6):
        (tmp_path / f"checkpoint-{step:08d}.pt").write_bytes(b"")
    assert load_latest(tmp_path, set_aside)["progress"] == {"step": 3}
    said = capsys.readouterr().err
    assert ("skipped and renamed to checkpoint-00000006.pt.corrupt\n" in said) == set_aside
    assert (tmp_path / "checkpoint-00000006.pt.corrupt").exists() == set_aside
    save_checkpoint(tmp_path, 4, state(4))
    assert [path.name for path in newest_first(tmp_path)][-2:] == ["checkpoint-00000004.pt", "checkpoint-00000003.pt"]
    assert load_latest(tmp_path)["progress"] == {"step": 4}


def test_two_trainings_do_not_share_a_run_folder(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with run_folder(run_dir):
        with pytest.raises(UserError, match="another training is writing into it; wait, or choose another --run-dir"):
            with run_folder(run_dir):
                pass
    with run_folder(run_dir):
        save_checkpoint(run_dir, 1, state(1))


def test_files_that_a_killed_training_left_half_written_are_deleted(tmp_path):
    left = tmp_path / f".checkpoint-00000001.pt.{owner()}.0123abcd.tmp"
    left.write_bytes(b"half")
    with run_folder(tmp_path):
        assert not left.exists()


def test_malformed_values_are_one_sentence(tmp_path):
    for theirs in ({}, None, [1]):
        with pytest.raises(UserError, match="not a checkpoint that imagefeed train can use"):
            with readable(tmp_path):
                refuse_difference(theirs, {"net": "AlexNet"}, tmp_path, "use the same options")


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path):
    """Only some padding and header fields of a zip file do not matter."""
    save_checkpoint(tmp_path, 1, state(1))
    (path,) = newest_first(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    found = 0
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            found += 1
        else:
            assert loaded["progress"] == {"step": 1}
            assert torch.equal(loaded["model"]["weights"], state(1)["model"]["weights"])
    assert found > 80


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_silently_start_over(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    newest_first(tmp_path)[0].write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="all of its checkpoints are corrupt; restore one, or delete them to start over"):
            load_latest(tmp_path, set_aside=True)


def test_files_of_other_programs_are_refused_not_skipped(tmp_path):
    path = tmp_path / "checkpoint-00000001.pt"
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a checkpoint of imagefeed train; choose one that it wrote"):
        load_latest(tmp_path)
    torch.save(torch.nn.Linear(1, 1), path)  # code to be run on loading
    with pytest.raises(UserError, match="not a checkpoint of imagefeed train") as error:
        load_latest(tmp_path)
    assert not isinstance(error.value, Corrupt)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    torch.save(state(1) | {"version": 3}, tmp_path / "later.pt")
    with pytest.raises(UserError, match="checkpoint version 3, but this program reads version 2"):
        load_checkpoint(tmp_path / "later.pt")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk."""
    save_checkpoint(tmp_path, 1, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*checkpoint-00000002.pt'"):
            save_checkpoint(tmp_path, 2, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]
    assert load_latest(tmp_path)["progress"] == {"step": 1}


def test_a_difference_is_named_with_both_values(tmp_path):
    theirs = {"net": "AlexNet", "classes": 10, "--batch-size": 128}
    refuse_difference(theirs, dict(theirs), tmp_path, "use the same options")
    with pytest.raises(UserError, match=f"{tmp_path}: the checkpoint has 10 classes, this dataset 3; use the"):
        refuse_difference(theirs, theirs | {"classes": 3}, tmp_path, "use the same options")


def test_a_copy_elsewhere_can_be_read(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    copy = shutil.copy(newest_first(tmp_path)[0], tmp_path / "copy.pt")
    assert torch.equal(load_checkpoint(copy)["model"]["weights"], state(1)["model"]["weights"])
