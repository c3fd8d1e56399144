"""The two loops of timm's train.py (train_one_epoch and validate), with timm's net, optimizer and meters."""

# ruff: noqa: F401, I001
import tests.clients.vision

import timm
import torch
from timm import utils
from timm.optim import create_optimizer_v2

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, TRAIN, VAL, loss, planned


def train_one_epoch(epoch, model, loader, optimizer, loss_fn):
    losses_m = utils.AverageMeter()
    model.train()
    num_batches_per_epoch = len(loader)
    last_batch_idx = num_batches_per_epoch - 1
    updates = 0
    optimizer.zero_grad()
    for batch_idx, (input, target) in enumerate(loader):
        last_batch = batch_idx == last_batch_idx
        output = model(input)
        found = loss_fn(output, target)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses_m.update(found.item(), input.size(0))
        updates += last_batch
    return losses_m, updates


def validate(model, loader, loss_fn):
    losses_m, top1_m = utils.AverageMeter(), utils.AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            output = model(input)
            if isinstance(output, tuple | list):
                output = output[0]
            found = loss_fn(output, target)
            acc1, _ = utils.accuracy(output, target, topk=(1, 5))
            losses_m.update(found.item(), input.size(0))
            top1_m.update(acc1.item(), output.size(0))
    return losses_m, top1_m


def test_both_loops_see_each_record_once(root, seen):
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE, mean="imagenet", std="imagenet")
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center", mean="imagenet", std="imagenet")
    model = timm.create_model("test_resnet", num_classes=TRAIN)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    for epoch in range(2):
        if hasattr(train.sampler, "set_epoch"):  # as train.py does over several ranks
            train.sampler.set_epoch(epoch)
        losses, updates = train_one_epoch(epoch, model, train, optimizer, loss)
        assert (losses.count, updates) == (STEPS * BATCH, 1)
        _, top1 = validate(model, val, loss)
        assert top1.count == VAL
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
