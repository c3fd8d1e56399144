"""Hugging Face's Accelerate."""

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, VAL, page, planned, run


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pages_program_sees_each_record_once_and_resumes(root, seen, tmp_path, ranks):
    code = page("Accelerate", root, ranks).replace("Accelerator()", "Accelerator(cpu=True)")
    evaluated = """
ids = [accelerator.gather_for_metrics((batch.ids, batch.valid)) for batch in val]
ids = torch.cat([ids[valid] for ids, valid in ids]).tolist()
assert sorted(ids) == list(range(len(val.dataset))), ids
"""
    printed = run(code + evaluated, tmp_path, ranks)
    assert seen.check_training(2) == planned(root, 2)
    assert printed.count(f"of {VAL} images") == 2
    seen.skip()
    run(code, tmp_path, ranks)  # goes on after step 4 of the second epoch
    assert seen.batches("train") == planned(root, 2)[STEPS + 4 :]


def train_loader(root) -> ImageLoader:
    return ImageLoader(root, "train", BATCH, crop_size=SIZE)


@pytest.mark.parametrize("stateful", [False, True])
def test_preparing_leaves_the_loader_as_it_is(root, stateful):
    pytest.importorskip("torchdata") if stateful else None
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful))
    with train_loader(root) as loader:
        assert accelerator.prepare(loader) is loader
        assert [batch.ids.tolist() for batch in loader] == planned(root)


def test_skipping_batches_leaves_the_others(root):
    with train_loader(root) as loader:
        skipped = skip_first_batches(Accelerator(cpu=True).prepare(loader), 2)
        assert [batch.ids.tolist() for batch in skipped] == planned(root, 2)[2:STEPS]
        assert len(skipped) == STEPS - 2
        assert [batch.ids.tolist() for batch in loader] == planned(root, 2)[STEPS:]


SKIPPED = """
import torch
from accelerate import Accelerator, skip_first_batches
from imagefeed import ImageLoader

accelerator = Accelerator(cpu=True)
with ImageLoader({root!r}, "train", {batch}, crop_size={size}) as loader:
    for images, labels in skip_first_batches(accelerator.prepare(loader), 2):
        functional.cross_entropy(net(images), labels)
"""


def test_a_loader_made_of_its_parts_is_not_sharded_a_second_time(root, seen, tmp_path):
    run(SKIPPED.format(root=str(root), batch=BATCH // 2, size=SIZE), tmp_path, ranks=2)
    assert seen.batches("train") == planned(root)[2:]


def test_a_data_loader_of_its_dataset_is_sharded_by_accelerate(root):
    """For programs that want single images: the dataset is a map-style one like any other."""
    with train_loader(root) as loader:
        images = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(loader.dataset, 10, collate_fn=list))
        assert [label for batch in images for _, label in batch] == list(range(100))
