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
from imagefeed.pipeline.arguments import normalization
from imagefeed.pipeline.plan import MIDDLE, offset
from imagefeed.training.checkpoints import read_checkpoint, readable
from imagefeed.training.evaluation import Member
from imagefeed.training.measuring import open_member

DESCRIPTION = "imagefeed.json"  # its name within a .pt2, its key in an ONNX model's metadata
PACKAGES = ("onnx", "onnxscript")  # torch.onnx needs them
BATCH = ({0: Dim("batch")},)  # dimension 0 of the only input may have any size
ONNX_BYTES = 2**31 - 2**20  # the most that one protobuf message holds, minus room for the rest


def export_checkpoint(manifest: Manifest, path: Path, preprocessing: bool = False) -> list[Path]:
    """Writes a checkpoint, or the newest of a run folder, beside it; prints and returns the paths of the files.

    CHECKPOINT.pt2 is for torch.export.load, CHECKPOINT.onnx for any ONNX runtime. Both take contiguous float32 pixels (N, 3,
    crop_size, crop_size) for any N, and give float32 logits (N, classes) as in evaluation, without autocast. The .pt2 can be cast
    to another floating type. CHECKPOINT.json, which is also inside both, describes the pixels (`describe_net`);
    CHECKPOINT-mean.npy is the mean image if that is subtracted. With `preprocessing`, the net subtracts the mean and divides by
    the standard deviation itself, and takes uint8 pixels of 0-255.

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
        described = describe_net(manifest, member, state["made_with"]["--model"], stem.name, preprocessing)
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    program = trace(normalized(manifest, member) if preprocessing else Named(member.model), member.preprocessing.crop_size)
    buffer = io.BytesIO()  # written to a full disk, torch.export.save would end the process by a signal
    torch.export.save(program, buffer, extra_files={DESCRIPTION: text})
    files = {stem.with_name(stem.name + ".json"): text.encode(), stem.with_name(stem.name + ".pt2"): buffer.getvalue()}
    if "mean_image" in described["pixels"]:  # which is otherwise in the net
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


def describe_net(manifest: Manifest, member: Member, name: str, stem: str, normalizes: bool) -> dict[str, object]:
    """What a program must know to prepare pixels for the net and to read its logits: `docs/recipes.md` describes the fields."""
    crop_size, mean, std = vars(member.preprocessing).values()
    subtracted, factors = normalization(manifest.load_statistics(), mean, std)
    applied = {"mean": None if mean == "image" else numbers(subtracted), "std": numbers(1 / factors)}
    nothing = {"mean": [0.0] * 3, "std": [1.0] * 3}
    pixels = {
        "resize": {"shortest_edge": manifest.options["size"], "interpolation": "bicubic", "antialias": True},
        "crop": {"height": crop_size, "width": crop_size, "mode": "center"},
        "color_order": "RGB",
        "scale": 1,
        **(nothing if normalizes else applied),
        **({"mean_image": f"{stem}-mean.npy"} if mean == "image" and not normalizes else {}),
        "layout": "NCHW",
        "memory_format": "contiguous",  # AOTInductor and ExecuTorch read channels-last memory as if it were contiguous
        "shape": ["batch", 3, crop_size, crop_size],
        "dtype": "uint8" if normalizes else "float32",
        **({"in_graph": applied} if normalizes else {}),  # no mean there stands for the mean image
    }
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


def numbers(values: np.ndarray) -> list[float]:
    """To the precision of float32."""
    return [float(f"{value:.9g}") for value in values]


class Named(torch.nn.Module):
    """Names the input alike for all nets."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels)


class Normalized(Named):
    """Takes uint8 pixels as they come from a decoder. Float pixels of 0-1 would look alike to a runtime, and be wrong."""

    def __init__(self, model: torch.nn.Module, mean: np.ndarray, factors: np.ndarray):
        super().__init__(model)
        # Buffers, so that uint8 becomes the type that the program is cast to.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).contiguous())
        self.register_buffer("factors", torch.tensor(factors, dtype=torch.float32)[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels - self.mean) * self.factors)


def normalized(manifest: Manifest, member: Member) -> Normalized:
    """The net behind the normalization that the loader did in training."""
    crop_size, mean, std = vars(member.preprocessing).values()
    statistics = manifest.load_statistics()
    subtracted, factors = normalization(statistics, mean, std)
    subtracted = subtracted[:, None, None]
    if mean == "image":
        start = offset(MIDDLE, statistics["mean_image"].shape[0] - crop_size)
        center = statistics["mean_image"][start : start + crop_size, start : start + crop_size]
        subtracted = center.transpose(2, 0, 1)
    return Normalized(member.model, subtracted, factors)


def trace(net: Named, crop_size: int) -> torch.export.ExportedProgram:
    """Records the net's operations in evaluation, in float32, for any number of images."""
    net = net.eval().float().to(memory_format=torch.contiguous_format)
    images = torch.zeros(2, 3, crop_size, crop_size)  # with a single image torch would take the number for a constant
    if isinstance(net, Normalized):
        images = images.to(torch.uint8)
    program = torch.export.export(net, (images,), dynamic_shapes=BATCH)
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
