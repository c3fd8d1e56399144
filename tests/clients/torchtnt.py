"""torchtnt's fit."""

import torch
from torchtnt.framework.fit import fit
from torchtnt.framework.unit import EvalUnit, TrainUnit

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, Net, loss, planned


class Unit(TrainUnit, EvalUnit):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def train_step(self, state, data):
        images, labels = data
        loss(self.net(images), labels).backward()

    def eval_step(self, state, data):
        images, labels = data
        loss(self.net(images), labels)


def test_fit_and_evaluation_see_each_record_once(root, seen):
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center")
    fit(Unit(), train, val, max_epochs=2)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
    seen.skip()
    fit(Unit(), train, val, max_epochs=3, max_eval_steps_per_epoch=2)
    assert seen.batches("val") == 3 * [list(range(BATCH)), list(range(BATCH, 2 * BATCH))]
    assert torch.is_grad_enabled()
