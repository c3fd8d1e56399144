"""Each net by its name: what it is made of, its ablations, and how it takes another net's weights."""

import functools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.model import NETS
from imagefeed.model.alexnet import spatial_norm
from imagefeed.model.nets import build_net, load_all_but_last, own_input
from imagefeed.model.step import forward
from tests.model.test_alexnet import convolve, pool

OURS = [name for name in NETS if not name.endswith(":NAME")]
WITH_LRN = [name for name in OURS if name != "alexnet-owt"]


def small(name: str, num_classes: int = 3, **options) -> torch.nn.Module:
    """For crops of 64 pixels."""
    torch.manual_seed(0)
    return build_net(name, num_classes, crop_size=64, **options)


@functools.cache
def trained(name: str) -> torch.nn.Module:
    """One whose weights other nets take; not to be changed."""
    return small(name)


def on_paper(name: str, **options) -> torch.nn.Module:
    """For 1,000 classes and crops of 224 pixels, without memory for its weights."""
    with torch.device("meta"):
        return build_net(name, 1000, **options).eval()


def images(count: int, crop_size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, crop_size, crop_size, generator=torch.Generator().manual_seed(1)) * 70


def test_docs_recipes_has_a_row_for_each_net():
    assert OURS == ["alexnet", "alexnet-code", "alexnet-one-gpu", "alexnet-conv6", "alexnet-owt"]
    recipes = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for name in OURS:
        parameters = sum(parameter.numel() for parameter in on_paper(name).parameters())
        assert re.search(rf"^\| {name} \| .* \| {parameters:,} \| ", recipes, re.M), name


@pytest.mark.parametrize(
    "name, parameters, neurons, multiply_adds",
    [
        ("alexnet", 60_965_224, 659_272, 724_406_816),
        ("alexnet-code", 60_965_224, 659_272, 724_406_816),
        ("alexnet-one-gpu", 59_798_312, 355_864, 391_514_384),
        ("alexnet-conv6", 60_965_224 + 590_080, 659_272 + 9_216, 724_406_816 + 21_233_664),
        ("alexnet-owt", 61_100_840, 494_184, 714_188_480),
    ],
)
def test_parameters_neurons_and_multiply_adds_are_those_of_the_docs(name, parameters, neurons, multiply_adds):
    """A neuron is an output of a layer with weights, and takes a multiply-add for each weight that leads to it."""
    net, counts = on_paper(name), []
    for layer in net.modules():
        if hasattr(layer, "weight"):
            layer.register_forward_hook(lambda layer, _, out: counts.append((out.numel(), layer.weight[0].numel())))
    net(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert sum(outputs for outputs, _ in counts) == neurons
    assert sum(outputs * weights for outputs, weights in counts) == multiply_adds


def test_the_one_gpu_net_has_half_of_the_maps_but_all_of_conv5():
    shapes = {name: tuple(value.shape) for name, value in on_paper("alexnet-one-gpu").state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "conv1.weight": (48, 3, 11, 11),
        "conv2.weight": (128, 48, 5, 5),
        "conv3.weight": (192, 128, 3, 3),
        "conv4.weight": (192, 192, 3, 3),
        "conv5.weight": (256, 192, 3, 3),
        "fc6.weight": (4096, 9216),
        "fc7.weight": (4096, 4096),
        "fc8.weight": (1000, 4096),
    }


def test_conv6_sees_both_towers_of_the_last_pool_and_keeps_its_size():
    shapes = {name: tuple(value.shape) for name, value in on_paper("alexnet-conv6").state_dict().items()}
    assert shapes.pop("conv6.weight") == (256, 256, 3, 3) and shapes.pop("conv6.bias") == (256,)
    assert shapes == {name: tuple(value.shape) for name, value in on_paper("alexnet").state_dict().items()}


def test_the_codes_second_normalization_is_gone_without_lrn():
    """And conv1's pool and ReLU commute, so that nothing is left of the code's order."""
    code, text = small("alexnet-code", lrn=False).eval(), small("alexnet", lrn=False).eval()
    text.load_state_dict(code.state_dict())
    with torch.no_grad():
        assert torch.equal(code(images(2)), text(images(2)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_codes_second_normalization_in_lower_precision_only_rounds(dtype, tolerance):
    x = (images(2, 9) * 3).to(dtype)
    y = spatial_norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), spatial_norm(x.double()), rtol=tolerance, atol=0)


def test_owt_has_the_state_dict_of_torchvisions_alexnet():
    assert {name: tuple(value.shape) for name, value in on_paper("alexnet-owt").state_dict().items()} == {
        "features.0.weight": (64, 3, 11, 11),
        "features.0.bias": (64,),
        "features.3.weight": (192, 64, 5, 5),
        "features.3.bias": (192,),
        "features.6.weight": (384, 192, 3, 3),
        "features.6.bias": (384,),
        "features.8.weight": (256, 384, 3, 3),
        "features.8.bias": (256,),
        "features.10.weight": (256, 256, 3, 3),
        "features.10.bias": (256,),
        "classifier.1.weight": (4096, 9216),
        "classifier.1.bias": (4096,),
        "classifier.4.weight": (4096, 4096),
        "classifier.4.bias": (4096,),
        "classifier.6.weight": (1000, 4096),
        "classifier.6.bias": (1000,),
    }


@pytest.mark.parametrize("crop_size, repeats, overlapping", [(95, 3, True), (95, 3, False), (224, 1, True)])
def test_owt_is_its_formula_in_float64(crop_size, repeats, overlapping):
    """Of 95 pixels 2x2 are left behind the last pool, which are spread over the 6x6 that fc6 sees."""
    torch.manual_seed(2)
    net = build_net("alexnet-owt", 7, crop_size=crop_size, overlapping=overlapping).eval()
    features, classifier, window = net.features, net.classifier, 3 if overlapping else 2
    image = images(1, crop_size)

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    def full(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        return layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()

    x = pool(relu(convolve(image[0].double().numpy(), features[0], stride=4, padding=2)), window)
    x = pool(relu(convolve(x, features[3], padding=2)), window)
    x = relu(convolve(x, features[6], padding=1))
    x = relu(convolve(x, features[8], padding=1))
    x = pool(relu(convolve(x, features[10], padding=1)), window)
    x = x.repeat(repeats, 1).repeat(repeats, 2).reshape(-1)
    x = full(relu(full(relu(full(x, classifier[1])), classifier[4])), classifier[6])
    with torch.no_grad():
        np.testing.assert_allclose(net(image)[0].numpy(), x, rtol=0, atol=1e-5 * np.abs(x).max())


def test_owt_drops_before_fc6_and_fc7_and_scales_in_training():
    net, given = small("alexnet-owt", dropout=0.75).train(), {}
    for place in (0, 1, 3, 4, 6):
        net.classifier[place].register_forward_hook(lambda _, x, out, place=place: given.update({place: (x[0], out)}))
    net(images(8))
    for before, layer in ((0, 1), (3, 4)):
        whole, dropped = given[before][0], given[layer][0]
        live = whole > 0
        kept = dropped[live] != 0
        assert abs(kept.float().mean() - 0.25) < 0.03
        torch.testing.assert_close(dropped[live][kept], whole[live][kept] * 4)
    assert torch.equal(given[6][0], given[4][1].relu())


ABLATIONS = [(name, option) for name in OURS for option in ("lrn", "overlapping", "dropout")]
ABLATIONS.remove(("alexnet-owt", "lrn"))  # it has none


@pytest.mark.parametrize("name, option", ABLATIONS)
def test_every_ablation_gives_logits_and_gradients(name, option):
    net = small(name, **{option: 0.0 if option == "dropout" else False}).train()
    logits = net(images(2))
    logits.square().sum().backward()
    assert logits.shape == (2, 3)
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("name", OURS)
def test_plain_pools_change_the_outputs_but_no_shape(name):
    """Section 3.4: windows of 2 give maps of equivalent sizes; 55, 27, 13 and 6 pixels."""
    overlapping, plain = on_paper(name), on_paper(name, overlapping=False)
    assert {n: v.shape for n, v in overlapping.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert plain(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("name", OURS)
def test_without_dropout_training_and_evaluation_give_the_same(name):
    net = small(name, dropout=0.0)
    with torch.no_grad():
        assert torch.equal(net.train()(images(2)), net.eval()(images(2)))


@pytest.mark.parametrize("name", WITH_LRN)
def test_biases_start_at_the_given_value(name):
    starts = {n: set(p.tolist()) for n, p in small(name, bias=0.25).named_parameters() if n.endswith("bias")}
    ones = ("conv2.bias", "conv4.bias", "conv5.bias", "conv6.bias", "fc6.bias", "fc7.bias")
    assert starts == {n: {0.25} if n in ones else {0.0} for n in starts}


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_and_channels_last_only_round(name):
    net = small(name).eval()
    with torch.no_grad():
        exact = net(images(4))
        net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(forward(net, images(4), "float32"), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
        rounded = forward(net, images(4), "bfloat16")
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("name", OURS)
def test_fine_tuning_takes_all_layers_but_the_last(name):
    old, net = trained(name).state_dict(), build_net(name, 7, crop_size=64)
    fresh = {n: value.clone() for n, value in net.state_dict().items()}
    load_all_but_last(net, old, "trained.pt")
    *body, weight, bias = net.state_dict()
    assert all(torch.equal(net.state_dict()[n], old[n]) for n in body)
    assert all(torch.equal(net.state_dict()[n], fresh[n]) for n in (weight, bias))
    assert not torch.equal(fresh[body[0]], net.state_dict()[body[0]])


def test_fine_tuning_leaves_the_last_layer_even_if_it_would_fit():
    """As many other classes are other classes."""
    old, net = trained("alexnet-conv6"), build_net("alexnet-conv6", 3, crop_size=64)
    load_all_but_last(net, old.state_dict(), "trained.pt")
    assert torch.equal(net.conv6.weight, old.conv6.weight)
    assert not torch.equal(net.fc8.weight, old.fc8.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("conv6.bias"), r"another net: 1 of 16 tensors missing \(conv6.bias\); build the net it was"),
        (lambda state: state.update({"conv7.bias": state["conv6.bias"]}), r"another net: 1 unknown tensor \(conv7.bias\); "),
        (
            lambda state: state.update({"fc6.weight": torch.zeros(4096, 9216)}),
            re.escape("old.pt: fc6.weight is (4096, 9216) there and (4096, 256) here; build the net for the same crop size"),
        ),
        (lambda state: state.update({"conv1.bias": 3}), "old.pt: not a state dict, because conv1.bias is not a tensor; "),
    ],
)
def test_fine_tuning_refuses_another_nets_weights_and_changes_nothing(change, message):
    net, state = build_net("alexnet-conv6", 2, crop_size=64), trained("alexnet-conv6").state_dict()
    before = net.conv1.weight.clone()
    change(state)
    with pytest.raises(UserError, match=message):
        load_all_but_last(net, state, "old.pt")
    assert torch.equal(net.conv1.weight, before)


def test_weights_of_the_plain_net_are_refused_by_conv6():
    with pytest.raises(UserError, match=r"2 of 16 tensors missing \(conv6\.weight, conv6\.bias\)"):
        load_all_but_last(small("alexnet-conv6"), trained("alexnet").state_dict(), "alexnet.pt")


@pytest.mark.parametrize("name", ["", "AlexNet", "alexnet-code ", "resnet50", "keras:alexnet", "alexnet-owt:x"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"no network has this name; choose one of alexnet, .*, torchvision:NAME, timm:NAME$"):
        build_net(name, 3)


@pytest.mark.parametrize(
    "name, options, option",
    [
        ("alexnet-owt", {"lrn": False}, "lrn=False"),
        ("alexnet-owt", {"bias": 0.1}, "bias"),
        ("torchvision:tiny", {"lrn": False}, "lrn=False"),
        ("timm:tiny", {"bias": 0.0}, "bias"),
        ("timm:tiny", {"overlapping": False}, "overlapping=False"),
    ],
)
def test_an_option_of_other_nets_is_refused(name, options, option):
    with pytest.raises(UserError, match=f"^{name}: {option} is not for this net; leave it out or choose one of alexnet, "):
        build_net(name, 3, **options)


@pytest.mark.parametrize("crop_size, overlapping, least", [(62, True, 63), (34, False, 35)])
def test_owt_refuses_crops_that_are_too_small(crop_size, overlapping, least):
    with pytest.raises(UserError, match=f"^a crop of {crop_size} pixels .*; use at least {least}$"):
        build_net("alexnet-owt", 3, crop_size=crop_size, overlapping=overlapping)
    net = build_net("alexnet-owt", 3, crop_size=least, overlapping=overlapping).eval()
    assert net(torch.zeros(1, 3, least, least)).shape == (1, 3)


TINY = """
import torch

def tiny(num_classes=1000, dropout=0.1, weights=None):
    assert weights is None
    layers = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(dropout), torch.nn.Linear(3, num_classes)
    return torch.nn.Sequential(*layers)

def plain(num_classes=1000, weights=None):
    return tiny(num_classes, 0.0)

def googlenet(num_classes=1000, weights=None, aux_logits=True):
    assert not aux_logits
    return tiny(num_classes)

def broken(num_classes=1000, weights=None):
    raise TypeError("of its own")

NETS = {"tiny": tiny, "plain": plain, "googlenet": googlenet, "broken": broken}
"""
STAND_INS = {
    "torchvision": """
import enum
import sys
import types
from torchvision.tiny import NETS

class Old(enum.Enum):
    E2E, LINEAR = 384, 96
    DEFAULT = E2E

    def transforms(self):
        return types.SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3, crop_size=[self.value])

def get_model_weights(name):
    return Old if name == "tiny" else enum.Enum("None", [])

def list_models(module=None):
    return sorted(NETS) if module is sys.modules[__name__] else sorted([*NETS, "a_detector"])

def get_model(name, **config):
    return NETS[name](**config)
""",
    "timm": """
import types
from timm.tiny import NETS

def is_model(name):
    return name.partition(".")[0] in NETS

def get_pretrained_cfg(name):
    if "." in name:
        raise RuntimeError("Invalid pretrained tag (nonesuch) for tiny.")
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 96, 96), "fixed_input_size": True}
    return types.SimpleNamespace(**config) if name == "tiny" else None

def create_model(name, pretrained=False, num_classes=1000, drop_rate=None):
    assert pretrained is False
    if drop_rate is None:
        return NETS[name](num_classes=num_classes)
    if name == "plain":
        raise TypeError("Plain.__init__() got an unexpected keyword argument 'drop_rate'")
    return NETS[name](num_classes=num_classes, dropout=drop_rate)
""",
}


@pytest.fixture(params=STAND_INS)
def package(request, tmp_path, monkeypatch) -> str:
    """A package of this name with the functions that the real one has, and a few nets of its own."""
    name = request.param
    for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / name).mkdir()
    (tmp_path / name / "tiny.py").write_text(TINY)
    (tmp_path / name / "__init__.py").write_text(STAND_INS[name] if name == "timm" else "")
    (tmp_path / name / "models.py").write_text(STAND_INS[name])
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[loaded]


def test_a_packages_net_is_built_untrained_for_the_classes(package):
    net = build_net(f"{package}:tiny", 5)
    assert net(images(2)).shape == (2, 5)
    assert net[2].p == 0.1
    assert build_net(f"{package}:tiny", 5, dropout=0.3)[2].p == 0.3


def test_a_packages_net_knows_the_pixels_that_it_expects(package):
    half = (127.5, 127.5, 127.5)
    assert own_input(f"{package}:tiny") == (half, half, 96, package == "timm")
    assert own_input(f"{package}:plain") == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 224, False)
    assert own_input("alexnet") is own_input("alexnet-owt") is None
    said = "tag .nonesuch. for tiny; timm.list_pretrained" if package == "timm" else "no network of this name"
    with pytest.raises(UserError, match=f"^{package}:tiny.nonesuch: .*{said}"):
        own_input(f"{package}:tiny.nonesuch")


def test_a_packages_net_can_be_fine_tuned(package):
    net, old = build_net(f"{package}:tiny", 5), build_net(f"{package}:tiny", 9)
    fresh = net[3].weight.clone()
    load_all_but_last(net, old.state_dict(), "trained.pt")
    assert torch.equal(net[3].weight, fresh)


def test_a_net_that_the_package_does_not_have_is_refused(package):
    for name in ("a_detector", "nonesuch", ""):
        with pytest.raises(UserError, match=f"^{package}:{name}: {package} has no network of this name; .*list_models"):
            build_net(f"{package}:{name}", 5)


def test_a_net_without_dropout_refuses_it(package):
    assert build_net(f"{package}:plain", 5)[2].p == 0
    with pytest.raises(UserError, match=f"^{package}:plain: this network has no dropout; leave it out$"):
        build_net(f"{package}:plain", 5, dropout=0.2)


def test_an_error_inside_a_package_is_passed_on(package):
    with pytest.raises(TypeError, match="of its own"):
        build_net(f"{package}:broken", 5)


@pytest.mark.parametrize("package", ["torchvision"], indirect=True)
def test_torchvisions_googlenet_comes_without_auxiliary_classifiers(package):
    assert build_net("torchvision:googlenet", 5)(images(2)).shape == (2, 5)


@pytest.mark.parametrize("package", STAND_INS, indirect=True)
def test_a_package_whose_dependency_is_missing_is_not_called_missing(package, tmp_path):
    (tmp_path / package / "tiny.py").write_text("import nonesuch_of_imagefeed")
    with pytest.raises(ModuleNotFoundError, match="nonesuch_of_imagefeed"):
        build_net(f"{package}:tiny", 5)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_package_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=f"^{name}:resnet18: {name} is not installed; run: pip install {name}$"):
        build_net(f"{name}:resnet18", 5)
