import pytest
import torch


@pytest.fixture
def one_torch_thread():
    """On a busy machine threads that wait for each other take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
