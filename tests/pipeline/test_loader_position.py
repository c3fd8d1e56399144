"""Where a loader is and goes on: epochs, positions, states, copies, ranks; forks, threads, closing and interrupts."""

import contextlib
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

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader
from tests.conftest import CLASSES
from tests.dataset.test_reader import mapped
from tests.pipeline.test_loader import epoch, equal, ids_of, joined, stream


def test_position_counts_what_was_handed_out(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=64, prefetch=3) as loader:
        assert (len(loader), loader.position) == (3, 0)
        for step, _ in enumerate(loader, start=1):
            assert loader.position == loader.state_dict()["position"] == step
        assert loader.position == 3
        for _ in loader:
            break
        assert (loader.position, loader.epoch, loader.next_epoch) == (4, 1, 2)


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
        assert said and "two threads use one loader at the same time" in said[0]
        next(iter(loader))  # the other thread's work goes on


def test_a_loader_may_be_closed_while_another_thread_takes_batches(tiny):
    """Which reads from the maps that closing releases."""
    with ImageLoader(tiny, "train", 2, crop_size=32, num_threads=1) as loader:
        ended = threading.Event()

        def take() -> None:
            while not ended.is_set():
                with contextlib.suppress(UserError):
                    loader.batch_at(loader.position)

        thread = threading.Thread(target=take)
        thread.start()
        for _ in range(30):
            loader.close()
            time.sleep(0.01)
        ended.set()
        thread.join(60)
        next(iter(loader))


def test_a_batch_that_is_not_handed_out_comes_again(tiny):
    failures = [ZeroDivisionError(), KeyboardInterrupt()]

    def transform(images):
        if failures and loader.position == 1:
            raise failures.pop()
        return images

    with ImageLoader(tiny, "train", 8, crop_size=32, transform=transform) as loader:
        wanted = [loader.plan.ids(step)[0].tolist() for step in range(3)]
        found = [loader.batch_at(0).ids.tolist()]
        for failure in tuple(failures[::-1]):
            with pytest.raises(type(failure)):
                loader.batch_at(1)
        assert [*found, *(loader.batch_at(step).ids.tolist() for step in (1, 2))] == wanted


# Python drops an interrupt that comes while an object is being destroyed, with a note.
@pytest.mark.filterwarnings("ignore:(?s)Exception ignored.*KeyboardInterrupt:pytest.PytestUnraisableExceptionWarning")
def test_a_loader_goes_on_after_ctrl_c_and_another_one_while_it_stops(tiny):
    with ImageLoader(tiny, "train", 16, crop_size=200) as loader:
        for _ in range(10):

            def interrupt() -> None:
                for _ in range(2):
                    time.sleep(0.004)
                    signal.raise_signal(signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    thread.start()
                    while thread.is_alive():
                        loader.batch_at(loader.position)
                thread.join()
                time.sleep(0)  # what is late comes here
            except KeyboardInterrupt:
                thread.join()
            position = loader.position
            assert loader.batch_at(position).ids.tolist() == loader.plan.ids(position)[0].tolist()


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
        sentence = "has decoder {}, this run {}; their pixels differ by a few levels, so use decoder={} to go on"
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


def test_state_that_is_none_is_refused(tiny):
    with ImageLoader(tiny, "train", 8, crop_size=64) as loader:
        state = loader.state_dict()
        for wrong in ({}, state | {"identity": 3}, state | {"position": "7"}):
            with pytest.raises(UserError, match="saved state is incomplete .*; start a new run"):
                loader.load_state_dict(wrong)
        with pytest.raises(UserError, match="has position -4, below 0"):
            loader.load_state_dict(state | {"position": -4})
        assert loader.position == 0


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


def test_slurm_alone_makes_no_ranks(tiny, monkeypatch):
    """A batch script's own Python sees these variables too, so they do not say that the other tasks load as well."""
    for name, value in {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with ImageLoader(tiny, "val", 4, views="center", crop_size=32) as loader:
        assert loader.ranks[:2] == (0, 1)
        assert sum(batch.valid.sum().item() for batch in loader) == len(tiny.load_index("val"))


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
