"""The arithmetic that a net's mathematics asks for.

Divided by what the device can do in that time it is the model FLOPs utilisation (MFU: Chowdhery et al. 2022, arXiv 2204.02311,
appendix B). Work that an implementation adds, such as recomputing, does not raise it.
"""

import copy
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

IMAGES = 2  # the fewest that batch normalization takes


class Flops(NamedTuple):
    """Floating-point operations for one image; a multiply-add is two."""

    forward: int
    backward: int


def count_flops(model: torch.nn.Module, crop_size: int) -> Flops:
    """Those of forward and backward pass for one (3, crop_size, crop_size) image.

    Counted are matrix products and convolutions, from the shapes of their tensors in a copy of the net without content:
    forward the multiply-adds of docs/recipes.md, 724,406,816 for the paper's net. Backward each costs once more for the
    gradient of its weights and once more for that of its input; not the latter in the first layer, as nobody asks for the
    gradient of pixels. Normalization, pools, activations, loss and update are left out, as in the paper above: memory is
    what limits those, not arithmetic.
    """
    # float64, because in it every layer is made of plain tensor operations: no kernel of ours reads what is not there.
    net = copy.deepcopy(model).to("meta", torch.float64).train()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops})
    with counter:
        loss = net(torch.empty(IMAGES, 3, crop_size, crop_size, dtype=torch.float64, device="meta")).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return Flops(forward // IMAGES, (counter.get_total_flops() - forward) // IMAGES)


def conv_backward_flops(grad_shape, x_shape, w_shape, *others, out_shape=None, **_) -> int:
    """As many operations as forward for each gradient that is asked for.

    The formula of torch 2.13 forgets the groups in the gradient of weights: it counts conv2, conv4 and conv5 of two towers
    twice, and a depthwise convolution as often as it has channels.
    """
    transposed, output_mask = others[4], others[7]
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(output_mask[:2])
