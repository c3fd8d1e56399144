"""The tables of docs/deploy.md about what to check: memory layout, float16, bfloat16 storage, defaults that change pixels."""

import os
import struct
from pathlib import Path

from tables.common import IMAGEFEED, INPUTS, Table
from tables.deploy_net import CROP, NUMPY, STRONGEST, error, loaded, reference, short

EXECUTORCH = [IMAGEFEED, "executorch==1.5.1"]
layouts = Table(
    "layouts", ["Program, given", "channels-last pixels", "float64 pixels", f"{CROP + 16} x {CROP + 16} pixels"], tolerance=0.5
)
float16 = Table(
    "float16", ["Converted to float16", "onnxruntime 1.32.0, CPU", "`ReferenceEvaluator` of onnx 1.23.2"], tolerance=0.5
)
grouped = Table("grouped", ["Convolution in ncnn 1.0.20261020", "float32", "`use_bf16_storage`"])
others = Table("others", ["What was done", "what came"], tolerance=0.5)


def session(path, options=None):
    """A function of pixels, by onnxruntime."""
    import onnxruntime

    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = [node.name for node in running.get_inputs()]
    return lambda pixels: running.run(None, {name: pixels})[0]


def lowered():
    """The method of the .pt2 in ExecuTorch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(loaded(), partitioner=[XnnpackPartitioner()]).to_executorch()
    Path("net.pte").write_bytes(program.buffer)
    return Runtime.get().load_program("net.pte").load_method("forward")


def compiled():
    """The .pt2 as AOTInductor compiles it."""
    import torch

    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(loaded(), package_path=f"{os.getcwd()}/net-aoti.pt2")
    )


def given(run):
    """The cells of a function of a tensor, for each of the head's pixels."""
    import torch

    pixels, logits = map(torch.from_numpy, reference())
    larger = torch.nn.functional.pad(pixels, (8, 8, 8, 8))
    cells = []
    for changed in (pixels.contiguous(memory_format=torch.channels_last), pixels.double(), larger):
        try:
            found = run(changed)
        except Exception as failure:  # the cell says that it is refused
            cells.append(f"refused ({type(failure).__name__})")
            continue
        off = (found.double() - logits).abs().max().item() if found.shape == logits.shape else 0
        cells.append("right" if off < 1e-3 else f"**logits off by {off:.1f}, no error**")
    return cells


@layouts.add("`torch.export.load(FILE).module()`, torch 2.13.0", [IMAGEFEED])
def exported():
    return given(loaded().module())


@layouts.add("AOTInductor of torch 2.13.0", [IMAGEFEED])
def inductor():
    return given(compiled())


@layouts.add("the same, `AOTI_RUNTIME_CHECK_INPUTS=1` when it compiles and runs", [IMAGEFEED])
def checked():
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    return given(compiled())


@layouts.add("ExecuTorch 1.5.1, XNNPACK", EXECUTORCH)
def executorch():
    method = lowered()
    return given(lambda pixels: method.execute([pixels])[0])


@layouts.add("onnxruntime 1.32.0", [IMAGEFEED])
def onnxruntime():
    import torch

    run = session(INPUTS / "net.onnx")
    return given(lambda pixels: torch.from_numpy(run(pixels.numpy())))


def halved(model, pixels, cell):
    """The cells of a model of float32 converted to float16, in onnxruntime and in the reference."""
    import onnx
    import onnx.reference
    from onnxconverter_common.float16 import convert_float_to_float16

    converted = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(converted, "half.onnx")
    (name,) = [node.name for node in converted.graph.input]
    exact = onnx.reference.ReferenceEvaluator(converted)
    return [cell(session("half.onnx")(pixels)), cell(exact.run(None, {name: pixels})[0])]


CONVERTER = [IMAGEFEED, "--no-deps onnxconverter-common==1.16.0"]


@float16.add("imagefeed's exported net: largest error of a logit", CONVERTER)
def whole_net():
    import onnx

    pixels, logits = reference()
    return halved(onnx.load(INPUTS / "net.onnx"), pixels[:1], lambda found: short(abs(found - logits[:1]).max()))


def normalized(make):
    """The cells of a normalization, of an activation of 900 whose neighbors are 0; right is 32.7."""
    import numpy as np
    import onnx
    import torch

    activations = np.zeros((1, 8, 1, 1), np.float32)
    activations[0, 4] = STRONGEST
    torch.onnx.export(torch.export.export(make(), (torch.from_numpy(activations),)), verbose=False).save("norm.onnx")
    return halved(onnx.load("norm.onnx"), activations, lambda found: f"{found[0, 4, 0, 0]:.1f}")


@float16.add(f"`torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)` of {STRONGEST}; right is 32.7", CONVERTER)
def torch_norm():
    import torch

    return normalized(lambda: torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2))


@float16.add(f"imagefeed's normalization of {STRONGEST}", CONVERTER)
def own_norm():
    import torch

    from imagefeed.model.lrn import formula

    class Norm(torch.nn.Module):
        def forward(self, activations):
            return formula(activations)

    return normalized(Norm)


def convolution(channels, outputs, groups, side):
    """Whether one convolution of ncnn, side x side with ReLU, agrees with PyTorch's; its net is written here."""
    import ncnn
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((outputs, channels // groups, side, side)).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    image = rng.standard_normal((channels, 13, 13)).astype(np.float32)
    kind = "Convolution" if groups == 1 else "ConvolutionDepthWise"
    layer = f"{kind} conv 1 1 in0 out0 0={outputs} 1={side} 4={side // 2} 5=1 6={weight.size} 7={groups} 9=1"
    Path("conv.param").write_text(f"7767517\n2 2\nInput in0 0 1 in0\n{layer if groups > 1 else layer.replace(' 7=1', '')}\n")
    Path("conv.bin").write_bytes(struct.pack("<I", 0) + weight.tobytes() + bias.tobytes())
    given = [torch.tensor(array).double() for array in (image[None], weight, bias)]
    right = torch.nn.functional.conv2d(*given, padding=side // 2, groups=groups)[0].relu()
    cells = []
    for bfloat16 in (False, True):
        net = ncnn.Net()
        net.opt.use_bf16_storage = bfloat16
        net.load_param("conv.param")
        net.load_model("conv.bin")
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        off = (torch.tensor(np.array(extractor.extract("out0")[1])).double() - right).abs().max() / right.abs().max()
        cells.append("right" if off < 0.01 else "**wrong**")
    return cells


NCNN = [IMAGEFEED, "--no-deps ncnn==1.0.20261020"]
for sizes in ((96, 256, 1, 5), (96, 256, 2, 5), (384, 384, 2, 3), (384, 256, 2, 3), (16, 16, 4, 3), (64, 64, 64, 3)):
    label = "{} to {} channels, groups={}, {} x {}".format(*sizes, sizes[-1])
    grouped.add(label, NCNN)(lambda sizes=sizes: convolution(*sizes))


@others.add("onnxruntime 1.32.0, `quantize_dynamic`", [IMAGEFEED])
def quantized():
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    source = INPUTS / "net.onnx"
    quantize_dynamic(source, "int8.onnx")
    run, (pixels, _) = session("int8.onnx"), reference()
    kinds = [node.op_type for node in onnx.load("int8.onnx").graph.node]
    alone = abs(run(pixels[:1]) - run(pixels)[:1]).max()
    return [
        f"{kinds.count('ConvInteger')} convolutions and {kinds.count('MatMulInteger')} full layers in integers, file "
        f"{os.path.getsize('int8.onnx') / os.path.getsize(source):.2f}, logits off by {error(run)[0]}; an image's change by "
        f"{short(alone)} with the other images of its batch"
    ]


@others.add("OpenVINO 2026.4.1, `save_model` of a weight of 1,000,000 among 4,096 of 1", [NUMPY, "openvino==2026.4.1"])
def clipped():
    import numpy as np
    import openvino
    from openvino import opset13

    weight = np.ones((64, 64), np.float32)
    weight[0, 0] = 1e6
    given = opset13.parameter([1, 64], np.float32)
    openvino.save_model(openvino.Model([opset13.matmul(given, opset13.constant(weight), False, False)], [given]), "m.xml")
    compiled = openvino.Core().compile_model("m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [f"stored as {compiled(np.eye(1, 64, dtype=np.float32))[0][0, 0]:,.0f}, no error"]


@others.add(
    "OpenCV 5.0.0.93, `dnn.blobFromImage(image, 1, (224, 224), crop=True)` of 600 x 450 pixels",
    [NUMPY, "opencv-python-headless==5.0.0.93"],
)
def blob():
    import cv2
    import numpy as np

    image = np.random.default_rng(0).integers(0, 256, (450, 600, 3), np.uint8)
    found = cv2.dnn.blobFromImage(image, 1, (224, 224), crop=True)[0].transpose(1, 2, 0)
    differences = []
    for how in (cv2.INTER_LINEAR, cv2.INTER_AREA):
        resized = cv2.resize(image, None, fx=224 / 450, fy=224 / 450, interpolation=how)
        left = (resized.shape[1] - 224) // 2
        differences.append(abs(resized[:, left : left + 224].astype(float) - found).max())
    linear, area = differences
    return [f"shorter side to 224, not 256; up to {linear:.0f} gray level from INTER_LINEAR and {area:.0f} from INTER_AREA"]
