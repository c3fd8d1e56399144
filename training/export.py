"""Writes a trained net for programs that know nothing of this one: as a torch.export program and as ONNX."""

import copy
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
from imagefeed.training.checkpoints import usable
from imagefeed.training.evaluation import Member
from imagefeed.training.measuring import open_member, read_checkpoint

DESCRIPTION = "imagefeed.json"  # its name within a .pt2, its key in an ONNX model's metadata
PACKAGES = ("onnx", "onnxscript")  # what torch.onnx needs
BATCH = ({0: Dim("batch")},)  # dimension 0 of the only input may be any
ONNX_BYTES = 2**31 - 2**20  # what one message of protobuf takes, less room for the rest


def export_checkpoint(manifest: Manifest, path: Path) -> list[Path]:
    """Writes a checkpoint, or the newest of a run folder, beside it; prints and returns the files' paths.

    CHECKPOINT.pt2 is for torch.export.load, CHECKPOINT.onnx for any ONNX runtime; both take float32 pixels (N, 3, crop_size, crop_size)
    less their mean, of any N, and give float32 logits (N, classes) as in evaluation, without autocast. CHECKPOINT.json, which
    is within them too, says what pixels those are (`describe_net`); CHECKPOINT-mean.npy is the mean image where that is
    subtracted.

    Raises UserError where there is no checkpoint or it is of other classes, and, when the rest is written, where what ONNX
    needs is not installed.
    """
    state = read_checkpoint(path, manifest)
    with usable(path):
        member = open_member(manifest, path, state, torch.device("cpu"))
        if state["made_with"]["dataset"] != manifest.fingerprint[:16]:
            raise UserError(
                f"{path}: it was trained on another dataset than {manifest.root}, whose mean is not its own; give the one it was "
                "trained on"
            )
        stem = path / f"checkpoint-{state['progress']['step']:08d}" if path.is_dir() else path
        stem = stem.with_suffix("") if stem.suffix == ".pt" else stem
        described = describe_net(manifest, member, state["made_with"]["--model"], stem.name)
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    written = [stem.with_name(stem.name + end) for end in (".json", ".pt2")]
    program = io.BytesIO()
    traced = trace(member)
    torch.export.save(traced, program, extra_files={DESCRIPTION: text})  # a full disk would end it in the midst, by a signal
    if "mean_image" in described["pixels"]:
        mean = io.BytesIO()
        np.save(mean, manifest.load_statistics()["mean_image"].astype(np.float32))
        written.append(stem.with_name(described["pixels"]["mean_image"]))
        write_atomically(written[-1], mean.getvalue())
    write_atomically(written[1], program.getvalue())
    write_atomically(written[0], text.encode())
    print(f"written: {', '.join(map(str, written))}")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{stem}.onnx: {' and '.join(missing)} not installed; run: pip install 'imagefeed[export]'")
    written.append(stem.with_name(stem.name + ".onnx"))
    write_onnx(written[-1], traced, text)
    print(f"written: {written[-1]}")
    return written


def describe_net(manifest: Manifest, member: Member, name: str, stem: str) -> dict:
    """What a program has to know that shows pixels to the net, and reads its logits."""
    crop_size, mean, std = member.looks
    statistics = manifest.load_statistics()
    pixels = {
        "range": "0-255, less the mean" + (", divided by the deviation" if std == "dataset" else ""),
        "order": "RGB",
        "shape": ["batch", 3, crop_size, crop_size],
        "dtype": "float32",
        "image": f"shorter side rescaled to {manifest.options['size']}, center {crop_size} x {crop_size} cut out",
    }
    if mean == "image":
        pixels["mean_image"] = f"{stem}-mean.npy"  # (H, W, 3) of the rescaled image; the part under the crop is subtracted
    else:
        pixels["mean"] = statistics["channel_mean"].tolist()
    if std == "dataset":
        pixels["std"] = statistics["channel_std"].tolist()
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


def trace(member: Member) -> torch.export.ExportedProgram:
    """The net's operations in evaluation, in float32, for any number of images."""
    crop_size = member.looks[0]
    model = member.model.eval().float().to(memory_format=torch.contiguous_format)
    images = torch.zeros(2, 3, crop_size, crop_size)  # of one image torch would take the number for a constant
    return torch.export.export(Numbered(model), (images,), dynamic_shapes=BATCH)


class Numbered(torch.nn.Module):
    """Names the input, which each net calls otherwise, and gives logits as float32."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).float()


def without_divisors(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same for torch.onnx: its average pools (onnxscript 0.7) take no notice of a divisor of their own, as alexnet-code's
    has, and average; so the average is multiplied afterwards."""
    program = copy.deepcopy(program)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.avg_pool2d.default and node.args[6:] and node.args[6] is not None:
            kernel, divisor = node.args[1], node.args[6]
            node.args = (*node.args[:5], True)  # zeros around the edge count as in a sum
            with graph.inserting_after(node):
                scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, kernel[0] * kernel[-1] / divisor))
            scaled.meta = dict(node.meta)
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
    program.graph_module.recompile()
    return program


def write_onnx(path: Path, program: torch.export.ExportedProgram, description: str) -> None:
    """An ONNX model with the weights in it; raises UserError where they are more than its format holds."""
    if sum(tensor.nbytes for tensor in program.state_dict.values()) >= ONNX_BYTES:
        raise UserError(f"{path}: an ONNX file holds 2 GB, and this net is larger; use the .pt2 beside it")
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        # What they say is of deprecations within torch and onnxscript, and that torchvision's operators are not there.
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx = torch.onnx.export(
                without_divisors(program), dynamic_shapes=BATCH, input_names=["pixels"], output_names=["logits"], verbose=False
            )
    finally:
        log.setLevel(level)
    onnx.model.metadata_props[DESCRIPTION] = description
    with atomic_file(path) as file:
        onnx.save(file)
