"""Odd but valid stills, which other libraries get wrong (docs/images.md), are packed with the right colors."""

import io

import numpy as np
import pytest
from PIL import Image

from imagefeed.preprocess.image import prepare_image
from imagefeed.preprocess.options import ImageOptions
from tables import image_inputs

STILLS = image_inputs.stills(lossless=False)


@pytest.mark.parametrize("name", STILLS)
def test_an_odd_still_has_the_right_colors(name):
    data, (left, right) = STILLS[name]
    prepared = prepare_image(data, ImageOptions(size=96, quality=100))
    pixels = np.asarray(Image.open(io.BytesIO(prepared.jpeg)).convert("RGB")).astype(int)
    assert pixels.shape == (96, 96, 3)
    assert np.abs(pixels[:, 12] - left).max() <= 6 and np.abs(pixels[:, -12] - right).max() <= 6
