import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_lrn import literal

from model import AlexNet
from model.alexnet import Dropout

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet().eval()


@contextlib.contextmanager
def watched(net: AlexNet) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """What each layer is given and gives, before ReLU and pooling, a pair for each call."""
    seen = {name: [] for name in LAYERS}
    hooks = [
        getattr(net, name).register_forward_hook(lambda _, inputs, out, name=name: seen[name].append((inputs[0], out)))
        for name in LAYERS
    ]
    with torch.no_grad():
        yield seen
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def outputs(net) -> dict[str, torch.Tensor]:
    """What each layer gives for one image."""
    with watched(net) as seen:
        net(torch.zeros(1, 3, 224, 224))
    return {name: calls[0][1][0] for name, calls in seen.items()}


def test_has_60_965_224_parameters(net):
    assert sum(parameter.numel() for parameter in net.parameters()) == 60_965_224
    assert {name: sum(p.numel() for p in getattr(net, name).parameters()) for name in LAYERS} == {
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    }


def test_has_659_272_neurons(outputs):
    """Section 3.5: 55x55x96, 27x27x256, 13x13x384 twice, 13x13x256, 4096, 4096, 1000 (figure 2 misprints the first)."""
    assert [tuple(out.shape) for out in outputs.values()] == [
        (96, 55, 55),
        (256, 27, 27),
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
        (4096,),
        (4096,),
        (1000,),
    ]
    assert sum(out.numel() for out in outputs.values()) == 659_272


def test_takes_724_406_816_multiply_adds_an_image(net, outputs):
    """A neuron takes one for each weight that leads to it: the weights of its layer divided by the layer's maps."""
    counts = {name: out.numel() * getattr(net, name).weight[0].numel() for name, out in outputs.items()}
    assert counts["conv1"] == 105_415_200 and counts["conv2"] == 223_948_800 and counts["fc6"] == 37_748_736
    assert sum(counts.values()) == 724_406_816


def convolve(x: np.ndarray, layer: torch.nn.Conv2d, stride: int = 1, padding: int = 0, towers: int = 1) -> np.ndarray:
    """out[o, y, x] = b[o] + the sum over i, r, c of w[o, i, r, c] * in[i, stride y + r, stride x + c], by towers."""
    weight, bias = (parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias))
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    side = weight.shape[-1]
    rows = (x.shape[1] - side) // stride + 1
    result = []
    for part, kernel in zip(np.split(x, towers), np.split(weight, towers), strict=True):
        out = np.zeros((len(kernel), rows, rows))
        for r in range(side):
            for c in range(side):
                seen = part[:, r : r + rows * stride : stride, c : c + rows * stride : stride]
                out += np.einsum("oi,iyx->oyx", kernel[:, :, r, c], seen[:, :rows, :rows], optimize=True)
        result.append(out)
    return np.concatenate(result) + bias[:, None, None]


def pool(x: np.ndarray) -> np.ndarray:
    """The largest of windows of 3x3, 2 apart."""
    side = (x.shape[1] - 3) // 2 + 1
    return np.array(
        [[x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max((1, 2)) for c in range(side)] for r in range(side)]
    ).transpose(2, 0, 1)


def test_every_layer_is_the_papers_formula_in_float64():
    """On the paper's image size, with biases that differ from neuron to neuron; dropout halves at test."""
    torch.manual_seed(1)
    net = AlexNet(num_classes=7).eval()
    for name in LAYERS:
        torch.nn.init.normal_(getattr(net, name).bias, std=0.5)
    image = torch.randn(1, 3, 224, 224) * 70
    with watched(net) as seen:
        net(image)

    def check(name: str, out: np.ndarray) -> np.ndarray:
        ((_, given),) = seen[name]
        np.testing.assert_allclose(given[0].numpy(), out, rtol=0, atol=1e-5 * np.abs(out).max(), err_msg=name)
        return np.maximum(out, 0)

    def full(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        return layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()

    x = np.pad(image[0].double().numpy(), ((0, 0), (0, 3), (0, 3)))
    x = check("conv1", convolve(x, net.conv1, stride=4))
    x = pool(literal(x[None], towers=2)[0])
    x = check("conv2", convolve(x, net.conv2, padding=2, towers=2))
    x = pool(literal(x[None], towers=2)[0])
    x = check("conv3", convolve(x, net.conv3, padding=1))
    x = check("conv4", convolve(x, net.conv4, padding=1, towers=2))
    x = pool(check("conv5", convolve(x, net.conv5, padding=1, towers=2)))
    x = check("fc6", full(x.reshape(-1), net.fc6)) * 0.5
    x = check("fc7", full(x, net.fc7)) * 0.5
    check("fc8", full(x, net.fc8))


@pytest.mark.parametrize("name", ["conv2", "conv4", "conv5"])
def test_grouped_layers_are_two_towers_that_do_not_see_each_other(net, name):
    layer = getattr(net, name)
    channels = layer.in_channels // 2, layer.out_channels // 2
    towers = [torch.nn.Conv2d(*channels, layer.kernel_size, padding=layer.padding) for _ in range(2)]
    for tower, weight, bias in zip(towers, layer.weight.chunk(2), layer.bias.chunk(2), strict=True):
        tower.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, layer.in_channels, 7, 7, generator=torch.Generator().manual_seed(3))
    separate = torch.cat([tower(half) for tower, half in zip(towers, x.chunk(2, dim=1), strict=True)], dim=1)
    torch.testing.assert_close(layer(x), separate)


def test_only_conv3_joins_the_towers_before_the_full_layers(net):
    assert [getattr(net, name).groups for name in LAYERS[:5]] == [1, 2, 1, 2, 2]


def test_dropout_neither_rescales_in_training_nor_drops_at_test():
    torch.manual_seed(2)
    dropout = Dropout(0.25)
    x = torch.full((100, 1000), 3.0)
    trained = dropout.train()(x)
    assert set(trained.unique().tolist()) == {0.0, 3.0}
    assert abs((trained == 0).float().mean().item() - 0.25) < 0.01
    assert torch.equal(dropout.eval()(x), x * 0.75)


def test_dropout_lets_gradients_through_where_it_let_the_output():
    torch.manual_seed(2)
    x = torch.ones(50, requires_grad=True)
    y = Dropout(0.5).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and 0 < x.grad.sum() < 50


def test_dropout_acts_on_fc6_and_fc7_alone(net):
    """Two training passes differ first in what fc7 gets, so nothing else is random."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4)) * 50
    net.train()
    with watched(net) as seen:
        net(x)
        net(x)
    net.eval()
    different = [name for name, (first, second) in seen.items() if not torch.equal(first[0], second[0])]
    assert different == ["fc7", "fc8"]
    for name in different:
        assert (seen[name][0][0] == 0).float().mean() > 0.4


def test_starts_as_the_paper_says(net):
    for name in LAYERS:
        layer = getattr(net, name)
        values = layer.weight.detach().flatten()[:1_000_000].double()
        error = 4 / values.numel() ** 0.5  # four standard errors
        assert abs(values.mean()) < 0.01 * error, name
        assert abs(values.std() / 0.01 - 1) < error, name
        assert abs((values.abs() > 0.01).double().mean() - 0.3173) < error, f"{name} is not normal"
        ones = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        assert torch.equal(layer.bias, torch.full_like(layer.bias, float(ones))), name


def test_the_seed_decides_the_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(AlexNet(num_classes=2, size=64).parameters())

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_gradients_are_those_of_finite_differences():
    """In float64, along random directions of all weights, for the loss of a small batch of small images."""
    torch.manual_seed(3)
    net = AlexNet(num_classes=4, dropout=0.0, size=64).double()
    x, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64) * 50, torch.tensor([1, 3])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(x), labels)

    loss().backward()
    for name in LAYERS:
        weight = getattr(net, name).weight
        direction = torch.randn_like(weight)
        step = 1e-8  # larger ones cross the kinks of ReLU and pooling
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
            weight += step * direction
        slope = (weight.grad * direction).sum()
        torch.testing.assert_close((above - below) / (2 * step), slope, rtol=1e-4, atol=1e-6, msg=name)


def test_a_crop_of_227_is_one_of_224_with_its_overhang(net):
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(6)) * 70
    with torch.no_grad():
        assert torch.equal(net(x), net(torch.nn.functional.pad(x, (0, 3, 0, 3))))


@pytest.mark.parametrize("size", [64, 112, 128])
def test_other_crops_give_fc6_what_its_size_says(size):
    """64 pixels are the least: of them a single one is left behind the last pool."""
    assert AlexNet(num_classes=3, size=size).eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_bfloat16_only_rounds(net):
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5)) * 70
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_the_positive_biases_may_start_elsewhere():
    """Small budgets learn sooner from less than the paper's 1; the layers that start at 0 stay there."""
    net = AlexNet(num_classes=2, size=64, bias=0.1)
    starts = {name: getattr(net, name).bias.unique().tolist() for name in LAYERS}
    assert {name for name, start in starts.items() if start == [pytest.approx(0.1)]} == {
        "conv2",
        "conv4",
        "conv5",
        "fc6",
        "fc7",
    }
    assert {name for name, start in starts.items() if start == [0.0]} == {"conv1", "conv3", "fc8"}
