"""docs/deploy.md: an exported AlexNet in other programs."""

import os
import shutil
import subprocess
from pathlib import Path

from tables import deploy_checks, deploy_net
from tables.common import IMAGEFEED, INPUTS, Page
from tables.deploy_net import CROP, NUMPY, error, loaded

page = Page("deploy", [IMAGEFEED], deploy_net.export)
programs = page.table("programs", ["Program", "largest error of a logit", "batches", "note"], tolerance=0.5)
ONNX = str(INPUTS / "net.onnx")


@programs.add("onnxruntime 1.32.0, CPU", [IMAGEFEED])
def onnxruntime():
    import numpy as np
    import onnxruntime

    cells = error(deploy_checks.session(ONNX))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = error(deploy_checks.session(ONNX, options))[0]
    none = deploy_checks.session(ONNX)(np.zeros((0, 3, CROP, CROP), np.float32)).shape
    return [*cells, f"without optimizations {plain}; 0 images give {none}"]


@programs.add("OpenCV 5.0.0.93, `cv2.dnn.readNetFromONNX`", [NUMPY, "opencv-python-headless==5.0.0.93"])
def opencv():
    import cv2

    net = cv2.dnn.readNetFromONNX(ONNX)

    def run(pixels):
        net.setInput(pixels)
        return net.forward()

    return [*error(run), "batch sizes may change between calls"]


def openvino(saved=False, **options):
    import openvino

    core = openvino.Core()
    model, note = core.read_model(ONNX), ""
    if saved:
        openvino.save_model(model, "saved.xml")
        model = core.read_model("saved.xml")
        note = f", file {os.path.getsize('saved.bin') / os.path.getsize(ONNX):.2f} of the .onnx"
    compiled = core.compile_model(model, "CPU", options)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return [*error(lambda pixels: compiled(pixels)[0]), f"computes in {precision}{note}"]


OPENVINO = [NUMPY, "openvino==2026.4.1"]
programs.add("OpenVINO 2026.4.1, default, on a CPU with AVX512-BF16", OPENVINO)(openvino)
programs.add("OpenVINO 2026.4.1, `INFERENCE_PRECISION_HINT=f32`", OPENVINO)(lambda: openvino(INFERENCE_PRECISION_HINT="f32"))
programs.add("the same, written by `openvino.save_model`", OPENVINO)(lambda: openvino(True, INFERENCE_PRECISION_HINT="f32"))


def ncnn(**options):
    import ncnn
    import numpy as np

    os.link(ONNX, "net.onnx") if os.stat(ONNX).st_dev == os.stat(".").st_dev else Path("net.onnx").symlink_to(ONNX)
    subprocess.run(["pnnx", "net.onnx", f"inputshape=[1,3,{CROP},{CROP}]"], check=True)
    net = ncnn.Net()
    for name, value in options.items():
        setattr(net.opt, name, value)
    net.load_param("net.ncnn.param")
    net.load_model("net.ncnn.bin")

    def one(image):
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return np.array(extractor.extract("out0")[1])

    share = os.path.getsize("net.ncnn.bin") / os.path.getsize(ONNX)
    normalizing = sum(line.startswith("LRN") for line in Path("net.ncnn.param").read_text().splitlines())
    cells = error(lambda pixels: np.stack([one(image) for image in pixels]), (1,))
    return [*cells, f"one image a call; file {share:.2f} of the .onnx; {normalizing} LRN layers"]


PNNX = [IMAGEFEED, "--no-deps pnnx==20261020", "--no-deps ncnn==1.0.20261020"]
programs.add("pnnx 20261020, ncnn 1.0.20261020", PNNX)(ncnn)
programs.add("the same, `opt.use_bf16_storage`", PNNX)(lambda: ncnn(use_bf16_storage=True))


@programs.add("TVM 0.27.0.post1, `relax.frontend.onnx`", [IMAGEFEED, "apache-tvm==0.27.0.post1"])
def tvm():
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(onnx.load(ONNX), keep_params_in_input=False)
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    return [*error(lambda pixels: machine["main"](tvm.runtime.tensor(pixels)).numpy()), ""]


@programs.add("tract 0.23.9", [NUMPY, "tract==0.23.9"])
def tract():
    import tract

    runnable = tract.onnx().load(ONNX).into_model().into_runnable()
    cells = error(lambda pixels: runnable.run([pixels])[0].to_numpy())
    model = tract.onnx().load(ONNX)
    try:
        model.set_input_fact(0, f"1,3,{CROP},{CROP},f32")
        model.into_model()
        said = "`set_input_fact` takes a fixed batch"
    except tract.TractError as failure:
        reason = next(line for line in str(failure).splitlines() if "unify" in line.lower())
        said = f"`set_input_fact` with a batch of 1: {reason.partition(': ')[2]}"
    return [*cells, said]


@programs.add("IREE 3.13.0, llvm-cpu", [NUMPY, "iree-base-compiler[onnx]==3.13.0", "iree-base-runtime==3.13.0"])
def iree():
    import iree.runtime
    import numpy as np

    subprocess.run(["iree-import-onnx", ONNX, "-o", "net.mlir"], check=True)
    target = "--iree-hal-target-device=local --iree-hal-local-target-device-backends=llvm-cpu --iree-llvmcpu-target-cpu=host"
    subprocess.run(["iree-compile", *target.split(), "net.mlir", "-o", "net.vmfb"], check=True)
    module = iree.runtime.load_vm_flatbuffer_file("net.vmfb", driver="local-task")
    return [*error(lambda pixels: np.asarray(module.main_graph(pixels))), "the function is named `main_graph`"]


def onnx2tf(kind):
    import tensorflow

    folder = INPUTS / "tf"
    if not folder.exists():  # the conversion takes minutes
        subprocess.run(["onnx2tf", "-i", ONNX, "-o", "tf", "-n"], check=True)
        shutil.copytree("tf", folder)
    if kind == "saved_model":
        run = tensorflow.saved_model.load(str(folder)).signatures["serving_default"]
        (name,) = run.structured_input_signature[1]
        return [*error(lambda pixels: next(iter(run(**{name: pixels.transpose(0, 2, 3, 1)}).values())).numpy()), "NHWC input"]
    interpreter = tensorflow.lite.Interpreter(str(folder / f"net_{kind}.tflite"))
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def one(pixels):
        interpreter.resize_tensor_input(given["index"], pixels.transpose(0, 2, 3, 1).shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], pixels.transpose(0, 2, 3, 1))
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return [*error(one), f"NHWC input of {given['dtype'].__name__}; `resize_tensor_input` for each batch size"]


TENSORFLOW = ["onnx2tf==1.29.24", "tensorflow-cpu==2.19.1", "tf-keras==2.19.0"]
for kind in ("saved_model", "float32", "float16"):
    label = "onnx2tf 1.29.24, TensorFlow 2.19.1" if kind == "saved_model" else f"the same, .tflite of {kind}"
    programs.add(label, TENSORFLOW)(lambda kind=kind: onnx2tf(kind))


@programs.add("ExecuTorch 1.5.1, XNNPACK, from the .pt2", deploy_checks.EXECUTORCH)
def executorch():
    import torch

    method = deploy_checks.lowered()
    cells = error(lambda pixels: method.execute([torch.from_numpy(pixels)])[0].numpy())
    return [*cells, "see the next table"]


@programs.add("AOTInductor of torch 2.13.0, from the .pt2", [IMAGEFEED])
def inductor():
    import torch

    compiled = deploy_checks.compiled()
    return [*error(lambda pixels: compiled(torch.from_numpy(pixels)).numpy()), "see the next table"]


@programs.add("coremltools 9.0, from the .pt2; converted, not run", [IMAGEFEED, "coremltools==9.0"])
def coreml():
    import coremltools

    program = loaded()
    try:
        coremltools.convert(program)
        first = "converts as it is"
    except NotImplementedError:
        first = "needs `program.run_decompositions({})`"
    specification = coremltools.convert(program.run_decompositions({})).get_spec()
    (output,) = specification.description.output
    (shape,) = [specification.description.input[0].type.multiArrayType.shapeRange.sizeRanges[0]]
    (block,) = specification.mlProgram.functions["main"].block_specializations.values()
    kinds = {op.outputs[0].type.tensorType.dataType for op in block.operations if op.type == "conv"}
    types = " and ".join(sorted({10: "float16", 11: "float32"}[kind] for kind in kinds))
    batches = "any" if shape.upperBound in (-1, 2**31 - 1) else f"{shape.lowerBound} to {shape.upperBound}"
    return ["-", batches, f"{first}; convolutions in {types} by default; output named `{output.name}`"]


page.tables += [deploy_checks.layouts, deploy_checks.float16, deploy_checks.grouped, deploy_checks.others]
