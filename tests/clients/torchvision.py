"""The two loops of torchvision's references/classification/train.py, without its logger."""

# ruff: noqa: F401, I001
import warnings

import tests.clients.vision

import torch
import torchvision
from torch import distributed, nn

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, TRAIN, VAL, loss, planned, run


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch):
    model.train()
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        output = model(image)
        found = criterion(output, target)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()


def reduce_across_processes(val):
    if not (distributed.is_available() and distributed.is_initialized()):
        return torch.tensor(val)
    t = torch.tensor(val)
    distributed.barrier()
    distributed.all_reduce(t)
    return t


def evaluate(model, criterion, data_loader, device):
    model.eval()
    num_processed_samples = 0
    with torch.inference_mode():
        for image, target in data_loader:
            image, target = image.to(device, non_blocking=True), target.to(device, non_blocking=True)
            output = model(image)
            criterion(output, target)
            batch_size = image.shape[0]
            num_processed_samples += batch_size
    num_processed_samples = reduce_across_processes(num_processed_samples)
    if (
        hasattr(data_loader.dataset, "__len__")
        and len(data_loader.dataset) != num_processed_samples
        and (not distributed.is_initialized() or distributed.get_rank() == 0)
    ):
        warnings.warn(
            f"It looks like the dataset has {len(data_loader.dataset)} samples, but {num_processed_samples} "
            "samples were used for the validation, which might bias the results.",
            stacklevel=1,
        )
    return num_processed_samples


def both_loops(root, ranks: int = 1) -> None:
    train = ImageLoader(root, "train", BATCH // ranks, crop_size=SIZE, mean="imagenet", std="imagenet")
    val = ImageLoader(root, "val", BATCH // ranks, crop_size=SIZE, views="center", mean="imagenet", std="imagenet")
    model = nn.Sequential(torchvision.models.resnet18(num_classes=TRAIN))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(2):
        if distributed.is_initialized():
            train.sampler.set_epoch(epoch)
        train_one_epoch(model, loss, optimizer, train, torch.device("cpu"), epoch)
        print("evaluated:", int(evaluate(model, loss, val, torch.device("cpu"))))


def test_both_loops_see_each_record_once(root, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both_loops(root)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)


def test_over_ranks_the_loop_itself_says_that_padding_was_counted(root, seen, tmp_path):
    """It knows no `valid`, as with the DataLoader and the sampler that it comes with."""
    code = f"""
import torch
from tests.clients import torchvision
torch.distributed.init_process_group("gloo")
torchvision.both_loops({str(root)!r}, 2)
"""
    printed = run(code, tmp_path, ranks=2)
    assert seen.check_training(2) == planned(root, 2)
    assert printed.count("evaluated: 48") == 4 and f"the dataset has {VAL} samples, but 48" in printed
