"""Writes a trained net for programs without imagefeed: as a torch.export program and as ONNX."""

import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file, write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.options import IMAGENET_MEAN, IMAGENET_STD
from imagefeed.training.checkpoints import read_checkpoint, readable
from imagefeed.training.evaluation import Member
from imagefeed.training.measuring import open_member

DESCRIPTION = "imagefeed.json"  # its name within a .pt2, its key in an ONNX model's metadata
PACKAGES = ("onnx", "onnxscript")  # torch.onnx needs them
BATCH = ({0: Dim("batch")},)  # dimension 0 of the only input may have any size
ONNX_BYTES = 2**31 - 2**20  # the most that one protobuf message holds, minus room for the rest


def export_checkpoint(manifest: Manifest, path: Path) -> list[Path]:
    """Writes a checkpoint, or the newest of a run folder, beside it; prints and returns the paths of the files.

    CHECKPOINT.pt2 is for torch.export.load, CHECKPOINT.onnx for any ONNX runtime. Both take contiguous float32 pixels (N, 3,
    crop_size, crop_size) for any N, and give float32 logits (N, classes) as in evaluation, without autocast. The .pt2 can be cast
    to another floating type. CHECKPOINT.json, which is also inside both, describes the pixels (`describe_net`);
    CHECKPOINT-mean.npy is the mean image if that is subtracted.

    Raises UserError if there is no checkpoint or it has other classes, and, after writing the rest, if ONNX is not installed.
    """
    state = read_checkpoint(path)
    with readable(path):
        member = open_member(manifest, path, state, torch.device("cpu"))
        if state["made_with"]["dataset"] != manifest.fingerprint[:16]:
            raise UserError(
                f"{path}: trained on another dataset, or {manifest.root} has changed, and its mean differs; give the one that it "
                "was trained on"
            )
        stem = path / f"checkpoint-{state['progress']['step']:08d}" if path.is_dir() else path
        stem = stem.with_suffix("") if stem.suffix == ".pt" else stem
        described = describe_net(manifest, member, state["made_with"]["--model"], stem.name)
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    program = trace(member)
    buffer = io.BytesIO()  # written to a full disk, torch.export.save would end the process by a signal
    torch.export.save(program, buffer, extra_files={DESCRIPTION: text})
    files = {stem.with_name(stem.name + ".json"): text.encode(), stem.with_name(stem.name + ".pt2"): buffer.getvalue()}
    if "mean_image" in described["pixels"]:
        mean = io.BytesIO()
        np.save(mean, manifest.load_statistics()["mean_image"].astype(np.float32))
        files[stem.with_name(described["pixels"]["mean_image"])] = mean.getvalue()
    for file, data in reversed(files.items()):
        write_atomically(file, data)
    print(f"written: {', '.join(map(str, files))}")
    onnx = stem.with_name(stem.name + ".onnx")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{onnx}: {' and '.join(missing)} not installed; run: pip install '.[export]'")
    write_onnx(onnx, program, text)
    print(f"written: {onnx}")
    return [*files, onnx]


def describe_net(manifest: Manifest, member: Member, name: str, stem: str) -> dict[str, object]:
    """What a program must know to prepare pixels for the net and to read its logits."""
    crop_size, mean, std = vars(member.preprocessing).values()
    statistics = manifest.load_statistics()
    divided = "" if std == "none" else ", divided by the standard deviation"
    pixels = {
        "range": f"0-255, minus the mean{divided}",
        "order": "RGB",
        "shape": ["batch", 3, crop_size, crop_size],
        "layout": "contiguous, NCHW",  # AOTInductor and ExecuTorch read channels-last memory as if it were contiguous
        "dtype": "float32",
        "image": f"shorter side rescaled to {manifest.options['size']}, center {crop_size} x {crop_size} cut out",
    }
    if mean == "image":
        pixels["mean_image"] = f"{stem}-mean.npy"  # (H, W, 3) of the rescaled image; the part under the crop is subtracted
    else:
        pixels["mean"] = {"channel": statistics["channel_mean"].tolist(), "imagenet": IMAGENET_MEAN}.get(mean, mean)
    if divided:
        pixels["std"] = {"dataset": statistics["channel_std"].tolist(), "imagenet": IMAGENET_STD}.get(std, std)
    return {
        "net": name,
        "checkpoint": stem,
        "torch": str(torch.__version__),
        "input": "pixels",
        "output": "logits",
        "pixels": pixels,
        "classes": list(manifest.classes),
        "titles": list(manifest.titles),
    }


class Named(torch.nn.Module):
    """Names the input alike for all nets."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)


def trace(member: Member) -> torch.export.ExportedProgram:
    """Records the net's operations in evaluation, in float32, for any number of images."""
    model = member.model.eval().float().to(memory_format=torch.contiguous_format)
    side = member.preprocessing.crop_size
    images = torch.zeros(2, 3, side, side)  # with a single image torch would take the number for a constant
    program = torch.export.export(Named(model), (images,), dynamic_shapes=BATCH)
    drop_casts(program)
    return program


def drop_casts(program: torch.export.ExportedProgram) -> None:
    """Removes casts from float32 to float32, and checks of types: with those, which nets such as timm's eva02 and xcit have, the
    program would refuse .half(), .bfloat16(), .double() and autocast."""
    aten, graph = torch.ops.aten, program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]:
            if all(user.op != "output" for user in node.users):  # the program's signature names its outputs
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
    program.graph_module.recompile()


def write_onnx(path: Path, program: torch.export.ExportedProgram, description: str) -> None:
    """Writes an ONNX model with its weights; raises UserError if they exceed what its format holds."""
    if sum(tensor.nbytes for tensor in program.state_dict.values()) >= ONNX_BYTES:
        raise UserError(f"{path}: an ONNX file holds at most 2 GB, and this net is larger; use the .pt2 beside it")
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        # They warn of deprecations within torch and onnxscript, and that torchvision's operators are missing.
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {"input_names": ["pixels"], "output_names": ["logits"]}
            onnx = torch.onnx.export(program, dynamic_shapes=BATCH, verbose=False, **names)
    finally:
        log.setLevel(level)
    onnx.model.metadata_props[DESCRIPTION] = description
    with atomic_file(path) as file:
        onnx.save(file)
