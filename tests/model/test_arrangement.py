"""Each way to compute a net against the layers one after the other, in float64 and on a CPU."""

import pytest
import torch

from imagefeed.model import fused
from imagefeed.model.arrangement import Arrangement, FirstConv2d, arrange, choices, fastest, fold
from imagefeed.model.nets import build_net

FORMS = [
    ("alexnet", {}),
    ("alexnet-code", {}),
    ("alexnet-one-gpu", {}),
    ("alexnet-conv6", {}),
    ("alexnet", {"lrn": False}),
    ("alexnet", {"overlapping": False}),
    ("alexnet-owt", {}),
]


def net_of(name: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build_net(name, 4, crop_size=67, dropout=0.0, **options)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("fc" not in name and "classifier" not in name)  # the same in all ways, and most of the work
        torch.nn.init.normal_(parameter, std=0.03)
    return net.double().to(memory_format=torch.channels_last)


def outputs(net: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    maps = net.features(images)
    return maps, torch.autograd.grad(maps.square().sum(), [p for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("name, options", FORMS, ids=str)
def test_ways_differ_only_in_the_order_of_sums(name, options, monkeypatch):
    net, images = net_of(name, options), torch.randn(2, 3, 67, 67, dtype=torch.float64) * 50
    wanted, gradients = outputs(net, images)
    arrange(net, Arrangement(apart=True))
    assert torch.equal(net.features(images), wanted)
    monkeypatch.setattr(fused, "fits", lambda x, width: True)  # a CPU runs the operators by plain operations
    for way in (Arrangement(folded=True), Arrangement(True, True, True), Arrangement(True, False, False)):
        arrange(net, way)
        found, others = outputs(net, images)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13 * wanted.abs().max().item())
        for one, other in zip(others, gradients, strict=True):
            assert (one - other).abs().max() < 1e-12 * other.abs().max()


def test_an_arrangement_changes_no_state_dict():
    net = net_of("alexnet", {})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    arrange(net, Arrangement(True, True, False))
    after = net.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert net.arrangement == Arrangement(True, True, False) and net.conv1.folded


@pytest.mark.parametrize("size, padding", [(224, 2), (63, 2), (64, 2), (65, 2), (66, 2), (67, 0), (75, 0)])
def test_conv1_over_cells_has_the_same_outputs_at_any_size(size, padding):
    layer = FirstConv2d(3, 2, 11, stride=4, padding=padding).double()
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    wanted = layer(images)
    layer.folded = True
    torch.testing.assert_close(layer(images), wanted, rtol=1e-12, atol=1e-12)


def test_a_cell_holds_its_pixels_row_by_row():
    images = torch.arange(3 * 8 * 8).view(1, 3, 8, 8)
    cells = fold(images)
    assert cells.shape == (1, 48, 2, 2) and cells.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cells[0, :, 1, 0].view(4, 4, 3), images[0, :, 4:, :4].permute(1, 2, 0))


def test_the_fastest_arrangement_is_found_one_change_at_a_time():
    net, asked = net_of("alexnet", {}), []

    def seconds(way: Arrangement) -> float:
        asked.append(way)
        return 5 - 2 * way.apart + way.folded - 0.5 * (not way.pooled)

    assert fastest(net, seconds) == Arrangement(apart=True, folded=False, pooled=False)
    assert asked == [Arrangement(), Arrangement(True), Arrangement(True, True), Arrangement(True, False, False)]
    assert len(choices(net_of("alexnet-owt", {}))) == 1 and fastest(torch.nn.Linear(1, 1), seconds) == Arrangement()
