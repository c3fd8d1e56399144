import itertools
import math

import numpy as np
import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.model.nets import build_net
from imagefeed.training.recipes import (
    RECIPES,
    Recipe,
    jittered,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    set_learning_rates,
)


def rates(recipe: Recipe, epoch_steps: int = 10) -> list[float]:
    """At the first step of each epoch."""
    return [learning_rate(recipe, epoch * epoch_steps, epoch_steps, 0) for epoch in range(recipe.epochs)]


def test_the_update_is_the_papers_across_changes_of_the_learning_rate():
    """Section 5: v <- .9 v - .0005 lr w - lr g, w <- w + v, in numpy."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=20), np.zeros(20)
    net = torch.nn.Linear(20, 1, bias=False, dtype=torch.float64)
    net.weight.data = torch.from_numpy(w.copy())[None]
    optimizer = make_optimizer(net, RECIPES["paper"])
    for lr in (0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.0008):
        g = rng.normal(size=20)
        v = 0.9 * v - 0.0005 * lr * w - lr * g
        w = w + v
        set_learning_rate(optimizer.param_groups[0], lr, 0.9)
        net.weight.grad = torch.from_numpy(g)[None]
        optimizer.step()
        np.testing.assert_allclose(net.weight.detach().numpy()[0], w, rtol=1e-12)


def test_the_papers_rate_follows_only_the_drops():
    assert {learning_rate(RECIPES["paper"], step, 10, 0) for step in range(900)} == {0.01}
    assert learning_rate(RECIPES["paper"], 5, 10, 2) == 0.0001


def test_the_rate_drops_after_the_given_epochs():
    assert rates(Recipe(schedule="2,4", epochs=6)) == [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert rates(Recipe(schedule="2,2", epochs=4)) == [0.01, 0.01, 0.0001, 0.0001]
    assert [learning_rate(Recipe(schedule="2"), step, 10, 0) for step in (19, 20)] == [0.01, 0.001]


def test_smooth_schedules_warm_up_and_fall_to_nothing():
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        recipe = Recipe(schedule=schedule, warmup_epochs=2, epochs=10, lr=1)
        found = [learning_rate(recipe, step, 10, 0) for step in range(100)]
        assert found[:20] == pytest.approx(np.arange(1, 21) / 20)
        assert found[60] == pytest.approx(middle) and 0 < found[99] < 0.02
        assert all(after < before for before, after in itertools.pairwise(found[20:]))
    assert found[40] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_values_that_contradict_each_other_or_are_out_of_range_are_refused():
    with pytest.raises(UserError, match="warmup_epochs=5 of 5 epochs leaves none in which schedule=cosine can fall"):
        Recipe(schedule="cosine", warmup_epochs=5, epochs=5)
    with pytest.raises(ValueError, match="momentum must be a number above 0 and below 1, not 1"):
        Recipe(momentum=1)


def test_the_codes_rates_are_those_of_its_notes():
    """Weights, biases and both of conv1, at each epoch of section 5's and the notes' changes."""
    recipe = RECIPES["code"]
    net = build_net("alexnet-code", 3, crop_size=64)
    optimizer = make_optimizer(net, recipe)
    of = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {}
    for epoch in (0, 25, 51, 67, 72, 79):
        assert set_learning_rates(optimizer, recipe, epoch * 10, 10, 0) == learning_rate(recipe, epoch * 10, 10, 0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(of[id(parameter)], []).append(group["lr"])
    assert len(found) == 16
    assert found["conv2.weight"] == found["fc8.weight"] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-4, 1e-4, 1e-5])
    assert found["conv1.weight"] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5, 0, 0])
    assert found["fc7.bias"] == [0.02] * 6 and found["conv1.bias"] == pytest.approx([0.02] * 3 + [0.002, 0, 0])
    decays = {of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name.rpartition(".")[2]: decay for name, decay in decays.items()} == {"weight": 0.0005, "bias": 0}


def test_a_layer_at_rate_zero_stands_still():
    net = torch.nn.Linear(3, 1)
    optimizer = make_optimizer(net, Recipe(first_layer_epochs="1,2"))
    before = None
    for step in range(4):
        set_learning_rates(optimizer, Recipe(first_layer_epochs="1,2"), step, 1, 0)
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert before is None or torch.equal(before, net.weight) == (step >= 2)
        before = net.weight.detach().clone()


def test_colors_are_jittered_until_the_recipe_ends_it():
    assert [jittered(Recipe(pca_jitter_epochs=2), step, 5) for step in (0, 9, 10, 50)] == [True, True, False, False]
    assert jittered(Recipe(), 10**6, 5) and not jittered(Recipe(pca_jitter=0.0), 0, 5)
