"""Recipes: the values that training follows from, and the learning rate of each step.

P is the paper (Krizhevsky, Sutskever, Hinton 2012) by section, the code is github.com/computerhistory/AlexNet-Source-Code by
file; docs/recipes.md lists where they differ.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagefeed.dataset.errors import UserError
from imagefeed.training.options import RECIPE, SMOOTH

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recipe:
    """What decides the weights besides the dataset; the defaults are the paper's. options.py describes each value.

    Raises ValueError for a value out of range, UserError for values that contradict each other.
    """

    model: str = "alexnet"
    lrn: bool = True  # P 3.3
    overlapping: bool = True  # P 3.4
    dropout: float | None = None  # None: as the net's own source, .5 in P 4.2
    bias: float | None = None  # None: as the net's own source, 1 in P 5
    batch_size: int = 128  # P 5; in RECIPES of all ranks together, in a run of each
    epochs: int = 90  # P 5: "roughly 90 cycles"
    lr: float = 0.01  # P 5
    momentum: float = 0.9  # P 5
    weight_decay: float = 0.0005  # P 5
    schedule: str = "plateau"  # P 5
    warmup_epochs: float = 0.0  # P has none
    bias_lr: float | None = None  # P 5: "equal for all layers"
    first_layer_epochs: str | None = None
    crop_size: int = 224  # P 3.5
    pca_jitter: float = 0.1  # P 4.1
    pca_jitter_epochs: int | None = None
    pixel_divisor: float = 1.0
    shuffle: str = "global"
    mean: str | tuple[float, ...] = "channel"  # P 2 subtracts "image", which needs a dataset that was built with --fit crop
    std: str | tuple[float, ...] = "none"  # P 2 only subtracts the mean
    random_resized_crop: bool = False
    color_jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    auto_augment: str = "none"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: str = "auto"
    limit_batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, option in RECIPE.items():
            option.check(getattr(self, name))
        if self.smooth and self.warmup_epochs >= self.epochs:
            raise UserError(
                f"`warmup_epochs={self.warmup_epochs:g}` of {self.epochs} epochs leaves none in which `schedule={self.schedule}` "
                "can fall; use fewer, or more `epochs`"
            )

    @property
    def smooth(self) -> bool:
        """Whether the number of epochs decides every learning rate."""
        return self.schedule in SMOOTH


RECIPES = {
    "paper": Recipe(),
    "code": Recipe(
        model="alexnet-code",
        epochs=91,  # notes in layer-params-145.cfg, of 2012, as the epochs below
        schedule="25,51,79",  # .01, .001, .0001, .00001
        bias_lr=0.02,  # layer-params-145.cfg: epsB; weight decay of biases is 0 in layer.cu
        first_layer_epochs="67,72",  # conv1 to .00001, then to 0
        pca_jitter_epochs=67,  # "noise off", together with conv1's first cut
        pixel_divisor=1.1,  # convdata_jpeg.py
        mean="image",  # convdata_jpeg.py: the center of the mean image
    ),
    "fast": Recipe(
        batch_size=1024,  # the largest that plain SGD was reported to train AlexNet with (You, Gitman, Ginsburg 2017)
        lr=0.08,  # 8 x .01, in proportion to the batch (Krizhevsky 2014, arXiv 1404.5997; Goyal et al. 2017)
        warmup_epochs=5,  # Goyal et al. 2017, arXiv 1706.02677, section 2.2
        schedule="cosine",  # Loshchilov, Hutter 2017, arXiv 1608.03983, without restarts
        bias=0.1,  # Caffe's bvlc_alexnet, and caffe issue 2085: with 1 the loss may not leave ln(classes)
        precision="bfloat16",
    ),
}


def learning_rate(recipe: Recipe, step: int, epoch_steps: int, drops: int) -> float:
    """The weights' learning rate in step `step`, counted from 0; `drops` are the plateau schedule's so far."""
    epoch = step / epoch_steps
    if recipe.smooth:
        left = 1 - max(epoch - recipe.warmup_epochs, 0) / (recipe.epochs - recipe.warmup_epochs)
        lr = recipe.lr * (left if recipe.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
    else:
        lr = recipe.lr / 10 ** (drops if recipe.schedule == "plateau" else passed(recipe.schedule, epoch))
    return lr * warmup_factor(recipe, step, epoch_steps)


def warmup_factor(recipe: Recipe, step: int, epoch_steps: int) -> float:
    """Rises in proportion to the steps: the first step is not at 0, and the warm-up ends at 1."""
    return min(1.0, (step + 1) / max(recipe.warmup_epochs * epoch_steps, 1))


def passed(epochs: str, epoch: float) -> int:
    """Counts the epochs of a list such as 25,51,79 that are over."""
    return sum(epoch >= int(part) for part in epochs.split(","))


def jittered(recipe: Recipe, step: int, epoch_steps: int) -> bool:
    """Whether colors are jittered in step `step`, counted from 0."""
    return recipe.pca_jitter > 0 and (recipe.pca_jitter_epochs is None or step < recipe.pca_jitter_epochs * epoch_steps)


def make_optimizer(model: "torch.nn.Module", recipe: Recipe) -> "torch.optim.SGD":
    """SGD over one group of all parameters; or, if the recipe distinguishes them, over groups of weights and biases, of the first
    layer and the others."""
    import torch

    first = next(layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), torch.nn.Parameter))
    in_first = {id(parameter) for parameter in first.parameters()}
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        bias = recipe.bias_lr is not None and name.rpartition(".")[2] == "bias"
        groups.setdefault((bias, bool(recipe.first_layer_epochs) and id(parameter) in in_first), []).append(parameter)
    settings = [
        {"params": parameters, "bias": bias, "first": first, "weight_decay": 0.0 if bias else recipe.weight_decay}
        for (bias, first), parameters in groups.items()
    ]
    return torch.optim.SGD(settings, recipe.lr, recipe.momentum, fused=True)


def set_learning_rates(optimizer: "torch.optim.SGD", recipe: Recipe, step: int, epoch_steps: int, drops: int) -> float:
    """Gives each group its learning rate for step `step`; returns the weights'."""
    lr = learning_rate(recipe, step, epoch_steps, drops)
    for group in optimizer.param_groups:
        own = recipe.bias_lr * warmup_factor(recipe, step, epoch_steps) if group["bias"] else lr
        if group["first"]:
            cuts = passed(recipe.first_layer_epochs, step / epoch_steps)
            own = 0.0 if cuts > 1 else own / 10**cuts
        set_learning_rate(group, own, recipe.momentum)
    return lr


def set_learning_rate(group: dict[str, Any], lr: float, momentum: float) -> None:
    """Sets it for the next step, with momentum as in section 5, where the learning rate is inside it. A group at 0 stands still.

    The paper: v <- .9 v - .0005 lr w - lr g, w <- w + v. torch keeps b = -v / lr, so a change of the learning rate would also
    scale the updates gathered so far. Multiplying b by old / new gives the paper's; the step does it together with its
    multiplication by momentum, which costs nothing.
    """
    old, group["lr"] = group["lr"], lr
    group["momentum"] = momentum * (old / lr) if lr and old else momentum
