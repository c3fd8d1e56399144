"""torchdata's nodes and its StatefulDataLoader."""

import itertools

import torchdata.nodes as nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from imagefeed import ImageLoader
from tests.clients.records import BATCH, SIZE, STEPS, planned


def train_loader(root) -> ImageLoader:
    return ImageLoader(root, "train", BATCH, crop_size=SIZE)


def ids_of(batches) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]


def test_nodes_see_each_record_once_and_resume(root):
    whole = planned(root, 2)
    loader = nodes.Loader(nodes.IterableWrapper(train_loader(root)))
    assert ids_of(loader) + ids_of(loader) == whole
    loader = nodes.Loader(nodes.IterableWrapper(train_loader(root)))
    first = ids_of(itertools.islice(loader, 2))
    state = loader.state_dict()
    resumed = nodes.Loader(nodes.IterableWrapper(train_loader(root)))
    resumed.load_state_dict(state)
    assert first + ids_of(resumed) == whole[:STEPS]


def test_prefetching_nodes_keep_the_state_of_what_was_consumed(root):
    def prefetched():
        return nodes.Loader(nodes.Prefetcher(nodes.IterableWrapper(train_loader(root)), prefetch_factor=3))

    loader = prefetched()
    first = ids_of(itertools.islice(loader, 2))
    state = loader.state_dict()
    resumed = prefetched()
    resumed.load_state_dict(state)
    assert first + ids_of(resumed) == planned(root)


def test_a_stateful_loader_of_its_parts_resumes(root):
    def stateful(loader):
        return StatefulDataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)

    one = stateful(train_loader(root))
    first = ids_of(itertools.islice(one, 2))
    state = one.state_dict()
    other = stateful(train_loader(root))
    other.load_state_dict(state)
    assert first + ids_of(other) == planned(root)
