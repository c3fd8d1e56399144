"""A loop of one's own, in one process and over two by torchrun (DistributedDataParallel)."""

import pytest

from tests.clients.records import BATCH, SIZE, STEPS, VAL, page, planned, run


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pages_loop_sees_each_record_once(root, seen, tmp_path, ranks):
    printed = run(page("A plain loop", root, ranks), tmp_path, ranks)
    assert seen.check_training(2) == planned(root, 2)
    assert printed.count(f"of {VAL} images") == 2 * ranks
    assert "warning" not in printed.lower()


RESUMED = """
import os, torch
from imagefeed import ImageLoader

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
ranks = int(os.environ.get("WORLD_SIZE", 1))
with ImageLoader({root!r}, "train", {batch} // ranks, crop_size={size}) as loader:
    if {resume}:
        loader.load_state_dict(torch.load("state.pt"))
    for step, (images, labels) in enumerate(loader, start=1):
        functional.cross_entropy(net(images), labels)
        if step == {steps}:
            torch.save(loader.state_dict(), "state.pt")
            break
"""


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_another_number_of_ranks_sees_what_was_left(root, seen, tmp_path, before, after):
    values = {"root": str(root), "batch": BATCH, "size": SIZE}
    run(RESUMED.format(**values, resume=False, steps=2), tmp_path, before)
    first = seen.batches("train")
    seen.skip()
    run(RESUMED.format(**values, resume=True, steps=0), tmp_path, after)
    assert len(first) == 2 and first + seen.batches("train") == planned(root) and len(planned(root)) == STEPS


ALONE = """
import torch
from imagefeed import ImageLoader

torch.distributed.init_process_group("gloo")
with ImageLoader({root!r}, "val", 8, views="center", crop_size={size}) as loader:
    if torch.distributed.get_rank() == 0:
        for images, labels in loader:
            functional.cross_entropy(net(images), labels, "alone")
    torch.distributed.barrier()
with ImageLoader({root!r}, "val", 8, views="center", crop_size={size}, rank=0, world_size=1) as loader:
    if torch.distributed.get_rank() == 0:
        for images, labels in loader:
            functional.cross_entropy(net(images), labels, "whole")
    torch.distributed.barrier()
"""


def test_one_rank_that_evaluates_a_share_is_warned(root, seen, tmp_path):
    printed = run(ALONE.format(root=str(root), size=SIZE), tmp_path, ranks=2)
    assert printed.count("1 of 2 ranks evaluated val, and each sees 1/2 of its records") == 1
    seen.check_evaluation(phase="whole")
