"""MosaicML's Composer."""

# ruff: noqa: F401, I001
import tests.clients.vision

import composer
import torch
from composer.models import ComposerModel

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, Net, loss, planned


class Classifier(ComposerModel):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return loss(outputs, batch[1])

    def eval_forward(self, batch, outputs=None):
        logits = self.forward(batch)
        loss(logits, batch[1])
        return logits

    def get_metrics(self, is_train=False):
        return {}

    def update_metric(self, batch, outputs, metric):
        raise AssertionError("there are no metrics")


def trainer(root, **options) -> composer.Trainer:
    model = Classifier()
    return composer.Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=ImageLoader(root, "train", BATCH, crop_size=SIZE),
        eval_dataloader=ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center"),
        device="cpu",
        progress_bar=False,
        **options,
    )


def test_fit_and_evaluation_see_each_record_once(root, seen):
    trainer(root, max_duration="2ep").fit()
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)


def test_resume_inside_an_epoch_sees_what_was_left(root, seen, tmp_path):
    trainer(root, max_duration=f"{STEPS + 2}ba", save_folder=str(tmp_path), save_interval=f"{STEPS + 2}ba").fit()
    before = seen.batches("train")
    seen.skip()
    trainer(root, max_duration="2ep", load_path=str(tmp_path / "latest-rank0.pt")).fit()
    assert before + seen.batches("train") == planned(root, 2)
