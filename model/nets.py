"""Builds networks by name, and takes over weights for fine-tuning."""

import importlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.model import NETS, VARIANTS
from imagefeed.model.alexnet import BIAS, DROPOUT, SIZE, AlexNet
from imagefeed.model.arrangement import Arrangement, FirstConv2d

AUXILIARY = ("aux1", "aux2", "AuxLogits")  # classifiers of torchvision's googlenet and inception_v3, of use in training alone
PACKAGES = ("torchvision", "timm")


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
    """Builds one of NETS (docs/recipes.md), with new weights, for (N, 3, crop_size, crop_size) images.

    `bias` is where biases of hidden layers start, `dropout` the probability of zeroing an output; None is the value of the net's
    own source. `lrn` and `overlapping` are AlexNet's. Nets of torchvision and timm ignore `crop_size`.

    Raises UserError if no net has this name, its package is not installed, or it has no such option.
    """
    if name in VARIANTS:
        dropout, bias = DROPOUT if dropout is None else dropout, BIAS if bias is None else bias
        return AlexNet(num_classes, dropout, crop_size, bias, lrn=lrn, overlapping=overlapping, **VARIANTS[name])
    package, _, inner = name.partition(":")
    if name != "alexnet-owt" and package not in PACKAGES:
        raise UserError(f"{name}: no network has this name; choose one of {', '.join(NETS)}")
    foreign = {"bias": bias is not None, "lrn=False": not lrn, "overlapping=False": not overlapping and name != "alexnet-owt"}
    for option, given in foreign.items():
        if given:
            raise UserError(f"{name}: `{option}` is not for this net; leave it out or choose one of {', '.join(VARIANTS)}")
    if name != "alexnet-owt":
        return _build_from(package, inner, num_classes, dropout)
    least = 63 if overlapping else 35
    if crop_size < least:
        raise UserError(f"a crop of {crop_size} pixels is too small for the three pools of alexnet-owt; use at least {least}")
    return AlexNetOwt(num_classes, DROPOUT if dropout is None else dropout, overlapping)


class AlexNetOwt(nn.Module):
    """The one-tower AlexNet of torchvision, `torchvision.models.alexnet`: the same state dict and the same outputs.

    From Krizhevsky: One weird trick for parallelizing convolutional neural networks, 2014 (arXiv 1404.5997), without its
    normalization, and with dropout before the full layers instead of behind them. Takes (N, 3, H, W) images of at least 63
    pixels, which torchvision's weights expect in units of standard deviations; gives (N, num_classes) logits. Weights and biases
    start as PyTorch's layers do. 61,100,840 parameters for 1,000 classes, 714,188,480 multiply-adds an image of 224 pixels.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, overlapping: bool = True):
        super().__init__()
        window = 3 if overlapping else 2
        self.arrangement = Arrangement()

        def convolution(*shape: int, stride: int = 1, padding: int = 1, pooled: bool = False) -> list[nn.Module]:
            kind = FirstConv2d if shape[0] == 3 else nn.Conv2d
            layers = [kind(*shape, stride=stride, padding=padding), nn.ReLU(inplace=True)]
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
        return self.classify(self.features(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits from the maps of `features`."""
        return self.classifier(self.avgpool(x).flatten(1))


def class_layers(net: nn.Module, build: Callable[[int], nn.Module], num_classes: int) -> list[str]:
    """The names of the layers whose shapes follow the number of classes; some nets have several, such as timm's distilled ones.

    `build` builds the same net for a number of classes; `net` is the one for `num_classes`.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            other = build(num_classes + 1).state_dict()
    except Exception:  # a net that reads numbers from tensors while it is built, such as torchvision's regnets
        return last_layers(net)
    changed = [name for name, value in net.state_dict().items() if name not in other or other[name].shape != value.shape]
    return list(dict.fromkeys(layer_of(name) for name in changed))


def last_layers(net: nn.Module) -> list[str]:
    """The names of the layers of classes: by `get_classifier`, which timm's nets have, or else the last layer with weights."""
    if hasattr(net, "get_classifier"):
        found = net.get_classifier()
        tops = found if isinstance(found, tuple | list) else [found]
    else:
        tops = [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1:]
    inside = {id(layer) for top in tops for layer in top.modules()}
    return [name for name, layer in net.named_modules() if id(layer) in inside]


def load_all_but_last(net: nn.Module, state: dict[str, torch.Tensor], source: str, last: Collection[str] | None = None) -> int:
    """Loads the weights of a net of the same kind that was trained on other classes; the layers of classes keep their own.

    `state` is that net's state dict, `source` names it in errors, `last` are the names of those layers (`last_layers` by
    default). Returns the number of tensors loaded. Raises UserError, and leaves `net` as it was, if a weight is missing, unknown,
    or of another shape.
    """
    last = last_layers(net) if last is None else last
    mine, theirs = (
        {name: value for name, value in weights.items() if layer_of(name) not in last} for weights in (net.state_dict(), state)
    )
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{source}: not a state dict, because {name} is not a tensor; save net.state_dict() of a net")
    # Files of early versions of PyTorch lack the last, which nothing reads in these nets.
    missing = [name for name in mine if name not in theirs and not name.endswith(".num_batches_tracked")]
    unknown = [name for name in theirs if name not in mine]
    if missing or unknown:
        what = [f"{len(missing)} of {len(mine)} tensors missing ({first_few(missing)})"] if missing else []
        what += [f"{plural(len(unknown), 'unknown tensor')} ({first_few(unknown)})"] if unknown else []
        raise UserError(f"{source}: these are the weights of another net: {', '.join(what)}; build the net it was trained as")
    differing = [name for name in theirs if _kind(theirs[name]) != _kind(mine[name])]
    if differing:
        name, more = differing[0], len(differing) - 1
        shapes = (
            f"{name} is {_kind(theirs[name])} there and {_kind(mine[name])} here{f', and {more} more differ' if more else ''}"
        )
        raise UserError(f"{source}: {shapes}; build the net for the same crop size, and by the name it was trained as")
    net.load_state_dict(theirs, strict=False)
    return len(theirs)


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def _kind(tensor: torch.Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f"{tensor.dtype} ".removeprefix("torch.")
    return f"{kind}{tuple(tensor.shape)}"


class OwnInput(NamedTuple):
    """What images a net of torchvision or timm was published for: mean and standard deviation in gray levels of 0-255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_size: int | None  # None if its images are not square
    fixed: bool  # it takes crops of no other size


def own_input(name: str) -> OwnInput | None:
    """What a net of torchvision or timm expects, by its own configuration; None for the nets here, which take any mean.

    Of torchvision's, the default weights count, of timm's those of the tag in the name. Raises UserError as `build_net` does.
    """
    package, _, inner = name.partition(":")
    if package not in PACKAGES:
        return None
    models = _find(package, inner)
    size: tuple[int, ...] = (224, 224)
    mean, std, fixed = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False  # torchvision's, which most nets share
    if package == "timm":
        try:
            published = models.get_pretrained_cfg(inner)
        except RuntimeError as error:  # an unknown tag
            raise UserError(f"{name}: {str(error).rstrip('.')}; timm.list_pretrained() lists those it has") from None
        if published is not None:
            mean, std, size, fixed = published.mean, published.std, published.input_size[1:], published.fixed_input_size
    elif weights := list(models.get_model_weights(inner)):
        published = getattr(models.get_model_weights(inner), "DEFAULT", weights[-1]).transforms()
        # torchvision builds vit_h_14 for the smaller of its two sizes.
        mean, std, size = published.mean, published.std, (min(one.transforms().crop_size[0] for one in weights),) * 2
    in_gray = (tuple(round(255 * value, 6) for value in values) for values in (mean, std))
    return OwnInput(*in_gray, size[0] if size[0] == size[1] else None, fixed)


def _find(package: str, name: str) -> ModuleType:
    """The module with a package's nets; raises UserError if it is not installed or has no such net."""
    try:
        models = importlib.import_module("torchvision.models" if package == "torchvision" else package)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != package:  # it is installed, but a package that it needs is not
            raise
        raise UserError(f"{package}:{name}: {package} is not installed; run: pip install {package}") from None
    # torchvision also lists nets that do not classify images.
    if not (name in models.list_models(module=models) if package == "torchvision" else models.is_model(name)):
        listing = f"{models.__name__}.list_models()"
        raise UserError(f"{package}:{name}: {package} has no network of this name; {listing} lists those it has")
    return models


def _build_from(package: str, name: str, num_classes: int, dropout: float | None) -> nn.Module:
    """Builds a net of torchvision or timm, untrained."""
    models = _find(package, name)
    if package == "torchvision":
        create, options = models.get_model, {"weights": None} | ({} if dropout is None else {"dropout": dropout})
        if name in ("googlenet", "inception_v3"):  # with AUXILIARY they return a tuple in training
            options["aux_logits"] = False
    else:
        create, options = models.create_model, {"pretrained": False} | ({} if dropout is None else {"drop_rate": dropout})
    try:
        return create(name, num_classes=num_classes, **options)
    except TypeError as error:
        if "'dropout'" not in str(error) and "'drop_rate'" not in str(error):
            raise
        raise UserError(f"{package}:{name}: this network has no dropout; leave it out") from error
