import gc
import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.reader import CorruptRecord
from imagefeed.pipeline.arguments import choose_device, pca_matrix
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.plan import offset
from tests.conftest import CLASSES, crop, jpeg, pack, picture, replace_index, same
from tests.dataset.test_reader import flip_bit


def expected(manifest, loader, position, ids, first=0):
    """The images of a batch as plan, Pillow and numpy give them, (N, V, 3, size, size); `first` is the picture of id 0."""
    statistics = manifest.load_statistics()
    drawn = loader.plan.augmentation(position, ids.numpy())
    images = []
    for n, record_id in enumerate(ids.tolist()):
        data = jpeg(picture(first + record_id))
        color = sum(
            0.1 * np.sqrt(statistics["eigenvalues"][i]) * drawn.color[n, i] * statistics["eigenvectors"][:, i] for i in range(3)
        )
        shift = (color - statistics["channel_mean"])[:, None, None]
        views = zip(offset(drawn.places[:, n], 32), drawn.mirrors[:, n], strict=True)
        images.append([crop(data, *place, mirror) + shift for place, mirror in views])
    return np.array(images)


def stream(loader) -> Iterator[Batch]:
    """Epoch after epoch, without an end."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def fields(batch: Batch) -> tuple:
    return batch.images, batch.labels, batch.ids, batch.valid


def joined(*batches: Batch) -> Batch:
    images, labels, ids, valid = (torch.cat(parts) for parts in zip(*map(fields, batches), strict=True))
    return Batch((images, labels), ids, valid)


def epoch(loader) -> list[Batch]:
    return list(loader)


def equal(some, others) -> bool:
    """Bitwise, every field of every batch."""
    return len(some) == len(others) and all(
        torch.equal(a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(fields(one), fields(other), strict=True)
    )


def test_training_batches_are_the_planned_crops(tiny, device):
    with ImageLoader(tiny, "train", 8, seed=3, device=device) as loader:
        for position, batch in enumerate(itertools.islice(stream(loader), 2 * len(loader))):
            ids, _ = loader.plan.ids(position)
            assert batch.ids.tolist() == ids.tolist()
            assert batch.labels.tolist() == [record_id % 3 for record_id in ids]
            assert batch.valid.all()
            wanted = expected(tiny, loader, position, batch.ids)[:, 0]
            assert all(same(image, right) for image, right in zip(batch.images.cpu(), wanted, strict=True))


@pytest.mark.parametrize("views", ["center", "ten"])
def test_evaluation_batches_are_the_planned_views(tiny, device, views):
    with ImageLoader(tiny, "val", 8, views=views, device=device) as loader:
        for position, batch in enumerate(loader):
            images = batch.images if views == "ten" else batch.images[:, None]
            wanted = expected(tiny, loader, position, batch.ids, first=100)
            assert images.shape == wanted.shape
            assert all(
                same(view, right)
                for record, rights in zip(images.cpu(), wanted, strict=True)
                for view, right in zip(record, rights, strict=True)
            )


def test_batch_is_what_pytorch_takes(tiny, device):
    with ImageLoader(tiny, "train", 4, device=device) as loader:
        images, labels, ids, valid = fields(next(iter(loader)))
    assert (images.dtype, images.shape, images.device.type) == (torch.float32, (4, 3, 224, 224), device)
    assert (labels.dtype, labels.shape, labels.device.type) == (torch.int64, (4,), device)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.int64, (4,), "cpu")
    assert (valid.dtype, valid.shape, valid.device.type) == (torch.bool, (4,), device)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_evaluation_sees_each_record_once_whatever_the_batch_size(tiny, batch_size):
    with ImageLoader(tiny, "val", batch_size, views="center", crop_size=64) as loader:
        for _ in range(2):
            batches = epoch(loader)
            assert len(batches) == len(loader) == -(-23 // batch_size)
            assert all(len(batch.images) == len(batch.labels) == len(batch.ids) == batch_size for batch in batches[:-1])
            assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(23))


def test_last_batch_of_an_evaluation_is_padded_if_asked(tiny):
    with ImageLoader(tiny, "val", 10, views="center", crop_size=64, pad_last=True) as loader:
        *_, last = loader
    assert (len(last.images), last.valid.tolist()) == (10, [True] * 3 + [False] * 7)


def test_training_takes_another_order_in_each_epoch(tiny):
    with ImageLoader(tiny, "train", 10, crop_size=64) as loader:
        first, second = (torch.cat([batch.ids for batch in epoch(loader)]).tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))


def ids_of(batches) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def test_batch_is_rebuilt_and_moved_as_tuples_are(tiny):
    with ImageLoader(tiny, "val", 10, views="center", crop_size=64, keys=("pixel_values", "labels", "ids")) as loader:
        found = next(iter(loader))
        assert list(found) == ["pixel_values", "labels", "ids"] and found["ids"].tolist() == list(range(10))
    with ImageLoader(tiny, "val", 10, views="center", crop_size=64) as loader:
        batch = next(iter(loader))
    images, labels = batch
    rebuilt = type(batch)([images, labels])
    assert isinstance(batch, tuple) and rebuilt.images is images and rebuilt.ids is None
    moved = batch.to("meta")
    assert moved.images.is_meta and moved.labels.is_meta and moved.valid.is_meta and moved.ids is batch.ids
    assert equal([pickle.loads(pickle.dumps(batch))], [batch])
    assert len(torch.utils._pytree.tree_leaves(batch)) == 4


def test_loader_is_what_programs_expect_of_a_data_loader(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=64) as loader:
        assert isinstance(loader, torch.utils.data.DataLoader)
        assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)  # or Lightning and Ray would shard it again
        assert (loader.batch_size, loader.drop_last, loader.num_workers, len(loader.dataset)) == (16, True, 0, 50)
        assert (loader.classes, loader.class_to_idx) == (CLASSES, {name: label for label, name in enumerate(CLASSES)})
        planned = list(loader.batch_sampler)
        assert len(loader.sampler) == 48 and list(loader.sampler) == [number for ids in planned for number in ids]
        assert planned == ids_of(loader) and list(loader.batch_sampler) != planned
        assert "rank" not in repr(loader) and f"ImageLoader({str(tiny.root)!r}, 'train', batch_size=16" in repr(loader)
        # As Accelerate's skip_first_batches and others make a loader of this one's parts.
        again = torch.utils.data.DataLoader(loader.dataset, batch_sampler=planned[1:], collate_fn=loader.collate_fn)
        loader.set_epoch(0)
        whole = epoch(loader)
        assert equal(list(again), whole[1:])
        foreign = torch.utils.data.DataLoader(loader.dataset, batch_size=2, collate_fn=loader.collate_fn)
        with pytest.raises(TypeError, match="put into batches by another program; give `batch_size`"):
            next(iter(foreign))


def test_batch_stays_as_it_was_for_as_long_as_it_is_held(tiny, device):
    """Held past its epoch, other batches and the loader itself."""
    with ImageLoader(tiny, "train", 8, crop_size=64, device=device) as loader:
        held, copies = [], []
        for _ in range(3):
            for batch in loader:
                held.append(batch)
                copies.append(joined(batch))
        for batch in held[1::2]:
            batch.images.zero_()
        with ImageLoader(tiny, "train", 8, crop_size=64, device=device) as again:
            assert equal(epoch(again), copies[:6])
    gc.collect()
    assert equal(held[::2], copies[::2])


def test_images_of_any_shape_are_cropped(oblong):
    with ImageLoader(oblong, "train", 10, pca_jitter=0) as loader:
        assert torch.cat([batch.ids for batch in loader]).sort().values.tolist() == list(range(20))
    with ImageLoader(oblong, "val", 10, views="ten") as loader:
        assert [batch.images.shape for batch in loader] == [(10, 10, 3, 224, 224)] * 2


def test_color_moves_a_record_as_a_whole_and_can_be_off(tiny):
    with ImageLoader(tiny, "train", 8, pca_jitter=0.5) as loud, ImageLoader(tiny, "train", 8, pca_jitter=0) as plain:
        shift = (next(iter(loud)).images - next(iter(plain)).images).flatten(2)
        wanted = loud.plan.augmentation(0, loud.plan.ids(0)[0]).color @ pca_matrix(tiny.load_statistics(), 0.5).T
        assert np.allclose(shift.numpy(), wanted[:, :, None], atol=1e-3)
        assert np.abs(wanted).max() > 5


def test_jitter_has_the_covariance_of_the_pixels(tiny):
    statistics = tiny.load_statistics()
    matrix = pca_matrix(statistics, 0.1)
    assert np.allclose(matrix @ matrix.T, 0.01 * statistics["covariance"])


def test_damaged_record_is_replaced_and_counted(tiny_copy, caplog):
    flip_bit(tiny_copy, "train", 49)
    with ImageLoader(tiny_copy, "train", 10, crop_size=64) as loader:
        ids = torch.cat([batch.ids for batch in loader]).tolist()
    assert sorted(ids) == sorted([*range(49), 0])
    assert loader.corrupt == 1
    assert "record 49 of train" in caplog.text


def test_replacement_of_a_damaged_record_is_not_evaluated_twice(tiny_copy):
    for record_id in (4, 5, 22):
        flip_bit(tiny_copy, "val", record_id)
    with ImageLoader(tiny_copy, "val", 8, views="center", crop_size=64) as loader:
        batches = epoch(loader)
    evaluated = torch.cat([batch.ids[batch.valid] for batch in batches]).tolist()
    assert evaluated == [n for n in range(23) if n not in (4, 5, 22)]
    assert loader.corrupt == 3
    assert not any(set(batch.ids.tolist()) & {4, 5, 22} for batch in batches)


def test_many_damaged_records_in_a_row_end_the_run(tiny_copy):
    for record_id in range(10, 30):
        flip_bit(tiny_copy, "train", record_id)
    with ImageLoader(tiny_copy, "train", 10, crop_size=64) as loader:
        for _ in range(2):
            with pytest.raises(CorruptRecord, match="fails its checksum"):
                epoch(loader)


def test_shard_that_goes_away_reaches_the_caller_as_one_sentence(tiny_copy):
    with ImageLoader(tiny_copy, "train", 10, crop_size=64) as loader:
        (tiny_copy.root / "train-00001-of-00002.tfrecord").unlink()
        for _ in range(2):
            with pytest.raises(UserError, match="train-00001-of-00002.tfrecord: the shard is missing"):
                epoch(loader)
        assert loader.position == 0


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        ("native", r"record 7 of split train cannot be decoded \(Premature end of JPEG file\); run imagefeed verify"),
        ("dali", r"a batch after step \d of split train cannot be decoded \(DALI: nvImageCodec failure"),
    ],
)
def test_record_that_does_not_decode_is_an_error_each_time(tmp_path, decoder, reason):
    """Its checksum is right, so it was packed by something else; neither a hang nor a silent end of the epoch."""
    jpegs = [jpeg(picture(n)) for n in range(12)]
    manifest = pack(tmp_path / "data", {"train": jpegs})
    index = manifest.load_index("train").copy()
    index[7]["length"] = 100
    replace_index(manifest, "train", index)
    with ImageLoader(manifest, "train", 4, views="center", crop_size=64, decoder=decoder) as loader:
        loader.reader.verify_checksums = False
        for _ in range(3):
            with pytest.raises(UserError, match=reason):
                epoch(loader)
            assert loader.position % 3 == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_sentence(tiny):
    with pytest.raises(UserError, match="device cuda: .* use device=cpu"):
        ImageLoader(tiny, "train", 8, device="cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu", "meta"])
def test_device_that_cannot_decode_is_one_sentence(tiny, device):
    with pytest.raises(UserError, match=f"^device {device}: .*; use"):
        ImageLoader(tiny, "train", 8, device=device)


def test_split_without_labels_is_for_evaluation_only(tmp_path):
    jpegs = [jpeg(picture(n)) for n in range(4)]
    manifest = pack(tmp_path / "data", {"test": jpegs}, unlabeled="test")
    with pytest.raises(UserError, match="4 of the 4 records of split test have no label, so it cannot be trained on"):
        ImageLoader(manifest, manifest.train_split, 2, crop_size=64)
    with ImageLoader(manifest, "test", 2, views="center", crop_size=64) as loader:
        assert [batch.labels.tolist() for batch in loader] == [[-1, -1]] * 2


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.parametrize("options", [{}, {"cache": "host"}, {"decoder": "dali"}], ids=str)
def test_neither_epochs_nor_opening_and_closing_take_memory(tiny, options):
    """A batch of 25 is 15 MB, so keeping any would show; the heaps of DALI's threads grow at first, then come and go by 90 MB."""
    with ImageLoader(tiny, "train", 25, **options) as loader:
        for number in range(16):
            for _batch in loader:
                pass
            if number == 3:
                before = resident_mb()
        assert resident_mb() - before < 150
    resident = []
    for _ in range(20):
        with ImageLoader(tiny, "train", 25, prefetch=2, **options) as loader:
            next(iter(loader))
        resident.append(resident_mb())
    assert min(resident[16:]) - min(resident[4:8]) < 150


def test_an_evaluation_skips_a_batch_whose_records_are_all_corrupt(tiny_copy):
    for record_id in (0, 7):
        flip_bit(tiny_copy, "val", record_id)
    with ImageLoader(tiny_copy, "val", 1, views="center", crop_size=32) as loader:
        assert [batch.ids.tolist() for batch in loader] == [[n] for n in range(23) if n not in (0, 7)]


def test_batches_that_are_held_stay_as_they_were_with_a_cache(tiny):
    with ImageLoader(tiny, "train", 8, cache="host", crop_size=32) as loader:
        held = [batch for _ in range(3) for batch in loader]
        copies = [batch.images.clone() for batch in held]
        list(loader)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))
