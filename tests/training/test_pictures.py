"""Pictures of what a net has learned."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from imagefeed.dataset.manifest import Manifest
from imagefeed.model.nets import build_net
from imagefeed.training import pictures
from imagefeed.training.evaluation import Member
from imagefeed.training.inputs import Preprocessing
from imagefeed.training.pictures import (
    OTHER,
    TRUE,
    Seen,
    draw_guesses,
    draw_pictures,
    last_inputs,
    mixed,
    mosaic,
    nearest,
    show,
    varied,
)
from tests.conftest import picture
from tests.training.runs import inputs

SHOWN = Preprocessing(64)


def small(manifest: Manifest) -> Member:
    torch.manual_seed(0)
    return Member(build_net("alexnet-one-gpu", len(manifest.classes), crop_size=64), "float32", SHOWN)


def area(data: bytes, color: str) -> int:
    """Counts the pixels of a picture that have exactly this color."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return int((pixels == [int(color[n : n + 2], 16) for n in (1, 3, 5)]).all(2).sum())


def test_images_of_all_classes_come_before_a_second_one_of_any():
    assert varied([2, 2, 0, 2, 0, 1]) == [0, 2, 5, 1, 4, 3]


@pytest.mark.parametrize(
    ("right", "chosen"),
    [
        ([True] * 5 + [False] * 5, [0, 1, 2, 3, 5, 6, 7, 8]),
        ([True] * 9 + [False], [0, 1, 2, 3, 4, 5, 6, 9]),
        ([False] * 9, list(range(8))),
        ([True, False], [0, 1]),
    ],
)
def test_eight_images_are_chosen_half_of_them_guessed_right_as_far_as_there_are(right, chosen):
    assert mixed(right, list(range(len(right)))) == chosen


def test_a_kernel_is_scaled_by_its_largest_weight_and_no_weight_is_gray():
    kernels = np.zeros((3, 3, 2, 2), np.float32)
    kernels[0, 0, 0, 0], kernels[0, 2, 1, 1], kernels[1, 1, 0, 1] = 0.02, -0.01, -5
    shades = mosaic(kernels, 2)
    assert shades.shape == (5, 5, 3)  # two rows of two, a pixel of white between; the third kernel is zero, a fourth none
    assert shades[0, 0].tolist() == [1, 0.5, 0.5] and shades[1, 1].tolist() == [0.5, 0.5, 0.25]
    assert shades[0, 4].tolist() == [0.5, 0, 0.5] and (shades[3:, :2] == 0.5).all()
    assert (shades[2] == 1).all() and (shades[:, 2] == 1).all() and (shades[3:, 3:] == 1).all()


def test_the_nearest_are_those_of_all_batches_together():
    """Against numpy over all at once; fewer than asked for where there are fewer."""
    random = np.random.default_rng(0)
    activations = torch.from_numpy(random.normal(size=(50, 7)).astype(np.float32))
    pixels = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    labels, none = torch.arange(50) % 3, torch.zeros(50, 3)
    queries = torch.from_numpy(random.normal(size=(4, 7)).astype(np.float32))
    for records in (50, 4):
        cuts = [range(first, min(first + 16, records)) for first in range(0, records, 16)]
        searched, found = nearest(queries, (Seen(list(c), labels[c], pixels[c], none[c], activations[c]) for c in cuts))
        distances = np.linalg.norm(queries.numpy()[:, None] - activations.numpy()[:records], axis=2)
        wanted = distances.argsort(1)[:, :6]
        assert searched == records
        assert [[label for label, _ in row] for row in found] == (wanted % 3).tolist()
        assert [[int(image[0, 0, 0]) for _, image in row] for row in found] == wanted.tolist()


def test_activations_are_those_of_the_last_hidden_layer(tiny):
    """fc7's behind its ReLU, halved, as at test (section 4.2); of records in stored order, each once, with its own pixels."""
    member = small(tiny)
    seen = list(show(inputs(tiny), "val", member, 10**6))
    assert [n for batch in seen for n in batch.ids] == list(range(23)) and member.model.training
    for n, pixels in enumerate(seen[0].pixels[:3].float()):
        center = picture(100 + n)[96:160, 96:160].transpose(2, 0, 1)
        assert np.abs(pixels.numpy() - center).mean() < 4
    hidden = {}
    member.model.fc7.register_forward_hook(lambda _, inputs, output: hidden.update(fc7=output.relu() / 2))
    mean = torch.from_numpy(tiny.load_statistics()["channel_mean"]).float()[:, None, None]
    with torch.no_grad():
        outputs = member.model.eval()(seen[0].pixels.float() - mean)
    torch.testing.assert_close(seen[0].activations, hidden["fc7"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[0].probabilities, outputs.softmax(1), rtol=1e-3, atol=1e-3)


def test_a_net_without_full_layers_has_no_hidden_activations():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with last_inputs(net) as found:
        net(torch.zeros(1, 3, 8, 8))
    assert found == []


def test_the_true_class_has_a_bar_of_its_own_color_as_long_as_its_probability(tmp_path):
    """Only if it is among the five likeliest of seven; the other bars have the other color."""
    areas = []
    for share, label in ((0.9, 0), (0.3, 0), (0.9, 6)):
        probabilities = torch.tensor([[share, *[(1 - share) / 4] * 4, 0, 0]])
        seen = Seen([0], torch.tensor([label]), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), probabilities, probabilities)
        draw_guesses(tmp_path / "guesses.png", seen, [""] * 7)
        data = (tmp_path / "guesses.png").read_bytes()
        areas.append((area(data, TRUE), area(data, OTHER)))
    (long, rest), (short, more), (none, all_bars) = areas
    assert long == pytest.approx(3 * short, rel=0.1) and rest == pytest.approx(long / 9, rel=0.3)
    assert more == pytest.approx(short * 7 / 3, rel=0.1) and none == 0 and all_bars == pytest.approx(long + rest, rel=0.1)


def test_pictures_are_the_same_each_time_whatever_the_classes_are_called(tiny_copy, tmp_path, monkeypatch):
    """Names of many words, one long word, a formula's dollars, and characters that the font lacks; two batches a split."""
    monkeypatch.setattr(pictures, "BATCH_SIZE", 30)
    names = ("great white shark, white shark, man-eater, Carcharodon carcharias", "$\\frac$ " + "x" * 60, "蚂蚁" * 20)
    manifest = Manifest(**vars(tiny_copy) | {"titles": names})
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        written = draw_pictures(folder, inputs(manifest), small(manifest))
        assert [path.name for path in written] == ["filters.png", "guesses.png", "nearest.png"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
        with Image.open(path) as image:
            assert image.width > 500 and len(image.convert("L").getcolors()) > 50


def test_a_net_without_convolutions_and_a_dataset_without_validation_images_have_fewer_pictures(unvalidated, tmp_path):
    shown = inputs(unvalidated)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3))
    assert draw_pictures(tmp_path, shown, Member(net, "float32", SHOWN)) == []
    assert draw_pictures(tmp_path, shown, small(unvalidated)) == [tmp_path / "filters.png"]
