"""Weights of other programs' files."""

import argparse
import json
import re
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from imagefeed.dataset.errors import UserError
from imagefeed.model.nets import class_layers, last_layers
from imagefeed.training.weights import SAFETENSORS, load_first_weights
from tests.training.runs import same


class Net(nn.Module):
    """A backbone with batch normalization, and two layers of classes, neither of which is the last layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, classes)
        self.heads = nn.ModuleDict({"distilled": nn.Linear(4, classes)})
        self.last = nn.Linear(4, 4)


HEADS = ["head", "heads.distilled"]
IN_HEADS = ("head.weight", "head.bias", "heads.distilled.weight", "heads.distilled.bias")


def net(classes: int, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


class Settings(dict):
    """A subclass of dict, as programs keep their options in."""


def save_safetensors(state: dict[str, torch.Tensor], path) -> None:
    """By the format's description: the header's length, the header, the bytes."""
    names, header, data = {dtype: name for name, dtype in SAFETENSORS.items()}, {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def prefixed(before: str, state: dict, inside: str = "") -> dict:
    """Names with `before` in front, and with `inside` behind "features."."""
    return OrderedDict((before + name.replace("features.", f"features.{inside}"), value) for name, value in state.items())


OTHER = {"criterion.weight": torch.ones(3)}
FILES = {
    "a bare state dict": (lambda state: state, ""),
    "a net in a DataParallel": (lambda state: prefixed("module.", state), ""),
    "a compiled net in a DataParallel": (lambda state: prefixed("module._orig_mod.", state), ""),
    "a compiled part in a DataParallel": (lambda state: prefixed("_orig_mod.", state, "_orig_mod.module."), ""),
    "pytorch/examples": (
        lambda state: {"epoch": 3, "arch": "alexnet", "state_dict": prefixed("", state, "module."), "best_acc1": torch.ones(())},
        " from `state_dict`",
    ),
    "torchvision's references": (
        lambda state: {
            "model": prefixed("module.", state),
            "model_ema": prefixed("module.", state) | {"n_averaged": torch.ones(())},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
        },
        " from `model`",
    ),
    "Lightning": (
        lambda state: {"state_dict": prefixed("model.", state) | OTHER, "hyper_parameters": Settings(lr=0.1), "callbacks": {}},
        " from `state_dict`, named model.* there; ignored 1 tensor of other modules (criterion.weight)",
    ),
    "Lightning, a compiled net and its average": (
        lambda state: {"state_dict": prefixed("ema.", state) | prefixed("net._orig_mod.", state)},
        " from `state_dict`, named net.* there; ignored 13 tensors of other modules "
        "(ema.features.0.weight, ema.features.0.bias, ema.features.1.weight, ...)",
    ),
    "a name of one's own, beside arrays": (lambda state: {"student": state, "random": np.arange(3)}, " from `student`"),
}


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("form", [*FILES, "safetensors", "a file of torch before 1.6"])
def test_files_of_other_programs_are_taken(form, classes, tmp_path):
    """All their weights, or all but the layers of classes."""
    path, theirs, mine = tmp_path / "weights", net(3).state_dict(), net(classes, seed=1)
    fresh = {name: value.clone() for name, value in mine.state_dict().items()}
    change, place = FILES.get(form, FILES["torchvision's references"])
    if form == "safetensors":
        save_safetensors(theirs, path)
        place = ""
    else:
        torch.save(change(theirs), path, _use_new_zipfile_serialization="1.6" not in form)
    line, _ = load_first_weights(mine, path, class_layers(mine, Net, classes))
    taken = "13 of 13" if classes == 3 else "9 of 13"
    anew = "" if classes == 3 else "; head and heads.distilled start from random weights"
    assert line == f"{path}: loaded {taken} tensors{place}{anew}"
    expected = {name: fresh[name] if classes == 5 and name in IN_HEADS else value for name, value in theirs.items()}
    assert same(dict(mine.state_dict()), expected)


def test_weights_without_layers_of_classes_are_taken(tmp_path):
    """A backbone that was trained without labels; and batch counters, which early versions of torch did not keep."""
    path, mine = tmp_path / "backbone.pt", net(3, seed=1)
    kept = {n: v for n, v in net(3).state_dict().items() if n not in IN_HEADS and not n.endswith("num_batches_tracked")}
    torch.save(kept, path)
    line, _ = load_first_weights(mine, path, HEADS)
    assert line == f"{path}: loaded 8 of 13 tensors; head and heads.distilled start from random weights"


def without(*names: str):
    return lambda state: {name: value for name, value in state.items() if name not in names}


def cut(path) -> None:
    save_safetensors(net(3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1])


READABLE = "no weights in it; give a checkpoint of imagefeed train, a state dict saved by torch.save, a training file"
REFUSED = {
    "text": (lambda path: path.write_text("weights of mine"), READABLE),
    "no tensors": (lambda state: {"epoch": 3}, READABLE),
    "a whole module": (
        lambda state: net(3).features,
        "a whole pickled module, which may run code when it is loaded; save its weights",
    ),
    "a module in a file": (lambda state: {"model": net(3).features, "epoch": 3}, "a whole pickled module"),
    "two of a name": (lambda state: {"a": state, "b": state}, "holds several sets of weights, a, b; save only one"),
    "two nets": (
        lambda state: prefixed("a.", state) | prefixed("b.", state),
        "holds several nets of this kind, a., b.; save the state dict of only one",
    ),
    "a wrapped and a bare name": (
        lambda state: state | {"module.last.bias": state["last.bias"]},
        "has some weights twice, with and without a wrapper's name",
    ),
    "one missing": (
        without("last.bias"),
        "these are the weights of another net: 1 of 13 tensors missing (last.bias); build the net it was trained as",
    ),
    "another net": (
        lambda state: {f"layer{n}.weight": torch.ones(3) for n in range(4)},
        "these are the weights of another net: 8 of 9 tensors missing (features.0.weight, features.0.bias, features.1.weight, "
        "...), 4 unknown tensors (layer0.weight, layer1.weight, layer2.weight, ...)",
    ),
    "other shapes": (
        lambda state: state | {"last.weight": torch.ones(3, 3), "last.bias": torch.ones(3)},
        "last.weight is (3, 3) there and (4, 4) here, and 1 more differ; build the net for the same crop size",
    ),
    "whole numbers": (
        lambda state: state | {"last.bias": torch.ones(4, dtype=torch.int8)},
        "last.bias is int8 (4,) there and (4,) here; build the net",
    ),
    "a cut safetensors": (cut, "cut short or corrupt (last.bias lies beyond the end of the file); copy it again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_and_change_nothing(case, tmp_path):
    make, said = REFUSED[case]
    path, mine = tmp_path / "weights", net(3, seed=1)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    if case in ("text", "a cut safetensors"):
        make(path)
    else:
        torch.save(make(net(3).state_dict()), path)
    with pytest.raises(UserError, match=re.escape(f"{path}: {said}")):
        load_first_weights(mine, path, HEADS)
    assert same(dict(mine.state_dict()), before)


def test_an_empty_run_folder_has_no_weights(tmp_path):
    with pytest.raises(UserError, match="this folder has no checkpoint"):
        load_first_weights(net(3), tmp_path, HEADS)


def test_nothing_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    torch.save({"model": net(3).state_dict(), "args": Evil()}, tmp_path / "evil.pt")
    load_first_weights(net(3, seed=1), tmp_path / "evil.pt", HEADS)
    assert not (tmp_path / "written").exists()


def test_layers_of_classes_are_those_whose_shapes_follow_the_classes():
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    assert class_layers(Net(3), Net, 3) == HEADS
    torch.manual_seed(3)
    Net(3)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    class_layers(Net(3), Net, 3)
    assert torch.equal(torch.get_rng_state(), expected) and not torch.equal(drawn, expected)


def test_a_net_that_cannot_be_built_without_memory_says_which_are_its_classifiers():
    """As timm's nets do; of others the last layer is taken."""

    def build(classes: int) -> Net:
        torch.ones(1).item()  # has no value on the meta device
        return Net(classes)

    mine = Net(3)
    assert class_layers(mine, build, 3) == last_layers(mine) == ["last"]
    for found in (lambda: (mine.head, mine.heads), lambda: [mine.head, mine.heads["distilled"]]):
        mine.get_classifier = found
        assert {name for name in class_layers(mine, build, 3) if name != "heads"} == set(HEADS)
    mine.get_classifier = lambda: mine.head
    assert last_layers(mine) == ["head"]
