"""Nets for programs that know nothing of this one."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import train
from imagefeed.training.checkpoints import newest_first
from imagefeed.training.export import DESCRIPTION
from imagefeed.training.measuring import open_member, read_checkpoint
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe
from imagefeed.training.resume import open_run, save

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
# The nets' normalizations, towers and pools, both kinds of means.
KINDS = {"alexnet": {}, "alexnet-code": {"model": "alexnet-code", "mean": "image", "std": "dataset"}}


def call(out: Path, *options: str) -> Result:
    return CliRunner().invoke(train.main, [str(out), *options])


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tiny, tmp_path_factory):
    """The folder of a run before its first step, exported by the command, with its net and what was printed."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    folder.mkdir()
    recipe = Recipe(**{"crop_size": 64, "bias": 0.1, "precision": "bfloat16"} | KINDS[request.param])
    save(open_run(tiny, recipe, folder, torch.device("cpu"), Ranks()), folder)
    result = call(tiny.root, "--export", str(folder))
    with torch.no_grad():
        member = open_member(tiny, folder, read_checkpoint(folder, tiny), torch.device("cpu"))
    yield folder / "checkpoint-00000000", member, result
    shutil.rmtree(folder)


def pixels_and_logits(member, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    pixels = 60 * torch.randn(images, 3, member.looks[0], member.looks[0], generator=generator)
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
    size = member.looks[0]
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("pixels", ["batch", 3, size, size])]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 3])]
    for images in (1, 2, 5):
        pixels, logits = pixels_and_logits(member, images)
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    described = session.get_modelmeta().custom_metadata_map[DESCRIPTION]
    assert described == stem.with_suffix(".json").read_text()


def test_what_pixels_the_net_takes_stands_in_the_file_and_beside_it(exported, tiny):
    stem, member, _ = exported
    extra = {DESCRIPTION: ""}
    torch.export.load(stem.with_suffix(".pt2"), extra_files=extra)
    assert extra[DESCRIPTION] == stem.with_suffix(".json").read_text()
    described = json.loads(extra[DESCRIPTION])
    size, mean, std = member.looks
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
    assert ("std" in pixels) == (std == "dataset") == ("divided by the deviation" in pixels["range"])


@pytest.mark.skipif(ONNX, reason="ONNX is installed")
def test_onnx_that_is_not_installed_is_one_sentence_after_the_rest_is_written(exported):
    stem, _, result = exported
    assert result.exit_code == 1 and result.output.splitlines()[-1] == (
        f"Error: {stem}.onnx: onnx and onnxscript not installed; run: pip install 'imagefeed[export]'"
    )
    assert stem.with_suffix(".pt2").exists() and not stem.with_suffix(".onnx").exists()


def test_exporting_something_else_is_one_sentence(tiny, tmp_path):
    result = call(tiny.root, "--export", str(tmp_path))
    assert result.exit_code == 1 and "there is no checkpoint in this folder" in result.output
    (tmp_path / "notes.pt").write_text("no checkpoint")
    result = call(tiny.root, "--export", str(tmp_path / "notes.pt"))
    assert result.exit_code == 1 and "notes.pt: corrupt" in result.output
    assert call(tiny.root, "--export", str(tmp_path), "--evaluate", str(tmp_path)).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.pt"] and newest_first(tmp_path) == []
