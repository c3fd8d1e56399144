"""The arithmetic that a network's mathematics asks for.

Divided by what the device can do in the same time, it is the model FLOPs utilization (MFU: Chowdhery et al. 2022, arXiv
2204.02311, appendix B). Work that an implementation adds, such as recomputation, does not raise it.
"""

import copy
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from imagefeed.dataset.errors import UserError

IMAGES = 2  # the fewest that batch normalization takes


class Flops(NamedTuple):
    """Floating-point operations for one image; a multiply-add counts as two."""

    forward: int
    backward: int


def count_flops(model: torch.nn.Module, crop_size: int) -> Flops:
    """Counts the matrix products and convolutions for one (3, crop_size, crop_size) image.

    Forward are the multiply-adds of docs/recipes.md: 724,406,816 for the paper's net. Backward, each layer costs as much again
    for the gradient of its weights and again for that of its input, except in the first layer: nobody needs the gradient of
    pixels. Normalization, pooling, activations, loss and update are left out, as in the paper above: memory limits them.

    Raises UserError if the net takes no such images: many of timm's have one size.
    """
    # In float64 every layer is made of plain tensor operations, so no kernel of ours reads memory that a meta tensor lacks.
    net = copy.deepcopy(model).to("meta", torch.float64).train()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops})
    with counter:
        try:
            loss = net(torch.empty(IMAGES, 3, crop_size, crop_size, dtype=torch.float64, device="meta")).sum()
        except AssertionError as error:
            reason = str(error).rstrip(".") or "the net gives no reason"
            raise UserError(f"this net takes no crops of {crop_size} pixels ({reason}); choose another `crop_size`") from error
        forward = counter.get_total_flops()
        loss.backward()
    return Flops(forward // IMAGES, (counter.get_total_flops() - forward) // IMAGES)


def conv_backward_flops(grad_shape, x_shape, w_shape, *others, out_shape=None, **_) -> int:
    """Counts the forward pass once for each gradient that is needed.

    The formula of torch 2.13 ignores groups in the gradient of the weights: it counts conv2, conv4 and conv5 of two towers twice,
    and a depthwise convolution once per channel.
    """
    transposed, output_mask = others[4], others[7]
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(output_mask[:2])
