"""torch.distributed.checkpoint: the loader is Stateful."""

import itertools

from torch.distributed import checkpoint
from torch.distributed.checkpoint.stateful import Stateful

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, planned


def test_a_saved_loader_goes_on_at_the_next_batch(root, tmp_path):
    loader = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    assert isinstance(loader, Stateful)
    first = [batch.ids.tolist() for batch in itertools.islice(loader, 2)]
    checkpoint.save({"loader": loader}, checkpoint_id=tmp_path / "saved")
    resumed = ImageLoader(root, "train", BATCH, crop_size=SIZE)
    checkpoint.load({"loader": resumed}, checkpoint_id=tmp_path / "saved")
    assert first + [batch.ids.tolist() for batch in resumed] == planned(root)
