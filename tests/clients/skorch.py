"""skorch's NeuralNet: the dataset is what it is fitted to, and the loader makes the batches of it."""

import torch
from skorch import NeuralNet
from skorch.helper import predefined_split

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, TRAIN, VAL, Net, loss, planned


class Criterion(torch.nn.Module):
    def forward(self, logits, labels):
        return loss(logits, labels)


def test_fit_and_evaluation_see_each_record_once(root, seen):
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center")
    net = NeuralNet(
        Net,
        criterion=Criterion,
        max_epochs=2,
        train_split=predefined_split(val.dataset),
        iterator_train=lambda dataset, batch_size: train,
        iterator_valid=lambda dataset, batch_size: val,
        verbose=0,
    )
    net.fit(train.dataset)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
    assert net.predict(val.dataset).shape == (VAL, TRAIN)
