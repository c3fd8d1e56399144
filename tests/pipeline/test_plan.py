import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nvidia.dali import Pipeline, fn, types

import imagefeed.pipeline.plan
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.options import SHUFFLES
from imagefeed.pipeline.plan import (
    BLOCK,
    FAR,
    GOLDEN,
    MIDDLE,
    NEAR,
    PARTS,
    PLACE_BITS,
    WINDOW,
    Plan,
    draws,
    epoch_order,
    mix,
    normal,
    offset,
)


def test_draws_are_splitmix64():
    """The first outputs for seed 1234567, as published at rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    states = (1234567 + GOLDEN * np.arange(1, 6, dtype=object)) % 2**64
    assert mix(states.astype(np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_plan_never_changes():
    """Frozen values: a checkpoint of an older version must go on with the same batches."""
    plan = Plan(1000, 2, seed=7)
    ids, _ = plan.ids(plan.steps + 3)
    drawn = plan.augmentation(plan.steps + 3, ids)
    assert ids.tolist() == [63, 768]
    assert drawn.places[0].tolist() == [[904252423, 216857630], [503458382, 973335584]]
    assert drawn.mirrors[0].tolist() == [1, 1]
    assert drawn.color.round(6).tolist() == [[0.175235, 1.60731, -1.264051], [-0.699404, 0.253716, 0.47676]]
    assert epoch_order(7, 1, 100_000, "blocks")[[0, 1, -1]].tolist() == [71640, 31247, 47950]
    assert epoch_order(7, 1, 100_000, "node-blocks", 256)[[0, 1, -1]].tolist() == [35336, 35483, 1279]
    assert plan.boxes(plan.steps + 3, ids, [256, 300], [400, 256]).tolist() == [[31, 32, 220, 242], [24, 11, 249, 244]]
    assert plan.jitter(plan.steps + 3, ids[:1], (0.4, 0.4, 0.4, 0.1)).round(6).tolist() == [
        [
            [[0.960336, -0.0737, -0.076772], [-0.092726, 0.891443, 0.011146], [0.082919, -0.226855, 0.953799]],
            [[0.074241, 0.145799, 0.028317], [0.074241, 0.145799, 0.028317], [0.074241, 0.145799, 0.028317]],
        ]
    ]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize(("records", "batch_size", "world_size"), [(40_960, 512, 4), (33_001, 500, 3)])
def test_training_takes_each_record_of_several_windows_once(records, batch_size, world_size, shuffle):
    plans = [Plan(records, batch_size, "random", 0, rank, world_size, shuffle) for rank in range(world_size)]
    check_epoch(plans, 2)


def check_epoch(plans: list[Plan], epoch: int) -> None:
    """Each record once over all ranks; training drops the remainder, evaluation pads the end and keeps the stored order."""
    one = plans[0]
    steps = one.records // one.global_batch if one.views == "random" else math.ceil(one.records / one.global_batch)
    assert {plan.steps for plan in plans} == {steps}
    batches = [plan.ids(epoch * steps + step) for step in range(steps) for plan in plans]
    assert {len(ids) for ids, _ in batches} == {one.batch_size}
    ids, valid = map(np.concatenate, zip(*batches, strict=True))
    assert 0 <= ids.min() and ids.max() < one.records
    if one.views == "random":
        assert valid.all() and len(np.unique(ids)) == len(ids) == steps * one.global_batch
    else:
        assert ids[valid].tolist() == list(range(one.records)) and not valid[one.records :].any()


PLANS = {
    "records": st.integers(1, 2000),
    "batch_size": st.integers(1, 40),
    "world_size": st.integers(1, 6),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "shuffle": st.sampled_from(SHUFFLES),
    "views": st.sampled_from(["random", "center", "ten"]),
}


def few(**drawn):
    return lambda test: settings(max_examples=60, derandomize=True, deadline=None)(given(**drawn)(test))


@few(**PLANS, epoch=st.integers(0, 2**31))
def test_every_record_is_taken_once_in_an_epoch(world_size, epoch, **options):
    assume(options["views"] != "random" or options["records"] >= options["batch_size"] * world_size)
    check_epoch([Plan(**options, rank=rank, world_size=world_size) for rank in range(world_size)], epoch)


@few(**PLANS, position=st.integers(0, 2**40))
def test_any_world_size_with_the_same_global_batch_gives_the_same_global_order(world_size, position, batch_size, **options):
    assume(options["views"] != "random" or options["records"] >= batch_size * world_size)
    one = Plan(**options, batch_size=batch_size * world_size)
    parts = [Plan(**options, batch_size=batch_size, rank=rank, world_size=world_size).ids(position) for rank in range(world_size)]
    for whole, cut in zip(one.ids(position), zip(*parts, strict=True), strict=True):
        assert np.array_equal(whole, np.concatenate(cut))


@few(**PLANS, start=st.integers(0, 2**40), steps=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_position_gives_the_same_batch_whatever_came_before(start, steps, **options):
    """In another plan of the same options, as in a run that resumes there, and in any order of asking."""
    assume(options["views"] != "random" or options["records"] >= options["batch_size"] * options["world_size"])

    def batches(plan, positions):
        ids = {position: plan.ids(position)[0] for position in positions}
        return {n: [ids[n], *plan.augmentation(n, ids[n])] for n in sorted(ids)}

    positions = [start + step for step in steps]
    walked, resumed = batches(Plan(**options), positions), batches(Plan(**options), positions[::-1])
    assert all(np.array_equal(a, b) for n in walked for a, b in zip(walked[n], resumed[n], strict=True))


def test_augmentation_of_a_record_is_its_own():
    """It does not depend on the batch, the rank or the step in which the record comes, only on seed and epoch."""
    plan, other = Plan(100, 10, seed=5), Plan(100, 25, seed=5, world_size=2, rank=1)
    alone = plan.augmentation(plan.steps, np.array([42]))
    among = other.augmentation(2 * other.steps - 1, np.array([7, 42, 99]))
    assert alone.places[0, 0].tolist() == among.places[0, 1].tolist()
    assert alone.mirrors[0, 0] == among.mirrors[0, 1]
    assert alone.color[0].tolist() == among.color[1].tolist()
    box = plan.boxes(plan.steps, np.array([42]), [256], [300])[0]
    assert box.tolist() == other.boxes(2 * other.steps - 1, np.array([7, 42]), [400, 256], [256, 300])[1].tolist()
    jitter = plan.jitter(plan.steps, np.array([42]), (0.4, 0.4, 0.4, 0.1))[0]
    among = other.jitter(2 * other.steps - 1, np.array([7, 42]), (0.4, 0.4, 0.4, 0.1))[1]
    assert np.array_equal(jitter, among)


def test_seeds_and_epochs_differ():
    for shuffle in ("global", "blocks"):
        orders = {epoch_order(seed, epoch, 50, shuffle).tobytes() for seed in (-1, 0, 1, 2**40) for epoch in range(3)}
        assert len(orders) == 12
    colors = {draws(seed, epoch, np.array([1]), np.array([4])).item() for seed in (0, 1) for epoch in (0, 1)}
    assert len(colors) == 4


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
@pytest.mark.parametrize("records", [1, 2, 3, 64, 65, BLOCK, BLOCK + 1, WINDOW, WINDOW + 1, 99_999, 1_281_167])
def test_order_is_a_permutation(records, shuffle):
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        order = epoch_order(seed, epoch, records, shuffle)
        assert np.array_equal(np.sort(order), np.arange(records))


@pytest.mark.parametrize("records", [1, 1000, WINDOW - 1, WINDOW])
def test_blocks_of_one_window_are_the_global_shuffle(records):
    assert np.array_equal(epoch_order(3, 1, records, "blocks"), epoch_order(3, 1, records))


def test_each_window_takes_whole_blocks_and_shuffles_all_of_them():
    windows = epoch_order(1, 1, 10 * WINDOW, "blocks").reshape(10, WINDOW)
    of_block = np.sort(windows // BLOCK)
    assert np.array_equal(of_block, of_block[:, ::BLOCK].repeat(BLOCK, 1))
    assert all(abs(np.corrcoef(window, np.arange(WINDOW))[0, 1]) < 0.03 for window in windows)
    blocks = of_block[:, ::BLOCK].ravel()
    assert abs(np.corrcoef(blocks, np.arange(len(blocks)))[0, 1]) < 0.15
    assert not np.array_equal(of_block, np.sort(epoch_order(1, 2, 10 * WINDOW, "blocks").reshape(10, WINDOW) // BLOCK))


def test_a_short_last_block_comes_anywhere():
    places = [np.flatnonzero(epoch_order(0, epoch, 6 * WINDOW + 1, "blocks") == 6 * WINDOW) for epoch in range(40)]
    assert len({int(place[0]) // WINDOW for place in places}) >= 6


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_order_is_well_mixed(shuffle):
    """A record moves a third of the epoch on average, and neighbors do not stay together."""
    order = epoch_order(1, 1, 2_000_000, shuffle)
    assert abs(np.abs(order - np.arange(2_000_000)).mean() / 2_000_000 - 1 / 3) < 0.005
    assert abs(np.corrcoef(order, epoch_order(1, 2, 2_000_000, shuffle))[0, 1]) < 0.02


def test_global_order_is_well_mixed_throughout():
    order = epoch_order(1, 1, 100_000)
    assert abs(np.abs(order - np.arange(100_000)).mean() / 100_000 - 1 / 3) < 0.005
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, epoch_order(1, 2, 100_000))[0, 1]) < 0.01
    assert (np.diff(order) == 1).sum() < 10


def test_crops_are_uniform_with_both_ends():
    """Chi-square over the 33 offsets of a room of 32, in rows and columns; 73.4 has a chance of 1 in 20,000."""
    drawn = Plan(100_000, 1, seed=2).augmentation(0, np.arange(100_000))
    for axis in range(2):
        counts = np.bincount(offset(drawn.places[0, :, axis], 32))
        assert len(counts) == 33
        assert ((counts - 100_000 / 33) ** 2 / (100_000 / 33)).sum() < 73.4


def test_crops_and_flips_are_independent():
    drawn = Plan(100_000, 1).augmentation(0, np.arange(100_000))
    correlation = np.corrcoef(np.column_stack((drawn.places[0], drawn.mirrors[0], drawn.color)).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.015
    assert abs(drawn.mirrors.mean() - 0.5) < 0.006


def test_color_is_standard_normal():
    z = Plan(200_000, 1, seed=9).augmentation(0, np.arange(200_000)).color
    assert np.abs(z.mean(0)).max() < 0.01
    assert np.abs(z.var(0) - 1).max() < 0.02
    assert np.abs((z**4).mean(0) - 3).max() < 0.15
    assert np.isfinite(normal(np.array([[0, 0, 0, 0], [2**64 - 1] * 4], np.uint64))).all()


def test_ten_views_are_corners_and_centre_then_the_same_mirrored():
    drawn = Plan(8, 2, "ten").augmentation(0, np.array([3, 4]))
    offsets = offset(drawn.places, 32)
    assert offsets[:, 1].tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]] * 2
    assert drawn.mirrors[:, 0].tolist() == [0] * 5 + [1] * 5
    assert not drawn.color.any()


@pytest.mark.parametrize(("room", "middle"), [(0, 0), (1, 1), (31, 16), (32, 16), (10**6, 500_000)])
def test_places_reach_both_ends_of_any_room(room, middle):
    assert [int(offset(np.int64(place), room)) for place in (NEAR, MIDDLE, FAR)] == [0, middle, room]


def test_too_few_records_for_a_step_are_refused():
    with pytest.raises(UserError, match="5 records do not fill one global batch of 8; lower batch_size to 2 or less"):
        Plan(5, 4, world_size=2)
    assert Plan(5, 4, "center", world_size=2).steps == 1


@pytest.mark.parametrize("wrong", [{"views": "five"}, {"shuffle": "some"}, {"batch_size": 0}, {"rank": 2, "world_size": 2}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ValueError):
        Plan(**{"records": 10, "batch_size": 2} | wrong)


def torchvision_box(drawn: list[int], height: int, width: int, scale, ratio) -> list[int]:
    """RandomResizedCrop.get_params of torchvision 0.20, with the numbers of `drawn` (32 of 64 bits) for its own."""
    shares = [draw / 2**64 for draw in drawn]
    rows, columns = (drawn[slot] >> 64 - PLACE_BITS for slot in (1, 2))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * shares[8 + 2 * attempt])
        aspect = math.exp(low + (high - low) * shares[9 + 2 * attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [rows * (height - h + 1) >> PLACE_BITS, columns * (width - w + 1) >> PLACE_BITS, h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 0.5), (0.3, 6.0))])
def test_boxes_are_torchvisions(monkeypatch, scale, ratio):
    """Also for long images, where few attempts or none fit, and for tiny ones."""
    plan, ids = Plan(1000, 10, seed=4), np.arange(1000)
    sides = np.random.RandomState(0).randint(1, 500, (2, 1000))
    sides[0, 600:800] = sides[1, 600:800] // 8 + 1
    sides[:, 800:] = sides[:, 800:] // 100 + 1
    monkeypatch.setattr(imagefeed.pipeline.plan, "AREA", scale)
    monkeypatch.setattr(imagefeed.pipeline.plan, "RATIO", ratio)
    boxes = plan.boxes(plan.steps, ids, *sides)
    drawn = draws(4, 1, ids, np.arange(32)).tolist()
    expected = [torchvision_box(drawn[n], *sides[:, n].tolist(), scale, ratio) for n in range(1000)]
    assert boxes.dtype == np.int64
    assert boxes.tolist() == expected
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sides.T).all()


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 1000, [0, 493, 10, 13]), (1000, 10, [493, 0, 13, 10]), (1, 5000, [0, 2499, 1, 1])]
)
def test_the_centre_is_taken_where_no_box_fits(height, width, box):
    assert Plan(50, 10).boxes(0, np.array([3, 4]), [height] * 2, [width] * 2).tolist() == [box, box]


def test_boxes_have_the_sizes_asked_for():
    """Of large square images nearly every first attempt fits but those of large areas."""
    height, width = Plan(100_000, 1).boxes(0, np.arange(100_000), *np.full((2, 100_000), 4000))[:, 2:].T
    share, ratio = height * width / 16e6, width / height
    assert 0.0799 < share.min() < 0.081 and 0.97 < share.max() <= 1
    assert 0.749 < ratio.min() < 0.751 and 1.332 < ratio.max() < 1.335
    assert abs(np.log(ratio).mean()) < 0.003
    # Below 3/4 every ratio fits, so that areas are uniform there.
    counts = np.histogram(share[share < 0.74], 11, (0.08, 0.74))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 37  # a chance of 1 in 20,000


def gray(image: np.ndarray) -> np.ndarray:
    return (0.2989 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2])[..., None]


def turn_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """A turn of chroma as a complex number, I + iQ of YIQ."""
    r, g, b = np.moveaxis(image, -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = (0.595716 * r - 0.274453 * g - 0.321263 * b) + 1j * (0.211456 * r - 0.522591 * g + 0.311135 * b)
    chroma *= np.exp(-2j * np.pi * turns)
    yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    return np.linalg.solve(yiq, np.stack((y, chroma.real, chroma.imag)).reshape(3, -1)).T.reshape(image.shape)


OPERATIONS = (
    lambda image, factor: factor * image,
    lambda image, factor: factor * image + (1 - factor) * gray(image).mean(),
    lambda image, factor: factor * image + (1 - factor) * gray(image),
    turn_hue,
)


def drawn_values(record: int, strengths) -> list[float]:
    """The factors of brightness, contrast and saturation, and the turn of hue, in the first epoch of seed 0."""
    shares = [draw / 2**64 for draw in draws(0, 0, np.array([record]), np.arange(28, 32))[0].tolist()]
    lows = [max(0, 1 - strength) for strength in strengths[:3]]
    highs = [1 + strength for strength in strengths[:3]]
    values = [low + (high - low) * share for low, high, share in zip(lows, highs, shares[:3])]
    return [*values, strengths[3] * (2 * shares[3] - 1)]


def apply(maps: np.ndarray, image: np.ndarray) -> np.ndarray:
    return image @ maps[0].T + maps[1] @ image.mean((0, 1))


STRONG = (0.4, 0.5, 1.6, 0.3)


def test_jitter_is_the_four_operations_one_after_another_in_random_order():
    """Brightness commutes with all, contrast with saturation, so of 24 orders four kinds can be told apart."""
    found = {(3, 1, 2): 0, (1, 2, 3): 0, (1, 3, 2): 0, (2, 3, 1): 0}
    image = np.random.RandomState(0).rand(6, 5, 3) * 255
    maps = Plan(600, 10).jitter(0, np.arange(600), STRONG)
    assert maps.shape == (600, 2, 3, 3)
    for record in range(600):
        values = drawn_values(record, STRONG)
        matching = []
        for order in found:
            expected = OPERATIONS[0](image, values[0])
            for operation in order:
                expected = OPERATIONS[operation](expected, values[operation])
            if np.abs(apply(maps[record], image) - expected).max() < 1e-9:
                matching.append(order)
        assert len(matching) == 1, record
        found[matching[0]] += 1
    assert np.abs(np.array(list(found.values())) - [200, 200, 100, 100]).max() < 45  # four deviations


@pytest.mark.parametrize("operation", range(4))
def test_jitter_of_one_kind_is_its_formula(operation):
    image = np.random.RandomState(1).rand(4, 7, 3) * 255
    strengths = [0.0] * 4
    strengths[operation] = STRONG[operation]
    for record, maps in enumerate(Plan(50, 10).jitter(0, np.arange(50), tuple(strengths))):
        expected = OPERATIONS[operation](image, drawn_values(record, strengths)[operation])
        assert np.abs(apply(maps, image) - expected).max() < 1e-9


def test_hue_turns_as_dalis_does():
    """DALI rounds the same matrices to three decimals."""
    image = np.random.RandomState(2).randint(0, 256, (8, 9, 3)).astype(np.uint8)
    ids = np.arange(6)
    pipeline = Pipeline(6, 1, None)
    with pipeline:
        degrees = fn.external_source(lambda: [np.float32(360 * drawn_values(n, (0, 0, 0, 0.5))[3]) for n in ids], batch=True)
        images = fn.external_source(lambda: [image] * 6, batch=True)
        pipeline.set_outputs(fn.hsv(images, hue=degrees, dtype=types.FLOAT))
    (turned,) = pipeline.run()
    by_dali = np.stack([np.array(one) for one in turned])
    mine = np.stack([apply(maps, image) for maps in Plan(50, 10).jitter(0, ids, (0, 0, 0, 0.5))])
    assert np.abs(mine - by_dali).max() < 1.5
    assert np.abs(mine - image).mean() > 20


def test_no_jitter_changes_nothing():
    maps = Plan(50, 10).jitter(0, np.arange(50), (0, 0, 0, 0))
    assert np.abs(maps[:, 0] - np.eye(3)).max() < 1e-15
    assert not maps[:, 1].any()


def test_factors_fill_their_range_and_stop_at_zero():
    brightness = Plan(50, 10).jitter(0, np.arange(20_000), (1.5, 0, 0, 0))[:, 0, 0, 0]
    assert 0 <= brightness.min() < 0.001 and 2.499 < brightness.max() <= 2.5
    assert abs(brightness.mean() - 1.25) < 0.02


@pytest.mark.parametrize(
    "strengths", [(-0.1, 0, 0, 0), (0, math.nan, 0, 0), (0, 0, math.inf, 0), (0, 0, 0, 0.51), (0, 0, 0, -0.1), (0, 0, 0)]
)
def test_impossible_strengths_are_refused(strengths):
    with pytest.raises(ValueError, match="color_jitter must be four numbers of 0 or more, the last at most 0.5"):
        Plan(50, 10).jitter(0, np.array([1]), strengths)


@pytest.mark.parametrize(("batch_size", "start"), [(100, 0), (3000, 5), (20_000, 1)])
def test_what_a_step_takes_was_asked_for_before(batch_size, start):
    """Of two ranks, over two epochs; a window's records are asked for in the order in which they are stored."""
    plan = Plan(70_000, batch_size, seed=2, shuffle="blocks", rank=1, world_size=2)
    asked = np.zeros(70_000, bool)
    for position in range(start, 2 * plan.steps):
        ids = plan.prefetch_window(position, position == start)
        asked[ids] = True
        assert asked[plan.ids(position)[0]].all()
        if position > start and batch_size == 100:
            assert len(ids) < 2000 and np.count_nonzero(np.diff(ids) < 0) <= 1
    assert Plan(70_000, 100).prefetch_window(5, True) is None


@pytest.mark.parametrize(
    ("batch", "nodes"), [(256, (1, 2, 4, 8, 64)), (96, (1, 2, 4, 8, 32)), (1024, (1, 8, 16)), (40, (1, 2, 4, 8))]
)
def test_nodes_read_blocks_of_their_own(batch, nodes):
    """With node-blocks: in the same global order, whatever their number, and but for the blocks at the ends of their parts."""
    records = 200_003
    order = epoch_order(3, 5, records, "node-blocks", batch)
    steps = records // batch
    for count in nodes:
        plans = [
            Plan(records, batch // count, seed=3, shuffle="node-blocks", rank=rank, world_size=count) for rank in range(count)
        ]
        taken = np.stack([plan.ids(5 * steps + step)[0] for plan in plans for step in range(steps)]).reshape(count, -1)
        read = [set((ids // BLOCK).tolist()) for ids in taken]
        assert sum(map(len, read)) - len(set().union(*read)) <= count - 1
        together = taken.reshape(count, steps, -1).transpose(1, 0, 2).ravel()
        assert np.array_equal(together, order[: steps * batch])


def test_a_batch_of_node_blocks_takes_of_many_blocks():
    """One of each part, but for halves of one block; and a block's records come in as few steps as it lasts."""
    order = epoch_order(0, 0, 500_000, "node-blocks", 256)[: 500_000 // 256 * 256].reshape(-1, 256)
    counts = [len(np.unique(ids // BLOCK)) for ids in order]
    assert min(counts) >= PARTS // 2 and np.median(counts) >= PARTS
    first, last = np.full((2, 1954), -1)
    for step, ids in enumerate(order):
        blocks = np.unique(ids // BLOCK)
        first[blocks[first[blocks] < 0]] = step
        last[blocks] = step
    whole = (last - first)[(first > 0) & (last < len(order) - 1)]
    assert np.median(whole) <= 66 and whole.max() <= 130


def test_repeats_of_node_blocks_divide_the_batch():
    plans = [Plan(50_000, 48, shuffle="node-blocks", repeats=3, rank=rank, world_size=2) for rank in range(2)]
    ids = np.concatenate([plan.ids(step)[0] for step in range(plans[0].steps) for plan in plans])
    assert (np.unique(ids, return_counts=True)[1] == 3).all()
    with pytest.raises(UserError, match="repeats must divide the global batch, and 100 is no multiple of 3"):
        Plan(50_000, 100, shuffle="node-blocks", repeats=3)
