"""PyTorch Lightning's Trainer."""

import pytest
import pytorch_lightning as pl
import torch

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, Net, loss, page, planned, record, run

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        images, labels = batch
        return loss(self.net(images), labels)

    def validation_step(self, batch, index):
        record("sanity" if self.trainer.sanity_checking else "val", batch.labels[batch.valid])

    def predict_step(self, batch, index):
        record("predict", batch.labels[batch.valid])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loaders(root, ranks: int = 1, **options) -> tuple[ImageLoader, ImageLoader]:
    options = {"crop_size": SIZE, "batch_size": BATCH // ranks} | options
    return ImageLoader(root, "train", **options), ImageLoader(root, "val", views="center", **options)


def fit(root, folder, ranks: int = 1, **options) -> pl.Trainer:
    trainer = pl.Trainer(default_root_dir=folder, devices=ranks, **QUIET | {"enable_checkpointing": False} | options)
    trainer.fit(Classifier(), *loaders(root, ranks))
    return trainer


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pages_program_sees_each_record_once(root, seen, tmp_path, ranks):
    options = QUIET | {"devices": ranks, "num_sanity_val_steps": 0}
    code = page("Lightning", root, ranks).replace("max_epochs=2", f"max_epochs=2, **{options}")
    run(code.replace("self.log(", "record('val', batch.labels[batch.valid])\n        self.log("), tmp_path)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)


def test_sanity_check_and_limits_take_nothing_from_the_epochs(root, seen, tmp_path):
    fit(root, tmp_path, max_epochs=2)
    seen.check_training(2)
    seen.check_evaluation(2)
    assert len(seen.batches("sanity")) == 2
    seen.skip()
    fit(root, tmp_path, max_epochs=3, limit_val_batches=2, limit_train_batches=4, num_sanity_val_steps=0)
    assert seen.batches("val") == 3 * [list(range(BATCH)), list(range(BATCH, 2 * BATCH))]
    whole = planned(root, 3)
    assert seen.batches("train") == [ids for epoch in range(3) for ids in whole[epoch * STEPS : epoch * STEPS + 4]]


def test_validation_inside_an_epoch_sees_everything(root, seen, tmp_path):
    fit(root, tmp_path, max_epochs=1, val_check_interval=2)
    assert seen.check_training(1) == planned(root)
    seen.check_evaluation(3)


@pytest.mark.parametrize("steps", [2, STEPS + 3])
def test_resume_inside_an_epoch_sees_what_was_left(root, seen, tmp_path, steps):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=steps, filename="{step}", save_top_k=-1)
    fit(root, tmp_path, max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint])
    before = seen.batches("train")
    seen.skip()
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=2, **QUIET)
    trainer.fit(Classifier(), *loaders(root), ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert before + seen.batches("train") == planned(root, 2)


def test_predicting_takes_an_iterator(root, seen, tmp_path):
    trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
    _, val = loaders(root)
    with pytest.raises(TypeError, match="give it `iter.loader.`"):
        trainer.predict(Classifier(), val)
    trainer.predict(Classifier(), iter(val))
    seen.check_evaluation(phase="predict")


def test_overfitting_ends_with_a_sentence(root, seen, tmp_path):
    with pytest.raises(TypeError, match="makes a DataLoader of its own"):
        fit(root, tmp_path, max_epochs=2, overfit_batches=2)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
def test_two_ranks_share_each_batch(root, seen, tmp_path, strategy):
    """The loaders are made before there are ranks, and handed to fit."""
    code = f"""
import pytorch_lightning as pl
from tests.clients import lightning
if __name__ == "__main__":
    lightning.fit({str(root)!r}, {str(tmp_path)!r}, 2, max_epochs=2, strategy={strategy!r})
"""
    run(code, tmp_path)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
    assert sum(map(len, seen.batches("sanity"))) == 2 * BATCH
