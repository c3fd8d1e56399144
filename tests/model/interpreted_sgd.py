"""Run by test_gpu_check.py in a process with TRITON_INTERPRET=1."""

import torch

from imagefeed.model.graphed import launch_update, update


def test_the_kernel_is_the_plain_update():
    """Of more weights than a program takes, whose last program is not full."""
    own = torch.Generator().manual_seed(2)
    given = [torch.randn(3, 700, generator=own) for _ in range(3)]
    settings = torch.tensor([0.01, 0.9])
    found, wanted = ([value.clone() for value in given] for _ in range(2))
    launch_update(*found, settings, 0.0005)
    update(*wanted, settings, 0.0005)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[1], given[1]) and not torch.equal(found[0], given[0])
