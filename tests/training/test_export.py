"""Nets for programs without imagefeed."""

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from imagefeed.pipeline.loader import ImageLoader
from imagefeed.training.checkpoints import read_checkpoint
from imagefeed.training.export import DESCRIPTION
from imagefeed.training.measuring import open_member
from imagefeed.training.recipes import Recipe
from imagefeed.training.resume import open_run
from tests.conftest import jpeg, picture, same
from tests.training.runs import call, inputs

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
# The nets' normalizations, towers and pools, both kinds of means.
KINDS = {"alexnet": {}, "alexnet-code": {"model": "alexnet-code", "mean": "image", "std": "dataset"}}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tiny, tmp_path_factory):
    """The folder of a run before its first step, exported by the command, with its net and what was printed.

    Its conv1 is as strong as a trained one, whose outputs reach 900.
    """
    folder = tmp_path_factory.mktemp("exported") / "run"
    folder.mkdir()
    recipe = Recipe(**{"crop_size": 64, "bias": 0.1, "precision": "bfloat16"} | KINDS[request.param])
    run = open_run(inputs(tiny), recipe, folder)
    with torch.no_grad():
        run.model.conv1.weight *= 20
    run.save(folder)
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


def test_channels_last_pixels_are_read_right_and_other_pixels_refused(exported):
    stem, member, _ = exported
    pixels, logits = pixels_and_logits(member, 3)
    program = torch.export.load(stem.with_suffix(".pt2")).module()
    found = program(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())
    larger = F.pad(pixels, (8, 8, 8, 8))
    with pytest.raises(AssertionError, match="Guard failed: pixels"):
        program(larger)
    with pytest.raises(RuntimeError):
        program(pixels.double())
    if ONNX:
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(stem.with_suffix(".onnx"))
        for refused in (larger, pixels.double()):
            with pytest.raises(Exception, match="INVALID_ARGUMENT|dimensions|data type"):
                session.run(None, {"pixels": refused.numpy()})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_the_program_can_be_cast(exported, dtype, tolerance):
    stem, member, _ = exported
    pixels, logits = pixels_and_logits(member, 3)
    program, outputs = torch.export.load(stem.with_suffix(".pt2")).module(), []
    if dtype != torch.float64:  # autocast is for half precision
        with torch.autocast("cpu", dtype):
            outputs.append(program(pixels))
    outputs.append(program.to(dtype)(pixels.to(dtype)))
    for found in outputs:
        assert found.dtype == dtype
        assert (found.double() - logits).abs().max() < tolerance * logits.abs().max()


def test_no_pool_has_a_divisor_of_its_own(exported):
    """onnxscript ignores it, coremltools refuses it."""
    stem, member, _ = exported
    pools = [node for node in torch.export.load(stem.with_suffix(".pt2")).graph.nodes if "avg_pool" in str(node.target)]
    assert len(pools) == member.model.as_coded and all(node.args[6:] in ((), (None,)) for node in pools)


def to_float16(model) -> None:
    """Converts all of an ONNX model, as converters for phones and browsers do."""
    import onnx

    def half(tensor) -> None:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))

    for tensor in model.graph.initializer:
        half(tensor)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            half(attribute.t)
        elif attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16


def test_onnx_converted_to_float16_is_right(exported):
    """By onnx's own evaluator: onnxruntime computes float16 in float32 on a CPU, and so hides what overflows."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    stem, member, _ = exported
    pixels, logits = pixels_and_logits(member, 2)
    strongest = member.model.conv1(pixels).abs().max()
    assert 700 < strongest < 1200, strongest
    model = onnx.load(stem.with_suffix(".onnx"))
    to_float16(model)
    (found,) = reference.ReferenceEvaluator(model).run(None, {"pixels": pixels.numpy().astype(np.float16)})
    assert found.dtype == np.float16
    assert np.abs(found - logits.numpy()).max() < 0.01 * logits.abs().max()


def test_a_description_of_the_pixels_is_in_the_file_and_beside_it(exported, tiny):
    """In fields with which any program prepares the pixels that the net wants."""
    stem, member, _ = exported
    extra = {DESCRIPTION: ""}
    torch.export.load(stem.with_suffix(".pt2"), extra_files=extra)
    assert extra[DESCRIPTION] == stem.with_suffix(".json").read_text()
    described = json.loads(extra[DESCRIPTION])
    assert described["classes"] == ["ant", "bee", "cat"] and described["checkpoint"] == stem.name
    pixels = described["pixels"]
    assert pixels["resize"] == {"shortest_edge": 256, "interpolation": "bicubic", "antialias": True}
    assert pixels["crop"] == {"height": 64, "width": 64, "mode": "center"} and pixels["shape"] == ["batch", 3, 64, 64]
    assert (pixels["color_order"], pixels["layout"], pixels["memory_format"]) == ("RGB", "NCHW", "contiguous")
    assert (pixels["dtype"], pixels["scale"]) == ("float32", 1)
    with Image.open(io.BytesIO(jpeg(picture(100)))) as image:  # record 0 of val, already resized
        image = np.asarray(image.crop((96, 96, 160, 160)), np.float32) * pixels["scale"]
    mean = pixels["mean"]
    if mean is None:
        mean = np.load(stem.with_name(pixels["mean_image"]))[96:160, 96:160]
    prepared = ((image - mean) / pixels["std"]).transpose(2, 0, 1)
    with ImageLoader(tiny, "val", 1, views="center", **vars(member.preprocessing)) as loader:
        assert same(next(iter(loader)).images[0] * max(pixels["std"]), prepared * max(pixels["std"]))


@pytest.fixture(scope="module")
def with_preprocessing(exported, tiny):
    """The same net, exported to take uint8 pixels; its files, the net and the normalization."""
    stem, member, _ = exported
    before = {path: path.read_bytes() for path in stem.parent.glob(f"{stem.name}.*") if path.suffix != ".pt"}
    result = call(tiny.root, "--export", stem.parent, "--export-preprocessing")
    folder = stem.parent / "uint8"
    folder.mkdir()
    for path, data in before.items():
        path.rename(folder / path.name)
        path.write_bytes(data)
    return folder / stem.name, member, result


def bytes_and_logits(member, tiny, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of 0-255 and the logits of what the loader makes of them."""
    options = {"views": "center", "crop_size": member.preprocessing.crop_size}
    with ImageLoader(tiny, "val", images, dtype="uint8", **options) as loader:
        pixels = next(iter(loader)).images
    with ImageLoader(tiny, "val", images, **options | vars(member.preprocessing)) as loader, torch.inference_mode():
        return pixels, member.model.eval()(next(iter(loader)).images)


def test_preprocessing_in_the_graph_takes_bytes(with_preprocessing, tiny):
    runtime = pytest.importorskip("onnxruntime")
    stem, member, result = with_preprocessing
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(stem.with_suffix(".onnx"))
    assert [(node.name, node.type) for node in session.get_inputs()] == [("pixels", "tensor(uint8)")]
    program = torch.export.load(stem.with_suffix(".pt2")).module()
    described = json.loads(stem.with_suffix(".json").read_text())["pixels"]
    assert (described["dtype"], described["scale"]) == ("uint8", 1)
    assert (described["mean"], described["std"]) == ([0, 0, 0], [1, 1, 1]) and "mean_image" not in described
    assert (described["in_graph"]["mean"] is None) == (member.preprocessing.mean == "image")
    for images in (1, 3):
        pixels, logits = bytes_and_logits(member, tiny, images)
        tolerance = {"rtol": 1e-4, "atol": 2e-5 * logits.abs().max().item()}
        torch.testing.assert_close(program(pixels), logits, **tolerance)
        np.testing.assert_allclose(session.run(None, {"pixels": pixels.numpy()})[0], logits, **tolerance)


def test_preprocessing_in_the_graph_is_right_in_half_precision(with_preprocessing, tiny):
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    stem, member, _ = with_preprocessing
    pixels, logits = bytes_and_logits(member, tiny, 2)
    program = torch.export.load(stem.with_suffix(".pt2")).module()
    model = onnx.load(stem.with_suffix(".onnx"))
    to_float16(model)
    by_onnx = reference.ReferenceEvaluator(model).run(None, {"pixels": pixels.numpy()})[0]
    assert by_onnx.dtype == np.float16
    for found in (torch.from_numpy(by_onnx), program.half()(pixels), program.bfloat16()(pixels)):
        assert (found.double() - logits).abs().max() < (0.05 if found.dtype == torch.bfloat16 else 0.01) * logits.abs().max()


@pytest.mark.skipif(ONNX, reason="ONNX is installed")
def test_missing_onnx_is_one_sentence_after_the_rest_is_written(exported):
    stem, _, result = exported
    assert result.exit_code == 1 and result.output.splitlines()[-1] == (
        f"Error: {stem}.onnx: onnx and onnxscript not installed; run: pip install '.[export]'"
    )
    assert stem.with_suffix(".pt2").exists() and not stem.with_suffix(".onnx").exists()
