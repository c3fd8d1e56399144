"""Nets for programs without imagefeed."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from imagefeed.training.checkpoints import read_checkpoint
from imagefeed.training.export import DESCRIPTION
from imagefeed.training.measuring import open_member
from imagefeed.training.recipes import Recipe
from imagefeed.training.resume import open_run
from tests.training.runs import call, inputs

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
# The nets' normalizations, towers and pools, both kinds of means.
KINDS = {"alexnet": {}, "alexnet-code": {"model": "alexnet-code", "mean": "image", "std": "dataset"}}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tiny, tmp_path_factory):
    """The folder of a run before its first step, exported by the command, with its net and what was printed."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    folder.mkdir()
    recipe = Recipe(**{"crop_size": 64, "bias": 0.1, "precision": "bfloat16"} | KINDS[request.param])
    open_run(inputs(tiny), recipe, folder).save(folder)
    result = call(tiny.root, "--export", folder)
    with torch.no_grad():
        member = open_member(tiny, folder, read_checkpoint(folder), torch.device("cpu"))
    yield folder / "checkpoint-00000000", member, result
    shutil.rmtree(folder)


def pixels_and_logits(member, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    side = member.preprocessing.crop_size
    pixels = 60 * torch.randn(images, 3, side, side, generator=generator)
    with torch.inference_mode():
        return pixels, member.model.eval()(pixels)


def test_the_program_gives_the_nets_logits_for_any_number_of_images(exported):
    stem, member, _ = exported
    program = torch.export.load(stem.with_suffix(".pt2")).module()
    for images in (1, 2, 5):
        pixels, logits = pixels_and_logits(member, images)
        torch.testing.assert_close(program(pixels), logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


def test_onnx_gives_the_nets_logits_for_any_number_of_images(exported):
    runtime = pytest.importorskip("onnxruntime")
    stem, member, result = exported
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(stem.with_suffix(".onnx"))
    size = member.preprocessing.crop_size
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("pixels", ["batch", 3, size, size])]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 3])]
    for images in (1, 2, 5):
        pixels, logits = pixels_and_logits(member, images)
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    described = session.get_modelmeta().custom_metadata_map[DESCRIPTION]
    assert described == stem.with_suffix(".json").read_text()


def test_a_description_of_the_pixels_is_in_the_file_and_beside_it(exported, tiny):
    stem, member, _ = exported
    extra = {DESCRIPTION: ""}
    torch.export.load(stem.with_suffix(".pt2"), extra_files=extra)
    assert extra[DESCRIPTION] == stem.with_suffix(".json").read_text()
    described = json.loads(extra[DESCRIPTION])
    size, mean, std = vars(member.preprocessing).values()
    statistics = tiny.load_statistics()
    assert described["classes"] == ["ant", "bee", "cat"] and described["checkpoint"] == stem.name
    pixels = described["pixels"]
    assert (pixels["order"], pixels["shape"]) == ("RGB", ["batch", 3, size, size])
    assert pixels["image"] == f"shorter side rescaled to 256, center {size} x {size} cut out"
    if mean == "image":
        found = np.load(stem.with_name(pixels["mean_image"]))
        np.testing.assert_array_equal(found, statistics["mean_image"].astype(np.float32))
    else:
        assert pixels["mean"] == statistics["channel_mean"].tolist()
    assert ("std" in pixels) == (std == "dataset") == ("divided by the standard deviation" in pixels["range"])


@pytest.mark.skipif(ONNX, reason="ONNX is installed")
def test_missing_onnx_is_one_sentence_after_the_rest_is_written(exported):
    stem, _, result = exported
    assert result.exit_code == 1 and result.output.splitlines()[-1] == (
        f"Error: {stem}.onnx: onnx and onnxscript not installed; run: pip install '.[export]'"
    )
    assert stem.with_suffix(".pt2").exists() and not stem.with_suffix(".onnx").exists()
