"""Casts of weights by one operation: a compiled net computes the same to the bit."""

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from imagefeed.model import casts
from imagefeed.model.alexnet import AlexNet
from imagefeed.model.arrangement import Arrangement, arrange
from imagefeed.model.step import forward

NHWC = torch.channels_last
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


def net_of() -> tuple[AlexNet, torch.Tensor]:
    """A net that a CPU too computes by `convolutional`, and images for it."""
    torch.manual_seed(0)
    net = AlexNet(10, crop_size=64, bias=0.1).to(memory_format=NHWC)
    arrange(net, Arrangement(apart=True))
    return net, torch.randn(2, 3, 64, 64) * 60


def backward(precision: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """Outputs and gradients of a compiled net, and the operations of its forward pass that cast or copy."""
    torch._dynamo.reset()
    net, images = net_of()
    recorder = AotEagerAndRecordGraphs()
    y = forward(torch.compile(net, backend=recorder, fullgraph=True), images, precision)
    y.square().sum().backward()
    copies = [str(node.target) for node in recorder.fw_graphs[0].graph.nodes if "_copy" in str(node.target)]
    return y, {name: parameter.grad for name, parameter in net.named_parameters()}, copies


def test_casts_together_change_no_bit(monkeypatch):
    y, gradients, copies = backward("bfloat16")
    monkeypatch.setattr(casts, "applies", lambda x: False)
    wanted, others, without = backward("bfloat16")
    assert torch.equal(y, wanted)
    for name, grad in gradients.items():
        assert torch.equal(grad, others[name]) and grad.stride() == others[name].stride() and grad.any(), name
    assert copies.count("aten._foreach_copy.default") == 2 and "aten._foreach_copy.default" not in without
    assert len(without) - (len(copies) - 2) >= 11  # eight weights, three biases


def test_float32_is_not_cast():
    assert backward("float32")[2] == []


def test_gradients_pass_through_as_through_single_casts():
    drawn = torch.Generator().manual_seed(0)
    shapes = (8, 3, 5, 5), (7, 6), (7,)
    tensors = [torch.randn(shape, generator=drawn).requires_grad_() for shape in shapes]
    tensors[0].data = tensors[0].data.contiguous(memory_format=NHWC)

    def square(tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return [one * one for one in casts.cast_together(tensors, tensors[0])]

    found = torch.compile(square, backend="aot_eager", fullgraph=True)(tensors)
    wanted = [one.to(torch.bfloat16) ** 2 for one in tensors]
    assert all(torch.equal(one, other) and one.stride() == other.stride() for one, other in zip(found, wanted, strict=True))
    gradients, others = (torch.autograd.grad([one.sum() for one in ways], tensors) for ways in (found, wanted))
    for one, other in zip(gradients, others, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_a_compiled_evaluation_sees_weights_that_change():
    net, images = net_of()
    called = torch.compile(net.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = forward(called, images, "bfloat16")
        for parameter in net.parameters():
            parameter.mul_(1.5)
        after = forward(called, images, "bfloat16")
        torch.testing.assert_close(after, forward(net, images, "bfloat16"), rtol=0.02, atol=0.02 * after.abs().max().item())
    assert (after - before).norm() > before.norm()
