import numpy as np
import pytest

from pipeline.plan import FAR, GOLDEN, MIDDLE, NEAR, Plan, draws, epoch_order, mix, normal, offset
from preprocess.errors import UserError


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
    look = plan.look(plan.steps + 3, ids)
    assert ids.tolist() == [63, 768]
    assert look.places[0].tolist() == [[904252423, 216857630], [503458382, 973335584]]
    assert look.mirrors[0].tolist() == [1, 1]
    assert look.colour.round(6).tolist() == [[0.175235, 1.60731, -1.264051], [-0.699404, 0.253716, 0.47676]]


@pytest.mark.parametrize(("records", "batch_size", "world_size"), [(50, 8, 1), (50, 4, 3), (64, 8, 2), (7, 1, 7)])
def test_training_takes_each_record_at_most_once_and_drops_less_than_a_global_batch(records, batch_size, world_size):
    plans = [Plan(records, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(3):
        positions = range(epoch * plans[0].steps, (epoch + 1) * plans[0].steps)
        taken = np.concatenate([plan.ids(position)[0] for plan in plans for position in positions])
        assert len(np.unique(taken)) == len(taken) > records - batch_size * world_size
        assert all(plan.ids(position)[1].all() for plan in plans for position in positions)


@pytest.mark.parametrize(("records", "batch_size", "world_size"), [(50, 8, 1), (50, 4, 3), (64, 8, 2), (3, 8, 2)])
def test_evaluation_takes_each_record_once_in_stored_order(records, batch_size, world_size):
    plans = [Plan(records, batch_size, "center", rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [plan.ids(step) for step in range(plans[0].steps) for plan in plans]
    ids, valid = map(np.concatenate, zip(*batches, strict=True))
    assert ids[valid].tolist() == list(range(records))
    assert {len(batch) for batch, _ in batches} == {batch_size}
    assert ids.min() >= 0 and ids.max() < records


@pytest.mark.parametrize("views", ["random", "center", "ten"])
def test_ranks_put_together_are_the_batch_of_one(views):
    one = Plan(100, 12, views, seed=3)
    for position in (0, one.steps - 1, one.steps + 2):
        parts = [Plan(100, 4, views, 3, rank, 3).ids(position) for rank in range(3)]
        for whole, cut in zip(one.ids(position), zip(*parts, strict=True), strict=True):
            assert np.array_equal(whole, np.concatenate(cut))


def test_look_of_a_record_is_its_own():
    """It does not depend on the batch, the rank or the step in which the record comes, only on seed and epoch."""
    plan, other = Plan(100, 10, seed=5), Plan(100, 25, seed=5, world_size=2, rank=1)
    alone = plan.look(plan.steps, np.array([42]))
    among = other.look(2 * other.steps - 1, np.array([7, 42, 99]))
    assert alone.places[0, 0].tolist() == among.places[0, 1].tolist()
    assert alone.mirrors[0, 0] == among.mirrors[0, 1]
    assert alone.colour[0].tolist() == among.colour[1].tolist()


def test_seeds_and_epochs_differ():
    orders = {epoch_order(seed, epoch, 50).tobytes() for seed in (-1, 0, 1, 2**40) for epoch in range(3)}
    assert len(orders) == 12
    colours = {draws(seed, epoch, np.array([1]), np.array([4])).item() for seed in (0, 1) for epoch in (0, 1)}
    assert len(colours) == 4


@pytest.mark.parametrize("records", [1, 2, 3, 64, 65, 1_281_167])
def test_order_is_a_permutation(records):
    order = epoch_order(0, 0, records)
    assert np.array_equal(np.sort(order), np.arange(records))


def test_order_is_well_mixed():
    """A record moves a third of the epoch on average, and neighbours do not stay together."""
    order = epoch_order(1, 1, 100_000)
    assert abs(np.abs(order - np.arange(100_000)).mean() / 100_000 - 1 / 3) < 0.005
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, epoch_order(1, 2, 100_000))[0, 1]) < 0.01
    assert (np.diff(order) == 1).sum() < 10


def test_crops_are_uniform_with_both_ends():
    """Chi-square over the 33 offsets of a room of 32, in rows and columns; 73.4 has a chance of 1 in 20,000."""
    look = Plan(100_000, 1, seed=2).look(0, np.arange(100_000))
    for axis in range(2):
        counts = np.bincount(offset(look.places[0, :, axis], 32))
        assert len(counts) == 33
        assert ((counts - 100_000 / 33) ** 2 / (100_000 / 33)).sum() < 73.4


def test_crops_and_flips_are_independent():
    look = Plan(100_000, 1).look(0, np.arange(100_000))
    drawn = np.column_stack((look.places[0], look.mirrors[0], look.colour))
    correlation = np.corrcoef(drawn.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.015
    assert abs(look.mirrors.mean() - 0.5) < 0.006


def test_colour_is_standard_normal():
    z = Plan(200_000, 1, seed=9).look(0, np.arange(200_000)).colour
    assert np.abs(z.mean(0)).max() < 0.01
    assert np.abs(z.var(0) - 1).max() < 0.02
    assert np.abs((z**4).mean(0) - 3).max() < 0.15
    assert np.isfinite(normal(np.array([[0, 0, 0, 0], [2**64 - 1] * 4], np.uint64))).all()


def test_ten_views_are_corners_and_centre_then_the_same_mirrored():
    look = Plan(8, 2, "ten").look(0, np.array([3, 4]))
    offsets = offset(look.places, 32)
    assert offsets[:, 1].tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [16, 16]] * 2
    assert look.mirrors[:, 0].tolist() == [0] * 5 + [1] * 5
    assert not look.colour.any()


@pytest.mark.parametrize(("room", "middle"), [(0, 0), (1, 1), (31, 16), (32, 16), (10**6, 500_000)])
def test_places_reach_both_ends_of_any_room(room, middle):
    assert [int(offset(np.int64(place), room)) for place in (NEAR, MIDDLE, FAR)] == [0, middle, room]


def test_too_few_records_for_a_step_are_refused():
    with pytest.raises(UserError, match="5 records do not fill one global batch of 8; lower the batch size"):
        Plan(5, 4, world_size=2)
    assert Plan(5, 4, "center", world_size=2).steps == 1


@pytest.mark.parametrize("wrong", [{"views": "five"}, {"batch_size": 0}, {"rank": 2, "world_size": 2}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ValueError):
        Plan(**{"records": 10, "batch_size": 2} | wrong)
