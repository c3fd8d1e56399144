"""What a training uses of a device's arithmetic."""

import pytest
import torch
from torch import nn

from imagefeed.dataset.errors import UserError
from imagefeed.model.flops import count_flops
from imagefeed.model.nets import build_net
from imagefeed.pipeline.profiler.limits import matrix_rate

CONV1 = 105_415_200  # multiply-adds of the paper's conv1: 55 x 55 x 96 x 11 x 11 x 3


@pytest.mark.parametrize(
    ("name", "multiply_adds", "first"),
    [
        ("alexnet", 724_406_816, CONV1),
        ("alexnet-code", 724_406_816, CONV1),
        ("alexnet-one-gpu", 391_514_384, CONV1 // 2),
        ("alexnet-owt", 714_188_480, CONV1 * 64 // 96),
    ],
)
def test_a_step_is_three_times_the_forward_pass_but_for_the_gradient_of_pixels(name, multiply_adds, first):
    found = count_flops(build_net(name, 1000), 224)
    assert found == (2 * multiply_adds, 2 * (2 * multiply_adds - first))


def test_groups_share_the_work_in_both_gradients_of_a_convolution():
    """A depthwise one of 8 channels, behind a first layer of 1x1 pixels, on 10 x 10 pixels; batch normalization is free."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(800, 5)
    )
    assert sum(count_flops(net, 10)) == 2 * (2 * 100 * 8 * 3 + 3 * 100 * 8 * 9 + 3 * 800 * 5)


def test_a_net_of_another_size_is_one_sentence():
    class Fixed(nn.Module):
        def forward(self, x):
            torch._assert(x.shape[2] == 96, f"Input height ({x.shape[2]}) doesn't match model (96).")
            return x

    said = r"^this net takes no crops of 64 pixels \(Input height \(64\) doesn't match model \(96\)\); choose another crop_size$"
    with pytest.raises(UserError, match=said):
        count_flops(Fixed(), 64)


def test_counting_leaves_the_net_and_the_generator_as_they_were():
    net = build_net("alexnet-one-gpu", 10, crop_size=64).eval()
    before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    count_flops(net, 64)
    assert torch.equal(before[0], torch.get_rng_state()) and not net.training
    assert all(torch.equal(value, before[1][name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_device_multiplies_matrices(device):
    """A billion operations a second is less than any core does."""
    assert matrix_rate("float32", 0.1, torch.device(device)) > 1e9
