"""Which records an epoch has: subsets, weights, several datasets, repeats and several crops."""

import copy
import dataclasses
import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import Dataset
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.plan import Plan, offset
from imagefeed.pipeline.selection import Selection
from tests.conftest import CLASSES, crop, jpeg, pack, picture, same
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal, joined

BEES = list(range(1, 50, 3))
ODD = list(range(1, 50, 2))
WEIGHTS = np.linspace(0, 4, 50)


def loader(manifest, split="train", batch_size=4, **options) -> ImageLoader:
    return ImageLoader(manifest, split, batch_size, **{"crop_size": 32} | options)


def planned(opened: ImageLoader, epoch: int = 0) -> list[int]:
    """The record ids of an epoch, without reading them."""
    with opened:
        opened.set_epoch(epoch)
        return [record_id for batch in opened.batch_sampler for record_id in batch]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Manifest:
    """20 train and 5 val records of the classes bee and ant, in that order, of other pictures than tiny's."""
    jpegs = {"train": [jpeg(picture(seed)) for seed in range(200, 220)], "val": [jpeg(picture(seed)) for seed in range(300, 305)]}
    return pack(tmp_path_factory.mktemp("other") / "data", jpegs, classes=("bee", "ant"))


def file(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (range(1, 50, 2), ODD),
        (ODD[::-1], ODD),
        (np.array(ODD, np.uint8), ODD),
        (torch.tensor(ODD), ODD),
        (["bee"], BEES),
        (("cat", "ant"), [number for number in range(50) if number % 3 != 1]),
        (("ids.npy", np.array(ODD)), ODD),
        (("classes.npy", np.array(["bee"])), BEES),
        (("ids.txt", "\ufeff7\n\n 3 \r\n11"), [3, 7, 11]),
        (("classes.txt", "bee\n"), BEES),
        (("names.txt", "7.jpg\nsome/folder/3.jpg\n"), None),
        (["11.jpg", "3.jpg"], [3, 11]),
        (range(50), list(range(50))),
    ],
    ids=str,
)
def test_subset_is_ids_classes_raw_files_or_a_file_of_them(tiny, tmp_path, given, expected):
    subset = file(tmp_path, *given) if isinstance(given, tuple) and "." in given[0] else given
    if expected is None:
        with pytest.raises(
            UserError, match=r"names.txt, line 2: some/folder/3.jpg is not a raw file, as line 1 \(7.jpg\) is; give"
        ):
            loader(tiny, subset=subset)
        return
    batch_size = min(4, len(expected))
    found = planned(loader(tiny, batch_size=batch_size, subset=subset, views="center"))
    assert found == expected
    shuffled = planned(loader(tiny, batch_size=batch_size, subset=str(subset) if isinstance(subset, Path) else subset))
    assert len(shuffled) == len(expected) // batch_size * batch_size
    assert set(shuffled) <= set(expected) and len(set(shuffled)) == len(shuffled)


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ([], "subset has no record of split train"),
        (range(0), "subset has no record"),
        ([3, 50], "subset has record 50, but split train has the records 0 to 49; leave it out"),
        ([-1, 3], "subset has record -1, but"),
        ([7, 3, 7], "subset has record 7 more than once"),
        (["bee", "bee"], "subset has bee more than once"),
        (["bee", "wasp", "fly"], "subset has wasp, fly, which are not classes, as bee is; give only classes (the"),
        (["wasp"], "subset has wasp, which is neither a class nor a raw file of split train; the classes are ant"),
        ([0.5], "subset holds float64 of shape (1,), not record ids"),
        (np.zeros(50, bool), "subset holds bool of shape (50,), not record ids; .* (of a mask, give numpy.flatnonzero(mask))"),
        ([[1, 2]], "subset holds int64 of shape (1, 2)"),
        ("bee", "bee: subset is no file; give an existing one, or names of classes as a list"),
        (("x.npy", "no array"), "x.npy: subset is not readable as .npy"),
        (("x.txt", "\n"), "subset has no record"),
        (("x.txt", "bee\n3\n"), "x.txt, line 2: 3 is not a class, as line 1 (bee) is; give only classes (the"),
        (("x.txt", "\n# bees\nwasp\nbee\n"), "x.txt, line 2: # bees, wasp are not classes, as line 4 (bee) is; give only"),
        (("x.txt", "bee\n\nbee\n"), "x.txt, line 3: subset has bee more than once; give each name once"),
        (5, "subset must be record ids, names of classes, or a file of them, not 5"),
    ],
    ids=str,
)
def test_a_wrong_subset_is_refused(tiny, tmp_path, subset, message):
    if isinstance(subset, tuple):
        path, text = tmp_path / subset[0], subset[1]
        path.write_text(text)
        subset = path
    with pytest.raises((UserError, ValueError)) as caught:
        loader(tiny, subset=subset)
    for part in message.split(" .* "):
        assert part in str(caught.value)


def test_numbers_that_are_also_classes_are_refused_in_a_file(tmp_path):
    manifest = pack(tmp_path / "data", {"train": [jpeg(picture(0, 64, 64))] * 4}, size=64, classes=("1", "2"))
    with pytest.raises(UserError, match="its lines may be record ids or names of classes"):
        loader(manifest, subset=file(tmp_path, "x.txt", "1\n2\n"))
    assert planned(loader(manifest, batch_size=2, subset=["2"])) in ([1, 3], [3, 1])


@pytest.mark.parametrize("options", [{"shuffle": "none"}, {"shuffle": "blocks", "read_ahead": 3}, {"cache": "host"}], ids=str)
def test_a_record_of_a_subset_looks_as_it_does_without_it(tiny, options):
    with loader(tiny, batch_size=5, **options) as whole, loader(tiny, batch_size=5, subset=ODD, **options) as part:
        for _ in range(2):
            images = {record_id: image for batch in whole for record_id, image in zip(batch.ids.tolist(), batch.images)}
            for batch in part:
                for record_id, image, label in zip(batch.ids.tolist(), batch.images, batch.labels.tolist()):
                    assert torch.equal(image, images.pop(record_id)) and label == record_id % 3


def test_a_corrupt_record_is_replaced_from_the_subset(tiny_copy):
    for record_id in (4, 49):
        flip_bit(tiny_copy, "train", record_id)
    with loader(tiny_copy, batch_size=17, subset=["bee"]) as opened:
        assert sorted(next(iter(opened)).ids.tolist()) == sorted([*BEES[2:-1], 1, 1, 7])


def test_a_part_of_a_dataset_is_a_subset(tiny):
    assert sorted(planned(loader(Dataset(tiny, "train")[10:18], "train"))) == list(range(10, 18))
    with pytest.raises(UserError, match="the dataset is a part of one already"):
        loader(Dataset(tiny, "train")[10:18], "train", subset=[3])


@pytest.mark.parametrize("shuffle", ["global", "blocks", "none"])
def test_records_come_as_often_as_their_weights_say(tiny, shuffle):
    expected = WEIGHTS / WEIGHTS.sum() * 50
    counts = np.zeros(50)
    for epoch in range(40):
        found = np.bincount(planned(loader(tiny, batch_size=5, weights=WEIGHTS, shuffle=shuffle), epoch), minlength=50)
        assert found.sum() == 50 and found[0] == 0 and np.abs(found - expected).max() < 2
        counts += found
    assert np.abs(counts / 40 - expected).max() < 0.35


def test_weights_are_by_class_or_balanced(tiny):
    def by_class(**options):
        return Counter(record_id % 3 for record_id in planned(loader(tiny, batch_size=10, **options)))

    # 17 ants and 16 cats: the number is for each record of a class.
    assert by_class(weights={"ant": 3, "bee": 0, "cat": 2}) in ({0: 30, 2: 20}, {0: 31, 2: 19})
    balanced = by_class(weights="balanced", subset=[0, 2, 5, *BEES])
    assert sum(balanced.values()) == 20 and all(abs(count - 20 / 3) < 2 for count in balanced.values())
    assert planned(loader(tiny, weights=[3] * 50)) == planned(loader(tiny))  # equal weights are a shuffle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2, 3]}, "weights has shape (3,), but split train has 50 records; give one number for each"),
        ({"weights": [1] * 49 + [-1]}, "weights has -1.0 for record 49; give finite numbers of 0 or more"),
        ({"weights": [float("nan")] * 50}, "weights has nan for record 0"),
        ({"weights": [0] * 50}, "all weights of its records are 0"),
        ({"weights": {"ant": 1, "bee": 0, "cat": 0}, "subset": ["bee"]}, "all weights of its records are 0"),
        ({"weights": {"ant": 1, "wasp": 1}}, "weights has names that are no class: wasp"),
        ({"weights": {"ant": 1}}, "weights has no number for classes: bee, cat; give each class a number"),
        ({"weights": ["a"] * 50}, "weights holds what is no number"),
        ({"weights": "even"}, "weights must be a number for each record or class, or balanced, not 'even'"),
        ({"weights": "balanced", "views": "center"}, "an evaluation takes each record once, without weights"),
        ({"repeats": 3, "views": "ten"}, "repeats and crops are for training"),
        ({"crops": 2, "views": "center"}, "repeats and crops are for training"),
        ({"repeats": 3, "shuffle": "none"}, "without a shuffle always the same"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, not 0"),
        ({"subset": [1, 2, 3]}, "3 records do not fill one global batch of 4"),
    ],
    ids=str,
)
def test_wrong_weights_repeats_and_crops_are_refused(tiny, options, message):
    with pytest.raises((UserError, ValueError)) as caught:
        loader(tiny, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"weights": WEIGHTS}, {"repeats": 3}, {"repeats": 2, "weights": "balanced"}], ids=str)
def test_a_record_that_comes_again_looks_different(tiny, options):
    with loader(tiny, batch_size=10, **options) as opened:
        seen: dict[int, list[torch.Tensor]] = {}
        for batch in opened:
            for record_id, image in zip(batch.ids.tolist(), batch.images):
                assert not any(torch.equal(image, earlier) for earlier in seen.setdefault(record_id, []))
                seen[record_id].append(image)
    assert max(map(len, seen.values())) > 1


@pytest.mark.parametrize("repeats", [2, 3, 60])
def test_repeats_take_a_part_of_the_records_as_often_in_a_row(tiny, repeats):
    first, second = (planned(loader(tiny, batch_size=5, repeats=repeats), epoch) for epoch in range(2))
    assert len(first) == 50 and first != second
    runs = [(record_id, len(list(run))) for record_id, run in itertools.groupby(first)]
    assert [length for _, length in runs[:-1]] == [repeats] * (len(runs) - 1) and len(dict(runs)) == len(runs)


@pytest.mark.parametrize(
    "options", [{"weights": WEIGHTS, "subset": ODD}, {"repeats": 3}, {"crops": 2, "shuffle": "blocks"}], ids=str
)
def test_resume_at_another_world_size_yields_the_same_batches(tiny, options):
    with loader(tiny, batch_size=6, **options) as one:
        whole = list(itertools.islice(itertools.chain(one, one), 2 * len(one)))
        one.load_state_dict(one.state_dict() | {"position": 3})
        state = one.state_dict()
        for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert copied.state_dict() == state and equal([next(iter(copied))], whole[3:4])
            copied.close()
    ranks = [loader(tiny, batch_size=3, rank=rank, world_size=2, **options) for rank in range(2)]
    for part in ranks:
        part.load_state_dict(state)
    halves = zip(*(list(itertools.islice(itertools.chain(part, part), 5)) for part in ranks), strict=True)
    assert equal([joined(*pair) for pair in halves], whole[3:8])
    for part in ranks:
        part.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"subset of 25 records \(\w{16}\), this run None"),
        ({"subset": [*ODD[:-1], 0]}, r"subset of 25 records \(\w{16}\), this run of 25 records \(\w{16}\); use the same dataset"),
        ({"subset": ODD, "weights": "balanced"}, "weights None, this run balanced"),
        ({"subset": ODD, "repeats": 2}, "repeats 1, this run 2"),
        ({"subset": ODD, "crops": 2}, "crops 1, this run 2"),
    ],
    ids=str,
)
def test_a_state_of_other_records_is_refused(tiny, tmp_path, options, message):
    with loader(tiny, subset=file(tmp_path, "x.npy", np.array(ODD))) as opened:
        state = opened.state_dict()
    with loader(tiny, **options) as another, pytest.raises(UserError, match=message):
        another.load_state_dict(state)


def test_a_state_from_before_these_options_still_loads(tiny):
    with loader(tiny) as opened:
        state = opened.state_dict()
        for name in ("subset", "weights", "repeats", "crops"):
            del state["identity"][name]
        opened.load_state_dict(state | {"position": 5})
        assert opened.position == 5


@pytest.mark.parametrize("options", [{}, {"cache": "host"}, {"cache": "device"}, {"mean": "image", "std": "dataset"}], ids=str)
def test_each_crop_has_its_own_place_flip_and_colors(tiny, options):
    with loader(tiny, crops=3, crop_size=224, **options) as opened:
        batch = next(iter(opened))
        keys = opened.plan.keys(0, batch.ids.numpy())
        drawn = [opened.plan.augmentation(0, each) for each in keys]
        matrix = opened.colors.pca_matrix
    assert batch.images.shape == (4, 3, 3, 224, 224) and keys.shape == (3, 4) and batch.labels.shape == (4,)
    statistics = tiny.load_statistics()
    for n, record_id in enumerate(batch.ids.tolist()):
        for view, of_view in enumerate(drawn):
            place, mirror = offset(of_view.places[0, n], 32), of_view.mirrors[0, n]
            mean = statistics["channel_mean"][:, None, None]
            if "mean" in options:
                row, column = place
                mean = statistics["mean_image"].transpose(2, 0, 1)[:, row : row + 224, column : column + 224]
                mean = mean[:, :, ::-1] if mirror else mean
            wanted = crop(jpeg(picture(record_id)), *place, mirror) - mean + (matrix @ of_view.color[n])[:, None, None]
            scale = statistics["channel_std"][:, None, None] if "std" in options else 1
            assert same(batch.images[n, view].numpy() * scale, wanted)


@pytest.mark.parametrize("options", [{"random_resized_crop": True}, {"color_jitter": (0.4, 0.4, 0.4, 0.1)}], ids=str)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_crops_by_the_graph_begin_with_that_of_a_single_one(tiny, options, memory_format):
    with (
        loader(tiny, crop_size=64, **options) as one,
        loader(tiny, crops=2, crop_size=64, memory_format=memory_format, **options) as two,
    ):
        single, both = next(iter(one)), next(iter(two))
    assert torch.equal(both.images[:, 0], single.images) and both.images.shape == (4, 2, 3, 64, 64)
    assert not any(torch.equal(*views) for views in both.images)


def test_datasets_follow_one_another(tiny, other):
    manifests = [tiny, str(other.root)]
    with loader(manifests, batch_size=7, views="center", split="val", crop_size=224) as opened:
        assert opened.classes == CLASSES and len(opened.dataset) == 28 and len(opened) == 4
        for batch in opened:
            for record_id, label, image in zip(batch.ids.tolist(), batch.labels.tolist(), batch.images):
                stored, stored_label = opened.dataset[record_id]
                assert label == stored_label == (record_id % 3 if record_id < 23 else [1, 0, 2][(record_id - 23) % 2])
                seed = 100 + record_id if record_id < 23 else 300 + record_id - 23
                assert np.array_equal(np.asarray(stored).transpose(2, 0, 1), crop(jpeg(picture(seed)), 0, 0, 0, 256))
                wanted = crop(jpeg(picture(seed)), 16, 16, 0) - opened.manifest.load_statistics()["channel_mean"][:, None, None]
                assert same(image, wanted)
    assert sorted(planned(loader(manifests, batch_size=7))) == list(range(70))
    assert planned(loader([other, tiny], batch_size=5, views="center"))[:20] == list(range(20))
    assert set(planned(loader(manifests, subset=["bee"]))) <= {*BEES, *range(50, 70, 2)}


def test_statistics_of_datasets_are_those_of_one_build_of_both(tiny, other, tmp_path):
    pictures = [jpeg(picture(seed)) for seed in (*range(50), *range(200, 220))]
    expected = pack(tmp_path / "both", {"train": pictures}).load_statistics()
    with loader([tiny, other]) as opened:
        found = opened.manifest.load_statistics()
    assert found.keys() == expected.keys() and all(np.allclose(found[name], expected[name], rtol=1e-9) for name in expected)


def test_datasets_of_other_sizes_are_read_together(tiny, tmp_path):
    small = pack(tmp_path / "small", {"train": [jpeg(picture(seed, 96, 96)) for seed in range(5)]}, size=96)
    with loader([tiny, small], batch_size=11) as opened:
        assert {tuple(batch.images.shape[1:]) for batch in opened} == {(3, 32, 32)}
    for options, message in (
        ({"mean": "image"}, "images of one size"),
        ({"cache": "device"}, "different sizes"),
        ({"crop_size": 128}, "of 96"),
    ):
        with pytest.raises(UserError, match=message):
            loader([tiny, small], **options)


def test_shares_are_parts_of_an_epoch(tiny, other):
    with loader({tiny.root: 0.2, str(other.root): 0.8}, batch_size=10) as opened:
        state = opened.state_dict()
        found = planned(opened)
        counts = np.bincount(found, minlength=70)
        assert len(found) == 70 and counts[:50].sum() == 14 and counts[50:].max() <= 4 and counts[50:].min() >= 1
        again = pickle.loads(pickle.dumps(opened))
        assert planned(again) == found
    proportional = {tiny.root: 50 / 70, other.root: 20 / 70}
    assert sorted(planned(loader(proportional, batch_size=7))) == list(range(70))
    balanced = np.array(planned(loader({tiny.root: 0.2, other.root: 0.8}, batch_size=10, weights="balanced")))
    assert np.bincount(balanced[balanced >= 50] % 2).tolist() == [28, 28]
    with loader({tiny.root: 0.3, other.root: 0.7}) as another, pytest.raises(UserError, match="saved state has"):
        another.load_state_dict(state)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (lambda tiny, other: [], {}, "dataset is empty; give a folder"),
        (lambda tiny, other: [tiny, other], {"split": "test"}, "no split named 'test'"),
        (lambda tiny, other: [tiny, "/no/where"], {}, "/no/where: there is no such folder"),
        (lambda tiny, other: [tiny, Dataset(other, "train")[:3]], {}, "a part of a dataset cannot be joined with others"),
        (lambda tiny, other: {tiny.root: 0.5, other.root: 0.2}, {}, "the shares of datasets are 0.5, 0.2; give each its part"),
        (lambda tiny, other: {tiny.root: 1, other.root: 0}, {}, "the shares of datasets are 1, 0;"),
        (lambda tiny, other: {tiny.root: "1"}, {}, "the shares of datasets are 1;"),
        (lambda tiny, other: {tiny.root: 0.5, other.root: 0.5}, {"views": "center"}, "without weights and shares of datasets"),
        (lambda tiny, other: {tiny.root: 0.5, other.root: 0.5}, {"subset": ["cat"]}, "or subset leaves none"),
        (
            lambda tiny, other: [dataclasses.replace(tiny, classes=("ant", "bee", "wasp")), tiny],
            {},
            "its classes include cat, which .* does not have (1 class only there: wasp)",
        ),
    ],
)
def test_datasets_that_do_not_go_together_are_refused(tiny, other, dataset, options, message):
    with pytest.raises(UserError) as caught:
        loader(dataset(tiny, other), **options)
    for part in message.split(" .* "):
        assert part in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"repeats": 3}], ids=str)
def test_windows_of_a_selection_are_read_ahead(options):
    chosen = Selection(np.arange(0, 140_000, 2), 70_000)
    plans = [Plan(70_000, 512, shuffle="blocks", selection=chosen, rank=rank, world_size=2, **options) for rank in range(2)]
    steps = range(plans[0].steps)
    read = [plans[0].prefetch_window(step, step == 0) for step in steps]
    visited = [np.concatenate([plan.ids(step)[0] for plan in plans]) for step in steps]
    for step in steps:
        assert np.isin(visited[step], np.concatenate(read[: step + 1])).all()
    assert not (np.concatenate(visited) % 2).any()


def test_an_evaluation_over_ranks_sees_each_record_of_a_subset_once(tiny):
    ranks = [loader(tiny, batch_size=3, views="center", subset=BEES, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(record_id for part in ranks for record_id in planned(part)) == BEES
    assert [len(part) for part in ranks] == [3, 3]


@pytest.mark.parametrize("number", [1e-320, 1e308])
def test_weights_may_be_as_small_or_large_as_floats_are(tiny, number):
    with ImageLoader(tiny, "train", 10, crop_size=32, weights=[number] * 50) as loader:
        assert sorted(torch.cat([batch.ids for batch in loader]).tolist()) == list(range(50))


@pytest.mark.parametrize("subset", [b"abc", [[1], [2, 3]]])
def test_what_is_no_row_of_ids_is_refused(tiny, subset):
    with pytest.raises(UserError, match="subset holds"):
        ImageLoader(tiny, "train", 1, subset=subset)


def test_another_split_needs_a_subset_of_its_own(tiny):
    loader = ImageLoader(tiny, "train", 4, crop_size=32, subset=range(20))
    with pytest.raises(UserError, match="subset is of split train; give subset for split val too"):
        loader.reopened(split="val", views="center")
    assert len(loader.reopened(split="val", views="center", subset=None).reader) == 23
