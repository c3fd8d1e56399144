import copy
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import CorruptRecord, Dataset
from imagefeed.pipeline.arguments import choose_device, pca_matrix
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.plan import offset
from tests.conftest import CLASSES, crop, jpeg, pack, picture, replace_index, same
from tests.dataset.test_columns import store_columns
from tests.dataset.test_reader import flip_bit, mapped


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


def test_position_counts_what_was_handed_out(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=64, prefetch=3) as loader:
        assert (len(loader), loader.position) == (3, 0)
        for step, _ in enumerate(loader, start=1):
            assert loader.position == loader.state_dict()["position"] == step
        assert loader.position == 3
        for _ in loader:
            break
        assert (loader.position, loader.epoch, loader.next_epoch) == (4, 1, 2)


def ids_of(batches) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def test_each_loop_begins_an_epoch(tiny):
    """Whatever was left over from the loop before; as torch.utils.data.DataLoader does."""
    with ImageLoader(tiny, "train", 16, crop_size=64) as loader:
        first, second, third = ([loader.plan.ids(epoch * 3 + step)[0].tolist() for step in range(3)] for epoch in range(3))
        iter(loader)  # takes nothing
        assert ids_of(itertools.islice(loader, 2)) == first[:2]
        assert ids_of(loader) == second
        assert ids_of(loader) == third
        loader.set_epoch(0)
        assert ids_of(itertools.islice(loader, 1)) == first[:1]
        state = loader.state_dict()
        assert ids_of(itertools.islice(loader, 1)) == second[:1]
        loader.load_state_dict(state)
        loader.set_epoch(0)  # as trainers do after they restored a state of this epoch
        assert ids_of(loader) == first[1:]
    with ImageLoader(tiny, "val", 10, views="center", crop_size=64) as loader:
        assert [len(ids) for _ in range(3) for ids in (next(iter(loader)).ids,)] == [10] * 3
        assert sum(map(len, ids_of(loader))) == 23


def test_older_loop_ends_when_another_begins(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=64) as loader:
        older = iter(loader)
        next(older)
        next(iter(loader))
        with pytest.raises(RuntimeError, match="this loop over the loader has ended, because another one began"):
            next(older)


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


def test_copies_continue_at_the_same_position(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=64) as loader:
        taken = next(iter(loader))
        state = loader.state_dict()
        for copied in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
            with copied:
                assert copied.state_dict() == state
                copied.load_state_dict(state)
                rest = ids_of(copied)
                assert len(rest) == 2 and taken.ids.tolist() not in rest


@pytest.mark.parametrize("options", [{"decoder": "dali"}, {"cache": "host"}], ids=str)
def test_forked_child_opens_a_loader_anew(tiny, options):
    with ImageLoader(tiny, "train", 16, crop_size=64, **options) as loader:
        batches = iter(loader)
        first = next(batches)
        receiver, sender = multiprocessing.get_context("fork").Pipe()
        child = multiprocessing.get_context("fork").Process(target=lambda: sender.send(ids_of(loader)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: threads do not survive a fork
            child.start()
        assert receiver.poll(30)
        assert receiver.recv() == [loader.plan.ids(3 + step)[0].tolist() for step in range(3)]
        child.join()
        assert ids_of(batches) == [loader.plan.ids(step)[0].tolist() for step in (1, 2)] and len(first.ids) == 16


def test_ranks_belong_together(tiny):
    with pytest.raises(ValueError, match="rank and world_size belong together"):
        ImageLoader(tiny, "train", 4, rank=1)


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 11, 12])
def test_resume_yields_the_next_sample(tiny, stop):
    """Bitwise, over the end of an epoch, with other threads and prefetch depth, and in a used loader as in a new one."""
    with ImageLoader(tiny, "train", 8, seed=1, crop_size=64, num_threads=1) as loader:
        whole = epoch(loader) + epoch(loader) + epoch(loader)
    with ImageLoader(tiny, "train", 8, seed=1, crop_size=64, num_threads=2) as loader:
        batches = stream(loader)
        while loader.position < stop:
            next(batches)
        state = loader.state_dict()
        next(batches)
        loader.load_state_dict(state)
        assert equal(list(itertools.islice(stream(loader), 3)), whole[stop : stop + 3])
    with ImageLoader(tiny, "train", 8, seed=1, crop_size=64, num_threads=3, prefetch=4) as loader:
        loader.load_state_dict(state)
        rest = epoch(loader)
        assert len(rest) == 6 - stop % 6
        assert equal(rest, whole[stop : stop + len(rest)])
    with ImageLoader(tiny, "train", 8, seed=1, crop_size=64, prefetch=1, position=stop) as loader:
        assert equal(epoch(loader), rest)


def test_a_state_that_begins_an_epoch_goes_on_inside_a_loop(tiny):
    with ImageLoader(tiny, "train", 8, crop_size=64) as loader:
        whole, seen = epoch(loader), []
        for number, batch in enumerate(loader):
            seen.append(batch)
            if number == 1:
                loader.load_state_dict(loader.state_dict() | {"position": 0})
        assert equal(seen[2:], whole)


@pytest.mark.parametrize(("split", "views"), [("train", "random"), ("val", "center"), ("val", "ten")])
def test_two_ranks_put_together_are_the_batch_of_one(tiny, split, views):
    with ImageLoader(tiny, split, 6, views=views, crop_size=64, pad_last=True) as one:
        whole = epoch(one)
        state = one.state_dict()
    ranks = [ImageLoader(tiny, split, 3, views=views, crop_size=64, rank=rank, world_size=2) for rank in range(2)]
    halves = zip(*(epoch(loader) for loader in ranks), strict=True)
    together = [joined(*pair) for pair in halves]
    assert equal(together, whole)
    for loader in ranks:
        loader.load_state_dict(state)
        loader.close()


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


def test_two_threads_are_told_to_open_loaders_of_their_own(tiny):
    with ImageLoader(tiny, "train", 2, crop_size=32) as loader:
        said: list[str] = []

        def take() -> None:
            try:
                while not said:
                    loader.batch_at(loader.position)
            except UserError as error:
                said.append(str(error))

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert said and "two threads take batches from one loader at the same time" in said[0]
        next(iter(loader))  # the other thread's work goes on


def test_state_of_version_0_1_is_read(tiny):
    """As imagefeed 0.1 wrote it, with the names of that time."""
    fingerprint = {
        "dataset": tiny.fingerprint,
        "split": "train",
        "pixels": "less their mean",
        "device cache": False,
        "global batch": 8,
        "views": "random",
        "shuffle": "global",
        "size": 64,
        "colour": 0.1,
        "mean": "channel",
        "deviation": True,
        "random_resized": False,
        "color_jitter": None,
    }
    state = {"version": 2, "seed": 1, "position": 7, "fingerprint": fingerprint}
    options = {"seed": 1, "crop_size": 64, "std": "dataset"}
    with ImageLoader(tiny, "train", 4, rank=0, world_size=2, position=7, **options) as loader:
        expected = next(iter(loader))
    with ImageLoader(tiny, "train", 4, rank=0, world_size=2, **options) as loader:
        loader.load_state_dict(json.loads(json.dumps(state)))
        assert equal([next(iter(loader))], [expected])
        for name, old, message in (("colour", 0.5, "pca_jitter 0.5, this run 0.1"), ("deviation", False, "std none")):
            with pytest.raises(UserError, match=f"saved state has {message}"):
                loader.load_state_dict(state | {"fingerprint": fingerprint | {name: old}})
        with pytest.raises(UserError, match="saved state has version 1, this imagefeed reads 2 to 4"):
            loader.load_state_dict(state | {"version": 1})


@pytest.mark.parametrize("options", [{"random_resized_crop": True}, {"color_jitter": (0.1, 0.1, 0.1, 0)}], ids=str)
def test_resized_and_jittered_runs_go_on_with_the_decoder_that_they_began_with(tiny, options):
    """Before version 4, which an older program does not take for one of its own, DALI made these pixels."""
    options |= {"crop_size": 64, "batch_size": 8}
    with (
        ImageLoader(tiny, "train", **options) as native,
        ImageLoader(tiny, "train", **options, decoder="dali") as dali,
        ImageLoader(tiny, "train", 8, crop_size=64) as plain,
    ):
        next(iter(dali))
        old, new = dali.state_dict(), native.state_dict()
        assert (old["version"], new["version"], plain.state_dict()["version"]) == (3, 4, 3)
        assert "decoder" not in plain.state_dict()["identity"]
        del old["identity"]["decoder"]
        sentence = "has decoder {}, this run {}; resized and jittered pixels differ by a few levels, so use decoder={} to go on"
        with pytest.raises(UserError, match=sentence.format("dali", "native", "dali")):
            native.load_state_dict(old)
        with pytest.raises(UserError, match=sentence.format("native", "dali", "native")):
            dali.load_state_dict(new)
        expected = dali.batch_at(1)
        dali.load_state_dict(old)
        assert equal([next(iter(dali))], [expected])
        native.load_state_dict(json.loads(json.dumps(new)))


def test_state_of_other_data_or_options_is_refused(tiny, tiny_copy):
    with ImageLoader(tiny, "train", 8, seed=1, crop_size=64) as loader:
        state = loader.state_dict()
    with ImageLoader(tiny, "train", 4, seed=1, crop_size=64) as other:
        with pytest.raises(UserError, match="saved state has global batch 8, this run 4; use the same"):
            other.load_state_dict(state)
    with ImageLoader(tiny, "train", 8, seed=2, crop_size=64) as other, pytest.raises(UserError, match="seed 1, this run 2"):
        other.load_state_dict(state)
    changed = Manifest(tiny_copy.root, CLASSES, tiny_copy.splits, tiny_copy.options | {"quality": 80}, {})
    with ImageLoader(changed, "train", 8, seed=1, crop_size=64) as other, pytest.raises(UserError, match="has dataset"):
        other.load_state_dict(state)


def test_a_path_is_opened_as_a_manifest_is(tiny):
    """And the state of a loader goes through JSON, with numbers of R, G and B too."""
    options = {"crop_size": 64, "mean": (120, 115.5, 100), "std": "imagenet"}
    with ImageLoader(tiny, "train", 8, **options) as one, ImageLoader(str(tiny.root), "train", 8, **options) as other:
        first = epoch(one)
        one.load_state_dict(json.loads(json.dumps(one.state_dict() | {"position": 0})))
        assert equal(first, epoch(other)) and equal(first, epoch(one))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_sentence(tiny):
    with pytest.raises(UserError, match="device cuda: .* use device=cpu"):
        ImageLoader(tiny, "train", 8, device="cuda")
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu", "meta"])
def test_device_that_cannot_decode_is_one_sentence(tiny, device):
    with pytest.raises(UserError, match=f"^device {device}: .*; use"):
        ImageLoader(tiny, "train", 8, device=device)


def test_state_that_is_none_is_refused(tiny):
    with ImageLoader(tiny, "train", 8, crop_size=64) as loader:
        state = loader.state_dict()
        for wrong in ({}, state | {"identity": 3}, state | {"position": "7"}):
            with pytest.raises(UserError, match="saved state is incomplete .*; start a new run"):
                loader.load_state_dict(wrong)
        with pytest.raises(UserError, match="has position -4, below 0"):
            loader.load_state_dict(state | {"position": -4})
        assert loader.position == 0


def test_split_without_labels_is_for_evaluation_only(tmp_path):
    jpegs = [jpeg(picture(n)) for n in range(4)]
    manifest = pack(tmp_path / "data", {"test": jpegs}, unlabeled="test")
    with pytest.raises(UserError, match="4 of the 4 records of split test have no label, so it cannot be trained on"):
        ImageLoader(manifest, manifest.train_split, 2, crop_size=64)
    with ImageLoader(manifest, "test", 2, views="center", crop_size=64) as loader:
        assert [batch.labels.tolist() for batch in loader] == [[-1, -1]] * 2


@pytest.mark.parametrize("decoder", ["native", "dali"])
def test_closing_frees_threads_maps_and_files(tiny, decoder):
    def held():
        """Threads and maps, when those that are about to end have ended."""
        gc.collect()
        threads = []
        while len(threads) < 5 or len(set(threads[-5:])) > 1:
            threads.append(len(os.listdir("/proc/self/task")))
            time.sleep(0.02)
        return threads[-1], mapped(tiny)

    with ImageLoader(tiny, "train", 8, crop_size=64, decoder=decoder) as loader:
        first = next(iter(loader))
        assert equal([first], [first])  # which starts torch's own threads
    for _ in range(3):
        before = held()
        with ImageLoader(tiny, "train", 8, crop_size=64, num_threads=3, decoder=decoder) as loader:
            batches = iter(loader)
            next(batches)
            assert held() != before
            loader.close()
            assert held() == before
            with ImageLoader(tiny, "train", 8, crop_size=64, position=1, decoder=decoder) as other:
                assert equal([next(batches)], [next(iter(other))])
        assert held() == before


RANK = """
import json, os, sys
from pathlib import Path
from imagefeed.pipeline.loader import ImageLoader

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
found = {}
for split, views in (("train", "random"), ("val", "center")):
    with ImageLoader(sys.argv[1], split, 4, views=views, crop_size=32) as loader:
        assert f"rank {rank} of {world_size} (torchrun)" in repr(loader)
        found[split] = [[batch.ids.tolist(), batch.valid.tolist(), batch.images.sum().item()] for batch in loader]
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(found))
"""


def test_ranks_of_torchrun_read_their_partitions(tiny, tmp_path):
    """Two processes, put together, are the one process with twice the batch."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, tmp_path / "rank.py", tiny.root, tmp_path], check=True, env=environment)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for split, views in (("train", "random"), ("val", "center")):
        with ImageLoader(tiny, split, 8, views=views, crop_size=32, pad_last=True) as loader:
            whole = list(loader)
        assert len(whole) == len(ranks[0][split]) == len(ranks[1][split])
        for batch, (ids, valid, total), (more_ids, more_valid, more_total) in zip(
            whole, ranks[0][split], ranks[1][split], strict=True
        ):
            assert batch.ids.tolist() == ids + more_ids and batch.valid.tolist() == valid + more_valid
            assert batch.images.sum().item() == pytest.approx(total + more_total, rel=1e-4)


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.parametrize("options", [{}, {"cache": "host"}, {"color_jitter": (0.1, 0.1, 0.1, 0.1)}], ids=str)
def test_neither_epochs_nor_opening_and_closing_take_memory(tiny, options):
    """A batch of 25 is 15 MB, so keeping any would show; the heaps of DALI's threads grow at first, then come and go by 90 MB."""
    with ImageLoader(tiny, "train", 25, **options) as loader:
        for number in range(40):
            for _batch in loader:
                pass
            if number == 9:
                before = resident_mb()
        assert resident_mb() - before < 150
    resident = []
    for _ in range(40):
        with ImageLoader(tiny, "train", 25, **options) as loader:
            next(iter(loader))
        resident.append(resident_mb())
    assert min(resident[30:]) - min(resident[10:20]) < 150


def test_an_evaluation_skips_a_batch_whose_records_are_all_corrupt(tiny_copy):
    for record_id in (0, 7):
        flip_bit(tiny_copy, "val", record_id)
    with ImageLoader(tiny_copy, "val", 1, views="center", crop_size=32) as loader:
        assert [batch.ids.tolist() for batch in loader] == [[n] for n in range(23) if n not in (0, 7)]


def test_a_forked_process_may_collect_a_loader_that_was_dropped(tiny):
    code = (
        "import gc, os, sys\nfrom imagefeed.pipeline.loader import ImageLoader\ngc.disable()\n"
        "list(ImageLoader(sys.argv[1], 'train', 10, crop_size=32, random_resized_crop=True))\n"
        "pid = os.fork()\n"
        "if not pid:\n    gc.collect()\n    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tiny.root)], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("decoder", ["native", "dali"])
def test_ctrl_c_ends_it_at_once(tiny, decoder):
    code = (
        "import sys; from imagefeed.pipeline.loader import ImageLoader\n"
        "with ImageLoader(sys.argv[1], 'train', 8, decoder=sys.argv[2]) as loader:\n"
        "    while True:\n"
        "        for batch in loader: print('.', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny.root), decoder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == ".\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors


def test_batches_that_are_held_stay_as_they_were_with_a_cache(tiny):
    with ImageLoader(tiny, "train", 8, cache="host", crop_size=32) as loader:
        held = [batch for _ in range(3) for batch in loader]
        copies = [batch.images.clone() for batch in held]
        list(loader)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))


def test_a_batch_has_the_columns_of_its_records(tiny_copy):
    """Padding and replaced records included; after `.to`, pickling and a walk by pytree, too."""
    manifest = store_columns(tiny_copy)
    train, names = Dataset(manifest, "train"), ("weight", "box", "a.b/c %", "tags")
    weight, box, text, tags = map(train.column, names)
    flip_bit(manifest, "train", 30)
    options = {"crop_size": 64, "columns": names, "rank": 1, "world_size": 3}
    with ImageLoader(manifest, "train", 7, views="center", **options) as loader:
        seen = 0
        for batch in loader:
            for found in (batch, batch.to("cpu"), pickle.loads(pickle.dumps(batch)), tree_map(lambda leaf: leaf, batch)):
                ids = found.ids.tolist()
                assert torch.equal(found.columns["weight"], torch.tensor(weight[ids], dtype=torch.float32))
                assert torch.equal(found.columns["box"], torch.from_numpy(box[ids]))
                assert found.columns["a.b/c %"] == [text[n] for n in ids]
                assert [values.tolist() for values in found.columns["tags"]] == [tags[n].tolist() for n in ids]
            seen += len(ids)
        assert seen == 7 * len(loader)
    with ImageLoader(manifest, "val", 23, views="center", crop_size=64, keys=("image", "y"), columns=["weight"]) as loader:
        assert next(iter(loader)).keys() == {"image", "y", "weight"}
    with ImageLoader(manifest, "val", 23, views="center", crop_size=64) as loader:
        assert next(iter(loader)).columns == {}
    with pytest.raises(ValueError, match="keys and columns both name 'box'; choose another key"):
        ImageLoader(manifest, "val", 8, keys=("image", "box"), columns=["box"])
    with pytest.raises(ValueError, match="columns must be a list of different names of columns"):
        ImageLoader(manifest, "val", columns="box")
