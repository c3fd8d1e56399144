#!/usr/bin/env bash
# onnx 1.23.2, numpy 2.4.6: ONNX's own reference for LRN (local response normalization) is wrong unless the batch is as
# large as the number of channels.
# Behavior: onnx.reference.ReferenceEvaluator loops over the batch where it should loop over channels. A batch of N
# images has only its first N channels normalized, the others pass unchanged; so an image's result depends on how many
# images are beside it. With more images than channels it is an IndexError.
# One would have guessed: the reference follows the operator's definition, by which images do not touch each other.
# Why it matters: whoever checks an export of AlexNet or GoogLeNet against the reference, one image at a time, sees a
# difference in a right export, and may "mend" it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile onnx==1.23.2 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

CHANNELS = 4


def normalize(images):
    shape = ["batch", CHANNELS, 1, 1]
    node = helper.make_node("LRN", ["x"], ["y"], size=3, alpha=3.0, beta=1.0, bias=1.0)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "lrn", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])
    checker.check_model(model)
    ones = np.ones((images, CHANNELS, 1, 1), np.float32)
    try:
        return ReferenceEvaluator(model).run(None, {"x": ones})[0][0, :, 0, 0].astype(float).round(4).tolist()
    except IndexError as error:
        return f"IndexError: {error}"


right = [0.3333, 0.25, 0.25, 0.3333]  # 1 / (1 + the sum of the squares of a channel and its neighbors)
seen = {images: normalize(images) for images in (1, 2, 4, 6)}
print(f"all values 1, {CHANNELS} channels, by the definition: {right}")
for images, values in seen.items():
    print(f"the first of {images} images: {values}")
if seen[4] != right or seen[1] != [right[0], 1, 1, 1] or seen[2] != [*right[:2], 1, 1] or isinstance(seen[6], list):
    raise SystemExit("changed: the reference no longer normalizes one channel for each image")
PY
