"""Keras 3 on PyTorch."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, TRAIN, VAL, loss, planned


def noted(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return loss(logits, labels.reshape(-1).long()) if not labels.is_meta else logits.mean()


def test_fit_and_evaluation_see_each_record_once(root, seen):
    model = keras.Sequential([keras.Input((3, SIZE, SIZE)), keras.layers.Flatten(), keras.layers.Dense(TRAIN)])
    model.compile("sgd", noted, metrics=["sparse_categorical_accuracy"])
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center")
    history = model.fit(train, epochs=2, validation_data=val, verbose=0).history
    # Keras looks at a batch before the first epoch, which is why training begins with the next one.
    assert seen.check_training(2) == planned(root, 3)[STEPS:]
    seen.check_evaluation(2)
    correct = history["val_sparse_categorical_accuracy"][0] * VAL
    assert abs(correct - round(correct)) < 1e-4  # of 42, not of 48
    seen.skip()
    assert model.predict(val, verbose=0).shape == (VAL, TRAIN)
    model.evaluate(val, verbose=0)
    seen.check_evaluation()
