"""AlexNet as its paper describes it.

Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012; the sections
named below are its. The authors' code differs from the text in a few places; here the text is followed.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.lrn import local_response_norm

TOWERS = 2  # section 3.2: the two GPUs; conv2, conv4 and conv5 see only their own
SIZE = 224  # section 3.5
BIAS = 1.0  # section 5


class AlexNet(nn.Module):
    """Five convolutional and three fully connected layers (section 3.5).

    Takes (N, 3, size, size) float RGB pixels of 0-255 less their mean, gives (N, num_classes) logits. For 1,000
    classes at the paper's 224 pixels it has 60,965,224 parameters, 659,272 neurons and 724,406,816 multiply-adds an
    image. Weights are drawn from torch's global generator.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, size: int = SIZE, bias: float = BIAS):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=TOWERS)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=TOWERS)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=TOWERS)
        self.fc6 = nn.Linear(256 * pooled_side(size) ** 2, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout6 = Dropout(dropout)
        self.dropout7 = Dropout(dropout)
        self.initialise(bias)

    def initialise(self, bias: float) -> None:
        """Section 5: weights from N(0, .01^2); biases `bias` in conv2, conv4, conv5 and the hidden full layers, else 0."""
        positive = {self.conv2, self.conv4, self.conv5, self.fc6, self.fc7}
        for layer in self.children():
            if hasattr(layer, "weight"):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(layer.bias, bias if layer in positive else 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The paper's 55x55 outputs of conv1 need 227 pixels: its last windows run over the right and lower edge, onto
        # zeros, which are the mean (the authors' code rounds the count of windows up).
        overhang = -(x.shape[-1] - 11) % 4
        x = F.relu(self.conv1(F.pad(x, (0, overhang, 0, overhang))))
        x = pool(local_response_norm(x, TOWERS))
        x = F.relu(self.conv2(x))
        x = pool(local_response_norm(x, TOWERS))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = pool(F.relu(self.conv5(x)))
        x = self.dropout6(F.relu(self.fc6(x.flatten(1))))
        x = self.dropout7(F.relu(self.fc7(x)))
        return self.fc8(x)


class Dropout(nn.Module):
    """Section 4.2: in training each output is zero with probability `p`, else as it is; at test all are times 1 - p.

    Not nn.Dropout, which scales in training: with that, the paper's initialisation, learning rate and decay would
    mean something else in the layers behind it.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x * (1 - self.p)
        return x * torch.empty_like(x).bernoulli_(1 - self.p)


def pool(x: torch.Tensor) -> torch.Tensor:
    """Section 3.4: windows of 3, 2 apart, so that they overlap."""
    return F.max_pool2d(x, 3, stride=2)


def pooled_side(size: int) -> int:
    """The height and width of the last pool's output for an input of `size` pixels: 6 for 224. At least 64 pixels."""
    side = -((11 - size) // 4) + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side
