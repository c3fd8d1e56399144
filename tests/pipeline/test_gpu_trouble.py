"""What a machine lacks for a GPU, and a lack of memory, are said in one sentence each."""

import ctypes
import functools
import os
import subprocess

import pytest
import torch

from imagefeed.dataset.errors import UserError, one_sentence
from imagefeed.pipeline import gpu
from imagefeed.pipeline.loader import ImageLoader

# Of DALI 2.4.0 and PyTorch 2.13.
DALI = "Critical error in pipeline:\nError in GPU operator `nvidia.dali.fn.decoders.image`,\nencountered:\n\n{}\nCurrent pipeline"
ON_GPU = "Can't allocate 616562688 on device 0."
CUDA = "CUDA out of memory. Tried to allocate 1.15 GiB. GPU 0 has a total capacity of 139.80 GiB of which 84.00 MiB is free."


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A library whose cuDriverGetVersion gives what CUDA_VERSION says, as libcuda.so.1's does, and nothing else."""
    folder = tmp_path_factory.mktemp("driver")
    code = '#include <stdlib.h>\nint cuDriverGetVersion(int *v) { *v = atoi(getenv("CUDA_VERSION")); return 0; }'
    (folder / "driver.c").write_text(code)
    path = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", folder / "driver.c", "-o", path], check=True)
    return lambda name: ctypes.CDLL(str(folder / name))


@pytest.mark.parametrize(
    ("version", "built_for", "sentence"),
    [
        (12080, "13.0", "the driver is too old: it supports CUDA 12.8, and this PyTorch is built for 13.0; update the driver"),
        (13000, "13.0", "the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (13000, "12.6", "the driver shows no GPU"),
        (13000, None, "this PyTorch is built for CPUs; install one built for CUDA"),
    ],
)
def test_why_no_gpu_can_be_used(driver, monkeypatch, version, built_for, sentence):
    monkeypatch.setenv("CUDA_VERSION", str(version))
    assert gpu.why_unusable(built_for, driver).startswith(sentence)


def test_a_missing_driver_and_a_missing_decoder_are_named(driver):
    elsewhere = functools.partial(lambda name: driver(f"no-{name}"))
    assert gpu.why_unusable("13.0", elsewhere).startswith("no NVIDIA driver (libcuda.so.1) is found; install it")
    assert "libnvcuvid.so.1 is not found" in gpu.why_no_hardware_decoder(driver)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in gpu.why_no_hardware_decoder(driver)
    assert gpu.why_no_hardware_decoder(lambda name: driver("libcuda.so.1")) == ""


@pytest.mark.parametrize(
    ("reason", "on_gpu", "sentence"),
    [
        (DALI.format(ON_GPU), True, "out of memory of the GPU: lower `batch_size`"),
        (CUDA, True, "out of memory of the GPU: lower `batch_size`"),
        ("std::bad_alloc", True, "out of memory: lower `batch_size`"),
        (DALI.format("CUDA driver version is insufficient for CUDA runtime version"), True, "the NVIDIA driver is too old"),
        ("You are trying to create a GPU DALI pipeline while CUDA is not available.", True, "DALI finds no usable GPU"),
        (DALI.format("nvImageCodec failure '#4'"), True, ""),
    ],
)
def test_errors_that_are_the_machines_are_told_from_those_of_records(reason, on_gpu, sentence):
    found = gpu.trouble_of(reason, on_gpu)
    assert found.startswith(sentence) and bool(found) == bool(sentence)


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [(ON_GPU, "cpu, batch size 8: out of memory: lower batch_size"), ("nvImageCodec failure", "cannot be decoded")],
)
def test_a_loader_that_lacks_memory_does_not_suspect_the_dataset(tiny, reason, sentence):
    with ImageLoader(tiny, "train", 8, decoder="dali") as loader:
        next(iter(loader))

        def fail():
            raise RuntimeError(DALI.format(reason))

        loader._batches.next = fail
        with pytest.raises(UserError) as caught:
            loader.batch_at(1)
    assert sentence in str(caught.value)
    assert ("verify" in str(caught.value)) == ("decoded" in sentence)


def allocate() -> torch.Tensor:
    return torch.empty(1 << 55, dtype=torch.uint8)


def exhaust_a_gpu() -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(("work", "where"), [(allocate, "memory"), (exhaust_a_gpu, "the GPU's memory")])
def test_a_command_that_lacks_memory_ends_with_one_sentence(capsys, work, where):
    with pytest.raises(SystemExit) as caught, one_sentence():
        work()
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"Error: out of {where}; lower --batch-size or --cache-bytes, or end other programs that use it\n"
    )


def test_another_error_of_a_command_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_sentence():
        raise RuntimeError("shapes differ")
