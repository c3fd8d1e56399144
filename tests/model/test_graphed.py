"""A recorded step against ordinary ones, with a recorder that repeats work on the CPU; the kernel of its update."""

import time
from collections.abc import Callable

import pytest
import torch

from imagefeed.model.graphed import WARM_UP, GraphedSGD, GraphedStep, HostRecorder, StepForm, fastest_form
from imagefeed.model.graphed import update as plain_update
from imagefeed.model.step import train_step
from imagefeed.training.recipes import Recipe, make_optimizer, set_learning_rates
from tests.gpu_kernels import CAPABILITIES, build


class Repeater(HostRecorder):
    """Counts what it repeats."""

    repeated = 0

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        replay, place = super().record(work)

        def counted() -> None:
            self.repeated += 1
            replay()

        return counted, place


class Broken(HostRecorder):
    """As CUDA refuses what waits for the device, in the middle of a step."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")


class Sleeper(HostRecorder):
    """Its graphs take so long, and do nothing."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        return lambda: time.sleep(self.seconds), torch.zeros(())


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 5, stride=3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4)
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def batches(steps: int, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 14, 14, generator=own), torch.randint(4, (size,), generator=own)) for _ in range(steps)]


# Two groups whose learning rates change in each step; and one whose first layer comes to rest.
RECIPES = [
    Recipe(lr=0.1, schedule="cosine", warmup_epochs=1, epochs=4, bias_lr=0.2),
    Recipe(lr=0.1, schedule="2", epochs=4, first_layer_epochs="1,2"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["cosine", "first layer"])
def test_recorded_steps_are_ordinary_ones(recipe):
    """Also after a batch of another shape, and from momentum that is there before."""
    found = []
    for recorded in (False, True):
        model, recorder = net(), Repeater()
        optimizer = make_optimizer(model, recipe)
        train_step(model, *batches(1)[0], optimizer, "float32")
        step = GraphedStep(model, optimizer, "float32", recorder) if recorded else None
        losses = []
        for number, batch in enumerate([*batches(7), *batches(1, size=3), *batches(4)]):
            set_learning_rates(optimizer, recipe, number, 3, 0)
            loss = step(*batch) if recorded else train_step(model, *batch, optimizer, "float32")
            losses.append(loss.item())
        assert recorder.repeated == (11 - WARM_UP if recorded else 0)
        momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
        found.append((losses, [*model.parameters(), *momenta]))
    (losses, tensors), (others, other_tensors) = found
    assert losses == pytest.approx(others, rel=1e-5) and len(set(losses)) == 12
    for one, other in zip(tensors, other_tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_state_is_that_of_torchs_optimizer():
    """So that checkpoints are the same; a run may go on without a graph."""
    model = net()
    optimizer = make_optimizer(model, Recipe(lr=0.1))
    update = GraphedSGD(optimizer)
    assert all(state["momentum_buffer"].abs().sum() == 0 for state in optimizer.state_dict()["state"].values())
    train_step(model, *batches(1)[0], update, "float32")
    assert all(state["momentum_buffer"].stride() == p.stride() for p, state in zip(model.parameters(), optimizer.state.values()))
    before = [parameter.clone() for parameter in model.parameters()]
    train_step(model, *batches(1)[0], optimizer, "float32")
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_other_optimizers_are_refused():
    with pytest.raises(ValueError, match="only plain SGD"):
        GraphedSGD(torch.optim.SGD(net().parameters(), 0.1, 0.9, nesterov=True))


def test_phases_are_told_to_the_profiler():
    phases = []
    model = net()
    GraphedStep(model, make_optimizer(model, Recipe()), "float32", Repeater())(*batches(1)[0], phases.append)
    assert phases == ["forward", "backward", "optimizer", "end"]


def test_a_recording_that_fails_leaves_ordinary_steps_and_says_so_once(caplog):
    found = []
    for recorder in (Broken(), None):
        model = net()
        optimizer = make_optimizer(model, Recipe(lr=0.1))
        step = GraphedStep(model, optimizer, "float32", recorder) if recorder else None
        for batch in batches(WARM_UP + 4):
            train_step(model, *batch, optimizer, "float32") if step is None else step(*batch)
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "a step of this net cannot become one CUDA graph (CUDA error: operation not permitted when stream is capturing Compile "
        "with TORCH_USE_CUDA_DSA), so its kernels are queued one by one"
    ]


@pytest.mark.parametrize(("slept_s", "graphed"), [(0.0, True), (0.2, False)])
def test_a_graph_is_taken_where_it_is_faster(slept_s, graphed):
    """An ordinary step of this net takes milliseconds."""
    model = net()
    form = fastest_form(model, make_optimizer(model, Recipe()), "float32", batches(1, 64)[0], Sleeper(slept_s))
    assert form == StepForm(graphed)


def test_a_graph_that_cannot_be_recorded_is_not_taken(caplog):
    model = net()
    form = fastest_form(model, make_optimizer(model, Recipe()), "float32", batches(1)[0], Broken())
    assert form == StepForm(graphed=False) and len(caplog.records) == 1


def test_the_plain_update_is_the_papers_rule_in_float64():
    """Section 5, with b = -v / lr."""
    own = torch.Generator().manual_seed(2)
    w, g, b = (torch.randn(50, generator=own, dtype=torch.float64) for _ in range(3))
    v = 0.9 * (-0.01 * b) - 0.0005 * 0.01 * w - 0.01 * g
    wanted = w + v
    plain_update(w, g, b, torch.tensor([0.01, 0.9], dtype=torch.float64), 0.0005)
    torch.testing.assert_close(w, wanted)
    torch.testing.assert_close(b, -v / 0.01)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_fits_the_device(capability):
    """No spills; 16 bytes at a time."""
    pytest.importorskip("triton")
    from imagefeed.model.sgd_kernels import BLOCK, update

    types = {"weight": "*fp32", "grad": "*fp32", "gathered": "*fp32", "settings": "*fp32", "decay": "fp32", "count": "i32"}
    aligned = {"count": "i32"}  # of a multiple of 16 weights, as all layers but the last bias have
    built = build(update, capability, tuple((types | aligned).items()), (("BLOCK", BLOCK),))
    assert built.registers <= 48 and built.shared == built.stack == 0
    assert built.loads[16] == 6 and built.stores[16] == 4
