import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagefeed.dataset.errors import UserError
from imagefeed.model.alexnet import AlexNet, Dropout
from tests.model.test_lrn import literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
FORMS = [{}, {"as_coded": True}, {"towers": 1}, {"conv6": True}, {"lrn": False}, {"overlapping": False}]
FORMS += [{"as_coded": True, "towers": 1}]


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet().eval()


@contextlib.contextmanager
def watched(net: AlexNet) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """What each layer is given and gives, before ReLU and pooling, a pair for each call."""
    layers = {name: layer for name, layer in net.named_children() if hasattr(layer, "weight")}
    seen = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out, name=name: seen[name].append((inputs[0], out)))
        for name, layer in layers.items()
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


def pool(x: np.ndarray, window: int) -> np.ndarray:
    """The largest of windows, 2 apart."""
    side = (x.shape[1] - window) // 2 + 1
    return np.array(
        [[x[:, 2 * r : 2 * r + window, 2 * c : 2 * c + window].max((1, 2)) for c in range(side)] for r in range(side)]
    ).transpose(2, 0, 1)


def spatial(x: np.ndarray) -> np.ndarray:
    """a / (1 + .001 / 25 * the sum of a^2 over the 5x5 pixels around it)^.75, in each map by itself."""
    result = np.empty_like(x)
    for r in range(x.shape[1]):
        for c in range(x.shape[2]):
            around = x[:, max(0, r - 2) : r + 3, max(0, c - 2) : c + 3]
            result[:, r, c] = x[:, r, c] / (1 + 4e-5 * (around**2).sum((1, 2))) ** 0.75
    return result


def reference(
    net: AlexNet,
    image: np.ndarray,
    towers: int = 2,
    conv6: bool = False,
    as_coded: bool = False,
    lrn: bool = True,
    overlapping: bool = True,
) -> dict[str, np.ndarray]:
    """What each layer gives for one image, before ReLU, by the formulas, in float64; of `net` only the weights count."""
    window = 3 if overlapping else 2
    out = {}

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    def normalized(x: np.ndarray) -> np.ndarray:
        return literal(x[None], towers, alpha=2e-5 if as_coded else 1e-4)[0] if lrn else x

    def full(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        return layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()

    overhang = next(pixels for pixels in range(4) if (image.shape[-1] + pixels - 11) % 4 == 0)
    out["conv1"] = convolve(np.pad(image, ((0, 0), (0, overhang), (0, overhang))), net.conv1, stride=4)
    x = relu(pool(normalized(out["conv1"]), window)) if as_coded else pool(normalized(relu(out["conv1"])), window)
    out["conv2"] = convolve(x, net.conv2, padding=2, towers=towers)
    x = normalized(relu(out["conv2"]))
    x = pool(spatial(x) if as_coded and lrn else x, window)
    out["conv3"] = convolve(x, net.conv3, padding=1)
    out["conv4"] = convolve(relu(out["conv3"]), net.conv4, padding=1, towers=towers)
    out["conv5"] = convolve(relu(out["conv4"]), net.conv5, padding=1, towers=towers)
    x = pool(relu(out["conv5"]), window)
    if conv6:
        out["conv6"] = convolve(x, net.conv6, padding=1)
        x = relu(out["conv6"])
    out["fc6"] = full(x.reshape(-1), net.fc6)
    out["fc7"] = full(relu(out["fc6"]) * 0.5, net.fc7)
    out["fc8"] = full(relu(out["fc7"]) * 0.5, net.fc8)
    return out


@pytest.mark.parametrize("crop_size, form", [(224, {}), (65, {}), (66, {}), (67, {}), *((64, form) for form in FORMS)])
def test_every_layer_is_its_formula_in_float64(crop_size, form):
    """With weights that make activations of about 50, so that all sums of squares count; dropout halves at test."""
    torch.manual_seed(1)
    net = AlexNet(num_classes=7, crop_size=crop_size, **form).eval()
    for layer in net.children():
        if hasattr(layer, "weight"):
            torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(layer.bias, std=5)
    torch.nn.init.normal_(net.conv2.weight, std=0.2)
    image = torch.randn(1, 3, crop_size, crop_size) * 70
    with watched(net) as seen:
        net(image)
    expected = reference(net, image[0].double().numpy(), **form)
    assert list(seen) == list(expected)
    for name, out in expected.items():
        ((_, given),) = seen[name]
        np.testing.assert_allclose(given[0].numpy(), out, rtol=0, atol=1e-5 * np.abs(out).max(), err_msg=name)


def test_is_two_towers_that_meet_at_conv3_and_at_fc6():
    """The halves of conv1, conv2, conv4 and conv5, each with its own normalization, as two nets; in float64."""
    torch.manual_seed(7)
    net = AlexNet(num_classes=5, crop_size=64).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64) * 70

    def half(layer: str, tower: int) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(net, layer).weight.chunk(2)[tower], getattr(net, layer).bias.chunk(2)[tower]

    def normalized(x: torch.Tensor) -> torch.Tensor:
        return F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)

    with torch.no_grad():
        ends = []
        for tower in (0, 1):
            y = F.relu(F.conv2d(F.pad(x, (0, 3, 0, 3)), *half("conv1", tower), stride=4))
            y = F.relu(F.conv2d(F.max_pool2d(normalized(y), 3, 2), *half("conv2", tower), padding=2))
            ends.append(F.max_pool2d(normalized(y), 3, 2))
        both, ends = torch.cat(ends, 1), []
        for tower in (0, 1):
            y = F.relu(F.conv2d(both, *half("conv3", tower), padding=1))
            y = F.relu(F.conv2d(y, *half("conv4", tower), padding=1))
            ends.append(F.max_pool2d(F.relu(F.conv2d(y, *half("conv5", tower), padding=1)), 3, 2).flatten(1))
        y = torch.cat([F.relu(F.linear(torch.cat(ends, 1), *half("fc6", tower))) / 2 for tower in (0, 1)], 1)
        y = torch.cat([F.relu(F.linear(y, *half("fc7", tower))) / 2 for tower in (0, 1)], 1)
        torch.testing.assert_close(net(x), net.fc8(y), rtol=1e-12, atol=0)


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


def check_start(name: str, layer: torch.nn.Conv2d | torch.nn.Linear, deviation: float) -> None:
    values = layer.weight.detach().flatten()[:1_000_000].double() / deviation
    error = 4 / values.numel() ** 0.5  # four standard errors
    assert abs(values.mean()) < error, name
    assert abs(values.std() - 1) < error, name
    assert abs((values.abs() > 1).double().mean() - 0.3173) < error, f"{name} is not normal"
    ones = name in ("conv2", "conv4", "conv5", "conv6", "fc6", "fc7")
    assert torch.equal(layer.bias, torch.full_like(layer.bias, float(ones))), name


def test_starts_as_the_paper_says(net):
    for name in LAYERS:
        check_start(name, getattr(net, name), 0.01)


def test_starts_as_the_code_says():
    torch.manual_seed(8)
    net = AlexNet(num_classes=1000, crop_size=64, as_coded=True, conv6=True)
    for name in (*LAYERS, "conv6"):
        check_start(name, getattr(net, name), 0.03 if name in ("conv3", "conv4", "conv5", "conv6") else 0.01)


def test_a_seed_gives_the_weights_that_it_always_gave():
    """Old checkpoints' runs can be repeated: layers in this order, each drawn by PyTorch, then by the paper."""
    torch.manual_seed(9)
    net = AlexNet(num_classes=3, crop_size=64)
    torch.manual_seed(9)
    layers = [
        torch.nn.Conv2d(3, 96, 11),
        torch.nn.Conv2d(48, 256, 5),
        torch.nn.Conv2d(256, 384, 3),
        torch.nn.Conv2d(192, 384, 3),
        torch.nn.Conv2d(192, 256, 3),
        torch.nn.Linear(256, 4096),
        torch.nn.Linear(4096, 4096),
        torch.nn.Linear(4096, 3),
    ]
    assert list(net.state_dict()) == [f"{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")]
    for name, layer in zip(LAYERS, layers, strict=True):
        assert torch.equal(getattr(net, name).weight, torch.nn.init.normal_(layer.weight, std=0.01)), name


def test_the_seed_decides_the_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(AlexNet(num_classes=2, crop_size=64).parameters())

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


@pytest.mark.parametrize("form", [{}, {"as_coded": True}, {"towers": 1, "conv6": True, "overlapping": False}])
def test_gradients_are_those_of_finite_differences(form):
    """In float64, along random directions of all weights, for the loss of a small batch of small images."""
    torch.manual_seed(3)
    net = AlexNet(num_classes=4, dropout=0.0, crop_size=64, **form).double()
    x, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64) * 50, torch.tensor([1, 3])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(x), labels)

    loss().backward()
    for name, weight in net.named_parameters():
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


@pytest.mark.parametrize("crop_size, overlapping", [(64, True), (112, True), (128, True), (36, False), (65, False)])
def test_other_crops_give_fc6_as_many_inputs_as_it_has(crop_size, overlapping):
    """64 and 36 pixels are the least: of them a single one is left behind the last pool."""
    net = AlexNet(num_classes=3, crop_size=crop_size, overlapping=overlapping).eval()
    assert net(torch.zeros(2, 3, crop_size, crop_size)).shape == (2, 3)


@pytest.mark.parametrize("crop_size, overlapping, least", [(63, True, 64), (1, True, 64), (35, False, 36)])
def test_smaller_crops_are_refused(crop_size, overlapping, least):
    with pytest.raises(UserError, match=f"^a crop of {crop_size} pixels .*; use at least {least}$"):
        AlexNet(num_classes=3, crop_size=crop_size, overlapping=overlapping)


def test_bfloat16_only_rounds(net):
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5)) * 70
    with torch.no_grad():
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_the_positive_biases_can_start_elsewhere():
    """Small budgets learn sooner from less than the paper's 1; the layers that start at 0 stay there."""
    net = AlexNet(num_classes=2, crop_size=64, bias=0.1)
    starts = {name: getattr(net, name).bias.unique().tolist() for name in LAYERS}
    assert {name for name, start in starts.items() if start == [pytest.approx(0.1)]} == {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert {name for name, start in starts.items() if start == [0.0]} == {"conv1", "conv3", "fc8"}
