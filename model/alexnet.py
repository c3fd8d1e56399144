"""AlexNet as its paper describes it, as its authors' code has it, and as the paper's control experiments reduce it.

Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012; sections are those of
this paper. Files named *.cfg and layer.py are in the authors' code (github.com/computerhistory/AlexNet-Source-Code).
docs/recipes.md lists where the two differ and which one is followed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from imagefeed.dataset.errors import UserError
from imagefeed.model.arrangement import Arrangement, FirstConv2d, convolutional
from imagefeed.model.casts import full_layers
from imagefeed.model.lrn import ALPHA, HALF, local_response_norm

TOWERS = 2  # section 3.2: the two GPUs; conv2, conv4 and conv5 see only their own
SIZE = 224  # section 3.5
DROPOUT = 0.5  # section 4.2
DEVIATION, BIAS = 0.01, 1.0  # section 5

CODE_DEVIATION = 0.03  # layers-145.cfg: initW of conv3, conv4 and conv5; layers-146-2009.cfg: of conv6 too
CODE_ALPHA = 1e-4 / 5  # layer-params-145.cfg: scale; layer.py divides it by the channels of the window


class AlexNet(nn.Module):
    """Five convolutional and three fully connected layers (section 3.5).

    Takes (N, 3, crop_size, crop_size) float RGB pixels of 0-255 minus their mean, gives (N, num_classes) logits. For 1,000
    classes at 224 pixels it has 60,965,224 parameters, 659,272 neurons and 724,406,816 multiply-adds an image. Weights are drawn
    from torch's global generator; biases of the hidden layers start at `bias`.

    `towers=1` is the net on one GPU that section 3.2 compares with: half of the maps, except in conv5 and the full layers (its
    footnote). `conv6` adds the sixth convolutional layer of section 6 behind the last pool. `as_coded` follows the code instead
    of the text. `lrn=False` leaves out normalization (section 3.3). `overlapping=False` makes pools 2 wide instead of 3 (section
    3.4), which at 224 pixels gives maps of the same sizes.

    Raises UserError if `crop_size` is below 64, or below 36 without `overlapping`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = DROPOUT,
        crop_size: int = SIZE,
        bias: float = BIAS,
        *,
        towers: int = TOWERS,
        conv6: bool = False,
        as_coded: bool = False,
        lrn: bool = True,
        overlapping: bool = True,
    ):
        super().__init__()
        self.towers, self.as_coded, self.lrn = towers, as_coded, lrn
        self.alpha = CODE_ALPHA if as_coded else ALPHA
        self.arrangement = Arrangement()
        self.window = 3 if overlapping else 2  # section 3.4: z = 3 or 2, s = 2
        least = 64 if overlapping else 36
        if crop_size < least:
            raise UserError(f"a crop of {crop_size} pixels is too small for AlexNet's three pools; use at least {least}")
        # Section 3.5: kernels of each tower, their widths, conv1's stride; paddings that give the maps of figure 2.
        self.conv1 = FirstConv2d(3, 48 * towers, 11, stride=4)
        self.conv2 = nn.Conv2d(48 * towers, 128 * towers, 5, padding=2, groups=towers)
        self.conv3 = nn.Conv2d(128 * towers, 192 * towers, 3, padding=1)
        self.conv4 = nn.Conv2d(192 * towers, 192 * towers, 3, padding=1, groups=towers)
        self.conv5 = nn.Conv2d(192 * towers, 256, 3, padding=1, groups=towers)
        # Section 6 only says where it stands; its shape is that of layers-146-2009.cfg, where it joins the towers.
        self.conv6 = nn.Conv2d(256, 256, 3, padding=1) if conv6 else None
        side = -((11 - crop_size) // 4) + 1
        for _ in range(3):
            side = (side - self.window) // 2 + 1
        self.fc6 = nn.Linear(256 * side**2, 4096)  # section 3.5
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout6 = Dropout(dropout)
        self.dropout7 = Dropout(dropout)
        self.initialize(bias)

    def initialize(self, bias: float) -> None:
        """Section 5: weights from N(0, .01^2); biases `bias` in conv2, conv4, conv5 and the hidden full layers, else 0.

        Section 5 does not mention conv6, which starts as conv5 does, as in layers-146-2009.cfg.
        """
        positive = {self.conv2, self.conv4, self.conv5, self.conv6, self.fc6, self.fc7}
        wider = {self.conv3, self.conv4, self.conv5, self.conv6} if self.as_coded else set()
        for layer in self.children():
            if hasattr(layer, "weight"):
                nn.init.normal_(layer.weight, std=CODE_DEVIATION if layer in wider else DEVIATION)
                nn.init.constant_(layer.bias, bias if layer in positive else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The maps that fc6 sees."""
        # The paper's 55x55 outputs of conv1 need 227 pixels: the last windows extend beyond the right and lower edges, onto
        # zeros, which are the mean (layer.py rounds the number of windows up).
        overhang = -(x.shape[-1] - 11) % 4
        x = F.pad(x, (0, overhang, 0, overhang))
        if self.arrangement.apart or x.is_cuda:
            return convolutional(self, x)
        x = self.conv1(x)
        if self.as_coded:  # layers-145.cfg: conv1 has no neuron of its own, pool1 has neuron=relu
            x = F.relu(self.pool(self.normalize(x)))
        else:  # section 3.5: ReLU on the output of every layer, then normalization, then the pool
            x = self.pool(self.normalize(F.relu(x)))
        x = self.normalize(F.relu(self.conv2(x)))
        if self.as_coded and self.lrn:
            x = spatial_norm(x)
        x = self.pool(x)
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = self.pool(F.relu(self.conv5(x)))
        return x if self.conv6 is None else F.relu(self.conv6(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits from the maps of `features`."""
        fc6, fc7, fc8 = full_layers([self.fc6, self.fc7, self.fc8], x)
        x = self.dropout6(F.relu(fc6(x.flatten(1))))
        x = self.dropout7(F.relu(fc7(x)))
        return fc8(x)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Section 3.3, within each tower."""
        return local_response_norm(x, self.towers, self.alpha) if self.lrn else x

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Section 3.4: windows of 3, 2 apart, so that they overlap; or windows of 2, for comparison."""
        return F.max_pool2d(x, self.window, stride=2)

    def spatial_norm(self, x: torch.Tensor) -> torch.Tensor:
        return spatial_norm(x)


class Dropout(nn.Module):
    """Section 4.2: zeroes each output with probability `p` in training; multiplies all by 1 - p at test.

    nn.Dropout scales in training instead. With that, the paper's initial weights, learning rate and weight decay would have
    another effect in the layers behind it.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x * (1 - self.p)
        return x * torch.empty_like(x).bernoulli_(1 - self.p)


def spatial_norm(x: torch.Tensor) -> torch.Tensor:
    """Divides each activation by (1 + 4e-5 * the sum of squares over 5x5 pixels of its own map)^.75; zeros beyond the edges.

    The second normalization of conv2, which the paper does not mention. layers-145.cfg: cnorm2a, size=5; layer-params-145.cfg:
    scale=0.001, which layer.py divides by 25, and pow=0.75. The 1 is cuda-convnet's; minDiv, the paper's k, exists only for the
    other normalization. `x` is (N, C, H, W) of any floating type, and so is the result; half precision is computed in float32.
    """
    if x.dtype in HALF:
        return spatial_norm(x.float()).to(x.dtype)
    scaled = x * 0.001**0.5  # before squaring, as in lrn.py
    # The mean counts the zeros, so it is the sum / 25. Not the sum itself by `divisor_override`: onnxscript 0.7 ignores that
    # without a word, and coremltools 9 refuses it.
    return x * (1 + F.avg_pool2d(scaled * scaled, 5, stride=1, padding=2)).pow(-0.75)
