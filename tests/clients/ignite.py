"""PyTorch-Ignite's engines."""

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy, Loss

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, VAL, Net, loss, planned


def test_fit_and_evaluation_see_each_record_once(root, seen):
    net = Net()
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center")
    trainer = create_supervised_trainer(net, torch.optim.SGD(net.parameters(), 0.01), loss)
    evaluator = create_supervised_evaluator(net, {"loss": Loss(loss), "accuracy": Accuracy()})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(val))
    trainer.run(train, max_epochs=2)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
    correct = evaluator.state.metrics["accuracy"] * VAL
    assert abs(correct - round(correct)) < 1e-6  # of 42, not of 48
    train.close(), val.close()
