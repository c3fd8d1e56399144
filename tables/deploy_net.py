"""The net that docs/deploy.md exports, and how its rows compare logits."""

import subprocess
import sys

from tables.common import INPUTS, ROOT

CROP = 128
STRONGEST = 900  # of conv1's outputs; a trained AlexNet's reach this
LARGEST = 7  # of the logits
IMAGES = 10
NUMPY = "numpy==2.4.6"


def export():
    """Writes net.pt2, net.onnx and ref.npz: pixels (10, 3, 128, 128) of drawn photos, and logits by imagefeed's own net.

    The net is `imagefeed train`'s AlexNet after one step, with conv1 and fc8 scaled to a trained net's activations.
    """
    import numpy as np
    import torch

    import imagefeed
    from imagefeed.dataset.manifest import Manifest
    from imagefeed.training.checkpoints import read_checkpoint
    from imagefeed.training.measuring import open_member

    torch.manual_seed(0)
    run = INPUTS / "run"
    command("sample", "raw", "--images", 60)
    command("build", "raw", "packed", "--size", 144)
    options = {
        "crop-size": CROP,
        "batch-size": 8,
        "epochs": 1,
        "limit-batches": 1,
        "bias": 0.1,
        "schedule": "linear",
        "run-dir": run,
    }
    command("train", "packed", "--device", "cpu", *(word for name, value in options.items() for word in (f"--{name}", value)))
    with imagefeed.ImageLoader("packed", "val", views="center", crop_size=CROP, batch_size=IMAGES) as loader:
        pixels = next(iter(loader)).images
    (path,) = run.glob("checkpoint-*.pt")
    state = read_checkpoint(path)
    with torch.inference_mode():
        net = open_member(Manifest.load("packed"), path, state, torch.device("cpu")).model.eval().float()
        for name, wanted in {"conv1": STRONGEST, "fc8": LARGEST}.items():
            layer, seen = getattr(net, name), []
            hook = layer.register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments[2].abs().max()))
            net(pixels)
            hook.remove()
            layer.weight *= wanted / seen[0]
        np.savez(INPUTS / "ref.npz", pixels=pixels.numpy(), logits=net(pixels).numpy())
    state["model"] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.save(state, path)
    command("train", "packed", "--export", run)
    for suffix in ("pt2", "onnx"):
        next(run.glob(f"*.{suffix}")).rename(INPUTS / f"net.{suffix}")


def command(*words):
    code = f"import sys; sys.path.append({str(ROOT)!r}); from imagefeed.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)


def loaded():
    import torch

    return torch.export.load(str(INPUTS / "net.pt2"))


def reference():
    import numpy as np

    with np.load(INPUTS / "ref.npz") as file:
        return file["pixels"], file["logits"]


def error(run, batches=(1, 3, 10)):
    """The largest error of a logit by `run`, which takes pixels (N, 3, 128, 128), and the batch sizes that it takes in turn."""
    import numpy as np

    pixels, logits = reference()
    errors, said = [], []
    for batch in batches:
        try:
            found = np.asarray(run(np.ascontiguousarray(pixels[:batch])), np.float64)
        except Exception as failure:  # the cell says which sizes work
            said.append(f"{batch}: **{type(failure).__name__}**")
            continue
        if found.shape != logits[:batch].shape:
            said.append(f"{batch}: **shape {found.shape}**")
            continue
        errors.append(abs(found - logits[:batch]).max())
        said.append(str(batch))
    return [short(np.max(errors)), ", ".join(said)]


def short(value):
    """Two digits; what differs between processors below 1e-4 is not shown."""
    if not value < 1:  # wrong, and with uninitialized memory another value each time
        return "**more than 1**"
    return "< 1e-4" if value < 1e-4 else f"{value:.0e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2f}"
