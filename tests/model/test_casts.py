"""Casts of weights by one operation: compiled, a step is the uncompiled one to the bit, and so are its gradients."""

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from imagefeed.model.alexnet import AlexNet
from imagefeed.model.arrangement import Arrangement, arrange
from imagefeed.model.step import forward, train_step

NHWC = torch.channels_last
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of itself


def net_of() -> tuple[AlexNet, torch.Tensor]:
    """A net of the form that also a CPU computes as a GPU does, and images for it."""
    torch.manual_seed(0)
    net = AlexNet(10, crop_size=64, bias=0.1).to(memory_format=NHWC)
    arrange(net, Arrangement(apart=True))
    return net, torch.randn(4, 3, 64, 64) * 60


def compiled(net: AlexNet) -> tuple[torch.nn.Module, AotEagerAndRecordGraphs]:
    """The net compiled without code for a device, and the graphs of it, once it has run."""
    recorder = AotEagerAndRecordGraphs()
    return torch.compile(net, backend=recorder, fullgraph=True), recorder


def casts(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "_copy" in str(node.target)]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_compiled_step_is_the_uncompiled_one_to_the_bit(precision):
    found = []
    for compiles in (False, True):
        net, images = net_of()
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
        called, recorder = compiled(net) if compiles else (net, None)
        losses = []
        for number in range(3):
            torch.manual_seed(number)  # dropout
            losses.append(train_step(called, images, torch.arange(4), optimizer, precision))
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        found.append((losses, gradients, net.state_dict()))
    (losses, gradients, weights), (others, other_gradients, other_weights) = found
    assert losses == others and losses[0] != losses[2]
    for name, value in weights.items():
        assert torch.equal(gradients[name], other_gradients[name]) and torch.equal(value, other_weights[name]), name
        assert gradients[name].any() and gradients[name].dtype == value.dtype == torch.float32, name
    assert casts(recorder.fw_graphs[0]) == (["aten._foreach_copy.default"] * 2 if precision == "bfloat16" else [])


def test_a_compiled_evaluation_sees_weights_that_change():
    net, images = net_of()
    called, _ = compiled(net.eval())
    with torch.no_grad():
        before = forward(called, images, "bfloat16")
        for parameter in net.parameters():
            parameter.mul_(1.5)
        after = forward(called, images, "bfloat16")
        assert torch.equal(after, forward(net, images, "bfloat16")) and not torch.equal(after, before)
