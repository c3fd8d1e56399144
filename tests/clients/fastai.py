"""fastai's Learner."""

# ruff: noqa: F401, I001
import tests.clients.vision

from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.callback import schedule  # gives Learner fit_one_cycle and lr_find

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, Net, loss, planned


def test_finding_a_rate_takes_nothing_from_the_fit(root, seen, tmp_path):
    train = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    val = ImageLoader(root, "val", BATCH, crop_size=SIZE, views="center")
    learner = Learner(DataLoaders(train, val), Net(), loss_func=loss, path=tmp_path)
    with learner.no_bar(), learner.no_logging():
        learner.lr_find(num_it=STEPS + 4, show_plot=False, stop_div=False)
        assert seen.batches("train") == planned(root, 2)[: STEPS + 4]
        seen.skip()
        train.set_epoch(0)
        learner.fit_one_cycle(2)
    assert seen.check_training(2) == planned(root, 2)
    seen.check_evaluation(2)
    seen.skip()
    learner.validate()
    seen.check_evaluation()
