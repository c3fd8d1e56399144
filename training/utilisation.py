"""How much of a device's arithmetic a training uses: model FLOPs utilisation (MFU).

MFU is the arithmetic that the net's mathematics asks for each second, divided by what the device can do (Chowdhery et al.
2022, arXiv 2204.02311, appendix B). Work that an implementation adds, such as recomputing, does not raise it.
"""

import copy

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pipeline.limits import fastest

IMAGES = 2  # the fewest that batch normalisation takes
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices: 2 ms of a GPU of 600 TFLOP/s, 10 ms of two cores
SECONDS = 0.1


def count_flops(model: torch.nn.Module, size: int) -> int:
    """Floating-point operations of forward and backward pass for one (3, size, size) image; a multiply-add is two.

    Counted are matrix products and convolutions, from the shapes of their tensors in a copy of the net without content:
    forward the multiply-adds of docs/recipes.md, 724,406,816 for the paper's net. Backward each costs once more for the
    gradient of its weights and once more for that of its input; not the latter in the first layer, as nobody asks for the
    gradient of pixels. Normalisation, pools, activations, loss and update are left out, as in the paper above: memory is
    what limits those, not arithmetic.
    """
    # float64, because in it every layer is made of plain tensor operations: no kernel of ours reads what is not there.
    net = copy.deepcopy(model).to("meta", torch.float64).train()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops})
    with counter:
        net(torch.empty(IMAGES, 3, size, size, dtype=torch.float64, device="meta")).sum().backward()
    return counter.get_total_flops() // IMAGES


def conv_backward_flops(grad_shape, x_shape, w_shape, *others, out_shape=None, **_) -> int:
    """As many operations as forward for each gradient that is asked for.

    The formula of torch 2.13 forgets the groups in the gradient of weights: it counts conv2, conv4 and conv5 of two towers
    twice, and a depthwise convolution as often as it has channels.
    """
    transposed, output_mask = others[4], others[7]
    return conv_flop_count(x_shape, w_shape, grad_shape, transposed) * sum(output_mask[:2])


@torch.inference_mode()
def matrix_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations a second that the device gives to PyTorch at its clock of now, in about 0.3 s.

    That of the fastest of some square matrix products, and on a CPU, where they are faster by a sixth, of some convolutions
    of the paper's conv3; what a data sheet promises is more. With neighbours on the machine it is too low, and the MFU too
    high, beyond 1 if they leave. `precision` is float32 or bfloat16.
    """
    dtype = getattr(torch, precision)
    own = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        # Not zeros or ones: they cost a GPU less power, so that it clocks higher than it ever does in training.
        return torch.randn(*shape, generator=own, device=device).to(dtype)

    side = SIDE[device.type]
    a, product = random(side, side), random(side, side)
    rate = 2 * side**3 / fastest(lambda: torch.mm(a, a, out=product), SECONDS, device)
    if device.type == "cpu":
        images, kernels = random(32, 256, 13, 13), random(384, 256, 3, 3)
        images, kernels = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, kernels))
        flops = 2 * 32 * 13**2 * kernels.numel()
        rate = max(rate, flops / fastest(lambda: F.conv2d(images, kernels, padding=1), SECONDS, device))
    return rate
