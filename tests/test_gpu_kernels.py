"""Our kernels on a GPU against plain tensor operations. A CPU runs those, so there the comparisons themselves are tested."""

import pytest
import torch

from imagefeed.model import fused
from imagefeed.model.arrangement import Arrangement, arrange, seconds_on_gpu
from imagefeed.model.graphed import CudaRecorder, GraphedStep
from imagefeed.model.nets import build_net
from imagefeed.model.step import forward, train_step
from imagefeed.pipeline import pixels
from imagefeed.training.recipes import Recipe, make_optimizer, set_learning_rates
from tests.test_gpu import apart, full_float32

NHWC = torch.channels_last


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
@pytest.mark.parametrize("pooled", [False, True], ids=["norm", "pool"])
@pytest.mark.parametrize("shape, towers", [((3, 96, 55, 55), 2), ((2, 256, 27, 27), 2), ((2, 48, 9, 8), 1), ((1, 8, 3, 3), 1)])
def test_normalization_and_pool_are_those_in_float64(device, shape, towers, pooled, dtype, tolerance):
    """`apart` divides by the size of the whole, because of the pixels whose largest neighbor rounding decides."""
    x, bias = (drawn(*shape) * 100).to(dtype), drawn(shape[1], seed=1) * 50
    operator = (lambda *a: fused.norm_pool(*a)[0]) if pooled else fused.norm
    exact = [x.double().requires_grad_(), bias.clone().requires_grad_()]
    wanted = operator(*exact, towers, 1e-4, True)
    grad = drawn(*wanted.shape, seed=2).to(dtype)
    wanted.backward(grad.double())
    given = [x.to(device).contiguous(memory_format=NHWC).requires_grad_(), bias.float().to(device).requires_grad_()]
    found = operator(*given, towers, 1e-4, True)
    found.backward(grad.to(device))
    assert found.dtype == given[0].grad.dtype == dtype and found.is_contiguous(memory_format=NHWC)
    for one, other in ((found, wanted), *((mine.grad, right.grad) for mine, right in zip(given, exact, strict=True))):
        assert apart(one, other) < tolerance


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("by_image", [False, True], ids=["channel", "image"])
def test_pixels_are_those_of_a_cpu_to_the_bit(device, by_image, dtype, channels_last):
    own = torch.Generator().manual_seed(0)
    as_bytes = dtype == torch.uint8
    crops, images = (torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8, generator=own) for side in (224, 256))
    places = torch.tensor([[0, 0, 0], [32, 32, 1], [5, 7, 1], [31, 0, 0], [0, 9, 1]])
    means = torch.zeros(5, 3) if as_bytes else (drawn(5, 3) * 20 + 100).float()
    scale = torch.ones(3) if as_bytes else torch.tensor([0.5, 1.0, 0.01])
    image = (drawn(3, 256, 256) * 50 + 100).float() if by_image and not as_bytes else None
    found = []
    for where in ("cpu", device):
        on = [None if value is None else value.to(where) for value in (crops, images, places, means, scale, image)]
        planes, slots = (
            torch.zeros(7, 256 * 256 * 3 // 2, dtype=torch.uint8, device=where),
            torch.tensor([4, 0, 6, 2, 1], device=where),
        )
        pixels.store_planes(on[1], slots, planes)
        numbers = torch.cat([slots[:, None], on[2]], 1).T
        normalized = pixels.normalized(on[0], on[3], on[4], dtype, channels_last, on[5], on[2])
        cropped = pixels.cropped(planes, numbers, (256, 256), 224, on[3], on[4], dtype, channels_last, on[5])
        found.append((normalized.cpu(), cropped.cpu(), planes.cpu(), normalized.stride(), cropped.stride()))
    (one, crop, planes, *strides), (other, other_crop, other_planes, *other_strides) = found
    assert torch.equal(one, other) and strides == other_strides
    differ = planes != other_planes  # the order in which four chroma values are added may decide a rounding
    assert differ.float().mean() < 1e-4 and (planes.int() - other_planes.int()).abs().max() <= 1
    assert (crop.float() - other_crop.float()).abs().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("name", ["alexnet", "alexnet-code", "alexnet-owt"])
def test_arrangements_agree_on_a_gpu(name):
    torch.manual_seed(0)
    net = build_net(name, 10, crop_size=96, dropout=0.0).to("cuda", memory_format=NHWC)
    images = (drawn(4, 3, 96, 96) * 60).float().cuda()
    with full_float32():
        found = []
        for way in (Arrangement(), Arrangement(apart=True), Arrangement(folded=True), Arrangement(pooled=False)):
            arrange(net, way)
            y = forward(net, images, "float32")
            found.append((y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))))
    for others in found[1:]:
        assert max(apart(one, other) for one, other in zip(others, found[0], strict=True)) < 1e-3
    assert 0 < seconds_on_gpu(net, Arrangement(), "bfloat16", 96) < 1 and net.arrangement == Arrangement(pooled=False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
def test_a_graphed_step_is_an_ordinary_one_on_a_gpu():
    """Whose learning rate changes in every step; weights move as far, and dropout draws as the seed says."""
    recipe = Recipe(lr=0.001, schedule="cosine", warmup_epochs=1, epochs=4)
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        net = build_net("alexnet", 10, crop_size=96, bias=0.1).to("cuda", memory_format=NHWC)
        optimizer = make_optimizer(net, recipe)
        step = GraphedStep(net, optimizer, "float32", CudaRecorder(torch.device("cuda")))
        losses = []
        with full_float32():
            for number in range(10):
                batch = (drawn(8, 3, 96, 96, seed=number) * 60).float().cuda(), (torch.arange(8) % 10).cuda()
                set_learning_rates(optimizer, recipe, number, 3, 0)
                torch.cuda.manual_seed(number)
                loss = step(*batch) if graphed else train_step(net, *batch, optimizer, "float32")
                losses.append(loss.item())
        found.append((losses, [parameter.detach().clone() for parameter in net.parameters()]))
    (losses, weights), (others, other_weights) = found
    assert losses == pytest.approx(others, rel=1e-3)
    assert max(apart(one, other) for one, other in zip(other_weights, weights, strict=True)) < 1e-3
