"""Nets by name."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from imagefeed.dataset.errors import UserError
from imagefeed.model.alexnet import BIAS, DROPOUT, SIZE, AlexNet

VARIANTS = {"alexnet": {}, "alexnet-code": {"as_coded": True}, "alexnet-one-gpu": {"towers": 1}, "alexnet-conv6": {"conv6": True}}
NETS = (*VARIANTS, "alexnet-owt", "torchvision:NAME", "timm:NAME")  # what build_net takes


def build_net(
    name: str,
    num_classes: int,
    *,
    crop_size: int = SIZE,
    bias: float | None = None,
    dropout: float | None = None,
    lrn: bool = True,
    overlapping: bool = True,
) -> nn.Module:
    """The net of this name, one of NETS, with new weights, for (N, 3, crop_size, crop_size) images and `num_classes` classes.

    docs/recipes.md says what each is. None stands for what the net's own source says: `bias` is where the biases of hidden
    layers start, `dropout` the probability of an output to be zeroed. lrn=False leaves normalization out,
    overlapping=False pools without overlap. A net of torchvision or timm takes the sizes it takes, whatever `crop_size` says.

    Raises UserError where there is no such net, its package is not installed, or it does not have an option that is given.
    """
    if name in VARIANTS:
        dropout, bias = DROPOUT if dropout is None else dropout, BIAS if bias is None else bias
        return AlexNet(num_classes, dropout, crop_size, bias, lrn=lrn, overlapping=overlapping, **VARIANTS[name])
    package, _, inner = name.partition(":")
    of_a_package = name != "alexnet-owt"
    if of_a_package and package not in ("torchvision", "timm"):
        raise UserError(f"{name}: there is no net of this name; choose one of {', '.join(NETS)}")
    lacking = {"bias": bias is not None, "lrn=False": not lrn, "overlapping=False": not overlapping and of_a_package}
    for option, given in lacking.items():
        if given:
            choice = ", ".join(VARIANTS)
            raise UserError(f"{name}: {option} is not for this net; leave it out or choose one of {choice}")
    if package == "torchvision":
        return _build_torchvision(inner, num_classes, dropout)
    if package == "timm":
        return _build_timm(inner, num_classes, dropout)
    least = 63 if overlapping else 35
    if crop_size < least:
        raise UserError(f"a crop of {crop_size} pixels leaves none behind alexnet-owt's last pool; give at least {least}")
    return AlexNetOwt(num_classes, DROPOUT if dropout is None else dropout, overlapping)


class AlexNetOwt(nn.Module):
    """The one-tower AlexNet of torchvision, `torchvision.models.alexnet`: the same state dict and the same outputs.

    From Krizhevsky: One weird trick for parallelizing convolutional neural networks, 2014 (arXiv 1404.5997), without its
    normalization, and with dropout before the full layers instead of behind them. Takes (N, 3, H, W) images of 63 pixels or
    more, which torchvision's weights want in units of deviations; gives (N, num_classes) logits. Weights and biases start as
    PyTorch's layers do. 61,100,840 parameters for 1,000 classes, 714,188,480 multiply-adds an image of 224 pixels.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, overlapping: bool = True):
        super().__init__()
        window = 3 if overlapping else 2

        def convolution(*shape: int, stride: int = 1, padding: int = 1, pooled: bool = False) -> list[nn.Module]:
            layers = [nn.Conv2d(*shape, stride=stride, padding=padding), nn.ReLU(inplace=True)]
            return [*layers, nn.MaxPool2d(window, stride=2)] if pooled else layers

        self.features = nn.Sequential(
            *convolution(3, 64, 11, stride=4, padding=2, pooled=True),
            *convolution(64, 192, 5, padding=2, pooled=True),
            *convolution(192, 384, 3),
            *convolution(384, 256, 3),
            *convolution(256, 256, 3, pooled=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        hidden = [(nn.Dropout(dropout), nn.Linear(n, 4096), nn.ReLU(inplace=True)) for n in (256 * 6 * 6, 4096)]
        self.classifier = nn.Sequential(*hidden[0], *hidden[1], nn.Linear(4096, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def load_all_but_last(net: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Takes the weights of a net of the same kind, trained on other classes, for fine-tuning; the last layer stays as it is.

    `state` is that net's state dict, `source` names it in errors. Raises UserError where a weight is missing, is one too
    many or has another shape, and then leaves `net` as it was.
    """
    last = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    mine, theirs = (
        {name: value for name, value in weights.items() if name.rpartition(".")[0] != last}
        for weights in (net.state_dict(), state)
    )
    strange = [name for name, value in theirs.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UserError(f"{source}: {strange[0]} is no tensor, so this is no state dict; give net.state_dict() of a net")
    lacking, foreign = [name for name in mine if name not in theirs], [name for name in theirs if name not in mine]
    if lacking or foreign:
        what = f"it lacks {lacking[0]}" if lacking else f"it has {foreign[0]}"
        raise UserError(f"{source}: these are the weights of another net, {what}; build the net by the name it was trained as")
    for name, value in mine.items():
        if theirs[name].shape != value.shape:
            shapes = f"{name} is {tuple(theirs[name].shape)} there and {tuple(value.shape)} here"
            raise UserError(f"{source}: {shapes}; build the net for the same crop size, and by the name it was trained as")
    net.load_state_dict(theirs, strict=False)


def _build_torchvision(name: str, num_classes: int, dropout: float | None) -> nn.Module:
    models = _installed("torchvision", "torchvision.models")
    if name not in models.list_models(module=models):  # those that classify images
        raise UserError(f"torchvision:{name}: torchvision has no such net; torchvision.models.list_models() names them")
    options = {} if dropout is None else {"dropout": dropout}
    if name in ("googlenet", "inception_v3"):  # with their auxiliary classifiers they return a tuple in training
        options["aux_logits"] = False
    with _no_dropout_refused(f"torchvision:{name}"):
        return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _build_timm(name: str, num_classes: int, dropout: float | None) -> nn.Module:
    timm = _installed("timm", "timm")
    if not timm.is_model(name):
        raise UserError(f"timm:{name}: timm has no such net; timm.list_models() names them")
    options = {} if dropout is None else {"drop_rate": dropout}
    with _no_dropout_refused(f"timm:{name}"):
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


@contextlib.contextmanager
def _no_dropout_refused(name: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if "'dropout'" not in str(error) and "'drop_rate'" not in str(error):
            raise
        raise UserError(f"{name}: this net has no dropout to set; leave it out") from error


def _installed(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != package:  # it is there, but what it needs is not
            raise
        raise UserError(f"{package} is not installed, and its nets come with it; run: pip install {package}") from None
